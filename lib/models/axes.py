"""The axes along which the cells of a type differ: where the latent variables of the GMVAE start.

Within a type a few programmes (cell cycle, interferon response, mitochondrial and ribosomal content, ...) move many genes
together. Started at random, training finds one or two of them before the decoder begins to learn its cells by heart. A
principal component analysis within the types finds them at once, and cells left out tell which of its axes are real and how
strong: with fewer cells than genes most components are noise, and even the variance along the real ones is overstated. All
that is kept is what cells say that had no part in finding the axis (cross-fitting), shrunk by how uncertain it is.
"""

from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
from scipy.linalg import eigh

from lib.data.batches import CellDataset
from lib.models.profiles import GeneMarginals

MAX_CELLS = 10_000  # looked at, drawn at random
N_GENES = 1500  # that vary most beyond chance, to find the axes by; loadings are estimated for all
N_FOLDS = 5
MAX_DEVIATION = 10.0  # standard deviations, of one gene in one cell
MAX_SCORE = 4.0  # standard deviations, of a cell on an axis
MAX_LOADING = 1.5  # log fold change of a gene per standard deviation of z
STANDARD_DEVIATIONS = np.array(
    [0, 0.003, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6]
)  # that loadings may have, over genes


@dataclass
class Axes:
    """z = log_normalized @ projection + offset[type] estimates each cell's place, with variance 1 over cells."""

    loadings: np.ndarray  # (n_genes, n_axes) change of a gene's log mean per unit of z
    projection: np.ndarray  # (n_genes, n_axes)
    offset: np.ndarray  # (n_cell_types, n_axes)
    variance: np.ndarray  # (n_axes,) posterior variance of z given a cell


def within_type_axes(dataset: CellDataset, marginals: GeneMarginals, max_axes: int, seed: int) -> Axes:
    """
    Parameters
    ----------
    dataset
        Train cells; those without a label are left out.
    marginals
        Of the same cells.
    max_axes
        As many axes as cells left out confirm are found, but no more than this; where they confirm none, one that moves no gene.
    """
    n_cell_types = len(marginals.profiles)
    rng = np.random.default_rng(seed)
    counts, types = _select_cells(dataset, rng)
    library_size = np.asarray(counts.sum(axis=1)).ravel()
    target = np.median(dataset.library_size)
    logs = counts.copy()
    logs.data = np.log1p(logs.data * np.repeat(target / library_size, np.diff(counts.indptr)))
    genes = np.sort(np.argsort(-_excess_variance(marginals, target, types))[:N_GENES])
    logs = logs[:, genes].toarray()
    mean = np.stack(
        [logs[types == k].mean(axis=0) if (types == k).any() else logs.mean(axis=0) for k in range(n_cell_types)]
    )
    logs -= mean[types]
    scale = logs.std(axis=0) + 1e-6
    deviations = np.clip(logs / scale, -MAX_DEVIATION, MAX_DEVIATION)
    scores = _cross_fitted_scores(deviations, max_axes, rng)
    if scores.shape[1] == 0:
        nothing = np.zeros((dataset.n_genes, 1))
        return Axes(nothing, nothing, np.zeros((n_cell_types, 1)), np.ones(1))

    loadings = _loadings(counts, types, library_size, marginals, scores)
    n_cells, n_axes = scores.shape
    standard_error = np.broadcast_to(np.sqrt((scores**2).mean(axis=0) / n_cells), (len(genes), n_axes))
    seen = _shrunken(
        deviations.T @ scores / n_cells, standard_error
    )  # loadings of the standardised logs, each with noise of variance 1
    variance = np.linalg.inv(seen.T @ seen + np.eye(n_axes))
    projection = np.zeros((dataset.n_genes, n_axes))
    projection[genes] = seen @ variance / scale[:, None]
    return Axes(loadings, projection, -(mean @ projection[genes]), np.diag(variance))


def _select_cells(dataset: CellDataset, rng: np.random.Generator) -> tuple[sp.csr_matrix, np.ndarray]:
    labelled = np.flatnonzero(dataset.cell_type_idx >= 0)
    is_drawn = np.zeros(len(dataset), dtype=bool)
    is_drawn[rng.permutation(labelled)[:MAX_CELLS]] = True
    parts, start = [], 0
    for block, types in dataset.blocks():
        parts.append(block[is_drawn[start : start + len(types)]])
        start += len(types)
    return sp.vstack(parts, format="csr").astype(np.float64), dataset.cell_type_idx[is_drawn]


def _excess_variance(marginals: GeneMarginals, target: float, types: np.ndarray) -> np.ndarray:
    """Variance of each gene's counts within types over its mean, beyond Poisson; 0 where fewer than one cell in fifty has a count."""
    share = np.bincount(types, minlength=len(marginals.profiles)) / len(types)
    mean, square = target * (share @ marginals.profiles), target**2 * (share @ marginals.profiles**2)
    return np.where(mean > 0.02, square / mean / np.exp(marginals.log_theta), 0)


def _cross_fitted_scores(deviations: np.ndarray, max_axes: int, rng: np.random.Generator) -> np.ndarray:
    """Place of each cell on the axes that the other cells define: cells x axes; the part that is not noise has variance 1.

    An axis is kept if cells left out vary along it clearly more than along axes that stand for noise.
    """
    n_cells, n_genes = deviations.shape
    max_axes = min(max_axes, n_genes // 2)
    fold = rng.permutation(n_cells) % N_FOLDS
    squares = [deviations[fold == f].T @ deviations[fold == f] for f in range(N_FOLDS)]
    axes = [_leading(sum(squares) - square, 2 * max_axes) for square in squares]
    variance = np.stack([((deviations[fold == f] @ axes[f]) ** 2).mean(axis=0) for f in range(N_FOLDS)])
    noise = variance[:, max_axes:].mean()
    mean, error = variance.mean(axis=0)[:max_axes], variance.std(axis=0)[:max_axes] / np.sqrt(N_FOLDS)
    n_axes = int(np.argmin(np.append(mean - 2 * error > 1.1 * noise, False)))

    scores = np.empty((n_cells, n_axes))
    for f in range(N_FOLDS):  # the axes of each fold, turned to lie as those of the first do
        left, _, right = np.linalg.svd(axes[f][:, :n_axes].T @ axes[0][:, :n_axes])
        scores[fold == f] = deviations[fold == f] @ (axes[f][:, :n_axes] @ (left @ right))
    signal = np.maximum((scores**2).mean(axis=0) - noise, 0.1 * noise)
    limit = MAX_SCORE * scores.std(axis=0)
    return np.clip(scores, -limit, limit) / np.sqrt(signal)


def _leading(covariance: np.ndarray, n_axes: int) -> np.ndarray:
    n = len(covariance)
    return eigh(covariance, subset_by_index=[n - n_axes, n - 1])[1][:, ::-1]


def _loadings(
    counts: sp.csr_matrix, types: np.ndarray, library_size: np.ndarray, marginals: GeneMarginals, scores: np.ndarray
) -> np.ndarray:
    """Slope of each gene's log mean on the scores, shrunk: genes x axes.

    E[x s] = mu x slope, where s has mean 0 and its part that is not noise variance 1. The slope's error is the larger of what
    the model expects and what the cells show (the sandwich): a rare gene counted once, in a cell far out, has an error as
    large as its slope.
    """
    profiles, theta = marginals.profiles, np.exp(marginals.log_theta)
    n_cell_types = len(profiles)
    of_type = [types == k for k in range(n_cell_types)]
    total = sum(library_size[cells].sum() * profiles[k] for k, cells in enumerate(of_type))[:, None] + 1e-12
    slope = np.array(counts.T @ scores)
    expected, observed = 0.0, np.array(counts.power(2).T @ scores**2)
    for k, cells in enumerate(of_type):
        mu, s, l = profiles[k][:, None], scores[cells], library_size[cells, None]
        slope -= mu * (s * l).sum(axis=0)
        squares = mu**2 * (s**2 * l**2).sum(axis=0)
        expected = expected + mu * (s**2 * l).sum(axis=0) + squares / theta[:, None]
        observed += squares - 2 * mu * (counts[cells].T @ (s**2 * l))
    slope, error = slope / total, np.sqrt(np.maximum(expected, observed)) / total
    shrunk = np.empty_like(slope)
    for genes in np.array_split(
        np.argsort(total[:, 0], kind="stable"), min(20, max(1, len(total) // 100))
    ):  # of like expression
        shrunk[genes] = _shrunken(slope[genes], error[genes])
    return np.clip(shrunk, -MAX_LOADING, MAX_LOADING)


def _shrunken(estimate: np.ndarray, standard_error: np.ndarray) -> np.ndarray:
    """Posterior means of values whose prior, a mixture of normals about 0, is learned from all of a column by EM (Stephens 2017, "False discovery rates: a new deal")."""
    shrunk = np.empty_like(estimate)
    for j in range(estimate.shape[1]):
        variance = standard_error[:, j, None] ** 2 + 1e-12 + STANDARD_DEVIATIONS**2
        log_density = -0.5 * (np.log(variance) + estimate[:, j, None] ** 2 / variance)
        density = np.exp(log_density - log_density.max(axis=1, keepdims=True))
        weights = np.full(len(STANDARD_DEVIATIONS), 1 / len(STANDARD_DEVIATIONS))
        for _ in range(100):
            posterior = weights * density
            posterior /= posterior.sum(axis=1, keepdims=True)
            weights = posterior.mean(axis=0)
        shrunk[:, j] = (posterior * STANDARD_DEVIATIONS**2 / variance).sum(axis=1) * estimate[:, j]
    return shrunk
