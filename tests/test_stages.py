"""The six real scripts on real cells: what they write, that they learned, and what they refuse."""

import gc
import re
import shutil

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from helpers import CPU, FEW, STAGES, Workplace, read_dataset, simulated_dataset, split_only

from lib.baselines import registry
from lib.bulk import pseudobulk, sctape
from lib.bulk.deconvolution import deconvolve
from lib.bulk.regression import Reference
from lib.data.batches import CellDataset
from lib.data.counts import read_split
from lib.evaluation.metrics import mae
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
FAST = {
    STAGES[2]: {"N_TRAIN_SAMPLES": 300, "N_TEST_DIRICHLET": 5, "CELLS_PER_SAMPLE": 100},
    STAGES[3]: {"EPOCHS": 2, "DEVICE": "cpu"},
    STAGES[4]: {"EPOCHS": 2, "DEVICE": "cpu"},
    STAGES[5]: {"DEVICE": "cpu", **FEW},
}


@pytest.fixture
def place(pipeline, tmp_path) -> Workplace:
    """A copy of the finished pipeline, to be changed."""
    return pipeline.copy(tmp_path / "place")


@pytest.fixture
def bulk(pipeline, tmp_path) -> str:
    """A table of two bulk samples, genes in rows, counts."""
    counts = pipeline.table("pseudobulk_test_counts").iloc[:2].rename_axis(None)
    counts.T.to_csv(tmp_path / "bulk.csv")
    return str(tmp_path / "bulk.csv")


def change(path, edit) -> None:
    gc.collect()  # a stage that ended with an error may still hold the file open
    adata = ad.read_h5ad(path)
    edit(adata).write_h5ad(path)


# --- the files of a whole run


def test_every_file_is_there_and_nothing_half_written(pipeline):
    for name in FILES:
        assert (pipeline.path / name).stat().st_size > 0, name
    assert {path.name for path in pipeline.path.rglob(".*")} <= {".lock"}, "temporary files are left"
    assert list((pipeline.models / "tensorboard").rglob("events*"))
    for path in pipeline.fig.glob("*.png"):
        header = path.read_bytes()[:24]
        assert header[:8] == b"\x89PNG\r\n\x1a\n" and int.from_bytes(header[16:20]) >= 1000, path  # pixels


def test_counts_stay_the_counts_of_the_source(pipeline):
    counts, train, test = map(pipeline.cells, ("counts", "train", "test"))
    assert counts.uns["dataset"] == "pbmc68k_reduced" and counts.uns["source"]
    assert counts.shape == (700, 765) and sp.issparse(counts.X)
    assert list(train.var_names) == list(test.var_names)
    assert not set(train.obs_names) & set(test.obs_names)
    for part in (train, test):
        assert part.obs["cell_type"].dtype == "category" and (part.X.data == np.rint(part.X.data)).all()
        np.testing.assert_array_equal(part.X.toarray(), counts[part.obs_names, part.var_names].X.toarray())
        assert list(part.obs["cell_type"].astype(str)) == list(counts.obs.loc[part.obs_names, "cell_type"])


def test_the_split_is_stratified_and_genes_are_chosen_by_train_cells_alone(pipeline):
    counts, train, test = map(pipeline.cells, ("counts", "train", "test"))
    n_train, n_test = (part.obs["cell_type"].value_counts(sort=False) for part in (train, test))
    assert ((n_test - (n_train + n_test) * 0.25).abs() <= 0.5).all()
    in_train = np.asarray((counts[train.obs_names].X > 0).sum(axis=0)).ravel()
    assert set(train.var_names) == set(counts.var_names[in_train >= 3])


def test_the_mixtures_are_sums_of_test_cells_and_the_compositions_vary(pipeline):
    test = pipeline.cells("test")
    counts, tpm, true = (pipeline.table(f"pseudobulk_test_{name}") for name in ("counts", "tpm", "proportions"))
    assert list(counts.columns) == list(tpm.columns) == list(test.var_names)
    assert list(true.columns) == list(test.obs["cell_type"].cat.categories)
    np.testing.assert_allclose(true.sum(axis=1), 1)
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
    train = pipeline.cells("train")
    samples = ad.read_h5ad(pipeline.data / "pseudobulk_train.h5ad", backed="r")
    assert samples.shape == (2_000, train.n_vars) and list(samples.var_names) == list(train.var_names)
    assert "X" not in samples.file  # stage 4 makes the counts
    proportions = samples.obsm["proportions"]
    np.testing.assert_allclose(proportions.sum(axis=1), 1)
    # a gene that no train cell of any of its types holds is absent from a mixture
    by_type = train.to_df().groupby(train.obs["cell_type"], observed=False).sum().loc[list(samples.uns["cell_types"])]
    rows, X = next(pseudobulk.train_mixtures(samples, train))
    possible = (proportions[rows] > 0) @ (by_type.to_numpy() > 0)
    assert (X[~possible] == 0).all() and (np.rint(X) == X).all()


def test_the_model_learned(pipeline):
    """Test cells are likelier under the GMVAE than under one negative binomial per gene and type, clearly."""
    train, test = (CellDataset(part.X, part.obs["cell_type"].cat.codes, CPU) for part in read_split(pipeline.data))
    baseline = nb_per_type_log_likelihood(gene_marginals(train, int(train.cell_type_idx.max()) + 1), test)
    model = registry.load(load_checkpoint(pipeline.models / "gmvae.pt", STAGES[3]), CPU)
    gain = model.log_likelihood(test, n_samples=20) - baseline
    assert gain.mean() > 10  # nats per cell
    assert gain.mean() > 5 * gain.std() / np.sqrt(len(gain))


def test_the_deconvolution_learned(pipeline):
    tpm, true = (pipeline.table(f"pseudobulk_test_{name}") for name in ("tpm", "proportions"))
    checkpoint = load_checkpoint(pipeline.models / "sctape.pt", STAGES[4])
    constant = pipeline.cells("train").obs["cell_type"].value_counts(normalize=True)[true.columns].to_numpy()
    random = true.index.str.startswith("dirichlet")
    baseline = mae(true[random], np.tile(constant, (random.sum(), 1)))
    assert mae(true[random], sctape.predict(checkpoint, tpm).proportions[random]) < 0.6 * baseline
    adapted = deconvolve(Reference.from_checkpoint(checkpoint["reference"]), tpm, n_members=0).proportions
    assert mae(true[random], adapted[random]) < 0.6 * baseline


def test_generated_cells_are_counts_in_the_predicted_proportions(pipeline):
    test, generated = pipeline.cells("test"), pipeline.cells("generated")
    predicted = pipeline.table("predicted_proportions")
    assert generated.n_obs == test.n_obs and list(generated.var_names) == list(test.var_names)
    counts = generated.X.data
    assert sp.issparse(generated.X) and (counts > 0).all() and (counts == np.rint(counts)).all()
    np.testing.assert_array_equal(generated.obs["library_size"], np.asarray(generated.X.sum(axis=1)).ravel())
    np.testing.assert_allclose(predicted.sum(axis=1), 1, atol=1e-5)
    n_cells = generated.obs["cell_type"].value_counts()[predicted.columns]
    assert (n_cells - predicted.loc["test_cells"] * test.n_obs).abs().max() <= 1
    assert generated.obs["sample"].unique().tolist() == ["test_cells"]


def test_generated_cells_are_evaluated_beside_real_ones(pipeline):
    table = pd.read_csv(pipeline.fig / "metrics.csv")
    pooled = table[table["cells"] == "all"].set_index("figure")
    assert pooled.loc["forest AUC", "real"] < 0.65  # train cells are hardly told from test cells
    assert pooled.loc["forest AUC", "generated"] < 0.75  # and generated cells not much more easily
    assert pooled.loc["gene correlation r", "generated"] > 0.8 * pooled.loc["gene correlation r", "real"]
    assert abs(pooled.loc["membership AUC", "generated"] - 0.5) < 0.15
    assert table["cells"].nunique() > 3 and not table["generated"][~table["figure"].str.contains("TPR")].isna().any()


# --- variants of stage 5


def test_generation_is_seeded(pipeline, tmp_path):
    for seed, name in ((123, "a"), (123, "b"), (5, "c")):
        pipeline.main(STAGES[5], SEED=seed, CELL_COUNTS="test", OUTPUT=str(tmp_path / f"{name}.h5ad"), EVALUATE=False)
    a, b, c = (ad.read_h5ad(tmp_path / f"{name}.h5ad") for name in "abc")
    assert (a.X != b.X).nnz == 0 and (a.X != c.X).nnz > 0
    n_test = pipeline.cells("test").obs["cell_type"].value_counts(sort=False)
    pd.testing.assert_series_equal(a.obs["cell_type"].value_counts(sort=False), n_test)


@pytest.mark.parametrize("genes_in_rows", [True, False])
def test_a_real_bulk_table(place, tmp_path, genes_in_rows):
    tpm = place.table("pseudobulk_test_tpm").iloc[:3, 20:].rename_axis(None).assign(NOT_A_CELL_GENE=7.0)
    (tpm.T if genes_in_rows else tpm).to_csv(tmp_path / "bulk.tsv", sep="\t")
    options = f"--bulk-file {tmp_path}/bulk.tsv --n-cells 101 --output {tmp_path}/out.h5ad --write-mtx --no-evaluate"
    done = place.run(STAGES[5], *options.split())
    generated = ad.read_h5ad(tmp_path / "out.h5ad")
    assert generated.obs["sample"].value_counts().to_dict() == {"own_1": 101, "own_2": 101, "own_3": 101}
    assert "units of the bulk: recognised as tpm" in done.stdout
    assert re.search(r"the bulk has 9\d\.\d% of those of the reference", (place.data / "log.txt").read_text())
    assert list(place.table("predicted_proportions").index) == ["own_1", "own_2", "own_3"]
    cells = read_dataset(tmp_path / "out")  # our own stage 0 takes it
    np.testing.assert_array_equal(cells.X.toarray(), generated.X.toarray())
    assert list(cells.obs["cell_type"]) == list(generated.obs["cell_type"])


def test_a_regression_per_sample_writes_the_expression_of_each_type(place, bulk, tmp_path):
    (tmp_path / "groups.csv").write_text("sample,group\nown_1,A\nown_2,B\n")
    options = {"REPLICATES": str(tmp_path / "groups.csv"), "N_CELLS": 20, "EVALUATE": False}
    place.main(STAGES[5], DECONVOLUTION="regression-per-sample", BULK_FILE=bulk, **options)
    expression, predicted = place.cells("cell_type_expression"), place.table("predicted_proportions")
    assert list(predicted.index) == ["A", "B"]
    shares = expression.obs.pivot(index="sample", columns="cell_type", values="proportion")[predicted.columns]
    np.testing.assert_allclose(shares, predicted, atol=1e-5)
    assert np.isfinite(expression.X).all() and (expression.X >= 0).all()


def test_shares_of_rna_are_written_beside_shares_of_cells_and_refused_in_their_place(place, bulk, tmp_path):
    types = place.table("predicted_proportions").columns
    content = pd.Series(np.arange(1.0, len(types) + 1), types, name="rna_per_cell").rename_axis("cell_type")
    content.to_csv(tmp_path / "content.csv")
    place.main(STAGES[5], BULK_FILE=bulk, RNA_PER_CELL=str(tmp_path / "content.csv"), N_CELLS=20, EVALUATE=False)
    cells, expected = place.table("predicted_proportions"), place.table("predicted_rna_proportions") / content
    np.testing.assert_allclose(cells, expected.div(expected.sum(axis=1), axis=0), atol=1e-5)
    with pytest.raises(ValueError, match="holds shares of RNA.*expected shares of cells: give predicted_proportions"):
        place.main(STAGES[5], PROPORTIONS_FILE=str(place.data / "predicted_rna_proportions.csv"))


def test_a_table_of_cell_numbers_skips_the_prediction(place, tmp_path):
    types = load_checkpoint(place.models / "gmvae.pt", STAGES[3])["cell_types"]
    for text, expected in {
        f",{types[0]},{types[1]}\nA,5,0\nB,0,9\n": {("A", types[0]): 5, ("B", types[1]): 9},
        f"cell_type,n\n{types[1]},4\n": {("cells", types[1]): 4},
        "4": {("cells", name): 4 for name in types},
    }.items():
        (tmp_path / "numbers.csv").write_text(text)
        place.main(STAGES[5], CELL_COUNTS=text if text == "4" else str(tmp_path / "numbers.csv"), EVALUATE=False)
        obs = place.cells("generated").obs
        assert obs.groupby(["sample", "cell_type"], observed=True).size().to_dict() == expected


def test_models_of_somebody_else_generate_without_any_cells(pipeline, place, bulk, tmp_path, capsys):
    """In a folder with models/ and a bulk, stage 5 writes the same proportions and cells as where the cells are."""
    alone = Workplace(tmp_path / "alone")
    alone.models.mkdir(parents=True)
    for name in ("gmvae.pt", "sctape.pt"):
        shutil.copy(pipeline.models / name, alone.models)
    with pytest.raises(FileNotFoundError, match="test.h5ad is missing: run _1_.* or generate without test cells"):
        alone.main(STAGES[5])
    alone.main(STAGES[5], BULK_FILE=bulk, N_CELLS=30, REPORT=False)
    assert f"no train and test cells in {alone.data}: cells are generated" in capsys.readouterr().out
    assert not list(alone.fig.iterdir())  # neither an evaluation nor a page
    place.main(STAGES[5], BULK_FILE=bulk, N_CELLS=30, EVALUATE=False)
    proportions = [folder.data / "predicted_proportions.csv" for folder in (alone, place)]
    assert proportions[0].read_bytes() == proportions[1].read_bytes()
    cells, expected = alone.cells("generated"), place.cells("generated")
    assert (cells.X != expected.X).nnz == 0 and list(cells.var_names) == list(expected.var_names)
    assert cells.uns["dataset"] == "pbmc68k_reduced" and cells.uns["split_id"] == expected.uns["split_id"]
    alone.main(STAGES[5], PROPORTIONS_FILE=str(proportions[0]), N_CELLS=30)
    by_table = alone.cells("generated").obs["cell_type"].value_counts(sort=False)
    pd.testing.assert_series_equal(by_table, expected.obs["cell_type"].value_counts(sort=False))
    assert [path.name for path in alone.fig.iterdir()] == ["report.html"]


@pytest.mark.slow
def test_the_bulk_encoder_goes_through_stages_4_and_5(place):
    few = {"N_STATE_SAMPLES": 300, "CELLS_PER_STATE_SAMPLE": 60, "N_STATE_GENES": 300}
    place.main(STAGES[4], NETWORK="bulk_encoder", **few, **FAST[STAGES[4]])
    place.main(STAGES[5], DECONVOLUTION="bulk_encoder", **FAST[STAGES[5]])
    types = list(place.cells("test").obs["cell_type"].cat.categories)
    assert list(place.table("predicted_proportions").columns) == types
    np.testing.assert_allclose(place.table("predicted_proportions").sum(axis=1), 1, atol=1e-5)
    assert np.isfinite(place.table("predicted_states").select_dtypes("number")).all(axis=None)
    assert place.cells("generated").n_obs == place.cells("test").n_obs
    assert "the method bulk_encoder" in (place.fig / "report.html").read_text()


# --- variants of stage 1, and of whole runs


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


def test_split_by_donor_shares_none(tmp_path):
    adata = simulated_dataset(n_cells=400)
    adata.obs["donor"] = [f"donor {i % 8}" for i in range(400)]
    place = split_only(tmp_path, adata, SPLIT_BY="donor", MAX_CELLS_EMBEDDED=250)
    train, test = read_split(place.data)
    assert not set(train.obs["donor"]) & set(test.obs["donor"])
    assert train.n_obs + test.n_obs == 400  # also those beyond MAX_CELLS_EMBEDDED, which have no cluster
    assert train.obs["leiden"].notna().sum() + test.obs["leiden"].notna().sum() == 250
    assert 0.15 < test.n_obs / 400 < 0.35
    with pytest.raises(ValueError, match="SPLIT_BY is 'doner', but obs has"):
        place.main(STAGES[1], SPLIT_BY="doner")


def test_leiden_clusters_become_types_where_labels_are_missing(tmp_path, capsys):
    """150 of 400 cells are not clustered, but take the types of their neighbours."""
    adata = simulated_dataset(n_cells=400)
    truth = adata.obs.pop("cell_type")
    place = split_only(tmp_path, adata, LEIDEN_RESOLUTION=0.3, MAX_CELLS_EMBEDDED=250, MIN_CLUSTER_CELLS=2)
    assert "cell types: Leiden clusters" in capsys.readouterr().out
    obs = pd.concat([part.obs for part in read_split(place.data)])
    table = pd.crosstab(obs["cell_type"], truth[obs.index])
    assert len(obs) == 400 and len(table) >= 2
    assert table.max(axis=1).sum() > 0.8 * 400  # clusters follow the simulated types
    with pytest.raises(ValueError, match="LABELS is author, but"):
        place.main(STAGES[1], LABELS="author")


def test_unlabelled_cells_are_dropped_or_kept_for_training(tmp_path):
    adata = simulated_dataset(n_cells=300)
    adata.obs["cell_type"] = adata.obs["cell_type"].astype(object)
    adata.obs.iloc[:60, 0] = "1_Unicorns and artifacts"
    dropped, _ = read_split(split_only(tmp_path / "drop", adata).data)
    kept, test = read_split(split_only(tmp_path / "keep", adata, UNLABELLED="keep").data)
    assert dropped.obs["cell_type"].notna().all() and kept.obs["cell_type"].isna().sum() == 60
    assert test.obs["cell_type"].notna().all()


@pytest.mark.slow
def test_a_type_absent_from_the_test_donors_and_cells_without_type_go_the_whole_way(tmp_path, capsys):
    adata = simulated_dataset(n_cells=400)
    adata.obs["donor"] = [f"donor {i % 4}" for i in range(400)]
    adata.obs["cell_type"] = adata.obs["cell_type"].astype(object)
    adata.obs.iloc[::10, 0] = "unknown"
    rare = adata.obs["donor"] == "donor 1"
    adata.obs.loc[rare & (np.arange(400) % 3 == 0), "cell_type"] = "of one donor"
    place = split_only(tmp_path, adata, SPLIT_BY="donor", UNLABELLED="keep")
    out = capsys.readouterr().out
    assert "WARNING: no test cell of of one donor" in out and "without a type" in out
    train, test = read_split(place.data)
    assert list(train.obs["cell_type"].cat.categories) == list(test.obs["cell_type"].cat.categories)
    assert train.obs["cell_type"].isna().any() and test.obs["cell_type"].notna().all()
    for stage in STAGES[2:]:
        place.main(stage, **FAST[stage])
    assert place.cells("generated").n_obs == test.n_obs


@pytest.mark.slow
def test_gene_lengths_go_the_whole_way(tmp_path):
    """Lengths from stage 0, TPM by length in stage 2, the same scale in stages 4 and 5."""
    adata, place = simulated_dataset(n_cells=300), Workplace(tmp_path)
    lengths = pd.Series(np.linspace(500, 9000, 60).round(), adata.var_names, name="length")[5:]  # five have no length
    lengths.rename_axis("gene").to_csv(tmp_path / "lengths.csv")
    adata.write_h5ad(tmp_path / "source.h5ad")
    place.main(STAGES[0], DATASET=str(tmp_path / "source.h5ad"), GENE_LENGTHS=str(tmp_path / "lengths.csv"))
    place.main(STAGES[1], MIN_GENES=None, REMOVE_DOUBLETS=False)
    place.main(STAGES[2], USE_GENE_LENGTHS=True, N_TRAIN_SAMPLES=400)
    counts, tpm = (place.table(f"pseudobulk_test_{name}") for name in ("counts", "tpm"))
    assert list(tpm.columns) == [g for g in counts.columns if g in lengths.index]
    rate = counts[tpm.columns] / lengths[tpm.columns]
    np.testing.assert_allclose(tpm, rate.div(rate.sum(axis=1), axis=0) * 1e6, rtol=1e-4, atol=1e-2)
    for stage in STAGES[3:]:
        place.main(stage, **FAST[stage])
    checkpoint = load_checkpoint(place.models / "sctape.pt", STAGES[4])
    assert set(checkpoint["gene_names"]) <= set(lengths.index)
    assert checkpoint["gene_length_bp"]["GENE10"] == lengths["GENE10"]
    predicted = []  # the same bulk as TPM by length and as counts has the same proportions
    for units, table in (("tpm", tpm), ("counts", counts)):
        table.rename_axis(None).to_csv(tmp_path / "bulk.csv")
        place.main(STAGES[5], BULK_FILE=str(tmp_path / "bulk.csv"), BULK_UNITS=units, N_CELLS=5, EVALUATE=False)
        predicted.append(place.table("predicted_proportions"))
    np.testing.assert_allclose(*predicted, atol=1e-3)
    place.main(STAGES[2], USE_GENE_LENGTHS=False, N_TRAIN_SAMPLES=400)
    with pytest.raises(ValueError, match="by gene length"):
        place.main(STAGES[5])


# --- errors, and the old files that stay


def of_another_split(adata: ad.AnnData) -> ad.AnnData:
    adata.uns["split_id"] = "000000000000"
    return adata


def with_a_renamed_type(adata: ad.AnnData) -> ad.AnnData:
    adata.obs["cell_type"] = adata.obs["cell_type"].cat.rename_categories({"Dendritic": "DC"})
    return adata


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (of_another_split, r"gmvae.pt .*(expected split|they differ).*_3_train_gmvae.py"),
        (with_a_renamed_type, r"gmvae.pt has \d+ cell types, .*test.h5ad has \d+, and they differ"),
        (lambda adata: adata[:, 5:].copy(), r"gmvae.pt has \d+ genes, .*test.h5ad has \d+, and they differ"),
    ],
)
def test_models_of_other_data_are_refused_naming_both_sides(place, edit, message):
    for name in ("train", "test"):
        change(place.data / f"{name}.h5ad", edit)
    with pytest.raises(ValueError, match=message):
        place.main(STAGES[5], CELL_COUNTS="test")


def test_stale_mixtures_and_a_mismatched_pair_are_refused(place):
    path = place.data / "pseudobulk_test_tpm.csv"
    path.write_text(re.sub("split [0-9a-f]+", "split 000000000000", path.read_text(), count=1))
    with pytest.raises(ValueError, match="pseudobulk_test_tpm.csv does not belong to"):
        place.main(STAGES[5])
    change(place.data / "test.h5ad", of_another_split)
    with pytest.raises(ValueError, match="test.h5ad does not belong to .*train.h5ad"):
        place.main(STAGES[2])


def test_stages_of_other_counts_are_refused(place, tmp_path):
    simulated_dataset(n_cells=50).write_h5ad(tmp_path / "other.h5ad")
    place.main(STAGES[0], DATASET=str(tmp_path / "other.h5ad"))
    message = "is stale: it was made from other counts of pbmc68k_reduced than .*other.h5ad.*run _1_"
    for stage in (STAGES[2], STAGES[3], STAGES[5]):
        with pytest.raises(ValueError, match=message):
            place.main(stage)


def test_options_of_stage_5_that_do_not_fit_are_refused(pipeline):
    with pytest.raises(ValueError, match="OUTPUT is 'train.h5ad'"):
        pipeline.main(STAGES[5], OUTPUT="train.h5ad")
    with pytest.raises(ValueError, match="BULK_FILE and CELL_COUNTS are both set"):
        pipeline.main(STAGES[5], BULK_FILE="bulk.csv", CELL_COUNTS="test")
    for option in ({"FOUR_STAGES": True}, {"DECONVOLUTION": "bulk_encoder"}):
        with pytest.raises(ValueError, match="need the GMVAE, but GENERATOR is pca_cvae"):
            pipeline.main(STAGES[5], GENERATOR="pca_cvae", **option)


def test_a_type_too_small_to_split_is_an_error_or_dropped(tmp_path):
    adata = simulated_dataset(n_cells=100)
    adata.obs["cell_type"] = adata.obs["cell_type"].cat.add_categories("rare")
    adata.obs.iloc[:2, 0] = "rare"
    with pytest.raises(ValueError, match=r"too few cells to split for 1 of 4 types: rare \(2\); expected at least 4"):
        split_only(tmp_path, adata)
    train, _ = read_split(split_only(tmp_path, adata, SMALL_TYPES="drop").data)
    assert "rare" not in train.obs["cell_type"].cat.categories


def test_thresholds_of_other_data_are_warned_about_with_numbers(tmp_path, capsys):
    adata = simulated_dataset(n_cells=200)
    library_size = np.asarray(adata.X.sum(axis=1)).ravel()
    place = split_only(tmp_path, adata, MAX_COUNTS=int(np.quantile(library_size, 0.3)))
    warning = "WARNING: MAX_COUNTS = [0-9]+ does not suit these data: 70% of the cells fail it.*median "
    assert re.search(f"{warning}{np.median(library_size):,.1f}", capsys.readouterr().out)
    with pytest.raises(ValueError, match="no cell passes the quality thresholds"):
        place.main(STAGES[1], MIN_GENES=10_000)
