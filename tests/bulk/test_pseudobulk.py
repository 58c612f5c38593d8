"""Mixtures equal the product of mixing matrix and counts; TPM by hand."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from helpers import STAGES, Workplace, simulated_dataset

from lib.bulk import pseudobulk
from lib.bulk.pseudobulk import largest_remainder, mix, read_train_mixtures, sample_cells, sample_proportions, tpm
from lib.data.counts import write_h5ad


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
    shares = dict.fromkeys(("sparse", "rare", "near"), 0.25)
    sampled = sample_proportions(4000, composition, shares, np.random.default_rng(0))
    np.testing.assert_allclose(sampled.sum(axis=1), 1)
    assert 0.08 < (sampled == 0).mean() < 0.17  # a quarter of the samples lacks half of its types, at most two of three
    assert ((sampled > 0) & (sampled < 0.03)).mean() > 0.05
    near = sample_proportions(4000, composition, {"sparse": 0, "rare": 0, "near": 1}, np.random.default_rng(0))
    np.testing.assert_allclose(near.mean(axis=0), composition, atol=0.01)


@pytest.mark.parametrize("min_distinct", [None, 3])
def test_sampled_cells_are_of_the_requested_types_and_a_subset_of_them(min_distinct):
    types = np.repeat([0, 1, 2, -1], [50, 30, 2, 20])
    cells_per_type = np.array([[10, 0, 5], [1, 200, 0]])
    mixing = sample_cells(cells_per_type, types, np.random.default_rng(0), min_distinct).toarray()
    for k in range(3):
        np.testing.assert_array_equal(mixing[:, types == k].sum(axis=1), cells_per_type[:, k])
    assert not mixing[:, types == -1].any()
    with pytest.raises(ValueError, match="cell type number 1 has no cells"):
        sample_cells(np.array([[1, 1]]), np.array([0, 0]), np.random.default_rng(0), min_distinct)
    many = sample_cells(np.full((200, 1), 500), np.zeros(1000, dtype=int), np.random.default_rng(0), min_distinct)
    n_distinct = np.diff(many.indptr)
    assert n_distinct.min() > 350 if min_distinct is None else 1 < n_distinct.min() < 10 and n_distinct.max() > 200


def test_mixtures_are_sums_of_their_cells_each_block_from_its_own_stream():
    counts = np.random.default_rng(0).poisson(1.0, (40, 30)).astype(np.float32)
    types, cells_per_type = np.repeat([0, 1], 20), np.tile([[5, 7]], (600, 1))
    mixing = list(pseudobulk.mixing_blocks(cells_per_type, types, 3, None, np.array([1.0, 2.0])))
    streams = np.random.SeedSequence(3).spawn(3)
    for rows, block, stream in zip((slice(250), slice(250, 500), slice(500, 600)), mixing, streams, strict=True):
        cells = sample_cells(cells_per_type[rows], types, np.random.default_rng(stream)).toarray()
        np.testing.assert_array_equal(block.toarray(), cells * np.where(types == 1, 2, 1))
        mixed = mix(block, sp.csr_matrix(counts), np.array([4, 2]))
        np.testing.assert_array_equal(mixed, block.toarray() @ counts[:, [4, 2]])


def test_tpm_by_hand():
    counts, lengths = np.array([[10, 20, 30], [0, 5, 5]]), np.array([1000, 2000, 500])
    # rates 0.01, 0.01, 0.06 and 0, 0.0025, 0.01
    np.testing.assert_allclose(tpm(counts, lengths), [[125_000, 125_000, 750_000], [0, 200_000, 800_000]])
    np.testing.assert_allclose(tpm(counts)[0], np.array([10, 20, 30]) / 60 * 1e6)
    with pytest.raises(ValueError, match="1 of 2 bulk samples have no expression"):
        tpm(np.array([[1, 1], [0, 0]]))


def test_impossible_shares_are_refused_before_any_work(tmp_path):
    with pytest.raises(ValueError, match=r"SPARSE_SHARE, RARE_SHARE, NEAR_SHARE = 0.6, 0.5, 0.25; expected a sum of"):
        Workplace(tmp_path).main(STAGES[2], SPARSE_SHARE=0.6, RARE_SHARE=0.5)


@pytest.fixture
def place(tmp_path):
    place = Workplace(tmp_path)
    place.data.mkdir()
    for name in ("train", "test"):
        adata = simulated_dataset()
        adata.uns |= {"dataset": "simulated", "split_id": "s"}
        write_h5ad(adata, place.data / f"{name}.h5ad")
    return place


def test_mixtures_made_later_are_those_that_were_written(place):
    """All genes or some, train cells in memory or on disk."""
    options = {"N_TRAIN_SAMPLES": 1200, "CELLS_PER_SAMPLE": 30, "N_TEST_DIRICHLET": 1}
    place.main(STAGES[2], WRITE_TRAIN_COUNTS=True, **options)
    written = ad.read_h5ad(place.data / "pseudobulk_train.h5ad").to_df()
    place.main(STAGES[2], **options)
    mixtures, train = read_train_mixtures(place.data)
    assert "X" not in mixtures.file and mixtures.shape == written.shape == (1200, train.n_vars)
    for memory_gb, genes in ((1.0, None), (0.0, None), (0.0, np.array([5, 2, 40]))):
        rows, counts = zip(*pseudobulk.train_mixtures(mixtures, train, genes, memory_gb))
        assert [(part.start, part.stop) for part in rows] == [(0, 500), (500, 1000), (1000, 1200)]
        np.testing.assert_array_equal(np.concatenate(counts), written if genes is None else written.iloc[:, genes])


def test_cells_with_the_mrna_contents_of_a_table(tmp_path, place):
    """Total counts of the mixtures are linear in the proportions of cells; the coefficients are the contents."""
    content = pd.Series({"type 0": 1.0, "type 1": 6.0, "type 2": 2.0}, name="rna_per_cell").rename_axis("cell_type")
    content.to_csv(tmp_path / "content.csv")
    place.main(STAGES[2], RNA_PER_CELL=str(tmp_path / "content.csv"), N_TRAIN_SAMPLES=400, CELLS_PER_SAMPLE=300)
    mixtures, train = read_train_mixtures(place.data)
    assert mixtures.uns["rna_per_cell"].tolist() == [1, 6, 2]
    totals = np.concatenate([counts.sum(axis=1) for _, counts in pseudobulk.train_mixtures(mixtures, train)])
    tpm_table, shares = pseudobulk.read_test_mixtures(place.data, "s", by_length=False, by_content=True)
    counts = pd.read_csv(place.data / "pseudobulk_test_counts.csv", index_col=0)
    for proportions, total in ((mixtures.obsm["proportions"], totals), (shares[5:], counts[5:].sum(axis=1))):
        rna = np.linalg.lstsq(proportions, total, rcond=None)[0]
        np.testing.assert_allclose(rna / rna.sum(), content / content.sum(), rtol=0.1)
    np.testing.assert_allclose(tpm_table.sum(axis=1), 1e6, rtol=1e-4)
    with pytest.raises(ValueError, match="does not belong to models/sctape.pt.*run _2_make_pseudobulk.py"):
        pseudobulk.read_test_mixtures(place.data, "s", by_length=False, by_content=False)
