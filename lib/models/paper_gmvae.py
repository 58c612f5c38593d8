"""The Gaussian-mixture VAE as published (bulk2sc_GMVAE, fig. 1), without any change of ours. `PRESET = "paper"` trains it.

    q(y|x), q(z|x,y)    Categorical, genes-128-K; Normal, two towers (genes + K)-128-64-32 for mean and log-variance
    p(z|y), p(x|z)      Normal, two towers K-128-32; ZINB, 32-64, then three towers 64-128-genes for mean, theta and extra zeros

x are raw counts; there is no library size. Layers are followed by ReLU; mean and theta are ELU + 1 of their towers, and the probability
of an extra zero is the sigmoid of its own. The facts that the paper's text leaves open (ReLU, ELU + 1, one sample of z for each type,
1e-10) are those of the authors' ZINB sources (wdnlotm/bulk2sc_GMVAE_NB). The published loss is summed over the cells of a batch, here
it is their mean: Adam takes the same steps for both. Kingma et al. 2014 (arXiv:1406.5298) and Jiang et al. 2017 (VaDE) describe the method.
"""

import math
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import scipy.sparse as sp
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib.data.batches import Batch, CellDataset
from lib.models.gmvae import LogEluPlusOne, Prior, SparseLinear
from lib.models.likelihoods import Densities, Likelihood, gaussian_kl, importance_weighted
from lib.models.sampling import random_streams

SETTINGS = {
    "epochs": 4000, "batch_size": 37, "learning_rate": 6e-6, "weight_decay": 0.0, "patience": None, "optimizer": "adamw",
    "keep_every": 1000,
}  # fmt: skip
LOG_EPSILON = math.log(1e-10)  # of the published loss
NEGLIGIBLE = 2.0**-25  # half the distance of float32 numbers below 1: a type with smaller q(y|x) is not decoded


class PaperGMVAE(nn.Module):
    """n_latent: dimensions of z; hidden: layers of q(z|x,y) from the genes down, and of p(x|z) in reverse."""

    def __init__(self, n_genes: int, n_cell_types: int, n_latent: int = 32, hidden: tuple[int, int] = (128, 64)):
        super().__init__()
        self.arguments = dict(n_genes=n_genes, n_cell_types=n_cell_types, n_latent=n_latent, hidden=tuple(hidden))
        self.n_cell_types, self.n_latent = n_cell_types, n_latent
        self.epsilon_shape = (n_cell_types, n_latent)  # a sample of z for each type
        wide, narrow = hidden
        # First layers of q(y|x) and of the two towers of q(z|x,y): one product with the genes, and what is added to it
        self.q_genes = SparseLinear(n_genes, 3 * wide)
        self.q_y_x_bias = nn.Parameter(torch.empty(wide))
        self.q_z_xy_types = nn.Linear(n_cell_types, 2 * wide)
        for parameter in (self.q_genes.weight, self.q_y_x_bias, *self.q_z_xy_types.parameters()):
            nn.init.uniform_(parameter, -(n_genes**-0.5), n_genes**-0.5)  # torch's start of a dense layer
        self.q_y_x = nn.Linear(wide, n_cell_types)
        self.q_z_xy_mean, self.q_z_xy_log_var = (tower(wide, narrow, n_latent) for _ in range(2))
        self.p_z_y_mean, self.p_z_y_log_var = (tower(n_cell_types, wide, n_latent) for _ in range(2))
        self.p_x_z_trunk = nn.Sequential(nn.Linear(n_latent, narrow), nn.ReLU())
        self.p_x_z_zeros, self.p_x_z_mean, self.p_x_z_theta = (tower(narrow, wide, n_genes) for _ in range(3))
        self.prior: Prior = {}  # nothing: new cells come from p(z|y)

    def q(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """log q(y|x), (n_cells, K), and mean and log-variance of q(z|x,y) for every type y, each (n_cells, K, n_latent)."""
        for_y, for_z = self.q_genes(batch.raw()).split([len(self.q_y_x_bias), 2 * len(self.q_y_x_bias)], dim=1)
        log_q_y = F.log_softmax(self.q_y_x(F.relu(for_y + self.q_y_x_bias)), dim=1)
        for_mean, for_log_var = (for_z[:, None] + self.q_z_xy_types(self.types)).relu().chunk(2, dim=2)
        return log_q_y, self.q_z_xy_mean(for_mean), self.q_z_xy_log_var(for_log_var)

    def p_z(self) -> tuple[Tensor, Tensor]:
        """p(z|y) of every type: mean and log-variance, each (K, n_latent)."""
        return self.p_z_y_mean(self.types), self.p_z_y_log_var(self.types)

    def p_x(self, z: Tensor) -> Likelihood:
        """p(x|z). z: (n_cells, n_latent)."""
        h = self.p_x_z_trunk(z)
        of_mean, of_theta = self.p_x_z_mean(h), self.p_x_z_theta(h)
        log_mean, log_theta = (LogEluPlusOne.apply(x.clamp(min=LOG_EPSILON)) for x in (of_mean, of_theta))
        return Likelihood(log_mean, None, log_theta, self.p_x_z_zeros(h))

    @property
    def types(self) -> Tensor:
        """One-hot vectors of the types, (K, K)."""
        return torch.eye(self.n_cell_types, dtype=self.q_y_x_bias.dtype, device=self.q_y_x_bias.device)

    def forward(self, batch: Batch, epsilon: Tensor) -> dict[str, Tensor]:
        """Mean loss per cell and its parts, in nats. epsilon: (n_cells, K, n_latent), standard normal.

        The loss of a cell with label c is the exact sum over all types, with one sample z_y ~ q(z|x,y) for each,

            sum over y of q(y|x) [KL(q(z|x,y) || p(z|y)) - log p(x|z_y)] + KL(q(y|x) || c).

        In the last KL, c has probability 1 and every other type 1e-10 (the constant that the published loss adds in its logarithms, and
        to mean and theta; here they are at least 1e-10). The published code decodes every type. Here a type is decoded for a cell only
        if its weight q(y|x) is at least `NEGLIGIBLE`; the others count as the weighted mean of the decoded ones. Neither the loss nor
        its gradient change in float32.
        """
        log_q_y, q_mean, q_log_var = self.q(batch)
        q_y = log_q_y.exp()
        kl_z = (q_y * gaussian_kl((q_mean, q_log_var), self.p_z())).sum(dim=1)
        z = q_mean + (0.5 * q_log_var).exp() * epsilon
        cells, types = (q_y >= NEGLIGIBLE).nonzero(as_tuple=True)
        weights = q_y[cells, types] / torch.zeros_like(kl_z).index_add(0, cells, q_y[cells, types])[cells]
        log_p_x = self.p_x(z[cells, types]).log_prob(batch.select(cells))
        label = self.types[batch.cell_type_idx]
        kl_y = (q_y * (log_q_y - LOG_EPSILON * (1 - label))).sum(dim=1)
        terms = {"reconstruction_loss": -weights * log_p_x, "kl_z": kl_z, "kl_y": kl_y}
        # a process whose share of a batch has no cell adds 0
        means = {name: value.sum() / max(1, batch.n_cells) for name, value in terms.items()}
        return {"loss": means["reconstruction_loss"] + means["kl_z"] + means["kl_y"]} | means

    def initialise(self, dataset: CellDataset) -> None:
        """Nothing: the weights start at random."""

    def fit_prior(self, dataset: CellDataset, seed: int) -> None:
        """Nothing: new cells come from p(z|y)."""

    @torch.no_grad()
    def sample(
        self, cell_type_idx: np.ndarray, seed: int, latent_spread: float = 1.0, blocks: range | None = None
    ) -> Iterator[sp.csr_matrix]:
        """New cells of the given types: z ~ p(z|y), x ~ p(x|z). Parameters and yields as in `lib.models.sampling.sample`; the factor
        latent_spread of the standard deviation of z is published as noise factor.
        """
        mean, log_var = self.p_z()
        for rows, generator in random_streams(len(cell_type_idx), seed, blocks, mean.device):
            y = torch.from_numpy(np.asarray(cell_type_idx[rows], dtype=np.int64)).to(mean.device)
            noise = torch.randn(len(y), self.n_latent, generator=generator, device=mean.device)
            yield self.p_x(mean[y] + latent_spread * (0.5 * log_var[y]).exp() * noise).sample(generator)

    def log_likelihood(self, dataset: CellDataset, n_samples: int = 50, seed: int = 0) -> np.ndarray:
        """log p(x|y) of every cell of known type, in nats, (n_cells,), as `importance_weighted` estimates it."""

        def densities(batch: Batch) -> Densities:
            y, cells = batch.cell_type_idx, torch.arange(batch.n_cells, device=dataset.device)
            (_, q_mean, q_log_var), (p_mean, p_log_var) = self.q(batch), self.p_z()
            return (q_mean[cells, y], q_log_var[cells, y]), (p_mean[y], p_log_var[y]), self.p_x

        return importance_weighted(dataset, densities, n_samples, seed)


def tower(*sizes: int) -> nn.Sequential:
    """Linear layers with ReLU between them."""
    layers = [layer for n_in, n_out in pairwise(sizes) for layer in (nn.Linear(n_in, n_out), nn.ReLU())]
    return nn.Sequential(*layers[:-1])
