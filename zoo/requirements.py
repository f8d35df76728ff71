"""The plugins that a saved model says it needs, compared with those that are installed. Nothing is
imported for it, and nothing is ever installed because a file asks for it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from zoo.discovery import Plugin, discovery
from zoo.errors import BadName, FormatError, MissingPlugin
from zoo.known import known_plugins
from zoo.names import canonical_namespace


def requirements(file: Path, described: Mapping[str, Any]) -> Iterator[tuple[str, Requirement]]:
    """Namespace and requirement of each entry under `zoo.requires`.

    Raises FormatError for what is no `distribution>=version`: an address or a marker has no place
    in a line that a user may run.
    """
    entries = described.get("requires") or []
    if not isinstance(entries, list):
        raise FormatError(file, f"is damaged: zoo.requires is {entries!r}, expected a list")
    for needed in entries:
        try:
            requirement = Requirement(needed["requirement"])
            namespace = canonical_namespace(needed["namespace"])
        except (TypeError, KeyError, AttributeError, BadName, InvalidRequirement):
            raise FormatError(file, f"is damaged: zoo.requires has {needed!r}") from None
        if requirement.url or requirement.marker or requirement.extras:
            raise FormatError(file, f"is damaged: zoo.requires has {needed['requirement']!r}, "
                              "expected 'distribution>=version'")
        yield namespace, requirement


def missing(namespace: str, wanted: Requirement, claimed_by: str) -> MissingPlugin | None:
    """What to raise when no installed plugin meets the requirement; None when one does."""
    plugin = discovery().get(namespace)
    if plugin is not None and _meets(plugin, wanted):
        return None
    known = known_plugins().get(namespace)
    other = known.distribution if known and not _same(known.distribution, wanted.name) else ""
    return MissingPlugin(namespace, str(wanted), claimed_by, found=plugin.source if plugin else "",
                         known=other)


def requirement_of(plugin: Plugin, since: Iterable[str]) -> str:
    """What a model needs that was made with this plugin. since: the `loads_since` of what it is
    made with; "" stands for the plugin's own version."""
    try:
        newest = max(Version(version or plugin.version) for version in since)
    except InvalidVersion:  # a distribution without a version, or with one of its own making
        return plugin.distribution
    return f"{plugin.distribution}>={newest.public}"


def _meets(plugin: Plugin, wanted: Requirement) -> bool:
    if not _same(plugin.distribution, wanted.name):
        return False
    try:
        return wanted.specifier.contains(Version(plugin.version), prereleases=True)
    except InvalidVersion:
        return not wanted.specifier


def _same(one: str, other: str) -> bool:
    return canonicalize_name(one) == canonicalize_name(other)
