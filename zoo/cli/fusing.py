"""`zoo fuse` and `zoo merge`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from zoo.cli import output
from zoo.cli.app import Device, ImageSize, Json, Seed, importing_torch
from zoo.specs import FusionSpec


def fuse(
    context: typer.Context,
    members: Annotated[list[str], typer.Argument(help="Names, folders or addresses.")],
    strategy: Annotated[
        str | None, typer.Option("--with", help="The strategy; see zoo ls --type fusion.")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The folder to write.")] = None,
    explain: Annotated[bool, typer.Option(
        "--explain", help="Only say which strategies can fuse these members, and which may work.")
    ] = False,
    base: Annotated[
        str | None, typer.Option(help="What the members started from.")] = None,
    data: Annotated[str | None, typer.Option(
        help="Labelled images: held-out ones to fit on; for a fusion of features, the training "
             "images of the new head.")] = None,
    weight: Annotated[str | None, typer.Option(
        help="Of each member, for a fusion of weights: a number, '[1, -0.5]' or "
             "'{layer4.*: [1, 0], \"*\": 1}'.")] = None,
    norms: Annotated[str, typer.Option(
        help="Batch norm after a fusion of weights: auto, pooled, reestimated, or repair, which "
             "does without batch norm too.")] = "auto",
    search: Annotated[list[str] | None, typer.Option(
        help="For a fusion of weights, an option to find on the data: scale=0.3..1.5 or "
             "'density=[0.1, 0.2]'; may be repeated.")] = None,
    layer: Annotated[str | None, typer.Option(
        help="For a fusion of features, what members give: layer3, '[layer3, null]' or "
             "'[[layer2, layer3], blocks.4]'.")] = None,
    pool: Annotated[str | None, typer.Option(
        help="For a fusion of features: avg, max, avgmax, gem or cls, or '[avg, null]'.")] = None,
    num_classes: Annotated[int | None, typer.Option(help="Classes of a new head.")] = None,
    image_size: ImageSize = None,
    pretrained: Annotated[
        bool, typer.Option(help="Give members that are names their pretrained weights.")] = True,
    epochs: Annotated[int, typer.Option(help="Of training a fusion of features.")] = 10,
    dtype: Annotated[
        str | None, typer.Option(help="Of the result: float32, bfloat16, …")] = None,
    link_members: Annotated[bool, typer.Option(
        "--link-members", help="Save where weights of unchanged members of the Hub are, and no "
                               "copy.")] = False,
    device: Device = "auto",
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Fuse several models into one and save it. Further options are the strategy's own."""
    import zoo
    from zoo.cli.values import searched, split_options, value
    from zoo.registry import find

    if explain:
        output.plan(zoo.plan(
            [output.reference(member) for member in members],
            base=None if base is None else output.reference(base), data=data,
            pretrained=pretrained, image_size=image_size), json)
        return
    if strategy is None or out is None:
        missing = "--with" if strategy is None else "--out"
        raise typer.BadParameter(f"Missing option '{missing}'; only --explain does without")
    spec = find(strategy, FusionSpec)
    members, options = split_options([*members, *context.args], spec, zoo.fuse)
    features = spec.kind == "features"
    classes = zoo.load_data(data, role="train").classes if data and features else None
    model = zoo.fuse(
        [output.reference(member) for member in members], strategy,
        base=None if base is None else output.reference(base), data=None if features else data,
        weight=None if weight is None else value(weight), norms=norms,  # type: ignore[arg-type]
        search=searched(search) if search else None,
        layer=None if layer is None else value(layer), pool=None if pool is None else value(pool),
        num_classes=None if classes else num_classes, classes=classes, pretrained=pretrained,
        image_size=image_size, device=device, dtype=dtype, seed=seed, **options)
    if features and data:
        zoo.transfer(model, data, "linear_probe", epochs=epochs, seed=seed)
    zoo.save(model, out, link_members=link_members)
    if spec.kind == "choice" and "auto" in model.recipe:
        output.ranking(model.recipe["auto"], json)
    if not json or spec.kind != "choice":
        output.wrote(out, model)
    if features and not data:
        output.warn("its head is untrained; train it with: "
                    f"zoo transfer {out} --data train.csv --with linear_probe -o trained")


def merge(
    context: typer.Context,
    out: Annotated[Path, typer.Option(
        "--out", "-o", help="The folder to write, or a file that ends in .safetensors.")],
    inputs: Annotated[list[str] | None, typer.Argument(
        help="Safetensors files, indices of shards, folders or addresses.")] = None,
    strategy: Annotated[
        str | None, typer.Option("--with", help="The strategy; see zoo ls --kind weights.")] = None,
    config: Annotated[Path | None, typer.Option(
        help="Inputs, strategy and its options from YAML, ours or mergekit's; a member may be a "
             "merge of its own.")] = None,
    base: Annotated[str | None, typer.Option(help="What the inputs started from.")] = None,
    weight: Annotated[str | None, typer.Option(
        help="Of each input: a number, '[1, -0.5]', '[[1, 0], [0, 1]]' along the depth, or "
             "'{blocks.*: [1, 0], \"*\": 1}'.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Of the result: float32, bfloat16, …")] = None,
    rounding: Annotated[
        str, typer.Option(help="To a narrower dtype: nearest or stochastic.")] = "nearest",
    shard_size: Annotated[str | None, typer.Option(
        help="Begin another file at this size: 2GB, 500MB, or bytes.")] = None,
    hashes: Annotated[
        bool, typer.Option(help="Record the sha256 of all inputs; reads them twice.")] = False,
    threads: Annotated[int | None, typer.Option(help="By default one for each core.")] = None,
    seed: Seed = 0,
) -> None:
    """Merge files of weights of any architecture into new ones, without building a network.
    Further options are the strategy's own."""
    from zoo.cli.values import size, split_options, value
    from zoo.registry import find

    with importing_torch():
        from zoo import merge_files
    given: dict[str, Any] = {
        name: told for name, told in (
            ("base", base), ("weight", None if weight is None else value(weight)),
            ("dtype", dtype)) if told is not None}
    common: dict[str, Any] = {
        "rounding": rounding, "hashes": hashes, "threads": threads, "seed": seed,
        "max_shard_bytes": None if shard_size is None else size(shard_size)}
    if config is not None:
        from zoo.merge_files.configs import read_config
        from zoo.merge_files.stages import merge_stages

        if inputs or strategy or context.args:
            raise typer.BadParameter("it names inputs, strategy and options; leave them out",
                                     param_hint="--config")
        last = read_config(config)
        last = replace(last, base=given.pop("base", last.base),
                       arguments={**last.arguments, **given})
        output.merged(merge_stages(last, out, **common))
        return
    if strategy is None:
        raise typer.BadParameter("Missing option '--with'; only --config does without")
    spec = find(strategy, FusionSpec)
    places, options = split_options([*(inputs or ()), *context.args], spec, merge_files.merge)
    output.merged(merge_files.merge(places, strategy, out=out, **common, **given, **options))
