"""Distribution of z and library size of each type's cells: the aggregated posterior of its train cells, taken after training.

Training brings q(z|x,y) and p(z|y) together, but not completely: the aggregated posterior of a type's cells (Tomczak and Welling,
"VAE with a VampPrior", AISTATS 2018) is not Gaussian, because programmes that only few cells switch on are skewed and
heavy-tailed, and a type may consist of several groups of cells. New cells therefore take their z and library size from samples of
q(z|x,y) of the train cells, blurred by the deviations of other cells: the fewer cells a type has, the more (a smoothed bootstrap,
Silverman and Young 1987).
"""

import numpy as np
import torch

from lib.models.profiles import type_means

MAX_POINTS = 10_000  # of each type
PRIOR_CELLS = 10  # weight, in cells, of the deviations of all types in the variance of one type

Prior = dict[str, torch.Tensor]


def select_cells(cell_type_idx: np.ndarray, n_cell_types: int, rng: np.random.Generator) -> np.ndarray:
    """Numbers of the cells whose points are kept: at most `MAX_POINTS` random ones of each type, by type."""
    return np.concatenate(
        [rng.permutation(np.flatnonzero(cell_type_idx == k))[:MAX_POINTS] for k in range(n_cell_types)]
    )


def fit_prior(points: np.ndarray, cell_type_idx: np.ndarray, n_cell_types: int) -> Prior:
    """Keep the points of each type.

    Parameters
    ----------
    points
        Cells x dimensions: z and, as the last column, log library size of each selected train cell.
    cell_type_idx
        (n_cells,) type of each.

    Returns
    -------
    mean (types x dimensions); deviations (points x dimensions) of the points from the mean of their type, sorted by type;
    n_points (types).
    """
    rows = np.argsort(cell_type_idx, kind="stable")
    points, cell_type_idx = points[rows].astype(np.float64), cell_type_idx[rows]
    mean = type_means(points, cell_type_idx, n_cell_types)
    n_points = np.bincount(cell_type_idx, minlength=n_cell_types)
    return {
        "mean": torch.from_numpy(mean).float(),
        "deviations": torch.from_numpy(points - mean[cell_type_idx]).float(),
        "n_points": torch.from_numpy(n_points),
    }


def sample_prior(prior: Prior, cell_type_idx: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """New points for cells of the given types, (n_cells, n_dims).

    With w = PRIOR_CELLS / (n + PRIOR_CELLS) for a type of n cells: its mean + sqrt(1 - w) x the deviation of a random cell of the type
    + sqrt(w) x the deviation of a random cell of any type from the mean of its own.
    """
    device = cell_type_idx.device
    mean, deviations, n_points = (prior[name].to(device) for name in ("mean", "deviations", "n_points"))
    n_own, start = n_points[cell_type_idx], (n_points.cumsum(0) - n_points)[cell_type_idx]
    u, v = torch.rand(2, len(cell_type_idx), generator=generator, device=device, dtype=torch.float64)
    own, other = (
        deviations[(start + u * n_own).long().clamp(max=len(deviations) - 1)],
        deviations[(v * len(deviations)).long()],
    )
    weight = (PRIOR_CELLS / (n_own + PRIOR_CELLS))[:, None]  # 1 for a type without cells
    return mean[cell_type_idx] + (1 - weight).sqrt() * own + weight.sqrt() * other
