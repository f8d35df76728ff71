"""One file for where neither zoo nor timm is: ONNX, or PyTorch's own exported program."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zoo.atomic import atomic_path
from zoo.errors import ExportError, OptionError, ZooError
from zoo.model import Model
from zoo.names import suggest
from zoo.progress import task

FORMATS = {"onnx": ".onnx", "torch": ".pt2"}

# What a file may say otherwise than the model, of the largest of its answers (at least of 1).
TOLERANCE = 1e-4
# Protocol buffers hold no more.
ONNX_BYTES = 2**31
_NEEDS = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "torch": ()}

Answer = Callable[[Tensor], Tensor]


def export(
    model: Model, format: str | None = None, *, out: str | Path, batch_size: int | None = None
) -> Path:
    """Write a model as one file, check that the file answers as the model does, and give its path.

    The file takes `images`, float32 [B, 3, S, S] on [0, 1] with S the model's image_size, and
    gives `logits` (a fusion of outputs: `log_probabilities`), [B, classes]. Resizing and
    normalisation are inside. Its metadata `zoo` is JSON: classes, image_size, output, name.

    format: `"onnx"`, for onnxruntime and others (needs `pip install 'fusion-zoo[onnx]'`), or
        `"torch"`, for `torch.export.load`; by default the one whose ending `out` has: .onnx, .pt2.
    batch_size: B for a file that takes no other; by default any.

    It is checked on random images, ONNX by onnxruntime on the CPU, and appears whole or not at all.
    Raises ExportError when the network cannot be written that way or the file answers otherwise.
    """
    if not isinstance(model, Model):
        raise ZooError(f"export writes a zoo.Model, and {model!r} is not one")
    out = Path(out)
    chosen = _format(format, out)
    if batch_size is not None and batch_size < 1:
        raise OptionError("export", f"batch_size is {batch_size}, expected 1 or more, or None")
    for package in _NEEDS[chosen]:
        if importlib.util.find_spec(package) is None:
            raise ExportError(f"{package} is not installed; run: "
                              f"pip install 'fusion-zoo[{chosen}]'")
    if not out.parent.is_dir():
        raise ExportError(f"{out}: there is no folder {str(out.parent)!r}")
    if model.exits:
        raise ExportError(f"{model.name} leaves members out for images that are decided, and a "
                          "file runs all of them; fuse it without exit=")
    twin = copy.deepcopy(model).cpu().eval()
    size = sum(tensor.nbytes for tensor in twin.state_dict().values())
    if chosen == "onnx" and size >= ONNX_BYTES:
        raise ExportError(f"one ONNX file holds less than {ONNX_BYTES:,} bytes and the weights are "
                          f"{size:,}; write it as 'torch'")
    write = {"onnx": _write_onnx, "torch": _write_torch}[chosen]
    with atomic_path(out) as temporary, torch.no_grad(), _quietly(), task(
            f"export {chosen}", 2, "steps") as advance:
        twin(_images(twin, batch_size or 2))  # what it refuses itself, it says better
        with contextlib.redirect_stderr(io.StringIO()):  # torch prints graphs that fail
            answer = write(twin, temporary, batch_size)
        advance(1)
        _want_equal(twin, answer, batch_size)
        advance(1)
    return out


def _format(given: str | None, out: Path) -> str:
    if given is None:
        for name, ending in FORMATS.items():
            if out.suffix == ending:
                return name
        raise OptionError("export", f"{str(out)!r} does not say which format; let it end in "
                          + " or ".join(FORMATS.values()) + ", or pass format=")
    if given not in FORMATS:
        near = suggest(given, list(FORMATS), n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(FORMATS)}"
        raise OptionError("export", f"there is no format {given!r}; {hint}")
    return given


def _write_onnx(model: Model, path: Path, batch_size: int | None) -> Answer:
    import onnxruntime

    try:
        program = torch.onnx.export(
            model, (_images(model, batch_size or 2),), dynamo=True, verbose=False,
            input_names=["images"], output_names=[_output(model)],
            dynamic_shapes=_any_batch(batch_size))
    except Exception as error:  # whatever an exporter could not do
        raise _refused(model, error) from error
    assert program is not None
    program.model.metadata_props["zoo"] = json.dumps(_about(model))
    program.save(path, external_data=False)
    try:
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's have no root of their own
        raise ExportError(f"onnxruntime cannot read what was written: {_line(error)}; export it in "
                          "float32 (model.float()), or as 'torch'") from error
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def _write_torch(model: Model, path: Path, batch_size: int | None) -> Answer:
    try:
        program = torch.export.export(
            model, (_images(model, batch_size or 2),), dynamic_shapes=_any_batch(batch_size))
    except Exception as error:  # whatever an exporter could not do
        raise _refused(model, error) from error
    with path.open("wb") as file:
        torch.export.save(program, file, extra_files={"zoo": json.dumps(_about(model))})
    with path.open("rb") as file:
        answer: Answer = torch.export.load(file).module()
    return answer


def _want_equal(model: Model, answer: Answer, batch_size: int | None) -> None:
    for number in (1, 3) if batch_size is None else (batch_size,):
        images = _images(model, number)
        wanted = model(images).float()
        try:
            found = answer(images).float()
        except Exception as error:  # onnxruntime's have no root of their own
            raise ExportError(f"the file cannot be run on {number} images: {_line(error)}; try "
                              "batch_size=") from error
        if found.shape != wanted.shape:
            raise ExportError(f"for {number} images the file gives {list(found.shape)}, the model "
                              f"{list(wanted.shape)}; try batch_size=")
        difference = float((found - wanted).abs().max())
        allowed = TOLERANCE * max(1.0, float(wanted.abs().max()))
        if not difference <= allowed:
            raise ExportError(f"the file answers otherwise than the model: they differ by up to "
                              f"{difference:.2g}, and {allowed:.2g} is allowed; export it in "
                              "float32 (model.float()), or to the other format")


def _images(model: Model, number: int) -> Tensor:
    generator = torch.Generator().manual_seed(number)
    return torch.rand(number, 3, model.image_size, model.image_size, generator=generator)


def _any_batch(batch_size: int | None) -> dict[str, Any] | None:
    return {"images": {0: torch.export.Dim("batch", min=1)}} if batch_size is None else None


def _output(model: Model) -> str:
    return "log_probabilities" if model.kind == "outputs" else "logits"


def _about(model: Model) -> dict[str, Any]:
    return {"classes": list(model.classes), "image_size": model.image_size,
            "output": _output(model), "name": model.name}


def _refused(model: Model, error: Exception) -> ExportError:
    first = error
    while isinstance(first.__cause__, Exception):  # an exporter's own says only that it failed
        first = first.__cause__
    return ExportError(f"{model.name} cannot be written this way: {_line(first)}; a fixed "
                       "batch_size= or the other format may do")


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without what the exporters tell about themselves."""
    level = logging.root.manager.disable
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(level)
