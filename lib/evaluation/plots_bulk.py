"""Figures of the deconvolution: how good the proportions are, and the signature matrix they come from."""

import textwrap
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure, SubFigure

from lib.evaluation.plots_style import dots, open_frame, palette, save, stacked_bars, type_legend

MAX_BARS = 40  # bulk samples plotted
FEW_SAMPLES = 3  # up to so many have a panel each; of more samples, each type has a panel
MAX_COLUMNS = 5  # of panels


def proportions(
    true: pd.DataFrame, estimate: pd.DataFrame, agreement: pd.DataFrame, baseline_mae: float, bulk_true: pd.DataFrame | None,
    bulk_estimate: pd.DataFrame, path: Path,
) -> None:  # fmt: skip
    """Left: predicted against true proportions of mixtures of test cells, one panel per type. Right: predicted proportions of the bulk.

    Parameters
    ----------
    true, estimate
        Random mixtures of test cells x cell types.
    agreement
        Of these two, from `metrics.proportion_agreement`.
    baseline_mae
        MAE of a constant estimate, the types' frequencies in the train cells.
    bulk_true
        Proportions of the bulk (samples x cell types), None where they are unknown.
    bulk_estimate
        Predicted proportions of the bulk.
    """
    n_columns = int(np.ceil(np.sqrt(true.shape[1])))
    n_rows = -(-true.shape[1] // n_columns)
    bars = bulk_estimate.iloc[:MAX_BARS].rename(index=str)
    if bulk_true is not None:
        labelled = [
            table.rename(index=lambda name, kind=kind: f"{name}, {kind}")
            for table, kind in ((bulk_true, "true"), (bars, "predicted"))
        ]
        bars = pd.concat(labelled)
    widths = (2.1 * n_columns, 3.2 + 0.25 * len(bars))
    figure = Figure(figsize=(sum(widths), max(2.2 * n_rows + 0.6, 4.5)), layout="constrained")
    left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=widths)[0]
    _predicted_against_true(left, true, estimate, agreement, baseline_mae, (n_rows, n_columns))

    axes = right.subplots()
    stacked_bars(axes, bars, rotation=90)
    n_samples = len(bulk_estimate)
    axes.set_title("the bulk" if n_samples <= MAX_BARS else f"first {MAX_BARS} of {n_samples} samples", fontsize=10)
    type_legend(right, axes, top_down=False)
    save(figure, path)


def intervals(estimates: dict[str, tuple[pd.DataFrame, pd.DataFrame]], path: Path) -> None:
    """Estimates for the bulk with their intervals: one panel per type, or per sample where there are few samples.

    Parameters
    ----------
    estimates
        Name of the quantity ("cells", "RNA") -> proportions and their standard deviations (NaN: no interval), samples x types.
    """
    first = next(iter(estimates.values()))[0]
    by_sample = len(first) <= FEW_SAMPLES
    estimates = {
        name: tuple(
            (table.iloc[:MAX_BARS] if by_sample else table.iloc[:MAX_BARS].T).rename(columns=str, index=str)
            for table in tables
        )
        for name, tables in estimates.items()
    }
    shown = next(iter(estimates.values()))[0]  # panels x rows
    colours = palette(list(first.columns))
    n_columns = min(len(shown), MAX_COLUMNS)
    n_rows = -(-len(shown) // n_columns)
    width = 4.6 if by_sample else 2.4
    figure = Figure(figsize=(2 + width * n_columns, 0.9 + n_rows * (0.9 + 0.22 * shown.shape[1])), layout="constrained")
    panels = np.ravel(figure.subplots(n_rows, n_columns, squeeze=False, sharey=True))
    places = np.arange(shown.shape[1])
    for axes, panel in zip(panels, shown.index):
        for (table, spread), offset, filled in zip(estimates.values(), (-0.14, 0.14), (True, False)):
            values, errors = table.loc[panel].to_numpy(), 2 * spread.loc[panel].to_numpy()
            row_colours = [colours[row if by_sample else panel] for row in shown.columns]
            low, high = np.maximum(values - errors, 0), np.minimum(values + errors, 1)
            axes.hlines(places + offset, low, high, row_colours, lw=1.2)
            faces = row_colours if filled else "w"
            axes.scatter(
                values, places + offset, s=22, marker="o" if filled else "D", c=faces, edgecolors=row_colours, zorder=3
            )
        axes.set_title(textwrap.fill(panel, 24), fontsize=9)
        axes.set_xlim(left=0)
        axes.set_yticks(places, shown.columns, fontsize=8)
        axes.tick_params(axis="x", labelsize=8)
        axes.grid(axis="x", color="#DDDDDD", lw=0.6)
        open_frame(axes)
    panels[0].invert_yaxis()
    for axes in panels[len(shown) :]:
        axes.remove()
    for name, marker, face in zip(estimates, "oD", ("#555555", "w")):
        panels[0].scatter([], [], s=22, marker=marker, c=face, edgecolors="#555555", label=f"share of {name}")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper left", ncols=2, frameon=False, fontsize=9)
    figure.supxlabel("proportion in the bulk (lines: two standard deviations to each side)", fontsize=9)
    save(figure, path)


def _predicted_against_true(
    figure: SubFigure, true: pd.DataFrame, estimate: pd.DataFrame, agreement: pd.DataFrame, baseline_mae: float, shape: tuple[int, int]
) -> None:  # fmt: skip
    """One scatter plot per type. shape: rows and columns of panels."""
    overall = agreement.loc["all types"]
    errors = f"MAE {overall['MAE']:.3f} (constant estimate: {baseline_mae:.3f}), CCC {overall['CCC']:.2f}"
    figure.suptitle(f"{len(true)} random mixtures of test cells: {errors}", fontsize=10)
    panels = np.ravel(figure.subplots(*shape, squeeze=False))
    for axes, (name, colour) in zip(panels, palette(list(true.columns)).items()):
        x, y = true[name], estimate[name]
        top = 1.05 * max(x.max(), y.max(), 0.05)
        axes.plot([0, top], [0, top], c="k", lw=0.8, ls="--")
        dots(axes, np.column_stack([x, y]), colour, 14)
        axes.set(xlim=(-0.03 * top, top), ylim=(-0.03 * top, top), aspect="equal")
        axes.set_title(
            "{}\nr {r:.2f}, CCC {CCC:.2f}".format(textwrap.fill(name, 28), **agreement.loc[name]), fontsize=8
        )
        axes.tick_params(labelsize=7)
        open_frame(axes)
    for axes in panels[true.shape[1] :]:
        axes.remove()
    figure.supxlabel("true proportion", fontsize=9)
    figure.supylabel("predicted proportion", fontsize=9)


def signature(reference: pd.DataFrame, adapted: pd.DataFrame, markers: list[str], path: Path) -> None:
    """Heat maps of each type's marker genes, before and after the adaptation of the signature matrix to the bulk.

    Plotted is log(1 + counts per 10,000), divided by the gene's largest value in the single cells.

    Parameters
    ----------
    reference, adapted
        Types x genes, counts per cell: mean of the train cells; the same adapted to the bulk.
    markers
        Genes of both tables.
    """
    shared = reference.columns.intersection(adapted.columns)
    per_10k = (table[shared].div(table[shared].sum(axis=1), axis=0) * 1e4 for table in (reference, adapted))
    single_cells, bulk = (np.log1p(table[markers]) for table in per_10k)
    figure = Figure(figsize=(3.5 + 0.17 * len(markers), 2.2 + 0.42 * len(reference)), layout="constrained")
    panels = figure.subplots(2, 1, sharex=True)
    for axes, table, title in zip(panels, (single_cells, bulk), ("single cells", "adapted to the bulk")):
        scaled = table / single_cells.max()
        image = axes.imshow(scaled, cmap="viridis", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
        axes.set_yticks(np.arange(len(reference)), reference.index, fontsize=8)
        axes.set_title(f"mean expression of marker genes, {title}", fontsize=10)
    panels[1].set_xticks(np.arange(len(markers)), markers, rotation=90, fontsize=7)
    figure.colorbar(
        image,
        ax=panels,
        label="log(1 + counts per 10,000),\ndivided by the gene's maximum in the single cells",
        extend="max",
    )
    save(figure, path)
