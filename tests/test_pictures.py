"""What the pictures show, on which pages they can be seen, and that they never change by chance."""

from __future__ import annotations

import io
import sys
from typing import Any

import matplotlib
import pytest
import torch
from PIL import Image
from torch.nn import functional

from zoo.measures import measure
from zoo.report.curves import Curve, curve_of
from zoo.report.pictures import draw

CURVE = Curve("alpha", [0.0, 0.5, 1.0], [0.8, 0.9, 0.7], [("member 1", 0.7)], 60)
PAGES = ("#ffffff", "#0d1117")


def measures(
    classes: int = 3, strength: float = 3.0, robust: float | None = None
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(120) % classes
    logits = torch.randn(120, classes, generator=generator)
    logits += strength * functional.one_hot(labels, classes)
    return {**measure(logits, labels, [str(each) for each in range(classes)]), "robust": robust}


def everything() -> dict[str, bytes]:
    measured = {"source": measures(strength=1, robust=0.1), "fused": measures(robust=0.5)}
    return draw(["cat", "dog", "cow"], measured, "fused", CURVE)


def luminance(colour: tuple[int, ...]) -> float:
    """WCAG 2's relative luminance of 0…255."""
    parts = [each / 255 for each in colour[:3]]
    linear = [each / 12.92 if each <= 0.04045 else ((each + 0.055) / 1.055) ** 2.4
              for each in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: tuple[int, ...], other: tuple[int, ...]) -> float:
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def page(colour: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(colour[1:]))


def opaque(data: bytes, box: tuple[float, float, float, float] = (0, 0, 1, 1)) -> set[Any]:
    """The colours of what covers the page, in a part of the picture."""
    image = Image.open(io.BytesIO(data)).convert("RGBA")
    (width, height), (left, top, right, bottom) = image.size, box
    part = image.crop((int(left * width), int(top * height), int(right * width),
                       int(bottom * height)))
    colours: list[Any] = part.getcolors(1 << 20) or []
    return {colour for _, colour in colours if colour[3] > 250}


def test_there_is_a_picture_of_whatever_was_measured() -> None:
    one, two = measures(), measures()
    classes = ["a", "b", "c"]
    assert list(everything()) == ["comparison.png", "confusion.png", "calibration.png",
                                  "interpolation.png"]
    assert draw(classes, {}, None, None) == {}
    assert list(draw(classes, {}, None, CURVE)) == ["interpolation.png"]
    assert list(draw(classes, {"model": one}, "model", None)) == ["confusion.png",
                                                                 "calibration.png"]
    del one["calibration"]  # measured by an earlier version
    assert list(draw(classes, {"fused": one, "a": two}, "fused", None)) == ["comparison.png",
                                                                          "confusion.png"]


@pytest.mark.parametrize("name", ["comparison.png", "calibration.png", "interpolation.png"])
@pytest.mark.parametrize("colour", PAGES)
def test_all_that_is_drawn_stands_out_from_a_light_and_a_dark_page(name: str, colour: str) -> None:
    drawn = opaque(everything()[name])
    assert len(drawn) > 2
    assert min(contrast(each, page(colour)) for each in drawn) > 4


@pytest.mark.parametrize("colour", PAGES)
def test_the_names_beside_a_confusion_matrix_can_be_read(colour: str) -> None:
    data = everything()["confusion.png"]
    names = opaque(data, (0, 0, 0.12, 1))
    assert names
    assert min(contrast(each, page(colour)) for each in names) > 4


@pytest.mark.parametrize("share", [0, 10, 30, 50, 70, 80, 90])
def test_a_number_can_be_read_on_its_cell(share: int) -> None:
    told = {**measures(1), "confusion": [[share, 100 - share], [share, 100 - share]]}
    data = draw(["a", "b"], {"m": told}, "m", None)["confusion.png"]
    inside = sorted(opaque(data, (0.7, 0.2, 0.8, 0.32)), key=luminance)
    assert contrast(inside[0], inside[-1]) > 3.9


def test_the_same_measures_give_the_same_bytes_whatever_the_users_style() -> None:
    first = everything()
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red", "savefig.dpi": 30}):
        assert everything() == first
    for data in first.values():
        image = Image.open(io.BytesIO(data))
        assert image.mode == "RGBA"
        assert image.getpixel((0, 0))[3] == 0  # type: ignore[index]
        assert "Software" not in image.info


def test_any_name_and_any_number_of_classes_can_be_drawn() -> None:
    odd = ["$\\frac{", "九", "line\nbreak\x07" + "long" * 30]
    assert "confusion.png" in draw(odd, {"$x^{": measures(), "fused": measures()}, "fused", None)
    many = draw([f"class {each}" for each in range(100)], {"m": measures(100)}, "m", None)
    assert Image.open(io.BytesIO(many["confusion.png"])).width < 1300


def test_without_matplotlib_there_are_none_and_a_line_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setenv("ZOO_PROGRESS", "1")
    assert everything() == {}
    assert "pip install 'fusion-zoo[report]'" in capsys.readouterr().err
    assert draw(["a"], {}, None, None) == {}
    assert capsys.readouterr().err == ""


def test_a_curve_is_of_one_number_that_was_searched() -> None:
    def recipe(*options: dict[str, Any]) -> dict[str, Any]:
        return {"search": {
            "images": 9, "members": [{"member": 1, "accuracy": 0.5}],
            "fusions": [{"options": each, "accuracy": number / 10}
                        for number, each in enumerate(options, 1)]}}

    found = curve_of(recipe({"alpha": 0.5}, {"alpha": 0.1}, {"alpha": 1}))
    assert found == Curve("alpha", [0.1, 0.5, 1], [0.2, 0.1, 0.3], [("member 1", 0.5)], 9)
    for other in ({}, recipe({"alpha": 0.5}), recipe({"a": 1, "b": 2}, {"a": 2, "b": 2}),
                  recipe({"a": "x"}, {"a": "y"}), recipe({"a": True}, {"a": False})):
        assert curve_of(other) is None
