"""Figures of cells, real and generated, and of training; and what all figures share: colours, scatter plots, bars of proportions.

Their numbers come from metrics.py.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.patheffects
import numpy as np
import pandas as pd
import seaborn
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import MaxNLocator

from lib.run import replacing

# Okabe and Ito's colour-blind-safe colours, then Paul Tol's "muted" and "bright" where there are more cell types.
COLOURS = (
    "#0072B2 #E69F00 #009E73 #D55E00 #CC79A7 #56B4E9 #882255 #999933 #332288 #DDCC77 #44AA99 #AA4499 "
    "#117733 #EE6677 #BBBBBB #66CCEE #7F3C00 #4B0092 #F0E442 #1AFF1A #555555 #FFB6DB #004949 #B66DFF"
).split()
REAL, GENERATED, NEUTRAL = "#0072B2", "#D55E00", "#8C8C8C"
UNLABELLED, BACKGROUND = "#DDDDDD", "#E6E6E6"
WHITE_OUTLINE = matplotlib.patheffects.withStroke(linewidth=2.5, foreground="white")  # of text on dots and lines
DPI = 160
SMALLEST = 1e-3  # smaller statistics of genes are plotted here: a logarithmic axis has no 0
COMPARED = (  # metrics in the comparison of several generators
    "forest AUC", "linear AUC", "iLISI", "gene correlation r", "gene mean MAE", "gene zeros MAE", "library size KS",
    "genes detected KS", "marker overlap", "fold change r", "F1 train on these, test on real", "membership AUC",
)  # fmt: skip


def palette(cell_types: list[str]) -> dict[str, str]:
    """A colour per cell type, by its place in the sorted list of types that all stages share."""
    return {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(cell_types)}


def save(figure: Figure, path: Path, dpi: int = DPI) -> None:
    """Write a figure as png, the panels without the upper and right line of their frames."""
    for axes in figure.axes:
        if axes.axison:
            axes.spines[["top", "right"]].set_visible(False)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=dpi)


def new_figure(width: float, height: float, n_rows: int = 1, n_columns: int = 1, **style: Any) -> tuple[Figure, Any]:
    """A figure of this size, in inches, and its panels, as from `Figure.subplots`."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(n_rows, n_columns, **style)


def dots(axes: Axes, places: np.ndarray, colour: str | Sequence[str], size: float, alpha: float | None = None) -> None:
    """Dots at `places` (n x 2), in one colour or one each; pixels also in a vector format."""
    axes.scatter(places[:, 0], places[:, 1], s=size, c=colour, lw=0, alpha=alpha, rasterized=True)


def dot_size(n_cells: int) -> float:
    """Area of a cell's dot, in square points: smaller where there are many cells."""
    return float(np.clip(12_000 / max(n_cells, 1), 1.5, 9))


def legend_dot(axes: Axes, colour: str, label: str) -> None:
    """An entry of the legend for dots, larger than the dots in the panel."""
    axes.scatter([], [], s=30, c=colour, lw=0, label=label)


def embedding_axes(axes: Axes, method: str = "UMAP") -> None:
    """Axes of an embedding: named, without ticks, one scale for both."""
    axes.set(xlabel=f"{method} 1", ylabel=f"{method} 2", xticks=[], yticks=[], aspect="equal", adjustable="datalim")


def scatter_by_type(axes: Axes, embedding: np.ndarray, cell_type: pd.Series, method: str = "UMAP") -> None:
    """Cells (n_cells x 2) coloured by type; the type's number in the legend is written on its median cell."""
    colours = palette(list(cell_type.cat.categories))
    names = cell_type.to_numpy(dtype=object)
    labels = label_places(embedding, names, list(colours))
    order = np.random.default_rng(0).permutation(len(embedding))  # so that no type is plotted on top of all others
    dots(axes, embedding[order], [colours.get(names[i], UNLABELLED) for i in order], dot_size(len(embedding)))
    style: dict[str, Any] = {"weight": "bold", "ha": "center", "va": "center", "path_effects": [WHITE_OUTLINE]}
    for number, (name, colour) in enumerate(colours.items(), start=1):
        legend_dot(axes, colour, f"{number}  {name}")
        if name in labels:
            x, y = labels[name]
            axes.text(x, y, str(number), fontsize=9, **style)
    embedding_axes(axes, method)


def label_places(embedding: np.ndarray, names: np.ndarray, cell_types: list[str]) -> dict[str, np.ndarray]:
    """Where the number of each type is written: a little above the cell nearest to the type's median, not on another number."""
    height = 0.04 * np.ptp(embedding, axis=0).max()
    places: dict[str, np.ndarray] = {}
    for name in cell_types:
        cells = embedding[names == name] + [0, height / 2]
        if len(cells):
            cells = cells[np.linalg.norm(cells - np.median(cells, axis=0), axis=1).argsort(kind="stable")]
            free = (cell for cell in cells if all(np.linalg.norm(cell - place) >= height for place in places.values()))
            places[name] = next(free, cells[0])
    return places


def scatter_by_source(panels: Sequence[Axes], embedding: np.ndarray, is_generated: np.ndarray, method: str) -> None:
    """Test cells, generated cells, and both, in one joint embedding (n_cells x 2): three panels."""
    size, colours = dot_size(len(embedding)), np.where(is_generated, GENERATED, REAL)
    order = np.random.default_rng(0).permutation(len(embedding))  # so that neither set is plotted on top of the other
    sets = {"test cells": ~is_generated, "generated cells": is_generated, "both": np.ones_like(is_generated)}
    for axes, (name, is_shown) in zip(panels, sets.items()):
        shown = order[is_shown[order]]
        dots(axes, embedding, BACKGROUND, size)
        dots(axes, embedding[shown], list(colours[shown]), size)
        axes.set_title(name if name == "both" else f"{name} ({is_shown.sum():,})")
        embedding_axes(axes, method)
    for colour, name in zip((REAL, GENERATED), sets):
        legend_dot(panels[2], colour, name)
    panels[2].legend(frameon=False, fontsize=8)


def scatter_by_source_and_type(
    panels: Sequence[Axes], embedding: np.ndarray, is_generated: np.ndarray, cell_type: pd.Series, method: str = "UMAP"
) -> None:
    """Test and generated cells by type, in one joint embedding (n_cells x 2): two panels."""
    for axes, is_shown, name in zip(panels, (~is_generated, is_generated), ("test", "generated")):
        dots(axes, embedding, BACKGROUND, dot_size(len(embedding)))
        scatter_by_type(axes, embedding[is_shown], cell_type[is_shown], method)
        axes.set_title(f"{name} cells ({is_shown.sum():,})")


def stacked_bars(axes: Axes, proportions: pd.DataFrame, rotation: int) -> None:
    """One bar per row of `proportions`, one colour per column (cell type)."""
    named = proportions.rename(index=lambda name: str(name).replace("_", " "))
    colours = list(palette(list(proportions.columns)).values())
    style = {"width": 0.8, "edgecolor": "white", "lw": 0.3, "rot": rotation, "fontsize": 8, "legend": False}
    named.plot.bar(ax=axes, stacked=True, color=colours, **style)
    axes.set(xlabel="", ylabel="proportion of cells", ylim=(0, 1.02))


def type_legend(figure: Figure | SubFigure, axes: Axes, top_down: bool = True) -> None:
    """The cell types of one panel, to the right of all panels; top_down = False: from the bottom up, as bars are stacked."""
    style: dict[str, Any] = {"frameon": False, "fontsize": 8, "title": "cell type", "reverse": not top_down}
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center", **style)


def umap_reference(umap: np.ndarray, cell_type: pd.Series, is_test: np.ndarray, path: Path) -> None:
    """Real cells by type and by split. umap: n_cells x 2."""
    figure, (by_type, by_split) = new_figure(11.5, 4.8, 1, 2)
    scatter_by_type(by_type, umap, cell_type)
    by_type.set_title(f"cell types ({len(umap):,} cells)")
    type_legend(figure, by_type)
    for mask, colour, name in ((~is_test, "#C8C8C8", "train"), (is_test, REAL, "test")):
        dots(by_split, umap[mask], colour, dot_size(len(umap)))
        legend_dot(by_split, colour, f"{name} cells ({mask.sum():,})")
    by_split.set_title("split")
    by_split.legend(frameon=False, fontsize=8, loc="best")
    embedding_axes(by_split)
    save(figure, path)


def original_vs_generated(embedding: np.ndarray, is_generated: np.ndarray, path: Path, method: str = "UMAP") -> None:
    """Test cells, generated cells, and both, in one joint embedding (n_cells x 2)."""
    figure, panels = new_figure(13, 4.6, 1, 3)
    scatter_by_source(panels, embedding, is_generated, method)
    save(figure, path)


def original_vs_generated_by_type(
    embedding: np.ndarray, is_generated: np.ndarray, cell_type: pd.Series, path: Path, method: str = "UMAP"
) -> None:
    """The same embedding, test and generated cells side by side, by type."""
    figure, panels = new_figure(11.5, 4.8, 1, 2)
    scatter_by_source_and_type(panels, embedding, is_generated, cell_type, method)
    type_legend(figure, panels[0])
    save(figure, path)


def four_stages(embeddings: dict[str, list[np.ndarray]], cell_types: list[pd.Series], path: Path) -> None:
    """Input, latent, reconstructed and generated cells of the GMVAE, each in an embedding of its own.

    embeddings: method (such as "UMAP") -> four arrays, n_cells x 2: one row of panels per method; cell_types: of the four stages.
    """
    titles = "input (test cells)", "latent (z of the input)", "reconstructed", "generated"
    figure, panels = new_figure(16, 4 * len(embeddings) + 0.3, len(embeddings), 4, squeeze=False)
    for row, (method, stages) in zip(panels, embeddings.items()):
        for axes, embedding, cell_type, title in zip(row, stages, cell_types, titles):
            scatter_by_type(axes, embedding, cell_type, method)
            axes.set_title(f"{title}, {len(embedding):,} cells")
    type_legend(figure, panels[0, 0])
    save(figure, path)


def composition(proportions: pd.DataFrame, path: Path) -> None:
    """Stacked bars of the proportions of the types. proportions: sets of cells x cell types, from `metrics.type_proportions`."""
    figure, axes = new_figure(max(7, 3.5 + 0.45 * len(proportions)), 4.8)
    stacked_bars(axes, proportions, rotation=90 if len(proportions) > 3 else 0)
    type_legend(figure, axes, top_down=False)
    save(figure, path)


def type_correlation(correlation: pd.DataFrame, n_genes: int, path: Path) -> None:
    """Heat map of the correlation between the mean expression of generated and real types, from `metrics.type_correlation`."""
    figure, axes = new_figure(2.6 + 0.62 * correlation.shape[1], 2.2 + 0.5 * correlation.shape[0])
    bar = {"label": "Pearson's r, mean over types subtracted", "shrink": 0.8}
    numbers = {"annot": True, "fmt": ".2f", "annot_kws": {"size": 7}}
    seaborn.heatmap(correlation, ax=axes, cmap="RdBu_r", vmin=-1, vmax=1, cbar_kws=bar, **numbers)
    axes.set(xlabel="test cells", ylabel="generated cells")
    axes.set_title(f"mean expression of the types, {n_genes:,} marker genes", fontsize=10)
    axes.tick_params(labelsize=8)
    save(figure, path)


def fidelity(
    table: pd.DataFrame, cells: dict[str, pd.DataFrame], genes: dict[str, pd.DataFrame], fold_changes: dict[str, pd.DataFrame],
    mean_r: float, cell_types: list[str], path: Path,
) -> None:  # fmt: skip
    """Generated cells and train cells (the real reference), each compared with test cells.

    table: from `metrics.fidelity_table`; cells, genes, fold_changes: of "test", "train" and "generated" cells, from
    `metrics.library_and_genes`, `gene_statistics` and `type_fold_changes`; mean_r: of the genes' means in test and generated cells.
    """
    figure, panels = new_figure(16.5, 8, 2, 4)
    (classifiers, by_type, *histograms), (variance, zeros, means, changes) = panels
    whole = table[table["cells"] == "all"].set_index("figure").loc[["linear AUC", "forest AUC"]]
    _auc_bars(classifiers, whole.set_axis(["linear\n(genes)", "random forest\n(PCs)"]), "all types together")
    classifiers.legend(frameon=False, fontsize=8, loc="upper right")
    within = table[(table["cells"] != "all") & (table["figure"] == "forest AUC")].set_index("cells")
    _auc_bars(by_type, within, "each type (random forest)")
    colours = {"test": NEUTRAL, "train": REAL, "generated": GENERATED}
    names = [f"{name} cells" for name in colours]
    for axes, column, unit in zip(histograms, ("library_size", "genes_detected"), ("counts", "genes")):
        logs = [np.log10(cells[name][column] + 1) for name in colours]
        axes.hist(logs, 40, histtype="step", color=list(colours.values()), lw=1.5, density=True, label=names)
        axes.set(xlabel=f"log10(1 + {unit} per cell)", ylabel="density of cells", title=column.replace("_", " "))
    histograms[1].legend(frameon=False, fontsize=8, loc="upper right")

    expression, style = "log(1 + counts per 10,000)", {"s": 2, "lw": 0, "alpha": 0.5, "rasterized": True}
    test, generated = (genes[name].clip(lower=SMALLEST) for name in ("test", "generated"))
    for axes, statistic in ((variance, "variance"), (zeros, "zeros")):
        axes.scatter(test["mean"], test[statistic], color=NEUTRAL, label="test cells", **style)
        axes.scatter(generated["mean"], generated[statistic], color=GENERATED, label="generated cells", **style)
        axes.set(xscale="log", xlabel=f"mean {expression}", title=f"mean and {statistic} of each gene")
    variance.set(yscale="log", ylabel="variance over cells")
    zeros.set(ylabel="share of cells without a count")
    zeros.legend(frameon=False, fontsize=8, markerscale=4)
    means.scatter(test["mean"], generated["mean"], color=GENERATED, **style)
    means.set(xscale="log", yscale="log", xlabel=f"test cells, {expression}", ylabel=f"generated cells, {expression}")
    means.set_title(f"mean of each gene, r = {mean_r:.3f}")
    for name, colour in palette(cell_types).items():
        if name in fold_changes["test"] and name in fold_changes["generated"]:
            changes.scatter(fold_changes["test"][name], fold_changes["generated"][name], color=colour, **style)
    changes.set(xlabel="test cells, log2 fold change", ylabel="generated cells, log2 fold change")
    changes.set_title("fold change of each gene in each type\n(in the colour of the type)")
    for axes in (means, changes):
        limits = min(axes.get_xlim()[0], axes.get_ylim()[0]), max(axes.get_xlim()[1], axes.get_ylim()[1])
        axes.plot(limits, limits, c="k", lw=0.8, ls="--")
    for axes in panels.flat:
        axes.title.set_fontsize(10)
    save(figure, path)


def _auc_bars(axes: Axes, rows: pd.DataFrame, cells: str) -> None:
    """AUC of train and of generated cells, a pair of bars per row, from 0.5."""
    places = np.arange(len(rows))[::-1]
    axes.barh(places + 0.2, rows["real"] - 0.5, 0.38, left=0.5, color=REAL, label="train cells")
    axes.barh(places - 0.2, rows["generated"] - 0.5, 0.38, left=0.5, color=GENERATED, label="generated cells")
    axes.axvline(0.5, c="k", lw=0.8, ls="--")
    axes.set_yticks(places, list(rows.index), fontsize=8)
    lowest = rows[["real", "generated"]].min(axis=None)
    axes.set(xlim=(min(0.4, lowest - 0.02), 1), xlabel="classifier AUC (0.5: cannot be distinguished)")
    axes.set_title(f"train or generated cells against test cells:\n{cells}")


def comparison(table: pd.DataFrame, reference: pd.Series, path: Path) -> None:
    """Several generators, each compared with the same test cells, one panel per metric.

    table: metrics x generators; reference: the best that a generator can reach, the metrics of train cells.
    """
    places = np.arange(table.shape[1])[::-1]
    colours = [GENERATED if name == "gmvae" else NEUTRAL for name in table]
    figure, panels = new_figure(13, 2.2 + 0.9 * len(places), 3, 4, sharey=True)
    for axes, metric in zip(panels.flat, COMPARED):
        bars = axes.barh(places, table.loc[metric], color=colours, height=0.7)
        axes.bar_label(bars, fmt="%.3f", padding=2, fontsize=8, path_effects=[WHITE_OUTLINE])
        line = axes.axvline(reference[metric], c=REAL, lw=1.5, ls="--")
        axes.margins(x=0.25)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.set_yticks(places, list(table), fontsize=8)
        axes.tick_params(axis="x", labelsize=8)
        is_missing = table.loc[metric].isna().all()
        axes.set_title(f"{metric}: too few cells of any type" if is_missing else metric, fontsize=9)
    best = "the best that a generator can reach: train cells against the same test cells; of the membership AUC, chance"
    figure.legend([line], [best], loc="outside lower center", frameon=False, fontsize=9)
    save(figure, path)


def loss_curves(history: pd.DataFrame, best_epoch: int, unit: str, path: Path) -> None:
    """Train and held-out loss (if any) by epoch, one panel for each part of the loss and for the stopping criterion.

    history: one row per epoch, columns epoch, train_*, held_out_*; best_epoch: whose weights are used; unit: of the loss.
    """
    has_held_out = "held_out_loss" in history
    prefix = "held_out_" if has_held_out else "train_"
    parts = [c.removeprefix(prefix) for c in history if c.startswith(prefix) and c != f"{prefix}elbo"]
    n_columns = min(3, len(parts))
    n_rows = -(-len(parts) // n_columns)
    figure, panels = new_figure(4 * n_columns, 3 * n_rows, n_rows, n_columns, squeeze=False)
    for axes, part in zip(panels.flat, parts):
        if f"train_{part}" in history:
            axes.plot(history["epoch"], history[f"train_{part}"], c=NEUTRAL, label="train")
        if has_held_out:
            axes.plot(history["epoch"], history[f"held_out_{part}"], c=REAL, label="held out")
            axes.axvline(best_epoch, c="k", lw=0.8, ls=":", label=f"best epoch ({best_epoch})")
        axes.set(title=part.replace("kl_", "KL divergence of ").replace("_", " "), xlabel="epoch", ylabel=unit)
    for axes in panels.flat[len(parts) :]:
        axes.remove()
    panels[0, 0].legend(frameon=False, fontsize=8)
    save(figure, path)
