"""Figures 1, 3 and 4 of the paper (bulk2sc_GMVAE), drawn of the model that was trained and the cells that it generated."""

import itertools
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from scipy.cluster.hierarchy import dendrogram

from lib.evaluation import plots_cells
from lib.evaluation.plots_cells import NEUTRAL, REAL, dots, new_figure, save

ARROW = {"arrowstyle": "-|>", "color": "#0B5A85", "lw": 1.4, "shrinkA": 4, "shrinkB": 4}
HEATMAP_DPI = 220  # so that the names of single genes can be read


class Network(NamedTuple):
    """A network of fig. 1: what enters, units of its layers from input to output, what leaves it."""

    input: str
    sizes: tuple[int, ...]
    output: str


def figure_1(parts: dict[str, list[Network]], path: Path) -> None:
    """The networks of the trained GMVAE, of the deconvolution, and those that generate cells, with their sizes.

    parts: title -> networks, of the four boxes. A bar is a layer; its length grows with the logarithm of its number of units.
    """
    titles, networks = list(parts), list(parts.values())
    heights = [max(len(box) for box in row) for row in (networks[:2], networks[2:])]
    figure, panels = new_figure(13.5, 0.6 + 0.8 * sum(heights), 2, 2, height_ratios=heights)
    colours = ("#E3E3E3", "#E3E3E3", "#DCE9F7", "#D8F0D0")
    for axes, title, box, height, colour in zip(panels.flat, titles, networks, np.repeat(heights, 2), colours):
        axes.set(xlim=(0, 1), ylim=(0, height), xticks=[], yticks=[], facecolor=colour)
        axes.spines[:].set_visible(False)
        axes.set_title(title, loc="left", weight="bold")
        for row, (source, sizes, target) in enumerate(reversed(box)):
            y, xs = height * (row + 0.55) / len(box), np.linspace(0.25, 0.6, len(sizes))
            axes.text(xs[0] - 0.03, y, source, ha="right", va="center", fontsize=11)
            axes.text(xs[-1] + 0.03, y, target, va="center", fontsize=11)
            lengths = 0.06 + 0.018 * np.log2(sizes)
            axes.vlines(xs, y - lengths, y + lengths, colors="k", lw=4)
            for x, n_units, length in zip(xs, sizes, lengths):
                axes.text(x, y - length - 0.04, f"{n_units:,}", ha="center", va="top", fontsize=8)
            for start, end in itertools.pairwise(xs):
                axes.annotate("", (end, y), (start, y), arrowprops=ARROW)
    save(figure, path)


def figure_3(
    proportions: pd.DataFrame | None, mae: float, umap: np.ndarray, is_generated: np.ndarray, cell_type: pd.Series, path: Path
) -> None:  # fmt: skip
    """Proportions in the sum of the test cells, and the UMAP of test cells, generated cells and both, also by type.

    proportions: cell types x (predicted, true), None if they were not predicted; mae: their mean absolute error; umap, is_generated,
    cell_type: of test and generated cells in one embedding, (n_cells, 2), (n_cells,), (n_cells,).
    """
    figure, ((scatter, both, test_types), (test, generated, generated_types)) = new_figure(15.5, 9.2, 2, 3)
    plots_cells.scatter_by_source((test, generated, both), umap, is_generated, "UMAP")
    plots_cells.scatter_by_source_and_type((test_types, generated_types), umap, is_generated, cell_type)
    plots_cells.type_legend(figure, test_types)
    if proportions is None:
        scatter.text(0.5, 0.5, "the proportions of the test cells\nwere not predicted", ha="center", va="center")
        scatter.set(xticks=[], yticks=[])
    else:
        limit = 1.08 * proportions.to_numpy().max()
        scatter.plot([0, limit], [0, limit], c=NEUTRAL, lw=1.2)
        dots(scatter, proportions[["predicted", "true"]].to_numpy(), REAL, 45, alpha=0.7)
        scatter.set(xlim=(0, limit), ylim=(0, limit), aspect="equal")
        scatter.set(xlabel="predicted proportion", ylabel="true proportion")
        scatter.set_title(f"sum of all test cells, MAE: {mae:.4f}")
    save(figure, path)


def figure_4(
    test: np.ndarray, generated: np.ndarray, genes: list[str], tree: np.ndarray, r_generated: float, r_reference: float, path: Path
) -> None:  # fmt: skip
    """Heat maps of the correlations between genes in test cells and in generated cells, in the same order of genes.

    test, generated: genes x genes, from `metrics.gene_correlation`; genes: their names; tree: of the test cells, from
    `metrics.cluster_tree`; r_generated, r_reference: agreement of generated and of train cells with the test cells.
    """
    figure = Figure(figsize=(20, 10.4))
    titles = ("Original", f"Generated: agreement r = {r_generated:.2f} (train cells: {r_reference:.2f})")
    tree_style = {"no_labels": True, "color_threshold": 0, "above_threshold_color": "#444444"}
    for left, matrix, title in zip((0.035, 0.525), (test, generated), titles):
        rows, columns = figure.add_axes((left, 0.06, 0.06, 0.74)), figure.add_axes((left + 0.065, 0.805, 0.36, 0.13))
        dendrogram(tree, ax=rows, orientation="left", **tree_style)
        order = dendrogram(tree, ax=columns, **tree_style)["leaves"]
        rows.invert_yaxis()
        rows.axis("off")
        columns.axis("off")
        columns.set_title(title, fontsize=18)
        axes = figure.add_axes((left + 0.065, 0.06, 0.36, 0.74))
        ordered, names = matrix[np.ix_(order, order)], [genes[i] for i in order]
        image = axes.imshow(ordered, cmap="seismic", vmin=-1, vmax=1, interpolation="nearest", aspect="auto")
        axes.set_xticks(range(len(names)), names, rotation=90, fontsize=3.2)
        axes.set_yticks(range(len(names)), names, fontsize=3.2)
        axes.yaxis.tick_right()
        axes.tick_params(length=0, pad=1)
        bar = figure.colorbar(image, cax=figure.add_axes((left + 0.005, 0.83, 0.014, 0.10)))
        bar.set_label("Pearson's r", fontsize=9)
    save(figure, path, HEATMAP_DPI)
