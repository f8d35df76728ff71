"""Pictures of what was measured, for a page that may be light or dark.

They are PNG: a Hub shows them wherever it shows Markdown. The background is transparent, and what
is drawn on it stands out from white as well as from near black. The same measures give the same
bytes, so that nothing is pushed twice.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, TypeAlias

from zoo.progress import say
from zoo.report.curves import Curve
from zoo.report.markdown import percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# What `Evaluation.as_dict` gives.
Measures: TypeAlias = Mapping[str, Any]

# An extra: it is 70 MB, and only those who report need it.
INSTALL = "pip install 'fusion-zoo[report]'"
# Each has a contrast of more than 4 to 1 to #ffffff and to #0d1117.
TEXT, BLUE, ORANGE = "#747c88", "#3b7fc4", "#c05f28"
# Cells have a background of their own, and one of these on it.
_PALE, _DEEP, _ON_PALE, _ON_DEEP = "#a9c7e8", "#2f6bb0", "#0b1d33", "#f8fbff"

_STYLE: dict[str, Any] = {
    "font.size": 10, "font.family": ["DejaVu Sans"], "text.parse_math": False, "text.color": TEXT,
    "axes.edgecolor": TEXT, "axes.labelcolor": TEXT, "axes.titlecolor": TEXT, "axes.titlesize": 11,
    "axes.spines.top": False, "axes.spines.right": False, "axes.facecolor": "none",
    "xtick.color": TEXT, "ytick.color": TEXT, "legend.frameon": False,
    "figure.facecolor": "none", "savefig.facecolor": "none",
}
_MOST_NUMBERS, _MOST_NAMES, _LONGEST_NAME = 12, 40, 24


def draw(
    classes: Sequence[str], measured: Mapping[str, Measures], own: str | None, curve: Curve | None,
) -> dict[str, bytes]:
    """PNG files by name, those for which there is something to draw; none, and a line
    that says so, where matplotlib is not installed.

    measured: of every model, on the same images, by name. own: which of them the pictures are of.
    curve: of a search.
    """
    if not measured and curve is None:
        return {}
    if find_spec("matplotlib") is None:
        say(f"pictures are not drawn, that needs matplotlib: {INSTALL}")
        return {}
    found: dict[str, bytes] = {}
    if len(measured) > 1:
        height = 1.2 + 0.5 * len(measured)
        found["comparison.png"] = _png((7.2, height), lambda axes: _comparison(axes, measured, own))
    if own is not None:
        told = measured[own]
        side = min(8.0, max(3.6, 0.42 * len(classes) + 1.6))
        found["confusion.png"] = _png((side, side), lambda axes: _confusion(axes, told, classes))
        if told.get("calibration"):
            found["calibration.png"] = _png((4.6, 4.4), lambda axes: _calibration(axes, told))
    if curve is not None:
        found["interpolation.png"] = _png((6.0, 3.8), lambda axes: _interpolation(axes, curve))
    return found


def _png(size: tuple[float, float], fill: Callable[[Axes], None]) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    file = io.BytesIO()
    with _style(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a name in another script
        figure = Figure(figsize=size, dpi=144, layout="constrained")
        FigureCanvasAgg(figure)
        fill(figure.add_subplot())
        figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()


def _style() -> AbstractContextManager[None]:
    """Ours alone, whatever the user's own settings are."""
    from matplotlib import style

    ours: AbstractContextManager[None] = style.context(["default", _STYLE])
    return ours


def _confusion(axes: Axes, own: Measures, classes: Sequence[str]) -> None:
    from matplotlib.colors import LinearSegmentedColormap
    from numpy import array, divide, ma, zeros_like

    counts = array(own["confusion"], dtype=float)  # (C, C), rows are true
    totals = counts.sum(axis=1, keepdims=True)
    shares = divide(counts, totals, out=zeros_like(counts), where=totals > 0)
    colours = LinearSegmentedColormap.from_list("shares", [_PALE, _DEEP])
    axes.imshow(ma.masked_equal(shares, 0), cmap=colours, vmin=0, vmax=1)
    if len(classes) <= _MOST_NUMBERS:
        for row, column in zip(*counts.nonzero(), strict=True):
            axes.text(column, row, f"{counts[row, column]:.0f}", ha="center", va="center",
                      fontsize=8, color=_ON_DEEP if shares[row, column] > 0.8 else _ON_PALE)
    if len(classes) <= _MOST_NAMES:
        names = [_short(name) for name in classes]
        axes.set_xticks(range(len(classes)), names, rotation=90 if max(map(len, names)) > 2 else 0)
        axes.set_yticks(range(len(classes)), names)
    axes.set(xlabel="predicted", ylabel="true", title=f"{own['n']:,} test images")
    axes.spines[["top", "right"]].set_visible(True)


def _calibration(axes: Axes, own: Measures) -> None:
    bins = own["calibration"]
    width = 1 / len(bins)
    for number, each in enumerate(bins):
        if each["n"]:
            axes.bar((number + 0.5) * width, each["accuracy"], width * 0.7, color=BLUE,
                     label="accuracy")
            axes.plot([number * width, (number + 1) * width], [each["confidence"]] * 2,
                      color=ORANGE, linewidth=2.5, label="confidence")
    axes.plot([0, 1], [0, 1], color=TEXT, linestyle="--", linewidth=1)
    axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="confidence", ylabel="accuracy",
             title=f"ECE {own['ece']:.4f} on {own['n']:,} test images")
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    axes.legend(handles.values(), handles.keys(), loc="upper left")


def _comparison(axes: Axes, measured: Mapping[str, Measures], own: str | None) -> None:
    attacked = any(each.get("robust") is not None for each in measured.values())
    images = next(iter(measured.values()))["n"]
    shift = 0.2 if attacked else 0
    for row, (name, each) in enumerate(measured.items()):
        low, high = each["interval"]
        axes.barh(row - shift, each["accuracy"], 0.2, color=BLUE if name == own else TEXT)
        # The caps stand out over the bar, for those who cannot tell the two by colour.
        axes.errorbar([(low + high) / 2], [row - shift], xerr=(high - low) / 2, color=ORANGE,
                      linewidth=2, capsize=6, capthick=2)
        axes.text(1.04, row - shift, f"{percent(each['accuracy'])}  ({percent(low)} – "
                  f"{percent(high)})", va="center", fontsize=9)
        if each.get("robust") is not None:
            axes.barh(row + shift, each["robust"], 0.2, facecolor="none", edgecolor=ORANGE,
                      hatch="//////")
            axes.text(1.04, row + shift, f"{percent(each['robust'])}  under attack", va="center",
                      fontsize=9)
    axes.set_yticks(range(len(measured)), [_short(name) for name in measured])
    axes.invert_yaxis()
    axes.set(xlim=(0, 1), xlabel=f"accuracy on {images:,} test images, 95 % interval")
    axes.xaxis.set_major_formatter(lambda share, _: f"{100 * share:.0f} %")


def _interpolation(axes: Axes, curve: Curve) -> None:
    axes.plot(curve.values, curve.accuracies, color=BLUE, marker="o", markersize=4)
    for name, accuracy in curve.members:
        axes.axhline(accuracy, color=TEXT, linestyle="--", linewidth=1)
        axes.annotate(name, (1.02, accuracy), xycoords=("axes fraction", "data"),
                      va="center", fontsize=9)
    axes.set(xlabel=curve.option, ylabel="accuracy",
             title=f"{curve.images:,} validation images, as the fusion was searched")
    axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.1f} %")


def _short(name: str) -> str:
    clean = " ".join("".join(each if each.isprintable() else " " for each in name).split())
    return clean if len(clean) <= _LONGEST_NAME else clean[:_LONGEST_NAME - 1] + "…"
