"""A partly frozen network is run once up to the deepest place before which nothing trains, and
trained from there.

The place is found by running the network once: it is the last module to finish before anything that
trains begins. To enter there, its forward gives what was kept, and those of the modules before
it give blanks of the right shape, which nobody reads in a network that is a chain at this place.
Whether it is one is tried: on two images, answers and gradients must be those of the whole
network; otherwise the place before is tried.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from zoo.datasets import ImageData, to_unit
from zoo.features import Features, Given, about_trunk, evaluating, given_once, has_room
from zoo.member import Member
from zoo.model import Model
from zoo.transfers.freezing import networks
from zoo.transfers.objective import Objective

_MOST_TRIED = 24
_TRIED_IMAGES = 2


@dataclass(frozen=True)
class Entry:
    """Where one network is entered: at the output of `module`, called `name` in it. before: the
    modules that are skipped. output, prepared: shapes and dtypes of what the modules give, and of
    what the network is given."""

    member: Member
    name: str
    module: nn.Module
    output: Tensor
    before: Sequence[tuple[nn.Module, Tensor]]
    prepared: Tensor

    def given(self) -> Given:
        """What the network computes up to here, and all that it depends on."""
        changing = {f"{name}." if name else "" for name, module in self.member.net.named_modules()
                    if any(p.requires_grad for p in module.parameters(recurse=False))}
        state = {name: tensor for name, tensor in self.member.net.state_dict().items()
                 if name.removesuffix(name.rpartition(".")[2]) not in changing}
        return Given(self.member.name, [about_trunk(self.member), "up to", self.name], state,
                     self._compute)

    @contextmanager
    def entered(self, output: Tensor) -> Iterator[None]:
        """The network begins with this output, [B, …], of the module; its images do not count."""
        with ExitStack() as stack:
            stack.enter_context(_replaced(self.member, "prepare", _blank(self.prepared, output)))
            for module, like in self.before:
                stack.enter_context(_replaced(module, "forward", _blank(like, output)))
            stack.enter_context(_replaced(self.module, "forward", lambda *_, **__: output))
            yield

    def _compute(self, images: Tensor) -> Tensor:
        def stop(_: nn.Module, __: Any, output: Tensor) -> None:
            raise _Reached(output)

        handle = self.module.register_forward_hook(stop)
        try:
            self.member.features(images)
        except _Reached as reached:
            return reached.output
        finally:
            handle.remove()
        raise AssertionError(f"{self.name} was not run")


class Cut:
    """Where the networks of a model are entered. outputs: of each, [N, …]."""

    def __init__(self, model: Model, entries: Sequence[Entry]) -> None:
        self.model = model
        self.entries = entries
        self.whole = len(entries) == len(networks(model))  # no network needs images

    def outputs(self, data: ImageData, workers: int) -> Features:
        return given_once(self.model, data, [entry.given() for entry in self.entries],
                          description="frozen layers", workers=workers)

    def fits(self, data: ImageData, copies: int) -> bool:
        """Whether there is room for the outputs of so many copies of the data."""
        each = sum(entry.output[0].numel() * entry.output.itemsize for entry in self.entries)
        return has_room(copies * len(data) * each)

    @contextmanager
    def entered(self, outputs: Features) -> Iterator[None]:
        with ExitStack() as stack:
            for entry, output in zip(self.entries, outputs, strict=True):
                stack.enter_context(entry.entered(output))
            yield

    def __str__(self) -> str:
        return ", ".join(f"{entry.name} of {entry.member.name}" for entry in self.entries)


def find_cut(objective: Objective, data: ImageData) -> Cut | None:
    """The deepest cut of every network that has one; None when none has. The parameters that train
    are marked already."""
    model = objective.model
    rows = range(min(_TRIED_IMAGES, len(data)))
    images = to_unit(data.batch(rows)[0].to(model.device))
    modes = [(module, module.training) for module in objective.modules()]
    objective.train()
    random = {module for module in model.modules() if _is_random(module)}
    for module, training in modes:
        module.training = training
    with evaluating(model):
        entries = [entry for member in networks(model)
                   if (entry := _deepest(member, images, random))]
    return Cut(model, entries) if entries else None


class _Reached(Exception):
    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = output


def _deepest(member: Member, images: Tensor, random: set[nn.Module]) -> Entry | None:
    calls, prepared = _record(member, images)
    names = {module: name for name, module in member.net.named_modules()}
    counts: dict[nn.Module, int] = {}
    for call in calls:
        counts[call.module] = counts.get(call.module, 0) + 1
    trains = min((time for call in calls if (time := _trains_from(call, random)) is not None),
                 default=2 * len(calls))
    before = [call for call in calls if call.ended < trains]
    places = [call for call in reversed(before) if call.output is not None
              and counts[call.module] == 1 and call.module is not member.net]
    expected = _answers(member, images)
    for place in places[:_MOST_TRIED]:
        skipped = [call for call in before if call.ended < place.began
                   and counts[call.module] == 1]
        # Not what lies inside another one that is skipped: it is not called.
        outermost = [call for call in skipped if not any(
            other.began < call.began and call.ended < other.ended for other in skipped)]
        assert place.output is not None
        entry = Entry(member, names[place.module], place.module, place.output,
                      [(call.module, call.output) for call in outermost
                       if call.output is not None], prepared)
        with torch.no_grad():
            output = entry.given().compute(images)
        try:
            with entry.entered(output):
                found = _answers(member, images)
        except (RuntimeError, ValueError, IndexError, TypeError):
            continue  # something between the modules does not take blanks
        if _same(found, expected):
            return entry
    return None


@dataclass
class _Call:
    module: nn.Module
    began: int
    ended: int = -1
    output: Tensor | None = None  # its shape, dtype and device


@torch.no_grad()
def _record(member: Member, images: Tensor) -> tuple[list[_Call], Tensor]:
    """The calls of a network's modules in the order in which they ended, and what it was given."""
    clock = 0
    open_calls: list[_Call] = []
    done: list[_Call] = []

    def begin(module: nn.Module, _: Any) -> None:
        nonlocal clock
        open_calls.append(_Call(module, clock))
        clock += 1

    def end(module: nn.Module, _: Any, output: Any) -> None:
        nonlocal clock
        call = open_calls.pop()
        if isinstance(output, Tensor) and output.ndim:
            call.output = _shape_of(output)
        call.ended = clock
        clock += 1
        done.append(call)

    handles = [handle for module in member.net.modules() for handle in (
        module.register_forward_pre_hook(begin), module.register_forward_hook(end))]
    try:
        prepared = member.prepare(images)
        member.features(images)
    finally:
        for handle in handles:
            handle.remove()
    return done, _shape_of(prepared)


def _shape_of(tensor: Tensor) -> Tensor:
    """As large as a tensor, and without its memory."""
    return tensor.new_zeros(1).expand(tensor.shape)


def _trains_from(call: _Call, random: set[nn.Module]) -> int | None:
    """When what a module gives may begin to change from epoch to epoch, by itself and not by what
    is in it. What has parts may use its own parameters before or after any of them."""
    module = call.module
    if module in random:
        return call.began
    if not any(parameter.requires_grad for parameter in module.parameters(recurse=False)):
        return None
    return call.ended if any(True for _ in module.children()) else call.began


def _is_random(module: nn.Module) -> bool:
    """Whether what a module gives in training depends on the batch or on chance."""
    shares = [getattr(module, name, None) for name in ("p", "prob", "drop_prob")]
    return module.training and (isinstance(module, _BatchNorm) or any(
        isinstance(share, float) and share > 0 for share in shares))


def _answers(member: Member, images: Tensor) -> list[Tensor]:
    """The features and logits of a network and the gradients of all that trains in it."""
    trained = [parameter for parameter in member.net.parameters() if parameter.requires_grad]
    with torch.enable_grad():
        outputs = [member.features(images), member(images)]
        total = torch.stack([(out.float() * _weights(out)).sum() for out in outputs]).sum()
        if not total.requires_grad:
            return [out.detach() for out in outputs]
        gradients = torch.autograd.grad(total, trained, allow_unused=True)
    empty = images.new_zeros(0)
    return [*(out.detach() for out in outputs),
            *(empty if each is None else each for each in gradients)]


def _weights(like: Tensor) -> Tensor:
    """Different numbers for the parts of an output, always the same."""
    return torch.linspace(-1, 1, like.numel(), device=like.device).view(like.shape)


def _same(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    return all(a.shape == b.shape and torch.allclose(
        a.float(), b.float(), rtol=1e-3, atol=1e-4 * float(b.abs().max()) if b.numel() else 0)
        for a, b in zip(found, expected, strict=True))


def _blank(like: Tensor, output: Tensor) -> Callable[..., Tensor]:
    """A function that gives zeros of a recorded shape for as many images as the output has."""
    blank = like.new_zeros(1).expand(len(output), *like.shape[1:])
    return lambda *_, **__: blank


@contextmanager
def _replaced(module: nn.Module, name: str, function: Callable[..., Tensor]) -> Iterator[None]:
    """The module's method replaced on this instance."""
    had = module.__dict__.get(name)
    module.__dict__[name] = function
    try:
        yield
    finally:
        if had is None:
            del module.__dict__[name]
        else:
            module.__dict__[name] = had
