"""The six commands of the published run (README), in small, and the settings that only this run needs."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from helpers import STAGES, Workplace, simulated_dataset, split_only

from lib.data.datasets import load as load_dataset
from lib.training import load_checkpoint

OPTIONS = [  # of stages 1 to 5
    "--min-cluster-cells 20", "--n-train-samples 600 --cells-per-sample 100", "--epochs 3", "--epochs 2",
    "--max-cells-evaluated 60 --max-cells-plotted 100",
]  # fmt: skip


@pytest.mark.slow
def test_the_published_run_in_small(tmp_path):
    """All stages with PRESET = "paper" and few epochs; every gene has a length, as almost all of GSE130148 have."""
    place = Workplace(tmp_path)
    genes = load_dataset("pbmc68k_reduced", tmp_path, "", None).cells.gene_names
    lengths = pd.DataFrame({"gene": genes, "bp": range(500, 500 + len(genes))})
    lengths.to_csv(tmp_path / "lengths.csv", index=False)
    place.run(STAGES[0], "--dataset", "pbmc68k_reduced", "--gene-lengths", str(tmp_path / "lengths.csv"))
    for stage, words in zip(STAGES[1:], OPTIONS):
        place.run(stage, "--preset", "paper", *words.split())
    train, test, generated = map(place.cells, ("train", "test", "generated"))
    assert all(name.startswith("cluster ") for name in train.obs["cell_type"].cat.categories)
    assert generated.uns["generator"] == "paper_gmvae" and generated.n_obs == test.n_obs
    assert generated.obs["cell_type"].nunique() > 1 and (generated.X.data == generated.X.data.round()).all()
    mixtures = ad.read_h5ad(place.data / "pseudobulk_train.h5ad", backed="r")
    assert (mixtures.obs["role"] == "fit").all() and "gene_length_bp" in mixtures.var
    sctape = load_checkpoint(place.models / "sctape.pt", STAGES[4])
    assert sctape["arguments"]["minmax"] and sctape["arguments"]["dropout"] == 0.5 and sctape["epoch"] == 2
    assert len(sctape["gene_names"]) == int(0.85 * train.n_vars)
    assert torch.equal(sctape["weights"]["gene_scale"], torch.ones(len(sctape["gene_names"])))
    gmvae = load_checkpoint(place.models / "paper_gmvae.pt", STAGES[3])
    assert gmvae["epoch"] == 3 and gmvae["settings"]["batch_size"] == 37
    assert "sctape" in set(pd.read_csv(place.fig / "mixtures.csv")["deconvolution"])
    for number in (1, 3, 4):
        assert (place.fig / f"paper_fig{number}.png").exists()
    done = place.run(STAGES[4], "--preset", "paper", "--patience", "3", check=False)
    assert "PATIENCE is 3, but data/pseudobulk_train.h5ad has no mixtures of held-out cells" in done.stderr


def test_genes_may_be_counted_in_test_cells_as_well(tmp_path):
    """Genes that one to six cells hold, and a threshold of three."""
    adata = simulated_dataset(n_cells=90)
    rng, counts = np.random.default_rng(0), adata.X.toarray()
    for gene in range(40):
        counts[:, gene] = 0
        counts[rng.permutation(90)[: gene % 6 + 1], gene] = 1
    adata.X = sp.csr_matrix(counts)
    place = split_only(tmp_path, adata, COUNT_TEST_CELLS=True, MIN_CELLS=3)
    kept = set(place.cells("train").var_names)
    held_by = [f"GENE{gene}" for gene in range(40) if gene % 6 + 1 >= 3]
    assert {f"GENE{gene}" for gene in range(40)} & kept == set(held_by)
