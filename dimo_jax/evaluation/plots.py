"""The pictures of a report, each as the bytes of a PNG."""

import io
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from PIL import Image

from dimo_jax.evaluation.columns import COLUMNS

# Okabe and Ito's colours, told apart by every common kind of colour vision; marker or hatch differ as well.
TEACHER, GENERATOR, GREY = "#0072B2", "#D55E00", "#5f6b76"
GRID_COLUMNS = 10  # one a class
MASKED = (240, 190, 110)  # a masked pixel in a sample grid

_PAPER, _GAP, _SCALE = 255, 2, 3  # around the images of a grid; pixels
_LINES = ("-", "--", "-.", ":")  # of the control rows
_STYLE = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e7ea",
    "axes.edgecolor": GREY,
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "figure.dpi": 150,
    "figure.constrained_layout.use": True,
}
_CURVES = (  # stage, metric, title, unit, colour
    ("pretrain", "nll", "teacher: masked NLL, pre-training", "nats per token", TEACHER),
    ("distill", "generator/divergence", "generator: divergence, distillation", "nats, reduced as set", GENERATOR),
    ("distill", "auxiliary/loss", "auxiliary: loss, distillation", "nats per token", GREY),
)


def sample_grid(images: np.ndarray) -> bytes:
    """Images [N, H, W, C] float in [-1, 1], C = 1 or 3, in rows of 10; NaN is drawn as a masked pixel."""
    images = np.asarray(images, np.float32)
    pixels = np.where(np.isnan(images), MASKED, (images.clip(-1, 1) + 1) * 127.5)
    pixels = pixels.repeat(_SCALE, axis=1).repeat(_SCALE, axis=2)
    framed = np.pad(pixels, ((0, -len(images) % GRID_COLUMNS), (0, _GAP), (0, _GAP), (0, 0)), constant_values=_PAPER)
    count, height, width, _ = framed.shape
    sheet = framed.reshape(-1, GRID_COLUMNS, height, width, 3).swapaxes(1, 2)
    sheet = sheet.reshape(count // GRID_COLUMNS * height, GRID_COLUMNS * width, 3)
    buffer = io.BytesIO()
    Image.fromarray(sheet.round().astype(np.uint8)).save(buffer, format="PNG")
    return buffer.getvalue()


def overview(panels: Mapping[str, np.ndarray]) -> bytes:
    """Sets of images, each as in `sample_grid`, side by side under their names."""
    with matplotlib.rc_context({**_STYLE, "axes.titlelocation": "center"}):
        figure = Figure(figsize=(2.4 * len(panels), 1.7))
        for axis, (name, images) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
            axis.imshow(np.asarray(Image.open(io.BytesIO(sample_grid(images)))), interpolation="nearest")
            axis.set_title(name)
            axis.axis("off")
        return _png(figure)


def quality_plot(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Both distances against the number of network evaluations: the teacher's line, one step, the control rows."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(11.2, 4.8))
        for axis, metric in zip(figure.subplots(1, 2), ("pixel_fd", "cnn_fd"), strict=True):
            _draw_quality(axis, rows, metric)
        figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=3)
        return _png(figure)


def _draw_quality(axis, rows, metric):
    title, kinds = COLUMNS[metric].title, {kind: [] for kind in ("teacher", "generator", "control")}
    for row in rows:
        kinds[row["kind"]].append((row["evaluations"], row["metrics"][metric], row["name"]))
    line = sorted(kinds["teacher"])
    axis.plot(
        [at for at, _, _ in line], [value for _, value, _ in line], "o-", color=TEACHER, label="teacher", zorder=3
    )
    star = {"linestyle": "none", "markersize": 16, "color": GENERATOR, "markeredgecolor": "white", "zorder": 4}
    for at, value, name in kinds["generator"]:
        axis.plot(at, value, "*", label=name, **star)
    for (_, value, name), style in zip(kinds["control"], itertools.cycle(_LINES), strict=False):
        axis.axhline(value, label=f"control: {name}", color=GREY, linestyle=style, linewidth=1.2)
    axis.set(xscale="log", yscale="log", title=f"{title}: lower is better")
    axis.set(xlabel="network evaluations a sample", ylabel=f"{title} to all real digits")
    axis.set_xticks(sorted({at for kind in ("teacher", "generator") for at, _, _ in kinds[kind]}))
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    for numbers in (axis.xaxis, axis.yaxis):
        numbers.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        numbers.set_minor_locator(NullLocator())


def curve_plot(curves: Mapping[str, Sequence[Mapping[str, Any]]], held_out_nll: float) -> bytes:
    """Loss and divergence over the steps of both training stages; a stage that was not run leaves its panel empty."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(11.2, 3.6))
        for axis, (stage, metric, title, unit, color) in zip(figure.subplots(1, len(_CURVES)), _CURVES, strict=True):
            points = [(row["step"], row[metric]) for row in curves.get(stage, ()) if metric in row]
            axis.plot(*zip(*points, strict=True) if points else ([], []), color=color, linewidth=1.6)
            axis.set(title=title, xlabel="step", ylabel=unit)
            if stage == "pretrain":
                axis.axhline(held_out_nll, color=GREY, linestyle="--", label="held out, at the end")
                axis.legend()
        return _png(figure)


def support_plot(support: Mapping[str, Sequence[int]]) -> bytes:
    """Share of the tokens for which k outputs have a probability above 0.001; element k of a histogram counts them."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(11.2, 3.6))
        axis = figure.subplots()
        styles = {"teacher": (-0.2, TEACHER, ""), "generator": (0.2, GENERATOR, "//")}
        for name, (offset, color, hatch) in styles.items():
            counts = np.asarray(support[name], float)
            place = np.arange(len(counts)) + offset
            bar = {"width": 0.4, "color": color, "hatch": hatch, "edgecolor": "white"}
            axis.bar(place, 100 * counts / counts.sum(), label=name, **bar)
        axis.set(xlabel="outputs with a probability above 0.001", ylabel="share of tokens (%)")
        axis.set_xticks(np.arange(len(counts)))
        axis.grid(axis="x", visible=False)
        axis.legend()
        return _png(figure)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
