"""Doublet scores: those of scanpy's Scrublet where the reference holds all cells; planted doublets score highest in any case."""

import anndata as ad
import numpy as np
import pytest
import scanpy as sc
import scipy.sparse as sp
from helpers import simulated_cells
from sklearn.metrics import roc_auc_score

from lib.data.doublets import doublet_scores

N_CELLS, N_PLANTED = 400, 60


@pytest.fixture(scope="module")
def planted() -> ad.AnnData:
    """Cells of four types, and sums of two cells of different types at the end."""
    counts, types = simulated_cells(n_cells=N_CELLS, n_genes=300, n_types=4, seed=1)
    rng = np.random.default_rng(0)
    pairs = rng.integers(0, N_CELLS, (20 * N_PLANTED, 2))
    pairs = pairs[types[pairs[:, 0]] != types[pairs[:, 1]]][:N_PLANTED]
    return ad.AnnData(sp.vstack([counts, counts[pairs[:, 0]] + counts[pairs[:, 1]]], format="csr"))


def test_scores_and_threshold_are_those_of_scrublet(planted):
    theirs = planted.copy()
    sc.pp.scrublet(theirs, random_state=5, verbose=False, use_approx_neighbors=False)
    scores, threshold = doublet_scores(planted, np.arange(planted.n_obs), planted.n_obs, seed=5)
    np.testing.assert_allclose(scores, theirs.obs["doublet_score"], atol=0.02)  # a neighbour more or less, by rounding
    assert np.mean(np.isclose(scores, theirs.obs["doublet_score"])) > 0.98
    assert threshold == pytest.approx(theirs.uns["scrublet"]["threshold"], abs=0.01)
    assert np.mean((scores > threshold) == theirs.obs["predicted_doublet"]) > 0.995


@pytest.mark.parametrize("n_reference", [150, 1_000])
def test_planted_doublets_score_above_cells(planted, n_reference):
    truth = np.arange(planted.n_obs) >= N_CELLS
    scores, _ = doublet_scores(planted, np.arange(planted.n_obs), n_reference, seed=0)
    assert roc_auc_score(truth, scores) > 0.9


def test_only_the_given_cells_are_scored_and_the_seed_decides(planted):
    rows = np.arange(3, planted.n_obs, 2)
    scores, threshold = doublet_scores(planted, rows, 100, seed=0)
    alone, same = doublet_scores(planted[rows].copy(), np.arange(len(rows)), 100, seed=0)
    assert len(scores) == len(rows) and threshold == same
    np.testing.assert_allclose(scores, alone)
    assert not np.array_equal(scores, doublet_scores(planted, rows, 100, seed=1)[0])
