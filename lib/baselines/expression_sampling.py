"""Counts of new cells from decoders of expression: what the three baselines share.

The decoders of the baselines are trained by squared error on log(1 + counts per 10,000). They model neither the library size
nor the distribution of the counts, so new cells are sampled in three steps: the library size from the train cells of the type,
each gene's fraction of the counts from the decoder, and the counts from a Poisson or a (zero-inflated) negative binomial.
"""

from collections.abc import Iterator
from typing import Protocol

import numpy as np
import scipy.sparse as sp
import torch

from lib.data.batches import CellDataset
from lib.models.likelihoods import Likelihood
from lib.models.profiles import counts_per_type
from lib.models.sampling import BLOCK_CELLS, random_streams

TARGET = 1e4  # counts per cell to which expression is scaled before log1p
MAX_LOG_EXPRESSION = 9.3  # log(1 + 10,000) = 9.2: one gene holds all counts of the cell
MAX_TRAIN_CELLS = 1000  # train cells of each type that the prior keeps
LOG_THETA_OF_POISSON = 13.8  # theta = 1e6: variance = mu + mu^2 / 1e6


class Baseline(Protocol):
    """The part of a baseline that is used here; its method `sample` is `sample_cells`."""

    n_cell_types: int
    prior: dict[str, torch.Tensor]  # fitted after training

    def parameters(self) -> Iterator[torch.nn.Parameter]: ...

    def sample_expression(
        self, cell_type_idx: torch.Tensor, latent_spread: float, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """log(1 + counts per 10,000), (n_cells, n_genes), and library size, (n_cells,), of new cells."""
        ...


def sample_cells(
    model: Baseline, cell_type_idx: np.ndarray, seed: int, latent_spread: float = 1.0, blocks: range | None = None
) -> Iterator[sp.csr_matrix]:
    """Sample new cells of the given types, in blocks that each have their own random stream.

    The method `sample` of the baselines; parameters and yields as in `lib.models.sampling.sample`.
    """
    device = next(model.parameters()).device
    for rows, generator in random_streams(len(cell_type_idx), seed, blocks, device):
        y = torch.from_numpy(np.asarray(cell_type_idx[rows], dtype=np.int64)).to(device)
        yield sample_counts(model, y, latent_spread, generator)


@torch.no_grad()
def sample_counts(model: Baseline, y: torch.Tensor, latent_spread: float, generator: torch.Generator) -> sp.csr_matrix:
    """Counts of one block of cells: Poisson, or the (ZI)NB whose `log_theta` and `zi_logits` of each gene the prior holds."""
    log_expression, library_size = model.sample_expression(y, latent_spread, generator)
    fractions = gene_fractions(log_expression) * model.prior["gene_ratio"].to(y.device)
    log_theta, zi_logits = model.prior.get("log_theta"), model.prior.get("zi_logits")
    log_theta = torch.full_like(fractions[0], LOG_THETA_OF_POISSON) if log_theta is None else log_theta.to(y.device)
    zi_logits = None if zi_logits is None else zi_logits.to(y.device).expand_as(fractions)
    return Likelihood(fractions.clamp(min=1e-12).log(), library_size.log(), log_theta, zi_logits).sample(generator)


def gene_fractions(log_expression: torch.Tensor) -> torch.Tensor:
    """Each gene's fraction of the cell's counts, from log(1 + counts per 10,000); negative values count as 0."""
    expression = torch.expm1(log_expression.clamp(0, MAX_LOG_EXPRESSION))
    return expression / expression.sum(dim=1, keepdim=True).clamp(min=1e-6)


def select_train_cells(dataset: CellDataset, n_cell_types: int, seed: int) -> dict[str, torch.Tensor]:
    """Select at most `MAX_TRAIN_CELLS` random train cells of each type; any cells for a type without train cells.

    Returns
    -------
    rows (n_selected,): indices in the data set, type by type; library_size (n_selected,); first (n_cell_types + 1,): where the
    cells of each type begin in `rows`.
    """
    rng = np.random.default_rng(seed)
    members = [rng.permutation(np.flatnonzero(dataset.cell_type_idx == k)) for k in range(n_cell_types)]
    per_type = [np.sort(rows[:MAX_TRAIN_CELLS]) for rows in members]
    per_type = [rows if len(rows) else np.arange(min(len(dataset), MAX_TRAIN_CELLS)) for rows in per_type]
    rows = np.concatenate(per_type)
    return {
        "rows": torch.from_numpy(rows),
        "library_size": torch.from_numpy(dataset.library_size[rows].astype(np.float32)),
        "first": torch.from_numpy(np.cumsum([0, *map(len, per_type)])),
    }


def sample_train_cells(
    prior: dict[str, torch.Tensor], y: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sample one of the selected train cells for each new cell: its index in `prior["rows"]`, on the CPU, and its library size."""
    first = prior["first"].to(y.device)
    n_selected = first.diff()[y]
    u = torch.rand(len(y), generator=generator, device=y.device)
    selected = (first[y] + (u * n_selected).long().clamp(max=n_selected - 1)).cpu()
    return selected, prior["library_size"][selected].to(y.device)


@torch.no_grad()
def fit_gene_ratio(model: Baseline, dataset: CellDataset, seed: int, n_cells: int = 1024) -> torch.Tensor:
    """Ratio of each gene's counts in the train cells to its expected counts in new cells of the same types: (n_genes,).

    The decoder predicts means of logarithms, which are below the logarithms of the means, above all for genes that few cells
    express. One factor per gene, the same for all types, corrects this. A pseudo-count of 0.1 keeps the ratio of unexpressed
    genes at 1.
    """
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    observed = counts_per_type(dataset, model.n_cell_types)
    expected = np.zeros_like(observed)
    for k in range(model.n_cell_types):
        for _ in range(n_cells // BLOCK_CELLS):
            y = torch.full((BLOCK_CELLS,), k, device=device)
            log_expression, library_size = model.sample_expression(y, 1.0, generator)
            expected[k] += (library_size @ gene_fractions(log_expression)).cpu().numpy()
    expected *= observed.sum(axis=1, keepdims=True) / np.maximum(expected.sum(axis=1, keepdims=True), 1e-9)
    observed, expected = observed.sum(axis=0), expected.sum(axis=0)
    return torch.from_numpy((observed + 0.1) / (expected + 0.1)).float()
