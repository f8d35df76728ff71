"""Which strategy is legal for these members; if none, why not and what would work instead."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from zoo.errors import FusionError, ShapeMismatch
from zoo.specs import FusionSpec

ANY_ARCHITECTURE = ("'concat' and 'gated' (features) or 'mean' and 'weighted' (outputs) fuse "
                    "members of any architecture")
_NEEDS = {"module": "the network", "graph": "the network's structure", "data": "images",
          "labels": "their labels", "score": "the accuracy on held-out images"}
ANY_CLASSES = ("'concat' and 'gated' (features) learn a new classifier for members of any "
               "classes; 'mean' and 'stacking' (outputs), and of weights 'average', 'ties' and "
               "what else needs tensors alone, join them by label name")


@dataclass(frozen=True, slots=True)
class MemberFacts:
    """What planning looks at.

    name: as the user spelled it. architecture: `timm/resnet18`. classes: its labels' names.
    shapes: each tensor's key and shape. size: the (height, width) it takes, in pixels. heads: the
    keys of the classifier, whose rows are joined by label where the labels differ. dtypes: each
    tensor's, as text.
    """

    name: str
    architecture: str
    classes: tuple[str, ...]
    shapes: Mapping[str, tuple[int, ...]]
    size: tuple[int, int]
    heads: frozenset[str] = frozenset()
    dtypes: Mapping[str, str] = field(default_factory=dict)


def check(
    spec: FusionSpec, members: Sequence[MemberFacts], *, has_base: bool, has_data: bool
) -> None:
    """Whether this strategy can fuse these members.

    has_base: a base model is given. has_data: held-out data are given. Raises
    FusionError, which says why not and what would work instead, and ShapeMismatch naming the
    first tensor that differs.
    """
    check_count(spec, len(members))
    if spec.kind == "weights":
        _check_architectures(spec.name, members)
    if "base" in spec.uses and not has_base:
        raise FusionError(spec.name, "it works on what each member changed in a common base, "
                          "and none is given",
                          "Pass base=, the model that all members started from")
    if spec.uses & {"data", "labels", "score"} and not has_data:
        labelled = "labelled and" if spec.uses & {"labels", "score"} else "images,"
        raise FusionError(spec.name, "it learns from held-out data, and none are given",
                          f"Pass data=, {labelled} kept apart from training and test")
    if spec.uses - {"base"} and spec.kind == "weights":
        check_classes(spec.name, [member.name for member in members],
                      [member.classes for member in members])
    if spec.kind == "weights":
        _check_tensors(spec.name, members)


def needs_beside_tensors(spec: FusionSpec) -> str:
    """What a strategy uses beside its members' tensors and a base, in words; "" for nothing."""
    return ", ".join(told for need, told in _NEEDS.items() if need in spec.uses)


def check_count(spec: FusionSpec, given: int) -> None:
    """Raises FusionError when the strategy takes more or fewer members than given."""
    fewest, most = spec.members
    if given < fewest or (most is not None and given > most):
        wanted = f"at least {fewest}" if most is None else (
            f"exactly {fewest}" if most == fewest else f"{fewest} to {most}")
        many = "" if given < fewest else "; 'average', 'task_arithmetic' and 'ties' take many"
        raise FusionError(spec.name, f"it takes {wanted}, and {given} are given",
                          f"Give it {wanted}{many if spec.kind == 'weights' else ''}")


def check_classes(
    strategy: str, names: Sequence[str], classes: Sequence[Sequence[str]]
) -> None:
    """Raises FusionError naming the labels that only some members have; order is free."""
    for name, labels in zip(names[1:], classes[1:], strict=True):
        only = [sorted(set(one) - set(other)) for one, other in
                ((classes[0], labels), (labels, classes[0]))]
        if any(only):
            differ = [f"only {owner} knows {_few([repr(label) for label in labels])}"
                      for owner, labels in zip((names[0], name), only, strict=True) if labels]
            raise FusionError(strategy, f"their labels differ: {'; '.join(differ)}", ANY_CLASSES)


def check_shapes(
    strategy: str,
    names: Sequence[str],
    shapes: Sequence[Mapping[str, tuple[int, ...]]],
    instead: str = ANY_ARCHITECTURE,
) -> None:
    """Raises ShapeMismatch naming the first tensor that is not the same in all of these."""
    _check_same(strategy, names, [{key: _shape(shape) for key, shape in each.items()}
                                  for each in shapes], instead)


def check_dtypes(
    strategy: str, names: Sequence[str], dtypes: Sequence[Mapping[str, str]]
) -> None:
    """Raises ShapeMismatch naming the first tensor whose dtype is not the same in all of these."""
    _check_same(strategy, names, dtypes, "Convert them to one dtype")


def _check_same(
    strategy: str, names: Sequence[str], told: Sequence[Mapping[str, str]], instead: str
) -> None:
    for name, other in zip(names[1:], told[1:], strict=True):
        differing = [key for key in {**told[0], **other} if told[0].get(key) != other.get(key)]
        if differing:
            key = differing[0]
            problem = (f"is {told[0].get(key, 'missing')} in {names[0]} "
                       f"and {other.get(key, 'missing')} in {name}")
            if differing[1:]:
                problem += f"; so do {_few([repr(key) for key in differing[1:]])} differ"
            raise ShapeMismatch(strategy, key, problem, instead)


def _check_architectures(strategy: str, members: Sequence[MemberFacts]) -> None:
    first = members[0]
    for member in members[1:]:
        if member.architecture != first.architecture:
            both = (f"{first.name} is {first.architecture} and {member.name} is "
                    f"{member.architecture}")
            if all(each.name.startswith(each.architecture) for each in (first, member)):
                both = f"{first.name} and {member.name} differ in their architecture"
            raise FusionError(strategy, f"{both}, and weights fuse only within one architecture",
                              ANY_ARCHITECTURE)


def _check_tensors(strategy: str, members: Sequence[MemberFacts]) -> None:
    first = members[0]
    for member in members[1:]:
        instead = ANY_ARCHITECTURE
        channels = [_in_chans(one.shapes) for one in (first, member)]
        if channels[0] != channels[1]:
            instead = (f"They take {channels[0]} and {channels[1]} input channels: build both "
                       f"with the same in_chans. {instead}")
        elif member.size != first.size:
            instead = (f"They take images of {first.size[0]} × {first.size[1]} and "
                       f"{member.size[0]} × {member.size[1]} pixels: build both with the same "
                       f"image_size. {instead}")
        left_out = first.heads if set(member.classes) != set(first.classes) else frozenset()
        shapes = [{key: shape for key, shape in one.shapes.items() if key not in left_out}
                  for one in (first, member)]
        check_shapes(strategy, [first.name, member.name], shapes, instead)
        check_dtypes(strategy, [first.name, member.name], [first.dtypes, member.dtypes])


def _in_chans(shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    """Input channels of the first convolution (out, in, h, w)."""
    return next((shape[1] for shape in shapes.values() if len(shape) == 4), None)


def _shape(shape: tuple[int, ...]) -> str:
    return str(list(shape))


def _few(items: Sequence[str], most: int = 3) -> str:
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more
