"""The members of a model, run in the way that is fastest here: measured, then kept.

Like members can be run as one: their weights are stacked and every operation maps over them
(https://docs.pytorch.org/tutorials/intermediate/ensembling.html). Unlike ones can run side by
side, each on its share of the cores. Either may be slower than one after another, and which is
faster depends on the networks, the batch and the machine.
"""

from __future__ import annotations

import copy
import functools
import itertools
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from zoo.backbones.pixels import Pictures
from zoo.errors import OptionError, ZooError
from zoo.features import evaluating
from zoo.member import Member
from zoo.model import Inner, Model, Way
from zoo.progress import task

# A way must win by this much: less is noise.
GAIN = 1.03
# What a way may answer otherwise than the plain one, of the largest answer (at least of 1).
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}
_ROUNDS = 5


@dataclass(frozen=True, kw_only=True)
class Speed:
    """What was measured: seconds of one batch for each way that can be taken, the fastest of a few
    runs, and which was chosen. channels_last, bfloat16: the members for which these won."""

    batch_size: int
    seconds: dict[str, float]
    chosen: str
    channels_last: tuple[int, ...]
    bfloat16: tuple[int, ...]

    @property
    def gain(self) -> float:
        """How many times as fast the model is as before."""
        return self.seconds["as given"] / self.seconds[self.chosen]

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "gain": self.gain}


def speed_up(model: Model, *, batch_size: int = 32, precision: str = "float32") -> Speed:
    """Measure the ways in which the members can run on this machine, and take the fastest.

    The ways: one after another, each member's convolutions in the memory layout that is faster for
    it; like members stacked; on a CPU with several threads, members side by side. Every way is
    checked to answer the same. The model keeps the choice for evaluation without gradients, until
    it is moved or cast; a copy or a saved model has not been measured.

    batch_size: images per batch, which decides much. precision: `"bfloat16"` lets the members for
        which it is faster compute in it (autocast), and answer as exactly as it allows.

    Raises OptionError for another batch_size or precision.
    """
    if not isinstance(model, Model):
        raise ZooError(f"speed_up measures a zoo.Model, and {model!r} is not one")
    if not isinstance(batch_size, int) or batch_size < 1:
        raise OptionError("speed_up", f"batch_size is {batch_size!r}, expected 1 or more")
    if precision not in TOLERANCE:
        raise OptionError("speed_up", f"precision is {precision!r}, expected "
                          + " or ".join(map(repr, TOLERANCE)))
    model.way = None
    with evaluating(model), torch.inference_mode():
        return _measure(model, batch_size, precision)


def _measure(model: Model, batch_size: int, precision: str) -> Speed:
    side = model.image_size
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(batch_size, 3, side, side, generator=generator).to(model.device)
    given = list(model.each_member())
    twin = copy.deepcopy(model)
    members = list(twin.each_member())
    with task("measure", 1 + len(members), "steps") as advance:
        last, half = [], []
        for number, member in enumerate(members):
            layout, narrow = _settle(member, images, precision)
            last += [number] * layout
            half += [number] * narrow
            advance(1)
        wanted = model(images).float()
        ways: dict[str, Way] = {"one after another": OneAfterAnother(half)}
        if any(len(group) > 1 for group in alike(members)):
            ways["stacked"] = Stacked(members, half)
        if len(members) > 1 and model.device.type == "cpu" and torch.get_num_threads() > 1:
            ways["side by side"] = SideBySide(len(members), half)
        ways = {name: way for name, way in ways.items()
                if _is_equal(_under(twin, way, images), wanted, precision)}
        runs = [lambda: model(images), *(_under(twin, way, images) for way in ways.values())]
        seconds = dict(zip(("as given", *ways), _fastest(runs, model.device), strict=True))
        advance(1)
    chosen = min(seconds, key=lambda name: seconds[name])
    for simpler in ("as given", "one after another"):
        if simpler in seconds and seconds[chosen] * GAIN > seconds[simpler]:
            chosen = simpler
            break
    if chosen == "as given":
        last, half = [], []
    with torch.inference_mode(False):  # tensors that are laid out in it can never be trained
        for number in last:
            given[number].to(memory_format=torch.channels_last)
    model.way = ways.get(chosen)
    return Speed(batch_size=batch_size, seconds=seconds, chosen=chosen,
                 channels_last=tuple(last), bfloat16=tuple(half))


def _settle(member: Member, images: Tensor, precision: str) -> tuple[bool, bool]:
    """Whether a member is faster with its channels last, and in bfloat16; it is laid out so."""
    layouts = (False, True) if any(isinstance(part, nn.Conv2d) for part in member.modules()) else (
        False,)
    settings = [(layout, half) for half in (False, True)[:1 + (precision == "bfloat16")]
                for layout in layouts]
    laid_out = [copy.deepcopy(member) for _ in settings]
    runs = []
    for one, (layout, half) in zip(laid_out, settings, strict=True):
        if layout:
            one.to(memory_format=torch.channels_last)
        runs.append(functools.partial(_answer, one, "__call__", Pictures(images), half))
    wanted = runs[0]().float()
    possible = [index for index, run in enumerate(runs) if _is_equal(run, wanted, precision)]
    if not possible:  # answers that are no numbers equal nothing
        return False, False
    seconds = _fastest([runs[index] for index in possible], images.device)
    fastest = min(range(len(possible)), key=lambda place: seconds[place])
    if seconds[fastest] * GAIN > seconds[0]:
        return False, False
    layout, half = settings[possible[fastest]]
    if layout:
        member.to(memory_format=torch.channels_last)
    return layout, half


def _answer(member: Member, act: str, pictures: Pictures, half: bool) -> Tensor:
    with torch.autocast(pictures.images.device.type, torch.bfloat16, enabled=half):
        answer: Tensor = getattr(member, act)(pictures)
    return answer.float() if half else answer


def _under(model: Model, way: Way, images: Tensor) -> Callable[[], Tensor]:
    def run() -> Tensor:
        model.way = way
        answer: Tensor = model(images)
        return answer
    return run


def _is_equal(run: Callable[[], Tensor], wanted: Tensor, precision: str) -> bool:
    """Whether a way can be taken, and answers as the plain one does."""
    try:
        found = run().float()
    except RuntimeError:  # an operation that cannot be mapped or that bfloat16 does not have
        return False
    allowed = TOLERANCE[precision] * max(1.0, float(wanted.abs().max()))
    return bool((found - wanted).abs().max() <= allowed)


def _fastest(runs: Sequence[Callable[[], Any]], device: torch.device) -> list[float]:
    """Seconds of each, the best of a few rounds in which they take turns."""
    best = [float("inf")] * len(runs)
    for number, (index, run) in itertools.product(range(1 + _ROUNDS), enumerate(runs)):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if number:  # the first round warms up
            best[index] = min(best[index], time.perf_counter() - start)
    return best


def alike(members: Sequence[Member]) -> list[list[int]]:
    """The members in groups that can be stacked: one kind of network, the same tensors, and the
    same images."""
    groups: dict[Any, list[int]] = {}
    for index, member in enumerate(members):
        tensors = tuple((key, tuple(tensor.shape), tensor.dtype)
                        for key, tensor in member.net.state_dict().items())
        kind: Any = (type(member.net), repr(member.net), tensors, member.preprocessing,
                     member.in_chans, member.gives, member.layers, member.pool)
        groups.setdefault(index if isinstance(member, Inner) else kind, []).append(index)
    return list(groups.values())


class OneAfterAnother(Way):
    """half: the members that compute in bfloat16."""

    def __init__(self, half: Sequence[int]) -> None:
        self.half = frozenset(half)

    def run(self, members: Sequence[Member], act: str, pictures: Pictures) -> list[Tensor]:
        return [_answer(member, act, pictures, number in self.half)
                for number, member in enumerate(members)]


class Stacked(Way):
    """Like members as one network whose every operation maps over their stacked weights."""

    def __init__(self, members: Sequence[Member], half: Sequence[int]) -> None:
        self.half = frozenset(half)
        self._groups = alike(members)
        self._states: dict[int, tuple[list[Any], Any]] = {}

    def run(self, members: Sequence[Member], act: str, pictures: Pictures) -> list[Tensor]:
        found: dict[int, Tensor] = {}
        for group in self._groups:
            half = self.half.issuperset(group)
            if len(group) == 1:
                found[group[0]] = _answer(members[group[0]], act, pictures, half)
            else:
                outputs = self._map([members[index] for index in group], group[0], act, pictures,
                                    half)
                found.update(zip(group, outputs, strict=True))
        return [found[index] for index in range(len(members))]

    def _map(
        self, members: list[Member], group: int, act: str, pictures: Pictures, half: bool
    ) -> Tensor:
        changes = [(id(tensor), 0 if tensor.is_inference() else tensor._version)
                   for member in members
                   for tensor in itertools.chain(member.parameters(), member.buffers())]
        if group not in self._states or self._states[group][0] != changes:
            # The first time, or a weight was replaced or changed in place.
            stacked = stack_module_state([_Act(member) for member in members])
            self._states[group] = changes, stacked
        state = self._states[group][1]
        module = _Act(members[0])

        def one(parameters: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
            answer: Tensor = functional_call(module, (parameters, buffers), (act, pictures, half))
            return answer

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="There is a performance drop")
            outputs: Tensor = vmap(one, randomness="error")(*state)  # (members, B, …)
        return outputs


class _Act(nn.Module):
    """What a member does, by name, where only `forward` can be called."""

    def __init__(self, member: Member) -> None:
        super().__init__()
        self.member = member

    def forward(self, act: str, pictures: Pictures, half: bool) -> Tensor:
        return _answer(self.member, act, pictures, half)


class SideBySide(Way):
    """Members at the same time, each in a thread of its own with its share of the cores."""

    def __init__(self, members: int, half: Sequence[int]) -> None:
        self.half = frozenset(half)
        threads = torch.get_num_threads()
        workers = min(members, threads)
        self._pool = ThreadPoolExecutor(workers, "member", torch.set_num_threads,
                                        (threads // workers,))
        # Every worker sets its own number when it starts; this thread keeps what it had.
        list(self._pool.map(time.sleep, [0.01] * workers))
        torch.set_num_threads(threads)

    def run(self, members: Sequence[Member], act: str, pictures: Pictures) -> list[Tensor]:
        inference = torch.is_inference_mode_enabled()

        def one(number: int) -> Tensor:
            with torch.inference_mode(inference), torch.no_grad():  # both belong to a thread
                return _answer(members[number], act, pictures, number in self.half)

        return list(self._pool.map(one, range(len(members))))
