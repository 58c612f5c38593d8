"""Figures 1, 3 and 4 of the paper (bulk2sc_GMVAE), drawn of the model that was trained and the cells that it generated."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from scipy.cluster.hierarchy import dendrogram

from lib.evaluation.plots_style import (
    GENERATED,
    NEUTRAL,
    REAL,
    dot_size,
    dots,
    embedding_axes,
    legend_dot,
    open_frame,
    save,
    scatter_by_type,
    type_legend,
)

PANELS = ("#E3E3E3", "#DCE9F7", "#D8F0D0")  # backgrounds of the parts I, II and III of fig. 1
LAYER, ARROW, SAMPLED = "black", "#0B5A85", "#C4500A"
HEATMAP_DPI = 220  # so that the names of single genes can be read


class Architecture(NamedTuple):
    """Sizes of the networks of a Gaussian-mixture VAE, from input to output, by the names that a figure shows."""

    name: str
    input: str
    q_y: tuple[int, ...]
    q_z: dict[str, tuple[int, ...]]  # one network each for mean and log-variance; the size of x without y
    p_z: dict[str, tuple[int, ...]]
    trunk: tuple[int, ...]  # what all heads of the decoder share, from z on
    heads: dict[str, tuple[int, ...]]  # of the decoder, from the end of the trunk; one size: parameters without input
    new_z: dict[str, tuple[int, ...]]  # what z of new cells is sampled from
    new_heads: dict[str, tuple[int, ...]]  # heads that new cells need
    prior: str  # the sampling of new cells in words


class _Diagram:
    """Layers as vertical bars, as in fig. 1; the length of a bar grows with the logarithm of its number of units."""

    def __init__(self, axes: Axes):
        self.axes = axes

    def layer(self, x: float, y: float, n_units: int, label: str = "") -> tuple[float, float]:
        """One bar with its number of units below, and an optional label at its right; returns its middle."""
        half = 0.006 + 0.0022 * np.log2(n_units)
        self.axes.plot([x, x], [y - half, y + half], c=LAYER, lw=4, solid_capstyle="butt")
        self.axes.text(x, y - half - 0.004, f"{n_units:,}", ha="center", va="top", fontsize=8)
        if label:
            self.axes.text(x + 0.012, y, label, ha="left", va="center", fontsize=10)
        return x, y

    def arrow(self, start: tuple[float, float], end: tuple[float, float], colour: str = ARROW) -> None:
        style = {"arrowstyle": "-|>", "color": colour, "lw": 1.4, "shrinkA": 4, "shrinkB": 4}
        self.axes.annotate("", end, start, arrowprops=style)

    def network(
        self,
        starts: Iterable[tuple[float, float]],
        xs: Sequence[float],
        y: float,
        sizes: Sequence[int],
        label: str = "",
    ) -> tuple[float, float]:
        """Layers from left to right, at the last of `xs`, the first connected with all `starts`; returns the middle of the last."""
        places = list(zip(xs[-len(sizes) :], sizes))
        for i, (x, n_units) in enumerate(places):
            here = self.layer(x, y, n_units, label if i == len(places) - 1 else "")
            for start in starts:
                self.arrow(start, here)
            starts = [here]
        return here

    def panel(self, x: float, y: float, width: float, height: float, colour: str, title: str) -> None:
        box = FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0,rounding_size=0.02", fc=colour, ec="none")
        self.axes.add_patch(box)
        self.axes.text(x + width - 0.012, y + 0.014, title, ha="right", va="bottom", fontsize=12, weight="bold")


def figure_1(model: Architecture, deconvolution: tuple[str, tuple[int, ...]] | None, path: Path) -> None:
    """The networks of the trained GMVAE (part I), of the deconvolution (II), and those that generate cells (III), with their sizes.

    Parameters
    ----------
    deconvolution
        What estimates the proportions, and the sizes of its layers; None if the user gave the numbers of cells.
    """
    figure = Figure(figsize=(13.5, 9.2))
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set(xlim=(0, 1), ylim=(0, 1))
    axes.axis("off")
    diagram = _Diagram(axes)
    diagram.panel(0.01, 0.375, 0.98, 0.615, PANELS[0], f"I. {model.name}")
    diagram.panel(0.01, 0.01, 0.34, 0.355, PANELS[1], "II. Deconvolution of bulk RNA")
    diagram.panel(0.36, 0.01, 0.63, 0.355, PANELS[2], "III. Generation of cells")
    _training(diagram, model)
    _deconvolution(diagram, deconvolution, model.q_y[-1])
    _generation(diagram, model)
    save(figure, path)


def _training(diagram: _Diagram, model: Architecture) -> None:
    x = diagram.layer(0.075, 0.79, model.q_y[0])
    diagram.axes.text(0.02, 0.94, f"{model.input}, $x$", fontsize=11, va="top")
    y = diagram.layer(0.075, 0.50, model.q_y[-1])
    diagram.axes.text(0.02, 0.432, "one-hot vector of the type, $y$", fontsize=11, va="top")
    xs = (0.19, 0.29, 0.39)
    diagram.network([x], xs, 0.925, model.q_y[1:], r"$q(y|x)$")
    for (name, sizes), row in zip(model.q_z.items(), (0.80, 0.675)):
        diagram.network([x, y], xs, row, sizes[1:], f"{name}\nof $q(z|x,y)$")
        diagram.arrow((0.53, row), (0.58, 0.735), SAMPLED)
    for (name, sizes), row in zip(model.p_z.items(), (0.555, 0.45)):
        diagram.network([y], (0.24, 0.34), row, sizes[1:], f"{name} of $p(z|y)$")
    diagram.axes.text(0.585, 0.785, "sample of $z$", fontsize=9, color=SAMPLED, ha="center")
    _decoder(diagram, model.trunk, model.heads, 0.585, 0.735, 0.13)


def _decoder(
    diagram: _Diagram, trunk: tuple[int, ...], heads: dict[str, tuple[int, ...]], x: float, y: float, row_height: float
) -> list[tuple[float, float]]:  # fmt: skip
    """The decoder from z at (x, y); returns the ends of its heads."""
    z = diagram.network([], [x + 0.055 * i for i in range(len(trunk))], y, trunk)
    rows = y + row_height * (np.arange(len(heads))[::-1] - (len(heads) - 1) / 2)
    ends = []
    for (name, sizes), row in zip(heads.items(), rows):
        starts = [z] if len(sizes) > 1 else []  # parameters have no input
        xs = np.linspace(z[0] + 0.17, z[0] + 0.085, max(1, len(sizes) - 1))[::-1].tolist()
        ends.append(diagram.network(starts, xs, row, sizes[1:] or sizes, name))
    return ends


def _deconvolution(diagram: _Diagram, deconvolution: tuple[str, tuple[int, ...]] | None, n_types: int) -> None:
    if deconvolution is None:
        diagram.axes.text(0.03, 0.2, "the numbers of cells are given by the user", fontsize=11)
        return
    name, sizes = deconvolution
    diagram.axes.text(0.025, 0.345, f"bulk RNA profile: {name}", fontsize=11, va="top")
    xs = np.linspace(0.05, 0.27, len(sizes)).tolist()
    diagram.network([], xs, 0.19, sizes)
    diagram.axes.text(0.283, 0.19, "propor-\ntions of\nthe types", fontsize=9, va="center")


def _generation(diagram: _Diagram, model: Architecture) -> None:
    diagram.axes.text(0.37, 0.345, "cells per type (proportions x number of cells)", fontsize=11, va="top")
    middle = 0.20
    y = diagram.layer(0.40, middle, model.q_y[-1])
    for (name, sizes), row in zip(model.new_z.items(), (0.26, 0.14) if len(model.new_z) > 1 else (middle,)):
        diagram.network([y], (0.455, 0.51), row, sizes[1:], name)
        diagram.arrow((0.595, row), (0.64, middle), SAMPLED)
    diagram.axes.text(0.37, 0.032, model.prior, fontsize=10, color=SAMPLED)
    for _, row in _decoder(diagram, model.trunk, model.new_heads, 0.642, middle, 0.09):
        diagram.arrow((0.938, row), (0.968, middle), SAMPLED)
    diagram.axes.text(0.978, middle, "counts of new cells", rotation=90, fontsize=10, va="center", ha="center")


def figure_3(
    proportions: pd.DataFrame | None, mae: float, umap: np.ndarray, is_generated: np.ndarray, cell_type: pd.Series, path: Path
) -> None:  # fmt: skip
    """Proportions in the sum of the test cells, and the UMAP of test cells, generated cells and both, also by type.

    Parameters
    ----------
    proportions
        Cell types x (predicted, true) of the sum of all test cells; None if they were not predicted.
    mae
        Their mean absolute error.
    umap, is_generated, cell_type
        Of test and generated cells in one embedding: (n_cells, 2), (n_cells,), (n_cells,).
    """
    figure = Figure(figsize=(15.5, 9.2), layout="constrained")
    (scatter, both, test_types), (original, generated, generated_types) = figure.subplots(2, 3)
    _proportions(scatter, proportions, mae)
    sets = ((original, ~is_generated, REAL, "original"), (generated, is_generated, GENERATED, "generated"))
    size = dot_size(len(umap))
    for axes, mask, colour, name in sets:
        dots(axes, umap[mask], colour, size, alpha=0.5)
        for panel in (axes, both):
            legend_dot(panel, colour, f"{name} ({mask.sum():,} cells)")
    order = np.random.default_rng(0).permutation(len(umap))  # so that neither set covers the other
    dots(both, umap[order], np.where(is_generated, GENERATED, REAL)[order].tolist(), size, alpha=0.5)
    for axes, mask, title in ((test_types, ~is_generated, "original"), (generated_types, is_generated, "generated")):
        scatter_by_type(axes, umap[mask], cell_type[mask])
        axes.set_title(f"{title}, by type", fontsize=11)
    low, high = umap.min(axis=0), umap.max(axis=0)
    margin = 0.08 * (high - low)
    for axes in (both, original, generated, test_types, generated_types):
        embedding_axes(axes)
        axes.set(
            xlim=(low[0] - margin[0], high[0] + margin[0]),
            ylim=(low[1] - margin[1], high[1] + margin[1]),
            aspect="auto",
        )
        axes.spines[:].set_visible(True)
    for axes in (both, original, generated):
        axes.legend(
            frameon=False, fontsize=10, loc="lower left", bbox_to_anchor=(0, 1), ncols=2, handletextpad=0.1, borderpad=0
        )
    type_legend(figure, test_types)
    save(figure, path)


def _proportions(axes: Axes, proportions: pd.DataFrame | None, mae: float) -> None:
    """Predicted (x) and true (y) proportion of each type, and the line on which both are equal."""
    if proportions is None:
        axes.text(0.5, 0.5, "the proportions of the test cells\nwere not predicted", ha="center", va="center")
        axes.set(xticks=[], yticks=[])
        return
    limit = 1.08 * proportions.to_numpy().max()
    axes.plot([0, limit], [0, limit], c=NEUTRAL, lw=1.2)
    dots(axes, proportions[["predicted", "true"]].to_numpy(), REAL, 45, alpha=0.7)
    axes.set(xlim=(0, limit), ylim=(0, limit), aspect="equal")
    axes.set(xlabel="predicted proportion", ylabel="true proportion", title=f"sum of all test cells, MAE: {mae:.4f}")
    open_frame(axes)


def figure_4(
    test: np.ndarray, generated: np.ndarray, genes: list[str], tree: np.ndarray, r_generated: float, r_reference: float, path: Path
) -> None:  # fmt: skip
    """Heat maps of the correlations between genes in test cells and in generated cells, in the same order of genes.

    Parameters
    ----------
    test, generated
        Genes x genes, from `gene_correlation`.
    genes
        Their names.
    tree
        Linkage of the genes, from `cluster_tree` of the test cells' matrix.
    r_generated, r_reference
        Agreement with the test cells over all pairs of genes (`correlation_agreement`): of generated cells, of train cells.
    """
    figure = Figure(figsize=(20, 10.4))
    leaves = dendrogram(tree, no_plot=True)
    names = [genes[i] for i in leaves["leaves"]]
    titles = ("Original", f"Generated: agreement r = {r_generated:.2f} (train cells: {r_reference:.2f})")
    for left, matrix, title in zip((0.035, 0.525), (test, generated), titles):
        rows, columns = figure.add_axes((left, 0.06, 0.06, 0.74)), figure.add_axes((left + 0.065, 0.805, 0.36, 0.13))
        _tree(rows, leaves, upright=False)
        _tree(columns, leaves, upright=True)
        axes = figure.add_axes((left + 0.065, 0.06, 0.36, 0.74))
        ordered = matrix[np.ix_(leaves["leaves"], leaves["leaves"])]
        image = axes.imshow(ordered, cmap="seismic", vmin=-1, vmax=1, interpolation="nearest", aspect="auto")
        axes.set_xticks(range(len(names)), names, rotation=90, fontsize=3.2)
        axes.set_yticks(range(len(names)), names, fontsize=3.2)
        axes.yaxis.tick_right()
        axes.tick_params(length=0, pad=1)
        columns.set_title(title, fontsize=18)
        bar = figure.colorbar(image, cax=figure.add_axes((left + 0.005, 0.83, 0.014, 0.10)))
        bar.set_label("Pearson's r", fontsize=9)
    save(figure, path, HEATMAP_DPI)


def _tree(axes: Axes, leaves: dict, upright: bool) -> None:
    """A dendrogram above (upright) or to the left of its heat map."""
    lines = np.stack([leaves["icoord"], leaves["dcoord"]], axis=2)  # (n_branches, 4, 2): along the leaves, height
    axes.add_collection(LineCollection(list(lines if upright else lines[..., ::-1]), colors="#444444", lw=0.6))
    along, height = (0, 10 * len(leaves["leaves"])), (0, 1.02 * lines[..., 1].max())  # scipy places the leaves 10 apart
    axes.set(xlim=along if upright else height[::-1], ylim=height if upright else along[::-1])
    axes.axis("off")
