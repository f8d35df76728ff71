"""Merge files: map the inputs, lay the output out, and fill it in piece by piece."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

import zoo
from zoo.device import resolve_dtype
from zoo.errors import FusionError, OptionError
from zoo.fusion.merging import (
    mixture,
    pooled,
    sort_tensors,
    want_finite,
    want_finite_result,
)
from zoo.fusion.planning import needs_beside_tensors
from zoo.fusion.rounding import rounded
from zoo.fusion.stream import Merge, flat_part, run
from zoo.fusion.weighting import Weight, resolve_options, resolve_weights
from zoo.merge_files.folders import located, source, want_same_labels, written
from zoo.options import checked
from zoo.progress import task
from zoo.registry import find, load
from zoo.specs import FusionSpec
from zoo.tensors import laid_out, open_tensors

Rounding = Literal["nearest", "stochastic"]

_COPIED = 1 << 24


def merge(
    inputs: Sequence[str | os.PathLike[str]],
    strategy: str,
    *,
    out: str | os.PathLike[str],
    base: str | os.PathLike[str] | None = None,
    weight: Weight | None = None,
    dtype: str | torch.dtype | None = None,
    rounding: Rounding = "nearest",
    max_shard_bytes: int | None = None,
    hashes: bool = False,
    threads: int | None = None,
    seed: int = 0,
    **options: Any,
) -> Path:
    """Merge the weights of files of one architecture, of vision models or any others.

    Everything is computed in float32 from mapped files and written once, in pieces: memory stays
    small, whatever the size of the models. Integers come from the first input; batch norm's
    running statistics are pooled. Writes a folder with the first input's configuration and what
    lies beside it, or one file where `out` ends in `.safetensors`; after a kill there is the old
    one or the new one.

    inputs: safetensors files, indices of shards, folders or addresses (`hf-hub:org/name@rev`).
    strategy: by name, of those that need nothing but tensors; `zoo.fuse` has them all. base: what
    the inputs started from. weight: see `zoo.fuse`. dtype: of floating tensors, by default the
    inputs'. rounding: to a narrower dtype; `"stochastic"` (seeded) keeps changes that are smaller
    than its steps alive on average. max_shard_bytes: size at which another file is begun.
    hashes: record the sha256 of all inputs, which reads them once more. threads: by default one
    for each core. options: the strategy's own.

    Gives the folder or file. Raises FusionError or ShapeMismatch for inputs that do not belong
    together or have values that are not finite, FormatError for damaged ones, DiskFull before any
    work.
    """
    spec = find(strategy, FusionSpec)
    values = checked(spec, options)
    out = Path(out).expanduser()
    _check(spec, inputs, base, out, rounding, max_shard_bytes, threads)
    wanted = None if dtype is None else resolve_dtype(dtype)
    given = [*inputs] if base is None else [*inputs, base]
    places = [located(each) for each in given]
    want_same_labels(spec.name, [str(each) for each in inputs],
                     [place for place, _ in places[:len(inputs)]])
    opened = [open_tensors(place) for place, _ in places]
    states, start = opened[:len(inputs)], opened[-1] if base is not None else None
    parts = sort_tensors(spec, states, start)
    weights = resolve_weights(weight, parts.floating, len(states), spec.name)
    settings = resolve_options(spec, load(spec), values, parts.floating, len(states),
                               fused=parts.fused)
    first = states[0]
    like = {key: torch.empty(first.shape(key), device="meta", dtype=wanted if
                             wanted and key in weights else first.dtype(key))
            for key in first if key not in first.aliases}
    told = [source(each, *place, state.files, hashes)
            for each, place, state in zip(given, places, opened, strict=True)]
    made = {"strategy": spec.name, "options": values, "seed": seed, "sources": told[:len(inputs)],
            **({"base": told[-1]} if base is not None else {}),
            **({"weight": weight} if weight is not None else {}),
            **({"dtype": str(wanted).removeprefix("torch.")} if wanted else {}),
            **({"rounding": rounding} if rounding != "nearest" else {}),
            "versions": {"fusion-zoo": zoo.__version__, "torch": torch.__version__}}
    if parts.norms:
        warnings.warn("batch norm's statistics were pooled over the inputs; zoo.fuse(…, data=…) "
                      "can estimate them again and lets validation choose", stacklevel=2)

    with written(out, places[0][0], made, bool(parts.norms)) as file, laid_out(
            like, file, aliases=first.aliases, metadata={"made_with": json.dumps(made)},
            max_shard_bytes=max_shard_bytes) as put:

        def write(key: str, begin: int, part: Tensor) -> None:
            part = rounded(part, like[key].dtype, rounding, (seed, key), begin)
            want_finite_result(spec.name, key, part, states, start)
            put(key, begin, part)

        size = sum(tensor.nbytes for tensor in like.values())
        each = size / max(sum(tensor.numel() for tensor in like.values()), 1)

        def fused(keys: Sequence[str]) -> dict[str, Tensor]:
            job = Merge(load(spec), spec, states, start, {key: weights[key] for key in keys
                                                          if key in like},
                        settings.common, seed, own=settings.own)
            with task("merge", size, "bytes") as advance:
                return run(job, write, threads=threads, advance=lambda n: advance(round(n * each)))

        try:
            extra = fused(parts.fused)
        except (FusionError, RuntimeError):  # RuntimeError: of a decomposition
            fixed = want_finite(spec.name, states, start, parts.fused)
            if not fixed:
                raise
            parts = parts.without(fixed)
            extra = fused(parts.fused)
        for key in parts.norms:
            value = extra.get(key)
            write(key, 0, (pooled(states, key, mixture(weights[key])) if value is None
                           else value).reshape(-1))
        for key in like.keys() - set(parts.floating):
            for begin in range(0, like[key].numel(), _COPIED):
                part = flat_part(first, key, begin, min(begin + _COPIED, like[key].numel()))
                put(key, begin, part.to(like[key].dtype))
    return out


def _check(
    spec: FusionSpec, inputs: object, base: object, out: Path, rounding: str,
    max_shard_bytes: int | None, threads: int | None,
) -> None:
    if isinstance(inputs, (str, os.PathLike)) or not isinstance(inputs, Sequence):
        raise FusionError(spec.name, f"the inputs are {inputs!r}, expected a list of files, "
                          "folders or addresses")
    for name, each in [*((f"member {number}", each) for number, each in enumerate(inputs, 1)),
                       *([("the base", base)] if base is not None else [])]:
        if not isinstance(each, (str, os.PathLike)):
            raise FusionError(spec.name, f"{name} is a {type(each).__name__}, expected a file, a "
                              "folder or an address", "zoo.fuse takes models")
    if spec.kind != "weights":
        raise FusionError(spec.name, f"it fuses {spec.kind}, and files hold weights",
                          "Use zoo.fuse (`zoo fuse`)")
    more = needs_beside_tensors(spec)
    if more:
        raise FusionError(spec.name, f"it needs {more}, and files hold weights alone",
                          "Use zoo.fuse (`zoo fuse`), which builds the networks")
    if base is not None and "base" not in spec.uses | spec.can_use:
        raise OptionError(spec.name, "it does not use a base; leave base= out")
    if rounding not in get_args(Rounding):
        raise OptionError("merge", f"rounding is {rounding!r}, expected "
                          + " or ".join(map(repr, get_args(Rounding))))
    if threads is not None and (not isinstance(threads, int) or threads < 1):
        raise OptionError("merge", f"threads is {threads!r}, expected 1 or more")
    if max_shard_bytes is not None and out.suffix == ".safetensors":
        raise OptionError("merge", f"one file is asked for, {out.name}, and shards are several; "
                          "name a folder")
    if max_shard_bytes is not None and max_shard_bytes < 1:
        raise OptionError("merge", f"max_shard_bytes is {max_shard_bytes}, expected 1 or more")
