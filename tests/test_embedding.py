"""Embeddings of few and of many cells; scanpy finds neighbours in another way above 8,192 cells, with other libraries."""

import numpy as np
import pytest
from conftest import simulated_dataset

from lib.embedding import embed


@pytest.mark.parametrize("n_cells", [60, 8300])
def test_cells_of_one_type_lie_together(n_cells):
    adata = simulated_dataset(n_cells=n_cells, n_genes=80)
    embedding = embed(adata, n_top_genes=60, n_pcs=10, n_neighbors=10, seed=0)
    assert embedding.obsm["X_umap"].shape == (n_cells, 2) and np.isfinite(embedding.obsm["X_umap"]).all()
    rows, columns = embedding.obsp["connectivities"].nonzero()
    types = adata.obs["cell_type"].to_numpy()
    assert (types[rows] == types[columns]).mean() > 0.8
    assert "counts" not in embedding.layers and adata.X.max() == np.rint(adata.X.max())  # the input stays counts


def test_too_few_cells_are_refused():
    with pytest.raises(ValueError, match="9 cells are too few for an embedding"):
        embed(simulated_dataset(n_cells=9), 60, 10, 10, 0)
