"""The Gaussian-mixture VAE (after bulk2sc_GMVAE, fig. 1) of a cell with type y, library size l and counts x without outliers.

    p(y)          Categorical(frequency of the types)
    p(z|y)        Normal(mean(y), variance(y))
    p(l|z,y)      log l ~ Normal(mean(z), scale(y)^2)
    p(x|z,y,l)    NB or ZINB, mean l softmax(log(ELU(a(y) f(z)) + 1) + log profile(y)), inverse dispersion theta(y)
    q(y|x)        Categorical, a network with one hidden layer; only where train cells lack labels
    q(z|x,y)      Normal(mean(x,y,l), variance(y,l)); mean and log-variance are linear

f is linear; the loading ratio a(y), near 1, is how strongly a gene follows z in a type. The README of this folder has the reasons. A cell
without a label is trained on the sum over all types, weighted by q(y|x) (Kingma et al. 2014, arXiv:1406.5298, eqs. 6-7): K times the work.
"""

import math
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib.data.batches import Batch, CellDataset, transposed
from lib.models.likelihoods import Densities, Likelihood, gaussian_kl, gaussian_log_prob, importance_weighted
from lib.models.profiles import LOG_THETA_RATIO_SD, N_GROUPS, N_SIZES

LOG_THETA_RANGE = (math.log(1e-3), math.log(1e6))
LOG_THETA_SD = 1.5  # prior standard deviation of log theta of a gene about the mean over genes
LOG_LOADING_RATIO_SD = 0.5  # prior standard deviation of log a(y)

Prior = dict[str, Tensor]  # what new cells are sampled from (`lib.models.sampling`)


class SparseProduct(torch.autograd.Function):
    """x @ weight for a sparse x that needs no gradient."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.x = x
        return _product(x, weight)

    @staticmethod
    def backward(ctx, upstream):
        return None, _product(transposed(ctx.x), upstream)


def _product(x: Tensor, dense: Tensor) -> Tensor:
    """x @ dense for a sparse x (CSR). On a CPU as a sum of rows of `dense`, which takes a fifth of the time of torch's product."""
    if x.device.type == "cpu":
        rows, starts, weights = x.col_indices(), x.crow_indices(), x.values()
        return F.embedding_bag(rows, dense, starts, mode="sum", per_sample_weights=weights, include_last_offset=True)
    return dense.new_empty(x.shape[0], dense.shape[1]).addmm_(x, dense, beta=0)


def sparse_product(x: Tensor, *weights: Tensor) -> Tensor:
    """x @ weight for a sparse x (CSR), of several weights side by side: (n_rows, sum of n_out)."""
    with torch.autocast(x.device.type, enabled=False):  # sparse products lack half precision on some devices
        return SparseProduct.apply(x, torch.cat(weights, dim=1) if len(weights) > 1 else weights[0])


class SparseLinear(nn.Module):
    """Linear layer without bias for a sparse input: n_genes to n_out."""

    def __init__(self, n_genes: int, n_out: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n_genes, n_out) / math.sqrt(n_genes))

    def forward(self, x: Tensor) -> Tensor:
        return sparse_product(x, self.weight)


class LogEluPlusOne(torch.autograd.Function):
    """log(ELU(x) + 1): x below 0, log(1 + x) above. A quarter of the time of torch's own functions, and exact far below 0."""

    @staticmethod
    def forward(ctx, x):
        positive = x.relu()
        ctx.save_for_backward(positive)
        return x.clamp(max=0).add_(positive.log1p())

    @staticmethod
    def backward(ctx, upstream):
        (positive,) = ctx.saved_tensors
        return upstream / (1 + positive)


def scaled_columns(x: Tensor, factors: Tensor) -> Tensor:
    """A sparse matrix (CSR) with each column times its factor. factors: (n_columns,)."""
    values = x.values() * factors[x.col_indices()]
    return torch.sparse_csr_tensor(x.crow_indices(), x.col_indices(), values, x.shape, check_invariants=False)


def mlp(sizes: tuple[int, ...], dropout: float = 0.0) -> nn.Sequential:
    """Linear layers, each followed by LayerNorm, ReLU and dropout."""
    layers: list[nn.Module] = []
    for n_in, n_out in pairwise(sizes):
        layers += [nn.Linear(n_in, n_out), nn.LayerNorm(n_out), nn.ReLU(), nn.Dropout(dropout)]
    return nn.Sequential(*layers)


class GMVAE(nn.Module):
    """n_latent: dimensions of z; likelihood: "nb" or "zinb"; dispersion: one theta per "gene" or per gene and type ("gene-type");
    with_classifier: whether the model has q(y|x), which cells without a label need; hidden: units of its hidden layer.
    """

    mixed_precision = True  # trained in bfloat16 on a GPU (`lib.training.Trainer`)

    def __init__(
        self, n_genes: int, n_cell_types: int, n_latent: int, hidden: int = 128, likelihood: str = "nb",
        dispersion: str = "gene-type", with_classifier: bool = False,
    ):  # fmt: skip
        super().__init__()
        self.arguments = dict(
            n_genes=n_genes, n_cell_types=n_cell_types, n_latent=n_latent, hidden=hidden, likelihood=likelihood,
            dispersion=dispersion, with_classifier=with_classifier,
        )  # fmt: skip
        self.n_genes, self.n_cell_types, self.n_latent = n_genes, n_cell_types, n_latent
        self.q_y_x: nn.Sequential | None = None
        if with_classifier:
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
        self.log_profiles = nn.Buffer(torch.zeros(n_cell_types, n_genes))  # mean profiles
        self.log_theta_mean = nn.Buffer(torch.tensor(0.0))  # over genes
        self.n_train_cells = nn.Buffer(torch.tensor(1.0))
        self.library_median = nn.Buffer(torch.tensor(1.0))  # of the train cells
        self.type_frequency = nn.Buffer(torch.full((n_cell_types,), 1 / n_cell_types))  # p(y)
        self.outlier_group = nn.Buffer(torch.zeros(n_genes, dtype=torch.int64))  # of `lib.models.profiles.Outliers`
        self.outlier_rate = nn.Buffer(torch.zeros(N_GROUPS))
        self.outlier_sizes = nn.Buffer(torch.zeros(N_GROUPS, N_SIZES))
        # set after training by `lib.models.sampling.fit_prior`; without it new cells come from p(z|y) and p(l|z,y)
        self.prior: Prior | None = None

    @property
    def device(self) -> torch.device:
        return self.library_median.device

    def log_library(self, library_size: Tensor) -> Tensor:
        """log(l / median l of the train cells), (n_cells, 1)."""
        return (library_size / self.library_median).log()[:, None]

    def one_hot(self, cell_type_idx: Tensor) -> Tensor:
        return F.one_hot(cell_type_idx, self.n_cell_types).float()

    def encode_genes(self, batch: Batch) -> Tensor:
        """Position on the axes of q(z|x,y) and, with a classifier, input of the hidden layer of q(y|x): (n_cells, n_latent [+ hidden])."""
        layers = [self.q_z_xy_axes] if self.q_y_x is None else [self.q_z_xy_axes, self.q_y_x_genes]
        return sparse_product(batch.log_normalized(self.library_median), *(layer.weight for layer in layers))

    def q_y(self, encoded: Tensor, batch: Batch) -> Tensor:
        """q(y|x) as logits, (n_cells, n_cell_types). encoded: from `encode_genes`."""
        assert self.q_y_x is not None, "cells without a label need a model with_classifier"
        return self.q_y_x(encoded[:, self.n_latent :] + self.q_y_x_library(self.log_library(batch.library_size)))

    def q_z(self, encoded: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """q(z|x,y): mean and log-variance, each (n_cells, n_latent). encoded: from `encode_genes`."""
        known = torch.cat([self.one_hot(batch.cell_type_idx), self.log_library(batch.library_size)], dim=1)
        mean = encoded[:, : self.n_latent] + self.q_z_xy_mean(known).float()
        return mean, self.q_z_xy_log_var(known).float().clamp(-10, 6)

    def p_z(self, cell_type_idx: Tensor) -> tuple[Tensor, Tensor]:
        """p(z|y): mean and log-variance, each (n_cells, n_latent)."""
        return self.p_z_y_mean[cell_type_idx], self.p_z_y_log_var[cell_type_idx].clamp(-10, 6)

    def p_l(self, z: Tensor, cell_type_idx: Tensor) -> tuple[Tensor, Tensor]:
        """p(l|z,y): mean and log-variance of log(l / median l), each (n_cells,)."""
        return self.p_l_zy_mean(z)[:, 0].float(), 2 * self.p_l_zy_log_scale[cell_type_idx]

    def p_x(self, z: Tensor, library_size: Tensor, cell_type_idx: Tensor) -> Likelihood:
        """p(x|z,y,l). z: (n_cells, n_latent); library_size, cell_type_idx: (n_cells,)."""
        y = self.one_hot(cell_type_idx)
        f = self.p_x_zyl_log_mean(z).float() * (y @ self.log_loading_ratio.exp())
        logits = LogEluPlusOne.apply(f) + self.log_profiles[cell_type_idx]
        log_theta: Tensor = self.log_theta
        if self.log_theta_ratio is not None:
            log_theta = log_theta + y @ self.log_theta_ratio
        zi_logits = None if self.p_x_zyl_zi_logits is None else self.p_x_zyl_zi_logits(z).float()
        return Likelihood(logits, library_size.log(), log_theta.clamp(*LOG_THETA_RANGE), zi_logits)

    def shrinkage_penalty(self) -> Tensor:
        """-log of the normal priors of log theta and log a(y), in nats per train cell: rare genes and types stay near the others."""
        penalty = ((self.log_theta - self.log_theta_mean) / LOG_THETA_SD).square().sum()
        if self.log_theta_ratio is not None:
            penalty = penalty + (self.log_theta_ratio / LOG_THETA_RATIO_SD).square().sum()
        penalty = penalty + (self.log_loading_ratio / LOG_LOADING_RATIO_SD).square().sum()
        return 0.5 * penalty / self.n_train_cells

    def elbo_terms(self, encoded: Tensor, batch: Batch, epsilon: Tensor) -> dict[str, Tensor]:
        """The parts of the bound on log p(x,l|y) of cells whose type is given; each (n_cells,), in nats.

        `reconstruction_loss` = -log p(x|z,y,l), `library_loss` = -log p(l|z,y), `kl_z` = KL(q(z|x,y) || p(z|y)), at
        z = mean + standard deviation x epsilon of q(z|x,y); epsilon: (n_cells, n_latent), standard normal.
        """
        y, (mean, log_var) = batch.cell_type_idx, self.q_z(encoded, batch)
        z = mean + (0.5 * log_var).exp() * epsilon
        log_l, p_l = self.log_library(batch.library_size)[:, 0], self.p_l(z, y)
        return {
            "reconstruction_loss": -self.p_x(z, batch.library_size, y).log_prob(batch),
            "library_loss": -gaussian_log_prob(log_l, *p_l),
            "kl_z": gaussian_kl((mean, log_var), self.p_z(y)),
        }

    def forward(self, batch: Batch, epsilon: Tensor) -> dict[str, Tensor]:
        """Mean loss per cell and its parts, in nats; `loss` is minimised. epsilon: as in `elbo_terms`.

        Labelled cells: reconstruction + library + kl_z (the negative bound, `stopping_criterion`) and, with a classifier,
        -log q(y|x) of the label (`kl_y`, the KL between the label and q(y|x)). Cells without a label: the same bound of every
        type, weighted by q(y|x), and KL(q(y|x) || p(y)). `loss` also has `shrinkage_penalty`.
        """
        encoded = self.encode_genes(batch)
        if batch.all_labelled:
            terms = self._labelled_terms(encoded, batch, epsilon)
        else:
            unknown = batch.cell_type_idx < 0
            parts = [
                self._unlabelled_terms(encoded[unknown], batch.select(unknown), epsilon[unknown]),
                self._labelled_terms(encoded[~unknown], batch.select(~unknown), epsilon[~unknown]),
            ]
            terms = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        # a process whose share of a batch has no cell adds 0
        means = {name: value.sum() / max(1, batch.n_cells) for name, value in terms.items()}
        negative_elbo = means["reconstruction_loss"] + means["library_loss"] + means["kl_z"]
        loss = negative_elbo + means.get("kl_y", 0) + self.shrinkage_penalty()
        return {"loss": loss, "stopping_criterion": negative_elbo} | means

    def _labelled_terms(self, encoded: Tensor, batch: Batch, epsilon: Tensor) -> dict[str, Tensor]:
        terms = self.elbo_terms(encoded, batch, epsilon)
        if self.q_y_x is not None:
            terms["kl_y"] = F.cross_entropy(self.q_y(encoded, batch).float(), batch.cell_type_idx, reduction="none")
        return terms

    def _unlabelled_terms(self, encoded: Tensor, batch: Batch, epsilon: Tensor) -> dict[str, Tensor]:
        log_q_y = F.log_softmax(self.q_y(encoded, batch).float(), dim=1)
        q_y = log_q_y.exp()
        by_type = [self.elbo_terms(encoded, batch.of_type(k), epsilon) for k in range(self.n_cell_types)]
        terms = {name: (q_y * torch.stack([part[name] for part in by_type], dim=1)).sum(dim=1) for name in by_type[0]}
        return terms | {"kl_y": (q_y * (log_q_y - self.type_frequency.log())).sum(dim=1)}

    @torch.no_grad()
    def get_latent_representation(self, dataset: CellDataset) -> tuple[Tensor, Tensor, np.ndarray]:
        """q(z|x,y) of all labelled cells in order: means and log-variances, each (n_labelled, n_latent), and types, on the CPU."""
        parts = []
        for batch in dataset.in_order(512):
            labelled = batch.select(batch.cell_type_idx >= 0)
            parts.append(torch.stack(self.q_z(self.encode_genes(labelled), labelled)).cpu())
        mean, log_var = torch.cat(parts, dim=1)
        return mean, log_var, dataset.cell_type_idx[dataset.cell_type_idx >= 0]

    def log_likelihood(self, dataset: CellDataset, n_samples: int = 50, seed: int = 0) -> np.ndarray:
        """log p(x|y,l) of every cell of known type, in nats, (n_cells,), as `importance_weighted` estimates it."""

        def densities(batch: Batch) -> Densities:
            q, y = self.q_z(self.encode_genes(batch), batch), batch.cell_type_idx
            return q, self.p_z(y), lambda z: self.p_x(z, batch.library_size, y)

        return importance_weighted(dataset, densities, n_samples, seed)
