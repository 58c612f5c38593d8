"""Principal components fitted block by block, against an exact singular value decomposition of all cells."""

import numpy as np
import pytest
from helpers import simulated_cells

from lib.data import components
from lib.data.components import fit_components, n_components
from lib.data.counts import log_normalize, row_blocks


@pytest.fixture
def counts(monkeypatch):
    monkeypatch.setattr(components, "BLOCK_CELLS", 100)
    return simulated_cells(n_cells=430)[0]


def blocks(counts):
    return lambda: (block for _, block in row_blocks(counts, 90))


def standardised(counts) -> np.ndarray:
    values = log_normalize(counts, 1e4).toarray().astype(np.float64)
    return (values - values.mean(axis=0)) / values.std(axis=0)


def test_components_span_the_space_of_an_exact_pca(counts):
    found = fit_components(blocks(counts), 5)
    exact = np.linalg.svd(standardised(counts), full_matrices=False)[2][:3].T
    assert np.linalg.svd(found.vectors.T @ exact)[1].min() > 0.98
    np.testing.assert_allclose(found.of(counts), standardised(counts) @ found.vectors, atol=2e-3)
    np.testing.assert_allclose(found.vectors.T @ found.vectors, np.eye(5), atol=1e-5)


def test_with_full_rank_distances_between_cells_stay(counts):
    found = fit_components(blocks(counts), 60).of(counts)
    expected = standardised(counts)
    np.testing.assert_allclose(
        np.linalg.norm(found[:50] - found[50:100], axis=1),
        np.linalg.norm(expected[:50] - expected[50:100], axis=1),
        rtol=1e-3,
    )


def test_more_components_than_cells_or_genes_are_not_possible(capsys):
    assert n_components(50, 100, 200) == 50 and capsys.readouterr().out == ""
    assert n_components(2500, 300, 200) == 200
    assert "200 principal components instead of 2,500: 300 cells, 200 genes" in capsys.readouterr().out
