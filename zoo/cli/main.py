"""`zoo`: one function per command, thin."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from zoo.cli import output
from zoo.cli.app import OPEN, Device, ImageSize, Json, Seed, app
from zoo.cli.caching import cache
from zoo.cli.fusing import fuse, merge
from zoo.cli.hub import pull, push, space
from zoo.cli.trust import convert, reproduce
from zoo.errors import ZooError
from zoo.names import suggest
from zoo.specs import FAMILIES, KINDS, TransferSpec


@app.command(name="ls", epilog=output.examples(
    "zoo ls", "zoo ls 'timm/resnet*'", "zoo ls --type fusion --kind weights"))
def list_(
    pattern: Annotated[str, typer.Argument(help="A shell-style pattern.")] = "*",
    type_: Annotated[
        str | None, typer.Option("--type", help="backbone, fusion, transfer or dataset.")
    ] = None,
    kind: Annotated[
        str | None, typer.Option(help="Of fusions: weights, features, outputs or choice; of "
                                      "transfers: their family.")] = None,
    json: Json = False,
) -> None:
    """List what is registered: backbones, fusions, transfers, data sets."""
    from zoo.discovery import discovery
    from zoo.registry import listing

    _want_one_of(type_, ("backbone", "fusion", "transfer", "dataset"), "--type")
    _want_one_of(kind, (*KINDS, *FAMILIES), "--kind")
    rows = [row for row in listing(pattern)
            if type_ in (None, row.type) and kind in (None, row.kind)]
    if pattern == "*" and type_ is None and not json:
        rows = output.without_catalogue(rows)
    # Of the others that are broken `zoo plugins` tells.
    asked = discovery().failed.get(pattern.partition("/")[0].replace("_", "-"))
    if asked:
        raise asked
    if not rows and not json:
        raise ZooError(f"nothing matches {pattern!r}; see `zoo ls '*'` and `zoo plugins`")
    output.listing(rows, json)


def _want_one_of(given: str | None, allowed: Sequence[str], option: str) -> None:
    if given is not None and given not in allowed:
        near = suggest(given, allowed, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(allowed)}"
        raise typer.BadParameter(f"{given!r} is none; {hint}", param_hint=option)


@app.command(epilog=output.examples(
    "zoo show ties", "zoo show timm/resnet18", "zoo show runs/demo/fused"))
def show(
    name: Annotated[str, typer.Argument(help="A registered name, or a saved model's folder.")],
    json: Json = False,
) -> None:
    """Describe a registered name with its options, or a saved model."""
    from zoo.cli.saved import about, saved_config, saved_folder
    from zoo.options import options_of
    from zoo.registry import info

    folder = saved_folder(name)
    if folder is not None:
        config = saved_config(folder)
        output.saved(config, about(folder, config), json)
        return
    spec = info(name)
    output.spec(spec, options_of(spec), json)


app.command(context_settings=OPEN, epilog=output.examples(
    "zoo fuse runs/a runs/b --with average -o fused",
    "zoo fuse lite/efficientnet_lite0 lite/efficientnet_lite1 --with concat --num-classes 10 "
    "--image-size 64 --data train.csv -o fused",
    "zoo fuse A B --with ties --base C --density 0.2 -o fused",
    "zoo fuse A B --with task_arithmetic --base C --data val.csv --search scale=0.3..1.5 -o fused",
    "zoo fuse runs/a runs/b --with auto --data val.csv --budget 60 -o best",
    "zoo fuse runs/a runs/b --explain"))(fuse)
app.command(context_settings=OPEN, epilog=output.examples(
    "zoo merge a b --with average -o out",
    "zoo merge a.safetensors b.safetensors --with ties --base c.safetensors --density 0.2 "
    "-o out.safetensors",
    "zoo merge A B --with task_arithmetic --base C --dtype bfloat16 --rounding stochastic -o out",
    "zoo merge --config mergekit.yml -o out"))(merge)


@app.command(context_settings=OPEN, epilog=output.examples(
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
    optimizer: Annotated[str, typer.Option(help="By timm's name: adam, sgd, adamw, …")] = "adam",
    weight_decay: Annotated[float, typer.Option(help="Of the optimiser.")] = 0.0,
    schedule: Annotated[
        str, typer.Option(help="Of the learning rate, by timm's name: none, cosine, …")] = "none",
    warmup_epochs: Annotated[int, typer.Option(help="Epochs of rising learning rate.")] = 0,
    loss: Annotated[str, typer.Option(help="cross_entropy, focal or bce.")] = "cross_entropy",
    label_smoothing: Annotated[float, typer.Option(help="In [0, 1).")] = 0.0,
    activation: Annotated[
        str | None, typer.Option(help="Put this one in place of every other: relu, …")] = None,
    augment: Annotated[str | None, typer.Option(
        help="basic, a timm policy such as rand-m9-n2, or '{hflip: 0.5}'.")] = None,
    views: Annotated[int | None, typer.Option(
        help="Variants of each image for a frozen network, seen once each; new ones in every "
             "epoch by default.")] = None,
    patience: Annotated[
        int | None, typer.Option(help="Epochs without improvement before it stops.")] = None,
    clip_grad: Annotated[float | None, typer.Option(help="Largest norm of a gradient.")] = None,
    precision: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    workers: Annotated[int, typer.Option(help="Processes that decode images.")] = 0,
    checkpoint: Annotated[
        Path | None, typer.Option(help="A folder from which an interrupted run goes on.")] = None,
    device: Device = "auto",
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Train a model by a method and save it. Further options are the method's own (--eps 0.1)."""
    import zoo
    from zoo.cli.values import split_options, value
    from zoo.registry import find

    spec = find(method, TransferSpec)
    names, options = split_options([model, *context.args], spec, zoo.transfer)
    if len(names) != 1:
        raise typer.BadParameter(f"one model is trained, and {len(names)} are given: "
                                 f"{', '.join(names) or 'none'}", param_hint="MODEL")
    trained = output.model(names[0], pretrained=pretrained, image_size=image_size, device=device,
                           seed=seed, data=data)
    result = zoo.transfer(
        trained, data, method, val=None if val is None else value(val), unlabelled=unlabelled,
        teachers=[zoo.load(output.reference(each), device=device) for each in teacher or ()],
        epochs=epochs, lr=lr, batch_size=batch_size, optimizer=optimizer,
        weight_decay=weight_decay, schedule=schedule, warmup_epochs=warmup_epochs, loss=loss,
        label_smoothing=label_smoothing, activation=activation,
        augment=None if augment is None else value(augment), views=views, patience=patience,
        clip_grad=clip_grad, precision=precision, workers=workers, seed=seed,
        checkpoint=checkpoint, **options)
    zoo.save(trained, out)
    output.transferred(result, out, json)


@app.command(name="eval", epilog=output.examples(
    "zoo eval runs/demo/fused --data test.csv",
    "zoo eval runs/demo/fused --data zoo/mnist --attack pgd:eps=0.1,steps=40 --json",
    "zoo eval fused --data test.csv --card --beside first --beside second"))
def evaluate(
    model: Annotated[str, typer.Argument(help="A name, folder or address.")],
    data: Annotated[str, typer.Option(help="Labelled test images.")],
    attack: Annotated[
        list[str] | None, typer.Option(help="fgsm:eps=0.1 or pgd:eps=0.1,steps=40; repeatable.")
    ] = None,
    card: Annotated[bool, typer.Option(
        "--card", help="Of a saved model: write its card anew, with these figures.")] = False,
    beside: Annotated[list[str] | None, typer.Option(
        help="With --card: a model to measure and to show beside it; repeatable.")] = None,
    batch_size: Annotated[int, typer.Option(help="Images per step.")] = 128,
    image_size: ImageSize = None,
    device: Device = "auto",
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Measure a model: accuracy with its interval, top-5, NLL, ECE, per class, under attack."""
    import zoo
    from zoo.cli.saved import saved_folder
    from zoo.cli.values import attacks

    folder = saved_folder(model) if card else None
    if (card and folder is None) or (beside and not card):
        raise zoo.ZooError("--card writes the card of a saved model's folder, and --beside goes "
                           "with it")
    found = {}
    for given in (*(beside or ()), model):
        built = output.model(given, pretrained=True, image_size=image_size, device=device,
                             seed=seed)
        found[given] = zoo.evaluate(built, data, attacks=attacks(attack or ()),
                                    batch_size=batch_size, seed=seed)
    measured = found.pop(model)
    if folder is not None:
        from zoo.store import write_card

        own = "fused" if built.fusion else "model"
        write_card(folder, built, {**found, own: measured})
    output.evaluation(measured, json)


@app.command(epilog=output.examples(
    "zoo export runs/demo/fused -o fused.onnx", "zoo export runs/demo/fused -o fused.pt2"))
def export(
    model: Annotated[str, typer.Argument(help="A name, folder or address.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The file to write: .onnx or .pt2.")],
    format_: Annotated[str | None, typer.Option(
        "--format", help="onnx or torch; by default what the file ends in.")] = None,
    batch_size: Annotated[int | None, typer.Option(
        help="For a file that takes batches of no other size.")] = None,
    image_size: ImageSize = None,
) -> None:
    """Write a model as one file that needs neither zoo nor timm, and check that it answers the
    same."""
    import zoo

    loaded = output.model(model, pretrained=True, image_size=image_size, device="cpu", seed=0)
    output.wrote(zoo.export(loaded, format_, out=out, batch_size=batch_size), loaded)


app.command(epilog=output.examples(
    "zoo push fused me/fused --dry-run", "zoo push fused me/fused --private",
    "zoo push fused org/model --create-pr --message 'Fuse with ties'"))(push)
app.command(epilog=output.examples(
    "zoo pull timm/resnet18.a1_in1k", "zoo pull org/model@v1 -o model"))(pull)
app.command(epilog=output.examples(
    "zoo reproduce org/fused", "zoo reproduce fused --source 1=runs/a --source 2=runs/b",
    "zoo reproduce fused --data train.csv --json"))(reproduce)
app.command(epilog=output.examples(
    "zoo convert model.pth -o model.safetensors",
    "zoo convert checkpoint.pt --key model_ema -o model.safetensors"))(convert)
app.command(epilog=output.examples(
    "zoo space me/fused -o app", "zoo space me/fused --beside me/a --beside me/b --push"))(space)


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
    from zoo.known import known_plugins

    output.plugins(zoo.plugins(), known_plugins(), json)


@app.command(epilog=output.examples("zoo check acme", "zoo check timm --name resnet18 --json"))
def check(
    namespace: Annotated[str, typer.Argument(help="The namespace of an installed plugin.")],
    name: Annotated[list[str] | None, typer.Option(
        help="Of a catalogue: a name to check; may be repeated.")] = None,
    json: Json = False,
) -> None:
    """Check that a plugin keeps the rules; says what its author must change. Exit code 1 when it
    does not."""
    from zoo.testing import run_checks

    if not output.checked(list(run_checks(namespace, names=name or ())), json):
        raise typer.Exit(1)


@app.command(epilog=output.examples("zoo new-plugin acme", "zoo new-plugin acme -o work/acme"))
def new_plugin(
    namespace: Annotated[str, typer.Argument(
        help="What its names begin with: acme, as in acme/gated.")],
    out: Annotated[Path | None, typer.Option(
        "--out", "-o", help="The folder to write, by default fusion-zoo-NAMESPACE.")] = None,
) -> None:
    """Write a plugin of your own to start from: a fusion of each kind, a network, their tests."""
    from zoo.names import canonical_namespace
    from zoo.scaffold import new_plugin

    output.started(new_plugin(namespace, out), canonical_namespace(namespace))


app.add_typer(cache, name="cache")


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
    with warnings.catch_warnings():
        if not sys.warnoptions:
            warnings.showwarning = _say_warning
            # Hidden by default, because the code that uses the old name is not the user's script.
            warnings.filterwarnings("default", ".* is now called ", DeprecationWarning)
        try:
            app(args=None if arguments is None else list(arguments), standalone_mode=True)
        except ZooError as error:
            output.fail(str(error))
        except (OSError, MemoryError) as error:
            output.fail(f"{type(error).__name__}: {error}")
        except RuntimeError as error:
            if type(error).__name__ != "OutOfMemoryError":  # torch's, named without importing it
                raise
            output.fail(f"{error} Try a smaller --batch-size or --image-size.")
    raise SystemExit(1)


def _say_warning(message: Any, *_: Any, **__: Any) -> None:
    output.warn(str(message))
