"""The figures. One colour per cell type everywhere; panels say what they show, axes their unit."""

from pathlib import Path

import matplotlib.patheffects
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from lib.files import replacing

# Okabe and Ito's colours for the colour-blind, then Paul Tol's "muted" and "bright" where types outnumber them.
COLOURS = (
    "#0072B2 #E69F00 #009E73 #D55E00 #CC79A7 #56B4E9 #882255 #999933 #332288 #DDCC77 #44AA99 #AA4499 "
    "#117733 #EE6677 #BBBBBB #66CCEE #7F3C00 #4B0092 #F0E442 #1AFF1A #555555 #FFB6DB #004949 #B66DFF"
).split()
ORIGINAL, GENERATED, NEUTRAL = "#0072B2", "#D55E00", "#8C8C8C"
DPI = 160


def palette(cell_types: list[str]) -> dict[str, str]:
    """A colour for every type, by its place in the sorted list of types that all stages share."""
    return {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(cell_types)}


def save(figure: Figure, path: Path) -> None:
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=DPI)


def umap_reference(umap: np.ndarray, cell_type: pd.Series, is_test: np.ndarray, path: Path) -> None:
    """Real cells by type, and by split. `umap`: cells x 2."""
    figure = Figure(figsize=(11.5, 4.8), layout="constrained")
    by_type, by_split = figure.subplots(1, 2)
    scatter_types(by_type, umap, cell_type)
    by_type.set_title(f"cell types ({len(umap):,} cells)")
    figure.legend(*by_type.get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=8, title="cell type")
    for mask, colour, name in ((~is_test, "#C8C8C8", "train"), (is_test, ORIGINAL, "test")):
        by_split.scatter(*umap[mask].T, s=dot_size(len(umap)), c=colour, lw=0, label=f"{name} ({mask.sum():,})", rasterized=True)
    by_split.set_title("split")
    by_split.legend(frameon=False, fontsize=8, markerscale=3, loc="best")
    umap_axes(by_split)
    save(figure, path)


def scatter_types(axes, umap: np.ndarray, cell_type: pd.Series) -> None:
    """Cells coloured by type; each type's number in the legend is written where its cells lie."""
    colours = palette(list(cell_type.cat.categories))
    names = cell_type.to_numpy(dtype=object)
    order = np.random.default_rng(0).permutation(len(umap))  # no type hides another by being drawn last
    axes.scatter(*umap[order].T, s=dot_size(len(umap)), c=[colours.get(names[i], "#DDDDDD") for i in order], lw=0, rasterized=True)
    for number, (name, colour) in enumerate(colours.items(), start=1):
        cells = umap[names == name]
        axes.scatter([], [], s=30, c=colour, lw=0, label=f"{number}  {name}")
        if len(cells):
            x, y = np.median(cells, axis=0)
            axes.text(x, y, number, fontsize=9, weight="bold", ha="center", va="center", path_effects=[matplotlib.patheffects.withStroke(linewidth=2, foreground="white")])
    umap_axes(axes)


def dot_size(n_cells: int) -> float:
    return float(np.clip(12_000 / max(n_cells, 1), 1.5, 9))


def umap_axes(axes) -> None:
    axes.set(xlabel="UMAP 1", ylabel="UMAP 2", xticks=[], yticks=[], aspect="equal", adjustable="datalim")
    axes.spines[["top", "right"]].set_visible(False)


def training(history: pd.DataFrame, best_epoch: int, unit: str, path: Path) -> None:
    """Training and held-out loss by epoch, and the parts of the loss that are logged."""
    parts = [c.removeprefix("train_") for c in history if c.startswith("train_") and f"held_out_{c.removeprefix('train_')}" in history]
    parts = ["loss"] + [p for p in parts if p not in ("loss", "elbo")]
    n_columns = min(3, len(parts))
    n_rows = -(-len(parts) // n_columns)
    figure = Figure(figsize=(4 * n_columns, 3 * n_rows), layout="constrained")
    for axes, part in zip(np.ravel(figure.subplots(n_rows, n_columns, squeeze=False)), parts):
        axes.plot(history["epoch"], history[f"train_{part}"], c=NEUTRAL, label="train")
        axes.plot(history["epoch"], history[f"held_out_{part}"], c=ORIGINAL, label="held out")
        axes.axvline(best_epoch, c="k", lw=0.8, ls=":", label=f"best epoch ({best_epoch})")
        axes.set(title=part.replace("_", " "), xlabel="epoch", ylabel=unit)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in figure.axes[len(parts):]:
        axes.remove()
    figure.axes[0].legend(frameon=False, fontsize=8)
    save(figure, path)
