"""The evaluation as stage 5 calls it, on simulated cells and on the cells of the pipeline."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from helpers import CPU, FEW, STAGES, simulated_cells, simulated_dataset, trained_gmvae

from lib.data.batches import CellDataset
from lib.data.counts import log_normalize
from lib.evaluation import evaluate
from lib.models.gmvae import GMVAE
from lib.models.paper_gmvae import PaperGMVAE
from lib.models.sampling import generate, reconstruct


def test_fig_1_collects_the_sizes_of_all_layers():
    """Sizes by hand, from the arguments of the models."""
    ours = evaluate.networks_of(GMVAE(1234, 17, n_latent=21, likelihood="zinb"), None)
    encoder, decoder, deconvolution, generation = ({box.output: box.sizes for box in part} for part in ours.values())
    assert encoder["mean of $q(z|x,y)$"] == (1234 + 17 + 1, 21) and encoder["mean of $p(z|y)$"] == (17, 21)
    assert decoder["mean / library size"] == decoder["extra zeros"] == (21, 1234) and decoder["library size"] == (21, 1)
    assert deconvolution == {} and "library size" in generation  # without a fitted prior, from p(l|z,y)
    paper = PaperGMVAE(1234, 17)
    encoder, decoder, _, generation = evaluate.networks_of(paper, None).values()
    assert {box.output: box.sizes for box in encoder}["$q(y|x)$"] == (1234, 128, 17)
    assert encoder[0].sizes == (1234 + 17, 128, 64, 32) and [box.sizes for box in decoder] == [(32, 64, 128, 1234)] * 3
    assert [box.sizes for box in generation] == [(17, 128, 32)] * 2 + [(32, 64, 128, 1234)] * 3
    paper.q_y_x = None  # such as our model where all cells are labelled
    assert all("q(y|x)" not in box.output for box in evaluate.networks_of(paper, None)[next(iter(ours))])


def test_the_markers_of_each_type_are_shown_relative_to_the_single_cells():
    genes = [f"GENE{i}" for i in range(40)]
    profiles = pd.DataFrame(np.ones((3, 40)), list("abc"), genes)
    for k in range(3):
        profiles.iloc[k, 10 * k : 10 * k + 6] = 50
    adapted = profiles.mul(np.linspace(0.5, 2, 40)).drop(columns="GENE30")
    single_cells, bulk = evaluate.marker_expression(profiles, adapted)
    assert list(single_cells) == list(bulk) == [f"GENE{10 * k + i}" for k in range(3) for i in range(6)]
    assert (single_cells.to_numpy().argmax(axis=0) == np.repeat([0, 1, 2], 6)).all()
    np.testing.assert_allclose(single_cells.max(), 1)
    per_10k = adapted.loc["a", "GENE0"] / adapted.loc["a"].sum() * 1e4
    without_30 = profiles.drop(columns="GENE30").loc["a"]
    largest = np.log1p(without_30["GENE0"] / without_30.sum() * 1e4)
    assert bulk.loc["a", "GENE0"] == pytest.approx(np.log1p(per_10k) / largest)


@pytest.mark.slow
def test_generators_are_compared_with_the_same_cells_and_a_copying_one_is_caught(tmp_path):
    cells = simulated_dataset(n_cells=400)
    train, test = cells[::2].copy(), cells[1::2].copy()
    model = trained_gmvae(train.X, train.obs["cell_type"].cat.codes.to_numpy(), epochs=20)
    types = test.obs["cell_type"].cat.codes.to_numpy()

    class Copying(PaperGMVAE):
        def sample(self, cell_type_idx, seed, *_):
            """Random train cells of these types."""
            rng, codes = np.random.default_rng(seed), train.obs["cell_type"].cat.codes.to_numpy()
            yield train.X[[rng.choice(np.flatnonzero(codes == k)) for k in cell_type_idx]]

    output, counts = tmp_path / "generated.h5ad", generate(model, types, 0)
    ad.AnnData(counts, obs=test.obs.assign(sample="s"), var=test.var, uns={"generator": "gmvae"}).write_h5ad(output)
    settings = evaluate.Settings(50, 100, 2000, 50, 15, 20, 20, False, True, False, (1, 1, 1), None, 0)
    others = {"paper_gmvae": Copying(60, 3)}
    written = evaluate.evaluate(model, None, train, test, output, others, settings, tmp_path, tmp_path)
    assert {path.name for path in written} == {
        "paper_fig1.png", "paper_fig3.png", "paper_fig4.png", "umap.csv", "umap_original_vs_generated.png", "umap_by_cell_type.png",
        "composition.png", "type_correlation.png", "four_stages.png", "fidelity.png", "metrics.csv", "comparison.png", "comparison.csv",
    }  # fmt: skip
    assert all(path.stat().st_size > 100 for path in written)
    table = pd.read_csv(tmp_path / "comparison.csv", index_col=0)
    assert list(table.columns) == ["gmvae", "paper_gmvae", "real train cells"]
    assert table.loc["membership TPR at 1 % FPR", "gmvae"] < 0.1
    assert table.loc["membership TPR at 1 % FPR", "paper_gmvae"] > 0.5
    assert table.loc["membership AUC", "paper_gmvae"] > 0.75 > 0.6 > table.loc["membership AUC", "gmvae"]
    pooled = pd.read_csv(tmp_path / "metrics.csv").query("cells == 'all'").set_index("figure")
    np.testing.assert_array_equal(pooled["generated"], table["gmvae"])
    assert pooled.loc["forest AUC", "n_cells"] == 50 and pooled.loc["membership AUC", "n_cells"] == 200


@pytest.mark.slow
def test_reconstructed_cells_follow_their_own_input():
    """Not only the type: within a type, a cell's reconstruction correlates with the programme of its own input."""
    counts, types = simulated_cells(n_cells=600)
    model = trained_gmvae(counts, types, epochs=80)
    z, reconstructed = reconstruct(model, CellDataset(counts, types, CPU), seed=0)
    assert z.shape == (600, 4) and reconstructed.shape == counts.shape
    for k in range(3):
        x, y = (log_normalize(cells[types == k], 1e4).toarray() for cells in (counts, reconstructed))
        programme = np.linalg.svd(x - x.mean(axis=0), full_matrices=False)[2][0]
        assert np.corrcoef(x @ programme, y @ programme)[0, 1] > 0.4
    np.testing.assert_allclose(reconstructed.sum() / 600, counts.sum() / 600, rtol=0.05)


@pytest.mark.slow
def test_a_type_whose_cells_are_all_filtered_is_evaluated_as_absent(pipeline, tmp_path):
    """Ten types, one of which gets a single cell, far fewer than the small-cluster filter keeps."""
    types = list(ad.read_h5ad(pipeline.data / "test.h5ad").obs["cell_type"].cat.categories)
    pd.DataFrame([[1] + [40] * 9], index=["A"], columns=types).to_csv(tmp_path / "wanted.csv")
    options = FEW | {"OUTPUT": str(tmp_path / "cells.h5ad"), "FIG_DIR": str(tmp_path)}
    pipeline.main(STAGES[5], CELL_COUNTS=str(tmp_path / "wanted.csv"), MIN_CLUSTER_CELLS=60, **options)
    generated = ad.read_h5ad(tmp_path / "cells.h5ad")
    assert list(generated.obs["cell_type"].cat.categories) == types
    assert (generated.obs["cell_type"].value_counts() == 0).any()
    assert all((tmp_path / f"{name}.png").stat().st_size > 10_000 for name in ("composition", "type_correlation"))
