"""Figures that put generators, stages of a model, or samples side by side. Colours and axes are those of lib/plots.py."""

from pathlib import Path

import matplotlib.patheffects
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from lib.data.counts import log_normalize
from lib.evaluation.metrics import log_fold_changes
from lib.evaluation.plots import GENERATED, NEUTRAL, ORIGINAL, palette, save, scatter_types

# What comparison() shows, and where a perfect generator would be: at the train cells' value, or at this one
COMPARED = (
    "forest AUC", "linear AUC", "MMD", "iLISI", "gene correlation r", "gene mean MAE", "gene zeros MAE", "library size KS",
    "genes detected KS", "marker overlap", "F1 train on these, test on real", "nearest real cell is a train cell",
)  # fmt: skip


def comparison(table: pd.DataFrame, path: Path) -> None:
    """Several generators, each held against the same test cells. table: figures x generators, and the column `real train cells`."""
    names = [name for name in table if name != "real train cells"]
    figure = Figure(figsize=(13, 2.2 + 0.9 * len(names)), layout="constrained")
    panels = np.ravel(figure.subplots(3, 4))
    places = np.arange(len(names))[::-1]
    for axes, what in zip(panels, COMPARED):
        axes.barh(
            places,
            table.loc[what, names],
            color=[GENERATED if name == "gmvae" else NEUTRAL for name in names],
            height=0.7,
        )
        axes.axvline(table.loc[what, "real train cells"], c=ORIGINAL, lw=1.5, ls="--")
        low, high = min(0.0, table.loc[what].min()), table.loc[what].max()
        axes.set(xlim=(low, low + 1.25 * (high - low)))
        for place, name in zip(places, names):
            text = axes.text(
                max(table.loc[what, name], 0), place, f" {table.loc[what, name]:.3f}", va="center", fontsize=8
            )
            text.set_path_effects([matplotlib.patheffects.withStroke(linewidth=2.5, foreground="white")])
        axes.set_title(what, fontsize=9)
        axes.set_yticks(places, names if axes in panels[::4] else [""] * len(names), fontsize=8)
        axes.tick_params(axis="x", labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].plot(
        [], [], c=ORIGINAL, lw=1.5, ls="--", label="real train cells against the same test cells: the best there is"
    )
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", frameon=False, fontsize=9)
    save(figure, path)


def four_stages(embeddings: dict[str, list[np.ndarray]], cell_types: list[pd.Series], path: Path) -> None:
    """The cells at four stages of the model, in two embeddings, each stage embedded by itself.

    embeddings: name -> four arrays, cells x 2; cell_types: of the cells of each stage.
    """
    titles = "input", "latent (z of the input)", "reconstructed", "generated"
    figure = Figure(figsize=(16, 4 * len(embeddings) + 0.3), layout="constrained")
    for (name, stages), row in zip(embeddings.items(), figure.subplots(len(embeddings), 4, squeeze=False)):
        for axes, places, of, title in zip(row, stages, cell_types, titles):
            scatter_types(axes, places, of, name)
            axes.set_title(f"{title} ({len(places):,} cells)")
    figure.legend(
        *row[0].get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=8, title="cell type"
    )
    save(figure, path)


def composition(sets: dict[str, pd.DataFrame], path: Path) -> None:
    """Stacked bars of the proportions of the types, a bar a set; of cells that have a `sample`, a bar a sample, 20 at most.

    sets: name -> table of cells (obs) with `cell_type`.
    """
    types = next(iter(sets.values()))["cell_type"].cat.categories
    bars = {}
    for name, obs in sets.items():
        sample = obs["sample"].astype(str) if "sample" in obs else pd.Series("", index=obs.index)
        for of in pd.unique(sample)[:20]:
            shares = obs["cell_type"][sample == of].value_counts(normalize=True)[types]
            bars[name if sample.nunique() == 1 else f"{name}\n{of}"] = shares.to_numpy()
    table = pd.DataFrame(bars, index=types).T
    colours = palette(list(table.columns))
    figure = Figure(figsize=(max(7, 3.5 + 0.45 * len(table)), 4.8), layout="constrained")
    axes = figure.subplots()
    places = np.arange(len(table))
    bottom = np.zeros(len(table))
    for name, colour in colours.items():
        axes.bar(places, table[name], bottom=bottom, color=colour, width=0.8, label=name, edgecolor="white", lw=0.3)
        bottom += table[name].to_numpy()
    axes.set_xticks(
        places, [label.replace("_", " ") for label in table.index], rotation=90 if len(table) > 6 else 0, fontsize=8
    )
    axes.set(ylim=(0, 1), ylabel="proportion of cells")
    axes.spines[["top", "right"]].set_visible(False)
    handles, names = axes.get_legend_handles_labels()
    figure.legend(handles[::-1], names[::-1], loc="outside right center", frameon=False, fontsize=8, title="cell type")
    save(figure, path)


def type_correlation(reference, generated, n_markers: int, path: Path) -> None:
    """Pearson's r between the types' mean expression, generated against reference, over each reference type's marker genes.

    The genes are those of largest fold change in a reference type, `n_markers` a type. reference, generated: AnnData.
    """
    changes = log_fold_changes(reference)
    genes = reference.var_names.isin(np.concatenate([changes[name].nlargest(n_markers).index for name in changes]))
    means = [mean_expression(cells, genes) for cells in (reference, generated)]
    own, made = (table.loc[[name for name in table.index if not table.loc[name].isna().any()]] for table in means)
    matrix = np.corrcoef(made - own.mean(), own - own.mean())[: len(made), len(made) :]
    figure = Figure(figsize=(2.6 + 0.62 * len(own), 2.2 + 0.5 * len(made)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(matrix, cmap="RdBu_r", vmin=-1, vmax=1)
    for i, j in np.ndindex(matrix.shape):
        axes.text(
            j,
            i,
            f"{matrix[i, j]:.2f}",
            ha="center",
            va="center",
            fontsize=7,
            color="white" if abs(matrix[i, j]) > 0.6 else "black",
        )
    axes.set_xticks(range(len(own)), own.index, rotation=90, fontsize=8)
    axes.set_yticks(range(len(made)), made.index, fontsize=8)
    axes.set(
        xlabel="reference (test cells)",
        ylabel="generated",
        title=f"mean expression of the types, {genes.sum():,} marker genes",
    )
    axes.title.set_fontsize(10)
    figure.colorbar(image, ax=axes, label="Pearson's r, about the mean of the types", shrink=0.8)
    save(figure, path)


def mean_expression(cells, genes: np.ndarray) -> pd.DataFrame:
    """Types x genes: mean log(1 + counts per 10,000); missing for a type without cells."""
    values = log_normalize(cells.X, 1e4)[:, genes]
    names = list(cells.obs["cell_type"].cat.categories)
    masks = [(cells.obs["cell_type"] == name).to_numpy() for name in names]
    rows = [
        np.asarray(values[mask].mean(axis=0)).ravel() if mask.any() else np.full(genes.sum(), np.nan) for mask in masks
    ]
    return pd.DataFrame(rows, index=names)
