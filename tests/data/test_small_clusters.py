"""The noise filter: small clusters are dropped, and that is told."""

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp
from helpers import simulated_dataset

from lib.data.noise import in_large_clusters


@pytest.fixture(scope="module")
def cells():
    """300 cells of three types, and eight of a fourth kind at known places."""
    adata = simulated_dataset(n_cells=300)
    odd = np.zeros((8, 60), np.float32)
    odd[:, 50:] = np.random.default_rng(0).poisson(60, (8, 10))
    counts = sp.vstack([adata.X, sp.csr_matrix(odd)], format="csr")
    order = np.random.default_rng(1).permutation(308)
    return ad.AnnData(counts[order]), order >= 300


def test_the_odd_cells_go_and_no_other(cells, capsys):
    adata, is_odd = cells
    kept = in_large_clusters(adata, 15, 2000, 20, 6, 0.3, seed=0)
    np.testing.assert_array_equal(kept, ~is_odd)
    assert "noise filter: 8 of 308 cells dropped, in 1 of " in capsys.readouterr().out
    assert in_large_clusters(adata, 1, 2000, 20, 6, 0.3, seed=0).all()


def test_a_filter_that_leaves_nothing_is_refused(cells):
    with pytest.raises(ValueError, match=r"fewer than 500 cells \(the largest: \d+\); lower NOISE_CLUSTER_CELLS"):
        in_large_clusters(cells[0], 500, 2000, 20, 6, 0.3, seed=0)
    with pytest.raises(ValueError, match="5 cells are too few"):
        in_large_clusters(cells[0][:5].copy(), 2, 2000, 20, 6, 0.3, seed=0)
