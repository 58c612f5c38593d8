"""Figures of the deconvolution: how good the proportions are, and the signature matrix they come from."""

import textwrap
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from lib.evaluation.plots_cells import dots, new_figure, palette, save, stacked_bars, type_legend

MAX_BARS = 40  # bulk samples plotted
FEW_SAMPLES = 3  # up to so many have a panel each; of more samples, each type has a panel
MAX_COLUMNS = 5  # of panels


def proportions(
    true: pd.DataFrame, estimate: pd.DataFrame, agreement: pd.DataFrame, baseline_mae: float, bulk: pd.DataFrame, path: Path
) -> None:  # fmt: skip
    """Left: predicted against true proportions of mixtures of test cells, one panel per type. Right: the bulk, as stacked bars.

    true, estimate: random mixtures of test cells x cell types; agreement: of these two, from `metrics.proportion_agreement`;
    baseline_mae: of a constant estimate, the types' frequencies in the train cells; bulk: samples x cell types, one bar a row.
    """
    n_columns = int(np.ceil(np.sqrt(true.shape[1])))
    n_rows = -(-true.shape[1] // n_columns)
    bars = bulk.iloc[:MAX_BARS]
    widths = (2.1 * n_columns, 3.2 + 0.25 * len(bars))
    figure = Figure(figsize=(sum(widths), max(2.2 * n_rows + 0.6, 4.5)), layout="constrained")
    left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=widths)[0]
    overall = agreement.loc["all types"]
    errors = f"MAE {overall['MAE']:.3f} (constant estimate: {baseline_mae:.3f}), CCC {overall['CCC']:.2f}"
    left.suptitle(f"{len(true)} random mixtures of test cells: {errors}", fontsize=10)
    panels = left.subplots(n_rows, n_columns, squeeze=False).flatten()
    for axes, (name, colour) in zip(panels, palette(list(true.columns)).items()):
        pairs = np.column_stack([true[name], estimate[name]])
        top = 1.05 * max(pairs.max(), 0.05)
        axes.plot([0, top], [0, top], c="k", lw=0.8, ls="--")
        dots(axes, pairs, colour, 14)
        axes.set(xlim=(-0.03 * top, top), ylim=(-0.03 * top, top), aspect="equal")
        scores = "r {r:.2f}, CCC {CCC:.2f}".format(**agreement.loc[name])
        axes.set_title(f"{textwrap.fill(name, 28)}\n{scores}", fontsize=8)
        axes.tick_params(labelsize=7)
    for axes in panels[true.shape[1] :]:
        axes.remove()
    left.supxlabel("true proportion", fontsize=9)
    left.supylabel("predicted proportion", fontsize=9)
    axes = right.subplots()
    stacked_bars(axes, bars, rotation=90)
    axes.set_title("the bulk" if len(bulk) <= MAX_BARS else f"first {MAX_BARS} of {len(bulk)} samples", fontsize=10)
    type_legend(right, axes, top_down=False)
    save(figure, path)


def intervals(estimates: dict[str, tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]], path: Path) -> None:
    """Estimates for the bulk with their 95 % intervals: one panel per type, or per sample where there are few samples.

    estimates: name of the quantity ("cells", "RNA") -> proportions, low and high end of the interval (NaN: none), samples x types.
    """
    first = next(iter(estimates.values()))[0]
    by_sample = len(first) <= FEW_SAMPLES
    colours = palette(list(first.columns))
    names = pd.Index(first.index[:MAX_BARS].astype(str)), first.columns  # of samples, of types
    panel_names, row_names = names if by_sample else names[::-1]
    n_columns = min(len(panel_names), MAX_COLUMNS)
    n_rows = -(-len(panel_names) // n_columns)
    size = (2 + (4.6 if by_sample else 2.4) * n_columns, 0.9 + n_rows * (0.9 + 0.22 * len(row_names)))
    figure, panels = new_figure(*size, n_rows, n_columns, squeeze=False, sharey=True)
    panels = panels.flatten()
    places = np.arange(len(row_names))
    styles = {"cells": ("o", -0.14, None), "RNA": ("D", 0.14, "w")}  # marker, shift, face (None: of the type)
    for i, (axes, panel) in enumerate(zip(panels, panel_names)):
        row_colours = [colours[row if by_sample else panel] for row in row_names]
        for quantity, tables in estimates.items():
            marker, shift, face = styles[quantity]
            values, low, high = ((table.iloc[i] if by_sample else table.iloc[:MAX_BARS, i]) for table in tables)
            axes.hlines(places + shift, low, high, row_colours, lw=1.2)
            style = {"marker": marker, "c": face or row_colours, "edgecolors": row_colours}
            axes.scatter(values, places + shift, s=22, zorder=3, clip_on=False, **style)
        axes.set_title(textwrap.fill(panel, 24), fontsize=9)
        axes.set_xlim(left=0)
        axes.set_yticks(places, row_names, fontsize=8)
        axes.tick_params(axis="x", labelsize=8)
        axes.grid(axis="x", color="#DDDDDD", lw=0.6)
    panels[0].invert_yaxis()
    for axes in panels[len(panel_names) :]:
        axes.remove()
    for quantity in estimates:
        marker, _, face = styles[quantity]
        style = {"marker": marker, "c": face or "#555555", "edgecolors": "#555555", "label": f"share of {quantity}"}
        panels[0].scatter([], [], s=22, **style)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper left", ncols=2, frameon=False, fontsize=9)
    has_intervals = any(low.notna().any(axis=None) for _, low, _ in estimates.values())
    lines = "lines: 95 % intervals" if has_intervals else "this method gives no intervals"
    figure.supxlabel(f"proportion in the bulk ({lines})", fontsize=9)
    save(figure, path)


def signature(single_cells: pd.DataFrame, bulk: pd.DataFrame, path: Path) -> None:
    """Heat maps of each type's marker genes (types x genes), before and after the adaptation of the signature matrix to the bulk.

    Both hold log(1 + counts per 10,000), divided by the gene's largest value in the single cells.
    """
    figure, panels = new_figure(3.5 + 0.17 * bulk.shape[1], 2.2 + 0.42 * len(bulk), 2, sharex=True)
    for axes, table, title in zip(panels, (single_cells, bulk), ("single cells", "adapted to the bulk")):
        image = axes.imshow(table, cmap="viridis", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
        axes.set_yticks(range(len(table)), table.index, fontsize=8)
        axes.set_title(f"mean expression of marker genes, {title}", fontsize=10)
    panels[1].set_xticks(range(bulk.shape[1]), bulk.columns, rotation=90, fontsize=7)
    unit = "log(1 + counts per 10,000),\ndivided by the gene's maximum in the single cells"
    figure.colorbar(image, ax=panels, label=unit, extend="max")
    save(figure, path)
