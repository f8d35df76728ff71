"""Fuse features or outputs: members of any architecture stay whole, side by side."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from zoo.assembly.layers import Choice, choose
from zoo.blueprints import Fusion
from zoo.building import build_fuser, measure_given
from zoo.datasets import load_data
from zoo.errors import FusionError, ZooError
from zoo.evaluation import member_logits
from zoo.features import take, trunk_features
from zoo.member import Member
from zoo.model import Inner, Model
from zoo.specs import FusionSpec


def put_side_by_side(
    spec: FusionSpec, models: Sequence[Model], classes: Sequence[str], values: Mapping[str, Any],
    choices: Sequence[Choice] = (),
) -> Model:
    """Copies of the models as members of one, with what joins their features or outputs, on the
    CPU. choices: for a fusion of features, the layers and the pool of each member."""
    _want_common_images(spec, models)
    members = [_member(model, spec.kind) for model in models]
    for member, choice in zip(members, choices, strict=True) if choices else ():
        choose(member, choice)
    for member in members if spec.kind == "features" else ():
        if spec.takes != "vectors" or member.layers or member.pool:
            _let_give(member, spec)
    fuser = build_fuser(spec, members, classes, values)
    fusion = Fusion(strategy=spec.name, kind=spec.kind, options=dict(values))
    model = Model(members, classes=classes, fuser=fuser, fusion=fusion).eval()
    if model.exits and model.by_label is not None and not model.by_label.same:
        raise FusionError(spec.name, "they know different classes, and what one says of a class "
                          "that it does not know needs the answers of all",
                          "Leave exit= out, or fuse members that know the same classes")
    return model


def fit_outputs(model: Model, data: Any) -> None:
    """Let a fusion of outputs learn from held-out data, and write down from which."""
    fuser: Any = model.fuser
    images = load_data(data, role="train", image_size=model.image_size).with_classes(model.classes)
    assert images.labels is not None
    logits, labels = member_logits(model, images), images.labels  # (M, N, C)
    given: dict[str, Any] = {}
    if getattr(fuser, "wants_features", False):
        given["features"] = take(trunk_features(model, images), slice(None), model.device)
    told = fuser.fit(logits.to(model.device), labels.to(model.device), **given)
    model.recipe["fitted_on"] = images.told()
    if told:
        model.recipe["fitted"] = dict(told)


def _member(model: Model, kind: str) -> Member:
    twin = copy.deepcopy(model).cpu()
    if twin.kind != "single":
        sources = [member.source for member in twin.each_member() if member.source]
        return Inner(twin, name=twin.name, classes=twin.classes, dim=twin.dim, splits=twin.splits,
                      source={"members": sources} if sources else {})
    member = next(twin.each_member())
    if kind == "features":
        member.drop_head()
    return member


def _let_give(member: Member, spec: FusionSpec) -> None:
    try:
        measure_given(member, spec.takes)
    except ZooError as error:
        if member.layers or member.pool:
            raise FusionError(spec.name, f"of {member.name} {error}") from error
        raise FusionError(spec.name, f"it takes {spec.takes}, and {member.name} has none: {error}",
                          "'attention' (tokens), 'concat' and 'gated' (pooled features) take every "
                          "network") from error


def _want_common_images(spec: FusionSpec, models: Sequence[Model]) -> None:
    """Grey and colour are made of each other; any other number of channels is for itself."""
    channels = {model.in_chans for model in models}
    if len(channels) > 1 and not channels <= {1, 3}:
        raise FusionError(spec.name, f"they take images of {' and '.join(map(str, channels))} "
                          "channels", "Build all of them with the same in_chans")
