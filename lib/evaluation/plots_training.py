"""Figures of a training run."""

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from lib.evaluation.plots_style import NEUTRAL, REAL, open_frame, save


def loss_curves(history: pd.DataFrame, best_epoch: int, unit: str, path: Path) -> None:
    """Train and held-out loss (if any) by epoch, one panel for each part of the loss and for the stopping criterion.

    Parameters
    ----------
    history
        One row per epoch; columns: epoch, train_*, held_out_*.
    best_epoch
        The epoch whose weights are used.
    unit
        Of the loss.
    """
    has_held_out = "held_out_loss" in history
    prefix = "held_out_" if has_held_out else "train_"
    parts = [c.removeprefix(prefix) for c in history if c.startswith(prefix) and c != f"{prefix}elbo"]
    n_columns = min(3, len(parts))
    n_rows = -(-len(parts) // n_columns)
    figure = Figure(figsize=(4 * n_columns, 3 * n_rows), layout="constrained")
    panels = np.ravel(figure.subplots(n_rows, n_columns, squeeze=False))
    for axes, part in zip(panels, parts):
        if f"train_{part}" in history:
            axes.plot(history["epoch"], history[f"train_{part}"], c=NEUTRAL, label="train")
        if has_held_out:
            axes.plot(history["epoch"], history[f"held_out_{part}"], c=REAL, label="held out")
            axes.axvline(best_epoch, c="k", lw=0.8, ls=":", label=f"best epoch ({best_epoch})")
        axes.set(title=part.replace("kl_", "KL divergence of ").replace("_", " "), xlabel="epoch", ylabel=unit)
        open_frame(axes)
    for axes in panels[len(parts) :]:
        axes.remove()
    panels[0].legend(frameon=False, fontsize=8)
    save(figure, path)
