"""What each operation does to units: the rules by which labels pass through a network.

An operation without a rule keeps the units that it touches from moving.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from zoo.fusion.align.labels import core, joint_shape
from zoo.fusion.align.units import MOST_ELEMENTS, Units

MOST_LABELLED = 1 << 20


@dataclass
class Parameter:
    """A tensor of the state: labelled along axes where it multiplies, by element where it is
    added, scales or is moved about.

    keys: its names in the state; several when it is tied.
    """

    keys: list[str]
    tensor: Tensor
    units: Units
    axes: dict[int, Tensor] = field(default_factory=dict)
    elements: Tensor | None = None

    def along(self, axis: int) -> Tensor:
        if axis not in self.axes:
            self.axes[axis] = self.units.fresh([self.tensor.shape[axis]])
        return self.axes[axis]

    def each(self) -> Tensor:
        if self.elements is None:
            small = self.tensor.numel() <= MOST_LABELLED
            self.elements = (self.units.fresh(self.tensor.shape, free=True) if small
                             else self.units.still(self.tensor.shape))
        return self.elements


@dataclass(frozen=True)
class View:
    """A parameter with its axes in another order, axes of length 1 added or dropped.

    axes: the parameter's axis for each of the view's, -1 for one of length 1.
    """

    parameter: Parameter
    axes: tuple[int, ...]

    def elements(self, shape: torch.Size) -> Tensor:
        order = [axis for axis in self.axes if axis >= 0]
        order += [axis for axis in range(self.parameter.tensor.dim()) if axis not in order]
        return self.parameter.each().permute(order).reshape(shape)


class Labelled(Protocol):
    """What a rule may ask of the trace."""

    units: Units

    def labels(self, tensor: Tensor) -> Tensor: ...
    def view(self, tensor: Tensor) -> View | None: ...


Given: TypeAlias = Mapping[str, Any]
# (trace, function, its arguments by name, what it returned) → labels of what it returned, of the
# first of several, or one for each.
Rule: TypeAlias = Callable[[Labelled, Any, Given, Any], Any]


def rule_for(function: Any) -> Rule | None:
    """The rule of an aten operation, None when there is none."""
    name = function._schema.name.removeprefix("aten::")
    in_place = name.endswith("_") and not name.endswith("__")
    known = RULES.get(name.rstrip("_") if in_place else name)
    if known is None and torch.Tag.pointwise in function.tags:
        return pointwise
    return None if in_place and known not in (None, pointwise, restride) else known


def constant_labels(units: Units, tensor: Tensor) -> Tensor:
    """Labels of what depends on no input: equal elements need not be told apart."""
    alike = tensor.numel() > 0 and bool((tensor == tensor.flatten()[0]).all())
    return (units.still([1] * tensor.dim()) if alike else units.still(tensor.shape)).expand(
        tensor.shape)


def pointwise(trace: Labelled, function: Any, given: Given, out: Any) -> Tensor:
    tensors = [leaf for leaf in pytree.tree_leaves(dict(given)) if isinstance(leaf, Tensor)]
    labels = trace.labels(tensors[0])
    for tensor in tensors[1:]:
        labels = trace.units.relate(labels, trace.labels(tensor))
    return labels.expand(out.shape)


def move(trace: Labelled, function: Any, given: Given, out: Any) -> Any:
    """Elements are moved, copied or left out: the labels go the same way."""
    def labelled(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return trace.labels(leaf) if leaf.is_floating_point() else leaf.cpu()

    if function._schema.name in ("aten::view", "aten::_unsafe_view"):
        return trace.labels(given["self"]).reshape(out.shape)
    return function(**pytree.tree_map(labelled, dict(given)))


def same(trace: Labelled, function: Any, given: Given, out: Any) -> Tensor:
    return trace.labels(given["self"])


def restride(trace: Labelled, function: Any, given: Given, out: Any) -> Tensor | None:
    """Other strides for axes of length 1, which pooling asks for."""
    plain = torch.empty(out.shape, device="meta").stride()
    kept = all(length == 1 or stride == usual for length, stride, usual in
               zip(out.shape, out.stride(), plain, strict=True))
    labels = trace.labels(given["self"])
    return labels if kept and labels.shape == out.shape else None


def constant(trace: Labelled, function: Any, given: Given, out: Any) -> Tensor:
    return constant_labels(trace.units, out)


def reduction(trace: Labelled, function: Any, given: Given, out: Any) -> Tensor:
    labels = trace.labels(given["self"])
    axes = given.get("dim")
    if axes is None or axes == []:
        axes = range(labels.dim())
    axes = [axes] if isinstance(axes, int) else axes
    return trace.units.reduce(labels, axes, keepdim=bool(given.get("keepdim", False)))


def softmax(trace: Labelled, function: Any, given: Given, out: Any) -> Tensor:
    labels = trace.labels(given["self"])
    return trace.units.relate(labels, trace.units.reduce(labels, [given["dim"]], keepdim=True))


def batch_norm(trace: Labelled, function: Any, given: Given, out: Any) -> Tensor | None:
    if given.get("training"):
        return None
    labels = trace.labels(given["input"])
    for name in ("weight", "bias", "running_mean", "running_var"):
        if given.get(name) is not None:
            labels = trace.units.relate(labels, _channels(trace.labels(given[name]), labels))
    return labels


def layer_norm(trace: Labelled, function: Any, given: Given, out: Any) -> Tensor:
    labels = trace.labels(given["input"])
    for name in ("weight", "bias"):  # first: what they tie together needs no block
        if given.get(name) is not None:
            labels = trace.units.relate(labels, trace.labels(given[name]))
    axes = range(-len(given["normalized_shape"]), 0)
    return trace.units.relate(labels, trace.units.reduce(labels, axes, keepdim=True))


def group_norm(trace: Labelled, function: Any, given: Given, out: Any) -> Tensor:
    labels = trace.labels(given["input"])
    for name in ("weight", "bias"):
        if given.get(name) is not None:
            labels = trace.units.relate(labels, _channels(trace.labels(given[name]), labels))
    groups = given["group"]
    shape = (len(labels), groups, labels.shape[1] // groups, *labels.shape[2:])
    grouped = labels.reshape(shape)
    statistics = trace.units.reduce(grouped, range(2, grouped.dim()), keepdim=True)
    return trace.units.relate(grouped, statistics).flatten(1, 2)


def spatial(trace: Labelled, function: Any, given: Given, out: Any) -> Tensor:
    """Pooling, resizing: every channel by itself, its places mixed."""
    labels = trace.labels(given.get("self", given.get("input")))
    shape = (out[0] if isinstance(out, tuple) else out).shape
    return trace.units.merge(labels, range(2 - len(shape), 0)).expand(shape)


def pad(trace: Labelled, function: Any, given: Given, out: Any) -> Tensor:
    labels = trace.units.roots(trace.labels(given["self"]))
    same_everywhere = _uniform(labels, out.shape)
    if same_everywhere is not None:
        return same_everywhere
    return torch.constant_pad_nd(labels, given["pad"], int(trace.units.still([1])))


def glu(trace: Labelled, function: Any, given: Given, out: Any) -> Tensor:
    return trace.units.relate(*trace.labels(given["self"]).chunk(2, given["dim"]))


def convolution(trace: Labelled, function: Any, given: Given, out: Any) -> Tensor | None:
    weight = trace.view(given["weight"])
    if weight is None or weight.axes != tuple(range(len(weight.axes))):
        return None
    labels, groups = trace.labels(given["input"]), given["groups"]
    into, outof = (0, 1) if given["transposed"] else (1, 0)
    units = trace.units
    channels = units.line(labels, 1)
    parameter = weight.parameter
    if groups == 1:
        units.meet(parameter.along(into), channels)
        kept = parameter.along(outof)
    elif given["transposed"]:
        return None
    elif groups == labels.shape[1] == out.shape[1]:
        units.meet(parameter.along(0), channels)
        kept = channels
    else:
        kept = parameter.along(0)
        _grouped(units, parameter, channels.view(groups, -1), kept.view(groups, -1))
    if given["bias"] is not None:
        kept = units.relate(kept, trace.labels(given["bias"]))
    return _channels(kept, out).expand(out.shape)


def _grouped(units: Units, parameter: Parameter, into: Tensor, outof: Tensor) -> None:
    """Whole groups of a grouped convolution trade places, and outputs inside their group; inputs
    keep their order inside it, since the rows of all groups share the weight's axis 1.

    into, outof: [groups, channels].
    """
    units.fix(parameter.along(1))
    if bool((into < 0).any()):
        units.fix(into)
        units.relate(outof, units.still([len(outof), 1]))  # groups stay apart
        return
    units.relate(into, units.still([1, into.shape[1]]))
    for name, *insides in zip(units.fresh([len(into)]).tolist(), into, outof, strict=True):
        for inside in insides:
            units.put_in_block(inside.tolist(), name)


def matrix_product(trace: Labelled, function: Any, given: Given, out: Any) -> Tensor | None:
    """mm, addmm, bmm, baddbmm and linear."""
    one, other = _operands(given)
    bias = given.get("bias", given.get("self") if "mat1" in given or "batch1" in given else None)
    views = trace.view(one), trace.view(other)
    if function._schema.name == "aten::linear" and views[1] is not None:
        views = (views[0], View(views[1].parameter, views[1].axes[::-1]))
    if views[1] is not None:
        kept = _linear(trace, trace.labels(one), views[1], out.shape)
    elif views[0] is not None and one.dim() == 2:
        flipped = View(views[0].parameter, views[0].axes[::-1])
        kept = _linear(trace, trace.labels(other).mT, flipped, out.mT.shape)
        kept = None if kept is None else kept.mT
    else:
        kept = _product(trace.units, trace.labels(one), trace.labels(other), out.shape)
    if kept is None or bias is None:
        return kept
    if views[1] is not None and core(trace.units.roots(kept)).shape[-1] == 1:
        trace.units.fix(trace.labels(bias))  # tokens are mixed: the channels are elsewhere
        return kept
    return trace.units.relate(kept, trace.labels(bias)).expand(out.shape)


def _operands(given: Given) -> tuple[Tensor, Tensor]:
    for names in (("mat1", "mat2"), ("batch1", "batch2"), ("self", "mat2"), ("input", "weight")):
        if set(names) <= given.keys():
            return given[names[0]], given[names[1]]
    raise KeyError(f"no operands in {sorted(given)}")


def _linear(
    trace: Labelled, labels: Tensor, weight: View, shape: torch.Size
) -> Tensor | None:
    """x [..., I] times a weight that is seen as [I, O]."""
    units = trace.units
    into, outof = weight.axes[-2:]
    labels = units.roots(labels)
    small = core(labels)
    if into < 0 or outof < 0 or len(weight.axes) != 2:
        return None
    rows = weight.parameter.along(into), weight.parameter.along(outof)
    if small.shape[-1] == 1 and labels.shape[-1] > 1 and bool((small > 0).any()):
        for row in rows:  # it mixes tokens: every channel alike
            units.fix(row)
        return labels[..., :1].expand(shape)
    units.meet(rows[0], units.line(labels, labels.dim() - 1))
    return rows[1].expand(shape)


def _product(units: Units, one: Tensor, other: Tensor, shape: torch.Size) -> Tensor | None:
    """[..., N, K] times [..., K, M]: multiplied element by element, then summed over K."""
    one, other = units.roots(one), units.roots(other)
    batch = shape[:-2]
    left = one.expand(*batch, *one.shape[-2:])
    right = other.expand(*batch, *other.shape[-2:])
    left = left[..., :core(one).shape[-2], :].unsqueeze(-1)  # (..., N, K, 1)
    right = right[..., :core(other).shape[-1]].unsqueeze(-3)  # (..., 1, K, M)
    if bool((one < 0).all()) and core(other).shape[-2] == 1:
        left = left[..., :1, :]  # every unit meets the whole row alike
        right = right[..., :1, :]
    elif bool((other < 0).all()) and core(one).shape[-1] == 1:
        left, right = left[..., :1, :], right[..., :1, :]
    if joint_shape(left.shape, right.shape).numel() > MOST_ELEMENTS:
        return None
    return units.reduce(units.relate(left, right), [-2], keepdim=False).expand(shape)


def _channels(row: Tensor, like: Tensor) -> Tensor:
    """[C] as [1, C, 1, …] with as many axes as `like`."""
    return row.view(1, -1, *[1] * (like.dim() - 2))


def _uniform(labels: Tensor, shape: torch.Size) -> Tensor | None:
    """The labels in another shape, where axes of other lengths have one label only."""
    small = core(labels)
    for axis, (length, wanted) in enumerate(zip(labels.shape, shape, strict=True)):
        if length != wanted and small.shape[axis] > 1:
            return None
    return small.expand(shape) if all(
        a in (1, b) for a, b in zip(small.shape, shape, strict=True)) else None


RULES: dict[str, Rule] = {
    **dict.fromkeys((
        "view", "_unsafe_view", "reshape", "permute", "transpose", "t", "expand", "slice",
        "select", "split", "split_with_sizes", "unsafe_split", "unsafe_chunk", "chunk", "unbind",
        "cat", "stack", "unsqueeze", "squeeze", "flip", "roll", "repeat", "index", "index_select",
        "gather", "unfold", "narrow", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle",
    ), move),
    **dict.fromkeys(("clone", "alias", "detach", "contiguous", "_to_copy", "lift_fresh"), same),
    "as_strided": restride,
    **dict.fromkeys((
        "zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full",
    ), constant),
    **dict.fromkeys((
        "mean", "sum", "amax", "amin", "max", "min", "var", "std", "var_mean", "std_mean", "norm",
        "linalg_vector_norm", "logsumexp", "prod",
    ), reduction),
    **dict.fromkeys(("_softmax", "_log_softmax", "_safe_softmax"), softmax),
    **dict.fromkeys((
        "native_batch_norm", "_native_batch_norm_legit_no_training", "cudnn_batch_norm",
        "miopen_batch_norm", "_batch_norm_no_update",
    ), batch_norm),
    **dict.fromkeys(("native_layer_norm", "_fused_rms_norm"), layer_norm),
    "native_group_norm": group_norm,
    **dict.fromkeys((
        "max_pool2d_with_indices", "avg_pool2d", "_adaptive_avg_pool2d", "adaptive_max_pool2d",
        "max_pool3d_with_indices", "avg_pool3d", "_adaptive_avg_pool3d", "upsample_nearest2d",
        "upsample_bilinear2d", "upsample_bicubic2d", "_upsample_bicubic2d_aa",
        "_upsample_bilinear2d_aa",
    ), spatial),
    "constant_pad_nd": pad,
    "glu": glu,
    "convolution": convolution,
    **dict.fromkeys(("mm", "addmm", "bmm", "baddbmm", "linear"), matrix_product),
    **dict.fromkeys(("hardswish", "_prelu_kernel", "gelu", "silu", "mish", "where"), pointwise),
}
