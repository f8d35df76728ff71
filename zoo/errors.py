"""One tree of errors. The message says what was given, what was expected and what to do;
the same data sits on attributes, so a program never has to parse the text."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path


class ZooError(Exception):
    """The root of every error that zoo raises on purpose."""


class BadName(ZooError, ValueError):
    """A name that cannot be one: wrong characters, an empty part, an unknown scheme."""

    def __init__(self, given: str, problem: str) -> None:
        super().__init__(f"{given!r} is not a name: {problem}")
        self.given = given
        self.problem = problem


class NamespaceTaken(ZooError, ValueError):
    """A new plugin asks for a namespace that belongs to another distribution."""

    def __init__(self, namespace: str, owner: str, problem: str) -> None:
        super().__init__(f"the namespace {namespace!r} {problem}; choose another")
        self.namespace = namespace
        self.owner = owner


class UnknownName(ZooError, LookupError):
    """Nothing of this kind is registered under this name."""

    def __init__(
        self, given: str, kind: str, suggestions: Sequence[str] = (), hint: str = ""
    ) -> None:
        message = f"no {kind} is called {given!r}"
        if suggestions:
            message += f"; did you mean {_either(suggestions)}?"
        if hint:
            message += f" {hint[0].upper()}{hint[1:]}" if suggestions else f"; {hint}"
        super().__init__(message)
        self.given = given
        self.kind = kind
        self.suggestions = tuple(suggestions)
        self.hint = hint


class SpecError(ZooError, ValueError):
    """A plugin described something wrongly: a field of a spec is missing or malformed."""


class PluginError(ZooError):
    """A plugin could not be loaded; only the names of its namespace are lost."""

    def __init__(self, namespace: str, distribution: str | None, reason: str) -> None:
        source = f" (from {distribution})" if distribution else ""
        super().__init__(f"the plugin {namespace!r}{source} could not be loaded: {reason}")
        self.namespace = namespace
        self.distribution = distribution
        self.reason = reason


class MissingPlugin(ZooError, LookupError):
    """A namespace is needed and no installed distribution (of a new enough version) owns it."""

    def __init__(
        self, namespace: str, requirement: str, claimed_by: str, found: str = "", known: str = ""
    ) -> None:
        install = f"pip install {shlex.quote(requirement)}"
        state = f"{found} is installed" if found else "it is not installed"
        beware = f" Beware: that namespace is known to be {known}'s." if known else ""
        super().__init__(
            f"{claimed_by} says it needs {requirement} for the namespace {namespace!r}, "
            f"and {state}.{beware} If you trust that, run: {install}"
        )
        self.namespace = namespace
        self.requirement = requirement
        self.install = install
        self.claimed_by = claimed_by
        self.found = found
        self.known = known


class OptionError(ZooError, ValueError):
    """An option of a strategy is unknown, missing, or has a value it cannot have."""

    def __init__(self, owner: str, problem: str, allowed: Iterable[str] = ()) -> None:
        self.owner = owner
        self.problem = problem
        self.allowed = tuple(allowed)
        listing = f"; its options are {', '.join(self.allowed)}" if self.allowed else ""
        super().__init__(f"{owner}: {problem}{listing}")


class FusionError(ZooError, ValueError):
    """These members cannot be fused this way; says why, and what would work instead."""

    def __init__(self, strategy: str, reason: str, instead: str = "") -> None:
        super().__init__(f"{strategy} cannot fuse these members: {reason}"
                         + (f". {instead}" if instead else ""))
        self.strategy = strategy
        self.reason = reason
        self.instead = instead


class ShapeMismatch(FusionError):
    """One tensor has different shapes, or is present only in some of the members."""

    def __init__(self, strategy: str, key: str, problem: str, instead: str = "") -> None:
        super().__init__(strategy, f"tensor {key!r} {problem}", instead)
        self.key = key


class NotFitted(ZooError, RuntimeError):
    """A strategy that learns from held-out data was used before it had seen any."""


class WeightsError(ZooError, RuntimeError):
    """Weights that were asked for cannot be had, or do not belong to this network."""


class ProvenanceError(ZooError, RuntimeError):
    """What a model says of how it was made does not suffice to make it again; says what to do."""

    def __init__(self, reference: str, problem: str) -> None:
        super().__init__(f"{reference} cannot be reproduced: {problem}")
        self.reference = reference
        self.problem = problem


class HubError(ZooError, RuntimeError):
    """A model cannot be pushed to the Hub as it is; says what to do.

    reason, one word: `login`, `rights`, `taken`, `gated`, `missing`, `revision`, `changed`,
    `offline`, `broken`, `busy`, `disk`, `licence`, `files`, `members`, `public`,
    `refused` or `other`.
    """

    def __init__(self, repository: str, reason: str, problem: str) -> None:
        super().__init__(f"{repository}: {problem}")
        self.repository = repository
        self.reason = reason
        self.problem = problem


class DataError(ZooError, ValueError):
    """A data set is missing or wrong somewhere; names the file and, where there is one, the row."""

    def __init__(
        self, problem: str, *, file: str | Path | None = None, row: int | None = None
    ) -> None:
        where = f"{file}" if file is not None else ""
        if row is not None:
            where += f", row {row}"
        super().__init__(f"{where}: {problem}" if where else problem)
        self.problem = problem
        self.file = None if file is None else str(file)
        self.row = row


class FormatError(ZooError, ValueError):
    """A file or folder is damaged, foreign, or written by a newer version."""

    def __init__(self, file: str | Path, problem: str) -> None:
        super().__init__(f"{file}: {problem}")
        self.file = str(file)
        self.problem = problem


class RecipeError(ZooError, ValueError):
    """A recipe does not say something that can be run; names line and field."""

    def __init__(self, file: str, problems: Sequence[tuple[int | None, str, str]]) -> None:
        lines = [
            f"{file}{f':{line}' if line else ''}: {field + ': ' if field else ''}{problem}"
            for line, field, problem in problems
        ]
        super().__init__("\n".join(lines))
        self.file = file
        self.problems = tuple(problems)


class DiskFull(ZooError, OSError):
    """There is not enough room for what is about to be written."""

    def __init__(self, file: str | Path, needed: int, free: int) -> None:
        super().__init__(f"{file}: {needed:,} bytes are to be written and the disk has {free:,} "
                         "left; make room or choose another place")
        self.file = str(file)
        self.needed = needed
        self.free = free


class DeviceError(ZooError, ValueError):
    """A device that is not spelled right or is not on this machine."""


class TrainingError(ZooError, RuntimeError):
    """Training cannot start or cannot go on: the loss is not finite, nothing is trainable, …"""


class ExportError(ZooError, RuntimeError):
    """A model cannot be written as one file, or the file does not answer as the model does."""


def _either(names: Sequence[str]) -> str:
    quoted = [repr(name) for name in names]
    return quoted[0] if len(quoted) == 1 else f"{', '.join(quoted[:-1])} or {quoted[-1]}"
