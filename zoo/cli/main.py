"""`zoo`: one function per command, thin."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from zoo.cli import output
from zoo.cli.values import split_options
from zoo.errors import ZooError

app = typer.Typer(
    name="zoo", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Pretrained image models and ways of fusing them, by name.",
)

# A strategy's own options (`--density 0.2`) are not known to the parser; they are checked against
# the strategy's signature.
_OPEN = {"allow_extra_args": True, "ignore_unknown_options": True}

Json = Annotated[bool, typer.Option("--json", help="Print JSON for a program to read.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps, …")]
ImageSize = Annotated[
    int | None, typer.Option(help="Side of the square that members look at, in pixels.")]
Seed = Annotated[int, typer.Option(help="Seed of every random number.")]


@app.command(name="ls", epilog=output.examples(
    "zoo ls", "zoo ls 'timm/resnet*'", "zoo ls --type fusion --kind weights"))
def list_(
    pattern: Annotated[str, typer.Argument(help="A shell-style pattern.")] = "*",
    type_: Annotated[
        str | None, typer.Option("--type", help="backbone, fusion, transfer or dataset.")
    ] = None,
    kind: Annotated[
        str | None, typer.Option(help="Of fusions: weights, features or outputs.")] = None,
    json: Json = False,
) -> None:
    """List what is registered: backbones, fusions, transfers, data sets."""
    from zoo.registry import listing

    rows = [row for row in listing(pattern)
            if type_ in (None, row.type) and kind in (None, row.kind)]
    if pattern == "*" and type_ is None and not json:
        rows = output.without_catalogue(rows)
    if not rows and not json:
        raise ZooError(f"nothing matches {pattern!r}; see `zoo ls '*'` and `zoo plugins`")
    output.listing(rows, json)


@app.command(epilog=output.examples(
    "zoo show ties", "zoo show timm/resnet18", "zoo show runs/demo/fused"))
def show(
    name: Annotated[str, typer.Argument(help="A registered name, or a saved model's folder.")],
    json: Json = False,
) -> None:
    """Describe a registered name with its options, or a saved model."""
    from zoo.names import is_path

    if is_path(name) or Path(name).is_dir():
        from zoo.cli.saved import saved_config

        output.saved(name, saved_config(Path(name).expanduser()), json)
        return
    from zoo.options import options_of
    from zoo.registry import info

    spec = info(name)
    output.spec(spec, options_of(spec), json)


@app.command(context_settings=_OPEN, epilog=output.examples(
    "zoo fuse runs/a runs/b --with average -o fused",
    "zoo fuse lite/efficientnet_lite0 lite/efficientnet_lite1 --with concat --num-classes 10 "
    "--image-size 64 --data train.csv -o fused",
    "zoo fuse A B --with ties --base C --density 0.2 -o fused"))
def fuse(
    context: typer.Context,
    members: Annotated[list[str], typer.Argument(help="Names, folders or addresses.")],
    strategy: Annotated[
        str, typer.Option("--with", help="The strategy; see zoo ls --type fusion.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write.")],
    base: Annotated[
        str | None, typer.Option(help="What the members started from.")] = None,
    data: Annotated[str | None, typer.Option(
        help="Labelled images: held-out ones to fit on; for a fusion of features, the training "
             "images of the new head.")] = None,
    num_classes: Annotated[int | None, typer.Option(help="Classes of a new head.")] = None,
    image_size: ImageSize = None,
    pretrained: Annotated[
        bool, typer.Option(help="Give members that are names their pretrained weights.")] = True,
    epochs: Annotated[int, typer.Option(help="Of training a fusion of features.")] = 10,
    device: Device = "auto",
    seed: Seed = 0,
) -> None:
    """Fuse several models into one and save it. Further options are the strategy's own."""
    import zoo
    from zoo.registry import find
    from zoo.specs import FusionSpec

    members, options = split_options(members, context.args)
    spec = find(strategy, FusionSpec)
    features = spec.kind == "features"
    classes = zoo.load_data(data, role="train").classes if data and features else None
    model = zoo.fuse(
        [output.reference(member) for member in members], strategy, device=device, seed=seed,
        base=None if base is None else output.reference(base), pretrained=pretrained,
        data=None if features else data, image_size=image_size,
        num_classes=None if classes else num_classes, classes=classes, **options)
    if features and data:
        zoo.transfer(model, data, "linear_probe", epochs=epochs, seed=seed)
    zoo.save(model, out)
    output.wrote(out, model)
    if features and not data:
        output.warn("its head is untrained; train it with: "
                    f"zoo transfer {out} --data train.csv --with linear_probe -o trained")


@app.command(context_settings=_OPEN, epilog=output.examples(
    "zoo transfer lite/efficientnet_lite0 --data train.csv --with linear_probe -o probed",
    "zoo transfer runs/a --data photos/ --with pgd_at --eps 0.03 --epochs 5 -o robust"))
def transfer(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="A name, folder or address.")],
    data: Annotated[str, typer.Option(help="Labelled images to train on.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write.")],
    method: Annotated[
        str, typer.Option("--with", help="The method; see zoo ls --type transfer.")] = "finetune",
    val: Annotated[
        str | None, typer.Option(help="Validation data, or a share such as 0.1.")] = None,
    unlabelled: Annotated[
        str | None, typer.Option(help="Target images, for methods that adapt to them.")] = None,
    teacher: Annotated[
        list[str] | None, typer.Option(help="A saved model to learn from; may be repeated.")
    ] = None,
    image_size: ImageSize = None,
    pretrained: Annotated[bool, typer.Option(help="For a name: its pretrained weights.")] = True,
    epochs: Annotated[int, typer.Option(help="Passes over the data.")] = 10,
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 1e-3,
    batch_size: Annotated[int, typer.Option(help="Images per step.")] = 64,
    checkpoint: Annotated[
        Path | None, typer.Option(help="A folder from which an interrupted run goes on.")] = None,
    device: Device = "auto",
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Train a model by a method and save it. Further options are those of zoo.transfer and the
    method's own: --loss focal, --activation relu, --schedule cosine, --eps 0.1, …"""
    import zoo
    from zoo.cli.values import value

    _, options = split_options([], context.args)
    trained = output.model(model, pretrained=pretrained, image_size=image_size, device=device,
                           seed=seed, data=data)
    result = zoo.transfer(
        trained, data, method, val=None if val is None else value(val), unlabelled=unlabelled,
        teachers=[zoo.load(name, device=device) for name in teacher or ()], epochs=epochs, lr=lr,
        batch_size=batch_size, checkpoint=checkpoint, seed=seed, **options)
    zoo.save(trained, out)
    output.transferred(result, out, json)


@app.command(name="eval", epilog=output.examples(
    "zoo eval runs/demo/fused --data test.csv",
    "zoo eval runs/demo/fused --data zoo/mnist --attack pgd:eps=0.1,steps=40 --json"))
def evaluate(
    model: Annotated[str, typer.Argument(help="A name, folder or address.")],
    data: Annotated[str, typer.Option(help="Labelled test images.")],
    attack: Annotated[
        list[str] | None, typer.Option(help="fgsm:eps=0.1 or pgd:eps=0.1,steps=40; repeatable.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Images per step.")] = 128,
    image_size: ImageSize = None,
    device: Device = "auto",
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Measure a model: accuracy with its interval, top-5, NLL, ECE, per class, under attack."""
    import zoo
    from zoo.cli.values import attacks

    measured = zoo.evaluate(
        output.model(model, pretrained=True, image_size=image_size, device=device, seed=seed), data,
        attacks=attacks(attack or ()), batch_size=batch_size, seed=seed)
    output.evaluation(measured, json)


@app.command(epilog=output.examples("zoo run examples/digits.yaml -o runs/demo"))
def run(
    recipe: Annotated[Path, typer.Argument(help="A YAML file.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder for report and model.")]
    = Path("run"),
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Run a recipe: source, target, fused and updated model, measured side by side. A second run
    goes on from the first step that changed."""
    import zoo

    output.report(zoo.run(recipe, out, device=device), json)


@app.command(epilog=output.examples("zoo plugins", "zoo plugins --json"))
def plugins(json: Json = False) -> None:
    """List the installed plugins: namespace, distribution, version, hooks, error."""
    import zoo

    output.plugins(zoo.plugins(), json)


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        from zoo import __version__

        typer.echo(__version__)
        raise typer.Exit


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line. Exit codes: 0 done; 1 a user's mistake or a failure, said in one
    message; 2 a wrong command line; 130 interrupted."""
    import warnings

    if not sys.warnoptions:
        warnings.showwarning = _say_warning
    try:
        app(args=None if arguments is None else list(arguments), standalone_mode=True)
    except ZooError as error:
        output.fail(str(error))
        raise SystemExit(1) from None
    except (OSError, MemoryError) as error:
        output.fail(f"{type(error).__name__}: {error}")
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        output.fail("interrupted")
        raise SystemExit(130) from None


def _say_warning(message: Any, *_: Any, **__: Any) -> None:
    output.warn(str(message))
