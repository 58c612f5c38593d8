"""Mixtures equal the product of mixing matrix and counts; TPM by hand."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from helpers import STAGES, Workplace, simulated_dataset, split_only

from lib.bulk import proportions, pseudobulk
from lib.bulk.pseudobulk import (
    largest_remainder,
    sample_cells,
    sample_proportions,
    simulate,
    tpm,
    weighted,
)
from lib.checkpoints import load_checkpoint
from lib.data.counts import write_counts
from lib.evaluation.metrics import mae


def test_largest_remainder_keeps_totals_exactly():
    np.testing.assert_array_equal(largest_remainder(np.array([[0.5, 0.3, 0.2]]), 7), [[4, 2, 1]])  # 3.5, 2.1, 1.4
    proportions = np.random.default_rng(0).dirichlet(np.ones(9), 500)
    totals = np.random.default_rng(1).integers(0, 2000, 500)
    counts = largest_remainder(proportions, totals)
    np.testing.assert_array_equal(counts.sum(axis=1), totals)
    assert np.abs(counts - proportions * totals[:, None]).max() < 1
    np.testing.assert_array_equal(largest_remainder(np.array([[0.1 * 3, 0.7]]), 10), [[3, 7]])  # 0.1 * 3 is not 0.3


def test_sampled_proportions_have_absent_and_rare_types_and_vary():
    composition = np.array([0.6, 0.3, 0.1])
    sampled = sample_proportions(
        4000, composition, {"sparse": 0.25, "rare": 0.25, "near": 0.25}, np.random.default_rng(0)
    )
    np.testing.assert_allclose(sampled.sum(axis=1), 1)
    assert 0.08 < (sampled == 0).mean() < 0.17  # a quarter of the samples lacks half of its types, at most two of three
    assert ((sampled > 0) & (sampled < 0.03)).mean() > 0.05
    near = sample_proportions(4000, composition, {"sparse": 0, "rare": 0, "near": 1}, np.random.default_rng(0))
    np.testing.assert_allclose(near.mean(axis=0), composition, atol=0.01)


@pytest.mark.parametrize("min_distinct", [None, 3])
def test_sampled_cells_are_of_the_requested_types(min_distinct):
    rng = np.random.default_rng(0)
    types = np.repeat([0, 1, 2, -1], [50, 30, 2, 20])
    cells_per_type = np.array([[10, 0, 5], [1, 200, 0]])
    mixing = sample_cells(cells_per_type, types, rng, min_distinct)
    for k in range(3):
        np.testing.assert_array_equal(mixing.toarray()[:, types == k].sum(axis=1), cells_per_type[:, k])
    assert mixing[:, types == -1].nnz == 0


def test_min_distinct_samples_from_a_subset_of_the_cells():
    types = np.zeros(1000, dtype=int)
    cells_per_type = np.full((200, 1), 500)
    subset = np.diff(sample_cells(cells_per_type, types, np.random.default_rng(0), 3).indptr)
    everyone = np.diff(sample_cells(cells_per_type, types, np.random.default_rng(0)).indptr)
    assert 1 < subset.min() < 10 and subset.max() > 200
    assert everyone.min() > 350


def test_a_mixture_of_a_type_without_cells_is_refused():
    with pytest.raises(ValueError, match="cell type number 1 has no cells"):
        sample_cells(np.array([[1, 1]]), np.array([0, 0]), np.random.default_rng(0))


def test_simulated_mixtures_are_sums_of_their_cells_for_any_number_of_threads(monkeypatch):
    counts = sp.random(40, 30, 0.3, format="csr", dtype=np.float32, random_state=0)
    counts.data = np.ceil(counts.data * 10)
    types = np.repeat([0, 1], 20)
    cells_per_type = np.tile([[5, 7]], (600, 1))
    monkeypatch.setattr(pseudobulk.os, "cpu_count", lambda: 1)
    one = np.concatenate(list(simulate(cells_per_type, types, counts, seed=3)))
    monkeypatch.setattr(pseudobulk.os, "cpu_count", lambda: 4)
    four = np.concatenate(list(simulate(cells_per_type, types, counts, seed=3)))
    np.testing.assert_array_equal(one, four)
    assert one.shape == (600, 30) and not np.array_equal(one[:250], one[250:500])
    stream = np.random.SeedSequence(3).spawn(3)[0]
    by_hand = sample_cells(cells_per_type[:250], types, np.random.default_rng(stream)).toarray() @ counts.toarray()
    np.testing.assert_array_equal(one[:250], by_hand)


def test_tpm_by_hand():
    counts, lengths = np.array([[10, 20, 30], [0, 5, 5]]), np.array([1000, 2000, 500])
    # rates 0.01, 0.01, 0.06 and 0, 0.0025, 0.01
    np.testing.assert_allclose(tpm(counts, lengths), [[125_000, 125_000, 750_000], [0, 200_000, 800_000]])
    np.testing.assert_allclose(tpm(counts)[0], np.array([10, 20, 30]) / 60 * 1e6)
    with pytest.raises(ValueError, match="1 of 2 bulk samples have no counts"):
        tpm(np.array([[1, 1], [0, 0]]))


def test_impossible_shares_are_refused_before_any_work(tmp_path):
    with pytest.raises(ValueError, match=r"SPARSE_SHARE, RARE_SHARE, NEAR_SHARE = 0.6, 0.5, 0.25; expected shares"):
        Workplace(tmp_path).main(STAGES[2], SPARSE_SHARE=0.6, RARE_SHARE=0.5)


def test_cells_are_weighted_by_their_type():
    mixing = sp.csr_matrix([[1.0, 2.0, 0.0], [0.0, 1.0, 3.0]])
    found = weighted(mixing, np.array([1, 0, -1]), pd.Series([2.0, 0.5]))
    np.testing.assert_allclose(found.toarray(), [[0.5, 4.0, 0.0], [0.0, 2.0, 3.0]])
    assert weighted(mixing, np.array([1, 0, -1]), None) is mixing


def test_mixtures_made_later_are_those_that_were_written(tmp_path):
    """All genes or some, train cells in memory or on disk; the counts of a mixture are sums of cells of its types."""
    place = Workplace(tmp_path)
    place.data.mkdir()
    for name in ("train", "test"):
        adata = simulated_dataset()
        adata.uns |= {"dataset": "simulated", "split_id": "s"}
        write_counts(adata, place.data / f"{name}.h5ad")
    options = {"N_TRAIN_SAMPLES": 1200, "CELLS_PER_SAMPLE": 30, "N_TEST_DIRICHLET": 1}
    place.main(STAGES[2], WRITE_TRAIN_COUNTS=True, **options)
    written = ad.read_h5ad(place.data / "pseudobulk_train.h5ad")
    place.main(STAGES[2], **options)
    mixtures, train = pseudobulk.read_train_mixtures(place.data)
    assert "X" not in mixtures.file and mixtures.shape == written.shape == (1200, train.n_vars)
    for memory_gb, genes in ((1.0, None), (0.0, None), (0.0, np.array([5, 2, 40]))):
        rows, counts = zip(*pseudobulk.train_mixtures(mixtures, train, genes, memory_gb))
        assert [(part.start, part.stop) for part in rows] == [(0, 500), (500, 1000), (1000, 1020), (1020, 1200)]
        np.testing.assert_array_equal(np.concatenate(counts), written.X if genes is None else written.X[:, genes])
    cells = ad.read_h5ad(place.data / "train.h5ad")
    masks = [(cells.obs["cell_type"] == name).to_numpy() for name in mixtures.uns["cell_types"]]
    mean = np.stack([np.asarray(cells.X[mask].mean(axis=0)).ravel() for mask in masks])
    expected = 30 * mixtures.obsm["proportions"] @ mean
    ratio = written.X.sum(axis=0) / expected.sum(axis=0)
    assert np.median(np.abs(ratio - 1)) < 0.05


@pytest.mark.slow
def test_mixtures_with_mrna_contents_of_a_table(tmp_path):
    place = split_only(tmp_path, simulated_dataset())
    content = pd.Series({"type 0": 1.0, "type 1": 6.0, "type 2": 2.0})
    content.rename("rna_per_cell").rename_axis("cell_type").to_csv(tmp_path / "content.csv")
    place.main(
        STAGES[2],
        RNA_PER_CELL=str(tmp_path / "content.csv"),
        N_TRAIN_SAMPLES=400,
        CELLS_PER_SAMPLE=300,
        WRITE_TRAIN_COUNTS=True,
    )
    mixtures = ad.read_h5ad(place.data / "pseudobulk_train.h5ad")
    rna = np.linalg.lstsq(mixtures.obsm["proportions"], mixtures.X.sum(axis=1), rcond=None)[0]
    np.testing.assert_allclose(rna / rna.sum(), content / content.sum(), rtol=0.1)
    place.main(STAGES[4], EPOCHS=1)
    checkpoint = load_checkpoint(place.models / "sctape.pt", STAGES[4])
    table = proportions.content_of_mixtures(checkpoint)
    assert dict(table["rna_per_cell"]) == dict(content)
    tpm_, true = (
        pd.read_csv(place.data / f"pseudobulk_test_{name}.csv", index_col=0) for name in ("tpm", "proportions")
    )
    assert tpm_.index.name.endswith("with mRNA contents")
    with_contents, by_counts = (
        proportions.estimate(checkpoint, tpm_, "regression-unadapted", 0, 0, known).proportions
        for known in (table, None)
    )
    assert 1.5 * mae(true, with_contents) < mae(true, by_counts)
    assert mae(true, proportions.nnls(checkpoint, tpm_, table)) < mae(true, proportions.nnls(checkpoint, tpm_, None))
