"""Figures of cells: real cells, generated cells, and how close the two are. Their numbers come from metrics.py and cell_statistics.py."""

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lib.evaluation.cell_statistics import CellStatistics
from lib.evaluation.plots_style import (
    BACKGROUND,
    GENERATED,
    NEUTRAL,
    REAL,
    dot_size,
    dots,
    embedding_axes,
    legend_dot,
    open_frame,
    outlined_text,
    palette,
    save,
    scatter_by_type,
    stacked_bars,
    type_legend,
)

# Of the fidelity figure
SETS = {"test": NEUTRAL, "train": REAL, "generated": GENERATED}
EXPRESSION = "log(1 + counts per 10,000)"
SMALLEST = 1e-3  # mean or variance that is plotted on a logarithmic axis: smaller ones and 0 are plotted here

# Of the comparison of several generators
COMPARED = (
    "forest AUC", "linear AUC", "MMD", "iLISI", "gene correlation r", "gene mean MAE", "gene zeros MAE", "library size KS",
    "genes detected KS", "marker overlap", "F1 train on these, test on real", "nearest real cell is a train cell",
)  # fmt: skip


def umap_reference(umap: np.ndarray, cell_type: pd.Series, is_test: np.ndarray, path: Path) -> None:
    """Real cells by type and by split. umap: n_cells x 2."""
    figure = Figure(figsize=(11.5, 4.8), layout="constrained")
    by_type, by_split = figure.subplots(1, 2)
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
    figure = Figure(figsize=(13, 4.6), layout="constrained")
    panels = figure.subplots(1, 3)
    size = dot_size(len(embedding))
    for axes, mask, colour, name in zip(
        panels, (~is_generated, is_generated), (REAL, GENERATED), ("test", "generated")
    ):
        dots(axes, embedding, BACKGROUND, size)
        dots(axes, embedding[mask], colour, size)
        axes.set_title(f"{name} cells ({mask.sum():,})")
        legend_dot(panels[2], colour, f"{name} cells")
    order = np.random.default_rng(0).permutation(len(embedding))
    dots(panels[2], embedding[order], np.where(is_generated, GENERATED, REAL)[order].tolist(), size)
    panels[2].set_title("both")
    panels[2].legend(frameon=False, fontsize=8)
    for axes in panels:
        embedding_axes(axes, method)
    save(figure, path)


def original_vs_generated_by_type(
    embedding: np.ndarray, is_generated: np.ndarray, cell_type: pd.Series, path: Path, method: str = "UMAP"
) -> None:
    """The same embedding, test and generated cells side by side, by type."""
    figure = Figure(figsize=(11.5, 4.8), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, mask, name in zip(panels, (~is_generated, is_generated), ("test", "generated")):
        dots(axes, embedding, BACKGROUND, dot_size(len(embedding)))
        scatter_by_type(axes, embedding[mask], cell_type[mask], method)
        axes.set_title(f"{name} cells ({mask.sum():,})")
    type_legend(figure, panels[0])
    save(figure, path)


def four_stages(embeddings: dict[str, list[np.ndarray]], cell_types: list[pd.Series], path: Path) -> None:
    """Input, latent, reconstructed and generated cells of the GMVAE, each in an embedding of its own.

    Parameters
    ----------
    embeddings
        Method (such as "UMAP") -> four arrays, n_cells x 2: one row of panels per method.
    cell_types
        Of the cells of each of the four stages.
    """
    titles = "input (test cells)", "latent (z of the input)", "reconstructed", "generated"
    figure = Figure(figsize=(16, 4 * len(embeddings) + 0.3), layout="constrained")
    panels = figure.subplots(len(embeddings), 4, squeeze=False)
    for row, (method, stages) in zip(panels, embeddings.items()):
        for axes, embedding, cell_type, title in zip(row, stages, cell_types, titles):
            scatter_by_type(axes, embedding, cell_type, method)
            axes.set_title(f"{title}, {len(embedding):,} cells")
    type_legend(figure, panels[0, 0])
    save(figure, path)


def composition(proportions: pd.DataFrame, path: Path) -> None:
    """Stacked bars of the proportions of the types. proportions: sets of cells x cell types, from `type_proportions`."""
    figure = Figure(figsize=(max(7, 3.5 + 0.45 * len(proportions)), 4.8), layout="constrained")
    axes = figure.subplots()
    stacked_bars(axes, proportions, rotation=90 if len(proportions) > 3 else 0)
    type_legend(figure, axes, top_down=False)
    save(figure, path)


def type_correlation(correlation: pd.DataFrame, n_genes: int, path: Path) -> None:
    """Heat map of the correlation between the mean expression of generated and real types, from `metrics.type_correlation`."""
    n_rows, n_columns = correlation.shape
    figure = Figure(figsize=(2.6 + 0.62 * n_columns, 2.2 + 0.5 * n_rows), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(correlation, cmap="RdBu_r", vmin=-1, vmax=1)
    for (i, j), r in np.ndenumerate(correlation.to_numpy()):
        colour = "white" if abs(r) > 0.6 else "black"
        axes.text(j, i, f"{r:.2f}", ha="center", va="center", fontsize=7, color=colour)
    axes.set_xticks(range(n_columns), correlation.columns, rotation=90, fontsize=8)
    axes.set_yticks(range(n_rows), correlation.index, fontsize=8)
    axes.set(xlabel="test cells", ylabel="generated cells")
    axes.set_title(f"mean expression of the types, {n_genes:,} marker genes", fontsize=10)
    figure.colorbar(image, ax=axes, label="Pearson's r, mean over types subtracted", shrink=0.8)
    save(figure, path)


def fidelity(
    table: pd.DataFrame, statistics: dict[str, CellStatistics], mean_r: float, cell_types: list[str], path: Path
) -> None:
    """Generated cells and train cells (the real reference), each compared with test cells.

    Parameters
    ----------
    table
        From `metrics.fidelity_table`.
    statistics
        Of "test", "train" and "generated" cells of the same types and numbers, from `cell_statistics.summarise`.
    mean_r
        Pearson's r of the genes' means between test and generated cells.
    cell_types
        All of them: their places give the colours.
    """
    figure = Figure(figsize=(16.5, 8), layout="constrained")
    (classifiers, by_type, library, detected), (variance, zeros, means, fold_changes) = figure.subplots(2, 4)
    whole = table[table["cells"] == "all"].set_index("figure").loc[["linear AUC", "forest AUC"]]
    _auc_bars(classifiers, whole.set_axis(["linear\n(genes)", "random forest\n(PCs)"]), "all types together")
    classifiers.legend(frameon=False, fontsize=8, loc="upper right")
    within = table[(table["cells"] != "all") & (table["figure"] == "forest AUC")].set_index("cells")
    _auc_bars(by_type, within, "each type (random forest)")
    _histograms(library, {name: of.library_size for name, of in statistics.items()}, "library size (counts per cell)")
    _histograms(detected, {name: of.n_genes for name, of in statistics.items()}, "genes detected per cell")
    detected.legend(frameon=False, fontsize=8, loc="upper right")

    test, generated = statistics["test"], statistics["generated"]
    _against_mean(variance, test.genes, generated.genes, "variance", least=SMALLEST)
    variance.set(yscale="log", ylabel="variance over cells", title="mean and variance of each gene")
    _against_mean(zeros, test.genes, generated.genes, "zeros", least=0)
    zeros.set(ylabel="share of cells without a count", title="mean and zeros of each gene")
    zeros.legend(frameon=False, fontsize=8)
    _gene_dots(means, test.genes["mean"].clip(SMALLEST), generated.genes["mean"].clip(SMALLEST), GENERATED)
    means.set(xscale="log", yscale="log", xlabel=f"test cells, {EXPRESSION}", ylabel=f"generated cells, {EXPRESSION}")
    means.set_title(f"mean of each gene, r = {mean_r:.3f}")
    for name, colour in palette(cell_types).items():
        if name in test.fold_changes and name in generated.fold_changes:
            _gene_dots(fold_changes, test.fold_changes[name], generated.fold_changes[name], colour)
    fold_changes.set(xlabel="test cells, log2 fold change", ylabel="generated cells, log2 fold change")
    fold_changes.set_title("fold change of each gene in each type\n(in the colour of the type)")
    for axes in (means, fold_changes):
        limits = min(axes.get_xlim()[0], axes.get_ylim()[0]), max(axes.get_xlim()[1], axes.get_ylim()[1])
        axes.plot(limits, limits, c="k", lw=0.8, ls="--")
    for axes in figure.axes:
        axes.title.set_fontsize(10)
    open_frame(*figure.axes)
    save(figure, path)


def _auc_bars(axes: Axes, rows: pd.DataFrame, cells: str) -> None:
    """AUC of train and of generated cells, a pair of bars per row, from 0.5."""
    places = np.arange(len(rows))[::-1]
    for shift, column, colour in ((0.2, "real", REAL), (-0.2, "generated", GENERATED)):
        label = {"real": "train cells", "generated": "generated cells"}[column]
        axes.barh(places + shift, rows[column] - 0.5, 0.38, left=0.5, color=colour, label=label)
    axes.axvline(0.5, c="k", lw=0.8, ls="--")
    axes.set_yticks(places, list(rows.index), fontsize=8)
    lowest = rows[["real", "generated"]].min(axis=None)
    axes.set(xlim=(min(0.4, lowest - 0.02), 1), xlabel="classifier AUC (0.5: cannot be distinguished)")
    axes.set_title(f"train or generated cells against test cells:\n{cells}")


def _histograms(axes: Axes, values: dict[str, np.ndarray], label: str) -> None:
    """Distributions of log10(value + 1), one line per set of cells."""
    bins = np.histogram_bin_edges(np.log10(np.concatenate(list(values.values())) + 1), 40)
    for name, colour in SETS.items():
        logs = np.log10(values[name] + 1)
        axes.hist(logs, list(bins), histtype="step", color=colour, lw=1.5, density=True, label=f"{name} cells")
    axes.set(xlabel=f"log10(1 + {label.split(' (')[0]})", ylabel="density of cells", title=label)


def _against_mean(axes: Axes, test: pd.DataFrame, generated: pd.DataFrame, statistic: str, least: float) -> None:
    """One statistic of each gene against its mean, in test and in generated cells."""
    for name, genes in (("test", test), ("generated", generated)):
        _gene_dots(axes, genes["mean"].clip(SMALLEST), genes[statistic].clip(least), SETS[name])
        legend_dot(axes, SETS[name], f"{name} cells")
    axes.set(xscale="log", xlabel=f"mean {EXPRESSION}")


def _gene_dots(axes: Axes, x: pd.Series, y: pd.Series, colour: str) -> None:
    dots(axes, np.column_stack([x, y]), colour, 2, alpha=0.5)


def comparison(table: pd.DataFrame, reference: pd.Series, path: Path) -> None:
    """Several generators, each compared with the same test cells, one panel per metric.

    Parameters
    ----------
    table
        Metrics x generators.
    reference
        The same metrics of train cells: no generator can be better.
    """
    names = list(table.columns)
    places = np.arange(len(names))[::-1]
    colours = [GENERATED if name == "gmvae" else NEUTRAL for name in names]
    figure = Figure(figsize=(13, 2.2 + 0.9 * len(names)), layout="constrained")
    panels = np.ravel(figure.subplots(3, 4))
    for axes, metric in zip(panels, COMPARED):
        values = table.loc[metric]
        if values.isna().all():
            axes.set_title(f"{metric}: too few cells of any type", fontsize=9)
            axes.set(xticks=[], yticks=[])
            continue
        axes.barh(places, values, color=colours, height=0.7)
        axes.axvline(reference[metric], c=REAL, lw=1.5, ls="--")
        low, high = min(0.0, values.min(), reference[metric]), max(values.max(), reference[metric])
        margin = 0.25 * (high - low)
        axes.set(xlim=(low - margin if low < 0 else low, high + margin))
        axes.xaxis.set_major_locator(MaxNLocator(4))
        for place, value in zip(places, values):
            outlined_text(axes, max(value, 0), place, f" {value:.3f}", fontsize=8)
        axes.set_title(metric, fontsize=9)
        axes.set_yticks(places, names if axes in panels[::4] else [""] * len(names), fontsize=8)
        axes.tick_params(axis="x", labelsize=8)
    open_frame(*panels)
    panels[0].plot(
        [],
        [],
        c=REAL,
        lw=1.5,
        ls="--",
        label="train cells against the same test cells: the best that a generator can reach",
    )
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", frameon=False, fontsize=9)
    save(figure, path)
