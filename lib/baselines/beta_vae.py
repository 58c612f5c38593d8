"""The beta-VAE of Bulk2Single: a new cell of a type is a train cell of that type, encoded, sampled and decoded.

    z | x ~ Normal(mean(x), variance(x))            genes-2048-1024-512-256, and the same in reverse
    loss  = |x - decoder(z)|^2 + 4 KL(q(z|x) || Normal(0, 1)),  x = log(1 + counts per 10,000), sums over genes and dimensions

Source: Bulk2Single in omicverse (Zeng et al., Nature Communications 15, 5983, 2024), after Bulk2Space (Liao et al., Nature
Communications 13, 6498, 2022); beta: Higgins et al., ICLR 2017. Sizes and settings are the published ones. Ours: how training
starts (otherwise, on pbmc3k, z stays unused and all generated types are alike) and that counts are sampled.
"""

from typing import cast

import torch
import torch.nn.functional as F
from torch import nn

from lib.baselines.expression_sampling import NORMALIZED_TOTAL, ExpressionVAE, fit_gene_ratio, mlp, select_train_cells
from lib.data.batches import Batch, CellDataset
from lib.models.gmvae import SparseLinear, scaled_columns
from lib.models.profiles import log_fold_changes, top_genes, type_profiles

SETTINGS = {
    "epochs": 5000, "batch_size": 512, "learning_rate": 1e-4, "weight_decay": 5e-4, "patience": 50, "optimizer": "adamw",
    "kl_weight": (0.0, 1.0), "kl_warmup_epochs": 100,
}  # fmt: skip
START_LOG_VARIANCE = -6.0  # of q(z|x)
START_MEAN_SCALE = 3  # factor of the weights of q(z|x)'s mean


class BetaVAE(ExpressionVAE):
    """hidden: layers of the encoder, and of the decoder in reverse; top_markers: of each type, that the encoder uses (None: all genes)."""

    is_used: torch.Tensor
    beta = 4.0

    def __init__(
        self, n_genes: int, n_cell_types: int, n_latent: int = 256, hidden: tuple[int, ...] = (2048, 1024, 512),
        top_markers: int | None = None,
    ):  # fmt: skip
        super().__init__(n_genes, n_cell_types, n_latent, hidden=tuple(hidden), top_markers=top_markers)
        self.top_markers = top_markers
        self.from_genes, self.from_genes_bias = SparseLinear(n_genes, hidden[0]), nn.Parameter(torch.zeros(hidden[0]))
        self.encoder = mlp((*hidden, 2 * n_latent), lambda _: [nn.ReLU()])
        self.decoder = mlp((n_latent, *reversed(hidden), n_genes), lambda _: [nn.ReLU()])
        self.register_buffer("is_used", torch.ones(n_genes))  # 1 for the genes that the encoder uses

    @torch.no_grad()
    def initialise(self, dataset: CellDataset) -> None:
        """Set the start: the decoder's bias to the train cells' mean expression, q(z|x) narrow; select the marker genes."""
        sums = (self.inputs(batch).to_dense().sum(dim=0) for batch in dataset.in_order(512))
        to_genes, to_z = cast(nn.Linear, self.decoder[-1]), cast(nn.Linear, self.encoder[-1])
        to_genes.bias.copy_(sum(sums, torch.zeros(())) / len(dataset))
        to_z.weight[: self.n_latent] *= START_MEAN_SCALE
        to_z.bias[self.n_latent :] = START_LOG_VARIANCE
        if self.top_markers is not None:
            fold_changes = log_fold_changes(NORMALIZED_TOTAL * type_profiles(dataset, self.n_cell_types))
            self.is_used.zero_()[top_genes(fold_changes, self.top_markers).ravel()] = 1.0

    def inputs(self, batch: Batch) -> torch.Tensor:
        return batch.log_normalized(NORMALIZED_TOTAL)

    def encode(self, inputs: torch.Tensor, cell_type_idx: torch.Tensor) -> torch.Tensor:
        hidden = self.from_genes(inputs if self.top_markers is None else scaled_columns(inputs, self.is_used))
        return self.encoder(F.relu(hidden + self.from_genes_bias))

    def decode(self, z: torch.Tensor, cell_type_idx: torch.Tensor) -> torch.Tensor:
        return self.decoder(z)

    def expression(self, decoded: torch.Tensor) -> torch.Tensor:
        return decoded

    @torch.no_grad()
    def fit_prior(self, dataset: CellDataset, seed: int) -> None:
        """Keep q(z|x) of train cells, from which new cells are sampled."""
        batches = ((self.inputs(batch), batch.cell_type_idx) for batch in dataset.in_order(512))
        q_z = torch.cat([torch.stack(self.q_z(*batch), dim=1).cpu() for batch in batches])
        self.prior = select_train_cells(dataset, self.n_cell_types, seed)
        self.prior["z"] = q_z[self.prior["rows"]]  # (n_selected, 2, n_latent): mean, log-variance
        self.prior["gene_ratio"] = fit_gene_ratio(self, dataset, seed)
