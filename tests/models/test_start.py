"""Where training starts: the axes within the types, in simulated cells, and the parameters that are set from them."""

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from helpers import CPU

from lib.data.batches import CellDataset
from lib.models.gmvae import GMVAE
from lib.models.profiles import gene_marginals
from lib.models.start import initialise, within_type_axes

N_CELLS, N_GENES = 1500, 400


def cells(n_programmes: int, seed: int = 0):
    """Two types that differ in 40 genes, and programmes of 30 genes each that vary within both: counts, types, true z and loadings."""
    rng = np.random.default_rng(seed)
    types = rng.integers(0, 2, N_CELLS)
    z = rng.normal(size=(N_CELLS, n_programmes))
    loadings = np.zeros((N_GENES, n_programmes))
    for j in range(n_programmes):
        loadings[rng.choice(N_GENES, 30, replace=False), j] = rng.choice([-0.7, 0.7], 30)
    log_mean = rng.normal(0, 1, N_GENES) + types[:, None] * np.where(np.arange(N_GENES) < 40, 2.0, 0.0) + z @ loadings.T
    mu = 800 * np.exp(log_mean) / np.exp(log_mean).sum(axis=1, keepdims=True)
    return sp.csr_matrix(rng.poisson(mu).astype(np.float32)), types, z, loadings


def axes_of(counts, types, max_axes: int = 8):
    dataset = CellDataset(counts, types, CPU)
    return within_type_axes(dataset, gene_marginals(dataset, types.max() + 1), max_axes, 0)


def scores(axes, counts, types):
    library_size = np.asarray(counts.sum(axis=1)).ravel()
    logs = np.log1p(counts.toarray() / library_size[:, None] * np.median(library_size))
    return logs @ axes.projection + axes.offset[types]


def test_axes_are_the_programmes_and_not_the_types():
    counts, types, z, _ = cells(3)
    unlabelled = sp.csr_matrix(np.full((50, N_GENES), 9, dtype=np.float32))  # are left out
    axes = axes_of(sp.vstack([counts, unlabelled], format="csr"), np.append(types, np.full(50, -1)))
    assert 3 <= axes.loadings.shape[1] <= 4
    estimate = scores(axes, counts, types)
    true_basis, basis = (np.linalg.qr(x - x.mean(axis=0))[0] for x in (z, estimate))
    assert np.linalg.svd(true_basis.T @ basis)[1].min() > 0.9  # canonical correlations
    assert np.abs(np.corrcoef(estimate.T, types)[-1, :-1]).max() < 0.1


def test_loadings_and_scores_have_the_scale_of_z():
    """z is found up to a rotation, which does not change the products of loadings."""
    counts, types, _, loadings = cells(3)
    axes = axes_of(counts, types)
    true, ours = loadings @ loadings.T, axes.loadings @ axes.loadings.T
    assert np.corrcoef(true.ravel(), ours.ravel())[0, 1] > 0.9
    assert np.sum(ours * true) / np.sum(true * true) == pytest.approx(1, abs=0.25)
    estimate = scores(axes, counts, types)
    np.testing.assert_allclose((estimate.var(axis=0) + axes.variance)[:3], 1, atol=0.25)


def test_cells_without_programmes_have_one_axis_whose_loadings_are_about_0():
    counts, types, *_ = cells(0)
    axes = axes_of(counts, types)
    assert axes.loadings.shape == (N_GENES, 1) and np.sqrt((axes.loadings**2).mean()) < 0.05


def test_the_model_starts_at_the_profiles_and_scores():
    counts, types, *_ = cells(2)
    dataset = CellDataset(counts, types, CPU)
    marginals, axes = gene_marginals(dataset, 2), axes_of(counts, types)
    model = GMVAE(N_GENES, 2, axes.loadings.shape[1])
    initialise(model, dataset, marginals, axes)
    batch = dataset.in_memory_cells.batch(np.arange(20))
    with torch.no_grad():
        mean, _ = model.q_z(model.encode_genes(batch), batch)
        at_zero = model.p_x(torch.zeros(20, model.n_latent), batch.library_size, batch.cell_type_idx)
    np.testing.assert_allclose(mean, scores(axes, counts, types)[:20], atol=2e-3)
    np.testing.assert_allclose(at_zero.logits.softmax(dim=1), marginals.profiles[types[:20]], rtol=1e-4)
