"""Distribution of z and library size of each type's cells: a Gaussian copula, fitted after training.

Training brings q(z|x,y) and p(z|y) together, but not completely: the aggregated posterior of a type's cells (Tomczak and Welling,
"VAE with a VampPrior", AISTATS 2018) is not Gaussian, because programmes that only few cells switch on are skewed and
heavy-tailed. New cells are therefore sampled from a Gaussian copula of z and log library size (the nonparanormal of Liu, Lafferty
and Wasserman, JMLR 2009): each dimension has its own empirical distribution in each type, and the correlation of normal scores
links the dimensions.
"""

import numpy as np
import torch
from scipy.stats import norm, rankdata

from lib.models.profiles import type_means

MAX_POINTS = 10_000  # cells of each type used
MAX_SCORE, N_LEVELS = 3.5, 141  # quantiles are stored at normal scores from -3.5 to 3.5
PRIOR_CELLS = 10  # weight, in cells, of the distribution of all types in that of one type

Prior = dict[str, torch.Tensor]


def fit_prior(points: np.ndarray, cell_type_idx: np.ndarray, n_cell_types: int, rng: np.random.Generator) -> Prior:
    """Fit the copula of each type; types with few cells borrow from the deviations of all cells from the mean of their type.

    Parameters
    ----------
    points
        Cells x dimensions: z and, as the last column, log library size of each train cell.
    cell_type_idx
        (n_cells,) type of each.

    Returns
    -------
    mean (types x dimensions), quantiles (types x levels x dimensions) and cholesky (types x dimensions x dimensions; factor of the
    correlation of normal scores).
    """
    rows = np.concatenate(
        [rng.permutation(np.flatnonzero(cell_type_idx == k))[:MAX_POINTS] for k in range(n_cell_types)]
    )
    points, cell_type_idx = points[rows].astype(np.float64), cell_type_idx[rows]
    levels = norm.cdf(np.linspace(-MAX_SCORE, MAX_SCORE, N_LEVELS))
    mean = type_means(points, cell_type_idx, n_cell_types)
    deviations = points - mean[cell_type_idx]
    pooled_quantiles = np.quantile(deviations, levels, axis=0, method="hazen")
    pooled_scores = _normal_scores(deviations)
    pooled_correlation = _correlation(pooled_scores.T @ pooled_scores)
    quantiles, choleskys = [], []
    n_dims = points.shape[1]
    for k in range(n_cell_types):
        mine = deviations[cell_type_idx == k]
        n = len(mine)
        own = np.quantile(mine, levels, axis=0, method="hazen") if n else 0
        quantiles.append((n * own + PRIOR_CELLS * pooled_quantiles) / (n + PRIOR_CELLS))
        scores = _normal_scores(mine) if n else np.zeros((0, n_dims))
        choleskys.append(np.linalg.cholesky(_correlation(scores.T @ scores + n_dims * pooled_correlation)))
    arrays = {"mean": mean, "quantiles": mean[:, None] + np.stack(quantiles), "cholesky": np.stack(choleskys)}
    return {name: torch.from_numpy(value).float() for name, value in arrays.items()}


def respread(prior: Prior, factor: np.ndarray) -> None:
    """Multiply the distances from the mean of the type in every dimension except the last (library size). factor: (n_dims - 1,)."""
    mean = prior["mean"][:, None, :-1]
    prior["quantiles"][:, :, :-1] = mean + torch.from_numpy(factor).float() * (prior["quantiles"][:, :, :-1] - mean)


def within_type_variance(x: np.ndarray, types: np.ndarray) -> np.ndarray:
    """Unbiased variance of each column about the means of the types: (n_columns,)."""
    names, idx = np.unique(types, return_inverse=True)
    mean = np.stack([x[idx == k].mean(axis=0) for k in range(len(names))])
    return ((x - mean[idx]) ** 2).sum(axis=0) / max(1, len(x) - len(names))


def _normal_scores(x: np.ndarray) -> np.ndarray:
    return norm.ppf((rankdata(x, axis=0) - 0.5) / len(x))


def _correlation(products: np.ndarray) -> np.ndarray:
    """Correlation matrix from sums of products; positive definite."""
    scale = np.sqrt(np.diag(products)) + 1e-12
    return products / np.outer(scale, scale) + 1e-6 * np.eye(len(scale))


def sample_prior(prior: Prior, cell_type_idx: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """New points for cells of the given types, (n_cells, n_dims)."""
    device = cell_type_idx.device
    cholesky, quantiles = (prior[name].to(device)[cell_type_idx] for name in ("cholesky", "quantiles"))
    epsilon = torch.randn(len(cell_type_idx), cholesky.shape[1], generator=generator, device=device)
    scores = torch.einsum("nij,nj->ni", cholesky, epsilon)
    place = ((scores / MAX_SCORE + 1) * (N_LEVELS - 1) / 2).clamp(0, N_LEVELS - 1.001)
    below = place.long()
    low, high = (quantiles.gather(1, level[:, None])[:, 0] for level in (below, below + 1))
    return torch.lerp(low, high, place - below)
