"""The conditional VAE of Generative genomics: it models principal components, which are transformed back to genes.

    c        ((x - mean) / scale) @ vectors,  x = log(1 + counts per 10,000); mean and scale (standard deviation) of each gene
    z | c, y ~ Normal(mean(c, y), variance(c, y))   label embedding 64; 2048-1024-512-256, to 512; GELU, dropout, LayerNorm
    loss     = |c - decoder(z, y)|^2 + weight x KL(q(z|c,y) || Normal(0, 1)),  weight from 0.1 to 1 over ten epochs

Batches are class-balanced: each type is sampled equally often. The learning rate follows the first half of one cycle.
Source: the Generative genomics project (RodMcN/generative-genomics: its README, configuration and sources), for 828,328 cells. Ours:
fewer components and smaller batches where the data are smaller, the best of all epochs, and how counts are sampled.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np
import scipy.sparse as sp
import torch
from sklearn.decomposition import IncrementalPCA
from sklearn.preprocessing import StandardScaler
from torch import nn

from lib.baselines.expression_sampling import NORMALIZED_TOTAL, ExpressionVAE, mlp
from lib.data.batches import Batch, CellDataset
from lib.data.counts import log_normalize
from lib.models.gmvae import scaled_columns

SETTINGS = {
    "epochs": 100, "batch_size": 5000, "learning_rate": 1e-3, "weight_decay": 1e-3, "patience": 100, "optimizer": "adamw",
    "balanced": True, "cycle": 2.0, "kl_weight": (0.1, 1.0), "kl_warmup_epochs": 9,
    "min_batches": 8,  # of an epoch: smaller data have smaller batches (ours)
}  # fmt: skip
MIN_BLOCK_CELLS = 1024  # cells in one step of the components' fit, at least, dense: 50-100 MB
MIN_SCALE = 1e-3  # a gene that hardly varies is divided by this at least


class Components(NamedTuple):
    """Principal components of standardised genes; all arrays float32."""

    mean: np.ndarray  # (n_genes,)
    scale: np.ndarray  # (n_genes,)
    vectors: np.ndarray  # (n_genes, n_components), orthonormal

    def transform(self, counts: sp.csr_matrix) -> np.ndarray:
        """Components of cells, (n_cells, n_components), from raw counts, n_cells x n_genes."""
        weights = self.vectors / self.scale[:, None]
        return np.asarray(log_normalize(counts, NORMALIZED_TOTAL) @ weights) - self.mean @ weights


def fit_components(blocks: Callable[[], Iterable[sp.csr_matrix]], n_wanted: int) -> Components:
    """Fit principal components to cells, at most as many as cells or genes; only one block of the cells is dense at a time.

    blocks: gives the raw counts of the cells, block by block; called twice.
    """
    scaler = StandardScaler(with_mean=False)
    for counts in blocks():
        scaler.partial_fit(log_normalize(counts, NORMALIZED_TOTAL).astype(np.float64))
    n_cells, n_genes = int(scaler.n_samples_seen_), len(scaler.scale_)
    n = min(n_wanted, n_cells, n_genes)
    if n < n_wanted:
        print(f"{n:,} principal components instead of {n_wanted:,}: {n_cells:,} cells, {n_genes:,} genes")
    scale, pca = np.maximum(scaler.scale_, MIN_SCALE).astype(np.float32), IncrementalPCA(n)
    for counts in _joined(blocks(), max(MIN_BLOCK_CELLS, n)):
        pca.partial_fit(log_normalize(counts, NORMALIZED_TOTAL).toarray() / scale)
    return Components(scaler.mean_.astype(np.float32), scale, pca.components_.T.astype(np.float32))


def _joined(blocks: Iterable[sp.csr_matrix], size: int) -> Iterator[sp.csr_matrix]:
    """The same rows in blocks of at least `size`, except for the last."""
    parts: list[sp.csr_matrix] = []
    for block in blocks:
        parts.append(block)
        if sum(part.shape[0] for part in parts) >= size:
            yield sp.vstack(parts, format="csr")
            parts = []
    if parts:
        yield sp.vstack(parts, format="csr")


class PCACVAE(ExpressionVAE):
    """n_pcs: principal components; hidden: layers of the encoder, and of the decoder in reverse; n_label: of the label embedding."""

    components: torch.Tensor
    gene_mean: torch.Tensor
    gene_scale: torch.Tensor

    def __init__(
        self, n_genes: int, n_cell_types: int, n_pcs: int = 2500, n_latent: int = 512,
        hidden: tuple[int, ...] = (2048, 1024, 512, 256), n_label: int = 64, dropout: float = 0.25,
    ):  # fmt: skip
        more = {"n_pcs": n_pcs, "hidden": tuple(hidden), "n_label": n_label, "dropout": dropout}
        super().__init__(n_genes, n_cell_types, n_latent, **more)
        self.label = nn.Embedding(n_cell_types, n_label)

        def after_linear(n_units: int) -> list[nn.Module]:
            return [nn.GELU(), nn.Dropout(dropout), nn.LayerNorm(n_units)]

        self.encoder = mlp((n_pcs + n_label, *hidden, 2 * n_latent), after_linear)
        self.decoder = mlp((n_latent + n_label, *reversed(hidden), n_pcs), after_linear)
        self.register_buffer("components", torch.zeros(n_genes, n_pcs))
        self.register_buffer("gene_mean", torch.zeros(n_genes))
        self.register_buffer("gene_scale", torch.ones(n_genes))

    @torch.no_grad()
    def initialise(self, dataset: CellDataset) -> None:
        """Fit the principal components to the train cells; the networks get fewer inputs where the data have fewer components."""
        fitted = fit_components(lambda: (counts for counts, _ in dataset.blocks()), self.arguments["n_pcs"])
        n_pcs = fitted.vectors.shape[1]
        if n_pcs < self.arguments["n_pcs"]:
            PCACVAE.__init__(self, **self.arguments | {"n_pcs": n_pcs})
        for buffer, values in zip((self.gene_mean, self.gene_scale, self.components), fitted):
            buffer.copy_(torch.from_numpy(values))

    def inputs(self, batch: Batch) -> torch.Tensor:
        x = scaled_columns(batch.log_normalized(NORMALIZED_TOTAL), 1 / self.gene_scale)
        return x @ self.components - (self.gene_mean / self.gene_scale) @ self.components

    def encode(self, inputs: torch.Tensor, cell_type_idx: torch.Tensor) -> torch.Tensor:
        return self.encoder(torch.cat([inputs, self.label(cell_type_idx)], dim=1))

    def decode(self, z: torch.Tensor, cell_type_idx: torch.Tensor) -> torch.Tensor:
        return self.decoder(torch.cat([z, self.label(cell_type_idx)], dim=1))

    def expression(self, decoded: torch.Tensor) -> torch.Tensor:
        return self.gene_mean + self.gene_scale * (decoded @ self.components.T)
