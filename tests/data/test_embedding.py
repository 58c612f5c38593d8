"""Embeddings of few and of many cells (above 8,192, scanpy finds neighbours with another library), and the small-cluster filter."""

import sys

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp
from helpers import simulated_dataset

from lib.data import embedding
from lib.data.embedding import in_large_clusters, labels_of_neighbours, principal_components


@pytest.mark.parametrize("n_cells", [60, pytest.param(8300, marks=pytest.mark.slow)])  # neighbours: exact, approximate
def test_cells_of_one_type_lie_together(n_cells):
    adata = simulated_dataset(n_cells=n_cells, n_genes=80)
    pcs = principal_components(adata, n_top_genes=60, n_pcs=10)
    graph = (embedding.embed if n_cells < 100 else embedding.neighbour_graph)(pcs, n_neighbors=10, seed=0)
    assert n_cells > 100 or np.isfinite(graph.obsm["X_umap"]).all()
    rows, columns = graph.obsp["connectivities"].nonzero()
    types = adata.obs["cell_type"].to_numpy()
    assert (types[rows] == types[columns]).mean() > 0.8
    assert adata.X.max() == np.rint(adata.X.max())  # the input stays counts


def test_too_few_cells_are_refused():
    with pytest.raises(ValueError, match="9 cells are too few for an embedding"):
        principal_components(simulated_dataset(n_cells=9), 60, 10)


def test_labels_spread_to_the_nearest_cells():
    pcs = np.array([[0.0], [0.1], [0.2], [5.0], [5.1], [5.2], [0.05], [5.05]])
    labels = labels_of_neighbours(pcs, np.arange(6), np.array(list("aaabbb")), 3)
    assert "".join(labels) == "aaabbbab"


def test_without_pymde_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pymde", None)
    with pytest.raises(
        ImportError, match="MDE needs pymde and a torchvision .* pip install pymde, or set MDE to False"
    ):
        embedding.load_pymde()


def test_the_small_cluster_filter_drops_odd_cells_and_no_others(capsys):
    adata = simulated_dataset(n_cells=300)
    odd = np.zeros((8, 60), np.float32)
    odd[:, 50:] = np.random.default_rng(0).poisson(60, (8, 10))
    order = np.random.default_rng(1).permutation(308)
    adata = ad.AnnData(sp.vstack([adata.X, sp.csr_matrix(odd)], format="csr")[order])
    settings = {"n_top_genes": 2000, "n_pcs": 20, "n_neighbors": 6, "resolution": 0.3, "seed": 0}
    np.testing.assert_array_equal(in_large_clusters(adata, 15, **settings), order < 300)
    assert "small-cluster filter: 8 of 308 cells dropped, in 1 of " in capsys.readouterr().out
    assert in_large_clusters(adata, 1, **settings).all()
    with pytest.raises(ValueError, match=r"fewer than 500 cells \(the largest: \d+\); lower MIN_CLUSTER_CELLS"):
        in_large_clusters(adata, 500, **settings)
