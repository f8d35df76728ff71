"""Read what a file of YAML says is to be merged: our own configurations and mergekit's.

A document with `strategy` is ours, one with `merge_method` is mergekit's. In ours a member may be a
merge of its own, and in a file of several documents those with a `name` may stand for members.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from zoo.device import resolve_dtype
from zoo.errors import OptionError, RecipeError, ZooError
from zoo.fusion.planning import check_count, needs_beside_tensors
from zoo.merge_files.documents import Document, Place, Problem, read_documents
from zoo.merge_files.mergekit import floating_keys, mergekit_arguments
from zoo.merge_files.stages import Stage, before
from zoo.names import is_path, suggest
from zoo.options import checked, options_of
from zoo.registry import find
from zoo.specs import FusionSpec

_FIELDS = ("strategy", "members", "base", "weight", "dtype", "rounding", "seed")
_ROUNDINGS = ("nearest", "stochastic")


def read_config(file: str | os.PathLike[str]) -> Stage:
    """The last merge of a file, with those that it needs.

    Paths in our own documents start from the file's folder, in mergekit's from the current one.
    Raises RecipeError, with line and field, for everything that is wrong in a document; for names
    that nothing has, that two have, or that lead in a circle.
    """
    documents = read_documents(file)
    if not documents:
        raise RecipeError(str(file), [(None, "", "is empty; expected 'strategy' and 'members'")])
    return _Reader(documents).last()


class _Reader:
    def __init__(self, documents: Sequence[Document]) -> None:
        self.documents = documents
        self.named: dict[str, Document] = {}
        for document in documents:
            if not isinstance(document.values, dict):
                raise document.error([((), "expected a mapping with 'strategy' and 'members'")])
            name = document.values.get("name")
            if name is None:
                continue
            if not isinstance(name, str):
                raise document.error([(("name",), f"is {name!r}, expected text")])
            if name in self.named:
                raise document.error([(("name",), f"{name!r} is the name of two merges")])
            self.named[name] = document
        self.found: dict[str, Stage] = {}
        self.open: list[str] = []

    def last(self) -> Stage:
        """The merge that nothing needs: the one without a name, or the one that is not named by
        others. All others must be needed by it."""
        free = [document for document in self.documents if "name" not in document.values]
        if len(free) > 1:
            raise free[1].error([((), "a second merge without 'name'; only the last one, whose "
                                  "result is written, does without")])
        if free or len(self.documents) == 1:
            document = free[0] if free else self.documents[0]
            stage = self.stage(document)
        else:
            stages = {name: self.by_name(name, document, ("name",))
                      for name, document in self.named.items()}
            needed = {each for stage in stages.values() for each in before(stage)}
            ends = [name for name, stage in stages.items() if stage not in needed]
            if len(ends) > 1:
                raise self.named[ends[1]].error([(("name",), f"{ends[0]!r} and {ends[1]!r} are "
                                                  "both needed by no other merge; leave 'name' "
                                                  "out of the one whose result you want")])
            return stages[ends[0]]
        idle = [name for name in self.named if name not in self.found
                and self.named[name] is not document]
        if idle:
            raise self.named[idle[0]].error([(("name",), f"no merge needs {idle[0]!r}")])
        return stage

    def by_name(self, name: str, document: Document, place: Place) -> Stage:
        """A merge that a field of a document names."""
        if name in self.open:
            circle = " needs ".join([*self.open[self.open.index(name):], name])
            raise document.error([(place, f"leads in a circle: {circle}")])
        if name not in self.found:
            self.open.append(name)
            self.found[name] = self.stage(self.named[name])
            self.open.pop()
        return self.found[name]

    def stage(self, document: Document) -> Stage:
        if "merge_method" in document.values:
            return self._mergekits(document)
        return _Ours(self, document).stage((), document.values)

    def _mergekits(self, document: Document) -> Stage:
        def keys_of(place: str) -> list[str]:
            each: str | Stage = place
            if place in self.named:
                each = self.by_name(place, document, ("models",))
            while isinstance(each, Stage):
                each = each.inputs[0]
            return floating_keys(each)

        given = mergekit_arguments(document, self.named, keys_of)
        places = {"models": given.pop("inputs"), "base_model": [given.pop("base", None)]}

        def of(field: str) -> list[Any]:
            return [self.by_name(each, document, (field,)) if each in self.named else each
                    for each in places[field]]

        strategy = given.pop("strategy")
        stage = Stage(document.values.get("name") or strategy, strategy, tuple(of("models")),
                      of("base_model")[0], given)
        spec = find(strategy, FusionSpec)
        known = {option.name for option in options_of(spec)}
        try:
            check_count(spec, len(stage.inputs))
            checked(spec, {name: value for name, value in given.items() if name in known})
        except ZooError as error:
            raise document.error([(("merge_method",), str(error))]) from None
        return stage


class _Ours:
    """Stages of one document of ours; all its problems are told at once."""

    def __init__(self, reader: _Reader, document: Document) -> None:
        self.reader = reader
        self.document = document
        self.home = Path(document.file).absolute().parent

    def stage(self, place: Place, values: Mapping[str, Any]) -> Stage:
        problems = [*self._problems(place, values)]
        if problems:
            raise self.document.error(problems)
        return self._built(place, values)

    def _built(self, place: Place, values: Mapping[str, Any]) -> Stage:
        def member(where: Place, given: Any) -> str | Stage:
            if isinstance(given, Mapping):
                return self._built(where, given)
            if given in self.reader.named:
                return self.reader.by_name(given, self.document, where)
            return self._place(given)

        base = values.get("base")
        return Stage(
            str(values.get("name") or find(values["strategy"], FusionSpec).name.rpartition("/")[2]),
            values["strategy"],
            tuple(member((*place, "members", str(number)), each)
                  for number, each in enumerate(values["members"])),
            None if base is None else member((*place, "base"), base),
            {name: value for name, value in values.items()
             if name not in ("name", "strategy", "members", "base") and value is not None})

    def _problems(self, place: Place, values: Mapping[str, Any]) -> Iterator[Problem]:
        missing = [name for name in ("strategy", "members") if values.get(name) is None]
        yield from (((*place, name), "is missing") for name in missing)
        members = values.get("members")
        if members is not None and (not isinstance(members, list) or not members):
            yield (*place, "members"), f"is {members!r}, expected a list of members"
            members = None
        for number, each in enumerate(members or ()):
            yield from self._member((*place, "members", str(number)), each)
        if values.get("base") is not None:
            yield from self._member((*place, "base"), values["base"])
        if "strategy" not in missing:
            yield from self._strategy(place, values, None if members is None else len(members))
        if values.get("dtype") is not None:
            yield from _told((*place, "dtype"), lambda: resolve_dtype(values["dtype"]))
        if values.get("rounding", "nearest") not in _ROUNDINGS:
            yield (*place, "rounding"), f"is {values['rounding']!r}, expected " + " or ".join(
                map(repr, _ROUNDINGS))
        seed = values.get("seed", 0)
        if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
            yield (*place, "seed"), f"is {seed!r}, expected a whole number, 0 or more"

    def _member(self, place: Place, given: Any) -> Iterator[Problem]:
        if isinstance(given, Mapping):
            yield from self._problems(place, given)
        elif not isinstance(given, str):
            yield place, f"is {given!r}, expected a file, folder, address or a merge"
        elif given not in self.reader.named and not _is_address(given) \
                and not Path(self._place(given)).exists():
            near = suggest(given, self.reader.named, n=1)
            hint = f"; did you mean the merge {near[0]!r}?" if near else ""
            yield place, f"there is no file or folder {self._place(given)}{hint}"

    def _strategy(
        self, place: Place, values: Mapping[str, Any], members: int | None
    ) -> Iterator[Problem]:
        field = (*place, "strategy")
        if not isinstance(values["strategy"], str):
            yield field, f"is {values['strategy']!r}, expected the name of a strategy"
            return
        try:
            spec = find(values["strategy"], FusionSpec)
        except ZooError as error:
            yield field, str(error)
            return
        more = needs_beside_tensors(spec)
        if spec.kind != "weights" or more:
            lacks = f"fuses {spec.kind}" if spec.kind != "weights" else f"needs {more}"
            yield field, f"{spec.name} {lacks}, and files hold weights alone; use zoo.fuse"
            return
        if "base" in spec.uses and values.get("base") is None:
            yield (*place, "base"), (f"is missing: {spec.name} works on what each member changed "
                                     "in a common base")
        if "base" not in spec.uses | spec.can_use and values.get("base") is not None:
            yield (*place, "base"), f"{spec.name} does not use a base; leave it out"
        if members is not None:
            yield from _told((*place, "members"), lambda: check_count(spec, members))
        known = [option.name for option in options_of(spec)]
        fields = [*_FIELDS, *(["name"] if not place else [])]
        options = {name: value for name, value in values.items() if name not in fields}
        for name in [name for name in options if name not in known]:
            near = suggest(str(name), [*fields, *known], n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"
            yield (*place, str(name)), f"is no field, and no option of {spec.name}; {hint}"
            del options[name]
        for name, value in options.items():
            yield from _told((*place, name), lambda name=name, value=value: checked(
                spec, {name: value}), OptionError)

    def _place(self, given: str) -> str:
        return given if _is_address(given) else str(self.home / Path(given).expanduser())


def _is_address(given: str) -> bool:
    return not is_path(given) and bool(re.match(r"[a-z][a-z0-9-]+:", given))


def _told(place: Place, attempt: Any, kind: type[ZooError] = ZooError) -> Iterator[Problem]:
    try:
        attempt()
    except kind as error:
        yield place, str(error)
