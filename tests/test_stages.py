"""The six real scripts on real cells: what they write, that they learned, and what they refuse."""

import gc
import re
import shutil

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from helpers import FEW, STAGES, Workplace, read_dataset, simulated_dataset, split_only

from lib.bulk import pseudobulk, sctape
from lib.bulk.deconvolution import deconvolve
from lib.bulk.regression import Reference
from lib.data.batches import CellDataset
from lib.data.counts import read_split
from lib.evaluation.metrics import mae
from lib.models.gmvae import GMVAE
from lib.models.profiles import gene_marginals, nb_per_type_log_likelihood
from lib.training import load_checkpoint

FILES = """
data/counts.h5ad data/train.h5ad data/test.h5ad data/pseudobulk_test_tpm.csv data/pseudobulk_test_counts.csv
data/pseudobulk_test_proportions.csv data/pseudobulk_train.h5ad data/generated.h5ad data/predicted_proportions.csv
data/predicted_rna_proportions.csv data/predicted_rna_spread.csv data/predicted_merged.csv
data/predicted_spread.csv data/predicted_samples.csv data/signature_matrix.csv
models/gmvae.pt models/gmvae_last.pt models/gmvae_history.csv models/sctape.pt models/sctape_last.pt models/sctape_history.csv
fig/umap_reference.png fig/gmvae_loss.png fig/sctape_loss.png fig/proportions.png fig/proportions_of_bulk.png fig/signature.png
fig/umap_original_vs_generated.png fig/umap_by_cell_type.png fig/paper_fig1.png fig/paper_fig3.png fig/paper_fig4.png
fig/fidelity.png fig/metrics.csv fig/mixtures.csv fig/umap.csv fig/report.html
""".split()


def gmvae(place: Workplace) -> GMVAE:
    checkpoint = load_checkpoint(place.models / "gmvae.pt", STAGES[3])
    model = GMVAE(**checkpoint["arguments"])
    model.load_state_dict(checkpoint["weights"])
    return model.eval()


def copy_of(pipeline: Workplace, path) -> Workplace:
    shutil.copytree(pipeline.path, path)
    return Workplace(path)


def change(path, edit) -> None:
    gc.collect()  # a stage that ended with an error may still hold the file open
    adata = ad.read_h5ad(path)
    edit(adata).write_h5ad(path)


# --- the files of a whole run


def test_every_file_is_there_and_nothing_half_written(pipeline):
    for name in FILES:
        assert (pipeline.path / name).stat().st_size > 0, name
    hidden = {path.name for path in pipeline.path.rglob(".*")}
    assert hidden <= {".lock"}, "temporary files are left"
    assert list((pipeline.models / "tensorboard").rglob("events*"))


def test_figures_are_pictures_of_a_readable_size(pipeline):
    for path in pipeline.fig.glob("*.png"):
        header = path.read_bytes()[:24]
        assert header[:8] == b"\x89PNG\r\n\x1a\n"
        assert int.from_bytes(header[16:20]) >= 1000, path


def test_counts_stay_the_counts_of_the_source(pipeline):
    counts, train, test = (ad.read_h5ad(pipeline.data / f"{name}.h5ad") for name in ("counts", "train", "test"))
    assert counts.uns["dataset"] == "pbmc68k_reduced" and counts.uns["source"]
    assert counts.shape == (700, 765) and isinstance(counts.X, sp.csr_matrix | sp.csr_array)
    assert list(train.var_names) == list(test.var_names)
    assert not set(train.obs_names) & set(test.obs_names)
    for part in (train, test):
        assert part.obs["cell_type"].dtype == "category" and (part.X.data == np.rint(part.X.data)).all()
        np.testing.assert_array_equal(part.X.toarray(), counts[part.obs_names, part.var_names].X.toarray())
        assert list(part.obs["cell_type"].astype(str)) == list(counts.obs.loc[part.obs_names, "cell_type"])


def test_the_split_is_stratified_and_genes_are_chosen_by_train_cells_alone(pipeline):
    counts, train, test = (ad.read_h5ad(pipeline.data / f"{name}.h5ad") for name in ("counts", "train", "test"))
    sizes = pd.DataFrame({"train": train.obs["cell_type"].value_counts(), "test": test.obs["cell_type"].value_counts()})
    assert ((sizes["test"] - sizes.sum(axis=1) * 0.25).abs() <= 0.5).all()
    in_train = np.asarray((counts[train.obs_names].X > 0).sum(axis=0)).ravel()
    assert set(train.var_names) == set(counts.var_names[in_train >= 3])


def test_the_mixtures_are_sums_of_test_cells_and_the_compositions_vary(pipeline):
    test = ad.read_h5ad(pipeline.data / "test.h5ad")
    counts, tpm, true = (
        pd.read_csv(pipeline.data / f"pseudobulk_test_{name}.csv", index_col=0)
        for name in ("counts", "tpm", "proportions")
    )
    assert list(counts.columns) == list(tpm.columns) == list(test.var_names) and list(true.columns) == list(
        test.obs["cell_type"].cat.categories
    )
    np.testing.assert_allclose(true.sum(axis=1), 1)
    np.testing.assert_allclose(tpm.sum(axis=1), 1e6, rtol=1e-4)
    np.testing.assert_allclose(tpm, counts.div(counts.sum(axis=1), axis=0) * 1e6, rtol=1e-4, atol=1e-3)
    own = true.index.str.startswith("own")
    composition = test.obs["cell_type"].value_counts(normalize=True)[true.columns]
    assert (true[own] - composition).abs().mean(axis=None) < 0.03 < (true[~own] - composition).abs().mean(axis=None)
    assert (true[~own] == 0).mean(axis=None) > 0.05  # absent types
    total = np.asarray(test.X.sum(axis=0)).ravel()
    assert (counts[own] <= total).all(axis=None)  # own mixtures hold a cell once at most
    # sampled independently, not prefixes of one permutation: no mixture contains another
    first, second = counts[own].to_numpy()[:2]
    assert not (first >= second).all() and not (second >= first).all()


def test_training_mixtures_come_from_train_cells_alone(pipeline):
    train = ad.read_h5ad(pipeline.data / "train.h5ad")
    samples = ad.read_h5ad(pipeline.data / "pseudobulk_train.h5ad", backed="r")
    assert samples.shape == (2_000, train.n_vars) and list(samples.var_names) == list(train.var_names)
    proportions = samples.obsm["proportions"]
    np.testing.assert_allclose(proportions.sum(axis=1), 1)
    # the counts of a mixture are a non-negative combination of its types' cells: a gene that no train cell of any of its
    # types holds is absent
    held = np.stack(
        [
            np.asarray(train[train.obs["cell_type"] == name].X.sum(axis=0)).ravel() > 0
            for name in samples.uns["cell_types"]
        ]
    )
    assert "X" not in samples.file  # stage 4 makes the counts
    rows, X = next(pseudobulk.train_mixtures(samples, train))
    possible = (proportions[rows] > 0).astype(float) @ held > 0
    assert (X[~possible] == 0).all() and (np.rint(X) == X).all()


def test_the_model_learned(pipeline):
    """Test cells are likelier under the GMVAE than under one negative binomial per gene and type, clearly."""
    train, test = read_split(pipeline.data)
    parts = [CellDataset(a.X, a.obs["cell_type"].cat.codes, torch.device("cpu")) for a in (train, test)]
    baseline = nb_per_type_log_likelihood(
        gene_marginals(parts[0], train.obs["cell_type"].cat.categories.size), parts[1]
    )
    gain = gmvae(pipeline).log_likelihood(parts[1], n_samples=20) - baseline
    assert gain.mean() > 10  # nats per cell
    assert gain.mean() > 5 * gain.std() / np.sqrt(len(gain))


def test_the_deconvolution_learned(pipeline):
    train = ad.read_h5ad(pipeline.data / "train.h5ad")
    tpm, true = (
        pd.read_csv(pipeline.data / f"pseudobulk_test_{name}.csv", index_col=0) for name in ("tpm", "proportions")
    )
    checkpoint = load_checkpoint(pipeline.models / "sctape.pt", STAGES[4])
    constant = train.obs["cell_type"].value_counts(normalize=True)[true.columns].to_numpy()
    random = true.index.str.startswith("dirichlet")
    baseline = mae(true[random], np.tile(constant, (random.sum(), 1)))
    assert mae(true[random], sctape.predict(checkpoint, tpm).proportions[random]) < 0.6 * baseline
    adapted = deconvolve(Reference.from_checkpoint(checkpoint["reference"]), tpm, n_members=0).proportions
    assert mae(true[random], adapted[random]) < 0.6 * baseline


def test_generated_cells_are_counts_in_the_predicted_proportions(pipeline):
    test, generated = (ad.read_h5ad(pipeline.data / f"{name}.h5ad") for name in ("test", "generated"))
    predicted = pd.read_csv(pipeline.data / "predicted_proportions.csv", index_col=0)
    assert generated.n_obs == test.n_obs and list(generated.var_names) == list(test.var_names)
    assert (
        sp.issparse(generated.X)
        and (generated.X.data > 0).all()
        and (generated.X.data == np.rint(generated.X.data)).all()
    )
    np.testing.assert_array_equal(generated.obs["library_size"], np.asarray(generated.X.sum(axis=1)).ravel())
    np.testing.assert_allclose(predicted.sum(axis=1), 1, atol=1e-5)
    n_cells = generated.obs["cell_type"].value_counts()[predicted.columns]
    assert (n_cells - predicted.loc["test_cells"] * test.n_obs).abs().max() <= 1
    assert generated.obs["sample"].unique().tolist() == ["test_cells"]


# --- variants


def test_generated_cells_are_evaluated_beside_real_ones(pipeline):
    table = pd.read_csv(pipeline.fig / "metrics.csv")
    pooled = table[table["cells"] == "all"].set_index("figure")
    assert pooled.loc["forest AUC", "real"] < 0.65  # train cells are hardly told from test cells
    assert pooled.loc["forest AUC", "generated"] < 0.75  # and generated cells not much more easily
    assert pooled.loc["gene correlation r", "generated"] > 0.8 * pooled.loc["gene correlation r", "real"]
    assert abs(pooled.loc["membership AUC", "generated"] - 0.5) < 0.15
    assert table["cells"].nunique() > 3 and not table["generated"][~table["figure"].str.contains("TPR")].isna().any()
    assert "compared with as many generated cells, and with train cells of the same types" in pipeline.output[STAGES[5]]


def test_generation_is_seeded(pipeline, tmp_path):
    for seed, name in ((123, "a"), (123, "b"), (5, "c")):
        pipeline.main(STAGES[5], SEED=seed, CELL_COUNTS="test", OUTPUT=str(tmp_path / f"{name}.h5ad"), EVALUATE=False)
    a, b, c = (ad.read_h5ad(tmp_path / f"{name}.h5ad") for name in "abc")
    assert (a.X != b.X).nnz == 0 and (a.X != c.X).nnz > 0
    test = ad.read_h5ad(pipeline.data / "test.h5ad")
    pd.testing.assert_series_equal(
        a.obs["cell_type"].value_counts(sort=False), test.obs["cell_type"].value_counts(sort=False)
    )


@pytest.mark.parametrize("genes_in_rows", [True, False])
def test_a_real_bulk_table(pipeline, tmp_path, genes_in_rows):
    tpm = pd.read_csv(pipeline.data / "pseudobulk_test_tpm.csv", index_col=0).iloc[:3].rename_axis(None)
    tpm = tpm.drop(columns=tpm.columns[:20]).assign(NOT_A_CELL_GENE=7.0)
    (tpm.T if genes_in_rows else tpm).to_csv(tmp_path / "bulk.tsv", sep="\t")
    place = Workplace(tmp_path / "place")
    shutil.copytree(pipeline.data, place.data)
    place.models, place.fig = pipeline.models, place.path / "fig"
    options = f"--bulk-file {tmp_path}/bulk.tsv --n-cells 101 --output {tmp_path}/out.h5ad --write-mtx --no-evaluate"
    done = place.run(STAGES[5], *options.split())
    generated = ad.read_h5ad(tmp_path / "out.h5ad")
    assert generated.obs["sample"].value_counts().to_dict() == {"own_1": 101, "own_2": 101, "own_3": 101}
    assert "units of the bulk: recognised as tpm" in done.stdout
    assert re.search(r"the bulk has 9\d\.\d% of those of the reference", (place.data / "log.txt").read_text())
    predicted = pd.read_csv(place.data / "predicted_proportions.csv", index_col=0)
    assert list(predicted.index) == ["own_1", "own_2", "own_3"]
    cells = read_dataset(tmp_path / "out")  # our own stage 0 takes it
    np.testing.assert_array_equal(cells.X.toarray(), generated.X.toarray())
    assert list(cells.obs["cell_type"]) == list(generated.obs["cell_type"])


def test_a_regression_per_sample_writes_the_expression_of_each_type(pipeline, tmp_path):
    counts = pd.read_csv(pipeline.data / "pseudobulk_test_counts.csv", index_col=0).iloc[:2].rename_axis(None)
    counts.T.to_csv(tmp_path / "bulk.csv")
    (tmp_path / "groups.csv").write_text("sample,group\nown_1,A\nown_2,B\n")
    place = copy_of(pipeline, tmp_path / "place")
    options = dict(
        BULK_FILE=str(tmp_path / "bulk.csv"), REPLICATES=str(tmp_path / "groups.csv"), N_CELLS=20, EVALUATE=False
    )
    place.main(STAGES[5], DECONVOLUTION="regression-per-sample", **options)
    expression = ad.read_h5ad(place.data / "cell_type_expression.h5ad")
    predicted = pd.read_csv(place.data / "predicted_proportions.csv", index_col=0)
    assert list(predicted.index) == ["A", "B"]
    shares = expression.obs.pivot(index="sample", columns="cell_type", values="proportion")[predicted.columns]
    np.testing.assert_allclose(shares, predicted, atol=1e-5)
    assert np.isfinite(expression.X).all() and (expression.X >= 0).all()


def test_shares_of_rna_are_written_beside_shares_of_cells_and_refused_in_their_place(pipeline, tmp_path):
    counts = pd.read_csv(pipeline.data / "pseudobulk_test_counts.csv", index_col=0).iloc[:2].rename_axis(None)
    counts.T.to_csv(tmp_path / "bulk.csv")
    place = copy_of(pipeline, tmp_path / "place")
    types = pd.read_csv(pipeline.data / "predicted_proportions.csv", index_col=0).columns
    content = pd.Series(np.arange(1.0, len(types) + 1), types)
    content.rename("rna_per_cell").rename_axis("cell_type").to_csv(tmp_path / "content.csv")
    files = {"BULK_FILE": str(tmp_path / "bulk.csv"), "RNA_PER_CELL": str(tmp_path / "content.csv")}
    place.main(STAGES[5], N_CELLS=20, EVALUATE=False, **files)
    cells, rna = (
        pd.read_csv(place.data / f"predicted_{name}.csv", index_col=0) for name in ("proportions", "rna_proportions")
    )
    expected = rna / content
    np.testing.assert_allclose(cells, expected.div(expected.sum(axis=1), axis=0), atol=1e-5)
    with pytest.raises(
        ValueError, match="holds shares of RNA.*expected shares of cells: give predicted_proportions.csv"
    ):
        place.main(STAGES[5], PROPORTIONS_FILE=str(place.data / "predicted_rna_proportions.csv"))


def test_a_table_of_cell_numbers_skips_the_prediction(pipeline, tmp_path):
    types = load_checkpoint(pipeline.models / "gmvae.pt", STAGES[3])["cell_types"]
    pd.DataFrame([[5, 0], [0, 9]], index=["A", "B"], columns=types[:2]).to_csv(tmp_path / "wanted.csv")
    options = dict(OUTPUT=str(tmp_path / "cells.h5ad"), EVALUATE=False)
    pipeline.main(STAGES[5], CELL_COUNTS=str(tmp_path / "wanted.csv"), **options)
    obs = ad.read_h5ad(tmp_path / "cells.h5ad").obs
    numbers = obs.groupby(["sample", "cell_type"], observed=True).size().to_dict()
    assert numbers == {("A", types[0]): 5, ("B", types[1]): 9}
    (tmp_path / "wanted.csv").write_text("cell_type,n\n" + f"{types[1]},4\n")
    pipeline.main(STAGES[5], CELL_COUNTS=str(tmp_path / "wanted.csv"), **options)
    assert ad.read_h5ad(tmp_path / "cells.h5ad").obs["cell_type"].value_counts()[types[1]] == 4
    (tmp_path / "wanted.csv").write_text(",Unicorn\nA,4\n")
    with pytest.raises(ValueError, match="does not know: Unicorn; it knows CD14"):
        pipeline.main(STAGES[5], CELL_COUNTS=str(tmp_path / "wanted.csv"), **options)


def test_outliers_of_a_type_are_found_by_its_train_cells(monkeypatch):
    """Type a: train cells with 100, 110, 120, 130, 140 genes: quartiles 110 and 130, limits 80 and 160; 1 to 5 % mitochondrial:
    quartiles 2 and 4, upper limit 7. Type b has ten times as many genes. A cell without a type stays."""
    import _1_split_train_test as stage

    monkeypatch.setattr(stage, "TYPE_IQR", 1.5)
    n_genes = np.array([100, 110, 120, 130, 140, 79, 80, 160, 161, 120, 120, 1000, 1000, 160, 9])
    pct_mt = np.array([1.0, 2, 3, 4, 5, 0, 0, 0, 0, 7, 7.1, 0, 0, 0, 99])
    types = pd.Categorical(["a"] * 11 + ["b"] * 3 + [None])
    is_test = np.arange(15) >= 5
    is_test[11:13] = False  # both train cells of b have 1,000 genes
    order = np.random.default_rng(0).permutation(15)  # rows of obs in another order than the data
    obs = pd.DataFrame({"cell_type": types, "row": np.arange(15)}).iloc[order]
    metrics = pd.DataFrame({"n_genes_by_counts": n_genes, "pct_counts_mt": pct_mt})
    kept = stage.within_type_ranges(metrics, obs, is_test[order])
    assert set(np.arange(15)[order][~kept]) == {5, 8, 10, 13}


def test_models_of_somebody_else_generate_without_any_cells(pipeline, tmp_path, capsys):
    """In a folder with models/ and a bulk, stage 5 writes the same proportions and cells as where the cells are."""
    place = Workplace(tmp_path / "place")
    place.models.mkdir(parents=True)
    for name in ("gmvae.pt", "sctape.pt"):
        shutil.copy(pipeline.models / name, place.models)
    tpm = pd.read_csv(pipeline.data / "pseudobulk_test_tpm.csv", index_col=0, comment="#").iloc[:2].rename_axis(None)
    tpm.to_csv(tmp_path / "bulk.csv")
    with pytest.raises(
        FileNotFoundError, match="test.h5ad is missing: run _1_.* or generate without test cells, with BULK_FILE"
    ):
        place.main(STAGES[5])
    bulk = {"BULK_FILE": str(tmp_path / "bulk.csv"), "N_CELLS": 30}
    place.main(STAGES[5], **bulk)
    assert (
        f"no train and test cells in {place.data}: cells are generated, but nothing is evaluated"
        in capsys.readouterr().out
    )
    assert [path.name for path in place.fig.glob("*")] == ["report.html"]  # the proportions, without an evaluation
    full = copy_of(pipeline, tmp_path / "full")
    full.main(STAGES[5], EVALUATE=False, **bulk)
    files = [folder.data / "predicted_proportions.csv" for folder in (place, full)]
    assert files[0].read_bytes() == files[1].read_bytes()
    cells, expected = (ad.read_h5ad(folder.data / "generated.h5ad") for folder in (place, full))
    assert (cells.X != expected.X).nnz == 0 and list(cells.var_names) == list(expected.var_names)
    assert cells.uns["dataset"] == "pbmc68k_reduced" and cells.uns["split_id"] == expected.uns["split_id"]
    place.main(STAGES[5], PROPORTIONS_FILE=str(files[0]), N_CELLS=30)
    by_table = ad.read_h5ad(place.data / "generated.h5ad").obs["cell_type"].value_counts(sort=False)
    pd.testing.assert_series_equal(by_table, expected.obs["cell_type"].value_counts(sort=False))
    place.main(STAGES[5], CELL_COUNTS="2")
    assert (ad.read_h5ad(place.data / "generated.h5ad").obs["cell_type"].value_counts() == 2).all()


def test_split_by_donor_shares_none(tmp_path):
    adata = simulated_dataset(n_cells=400)
    adata.obs["donor"] = [f"donor {i % 8}" for i in range(400)]
    place = split_only(tmp_path, adata, SPLIT_BY="donor")
    train, test = read_split(place.data)
    assert not set(train.obs["donor"]) & set(test.obs["donor"])
    assert 0.15 < test.n_obs / 400 < 0.35
    with pytest.raises(ValueError, match="SPLIT_BY is 'doner', but obs has"):
        place.main(STAGES[1], SPLIT_BY="doner")


def test_leiden_clusters_become_types_where_labels_are_missing(tmp_path, capsys):
    adata = simulated_dataset(n_cells=400)
    truth = adata.obs.pop("cell_type")
    place = split_only(tmp_path, adata, LEIDEN_RESOLUTION=0.3)
    assert "cell types: Leiden clusters" in capsys.readouterr().out
    train, _ = read_split(place.data)
    table = pd.crosstab(train.obs["cell_type"], truth[train.obs_names])
    assert len(table) >= 2 and table.max(axis=1).sum() > 0.8 * len(train)  # clusters follow the simulated types
    with pytest.raises(ValueError, match="LABELS is author, but"):
        place.main(STAGES[1], LABELS="author")


def test_beyond_the_embedded_cells_only_types_that_are_clusters_need_a_cluster(tmp_path):
    adata = simulated_dataset(n_cells=400)
    obs = obs_of_split(split_only(tmp_path / "author", adata, MAX_CELLS_EMBEDDED=250))
    assert len(obs) == 400 and obs["leiden"].notna().sum() == 250
    clusters = {"LABELS": "leiden", "LEIDEN_RESOLUTION": 0.3, "MIN_CLUSTER_CELLS": 2}
    obs = obs_of_split(split_only(tmp_path / "leiden", adata, MAX_CELLS_EMBEDDED=250, **clusters))
    table = pd.crosstab(obs["cell_type"], obs["author_cell_type"])
    assert len(obs) == 400 and table.max(axis=1).sum() > 0.8 * 400


def obs_of_split(place: Workplace) -> pd.DataFrame:
    return pd.concat([part.obs for part in read_split(place.data)])


def test_unlabelled_cells_are_dropped_or_kept_for_training(tmp_path):
    adata = simulated_dataset(n_cells=300)
    adata.obs["cell_type"] = adata.obs["cell_type"].astype(object)
    adata.obs.iloc[:60, 0] = "1_Unicorns and artifacts"
    dropped, _ = read_split(split_only(tmp_path / "drop", adata).data)
    kept, test = read_split(split_only(tmp_path / "keep", adata, UNLABELLED="keep").data)
    assert dropped.obs["cell_type"].notna().all() and kept.obs["cell_type"].isna().sum() == 60
    assert test.obs["cell_type"].notna().all()


FAST = {
    STAGES[2]: {"N_TRAIN_SAMPLES": 300, "N_TEST_DIRICHLET": 5, "CELLS_PER_SAMPLE": 100},
    STAGES[3]: {"EPOCHS": 2, "DEVICE": "cpu"},
    STAGES[4]: {"EPOCHS": 2, "DEVICE": "cpu"},
    STAGES[5]: {"DEVICE": "cpu", **FEW},
}


@pytest.mark.slow
def test_a_type_absent_from_the_test_donors_and_cells_without_type_go_the_whole_way(tmp_path, capsys):
    adata = simulated_dataset(n_cells=400)
    adata.obs["donor"] = [f"donor {i % 4}" for i in range(400)]
    adata.obs["cell_type"] = adata.obs["cell_type"].astype(object)
    adata.obs.iloc[::10, 0] = "unknown"
    rare = adata.obs["donor"] == "donor 1"
    adata.obs.loc[rare & (np.arange(400) % 3 == 0), "cell_type"] = "of one donor"
    place = split_only(tmp_path, adata, SPLIT_BY="donor", UNLABELLED="keep", SEED=seed_without("donor 1", adata))
    out = capsys.readouterr().out
    assert "WARNING: no test cell of of one donor" in out and "without a type" in out
    train, test = read_split(place.data)
    assert list(train.obs["cell_type"].cat.categories) == list(test.obs["cell_type"].cat.categories)
    assert train.obs["cell_type"].isna().any() and test.obs["cell_type"].notna().all()
    for stage in STAGES[2:]:
        place.main(stage, **FAST[stage])
    assert ad.read_h5ad(place.data / "generated.h5ad").n_obs == test.n_obs


def seed_without(donor: str, adata: ad.AnnData) -> int:
    """A seed whose split puts this donor's cells into train."""
    import _1_split_train_test as stage

    obs = adata.obs.assign(cell_type=pd.Categorical(adata.obs["cell_type"].replace("unknown", None)))
    stage.SPLIT_BY = "donor"
    for stage.SEED in range(20):
        try:
            if not (obs["donor"] == donor)[stage.split(obs)].any():
                return stage.SEED
        except ValueError:  # all cells of the type are test cells
            continue
    raise AssertionError("no such split")


@pytest.mark.slow
def test_gene_lengths_go_the_whole_way(tmp_path):
    """Lengths from stage 0, TPM by length in stage 2, the same scale in stages 4 and 5."""
    adata = simulated_dataset(n_cells=300)
    tmp_path.mkdir(exist_ok=True)
    lengths = pd.Series(np.linspace(500, 9000, 60).round(), index=adata.var_names).iloc[
        5:
    ]  # five genes without a length
    lengths.rename_axis("gene").rename("length").to_csv(tmp_path / "lengths.csv")
    adata.write_h5ad(tmp_path / "source.h5ad")
    place = Workplace(tmp_path)
    place.main(STAGES[0], DATASET=str(tmp_path / "source.h5ad"), GENE_LENGTHS=str(tmp_path / "lengths.csv"))
    place.main(STAGES[1], MIN_GENES=None, REMOVE_DOUBLETS=False)
    place.main(STAGES[2], USE_GENE_LENGTHS=True, N_TRAIN_SAMPLES=400)
    counts, tpm = (pd.read_csv(place.data / f"pseudobulk_test_{name}.csv", index_col=0) for name in ("counts", "tpm"))
    assert list(tpm.columns) == [g for g in counts.columns if g in lengths.index]
    rate = counts[tpm.columns] / lengths[tpm.columns]
    np.testing.assert_allclose(tpm, rate.div(rate.sum(axis=1), axis=0) * 1e6, rtol=1e-4, atol=1e-2)
    place.main(STAGES[4], EPOCHS=3, DEVICE="cpu")
    checkpoint = load_checkpoint(place.models / "sctape.pt", STAGES[4])
    assert (
        set(checkpoint["gene_names"]) <= set(lengths.index)
        and checkpoint["gene_length_bp"]["GENE10"] == lengths["GENE10"]
    )
    place.main(STAGES[3], **FAST[STAGES[3]])
    place.main(STAGES[5], **FAST[STAGES[5]])
    # the same bulk as TPM by length and as counts has the same proportions
    for units, table in (("tpm", tpm), ("counts", counts)):
        table.rename_axis(None).to_csv(tmp_path / f"bulk_{units}.csv")
        place.main(
            STAGES[5], BULK_FILE=str(tmp_path / f"bulk_{units}.csv"), BULK_UNITS=units, N_CELLS=5, EVALUATE=False
        )
        (place.data / "predicted_proportions.csv").rename(place.data / f"predicted_{units}.csv")
    by_units = [pd.read_csv(place.data / f"predicted_{units}.csv", index_col=0) for units in ("tpm", "counts")]
    np.testing.assert_allclose(*by_units, atol=1e-3)
    place.main(STAGES[2], USE_GENE_LENGTHS=False, N_TRAIN_SAMPLES=400)
    with pytest.raises(ValueError, match="by gene length"):
        place.main(STAGES[5])


# --- errors, and the old files that stay


def test_a_stage_not_yet_run_is_named(tmp_path):
    place = Workplace(tmp_path)
    for stage, before in zip(STAGES[1:], ("_0_", "_1_", "_1_", "_2_", "_1_")):
        with pytest.raises(FileNotFoundError, match=f"is missing: run {before}.*first"):
            place.main(stage)


@pytest.fixture(scope="module")
def split_again(pipeline, tmp_path_factory) -> Workplace:
    """The results of the pipeline, but another split of the same cells."""
    place = copy_of(pipeline, tmp_path_factory.mktemp("split_again") / "place")
    place.main(STAGES[1], SEED=7)
    return place


def test_a_model_of_other_data_is_refused_naming_both_sides(split_again):
    with pytest.raises(ValueError, match=r"gmvae.pt .*(expected split|they differ).*_3_train_gmvae.py"):
        split_again.main(STAGES[5])


def test_models_of_other_genes_and_types_are_refused(pipeline, tmp_path):
    for name, edit in (("genes", lambda a: a[:, 5:].copy()), ("cell types", rename_a_type)):
        place = copy_of(pipeline, tmp_path / name.split()[0])
        for file in ("train.h5ad", "test.h5ad"):
            change(place.data / file, edit)
        with pytest.raises(ValueError, match=rf"gmvae.pt has \d+ {name}, .*test.h5ad has \d+, and they differ"):
            place.main(STAGES[5])


def rename_a_type(adata: ad.AnnData) -> ad.AnnData:
    adata.obs["cell_type"] = adata.obs["cell_type"].cat.rename_categories({"Dendritic": "DC"})
    return adata


def test_stale_mixtures_and_a_mismatched_pair_are_refused(pipeline, tmp_path):
    place = copy_of(pipeline, tmp_path / "place")
    table = (place.data / "pseudobulk_test_tpm.csv").read_text()
    (place.data / "pseudobulk_test_tpm.csv").write_text(re.sub("split [0-9a-f]+", "split 000000000000", table, count=1))
    with pytest.raises(ValueError, match="pseudobulk_test_tpm.csv does not belong to"):
        place.main(STAGES[5])

    def stale(adata):
        adata.uns["split_id"] = "000000000000"
        return adata

    change(place.data / "test.h5ad", stale)
    with pytest.raises(ValueError, match="test.h5ad does not belong to .*train.h5ad"):
        place.main(STAGES[2])


def test_stages_of_other_counts_are_refused(pipeline, tmp_path):
    place = copy_of(pipeline, tmp_path / "place")
    simulated_dataset(n_cells=50).write_h5ad(tmp_path / "other.h5ad")
    place.main(STAGES[0], DATASET=str(tmp_path / "other.h5ad"))
    for stage in (STAGES[2], STAGES[3], STAGES[5]):
        with pytest.raises(
            ValueError, match=r"is stale: it was made from other counts of pbmc68k_reduced than .*other.h5ad.*run _1_"
        ):
            place.main(stage)


def test_output_does_not_overwrite_the_real_cells(pipeline):
    with pytest.raises(ValueError, match="OUTPUT is 'train.h5ad'"):
        pipeline.main(STAGES[5], OUTPUT="train.h5ad")
    with pytest.raises(ValueError, match="BULK_FILE and CELL_COUNTS are both set"):
        pipeline.main(STAGES[5], BULK_FILE="bulk.csv", CELL_COUNTS="test")


def test_bad_input_leaves_the_old_output_in_place(pipeline, tmp_path):
    place = copy_of(pipeline, tmp_path / "place")
    before = (place.data / "counts.h5ad").read_bytes()
    adata = simulated_dataset(n_cells=50)
    adata.X = adata.X.log1p()
    adata.write_h5ad(tmp_path / "normalised.h5ad")
    with pytest.raises(ValueError, match="looks log-normalised"):
        place.main(STAGES[0], DATASET=str(tmp_path / "normalised.h5ad"))
    assert (place.data / "counts.h5ad").read_bytes() == before


def test_a_type_too_small_to_split_is_an_error_or_dropped(tmp_path):
    adata = simulated_dataset(n_cells=100)
    adata.obs["cell_type"] = adata.obs["cell_type"].cat.add_categories("rare")
    adata.obs.iloc[:2, 0] = "rare"
    with pytest.raises(ValueError, match=r"too few cells to split for 1 of 4 types: rare \(2\); expected at least 4"):
        split_only(tmp_path / "a", adata)
    train, _ = read_split(split_only(tmp_path / "b", adata, SMALL_TYPES="drop").data)
    assert "rare" not in train.obs["cell_type"].cat.categories


def test_thresholds_of_other_data_are_warned_about_with_numbers(tmp_path, capsys):
    adata = simulated_dataset(n_cells=200)
    place = split_only(tmp_path, adata)
    capsys.readouterr()
    median = np.median(np.asarray(adata.X.sum(axis=1)))
    place.main(
        STAGES[1],
        MAX_COUNTS=int(np.quantile(np.asarray(adata.X.sum(axis=1)), 0.3)),
        MIN_GENES=None,
        REMOVE_DOUBLETS=False,
    )
    out = capsys.readouterr().out
    assert re.search(
        rf"WARNING: MAX_COUNTS = \d+ does not suit these data: 70% of the cells fail it.*median {median:,.1f}", out
    )
    with pytest.raises(ValueError, match="no cell passes the quality thresholds"):
        place.main(STAGES[1], MIN_GENES=10_000)
