"""The Gaussian-mixture VAE (after bulk2sc_GMVAE, fig. 1): its densities, the bound that trains them, and the likelihood of cells.

One cell has a type y, a library size l and counts x. Generative model:

    p(y)          Categorical(frequency of the types)
    p(z|y)        Normal(mean(y), variance(y))
    p(l|z,y)      log l ~ Normal(mean(z), scale(y)^2)
    p(x|z,y,l)    NB or ZINB, mean l softmax(log(ELU(a(y) f(z)) + 1) + log profile(y)), inverse dispersion theta(y)

Inference model:

    q(y|x)        Categorical, a network with one hidden layer
    q(z|x,y)      Normal(mean(x,y,l), variance(y,l)); mean and log-variance are linear

Counts are those without outliers, which new cells get back (`lib.models.outliers`).

f is linear and each type has its own mean profile, so that z describes how cells of one type differ. Training starts on the axes of
that variation (`lib.models.axes`); the loading ratio a(y), near 1, is how strongly a gene follows z in a type. ELU + 1, as in the
paper, is exponential where a gene falls, and linear where it rises: with an exponential there too, the genes of most counts have
upper tails that real ones lack. In the paper q(z|x,y), p(z|y) and f are networks, no parameter of p(x|z,y,l) depends on y, and z
describes the type as well.

A labelled cell is trained on the bound of its own type. A cell without a label is trained on the sum over all types, weighted
by q(y|x) (Kingma et al. 2014, "Semi-supervised learning with deep generative models", eqs. 6-7), which is K times the work.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from lib.data.batches import Batch, CellDataset
from lib.models.aggregated_posterior import Prior
from lib.models.layers import LogEluPlusOne, SparseLinear, sparse_linear
from lib.models.likelihoods import Likelihood, gaussian_kl, gaussian_log_prob
from lib.models.outliers import N_GROUPS, N_SIZES

LOG_THETA_RANGE = (math.log(1e-3), math.log(1e6))
LOG_THETA_SD = 1.5  # prior standard deviation of log theta of a gene about the mean over genes
LOG_THETA_RATIO_SD = 0.5  # prior standard deviation of log theta of a type about that of the gene
LOG_LOADING_RATIO_SD = 0.5  # prior standard deviation of log a(y)


class GMVAE(nn.Module):
    """
    Parameters
    ----------
    n_genes, n_cell_types
        Sizes of the data.
    n_latent
        Dimensions of z.
    hidden
        Units of the hidden layer of q(y|x).
    likelihood
        "nb" or "zinb".
    dispersion
        "gene": one theta per gene; "gene-type": one per gene and type.

    After training, `lib.models.sampling.fit_prior` sets `prior`; without it new cells come from p(z|y) and p(l|z,y).
    """

    log_profiles: torch.Tensor  # (n_cell_types, n_genes) mean profiles
    log_theta_mean: torch.Tensor  # mean of log theta over genes
    n_train_cells: torch.Tensor
    library_median: torch.Tensor  # of the train cells
    type_frequency: torch.Tensor  # (n_cell_types,) p(y)
    outlier_group: torch.Tensor  # of new cells: `group`, `rate` and `sizes` of `lib.models.outliers`
    outlier_rate: torch.Tensor
    outlier_sizes: torch.Tensor

    def __init__(
        self, n_genes: int, n_cell_types: int, n_latent: int, hidden: int = 128, likelihood: str = "nb", dispersion: str = "gene-type"
    ):  # fmt: skip
        super().__init__()
        self.arguments = dict(
            n_genes=n_genes, n_cell_types=n_cell_types, n_latent=n_latent, hidden=hidden, likelihood=likelihood, dispersion=dispersion
        )  # fmt: skip
        self.n_genes, self.n_cell_types, self.n_latent = n_genes, n_cell_types, n_latent
        self.q_y_x_genes, self.q_y_x_library = SparseLinear(n_genes, hidden), nn.Linear(1, hidden)
        self.q_y_x = nn.Sequential(nn.LayerNorm(hidden), nn.ReLU(), nn.Linear(hidden, n_cell_types))
        self.q_z_xy_axes = SparseLinear(n_genes, n_latent)
        self.q_z_xy_mean, self.q_z_xy_log_var = (nn.Linear(n_cell_types + 1, n_latent) for _ in range(2))
        self.p_z_y_mean, self.p_z_y_log_var = (nn.Parameter(torch.zeros(n_cell_types, n_latent)) for _ in range(2))
        self.p_x_zyl_log_mean = nn.Linear(n_latent, n_genes)
        self.p_x_zyl_zi_logits = nn.Linear(n_latent, n_genes) if likelihood == "zinb" else None
        self.log_loading_ratio = nn.Parameter(torch.zeros(n_cell_types, n_genes))  # log a(y)
        self.log_theta = nn.Parameter(torch.zeros(n_genes))
        self.log_theta_ratio = nn.Parameter(torch.zeros(n_cell_types, n_genes)) if dispersion == "gene-type" else None
        self.p_l_zy_mean = nn.Linear(n_latent, 1)
        self.p_l_zy_log_scale = nn.Parameter(torch.zeros(n_cell_types))
        self.prior: Prior | None = None
        self.register_buffer("log_profiles", torch.zeros(n_cell_types, n_genes))
        self.register_buffer("log_theta_mean", torch.tensor(0.0))
        self.register_buffer("n_train_cells", torch.tensor(1.0))
        self.register_buffer("library_median", torch.tensor(1.0))
        self.register_buffer("type_frequency", torch.full((n_cell_types,), 1 / n_cell_types))
        self.register_buffer("outlier_group", torch.zeros(n_genes, dtype=torch.int64))
        self.register_buffer("outlier_rate", torch.zeros(N_GROUPS))
        self.register_buffer("outlier_sizes", torch.zeros(N_GROUPS, N_SIZES))

    @property
    def device(self) -> torch.device:
        return self.library_median.device

    def log_library(self, library_size: torch.Tensor) -> torch.Tensor:
        """log(l / median l of the train cells), (n_cells, 1)."""
        return (library_size / self.library_median).log()[:, None]

    def one_hot(self, cell_type_idx: torch.Tensor) -> torch.Tensor:
        return F.one_hot(cell_type_idx, self.n_cell_types).float()

    def encode_genes(self, batch: Batch) -> torch.Tensor:
        """Position on the axes of q(z|x,y) and input of the hidden layer of q(y|x), one sparse product: (n_cells, n_latent + hidden)."""
        return sparse_linear(batch.log_normalized(self.library_median), self.q_z_xy_axes, self.q_y_x_genes)

    def q_y(self, encoded: torch.Tensor, batch: Batch) -> torch.Tensor:
        """q(y|x) as logits, (n_cells, n_cell_types). encoded: from `encode_genes`."""
        return self.q_y_x(encoded[:, self.n_latent :] + self.q_y_x_library(self.log_library(batch.library_size)))

    def q_z(self, encoded: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """q(z|x,y): mean and log-variance, each (n_cells, n_latent). encoded: from `encode_genes`."""
        known = torch.cat([self.one_hot(batch.cell_type_idx), self.log_library(batch.library_size)], dim=1)
        mean = encoded[:, : self.n_latent] + self.q_z_xy_mean(known).float()
        return mean, self.q_z_xy_log_var(known).float().clamp(-10, 6)

    def p_z(self, cell_type_idx: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """p(z|y): mean and log-variance, each (n_cells, n_latent)."""
        return self.p_z_y_mean[cell_type_idx], self.p_z_y_log_var[cell_type_idx].clamp(-10, 6)

    def p_l(self, z: torch.Tensor, cell_type_idx: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """p(l|z,y): mean and log-variance of log(l / median l), each (n_cells,)."""
        return self.p_l_zy_mean(z)[:, 0].float(), 2 * self.p_l_zy_log_scale[cell_type_idx]

    def p_x(self, z: torch.Tensor, library_size: torch.Tensor, cell_type_idx: torch.Tensor) -> Likelihood:
        """p(x|z,y,l). z: (n_cells, n_latent); library_size, cell_type_idx: (n_cells,)."""
        y = self.one_hot(cell_type_idx)
        f = self.p_x_zyl_log_mean(z).float() * (y @ self.log_loading_ratio.exp())
        logits = LogEluPlusOne.apply(f) + self.log_profiles[cell_type_idx]
        log_theta: torch.Tensor = self.log_theta
        if self.log_theta_ratio is not None:
            log_theta = log_theta + y @ self.log_theta_ratio
        zi_logits = None if self.p_x_zyl_zi_logits is None else self.p_x_zyl_zi_logits(z).float()
        return Likelihood(logits, library_size.log(), log_theta.clamp(*LOG_THETA_RANGE), zi_logits)

    def shrinkage_penalty(self) -> torch.Tensor:
        """-log of the normal priors of log theta and log a(y), in nats per train cell, up to a constant.

        It keeps the parameters of rare genes and types near those of the others.
        """
        penalty = ((self.log_theta - self.log_theta_mean) / LOG_THETA_SD).square().sum()
        if self.log_theta_ratio is not None:
            penalty = penalty + (self.log_theta_ratio / LOG_THETA_RATIO_SD).square().sum()
        penalty = penalty + (self.log_loading_ratio / LOG_LOADING_RATIO_SD).square().sum()
        return 0.5 * penalty / self.n_train_cells

    def elbo_terms(self, encoded: torch.Tensor, batch: Batch, epsilon: torch.Tensor) -> dict[str, torch.Tensor]:
        """The parts of the bound on log p(x,l|y) of cells whose type is given; each (n_cells,), in nats.

        `reconstruction_loss` = -log p(x|z,y,l), `library_loss` = -log p(l|z,y), `kl_z` = KL(q(z|x,y) || p(z|y)), at
        z = mean + standard deviation x epsilon of q(z|x,y); epsilon: (n_cells, n_latent), standard normal.
        """
        q_mean, q_log_var = self.q_z(encoded, batch)
        p_mean, p_log_var = self.p_z(batch.cell_type_idx)
        z = q_mean + (0.5 * q_log_var).exp() * epsilon
        l_mean, l_log_var = self.p_l(z, batch.cell_type_idx)
        return {
            "reconstruction_loss": -self.p_x(z, batch.library_size, batch.cell_type_idx).log_prob(batch),
            "library_loss": -gaussian_log_prob(self.log_library(batch.library_size)[:, 0], l_mean, l_log_var),
            "kl_z": gaussian_kl(q_mean, q_log_var, p_mean, p_log_var),
        }

    def forward(self, batch: Batch, epsilon: torch.Tensor) -> dict[str, torch.Tensor]:
        """Mean loss per cell and its parts, in nats; `loss` is minimised. epsilon: as in `elbo_terms`.

        Labelled cells: reconstruction + library + kl_z, and -log q(y|x) of the label (`kl_y`, the KL between the label and
        q(y|x)). Cells without a label: the same bound of every type, weighted by q(y|x), and KL(q(y|x) || p(y)).
        """
        encoded = self.encode_genes(batch)
        if batch.all_labelled:
            terms = self._labelled_terms(encoded, batch, epsilon)
        else:
            unknown = batch.cell_type_idx < 0
            parts = [self._unlabelled_terms(encoded[unknown], batch.select(unknown), epsilon[unknown])]
            if not unknown.all():
                parts.append(self._labelled_terms(encoded[~unknown], batch.select(~unknown), epsilon[~unknown]))
            terms = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        loss = terms.pop("loss").mean() + self.shrinkage_penalty()
        elbo = -(terms["reconstruction_loss"] + terms["library_loss"] + terms["kl_z"])
        return {"loss": loss, "elbo": elbo.mean().detach()} | {
            name: value.mean().detach() for name, value in terms.items()
        }

    def _labelled_terms(self, encoded: torch.Tensor, batch: Batch, epsilon: torch.Tensor) -> dict[str, torch.Tensor]:
        terms = self.elbo_terms(encoded, batch, epsilon)
        terms["kl_y"] = F.cross_entropy(self.q_y(encoded, batch).float(), batch.cell_type_idx, reduction="none")
        bound = terms["reconstruction_loss"] + terms["library_loss"] + terms["kl_z"]
        return terms | {"loss": bound + terms["kl_y"]}

    def _unlabelled_terms(self, encoded: torch.Tensor, batch: Batch, epsilon: torch.Tensor) -> dict[str, torch.Tensor]:
        log_q_y = F.log_softmax(self.q_y(encoded, batch).float(), dim=1)
        q_y = log_q_y.exp()
        terms = {name: torch.zeros(()) for name in ("reconstruction_loss", "library_loss", "kl_z")}
        for k in range(self.n_cell_types):
            for name, value in self.elbo_terms(encoded, batch.of_type(k), epsilon).items():
                terms[name] = terms[name] + q_y[:, k] * value
        terms["kl_y"] = (q_y * (log_q_y - self.type_frequency.log())).sum(dim=1)
        bound = terms["reconstruction_loss"] + terms["library_loss"] + terms["kl_z"] + terms["kl_y"]
        return terms | {"loss": bound}

    @torch.no_grad()
    def get_latent_representation(
        self, dataset: CellDataset, batch_size: int = 512
    ) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
        """q(z|x,y) of all labelled cells, in the order of the data set.

        Returns
        -------
        Means and log-variances, each (n_labelled, n_latent), and cell types, (n_labelled,), all on the CPU.
        """
        parts = []
        for batch in dataset.in_order(batch_size):
            labelled = batch.select(batch.cell_type_idx >= 0)
            parts.append(torch.stack(self.q_z(self.encode_genes(labelled), labelled)).cpu())
        mean, log_var = torch.cat(parts, dim=1)
        return mean, log_var, dataset.cell_type_idx[dataset.cell_type_idx >= 0]

    @torch.no_grad()
    def log_likelihood(
        self, dataset: CellDataset, n_samples: int = 50, batch_size: int = 128, seed: int = 0
    ) -> np.ndarray:
        """log p(x|y,l) of every cell of known type, in nats, (n_cells,): the integral of p(x|z,y,l) p(z|y) over z.

        The importance-weighted bound (Burda et al. 2016, eq. 8), which rises to the likelihood with n_samples:

        log 1/S sum_s p(x|z_s,y,l) p(z_s|y) / q(z_s|x,y), z_s ~ q(z|x,y).
        """
        generator = torch.Generator(dataset.device).manual_seed(seed)
        log_likelihood = []
        for batch in dataset.in_order(batch_size):
            q_mean, q_log_var = self.q_z(self.encode_genes(batch), batch)
            p_mean, p_log_var = self.p_z(batch.cell_type_idx)
            weights = []
            for _ in range(n_samples):
                z = q_mean + (0.5 * q_log_var).exp() * torch.randn(
                    q_mean.shape, generator=generator, device=q_mean.device
                )
                log_ratio = gaussian_log_prob(z, p_mean, p_log_var) - gaussian_log_prob(z, q_mean, q_log_var)
                weights.append(
                    self.p_x(z, batch.library_size, batch.cell_type_idx).log_prob(batch) + log_ratio.sum(dim=1)
                )
            log_likelihood.append(torch.logsumexp(torch.stack(weights), dim=0) - math.log(n_samples))
        return torch.cat(log_likelihood).cpu().numpy()
