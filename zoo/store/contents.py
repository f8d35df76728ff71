"""Which files make a model's folder, on disk and on the Hub."""

from __future__ import annotations

import re

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
CARD = "README.md"
# Which repository and commit a pulled folder is; written beside it, never pushed.
ORIGIN = ".zoo-origin.json"

# The card's own, drawn by zoo; any other is refused by name.
_PICTURES = r"(confusion|calibration|comparison|interpolation)(-dark)?\.(png|svg)"
_LICENCE = r"(LICEN[CS]E|NOTICE)(\.md|\.txt)?"
_PUBLISHED = re.compile(
    rf"config\.json|README\.md|{_LICENCE}|{_PICTURES}"
    r"|[^/]+\.safetensors(\.index\.json)?")
# Of an earlier model in the same repository, what would be read with or instead of this one.
_OUTDATED = re.compile(
    rf"model(-\d{{5}}-of-\d{{5}})?\.safetensors|model\.safetensors\.index\.json|{_PICTURES}")
_IGNORED = re.compile(r"\.DS_Store|\.zoo-origin\.json")
# What a download asks for; the Hub's client matches these against whole paths.
FETCHED = ("config.json", "README.md", "LICEN[CS]E*", "NOTICE*", "*.safetensors",
           "*.safetensors.index.json", "confusion*.???", "calibration*.???", "comparison*.???",
           "interpolation*.???")
NOT_FETCHED = ("*/*",)


def is_published(name: str) -> bool:
    """Whether a file of this name belongs to a model, and so may go to the Hub."""
    return bool(_PUBLISHED.fullmatch(name))


def is_outdated(name: str) -> bool:
    """Whether a file in the repository has to go when the model that is pushed lacks it."""
    return bool(_OUTDATED.fullmatch(name))


def is_ignored(name: str) -> bool:
    """Whether it may lie beside a model, and stays there."""
    return bool(_IGNORED.fullmatch(name))


def is_licence(name: str) -> bool:
    """Whether it is a text that goes wherever the model goes."""
    return bool(re.fullmatch(_LICENCE, name))
