"""New cells out of decoders that only say how much of each gene is expected: what the generators beside the GMVAE share.

Those decoders give log(1 + counts per 10,000) and were trained by squared error, so they know neither how many molecules
a cell has nor how they scatter. Counts are drawn here: the library size from the type's own train cells, the gene's share
from the decoder, the count from a Poisson or a (zero-inflated) negative binomial of that mean.

Each of those generators has `draw(cell_type_idx, noise_factor, generator)`, which gives log(1 + counts per 10,000),
(n_cells, n_genes), and library sizes, (n_cells,), of new cells; and `prior`, a dict of tensors fitted after training.
"""

from collections.abc import Iterator

import numpy as np
import scipy.sparse as sp
import torch
from torch import nn

from lib.data.batches import CellDataset
from lib.models.likelihoods import Likelihood
from lib.models.profiles import counts_per_type
from lib.models.sampling import BLOCK_CELLS, random_streams

TARGET = 1e4  # counts per cell to which expression is scaled before log1p
MAX_POINTS = 1000  # train cells kept of each type
LOG_THETA_OF_POISSON = 13.8  # theta = 1e6: a variance of mu + mu^2 / 1e6


def sample(
    model: nn.Module, cell_type_idx: np.ndarray, seed: int, noise_factor: float, blocks: range | None
) -> Iterator[sp.csr_matrix]:
    """New cells, block by block, each with a random stream of its own. Parameters and yield as in `GMVAE.sample`."""
    device = next(model.parameters()).device
    for rows, generator in random_streams(len(cell_type_idx), seed, blocks, device):
        y = torch.from_numpy(np.asarray(cell_type_idx[rows], dtype=np.int64)).to(device)
        with torch.no_grad():
            yield new_counts(model, y, noise_factor, generator)


def new_counts(model: nn.Module, y: torch.Tensor, noise_factor: float, generator: torch.Generator) -> sp.csr_matrix:
    """Counts of one block: Poisson, unless the prior holds `log_theta` (and `zi_logits`) of each gene."""
    log_expression, library_size = model.draw(y, noise_factor, generator)
    share = shares(log_expression) * model.prior["gene_ratio"].to(y.device)
    log_theta, zi_logits = model.prior.get("log_theta"), model.prior.get("zi_logits")
    log_theta = torch.full_like(share[0], LOG_THETA_OF_POISSON) if log_theta is None else log_theta.to(y.device)
    zi_logits = None if zi_logits is None else zi_logits.to(y.device).expand_as(share)
    return Likelihood(share.clamp(min=1e-12).log(), library_size.log(), log_theta, zi_logits).sample(generator)


def shares(log_expression: torch.Tensor) -> torch.Tensor:
    """Each gene's share of the cell's counts, from log(1 + counts per 10,000); what a decoder puts below zero is zero."""
    expression = torch.expm1(log_expression.clamp(0, 9.3))  # 9.3: one gene is the whole cell
    return expression / expression.sum(dim=1, keepdim=True).clamp(min=1e-6)


def train_cells(dataset: CellDataset, n_cell_types: int, rng: np.random.Generator) -> dict[str, torch.Tensor]:
    """`MAX_POINTS` train cells of each type at most: `rows` in the data set, `library_size` of each, `first`, where each type's begin."""
    rows = [
        np.sort(rng.permutation(np.flatnonzero(dataset.cell_type_idx == k))[:MAX_POINTS]) for k in range(n_cell_types)
    ]
    rows = [
        r if len(r) else np.arange(min(len(dataset), MAX_POINTS)) for r in rows
    ]  # a type without train cells: any cell's
    every = np.concatenate(rows)
    return {
        "rows": torch.from_numpy(every),
        "library_size": torch.from_numpy(dataset.library_size[every].astype(np.float32)),
        "first": torch.from_numpy(np.cumsum([0, *map(len, rows)])),
    }


def pick(prior: dict[str, torch.Tensor], y: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A train cell of each wanted cell's type: its place among those that the prior keeps, (n_cells,)."""
    first = prior["first"].to(y.device)
    n_points = first.diff()[y]
    u = torch.rand(len(y), generator=generator, device=y.device)
    return first[y] + (u * n_points).long().clamp(max=n_points - 1)


@torch.no_grad()
def gene_ratio(
    model: nn.Module, dataset: CellDataset, n_cell_types: int, seed: int, n_cells: int = 1024
) -> torch.Tensor:
    """How much more of each gene the train cells have than new cells of the same types, (n_genes,).

    The mean of a logarithm is below the logarithm of the mean, most so for genes that few cells show; one factor a gene, the
    same for all types, sets that right. A tenth of a count per 10,000 cells' worth keeps unseen genes at their place.
    """
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    observed = counts_per_type(dataset, n_cell_types)
    expected = np.zeros_like(observed)
    for k in range(n_cell_types):
        for _ in range(n_cells // BLOCK_CELLS):
            y = torch.full((BLOCK_CELLS,), k, device=device)
            log_expression, library_size = model.draw(y, 1.0, generator)
            expected[k] += (library_size @ shares(log_expression)).cpu().numpy()
    expected *= observed.sum(axis=1, keepdims=True) / np.maximum(expected.sum(axis=1, keepdims=True), 1e-9)
    observed, expected = observed.sum(axis=0), expected.sum(axis=0)
    return torch.from_numpy((observed + 0.1) / (expected + 0.1)).float()
