"""The figures. One colour per cell type everywhere; panels say what they show, axes their unit."""

from pathlib import Path

import matplotlib.patheffects
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.spatial.distance import squareform

from lib.evaluation.metrics import (
    ccc,
    gene_statistics,
    library_and_genes,
    log_fold_changes,
    mae,
    pearson,
)
from lib.files import replacing

# Okabe and Ito's colours for the colour-blind, then Paul Tol's "muted" and "bright" where types outnumber them.
COLOURS = (
    "#0072B2 #E69F00 #009E73 #D55E00 #CC79A7 #56B4E9 #882255 #999933 #332288 #DDCC77 #44AA99 #AA4499 "
    "#117733 #EE6677 #BBBBBB #66CCEE #7F3C00 #4B0092 #F0E442 #1AFF1A #555555 #FFB6DB #004949 #B66DFF"
).split()
ORIGINAL, GENERATED, NEUTRAL = "#0072B2", "#D55E00", "#8C8C8C"
DPI = 160
MAX_BARS = 40  # bulk samples drawn


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
    figure.legend(
        *by_type.get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=8, title="cell type"
    )
    for mask, colour, name in ((~is_test, "#C8C8C8", "train"), (is_test, ORIGINAL, "test")):
        by_split.scatter(*umap[mask].T, s=dot_size(len(umap)), c=colour, lw=0, rasterized=True)
        by_split.scatter([], [], s=30, c=colour, lw=0, label=f"{name} ({mask.sum():,})")
    by_split.set_title("split")
    by_split.legend(frameon=False, fontsize=8, loc="best")
    embedding_axes(by_split)
    save(figure, path)


def scatter_types(axes, umap: np.ndarray, cell_type: pd.Series, method: str = "UMAP") -> None:
    """Cells coloured by type; each type's number in the legend is written where its cells lie."""
    colours = palette(list(cell_type.cat.categories))
    names = cell_type.to_numpy(dtype=object)
    order = np.random.default_rng(0).permutation(len(umap))  # no type hides another by being drawn last
    axes.scatter(
        *umap[order].T,
        s=dot_size(len(umap)),
        c=[colours.get(names[i], "#DDDDDD") for i in order],
        lw=0,
        rasterized=True,
    )
    for number, (name, colour) in enumerate(colours.items(), start=1):
        cells = umap[names == name]
        axes.scatter([], [], s=30, c=colour, lw=0, label=f"{number}  {name}")
        if len(cells):
            x, y = cells[
                np.linalg.norm(cells - np.median(cells, axis=0), axis=1).argmin()
            ]  # a cell, not the void between two groups
            axes.text(
                x,
                y,
                number,
                fontsize=9,
                weight="bold",
                ha="center",
                va="center",
                path_effects=[matplotlib.patheffects.withStroke(linewidth=2, foreground="white")],
            )
    embedding_axes(axes, method)


def dot_size(n_cells: int) -> float:
    return float(np.clip(12_000 / max(n_cells, 1), 1.5, 9))


def embedding_axes(axes, method: str = "UMAP") -> None:
    axes.set(xlabel=f"{method} 1", ylabel=f"{method} 2", xticks=[], yticks=[], aspect="equal", adjustable="datalim")
    axes.spines[["top", "right"]].set_visible(False)


def training(history: pd.DataFrame, best_epoch: int, unit: str, path: Path) -> None:
    """Loss of training and of held-out data by epoch, whole and in parts, and what the best epoch was chosen by."""
    parts = [c.removeprefix("held_out_") for c in history if c.startswith("held_out_") and c != "held_out_elbo"]
    n_columns = min(3, len(parts))
    n_rows = -(-len(parts) // n_columns)
    figure = Figure(figsize=(4 * n_columns, 3 * n_rows), layout="constrained")
    for axes, part in zip(np.ravel(figure.subplots(n_rows, n_columns, squeeze=False)), parts):
        if f"train_{part}" in history:
            axes.plot(history["epoch"], history[f"train_{part}"], c=NEUTRAL, label="train")
        axes.plot(history["epoch"], history[f"held_out_{part}"], c=ORIGINAL, label="held out")
        axes.axvline(best_epoch, c="k", lw=0.8, ls=":", label=f"best epoch ({best_epoch})")
        axes.set(title=part.replace("_", " "), xlabel="epoch", ylabel=unit)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in figure.axes[len(parts) :]:
        axes.remove()
    figure.axes[0].legend(frameon=False, fontsize=8)
    save(figure, path)


def proportions(
    true: pd.DataFrame, estimate: pd.DataFrame, constant: pd.DataFrame, bulk_true: pd.DataFrame | None,
    bulk_estimate: pd.DataFrame, bulk_spread: pd.DataFrame, path: Path,
) -> None:  # fmt: skip
    """Left: predicted against true proportions of the mixtures of test cells, type by type. Right: what was read out of the bulk.

    All tables are samples x cell types; `constant` is the baseline's estimate, `bulk_true` is None where nobody knows it,
    `bulk_spread` the standard deviations of `bulk_estimate`.
    """
    colours = palette(list(true.columns))
    n_columns = int(np.ceil(np.sqrt(len(colours))))
    n_rows = -(-len(colours) // n_columns)
    table = bulk_estimate.iloc[:MAX_BARS].rename(index=str)
    if bulk_true is not None:
        table = pd.concat(
            [
                bulk_true.rename(index=lambda name: f"{name}\ntrue"),
                table.rename(index=lambda name: f"{name}\npredicted"),
            ]
        )
    widths = (2.1 * n_columns, 3.2 + 0.25 * len(table))
    figure = Figure(figsize=(sum(widths), max(2.2 * n_rows + 0.6, 4.5)), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=widths)
    drawn = ~true.index.str.startswith("own")
    errors = mae(true[drawn], estimate[drawn]), mae(true[drawn], constant[drawn]), ccc(true[drawn], estimate[drawn])
    left.suptitle(
        "{} random mixtures of test cells: MAE {:.3f} (train frequencies {:.3f}), CCC {:.2f}".format(
            drawn.sum(), *errors
        ),
        fontsize=10,
    )
    for axes, (name, colour) in zip(np.ravel(left.subplots(n_rows, n_columns, squeeze=False)), colours.items()):
        x, y = true.loc[drawn, name], estimate.loc[drawn, name]
        top = 1.05 * max(x.max(), y.max(), 0.05)
        axes.plot([0, top], [0, top], c="k", lw=0.8, ls="--")
        axes.scatter(x, y, s=14, c=colour, lw=0)
        axes.set(xlim=(-0.03 * top, top), ylim=(-0.03 * top, top), aspect="equal")
        axes.set_title(f"{name}\nr {pearson(x, y):.2f}, CCC {ccc(x, y):.2f}", fontsize=8)
        axes.tick_params(labelsize=7)
    for axes in left.axes[len(colours) :]:
        axes.remove()
    left.supxlabel("true proportion", fontsize=9)
    left.supylabel("predicted proportion", fontsize=9)

    bars = right.subplots()
    bottom = np.zeros(len(table))
    for name, colour in colours.items():
        bars.bar(
            np.arange(len(table)),
            table[name],
            bottom=bottom,
            color=colour,
            width=0.8,
            label=name,
            edgecolor="white",
            lw=0.3,
        )
        bottom += table[name].to_numpy()
        if len(bulk_estimate) <= MAX_BARS and name in bulk_spread:
            places = np.arange(len(table) - len(bulk_estimate), len(table))
            bars.errorbar(places, bottom[places], bulk_spread[name], fmt="none", ecolor="k", elinewidth=0.7)
    bars.set(xlim=(-0.6, len(table) - 0.4), ylim=(0, 1.02), ylabel="proportion of cells (lines: standard deviation)")
    bars.set_title(
        "the bulk" if len(bulk_estimate) <= MAX_BARS else f"first {MAX_BARS} of {len(bulk_estimate)} samples",
        fontsize=10,
    )
    bars.set_xticks(
        np.arange(len(table)),
        [name.replace("_", " ").replace("\n", ", ") for name in table.index],
        rotation=90,
        fontsize=8,
    )
    handles, labels = bars.get_legend_handles_labels()
    right.legend(handles[::-1], labels[::-1], loc="outside right center", frameon=False, fontsize=8, title="cell type")
    for axes in (*left.axes, bars):
        axes.spines[["top", "right"]].set_visible(False)
    save(figure, path)


def signature(reference: pd.DataFrame, adapted: pd.DataFrame, path: Path) -> None:
    """Each type's strongest markers, types x genes: in the single cells, and as the bulk's platform sees them.

    Both tables hold counts per cell; drawn is log(1 + counts per 10,000), of each gene as a share of its largest value in the cells.
    """
    shared = reference.columns.intersection(adapted.columns)
    scaled = [np.log1p(table[shared].div(table[shared].sum(axis=1), axis=0) * 1e4) for table in (reference, adapted)]
    markers = []
    for name in reference.index:
        rest = (scaled[0].drop(index=name)).max()
        markers += [g for g in (scaled[0].loc[name] - rest).nlargest(6).index if g not in markers]
    top = scaled[0][markers].max()
    figure = Figure(figsize=(3.5 + 0.17 * len(markers), 2.2 + 0.42 * len(reference)), layout="constrained")
    panels = figure.subplots(2, 1, sharex=True)
    for axes, table, title in zip(panels, scaled, ("single cells", "adapted to the bulk")):
        image = axes.imshow(
            table[markers] / top, cmap="viridis", vmin=0, vmax=1, aspect="auto", interpolation="nearest"
        )
        axes.set_yticks(np.arange(len(reference)), reference.index, fontsize=8)
        axes.set_title(f"signature matrix: {title}", fontsize=10)
    panels[1].set_xticks(np.arange(len(markers)), markers, rotation=90, fontsize=7)
    figure.colorbar(image, ax=panels, label="expression, share of the gene's largest in the cells", extend="max")
    save(figure, path)


def original_vs_generated(umap: np.ndarray, is_generated: np.ndarray, path: Path, method: str = "UMAP") -> None:
    """One joint embedding, three panels: original cells, generated cells, both."""
    figure = Figure(figsize=(13, 4.6), layout="constrained")
    panels = figure.subplots(1, 3)
    size = dot_size(len(umap))
    for axes, mask, colour, name in zip(
        panels, (~is_generated, is_generated), (ORIGINAL, GENERATED), ("original test cells", "generated cells")
    ):
        axes.scatter(*umap.T, s=size, c="#E6E6E6", lw=0, rasterized=True)
        axes.scatter(*umap[mask].T, s=size, c=colour, lw=0, rasterized=True)
        axes.set_title(f"{name} ({mask.sum():,})")
    order = np.random.default_rng(0).permutation(len(umap))
    panels[2].scatter(
        *umap[order].T, s=size, c=np.where(is_generated, GENERATED, ORIGINAL)[order], lw=0, rasterized=True
    )
    panels[2].set_title("both")
    for colour, name in ((ORIGINAL, "original"), (GENERATED, "generated")):
        panels[2].scatter([], [], s=30, c=colour, lw=0, label=name)
    panels[2].legend(frameon=False, fontsize=8)
    for axes in panels:
        embedding_axes(axes, method)
    save(figure, path)


def original_vs_generated_by_type(
    umap: np.ndarray, is_generated: np.ndarray, cell_type: pd.Series, path: Path, method: str = "UMAP"
) -> None:
    """The same embedding, original and generated cells side by side, by type."""
    figure = Figure(figsize=(11.5, 4.8), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, mask, name in zip(panels, (~is_generated, is_generated), ("original test cells", "generated cells")):
        axes.scatter(*umap.T, s=dot_size(len(umap)), c="#F0F0F0", lw=0, rasterized=True)
        scatter_types(axes, umap[mask], cell_type[mask], method)
        axes.set_title(f"{name} ({mask.sum():,})")
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=8, title="cell type"
    )
    save(figure, path)


def gene_correlation(original: np.ndarray, generated: np.ndarray, train: np.ndarray, path: Path) -> None:
    """Gene-gene correlations of original and of generated cells, genes x genes, in one order: the original's clusters.

    The title tells how well each agrees with the original over all pairs of genes; train cells, which are real, set the floor.
    """
    order = cluster_order(original)
    pairs = np.triu_indices(len(original), k=1)
    limit = max(0.1, np.quantile(np.abs(original[pairs]), 0.99))
    figure = Figure(figsize=(11.5, 6), layout="constrained")
    panels = figure.subplots(1, 2)
    agreement, floor = (pearson(original[pairs], matrix[pairs]) for matrix in (generated, train))
    titles = (
        "original test cells",
        f"generated cells\nagreement with the original: r = {agreement:.2f} (real train cells: {floor:.2f})",
    )
    for axes, matrix, title in zip(panels, (original, generated), titles):
        image = axes.imshow(
            matrix[np.ix_(order, order)], cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest"
        )
        axes.set_title(title, fontsize=10)
        axes.set(xlabel=f"{len(original)} most variable genes", xticks=[], yticks=[])
    panels[0].set_ylabel("the same genes, in the same order")
    figure.colorbar(image, ax=panels, label="correlation between genes (Pearson's r)", shrink=0.8, extend="both")
    save(figure, path)


def fidelity(table: pd.DataFrame, test, generated, floor, path: Path) -> None:
    """Generated cells beside real train cells, both held against test cells: what tells them apart, and where.

    table: from `metrics.fidelity_table`; the three sets are AnnData of the same types and numbers.
    """
    figure = Figure(figsize=(15.5, 7.6), layout="constrained")
    (judges, by_type, library, detected), (mean_variance, mean_zeros, correlation, markers) = figure.subplots(2, 4)
    sets = (("test", test, NEUTRAL), ("train", floor, ORIGINAL), ("generated", generated, GENERATED))

    figures = ["forest AUC", "linear AUC"]
    for axes, rows, names in (
        (
            judges,
            table[(table["cells"] == "all") & table["figure"].isin(figures)].set_index("figure"),
            ["random forest\n(PCs)", "linear\n(genes)"],
        ),
        (by_type, table[(table["cells"] != "all") & (table["figure"] == "forest AUC")].set_index("cells"), None),
    ):
        places = np.arange(len(rows))
        axes.barh(places + 0.2, rows["real"], 0.38, color=ORIGINAL, label="train cells")
        axes.barh(places - 0.2, rows["generated"], 0.38, color=GENERATED, label="generated cells")
        axes.axvline(0.5, c="k", lw=0.8, ls="--")
        axes.set_yticks(places, names or list(rows.index), fontsize=8)
        axes.set(
            xlim=(0.4, 1),
            xlabel="area under the ROC curve (0.5: cannot tell)",
            title="told apart from test cells" + ("" if names else ",\nwithin a type (random forest)"),
        )
    judges.legend(frameon=False, fontsize=8, loc="lower right")

    for axes, values, label in zip(
        (library, detected),
        zip(*(library_and_genes(cells) for _, cells, _ in sets)),
        ("counts per cell", "genes detected per cell"),
    ):
        bins = np.histogram_bin_edges(np.log10(np.concatenate(values) + 1), 40)
        for (name, _, colour), value in zip(sets, values):
            axes.hist(np.log10(value + 1), bins, histtype="step", color=colour, lw=1.5, density=True, label=name)
        axes.set(xlabel=f"log10({label})", ylabel="density")
    library.legend(frameon=False, fontsize=8, loc="upper left")

    statistics = {name: gene_statistics(cells) for name, cells, _ in sets}
    for axes, what in ((mean_variance, "variance"), (mean_zeros, "zeros")):
        for name, _, colour in (sets[0], sets[2]):
            of = statistics[name]
            axes.scatter(
                of["mean"].clip(1e-3),
                of[what].clip(1e-3 if what == "variance" else 0),
                s=2,
                c=colour,
                lw=0,
                alpha=0.5,
                rasterized=True,
            )
            axes.scatter([], [], s=20, c=colour, lw=0, label=name)
        axes.set(
            xscale="log",
            xlabel="mean of a gene, log(1 + counts per 10,000)",
            ylabel="variance" if what == "variance" else "share of zeros",
        )
    mean_variance.set_yscale("log")
    mean_zeros.legend(frameon=False, fontsize=8)

    means = statistics["test"]["mean"], statistics["generated"]["mean"]
    correlation.scatter(*(m.clip(1e-3) for m in means), s=2, c=GENERATED, lw=0, alpha=0.5, rasterized=True)
    correlation.set(
        xscale="log",
        yscale="log",
        xlabel="mean of a gene, test cells",
        ylabel="mean of a gene, generated cells",
        title=f"r = {pearson(*means):.3f}",
    )
    changes, made = log_fold_changes(test), log_fold_changes(generated)
    for name, colour in palette(list(test.obs["cell_type"].cat.categories)).items():
        if name in changes and name in made:
            markers.scatter(changes[name], made[name], s=2, c=colour, lw=0, alpha=0.5, rasterized=True)
    markers.set(
        xlabel="log2 fold change in a type, test cells",
        ylabel="the same, generated cells",
        title="all genes, in the colour of the type",
    )
    for axes in (correlation, markers):
        limits = min(axes.get_xlim()[0], axes.get_ylim()[0]), max(axes.get_xlim()[1], axes.get_ylim()[1])
        axes.plot(limits, limits, c="k", lw=0.8, ls="--")
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.title.set_fontsize(10)
    save(figure, path)


def cluster_order(correlation: np.ndarray) -> np.ndarray:
    """Order of the genes that puts correlated ones side by side: average linkage on 1 - r."""
    distance = np.clip(1 - correlation, 0, 2)
    np.fill_diagonal(distance, 0)
    return leaves_list(linkage(squareform(distance, checks=False), method="average", optimal_ordering=True))
