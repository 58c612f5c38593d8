"""Where the cells of each type lie in the latent space, fitted when the training is over.

Training pulls q(z|x,y) and p(z|y) together, but never all the way: cells whose z are drawn from the Gaussian p(z|y) lack the
shape that the type's cells have together (the aggregated posterior; Tomczak and Welling, "VAE with a VampPrior", AISTATS
2018). So new cells take z, and with it the library size, from a smoothed bootstrap of the train cells' own: a point of the
type, drawn towards the type's middle and moved at random so that mean and covariance stay (Silverman 1986, section 6.4).
How far is chosen for each type by the likelihood of points left out: 1 gives a Gaussian, 0 the train cells' own points.
The library size, the last dimension, keeps its place in that cloud but takes its values from the type's cells, quantile for
quantile (a Gaussian copula): a skewed or cut distribution stays one.
"""

import numpy as np
import torch
from scipy.special import logsumexp
from scipy.stats import norm, rankdata
from sklearn.metrics.pairwise import euclidean_distances

MAX_POINTS = 1000  # kept of each type
BANDWIDTHS = np.array([0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0])

Prior = dict[str, torch.Tensor]


def fit_prior(points: np.ndarray, cell_type_idx: np.ndarray, n_cell_types: int, rng: np.random.Generator) -> Prior:
    """
    Parameters
    ----------
    points
        Cells x dimensions: z and, last, the log library size of each train cell.
    cell_type_idx
        (n_cells,) type of each.

    Returns
    -------
    points (all types' one after the other, the library size as normal scores), quantiles (of the library size, of each type),
    first (where each type's begin, and the end), mean, cholesky (of the covariance) and bandwidth of each type. The covariance of a type with few cells leans on that of all types within themselves, which
    counts as much as there are dimensions.
    """
    n_dims = points.shape[1]
    kept_rows = np.concatenate([rng.permutation(np.flatnonzero(cell_type_idx == k))[:MAX_POINTS] for k in range(n_cell_types)])
    points, cell_type_idx = points[kept_rows].astype(np.float64), cell_type_idx[kept_rows]
    library = points[:, -1].copy()
    for k in np.unique(cell_type_idx):
        points[cell_type_idx == k, -1] = norm.ppf((rankdata(library[cell_type_idx == k]) - 0.5) / np.sum(cell_type_idx == k))
    deviations = np.concatenate([points[cell_type_idx == k] - points[cell_type_idx == k].mean(axis=0) for k in np.unique(cell_type_idx)])
    pooled = deviations.T @ deviations / len(deviations) + 1e-6 * np.eye(n_dims)
    kept, quantiles, means, choleskys, bandwidths = [], [], [], [], []
    for k in range(n_cell_types):
        rows = np.flatnonzero(cell_type_idx == k)
        mine = points[rows] if len(rows) else points.mean(axis=0)[None]
        mean = mine.mean(axis=0)
        covariance = ((mine - mean).T @ (mine - mean) + n_dims * pooled) / (len(mine) + n_dims)
        cholesky = np.linalg.cholesky(covariance)
        whitened = np.linalg.solve(cholesky, (mine - mean).T).T
        quantiles.append(np.sort(library[rows]) if len(rows) else np.median(library)[None])
        kept.append(mine), means.append(mean), choleskys.append(cholesky)
        bandwidths.append(best_bandwidth(whitened))
    arrays = {
        "points": np.concatenate(kept),
        "quantiles": np.concatenate(quantiles),
        "first": np.cumsum([0, *map(len, kept)]),
        "mean": np.stack(means),
        "cholesky": np.stack(choleskys),
        "bandwidth": np.array(bandwidths),
    }
    return {name: torch.from_numpy(value).to(torch.int64 if name == "first" else torch.float32) for name, value in arrays.items()}


def best_bandwidth(whitened: np.ndarray) -> float:
    """The bandwidth under which each point is likeliest, given the others. whitened: points x dimensions, covariance 1."""
    n, n_dims = whitened.shape
    if n < 3:
        return 1.0
    scores = []
    for h in BANDWIDTHS:
        squared = euclidean_distances(whitened, np.sqrt(1 - h**2) * whitened, squared=True)
        np.fill_diagonal(squared, np.inf)
        scores.append(np.mean(logsumexp(-0.5 * squared / h**2, axis=1)) - n_dims * np.log(h))
    return float(BANDWIDTHS[np.argmax(scores)])


def sample_prior(prior: Prior, cell_type_idx: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A new point for each cell, (n_cells, n_dims)."""
    first, device = prior["first"].to(cell_type_idx.device), cell_type_idx.device
    points, mean, cholesky = (prior[name].to(device) for name in ("points", "mean", "cholesky"))
    n_points = first.diff()[cell_type_idx]
    u = torch.rand(len(cell_type_idx), generator=generator, device=device)
    drawn = points[first[cell_type_idx] + (u * n_points).long().clamp(max=n_points - 1)]
    h = prior["bandwidth"].to(device)[cell_type_idx][:, None]
    middle = mean[cell_type_idx]
    noise = torch.randn(drawn.shape, generator=generator, device=device)
    moved = torch.einsum("nij,nj->ni", cholesky[cell_type_idx], noise)
    made = middle + (1 - h**2).sqrt() * (drawn - middle) + h * moved

    spread = cholesky[:, -1].norm(dim=1)[cell_type_idx]
    place = torch.special.ndtr((made[:, -1] - middle[:, -1]) / spread) * (n_points - 1)
    below = place.long()
    quantiles, begin = prior["quantiles"].to(device), first[cell_type_idx]
    low, high = quantiles[begin + below], quantiles[begin + torch.minimum(below + 1, n_points - 1)]
    made[:, -1] = torch.lerp(low, high, place - below)
    return made
