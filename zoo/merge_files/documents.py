"""YAML documents with the line of every field, for errors that say where something is wrong."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import yaml

from zoo.errors import RecipeError

Place: TypeAlias = tuple[str, ...]
Problem: TypeAlias = tuple[Place, str]


@dataclass(frozen=True)
class Document:
    """One document of a file. lines: the line of each field; items of a list are called 0, 1, …"""

    file: str
    values: Any
    lines: Mapping[Place, int] = field(default_factory=dict)

    def error(self, problems: Iterable[Problem]) -> RecipeError:
        """What is wrong at these places, with their lines, in the order of the file."""
        told = [(self.line(place), ".".join(place), problem)
                for place, problem in dict(problems).items()]
        return RecipeError(self.file, sorted(told, key=lambda each: each[0] or 0))

    def line(self, place: Place) -> int | None:
        """The line of a field, or of the nearest thing around it."""
        while place and place not in self.lines:
            place = place[:-1]
        return self.lines.get(place)


def read_documents(given: str | os.PathLike[str]) -> list[Document]:
    """The documents of a YAML file. Raises RecipeError for what is none, and for a field that
    stands twice, with the line."""
    file = Path(given).expanduser()
    found: list[Document] = []
    try:
        loader = _Loader(file.read_text("utf-8"))
        while loader.check_node():
            node = loader.get_node()
            twice: list[Problem] = []
            lines = dict(_lines(node, (), twice))
            found.append(Document(str(file), loader.construct_document(node), lines))
            if twice:
                raise found[-1].error(twice)
    except OSError as error:
        raise RecipeError(str(file), [(None, "", f"cannot be read: {error.strerror}")]) from None
    except UnicodeDecodeError as error:
        raise RecipeError(str(file), [(None, "", f"is not UTF-8: {error.reason}")]) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = " ".join(filter(None, (getattr(error, "context", ""),
                                         getattr(error, "problem", "") or str(error))))
        raise RecipeError(str(file), [(mark.line + 1 if mark else None, "",
                                       f"is not YAML: {problem}")]) from None
    return found


class _Loader(yaml.SafeLoader):
    """YAML 1.1 takes 1e-3 for text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"))


def _lines(node: Any, place: Place, twice: list[Problem]) -> Iterator[tuple[Place, int]]:
    """The line of every field; a field that stands twice goes into `twice`."""
    yield place, node.start_mark.line + 1
    if isinstance(node, yaml.SequenceNode):
        for number, value in enumerate(node.value):
            yield from _lines(value, (*place, str(number)), twice)
    if isinstance(node, yaml.MappingNode):
        seen: set[Place] = set()
        for key, value in node.value:
            inner = (*place, str(key.value))
            if inner in seen:
                twice.append((inner, "stands here twice"))
            seen.add(inner)
            yield from _lines(value, inner, twice)
            yield inner, key.start_mark.line + 1
