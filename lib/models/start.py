"""Where the training of the GMVAE starts: the profiles and library sizes of the types, and the axes along which cells of one type differ.

Within a type, a few gene programmes (cell cycle, interferon response, mitochondrial and ribosomal content, ...) change many
genes together. From a random start, training finds one or two of them before the decoder begins to overfit the train cells.
A principal component analysis within the types finds them at once. With fewer cells than genes, however, most components are
sampling error, and even the variance along the real ones is overestimated. Axes are therefore cross-fitted: only cells that
were not used to find an axis decide whether it is real and how strong it is, and loadings are shrunk by their standard error.
"""

from typing import NamedTuple

import numpy as np
import scipy.sparse as sp
import torch
from scipy.linalg import eigh

from lib.data.batches import CellDataset
from lib.models.gmvae import GMVAE
from lib.models.profiles import GeneMarginals, mixture_posterior, type_means

MAX_CELLS = 10_000  # random cells used at most
N_GENES = 1500  # genes of largest overdispersion, used to find the axes; loadings are estimated for all genes
N_FOLDS = 5
MAX_DEVIATION = 10.0  # standard deviations, of one gene in one cell
MAX_SCORE = 4.0  # standard deviations, of a cell on an axis
MAX_LOADING = 1.5  # log fold change of a gene per standard deviation of z
# standard deviations of the loadings over genes: the grid of the prior
STANDARD_DEVIATIONS = np.array([0, 0.003, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6])


class Axes(NamedTuple):
    """Linear estimate of z: z = log_normalized @ projection + offset[type], with variance 1 over cells."""

    loadings: np.ndarray  # (n_genes, n_axes) change of a gene's log mean per unit of z
    projection: np.ndarray  # (n_genes, n_axes)
    offset: np.ndarray  # (n_cell_types, n_axes)
    variance: np.ndarray  # (n_axes,) posterior variance of z given a cell


def within_type_axes(dataset: CellDataset, marginals: GeneMarginals, max_axes: int, seed: int) -> Axes:
    """Find the axes within the types that held-out cells confirm: at most `max_axes`; where there are none, one whose loadings are 0.

    dataset: train cells, of which at most `MAX_CELLS` random labelled ones are used; marginals: of the same cells.
    """
    n_cell_types = len(marginals.profiles)
    rng = np.random.default_rng(seed)
    cells = dataset.subset(np.sort(rng.permutation(np.flatnonzero(dataset.cell_type_idx >= 0))[:MAX_CELLS]))
    counts = sp.vstack([block for block, _ in cells.blocks()], format="csr", dtype=np.float64)
    types = cells.cell_type_idx
    library_size = np.asarray(counts.sum(axis=1)).ravel()
    target = np.median(dataset.library_size)
    logs = counts.copy()
    logs.data = np.log1p(logs.data * np.repeat(target / library_size, np.diff(counts.indptr)))
    # variance within types beyond Poisson, over the mean, of each gene's counts; 0 for genes with a mean of at most 0.02
    share = np.bincount(types, minlength=n_cell_types) / len(types)
    mu, square = target * (share @ marginals.profiles), target**2 * (share @ marginals.profiles**2)
    excess = np.where(mu > 0.02, square / mu / np.exp(marginals.log_theta), 0)
    genes = np.sort(np.argsort(-excess)[:N_GENES])
    logs = logs[:, genes].toarray()
    mean = type_means(logs, types, n_cell_types)
    logs -= mean[types]
    scale = logs.std(axis=0) + 1e-6
    deviations = np.clip(logs / scale, -MAX_DEVIATION, MAX_DEVIATION)
    scores = _cross_fitted_scores(deviations, max_axes, rng)
    if scores.shape[1] == 0:
        nothing = np.zeros((dataset.n_genes, 1))
        return Axes(nothing, nothing, np.zeros((n_cell_types, 1)), np.ones(1))

    loadings = _loadings(counts, types, marginals, scores)
    n_cells, n_axes = scores.shape
    # z given a cell: Bayesian linear regression of the standardised logs (residual variance 1) on standard normal z
    standard_error = np.broadcast_to(np.sqrt((scores**2).mean(axis=0) / n_cells), (len(genes), n_axes))
    log_loadings = _shrunken(deviations.T @ scores / n_cells, standard_error)
    variance = np.linalg.inv(log_loadings.T @ log_loadings + np.eye(n_axes))
    projection = np.zeros((dataset.n_genes, n_axes))
    projection[genes] = log_loadings @ variance / scale[:, None]
    return Axes(loadings, projection, -(mean @ projection[genes]), np.diag(variance))


def _cross_fitted_scores(deviations: np.ndarray, max_axes: int, rng: np.random.Generator) -> np.ndarray:
    """Score of each cell on the axes found in the other folds: cells x axes, scaled so that the signal has variance 1. An axis is kept
    if the held-out variance along it clearly exceeds the mean held-out variance of the later components, which hold no signal.
    """
    n_cells, n_genes = deviations.shape
    max_axes = min(max_axes, n_genes // 2)
    fold = rng.permutation(n_cells) % N_FOLDS
    products = [deviations[fold == f].T @ deviations[fold == f] for f in range(N_FOLDS)]
    last = [n_genes - 2 * max_axes, n_genes - 1]  # eigh returns the largest eigenvalues last
    axes = [eigh(sum(products) - held_out, subset_by_index=last)[1][:, ::-1] for held_out in products]
    variance = np.stack([((deviations[fold == f] @ axes[f]) ** 2).mean(axis=0) for f in range(N_FOLDS)])
    residual_variance = variance[:, max_axes:].mean()
    mean, error = variance.mean(axis=0)[:max_axes], variance.std(axis=0)[:max_axes] / np.sqrt(N_FOLDS)
    n_axes = int(np.argmin(np.append(mean - 2 * error > 1.1 * residual_variance, False)))

    scores = np.empty((n_cells, n_axes))
    for f in range(N_FOLDS):  # rotate the axes of each fold onto those of the first (orthogonal Procrustes)
        left, _, right = np.linalg.svd(axes[f][:, :n_axes].T @ axes[0][:, :n_axes])
        scores[fold == f] = deviations[fold == f] @ (axes[f][:, :n_axes] @ (left @ right))
    signal = np.maximum((scores**2).mean(axis=0) - residual_variance, 0.1 * residual_variance)
    limit = MAX_SCORE * scores.std(axis=0)
    return np.clip(scores, -limit, limit) / np.sqrt(signal)


def _loadings(counts: sp.csr_matrix, types: np.ndarray, marginals: GeneMarginals, scores: np.ndarray) -> np.ndarray:
    """Slope of each gene's log mean on the scores, shrunk: genes x axes. E[x s] = mu x slope, for scores s whose signal has variance 1.

    The standard error of the slope is the larger of the one expected from the model and the one observed in the cells (sandwich
    estimator): a rare gene counted once, in a cell with an extreme score, has an error as large as its slope.
    """
    profiles, theta = marginals.profiles, np.exp(marginals.log_theta)
    library_size = np.asarray(counts.sum(axis=1)).ravel()
    members = [types == k for k in range(len(profiles))]
    total = sum(library_size[cells].sum() * profiles[k] for k, cells in enumerate(members))[:, None] + 1e-12
    slope = np.array(counts.T @ scores)
    expected, observed = 0.0, np.array(counts.power(2).T @ scores**2)
    for k, cells in enumerate(members):
        mu, s, library = profiles[k][:, None], scores[cells], library_size[cells, None]
        slope -= mu * (s * library).sum(axis=0)
        squares = mu**2 * (s**2 * library**2).sum(axis=0)
        expected = expected + mu * (s**2 * library).sum(axis=0) + squares / theta[:, None]
        observed += squares - 2 * mu * (counts[cells].T @ (s**2 * library))
    slope, error = slope / total, np.sqrt(np.maximum(expected, observed)) / total
    shrunk = np.empty_like(slope)
    # genes of similar expression share a prior
    by_expression = np.array_split(np.argsort(total[:, 0], kind="stable"), min(20, max(1, len(total) // 100)))
    for genes in by_expression:
        shrunk[genes] = _shrunken(slope[genes], error[genes])
    return np.clip(shrunk, -MAX_LOADING, MAX_LOADING)


def _shrunken(estimate: np.ndarray, standard_error: np.ndarray) -> np.ndarray:
    """Posterior means by adaptive shrinkage (Stephens 2017, "False discovery rates: a new deal"); both arrays: genes x axes. The prior of
    each column is a mixture of normals with mean 0 and the standard deviations `STANDARD_DEVIATIONS`.
    """
    shrunk = np.empty_like(estimate)
    for j in range(estimate.shape[1]):
        variance = standard_error[:, j, None] ** 2 + 1e-12 + STANDARD_DEVIATIONS**2
        log_density = -0.5 * (np.log(variance) + estimate[:, j, None] ** 2 / variance)
        posterior = mixture_posterior(np.exp(log_density - log_density.max(axis=1, keepdims=True)))
        shrunk[:, j] = (posterior * STANDARD_DEVIATIONS**2 / variance).sum(axis=1) * estimate[:, j]
    return shrunk


@torch.no_grad()
def initialise(model: GMVAE, dataset: CellDataset, marginals: GeneMarginals, axes: Axes) -> None:
    """Set the parameters that can be estimated without gradients: q(z|x,y) and p(x|z,y,l) on the axes, p(z|y) standard normal."""
    types, library_size = dataset.cell_type_idx, dataset.library_size
    n_cells = np.bincount(types[types >= 0], minlength=model.n_cell_types) + 1
    frequency = (n_cells / n_cells.sum()).astype(np.float32)
    start = {
        "library_median": np.median(library_size), "n_train_cells": len(library_size), "type_frequency": frequency,
        "log_profiles": np.log(marginals.profiles), "log_theta": marginals.log_theta,
        "log_theta_mean": frequency.astype(np.float64) @ marginals.profiles @ marginals.log_theta,
        "p_x_zyl_log_mean.weight": axes.loadings, "p_x_zyl_log_mean.bias": 0.0,
        "p_l_zy_mean.weight": 0.0, "p_l_zy_mean.bias": 0.0, "p_l_zy_log_scale": np.log(np.log(library_size).std() + 1e-2),
        "q_z_xy_axes.weight": axes.projection, "q_z_xy_mean.bias": 0.0,
        "q_z_xy_mean.weight": np.column_stack([axes.offset.T, np.zeros(model.n_latent)]),  # of the types and of log l
        "q_z_xy_log_var.weight": 0.0, "q_z_xy_log_var.bias": np.log(axes.variance),
    }  # fmt: skip
    if model.p_x_zyl_zi_logits is not None:
        start |= {"p_x_zyl_zi_logits.weight": 0.0, "p_x_zyl_zi_logits.bias": -4.0}
    state = model.state_dict()
    for name, value in start.items():
        state[name].copy_(torch.as_tensor(value))
