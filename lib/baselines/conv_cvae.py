"""DeepConvCVAE: a convolutional conditional VAE on cells arranged as square images, one pixel per gene.

    image        log(1 + counts per 10,000) / its largest value, genes in their order; zeros fill a square with a multiple of 4 as side
    encoder      image and a label image (dense, K to pixels); conv 16 and 32, kernel 3, stride 2; dense 16; z of 2 dimensions
    decoder      z and label; dense to the encoder's last image; transposed conv 16, 8 (stride 2) and 1; sigmoid
    loss         mean squared error x pixels + KL(q(z|x,y) || Normal(0, 1));  RMSprop, batches of 32

With 144 x 144 pixels and 11 types it has the published 1,503,877 parameters. Source: DeepConvCVAE of UMIche, 68k PBMC. As in its
later version, counts are zero-inflated negative binomial. Ours: theta and extra zeros are estimated by moments within the types.
"""

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from lib.baselines.expression_sampling import NORMALIZED_TOTAL, ExpressionVAE
from lib.data.batches import Batch, CellDataset
from lib.data.counts import log_normalize
from lib.models.profiles import GeneMarginals, gene_marginals

SETTINGS = {
    "epochs": 50, "batch_size": 32, "learning_rate": 1e-3, "weight_decay": 0.0, "patience": 50, "optimizer": "rmsprop",
}  # fmt: skip
KERNEL, STRIDE = 3, 2  # of the convolutions


class ConvCVAE(ExpressionVAE):
    """filters: of the first convolution, half as many as of the second; n_dense: units between convolutions and z."""

    largest: torch.Tensor

    def __init__(self, n_genes: int, n_cell_types: int, n_latent: int = 2, filters: int = 16, n_dense: int = 16):
        super().__init__(n_genes, n_cell_types, n_latent, filters=filters, n_dense=n_dense)
        encoded_side = math.ceil(math.sqrt(n_genes) / STRIDE**2)
        self.side = side = encoded_side * STRIDE**2  # of the image: the smallest that holds the genes
        encoded_shape = (2 * filters, encoded_side, encoded_side)
        n_encoded = math.prod(encoded_shape)
        same: dict[str, Any] = {"kernel_size": KERNEL, "padding": KERNEL // 2}  # Keras' "same" for an odd kernel
        up: dict[str, Any] = same | {"stride": STRIDE, "output_padding": STRIDE - 1}
        self.label_image = nn.Linear(n_cell_types, side**2)
        self.encoder = nn.Sequential(
            nn.Conv2d(2, filters, stride=STRIDE, **same), nn.ReLU(),
            nn.Conv2d(filters, 2 * filters, stride=STRIDE, **same), nn.ReLU(),
            nn.Flatten(), nn.Linear(n_encoded, n_dense), nn.ReLU(), nn.Linear(n_dense, 2 * n_latent),
        )  # fmt: skip
        self.decoder = nn.Sequential(
            nn.Linear(n_latent + n_cell_types, n_encoded), nn.ReLU(), nn.Unflatten(1, encoded_shape),
            nn.ConvTranspose2d(2 * filters, filters, **up), nn.ReLU(),
            nn.ConvTranspose2d(filters, max(filters // 2, 1), **up), nn.ReLU(),
            nn.ConvTranspose2d(max(filters // 2, 1), 1, **same), nn.Sigmoid(),
        )  # fmt: skip
        self.register_buffer("largest", torch.tensor(1.0))

    def initialise(self, dataset: CellDataset) -> None:
        """Set the scale of the images: the largest value of the train cells becomes 1, the largest output of the sigmoid."""
        largest = max(log_normalize(counts, NORMALIZED_TOTAL).max() for counts, _ in dataset.blocks())
        self.largest.fill_(float(largest))

    def inputs(self, batch: Batch) -> torch.Tensor:
        """Cells as images: (n_cells, 1, side, side), between 0 and 1."""
        pixels = batch.log_normalized(NORMALIZED_TOTAL).to_dense() / self.largest
        return F.pad(pixels, (0, self.side**2 - self.n_genes)).view(-1, 1, self.side, self.side)

    def encode(self, inputs: torch.Tensor, cell_type_idx: torch.Tensor) -> torch.Tensor:
        labels = self.label_image(F.one_hot(cell_type_idx, self.n_cell_types).float()).view(inputs.shape)
        return self.encoder(torch.cat([inputs, labels], dim=1))

    def decode(self, z: torch.Tensor, cell_type_idx: torch.Tensor) -> torch.Tensor:
        return self.decoder(torch.cat([z, F.one_hot(cell_type_idx, self.n_cell_types)], dim=1))

    def expression(self, decoded: torch.Tensor) -> torch.Tensor:
        return decoded.flatten(1)[:, : self.n_genes] * self.largest

    def fit_prior(self, dataset: CellDataset, seed: int) -> None:
        """Keep also dispersion and extra zeros of each gene."""
        super().fit_prior(dataset, seed)
        marginals = gene_marginals(dataset, self.n_cell_types)
        self.prior["log_theta"] = torch.from_numpy(marginals.log_theta).float()
        self.prior["zi_logits"] = torch.logit(torch.from_numpy(extra_zeros(dataset, marginals)).float(), eps=1e-6)


def extra_zeros(dataset: CellDataset, marginals: GeneMarginals) -> np.ndarray:
    """Estimate the probability of an extra zero of each gene by moments: (n_genes,), within [0, 0.95].

    (observed zeros - expected zeros) / (n_cells - expected zeros), expected under NB(mu = library size x profile of the type, theta).
    """
    profiles, theta = marginals.profiles, np.exp(marginals.log_theta)
    observed, expected, n_cells = 0.0, 0.0, 0
    for counts, cell_type_idx in dataset.blocks():
        for rows in np.array_split(np.flatnonzero(cell_type_idx >= 0), -(-len(cell_type_idx) // 256)):
            mu = np.asarray(counts[rows].sum(axis=1)).reshape(-1, 1) * profiles[cell_type_idx[rows]]
            expected = expected + np.exp(-theta * np.log1p(mu / theta)).sum(axis=0)
            observed = observed + len(rows) - counts[rows].getnnz(axis=0)
            n_cells += len(rows)
    return np.clip((observed - expected) / np.maximum(n_cells - expected, 1e-9), 0, 0.95)
