"""What the three baselines share: a VAE of expression that is trained by squared error, and counts of new cells from its decoder.

The decoders return log(1 + counts per 10,000). They model neither the library size nor the distribution of the counts, so new cells
are sampled in three steps: the library size from the train cells of the type, each gene's fraction of the counts from the decoder,
and the counts from a Poisson or a (zero-inflated) negative binomial.
"""

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from torch import nn

from lib.data.batches import Batch, CellDataset
from lib.models.likelihoods import Likelihood, standard_normal_kl
from lib.models.profiles import counts_per_type
from lib.models.sampling import BLOCK_CELLS, random_streams

NORMALIZED_TOTAL = 1e4  # counts per cell to which expression is scaled before log1p
MAX_LOG_EXPRESSION = 9.3  # log(1 + 10,000) = 9.2: one gene holds all counts of the cell
MAX_TRAIN_CELLS = 1000  # train cells of each type that the prior keeps
N_RATIO_CELLS = 1024  # new cells of each type that the gene ratios are measured on
POISSON_LOG_THETA = 13.8  # theta = 1e6: variance = mu + mu^2 / 1e6
Network = Callable[..., torch.Tensor]


class ExpressionVAE(nn.Module):
    """A VAE with z ~ Normal(0, 1) and squared error; a baseline defines its networks and these methods."""

    inputs: Network  # (batch): what is encoded and reconstructed, such as principal components; n_cells rows
    encode: Network  # (inputs, types): mean and log-variance of q(z|x,y), side by side, (n_cells, 2 n_latent)
    decode: Network  # (z, types): reconstructed inputs
    expression: Network  # (reconstructed inputs): log(1 + counts per 10,000), (n_cells, n_genes)
    beta = 1.0  # weight of the KL
    prior: dict[str, torch.Tensor]  # fitted after training: what new cells are sampled from

    def __init__(self, n_genes: int, n_cell_types: int, n_latent: int, **more: Any):
        """more: other arguments of the baseline, for its checkpoint."""
        super().__init__()
        self.n_genes, self.n_cell_types, self.n_latent = n_genes, n_cell_types, n_latent
        self.arguments = {"n_genes": n_genes, "n_cell_types": n_cell_types, "n_latent": n_latent} | more

    def q_z(self, inputs: torch.Tensor, cell_type_idx: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """q(z|x,y): mean and log-variance, each (n_cells, n_latent)."""
        mean, log_var = self.encode(inputs, cell_type_idx).chunk(2, dim=1)
        return mean, log_var.clamp(-10, 6)

    def forward(self, batch: Batch, epsilon: torch.Tensor, kl_weight: float = 1.0) -> dict[str, torch.Tensor]:
        """Mean loss per cell and its parts. epsilon: (n_cells, n_latent), standard normal."""
        inputs = self.inputs(batch)
        mean, log_var = self.q_z(inputs, batch.cell_type_idx)
        decoded = self.decode(mean + (0.5 * log_var).exp() * epsilon, batch.cell_type_idx)
        reconstruction_loss = (decoded - inputs.to_dense()).square().flatten(1).sum(dim=1).mean()
        kl_z = standard_normal_kl(mean, log_var).mean()
        loss = reconstruction_loss + self.beta * kl_weight * kl_z
        return {"loss": loss, "reconstruction_loss": reconstruction_loss, "kl_z": kl_z}

    @torch.no_grad()
    def fit_prior(self, dataset: CellDataset, seed: int) -> None:
        """Keep library sizes of train cells, and correct the genes' mean counts. z of new cells is standard normal."""
        self.prior = select_train_cells(dataset, self.n_cell_types, seed)
        self.prior["gene_ratio"] = fit_gene_ratio(self, dataset, seed)

    def sample_expression(
        self, cell_type_idx: torch.Tensor, latent_spread: float, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """log(1 + counts per 10,000), (n_cells, n_genes), and library size, (n_cells,), of new cells.

        Library sizes, and q(z|x) where the prior holds it, are those of random train cells of the type.
        """
        device = cell_type_idx.device
        first = self.prior["first"].to(device)
        n_train_cells = first.diff()[cell_type_idx]
        u = torch.rand(len(cell_type_idx), generator=generator, device=device)
        train_cells = (first[cell_type_idx] + (u * n_train_cells).long().clamp(max=n_train_cells - 1)).cpu()
        z = latent_spread * torch.randn(len(cell_type_idx), self.n_latent, generator=generator, device=device)
        if "z" in self.prior:
            mean, log_var = self.prior["z"][train_cells].to(device).unbind(dim=1)
            z = mean + (0.5 * log_var).exp() * z
        return self.expression(self.decode(z, cell_type_idx)), self.prior["library_size"][train_cells].to(device)

    @torch.no_grad()
    def sample(
        self, cell_type_idx: np.ndarray, seed: int, latent_spread: float = 1.0, blocks: range | None = None
    ) -> Iterator[sp.csr_matrix]:
        """New cells of the given types, counts of each block. Parameters and yields as in `lib.models.sampling.sample`."""
        device = next(self.parameters()).device
        prior = {name: values.to(device) for name, values in self.prior.items() if name != "z"}
        for rows, generator in random_streams(len(cell_type_idx), seed, blocks, device):
            y = torch.from_numpy(np.asarray(cell_type_idx[rows], dtype=np.int64)).to(device)
            log_expression, library_size = self.sample_expression(y, latent_spread, generator)
            logits = (gene_fractions(log_expression) * prior["gene_ratio"]).clamp(min=1e-12).log()
            log_theta = prior.get("log_theta", torch.full_like(logits[0], POISSON_LOG_THETA))
            zi_logits = prior["zi_logits"].expand_as(logits) if "zi_logits" in prior else None
            yield Likelihood(logits, library_size.log(), log_theta, zi_logits).sample(generator)


def mlp(sizes: tuple[int, ...], after_linear: Callable[[int], list[nn.Module]]) -> nn.Sequential:
    """Linear layers from sizes[0] to sizes[-1]; after_linear: number of units -> what follows each of them but the last."""
    layers: list[nn.Module] = []
    for n_in, n_out in pairwise(sizes[:-1]):
        layers += [nn.Linear(n_in, n_out), *after_linear(n_out)]
    return nn.Sequential(*layers, nn.Linear(sizes[-2], sizes[-1]))


def gene_fractions(log_expression: torch.Tensor) -> torch.Tensor:
    """Each gene's fraction of the cell's counts, from log(1 + counts per 10,000); negative values count as 0."""
    expression = torch.expm1(log_expression.clamp(0, MAX_LOG_EXPRESSION))
    return expression / expression.sum(dim=1, keepdim=True).clamp(min=1e-6)


def select_train_cells(dataset: CellDataset, n_cell_types: int, seed: int) -> dict[str, torch.Tensor]:
    """Select at most `MAX_TRAIN_CELLS` random train cells of each type, of any type for a type without train cells.

    Returns `rows`, indices in the data set, type by type; their `library_size`; `first`, where each type begins in `rows`.
    """
    rng = np.random.default_rng(seed)
    members = [np.flatnonzero(dataset.cell_type_idx == k) for k in range(n_cell_types)]
    members = [rows if len(rows) else np.arange(len(dataset)) for rows in members]
    per_type = [np.sort(rng.permutation(rows)[:MAX_TRAIN_CELLS]) for rows in members]
    rows = np.concatenate(per_type)
    selected = {"rows": rows, "library_size": dataset.library_size[rows].astype(np.float32)}
    selected["first"] = np.cumsum([0, *map(len, per_type)])
    return {name: torch.from_numpy(values) for name, values in selected.items()}


def fit_gene_ratio(model: ExpressionVAE, dataset: CellDataset, seed: int) -> torch.Tensor:
    """Ratio of each gene's counts in the train cells to its expected counts in new cells of the same types: (n_genes,).

    The decoder predicts means of logarithms, which are below the logarithms of the means, above all for genes that few cells
    express. A pseudo-count of 0.1 keeps the ratio of unexpressed genes at 1.
    """
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    observed = counts_per_type(dataset, model.n_cell_types)
    expected = np.zeros_like(observed)
    for k in range(model.n_cell_types):
        for _ in range(N_RATIO_CELLS // BLOCK_CELLS):
            y = torch.full((BLOCK_CELLS,), k, device=device)
            log_expression, library_size = model.sample_expression(y, 1.0, generator)
            expected[k] += (library_size @ gene_fractions(log_expression)).cpu().numpy()
    expected *= observed.sum(axis=1, keepdims=True) / np.maximum(expected.sum(axis=1, keepdims=True), 1e-9)
    observed, expected = observed.sum(axis=0), expected.sum(axis=0)
    return torch.from_numpy((observed + 0.1) / (expected + 0.1)).float()
