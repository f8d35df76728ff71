"""Merges of merges: each stage is a member of the next, in a temporary folder beside the result."""

from __future__ import annotations

import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from zoo.atomic import folder_beside
from zoo.device import resolve_dtype
from zoo.errors import DiskFull
from zoo.fusion.merging import sort_keys
from zoo.fusion.weighting import resolve_options, resolve_weights
from zoo.merge_files.folders import located
from zoo.merge_files.merging import merge
from zoo.options import checked, options_of
from zoo.progress import say
from zoo.registry import find, load
from zoo.specs import FusionSpec
from zoo.tensors import StoredTensors, open_tensors

_NOT_IN_NAMES = re.compile(r"[^\w.-]+")


@dataclass(frozen=True, eq=False)
class Stage:
    """One merge. name: for people, and of its folder. inputs, base: files, folders, addresses, or
    stages before it. arguments: the other ones of `zoo.merge`, options among them."""

    name: str
    strategy: str
    inputs: tuple[str | Stage, ...]
    base: str | Stage | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @property
    def needed(self) -> tuple[str | Stage, ...]:
        return self.inputs if self.base is None else (*self.inputs, self.base)


def merge_stages(last: Stage, out: str | os.PathLike[str], **arguments: Any) -> Path:
    """Merge all stages that this one needs, each once, and then it.

    arguments: more of `zoo.merge`; `threads`, `seed`, `rounding` and `hashes` hold in every stage
    that does not say otherwise. What the stages between take on the disk is gone in the end.
    Raises DiskFull before any work when the disk cannot hold all of it, FormatError for inputs that
    are damaged or missing, OptionError for weights that do not fit.
    """
    out = Path(out).expanduser()
    order = [*dict.fromkeys(before(last))]
    made: dict[Stage, str] = {}

    def place_of(each: str | Stage) -> str:
        return made[each] if isinstance(each, Stage) else each

    def run(stage: Stage, place: Path, more: Mapping[str, Any]) -> Path:
        base = {} if stage.base is None else {"base": place_of(stage.base)}
        return merge([place_of(each) for each in stage.inputs], stage.strategy, out=place,
                     **{**more, **stage.arguments, **base})

    if not order:
        return run(last, out, arguments)
    _check([*order, last], out)
    shared = {name: value for name, value in arguments.items()
              if name in ("threads", "seed", "rounding", "hashes")}
    with folder_beside(out) as folder:
        for number, stage in enumerate(order, 1):
            say(f"merge {number} of {len(order) + 1}: {stage.name}")
            place = folder / f"{number}-{_NOT_IN_NAMES.sub('-', stage.name)}"
            with warnings.catch_warnings():  # the last merge says it
                warnings.filterwarnings("ignore", message="batch norm's statistics were pooled")
                made[stage] = str(run(stage, place, shared))
        return run(last, out, arguments)


def before(stage: Stage) -> Iterator[Stage]:
    """The stages that this one needs, each after those that it needs itself."""
    for each in stage.needed:
        if isinstance(each, Stage):
            yield from before(each)
            yield each


def _check(order: list[Stage], out: Path) -> None:
    """Look at the inputs of all stages before the first begins: their files, the weights, and the
    bytes that will be written."""
    opened: dict[str, StoredTensors] = {}
    size: dict[Stage, int] = {}
    first: dict[Stage, StoredTensors] = {}
    for stage in order:
        for each in stage.needed:
            if isinstance(each, str) and each not in opened:
                opened[each] = open_tensors(located(each)[0])
        one = stage.inputs[0]
        state = first[stage] = opened[one] if isinstance(one, str) else first[one]
        dtype = stage.arguments.get("dtype")
        wanted = None if dtype is None else resolve_dtype(dtype)
        spec = find(stage.strategy, FusionSpec)
        floating = [key for key in state if state.dtype(key).is_floating_point]
        resolve_weights(stage.arguments.get("weight"), floating, len(stage.inputs), spec.name)
        known = {option.name for option in options_of(spec)}
        options = {name: value for name, value in stage.arguments.items() if name in known}
        resolve_options(spec, load(spec), checked(spec, options), floating, len(stage.inputs),
                        fused=sort_keys(spec, floating).fused)
        size[stage] = sum(
            torch.Size(state.shape(key)).numel()
            * (wanted if wanted and key in floating else state.dtype(key)).itemsize
            for key in state if key not in state.aliases)
    needed = sum(size.values())
    place = next(folder for folder in out.absolute().parents if folder.exists())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise DiskFull(out, needed, free)
