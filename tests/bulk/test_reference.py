"""Reference profiles: moments by NumPy, signature genes, and the NNLS baseline."""

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch

from lib.bulk.reference import (
    Reference,
    equal_totals,
    nnls_on_markers,
    reference_profiles,
    signature_genes,
)


def test_moments_equal_numpys_and_unlabelled_cells_are_ignored():
    counts = np.random.default_rng(0).poisson(3.0, (40, 5)).astype(np.float32)
    types = np.repeat([0, 1, -1], [20, 15, 5])
    found = reference_profiles(sp.csr_matrix(counts), types, list("ABCDE"), ["x", "y"])
    for k in range(2):
        np.testing.assert_allclose(found.mean[k], counts[types == k].mean(axis=0))
        np.testing.assert_allclose(found.variance[k], counts[types == k].var(axis=0, ddof=1), rtol=1e-6)
    np.testing.assert_array_equal(found.n_cells, [20, 15])


def test_a_gene_not_observed_in_few_cells_keeps_a_positive_variance():
    counts = sp.csr_matrix(np.array([[4.0, 1.0], [4.0, 1.0], [0.0, 1.0]], dtype=np.float32))
    found = reference_profiles(counts, np.array([0, 0, 1]), ["A", "B"], ["x", "y"])
    # half the Poisson variance of the mean over types
    assert found.mean[1, 0] == 0 and found.variance[1, 0] == 0.5 * 2.0


def test_signature_genes_differ_between_types_and_are_not_technical(monkeypatch):
    monkeypatch.setattr("lib.bulk.reference.MIN_PER_TYPE", 0)
    mean = np.array([[10.0, 5.0, 10.0, 0.0, 5.0], [1.0, 5.0, 1.0, 3.0, 5.0]])
    names = ["CD3E", "ACTB", "RPL3", "CD19", "MT-CO1"]
    reference = Reference(names, ["T", "B"], mean, np.full((2, 5), 1.0), np.array([100, 100]))
    # brought to 22.5 counts a cell (times .75, 1.5): CD3E 7.5 and 1.5, ACTB 3.75 and 7.5: a fold of 2
    assert [names[g] for g in signature_genes(reference)] == ["CD3E", "CD19"]
    # z of CD3E: 9 / sqrt(8) = 3.2, below MIN_Z, but the largest
    uncertain = reference._replace(variance=np.full((2, 5), 400.0))
    assert [names[g] for g in signature_genes(uncertain)] == ["CD3E", "CD19"]
    assert [names[g] for g in signature_genes(reference, np.array([False, True, True, True, True]))] == ["CD19"]


def test_genes_of_small_fold_are_used_where_a_type_has_no_others(monkeypatch):
    rng = np.random.default_rng(0)
    mean = np.tile(rng.lognormal(1, 1, 200), (3, 1))
    mean[:, :10] = 0.05
    mean[0, :10] = 0.5  # a: ten clear markers; b and c differ by a factor of 1.5 in thirty genes
    mean[1, 100:130] *= 1.5
    reference = Reference([f"G{i}" for i in range(200)], list("abc"), mean, mean, np.full(3, 10**6))
    monkeypatch.setattr("lib.bulk.reference.MIN_PER_TYPE", 0)
    monkeypatch.setattr("lib.bulk.reference.MIN_Z", 0.0)
    monkeypatch.setattr("lib.bulk.reference.MAX_GENES", 10)
    assert set(signature_genes(reference)) == set(range(10))
    monkeypatch.setattr("lib.bulk.reference.MAX_GENES", 3000)
    monkeypatch.setattr("lib.bulk.reference.MIN_PER_TYPE", 20)
    monkeypatch.setattr("lib.bulk.reference.MIN_Z", 5.0)
    assert len(set(signature_genes(reference)) & set(range(100, 130))) >= 10  # besides the ten, in which b is low


def test_large_cells_do_not_make_all_genes_signature_genes(monkeypatch):
    monkeypatch.setattr("lib.bulk.reference.MIN_PER_TYPE", 0)
    profile = np.random.default_rng(0).lognormal(1, 1, 100)
    mean = np.stack([profile, 5 * profile])  # the second type's cells are five times as large
    mean[1, 7] *= 20
    reference = Reference([f"G{i}" for i in range(100)], ["small", "large"], mean, mean, np.full(2, 1000))
    assert 7 in signature_genes(reference)
    assert len(signature_genes(reference)) < 5
    np.testing.assert_allclose(equal_totals(reference).mean.sum(axis=1), mean.sum() / 2)


def test_ribosomal_kinases_are_not_taken_for_ribosomal_proteins():
    mean = np.array([[9.0, 9.0, 1.0], [1.0, 1.0, 9.0]])
    reference = Reference(["RPS6KA1", "Rps6", "X"], ["a", "b"], mean, np.ones((2, 3)), np.array([50, 50]))
    assert list(signature_genes(reference)) == [0, 2]


def test_a_checkpoint_restores_the_reference(tmp_path):
    reference = Reference(
        ["A", "B"], ["x", "y"], np.array([[1.5, 0.0], [2.0, 3.25]]), np.ones((2, 2)), np.array([3, 4])
    )
    torch.save({"reference": reference.to_checkpoint()}, tmp_path / "c.pt")
    back = Reference.from_checkpoint(torch.load(tmp_path / "c.pt", weights_only=True)["reference"])
    assert back.gene_names == reference.gene_names and back.cell_types == reference.cell_types
    for name in ("mean", "variance", "n_cells"):
        np.testing.assert_allclose(getattr(back, name), getattr(reference, name))


def test_per_length_divides_by_gene_length_and_keeps_the_scale():
    reference = Reference(
        ["A", "B", "C"], ["x", "y"], np.array([[4.0, 2.0, 1.0], [2.0, 2.0, 1.0]]), np.ones((2, 3)), np.array([3, 4])
    )
    assert reference.per_length(None) is reference
    found = reference.per_length(pd.Series({"A": 2000.0, "B": 1000.0}))
    assert found.gene_names == ["A", "B"]
    np.testing.assert_allclose(found.mean / found.mean[0, 0], [[1, 1], [0.5, 1]])
    np.testing.assert_allclose(found.mean.sum(), 10)


def test_the_baseline_finds_exact_mixtures():
    rng = np.random.default_rng(0)
    mean = rng.lognormal(0, 1.5, (3, 200))
    names = [f"G{i}" for i in range(200)]
    reference = Reference(names, ["a", "b", "c"], mean, mean, np.array([50, 50, 50]))
    true = rng.dirichlet(np.ones(3), 5)
    bulk = pd.DataFrame(true @ mean * 7, columns=names)
    np.testing.assert_allclose(nnls_on_markers(bulk, reference), true, atol=1e-6)
