"""Stage 5 beside its defaults: four stages, tables of proportions, replicates, numbers of cells, several generators."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from helpers import CPU, FEW, STAGES, simulated_cells, trained_gmvae

from lib.bulk.pseudobulk import largest_remainder
from lib.data.batches import CellDataset
from lib.data.counts import log_normalize
from lib.models.sampling import reconstruct


@pytest.mark.slow
def test_reconstructed_cells_follow_their_own_input():
    """Not only the type: within a type, a cell's reconstruction correlates with the programme of its own input."""
    counts, types = simulated_cells(n_cells=600)
    model = trained_gmvae(counts, types, epochs=80)
    z, reconstructed = reconstruct(model, CellDataset(counts, types, CPU), seed=0)
    assert z.shape == (600, 4) and reconstructed.shape == counts.shape
    values, ours = (log_normalize(cells, 1e4).toarray() for cells in (counts, reconstructed))
    own = []
    for k in range(3):
        x, y = values[types == k], ours[types == k]
        programme = np.linalg.svd(x - x.mean(axis=0), full_matrices=False)[2][0]
        own.append(np.corrcoef((x - x.mean(axis=0)) @ programme, (y - y.mean(axis=0)) @ programme)[0, 1])
    assert min(own) > 0.4
    np.testing.assert_allclose(reconstructed.sum() / 600, counts.sum() / 600, rtol=0.05)


@pytest.mark.slow
def test_kept_proportions_are_used_again_and_all_four_stages_are_plotted(pipeline, tmp_path):
    kept = pd.read_csv(pipeline.data / "predicted_proportions.csv", index_col=0)
    two = pd.concat([kept, kept.iloc[:, ::-1].set_axis(kept.columns, axis=1).rename(index=lambda _: "turned")])
    two.drop(columns=two.columns[(two == 0).all()]).to_csv(tmp_path / "kept.csv")
    options = FEW | {
        "OUTPUT": str(tmp_path / "cells.h5ad"),
        "FIG_DIR": str(tmp_path),
        "PROPORTIONS_FILE": str(tmp_path / "kept.csv"),
    }
    pipeline.main(STAGES[5], N_CELLS=80, FOUR_STAGES=True, **options)
    generated = ad.read_h5ad(tmp_path / "cells.h5ad")
    made = pd.crosstab(generated.obs["sample"], generated.obs["cell_type"], dropna=False).loc[two.index, kept.columns]
    np.testing.assert_array_equal(made, largest_remainder(two.div(two.sum(axis=1), axis=0).to_numpy(), 80))
    for name in ("four_stages", "composition", "type_correlation"):
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000
    for edit, message in (
        (lambda t: t * 2, "must hold proportions"),
        (lambda t: t.rename(columns={t.columns[0]: "Unicorn"}), "unknown: Unicorn"),
    ):
        edit(two).to_csv(tmp_path / "kept.csv")
        with pytest.raises(ValueError, match=message):
            pipeline.main(STAGES[5], **options)
    with pytest.raises(ValueError, match="CELL_COUNTS and PROPORTIONS_FILE are both set"):
        pipeline.main(STAGES[5], CELL_COUNTS="test", **options)


def test_a_number_of_cells_of_each_type_without_small_clusters(pipeline, tmp_path, capsys):
    options = FEW | {"OUTPUT": str(tmp_path / "cells.h5ad"), "FIG_DIR": str(tmp_path)}
    pipeline.main(STAGES[5], CELL_COUNTS="12", MIN_CLUSTER_CELLS=2, EVALUATE=False, **options)
    generated = ad.read_h5ad(tmp_path / "cells.h5ad")
    out = capsys.readouterr().out
    dropped = int(out.split("small-cluster filter: ")[1].split(" of ")[0])
    assert generated.n_obs == 12 * 10 - dropped and (generated.obs["cell_type"].value_counts() <= 12).all()


def test_options_that_do_not_fit_together_are_refused_before_any_work(pipeline, tmp_path):
    """The folder of models is empty: a message about a missing model would mean that work had begun."""
    for options, message in (
        ({"GENERATOR": "beta_vae", "FOUR_STAGES": True}, "FOUR_STAGES needs the GMVAE, but GENERATOR is beta_vae"),
        (
            {"GENERATOR": "pca_cvae", "DECONVOLUTION": "bulk_encoder"},
            "'bulk_encoder' needs the GMVAE, but GENERATOR is pca_cvae",
        ),
        ({"REPLICATES": "groups.csv"}, "REPLICATES is set, but BULK_FILE is none"),
    ):
        with pytest.raises(ValueError, match=message):
            pipeline.main(STAGES[5], MODELS_DIR=str(tmp_path), **options)
    for name in ("BULK_FILE", "GENE_IDS", "PROPORTIONS_FILE", "CLASS_FILE"):
        with pytest.raises(FileNotFoundError, match="no_such_file.csv does not exist"):
            pipeline.main(STAGES[5], MODELS_DIR=str(tmp_path), **{name: "no_such_file.csv"})


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
    assert (tmp_path / "composition.png").stat().st_size > 10_000 and (
        tmp_path / "type_correlation.png"
    ).stat().st_size > 10_000


def test_replicates_are_one_sample(pipeline, tmp_path):
    import _5_generate as stage

    tpm = pd.read_csv(pipeline.data / "pseudobulk_test_tpm.csv", index_col=0).iloc[:3].rename_axis(None)
    tpm.to_csv(tmp_path / "bulk.csv")
    pd.DataFrame({"sample": ["own_1", "own_3"], "group": "together"}).to_csv(tmp_path / "groups.csv", index=False)
    stage.BULK_FILE, stage.BULK_UNITS, stage.REPLICATES = (
        str(tmp_path / "bulk.csv"),
        "tpm",
        str(tmp_path / "groups.csv"),
    )
    test = ad.read_h5ad(pipeline.data / "test.h5ad")
    bulk = stage.read_bulk_samples(list(test.var_names), test, None)
    stage.BULK_FILE = stage.REPLICATES = None
    np.testing.assert_allclose(bulk.loc["together"], tpm.iloc[[0, 2]].mean(), rtol=1e-3, atol=0.01)


@pytest.mark.slow
def test_several_generators_are_compared(pipeline, tmp_path):
    models = tmp_path / "models"
    models.mkdir()
    for name in ("gmvae.pt", "sctape.pt"):
        (models / name).write_bytes((pipeline.models / name).read_bytes())
    pipeline.main(
        STAGES[3], GENERATOR="conv_cvae", OTHER_EPOCHS=1, MODELS_DIR=str(models), FIG_DIR=str(tmp_path), DEVICE="cpu"
    )
    pipeline.main(
        STAGES[5],
        CELL_COUNTS="test",
        OUTPUT=str(tmp_path / "cells.h5ad"),
        MODELS_DIR=str(models),
        FIG_DIR=str(tmp_path),
        DEVICE="cpu",
        MAX_CELLS_PLOTTED=120,
    )
    table = pd.read_csv(tmp_path / "comparison.csv", index_col=0)
    assert list(table.columns) == ["gmvae", "conv_cvae", "real train cells"] and not table.isna().any(axis=None)
    assert table.loc["forest AUC", "gmvae"] < table.loc["forest AUC", "conv_cvae"]  # one epoch
    assert (tmp_path / "comparison.png").stat().st_size > 10_000
    torch.load(models / "conv_cvae.pt", weights_only=True)
