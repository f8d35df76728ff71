"""The merge engine: every tensor of the result once, in pieces, on all cores.

A fusion of weights is memory traffic. Inputs may be mapped files; a piece is small enough to stay
in a core's cache while the strategy's steps pass over it, and whoever asked takes it from there:
a tensor in memory, or its place in a file. What a strategy must know first of a whole tensor or
model is measured in the same way and added up in one order, whatever the number of threads.
"""

from __future__ import annotations

import inspect
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any, Protocol, TypeAlias, TypeVar

import torch
from torch import Tensor

from zoo.errors import FusionError, ShapeMismatch
from zoo.fusion import compiled
from zoo.fusion.depth import depths
from zoo.fusion.precision import widened
from zoo.registry import resolve
from zoo.specs import MEASURED_OVER, SCOPES, FusionSpec, reach
from zoo.tensors import StoredTensors

State: TypeAlias = Mapping[str, Tensor]
A = TypeVar("A")
B = TypeVar("B")

# Elements of one call of a slice-scoped strategy, and of one of its `measure`, which may give back
# a histogram that is not small beside a piece.
PIECE = 1 << 18
MEASURED_PIECE = 1 << 20
MOST_PASSES = 10
# A tensor of so many measured pieces, of several that are at work, is for one thread alone.
_ALONE = 4
# Fewer elements than this are not worth threads.
_SMALL = 1 << 20


class Write(Protocol):
    """Takes elements start… of the flattened result for a key, in the precision of the merge."""

    def __call__(self, key: str, start: int, part: Tensor, /) -> None: ...


@dataclass(frozen=True)
class Merge:
    """A strategy and what it works on.

    strategy: what `spec.build` names. states: one per member; mapped files or tensors in memory.
    base: what they started from. weights: of the keys to fuse, one number per member. options: all
    of the strategy's own that are the same for all tensors. own: the others, by key. seed, given:
    further keywords for strategies that take them (`data`, …). piece, measured_piece:
    elements of one call of a slice-scoped strategy, and of its `measure`.
    """

    strategy: Callable[..., Any]
    spec: FusionSpec
    states: Sequence[State]
    base: State | None
    weights: Mapping[str, Sequence[float]]
    options: Mapping[str, Any]
    seed: int = 0
    given: Mapping[str, Any] = field(default_factory=dict)
    own: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    piece: int = field(default_factory=lambda: PIECE)
    measured_piece: int = field(default_factory=lambda: MEASURED_PIECE)

    @property
    def scope(self) -> str:
        """What one call sees; where several options have a say, the widest."""
        return reach(self.spec.scope, self.options, SCOPES)

    @property
    def measured_over(self) -> str:
        """Over what `measure` adds up."""
        return (reach(self.spec.measured_over, self.options, MEASURED_OVER)
                if self.spec.measure else "nothing")

    @property
    def by_tensor(self) -> bool:
        """Whether what is measured of a tensor is for itself alone."""
        return self.measured_over == "tensor"


@dataclass(frozen=True, slots=True)
class Piece:
    """Elements start…stop of one tensor; all of it in its shape for a strategy of scope tensor.

    joined: further keys, whose whole tensors follow a whole one.
    """

    key: str
    start: int
    stop: int
    flat: bool
    joined: tuple[str, ...] = ()


@torch.no_grad()
def run(
    merge: Merge,
    write: Write,
    *,
    threads: int | None = None,
    advance: Callable[[int], object] = lambda elements: None,
) -> dict[str, Tensor]:
    """Compute all keys of `merge.weights` and hand each part to `write`, from several threads.

    threads: by default all cores, for tensors on the CPU. advance: is told how many elements of
    the result are done. Returns what a strategy of scope "model" gave beyond those keys. Raises
    ShapeMismatch when a result has another shape, FusionError when `measure` never ends.
    """
    if not merge.weights:
        return {}
    _keep_freed_memory()
    if merge.scope == "model":
        return _run_whole(merge, write, advance)
    strategy = accepting(merge.strategy)
    depth_of = depths(merge.weights)
    sizes = {key: merge.states[0][key].numel() for key in merge.weights}
    on_cpu = all(merge.states[0][key].device.type == "cpu" for key in sizes)
    workers = threads or cores()
    if not on_cpu or sum(sizes.values()) < _SMALL or merge.scope == "tensor":
        workers = 1  # a tensor-scoped strategy uses the cores inside its operations
    if on_cpu:
        compiled.expect(sum(sizes.values()))

    def compute(piece: Piece, measured: Sequence[Any]) -> int:
        tensors, keywords = _call(merge, piece, depth_of)
        if merge.spec.measure:
            keywords["measured"] = measured
        result = strategy(tensors, **keywords)
        if result.shape != tensors[0].shape:
            raise ShapeMismatch(merge.spec.name, piece.key, f"became {list(result.shape)}, from "
                                f"{list(tensors[0].shape)}", "This is a defect of the strategy")
        if piece.joined:
            keys = (piece.key, *piece.joined)
            for key, part in zip(keys, result.split([sizes[key] for key in keys]), strict=True):
                write(key, 0, part)
        else:
            write(piece.key, piece.start, result.reshape(-1))
        return piece.stop - piece.start

    def work(
        keys: Sequence[tuple[str, int]], pool: Callable[..., Iterator[Any]]
    ) -> Iterator[int]:
        measured = (_measured(merge, keys, depth_of, pool)
                    if merge.measured_over != "nothing" else ())
        pieces = _pieces(merge, keys, merge.piece, widen=True)
        return pool(partial(compute, measured=measured), pieces)

    def one(item: tuple[str, int], pool: Callable[..., Iterator[Any]]) -> int:
        return sum(work([item], pool if item[1] > _ALONE * merge.measured_piece else map))

    with _workers(workers) as pool, _workers(workers) as at_once:
        # Of several tensors at once, one keeps the threads busy while a pass over another ends.
        for done in (at_once(partial(one, pool=pool), sizes.items()) if merge.by_tensor
                     else work(list(sizes.items()), pool)):
            advance(done)
    return {}


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def accepting(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function without the keywords that it does not take: a plugin may take fewer than the
    core gives."""
    taken = inspect.signature(function).parameters

    def call(tensors: Any, **keywords: Any) -> Any:
        return function(tensors, **{name: keywords[name] for name in keywords if name in taken})

    return call


def _run_whole(
    merge: Merge, write: Write, advance: Callable[[int], object]
) -> dict[str, Tensor]:
    def wide(state: State) -> dict[str, Tensor]:
        return {key: _wide(tensor, merge.states[0].get(key, tensor))
                for key, tensor in state.items()}

    result: dict[str, Tensor] = dict(accepting(merge.strategy)(
        [wide(state) for state in merge.states],
        base=None if merge.base is None else wide(merge.base), weights=merge.weights,
        depths=depths(merge.weights), seed=merge.seed, **merge.given, **merge.options))
    for key in merge.weights:
        like = merge.states[0][key]
        if key not in result or result[key].shape != like.shape:
            became = list(result[key].shape) if key in result else "missing"
            raise ShapeMismatch(merge.spec.name, key, f"became {became}, from {list(like.shape)}",
                                "This is a defect of the strategy")
        write(key, 0, result.pop(key).reshape(-1))
        advance(like.numel())
    return {key: tensor for key, tensor in result.items() if key in merge.states[0]}


def _measured(
    merge: Merge, keys: Sequence[tuple[str, int]], depth_of: Mapping[str, float],
    pool: Callable[..., Iterator[Any]],
) -> tuple[Any, ...]:
    """What the passes before the merge add up to over these tensors, one item per pass.

    A pass calls `measure` for every piece and adds up its answers; the next pass gets the sums so
    far. They end when `measure` answers None.
    """
    measure = accepting(resolve(merge.spec.measure, merge.spec.name))
    sums: tuple[Any, ...] = ()
    for _ in range(MOST_PASSES):
        def ask(piece: Piece, sums: tuple[Any, ...] = sums) -> Any:
            tensors, keywords = _call(merge, piece, depth_of)
            return measure(tensors, **keywords, measured=sums)

        whole: Any = None
        for part in pool(ask, _pieces(merge, keys, merge.measured_piece)):
            if part is None:
                return sums
            whole = part if whole is None else whole + part
        sums = (*sums, whole)
    raise FusionError(merge.spec.name, f"after {MOST_PASSES} passes it still measures",
                      "Its measure must return None once it has seen enough")


def _keep_freed_memory() -> None:
    """glibc hands a freed block of a piece's size back to the system, and the next piece would pay
    for its pages again, more than for its arithmetic. It learns from the largest block that was
    ever mapped and freed, up to 32 MiB, that such blocks come again."""
    torch.empty(31 << 20, dtype=torch.uint8)


def _pieces(
    merge: Merge, keys: Iterable[tuple[str, int]], most: int, *, widen: bool = False
) -> Iterator[Piece]:
    """widen: to larger pieces where compiled loops are at work."""
    flat = merge.scope in ("slice", "rows")
    joins = merge.spec.elementwise and merge.scope == "slice" and not merge.by_tensor
    small: dict[Any, list[str]] = {}
    filled: Counter[Any] = Counter()
    for key, size in keys:
        like = merge.states[0][key]
        if joins and size < most and like.device.type == "cpu":
            alike = (tuple(merge.weights[key]), tuple(merge.own.get(key, {}).values()), like.dtype,
                     None if merge.base is None else merge.base[key].dtype)
            if filled[alike] + size > most:
                yield _joined(small.pop(alike), filled.pop(alike))
            small.setdefault(alike, []).append(key)
            filled[alike] += size
            continue
        step = max(size, 1)
        if flat and like.device.type == "cpu":
            row = step if like.dim() < 2 else max(size // max(like.shape[0], 1), 1)
            wide = most * compiled.WIDER if widen and compiled.used() else most
            step = wide if merge.scope == "slice" else max(wide // row, 1) * row
        for start in range(0, max(size, 1), step):
            yield Piece(key, start, min(start + step, size), flat)
    yield from (_joined(waiting, filled[alike]) for alike, waiting in small.items())


def _joined(keys: Sequence[str], size: int) -> Piece:
    return Piece(keys[0], 0, size, True, tuple(keys[1:]))


def _call(
    merge: Merge, piece: Piece, depth_of: Mapping[str, float]
) -> tuple[list[Tensor], dict[str, Any]]:
    """A strategy's tensors and keywords for one piece."""
    key = piece.key
    like = merge.states[0][key]

    def part(state: State) -> Tensor:
        if not piece.flat:
            return _wide(state[key], like)
        if piece.joined:
            return _wide(torch.cat([flat_part(state, each) for each in (key, *piece.joined)]), like)
        return _wide(flat_part(state, key, piece.start, piece.stop), like)

    keywords: dict[str, Any] = {
        "base": None if merge.base is None else part(merge.base), "key": key,
        "weight": merge.weights[key], "seed": merge.seed, "depth": depth_of[key],
        **merge.given, **merge.options, **merge.own.get(key, {})}
    if piece.flat:
        shape = (piece.stop,) if piece.joined else tuple(like.shape)
        keywords |= {"offset": piece.start, "shape": shape}
    return [part(state) for state in merge.states], keywords


def flat_part(state: State, key: str, start: int = 0, stop: int | None = None) -> Tensor:
    """Elements start…stop of a flattened tensor, by default all, without touching the others."""
    if isinstance(state, StoredTensors):
        return state.slice(key, start, stop)
    return state[key].detach().reshape(-1)[start:stop]


def _wide(tensor: Tensor, like: Tensor) -> Tensor:
    tensor = tensor.detach().to(like.device)
    return widened(tensor) if tensor.is_floating_point() else tensor


@contextmanager
def _workers(count: int) -> Iterator[Callable[..., Iterator[Any]]]:
    """A map over many small jobs that keeps their order, and few of them waiting."""
    if count == 1:
        yield map
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # the threads that start from here on inherit it
    with ThreadPoolExecutor(count, thread_name_prefix="merge") as executor:
        def pooled(job: Callable[[A], B], items: Iterable[A]) -> Iterator[B]:
            left = iter(items)
            waiting = [executor.submit(_without_grad, job, item)
                       for item in islice(left, 4 * count)]
            while waiting:
                done = waiting.pop(0)
                for item in islice(left, 1):
                    waiting.append(executor.submit(_without_grad, job, item))
                yield done.result()

        try:
            yield pooled
        except BaseException:
            executor.shutdown(cancel_futures=True)
            raise
        finally:
            torch.set_num_threads(before)


def _without_grad(job: Callable[[A], B], item: A) -> B:
    with torch.no_grad():  # its state is a thread's own
        return job(item)
