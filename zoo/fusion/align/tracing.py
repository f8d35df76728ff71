"""Find a network's permutation groups by running it once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from zoo.errors import FusionError
from zoo.fusion.align.checking import sharing_copy, verified
from zoo.fusion.align.graph import Graph
from zoo.fusion.align.grouping import Lines, groups_of
from zoo.fusion.align.labels import core
from zoo.fusion.align.rules import Parameter, View, constant_labels, rule_for
from zoo.fusion.align.units import Units


def trace(module: nn.Module, example: Tensor) -> Graph:
    """The permutation groups of a network, read from the operations that it runs.

    Each is checked: with random weights and all groups permuted, the network's output must be
    what it was, in float64; a group that does not pass is left out. Inputs and outputs stay in
    their order. What is not understood stays, too: an unknown operation costs groups, never
    correctness.

    module: a network of one tensor; it is not changed. example: an input [B, ...] on its device.
    Raises FusionError when the network cannot run on it.
    """
    module = sharing_copy(module)
    lines = _Trace(module).run(example)
    groups = verified(module, example, groups_of(lines))
    shapes = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
    moved = {place.key for group in groups for place in group.places}
    return Graph(tuple(groups), {key: shapes[key] for key in sorted(moved)})


class _Trace(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Labels for every tensor that the network computes."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.module = module
        self.units = Units()
        self.parameters: dict[int, Parameter] = {}
        # The tensors are kept, so that no other gets the id of one that is gone.
        self._seen: dict[int, tuple[Tensor, Tensor | View]] = {}
        self._sites: dict[str, Tensor] = {}
        for key, tensor in module.state_dict(keep_vars=True).items():
            if tensor.is_floating_point():
                known = self.parameters.setdefault(
                    id(tensor), Parameter([], tensor, self.units))
                known.keys.append(key)
                self._seen[id(tensor)] = tensor, View(known, tuple(range(tensor.dim())))

    @torch.no_grad()
    def run(self, example: Tensor) -> Lines:
        """The units along each axis of each parameter and of each module's output."""
        images = example.clone()
        self._note(images, self.units.still(images.shape))
        with ExitStack() as stack:
            stack.enter_context(_plain_attention())
            for name, module in self.module.named_modules():
                if module._parameters:
                    handle = module.register_forward_hook(self._watch(name))
                    stack.callback(handle.remove)
            stack.enter_context(self)
            try:
                out = self.module(images)
            except Exception as error:
                raise FusionError("trace", f"the network does not run on an input of "
                                  f"{list(example.shape)}: {error}") from error
        for leaf in pytree.tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.units.fix(self.labels(leaf))
        return Lines(self.units, *self._lines())

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        names = [argument.name for argument in function._schema.arguments]
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        outputs = [leaf for leaf in pytree.tree_leaves(out) if isinstance(leaf, Tensor)]
        tensors = [leaf for leaf in pytree.tree_leaves(given) if isinstance(leaf, Tensor)]
        if not outputs:
            return out
        if len(tensors) == 1 and self._see_through(tensors[0], outputs[0]):
            return out
        found = None
        if any(self._may_move(tensor) for tensor in tensors):
            found = self._ruled(function, given, out, outputs)
            if found is None:
                for tensor in tensors:
                    self.units.fix(self.labels(tensor))
        for number, tensor in enumerate(outputs if tensors else ()):
            known = found[number] if found is not None and number < len(found) else None
            self._note(tensor, self.units.still(tensor.shape) if known is None else known)
        return out

    def _ruled(
        self, function: Any, given: Mapping[str, Any], out: Any, outputs: list[Tensor]
    ) -> list[Tensor] | None:
        """The labels of the first outputs, None where no rule knows them."""
        rule = rule_for(function)
        if rule is None:
            return None
        try:
            found = rule(self, function, given, out)
        except (RuntimeError, ValueError, LookupError, TypeError):
            return None  # arguments that the rule does not foresee
        labels = list(found) if isinstance(found, (tuple, list)) else [found]
        alike = all(isinstance(label, Tensor) and label.shape == tensor.shape
                    for label, tensor in zip(labels, outputs, strict=False))
        return labels if alike else None

    def labels(self, tensor: Tensor) -> Tensor:
        """The labels of a tensor's elements; one that is new to the trace stays as it is."""
        if id(tensor) not in self._seen:
            self._note(tensor, constant_labels(self.units, tensor))
        known = self._seen[id(tensor)][1]
        return known.elements(tensor.shape) if isinstance(known, View) else known

    def view(self, tensor: Tensor) -> View | None:
        known = self._seen.get(id(tensor), (None, None))[1]
        return known if isinstance(known, View) else None

    def _note(self, tensor: Tensor, labels: Tensor) -> None:
        self._seen[id(tensor)] = tensor, labels

    def _may_move(self, tensor: Tensor) -> bool:
        known = self._seen.get(id(tensor), (None, None))[1]
        return isinstance(known, View) or (known is not None and bool((core(known) > 0).any()))

    def _see_through(self, tensor: Tensor, out: Tensor) -> bool:
        """Whether this operation only shows a parameter with its axes in another order."""
        known = self.view(tensor)
        if known is None or out.untyped_storage().data_ptr() != (
                tensor.untyped_storage().data_ptr()):
            return False
        whole = known.parameter.tensor
        axes = {(length, stride): axis for axis, (length, stride) in
                enumerate(zip(whole.shape, whole.stride(), strict=True)) if length > 1}
        seen = [axes.pop((length, stride), -1) if length > 1 else -1
                for length, stride in zip(out.shape, out.stride(), strict=True)]
        if axes or out.numel() != whole.numel():
            return False
        single = [axis for axis, length in enumerate(whole.shape) if length == 1]
        if seen.count(-1) == len(single):
            seen = [axis if axis >= 0 else single.pop(0) for axis in seen]
        self._seen[id(out)] = out, View(known.parameter, tuple(seen))
        return True

    def _watch(self, name: str) -> Any:
        def watch(module: nn.Module, inputs: Any, out: Any) -> None:
            if isinstance(out, Tensor) and id(out) in self._seen:
                self._sites.setdefault(name, self.labels(out))
        return watch

    def _lines(self) -> tuple[dict[tuple[str, int], Tensor], dict[tuple[str, int], Tensor]]:
        places: dict[tuple[str, int], Tensor] = {}
        for parameter in self.parameters.values():
            found = dict(parameter.axes)
            if parameter.elements is not None:
                axis = self._varying(parameter.elements)
                if parameter.axes or axis is None:  # it cannot be told which axis moves
                    for labels in (parameter.elements, *parameter.axes.values()):
                        self.units.fix(labels)
                    found = {}
                elif axis >= 0:
                    found = {axis: self.units.line(parameter.elements, axis)}
            for key in parameter.keys:
                places |= {(key, axis): labels for axis, labels in found.items()}
        sites = {(name, axis): self.units.line(labels, axis) for name, labels in
                 self._sites.items() if (axis := self._varying(labels)) not in (None, -1)}
        return places, sites

    def _varying(self, labels: Tensor) -> int | None:
        """The one axis along which units differ, -1 for none, None for several."""
        shape = core(self.units.roots(labels)).shape
        found = [axis for axis, length in enumerate(shape) if length > 1]
        return None if len(found) > 1 else found[0] if found else -1


@contextmanager
def _plain_attention() -> Iterator[None]:
    """Attention in small steps, which have rules, and not in one."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
