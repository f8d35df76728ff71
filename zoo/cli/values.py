"""Values and options as they are typed on a command line."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from typing import Any

import typer

from zoo.cache.kept import parse_size
from zoo.errors import OptionError
from zoo.options import options_of
from zoo.specs import Spec


def value(text: str) -> Any:
    """`0.2`, `true`, `[0.3, 0.7]`, `{"*": 1}` or text, as in a recipe; `1e-3` is a number.

    Raises BadParameter for a list or mapping that is none in YAML.
    """
    import yaml

    for read in (int, float, yaml.safe_load):
        try:
            return read(text)
        except (ValueError, yaml.YAMLError):
            continue
    if text[:1] + text[-1:] in ("[]", "{}"):
        raise typer.BadParameter(f"{text!r} is no list or mapping in YAML; a pattern that begins "
                                 "with '*' needs quotes: '{layer4.*: 0.3, \"*\": 1}'")
    return text


def split_options(
    words: Sequence[str], spec: Spec, function: Callable[..., Any]
) -> tuple[list[str], dict[str, Any]]:
    """Plain arguments, and the options among them that only the strategy knows.

    words: what the parser could not place: `A B --density 0.2 --no-normalise`. An option takes the
    next word, unless it is a flag. function: what the options are passed to; its own arguments
    are not the strategy's. Raises BadParameter for what is no option, or has no value.
    """
    flags = {option.name for option in options_of(spec) if option.type == "bool"}
    own = inspect.signature(function).parameters
    plain: list[str] = []
    options: dict[str, Any] = {}
    left = list(words)
    while left:
        word = left.pop(0)
        if not word.startswith("-"):
            plain.append(word)
            continue
        spelling, equals, text = word.partition("=")
        name = spelling[2:].replace("-", "_")
        if not spelling.startswith("--") or name in own:
            raise typer.BadParameter(f"there is no option {spelling}")
        if equals:
            given = value(text)
        elif name in flags:
            given = value(left.pop(0)) if left and left[0] in ("true", "false") else True
        elif name.startswith("no_") and name[3:] in flags:
            name, given = name[3:], False
        elif left and not left[0].startswith("--"):
            given = value(left.pop(0))
        else:
            raise typer.BadParameter(f"{spelling} needs a value")
        if name in options:
            raise typer.BadParameter(f"{spelling} is given twice")
        options[name] = given
    return plain, options


def size(text: str) -> int:
    """`2GB`, `500MB`, `64KB` or a number, in bytes; 1 KB is 1,000 bytes, 1 KiB is 1,024."""
    try:
        return parse_size(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def duration(text: str) -> float:
    """`7d`, `12h`, `30m` or `45s`, in seconds."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([dhms])", text.strip(), re.IGNORECASE)
    if not match:
        raise typer.BadParameter(f"{text!r} is no length of time; write 7d, 12h or 30m")
    return float(match[1]) * {"d": 86400, "h": 3600, "m": 60, "s": 1}[match[2].lower()]


def searched(given: Sequence[str]) -> dict[str, Any]:
    """`scale=0.3..1.5` and `density=[0.1, 0.2]` as what `zoo.fuse` takes for its search."""
    found: dict[str, Any] = {}
    for text in given:
        name, equals, space = text.partition("=")
        if not equals or not name:
            raise typer.BadParameter(f"{text!r} names no option; write scale=0.3..1.5",
                                     param_hint="--search")
        found[name.strip().replace("-", "_")] = value(space)
    return found


def attacks(given: Sequence[str]) -> dict[str, dict[str, Any]]:
    """`pgd:eps=0.1,steps=40` as {"pgd": {"eps": 0.1, "steps": 40}}."""
    found: dict[str, dict[str, Any]] = {}
    for text in given:
        name, _, rest = text.partition(":")
        if name in found:
            raise OptionError(name, "the attack is given twice; give it once")
        found[name] = {}
        for pair in filter(None, rest.split(",")):
            key, equals, number = pair.partition("=")
            if not equals:
                raise OptionError(name, f"{pair!r} is no option; write {name}:eps=0.1,steps=40")
            found[name][key.strip().replace("-", "_")] = value(number.strip())
    return found
