"""A Keras model as a list of steps: which layer is called on what, and where its answer goes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from zoo.errors import OptionError
from zoo_keras.backend import keras
from zoo_keras.layers import torch_module


@dataclass(frozen=True)
class Slot:
    """Where a step finds a tensor."""

    number: int


@dataclass(frozen=True)
class Step:
    """One call: `args` and `kwargs` are the layer's own, with a Slot for every tensor. shape: of
    the answer, (batch, height, width, channels) or (batch, features)."""

    layer: Any
    args: Any
    kwargs: Any
    out: Slot
    shape: tuple[int | None, ...]

    @property
    def source(self) -> Slot | None:
        """The one tensor that it works on; None when there are several."""
        slots: list[Slot] = []
        _map((self.args, self.kwargs), lambda slot: slots.append(slot))
        return slots[0] if len(slots) == 1 else None


def steps_of(model: Any) -> tuple[list[Step], Slot]:
    """The steps of a Functional or Sequential model with one input, in the order in which they can
    run, models inside it included; and the slot of its input."""
    recorder = _Recorder()
    image = keras.Input(batch_shape=model.inputs[0].shape)
    start = recorder.slot(image)
    recorder.call(model, image)
    return recorder.steps, start


class _Recorder:
    """Calls every layer on symbolic tensors and writes down what it was given."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.slots: dict[int, Slot] = {}
        self.seen: list[Any] = []  # alive, so that no other tensor gets the same id

    def slot(self, tensor: Any) -> Slot:
        self.seen.append(tensor)
        return self.slots.setdefault(id(tensor), Slot(len(self.slots)))

    def call(self, layer: Any, *args: Any, **kwargs: Any) -> Any:
        # Whether it trains, each module knows for itself.
        kwargs = {key: value for key, value in kwargs.items()
                  if key != "training" and value is not None}
        if isinstance(layer, keras.Sequential):
            for inner in layer.layers:
                args = (self.call(inner, *args),)
            return args[0]
        if isinstance(layer, keras.Model) and isinstance(layer, keras.Function):
            return self._inside(layer, *args)
        out = layer(*args, **kwargs)
        if not isinstance(out, keras.KerasTensor):
            raise OptionError("keras/file", f"its layer {layer.name!r} has several outputs, and "
                              "only layers with one can be followed")
        found, named = keras.tree.map_structure(self._placed, (args, kwargs))
        self.steps.append(Step(layer, found, named, self.slot(out), tuple(out.shape)))
        return out

    def _inside(self, model: Any, given: Any) -> Any:
        """The steps of a model inside the model: its tensors stand where the outer ones do."""
        inputs = keras.tree.map_structure(lambda x: keras.Input(batch_shape=x.shape), model.input)
        self._equate(inputs, given)
        twin = keras.models.clone_model(model, input_tensors=inputs, call_function=self.call,
                                        clone_function=lambda layer: layer)
        out = model(given)
        self._equate(out, twin.output)
        return out

    def _equate(self, new: Any, known: Any) -> None:
        pairs = zip(keras.tree.flatten(new), keras.tree.flatten(known), strict=True)
        for one, other in pairs:
            self.seen.append(one)
            self.slots[id(one)] = self.slot(other)

    def _placed(self, value: Any) -> Any:
        return self.slot(value) if isinstance(value, keras.KerasTensor) else value


class Program(nn.Module):
    """Steps as a module: tensor in, tensor out. Every layer is a module of `layers`, in the order
    of its first call, so that the names of the tensors depend on nothing else."""

    def __init__(self, steps: Sequence[Step], start: Slot) -> None:
        super().__init__()
        layers = list({id(step.layer): step.layer for step in steps}.values())
        self.layers = nn.ModuleList(torch_module(layer) for layer in layers)
        place = {id(layer): number for number, layer in enumerate(layers)}
        self.start = start
        self.calls = [(place[id(step.layer)], step.args, step.kwargs, step.out) for step in steps]
        self.last = _last_uses(steps)

    def forward(self, x: Any) -> Any:
        tensors = {self.start: x}
        for (number, args, kwargs, out), done in zip(self.calls, self.last, strict=True):
            args, kwargs = _map((args, kwargs), tensors.__getitem__)
            x = tensors[out] = self.layers[number](*args, **kwargs)
            for slot in done:
                del tensors[slot]
        return x


def _last_uses(steps: Sequence[Step]) -> list[list[Slot]]:
    """The slots that no later step needs, by step."""
    needed: set[Slot] = {steps[-1].out} if steps else set()
    done: list[list[Slot]] = []
    for step in reversed(steps):
        used: set[Slot] = {step.out}
        _map((step.args, step.kwargs), lambda slot, used=used: used.add(slot))  # type: ignore[misc]
        done.append(sorted(used - needed, key=lambda slot: slot.number))
        needed |= used
    return done[::-1]


def _map(value: Any, change: Callable[[Slot], Any]) -> Any:
    """The same structure with every Slot changed."""
    if isinstance(value, Slot):
        return change(value)
    if isinstance(value, dict):
        return {key: _map(item, change) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_map(item, change) for item in value)
    return value

