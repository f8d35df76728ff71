"""What the licences of pretrained members mean for the model that is made of them.

A help, and no legal advice: licences are known by name, and what is not known is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

# Within a row everything may be combined, and the last licence that occurs is the one to keep.
_PERMISSIVE = ("cc0-1.0", "unlicense", "isc", "mit", "bsd-2-clause", "bsd-3-clause", "cc-by-4.0",
               "apache-2.0")
_ROWS = (
    (*_PERMISSIVE, "cc-by-nc-4.0", "cc-by-nc-sa-4.0"),
    (*_PERMISSIVE, "cc-by-sa-4.0"),
    (*_PERMISSIVE, "lgpl-3.0", "gpl-3.0", "agpl-3.0"),
)
_CONSEQUENCES = (
    (("cc0-1.0", "unlicense"), "It asks for nothing."),
    (("cc-by-4.0",), "Name the authors when you pass it on."),
    (_PERMISSIVE, "Pass its text and the authors' notices on with the model."),
    (("cc-by-nc-4.0",), "Commercial use is not allowed. Name the authors."),
    (("cc-by-nc-sa-4.0",), "Commercial use is not allowed. Name the authors, and pass on what you "
                           "make of it under the same licence only."),
    (("cc-by-sa-4.0",), "Name the authors, and pass on what you make of it under the same licence "
                        "only."),
    (("lgpl-3.0", "gpl-3.0", "agpl-3.0"), "Pass on what you make of it under the same licence "
                                          "only."),
)
_SAY_NOTHING = ("", "other", "unknown")
# Any of these says that the weights came from somewhere: they were not made here from nothing.
_PRETRAINED = ("repository", "url", "package", "tag", "architecture", "license", "sha256")


def terms(made: Mapping[str, Any] | None) -> tuple[str | None, str]:
    """The licence of a model, and "" or why there is none that can be said without its author.

    made: its `made_with`; None of a model that does not say what it was made with. Without
    pretrained members there is neither a licence nor a problem.
    """
    if made is None:
        return None, "it does not say what it was made with, so its licence is unknown"
    found: dict[str, str] = {}
    for name, licence in pretrained([made.get("sources"), made.get("base")]):
        if licence in _SAY_NOTHING:
            return None, f"the licence of {name} is unknown"
        found.setdefault(licence, name)
    if len(found) < 2:
        return next(iter(found), None), ""
    for row in _ROWS:
        if set(found) <= set(row):
            return max(found, key=row.index), ""
    told = ", ".join(f"{licence} ({name})" for licence, name in sorted(found.items()))
    return None, f"these licences do not go together as far as zoo knows: {told}"


def consequence(licence: str) -> str:
    """What a licence asks of those who use the model, in a sentence; "" where nothing is known."""
    return next((sentence for names, sentence in _CONSEQUENCES if licence in names), "")


def pretrained(told: object) -> Iterator[tuple[str, str]]:
    """Repository, or name where there is none, and licence of each source that has weights from
    elsewhere. One that was fused itself has those of what it was fused from, and its own where its
    repository states one."""
    for source, fused in sources(told):
        if (source.get("repository") and source.get("license")) if fused else any(
                source.get(key) for key in _PRETRAINED):
            yield (str(source.get("repository") or source.get("name")),
                   str(source.get("license") or "").lower())


def sources(told: object) -> Iterator[tuple[Mapping[str, Any], bool]]:
    """All sources in a `made_with`, in a source, or in a list of them, and what these were fused
    from; of each whether it was fused itself."""
    if isinstance(told, list):
        for each in told:
            yield from sources(each)
    elif isinstance(told, Mapping):
        recipe = told.get("recipe")
        inner = [told.get(key) for key in ("sources", "base", "members")]
        if isinstance(recipe, Mapping):
            inner += [recipe.get("sources"), recipe.get("base")]
        yield told, any(inner)
        yield from sources([each for each in inner if each])
