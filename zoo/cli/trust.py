"""`zoo reproduce` and `zoo convert`."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from zoo.cli import output
from zoo.cli.app import Json

if TYPE_CHECKING:
    from zoo.reproducing import Choice, Reproduction

_SHOWN = 20


def reproduce(
    model: Annotated[str, typer.Argument(help="org/name, an address, or a folder.")],
    source: Annotated[list[str] | None, typer.Option(
        help="Where a source lies that is not published: NAME=PATH, or its number: 1=PATH, "
             "base=PATH, teacher1=PATH; may be repeated.")] = None,
    data: Annotated[str | None, typer.Option(help="What it was trained or fitted on.")] = None,
    val: Annotated[str | None, typer.Option(
        help="On what its training chose the best epoch, where that was no share of the data.")]
    = None,
    unlabelled: Annotated[str | None, typer.Option(
        help="The images without labels that it adapted to.")] = None,
    choice: Annotated[bool, typer.Option(
        "--choice", help="Of a model that auto chose: have it choose again on the data.")] = False,
    tolerance: Annotated[float, typer.Option(
        help="Of what was trained or fitted, as a share of a tensor's largest number.")] = 1e-3,
    device: Annotated[str | None, typer.Option(
        help="By default the kind that it was made on.")] = None,
    json: Json = False,
) -> None:
    """Make a saved model again from its provenance and compare it tensor by tensor. Exit code 1
    when it is not the same, or cannot be made again."""
    import zoo

    given: dict[str, str] = {}
    for each in source or ():
        name, equals, place = each.rpartition("=")
        if not (equals and name and place):
            raise typer.BadParameter(f"{each!r} is none; write NAME=PATH", param_hint="--source")
        given[name] = place
    done = zoo.reproduce(model, sources=given, data=data, val=val, unlabelled=unlabelled,
                         choice=choice, tolerance=tolerance, device=device)
    if json:
        print(json_module.dumps(done.as_dict(), indent=2))
    else:
        _tell(done)
    if not done.reproduced:
        raise typer.Exit(1)


def _tell(done: Reproduction) -> None:
    counts = [f"{done.exact} tensors are the same bit for bit"]
    if done.close:
        counts.append(f"{done.close} within {done.tolerance:g}")
    if done.differing:
        counts.append(f"{len(done.differing)} differ")
    if done.unchecked:
        counts.append(f"{len(done.unchecked)} were not checked")
    word = "reproduced" if done.reproduced else (
        "not reproduced" if done.differing else "reproduced in part")
    output.say(f"{done.reference}: {word}: {', '.join(counts)}")
    for each in done.differing[:_SHOWN]:
        largest = "" if each.largest is None else f", by up to {each.largest:.3g}"
        output.say(f"  {each.tensor} {each.problem}{largest}")
    if len(done.differing) > _SHOWN:
        output.say(f"  … and {len(done.differing) - _SHOWN} more; --json lists all")
    if done.choice:
        _tell_choice(done.choice)
    for name, (then, now) in done.versions.items():
        output.say(f"  made with {name} {then}, compared with {name} {now}")
    for note in done.notes:
        output.warn(note)


def _tell_choice(choice: Choice) -> None:
    word = "the same" if choice.then == choice.now else f"{choice.now}, and then {choice.then}"
    output.say(f"  auto's choice: {word}; {choice.compared} candidates compared, "
               f"{len(choice.differing)} differ")
    for problem in choice.differing[:_SHOWN]:
        output.say(f"  {problem}")
    if choice.alone:
        output.say(f"  tried once only: {_few(choice.alone)}")
    for reason in choice.uncertain:
        output.say(f"  the choice need not come out the same: {reason}")


def convert(
    file: Annotated[Path, typer.Argument(help="A pickle of weights: .pth, .pt, .bin, .ckpt.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The .safetensors file to write.")],
    key: Annotated[str | None, typer.Option(
        help="Under which key the weights lie, where there are several: model_ema, or "
             "checkpoint.state_dict.")] = None,
    json: Json = False,
) -> None:
    """Turn a pickle of weights into safetensors, with torch's reader that runs no code
    (weights_only). Whatever is no tensor is left out."""
    from zoo.tensors.converting import convert_pickle

    done = convert_pickle(file, out, key=key)
    if json:
        print(json_module.dumps(done.as_dict(), indent=2))
        return
    under = f" under {done.key!r}" if done.key else ""
    output.say(f"{done.out}: {done.tensors} tensors{under}, {done.size:,} bytes")
    if done.tied:
        output.say(f"  stored once for several names: {_few(done.tied)}")
    if done.dropped:
        output.say(f"  left out, no tensors: {_few(done.dropped)}")


def _few(names: tuple[str, ...]) -> str:
    more = f", … ({len(names)} in all)" if len(names) > 10 else ""
    return ", ".join(names[:10]) + more
