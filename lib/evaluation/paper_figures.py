"""Figures 1 and 3 of the paper at the end of stage 5: what they show is collected here and drawn by plots_paper.py.

Figure 4 is drawn with the other figures of cells (report.py).
"""

from pathlib import Path
from typing import Any, NamedTuple

import anndata as ad
import numpy as np
import pandas as pd
from torch import nn

from lib.bulk.bulk_encoder import BulkEncoder
from lib.bulk.deconvolution import Estimate
from lib.bulk.sctape import ScTAPE
from lib.data.counts import select_cells
from lib.data.embedding import embed, principal_components
from lib.evaluation import metrics, plots_paper
from lib.evaluation.plots_paper import Architecture
from lib.models.gmvae import GMVAE
from lib.models.paper_gmvae import PaperGMVAE

N_PCS, N_NEIGHBORS, MIN_DIST = 50, 15, 0.375  # of the UMAP of fig. 3 (original code), on all genes


class Deconvolution(NamedTuple):
    """What stage 5 knows about the proportions of its bulk."""

    method: str
    checkpoint: dict[str, Any]  # of stage 4
    estimate: Estimate
    of_test_cells: bool  # whether the bulk is the sum of the test cells


def write(
    model: nn.Module, deconvolution: Deconvolution | None, test: ad.AnnData, generated: ad.AnnData, max_cells: int, fig: Path,
    seed: int,
) -> list[Path]:  # fmt: skip
    """Draw paper_fig1.png (of a GMVAE; other generators have other parts) and paper_fig3.png, with at most `max_cells` cells a set."""
    written = []
    if isinstance(model, GMVAE | PaperGMVAE):
        layers = None if deconvolution is None else layers_of(deconvolution)
        written.append(fig / "paper_fig1.png")
        plots_paper.figure_1(architecture_of(model), layers, written[-1])
    rng = np.random.default_rng([seed, 3])
    parts = (select_cells(cells, np.sort(rng.permutation(cells.n_obs)[:max_cells])) for cells in (test, generated))
    both = ad.concat(dict(zip(("original", "generated"), parts)), label="source", index_unique="-")
    types = test.obs["cell_type"].cat.categories
    umap = embed(principal_components(both, None, N_PCS), N_NEIGHBORS, seed, MIN_DIST).obsm["X_umap"]
    found, error = None, float("nan")
    if deconvolution is not None and deconvolution.of_test_cells:
        true = test.obs["cell_type"].value_counts(normalize=True)[types]
        found = pd.DataFrame({"predicted": deconvolution.estimate.proportions.iloc[0][types], "true": true})
        error = metrics.mae(found["true"], found["predicted"])
    written.append(fig / "paper_fig3.png")
    cell_type = pd.Series(pd.Categorical(both.obs["cell_type"], categories=types), both.obs.index)
    is_generated = (both.obs["source"] == "generated").to_numpy()
    plots_paper.figure_3(found, error, umap, is_generated, cell_type, written[-1])
    return written


def layers_of(deconvolution: Deconvolution) -> tuple[str, tuple[int, ...]]:
    """Name of what predicts the proportions, and the sizes of its layers from genes to cell types."""
    arguments = deconvolution.checkpoint["arguments"]
    if deconvolution.method.startswith("sctape"):
        return "scTAPE", sizes_of(ScTAPE(**arguments).encoder)
    if deconvolution.method == "bulk_encoder":
        encoder = BulkEncoder(**arguments)
        return "bulk encoder", (*sizes_of(encoder.body), arguments["n_cell_types"])
    assert deconvolution.estimate.signature is not None
    n_types, n_genes = deconvolution.estimate.signature.shape
    return "regression on profiles", (n_genes, n_types)


def architecture_of(model: GMVAE | PaperGMVAE) -> Architecture:
    """Sizes of the networks of a trained GMVAE."""
    return _our_architecture(model) if isinstance(model, GMVAE) else _paper_architecture(model)


def _paper_architecture(model: PaperGMVAE) -> Architecture:
    n_genes = len(model.q_genes.weight)
    p_z = {"mean": sizes_of(model.p_z_y_mean), "log-variance": sizes_of(model.p_z_y_log_var)}
    towers = {"extra zeros": model.p_x_z_zeros, "mean": model.p_x_z_mean, "dispersion": model.p_x_z_theta}
    heads = {name: sizes_of(head) for name, head in towers.items()}
    return Architecture(
        name="Gaussian-mixture VAE (paper)", input="raw counts", q_y=(n_genes, *sizes_of(model.q_y_x)),
        q_z={"mean": (n_genes, *sizes_of(model.q_z_xy_mean)), "log-variance": (n_genes, *sizes_of(model.q_z_xy_log_var))},
        p_z=p_z, trunk=sizes_of(model.p_x_z_trunk), heads=heads, new_z=p_z, new_heads=heads,
        prior="z sampled from p(z|y), counts from the ZINB",
    )  # fmt: skip


def _our_architecture(model: GMVAE) -> Architecture:
    n_genes, has_prior = model.n_genes, model.prior is not None
    p_z: dict[str, tuple[int, ...]] = dict.fromkeys(("mean", "log-variance"), (model.n_cell_types, model.n_latent))
    heads = {"mean / library size": sizes_of(model.p_x_zyl_log_mean), "dispersion\n(parameters)": (n_genes,)}
    if model.p_x_zyl_zi_logits is not None:
        heads["extra zeros"] = sizes_of(model.p_x_zyl_zi_logits)
    library = {"library size": sizes_of(model.p_l_zy_mean)}
    return Architecture(
        name="Gaussian-mixture VAE (ours)", input="log-normalised counts,\nlibrary size",
        q_y=(n_genes, *sizes_of(model.q_y_x)),
        q_z={"mean": (n_genes, model.n_latent), "log-variance": sizes_of(model.q_z_xy_log_var)},
        p_z=p_z, trunk=(model.n_latent,), heads=heads | library,
        new_z={"train cells\nof type": (model.n_cell_types, model.n_latent + 1)} if has_prior else p_z,
        new_heads=heads if has_prior else heads | library,
        prior=f"z and library size sampled from {'train cells' if has_prior else 'p(z|y) p(l|z,y)'}, then counts",
    )  # fmt: skip


def sizes_of(network: nn.Module) -> tuple[int, ...]:
    """Input of the first linear layer, and outputs of all, of a sequence of layers."""
    linear = [layer for layer in network.modules() if isinstance(layer, nn.Linear)]
    return (linear[0].in_features, *(layer.out_features for layer in linear))
