"""Values as they are typed on a command line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml

from zoo.errors import OptionError


def value(text: str) -> Any:
    """`0.2`, `true`, `[0.3, 0.7]`, `{"*": 1}` or text, as YAML reads them; `1e-3` is a number."""
    try:
        return float(text) if not text.lstrip("+-").isdigit() else int(text)
    except ValueError:
        pass
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def split_options(
    names: Sequence[str], extra: Sequence[str]
) -> tuple[list[str], dict[str, Any]]:
    """Plain arguments, and the options among them that only the strategy knows.

    names, extra: what the parser could not place: `A B --density 0.2 --flag`. An option takes the
    next word unless that is an option too; without one it is true.
    """
    plain: list[str] = []
    options: dict[str, Any] = {}
    words = [*names, *extra]
    while words:
        word = words.pop(0)
        if not word.startswith("--") or word == "--":
            plain.append(word)
            continue
        name, equals, text = word[2:].partition("=")
        if not equals and words and not words[0].startswith("--"):
            text, equals = words.pop(0), "="
        if name.startswith("no-") and not equals:
            options[name[3:].replace("-", "_")] = False
        else:
            options[name.replace("-", "_")] = value(text) if equals else True
    return plain, options


def attacks(given: Sequence[str]) -> dict[str, dict[str, Any]]:
    """`pgd:eps=0.1,steps=40` as {"pgd": {"eps": 0.1, "steps": 40}}."""
    found: dict[str, dict[str, Any]] = {}
    for text in given:
        name, _, rest = text.partition(":")
        options = {}
        for pair in filter(None, rest.split(",")):
            key, equals, number = pair.partition("=")
            if not equals:
                raise OptionError(name, f"{pair!r} is no option; write {name}:eps=0.1,steps=40")
            options[key.strip().replace("-", "_")] = value(number.strip())
        found[name] = options
    return found
