"""What all figures share: one colour per cell type, resolution, scatter plots of cells by type, stacked bars of proportions."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib.patheffects
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure

from lib.files import replacing

# Okabe and Ito's colour-blind-safe colours, then Paul Tol's "muted" and "bright" where there are more cell types.
COLOURS = (
    "#0072B2 #E69F00 #009E73 #D55E00 #CC79A7 #56B4E9 #882255 #999933 #332288 #DDCC77 #44AA99 #AA4499 "
    "#117733 #EE6677 #BBBBBB #66CCEE #7F3C00 #4B0092 #F0E442 #1AFF1A #555555 #FFB6DB #004949 #B66DFF"
).split()
REAL, GENERATED, NEUTRAL = "#0072B2", "#D55E00", "#8C8C8C"
UNLABELLED, BACKGROUND = "#DDDDDD", "#E6E6E6"
DPI = 160


def palette(cell_types: list[str]) -> dict[str, str]:
    """A colour per cell type, by its place in the sorted list of types that all stages share."""
    return {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(cell_types)}


def save(figure: Figure, path: Path, dpi: int = DPI) -> None:
    """Write a figure as png."""
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=dpi)


def open_frame(*panels: Axes) -> None:
    """Remove the upper and right line of the frame of each panel."""
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)


def dot_size(n_cells: int) -> float:
    """Area of a cell's dot, in square points: smaller where there are many cells."""
    return float(np.clip(12_000 / max(n_cells, 1), 1.5, 9))


def embedding_axes(axes: Axes, method: str = "UMAP") -> None:
    """Axes of an embedding: named, without ticks, one scale for both."""
    axes.set(xlabel=f"{method} 1", ylabel=f"{method} 2", xticks=[], yticks=[], aspect="equal", adjustable="datalim")
    open_frame(axes)


def scatter_by_type(axes: Axes, embedding: np.ndarray, cell_type: pd.Series, method: str = "UMAP") -> None:
    """Cells (n_cells x 2) coloured by type; the type's number in the legend is written on its median cell."""
    colours = palette(list(cell_type.cat.categories))
    names = cell_type.to_numpy(dtype=object)
    labels = label_places(embedding, names, list(colours))
    order = np.random.default_rng(0).permutation(len(embedding))  # so that no type is plotted on top of all others
    dots(axes, embedding[order], [colours.get(names[i], UNLABELLED) for i in order], dot_size(len(embedding)))
    for number, (name, colour) in enumerate(colours.items(), start=1):
        legend_dot(axes, colour, f"{number}  {name}")
        if name in labels:
            x, y = labels[name]
            outlined_text(axes, x, y, str(number), fontsize=9, weight="bold", ha="center")
    embedding_axes(axes, method)


def label_places(embedding: np.ndarray, names: np.ndarray, cell_types: list[str]) -> dict[str, np.ndarray]:
    """Where the number of each type is written: a little above the cell nearest to the type's median.

    The median itself may lie between two groups of cells. Cells closer to another number than a number's height are passed over.
    """
    height = 0.04 * np.ptp(embedding, axis=0).max()
    places: dict[str, np.ndarray] = {}
    for name in cell_types:
        cells = embedding[names == name] + [0, height / 2]
        if len(cells):
            cells = cells[np.linalg.norm(cells - np.median(cells, axis=0), axis=1).argsort(kind="stable")]
            free = (cell for cell in cells if all(np.linalg.norm(cell - place) >= height for place in places.values()))
            places[name] = next(free, cells[0])
    return places


def dots(axes: Axes, places: np.ndarray, colour: str | Sequence[str], size: float, alpha: float | None = None) -> None:
    """Dots at `places` (n x 2), in one colour or one each; pixels also in a vector format."""
    axes.scatter(places[:, 0], places[:, 1], s=size, c=colour, lw=0, alpha=alpha, rasterized=True)


def legend_dot(axes: Axes, colour: str, label: str) -> None:
    """An entry of the legend for dots, larger than the dots in the panel."""
    axes.scatter([], [], s=30, c=colour, lw=0, label=label)


def outlined_text(axes: Axes, x: float, y: float, text: str, **style) -> None:
    """Text with a white outline, readable on dots, bars and lines."""
    outline = matplotlib.patheffects.withStroke(linewidth=2.5, foreground="white")
    axes.text(x, y, text, va="center", path_effects=[outline], **style)


def stacked_bars(axes: Axes, proportions: pd.DataFrame, rotation: int) -> None:
    """One bar per row of `proportions`, one colour per column (cell type)."""
    places = np.arange(len(proportions))
    tops = proportions.cumsum(axis=1)
    for name, colour in palette(list(proportions.columns)).items():
        height, bottom = proportions[name], tops[name] - proportions[name]
        axes.bar(places, height, bottom=bottom, color=colour, width=0.8, label=name, edgecolor="white", lw=0.3)
    labels = [str(name).replace("_", " ") for name in proportions.index]
    axes.set_xticks(places, labels, rotation=rotation, fontsize=8)
    axes.set(xlim=(-0.6, len(proportions) - 0.4), ylim=(0, 1.02), ylabel="proportion of cells")
    open_frame(axes)


def type_legend(figure: Figure | SubFigure, axes: Axes, top_down: bool = True) -> None:
    """The cell types of one panel, to the right of all panels; top_down = False: from the bottom up, as bars are stacked."""
    handles, names = axes.get_legend_handles_labels()
    step = 1 if top_down else -1
    figure.legend(
        handles[::step], names[::step], loc="outside right center", frameon=False, fontsize=8, title="cell type"
    )
