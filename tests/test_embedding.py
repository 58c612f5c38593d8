"""Embeddings of few and of many cells; scanpy finds neighbours in another way above 8,192 cells, with other libraries."""

import numpy as np
import pytest
from conftest import simulated_dataset

from lib.counts import read_counts, write_counts
from lib.embedding import embed, labels_of_neighbours, lazy, principal_components


@pytest.mark.parametrize("n_cells", [60, 8300])
def test_cells_of_one_type_lie_together(n_cells):
    adata = simulated_dataset(n_cells=n_cells, n_genes=80)
    embedding = embed(principal_components(adata, n_top_genes=60, n_pcs=10), n_neighbors=10, seed=0)
    assert embedding.obsm["X_umap"].shape == (n_cells, 2) and np.isfinite(embedding.obsm["X_umap"]).all()
    rows, columns = embedding.obsp["connectivities"].nonzero()
    types = adata.obs["cell_type"].to_numpy()
    assert (types[rows] == types[columns]).mean() > 0.8
    assert adata.X.max() == np.rint(adata.X.max())  # the input stays counts


def test_too_few_cells_are_refused():
    with pytest.raises(ValueError, match="9 cells are too few for an embedding"):
        principal_components(simulated_dataset(n_cells=9), 60, 10)


def test_components_of_cells_on_disk_are_those_in_memory(tmp_path):
    adata = simulated_dataset(n_cells=5000, n_genes=80)  # three blocks on disk
    adata.uns["dataset"] = "simulated"
    write_counts(adata, tmp_path / "cells.h5ad")
    rows = np.flatnonzero(np.arange(5000) % 3 > 0)
    from_disk = principal_components(lazy(read_counts(tmp_path / "cells.h5ad", "-"), rows), 60, 5)
    in_memory = principal_components(adata[rows].copy(), 60, 5)
    for a, b in zip(from_disk.T, in_memory.T):
        assert abs(np.corrcoef(a, b)[0, 1]) > 0.999  # a component's sign is free


def test_labels_spread_to_the_nearest_cells():
    pcs = np.array([[0.0], [0.1], [0.2], [5.0], [5.1], [5.2], [0.05], [5.05]])
    labels = labels_of_neighbours(pcs, np.arange(6), np.array(list("aaabbb")), 3)
    assert "".join(labels) == "aaabbbab"
