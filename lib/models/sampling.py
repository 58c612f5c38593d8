"""New cells from a trained GMVAE: everything that happens after training.

fit_prior    z and library size of new cells, from train cells of their type (`lib.models.aggregated_posterior`), and a correction of
             each type's mean counts
sample       cells of given types, block by block; every block has its own random stream, so that processes can share the work
Shift        how the bulk encoder moves the cells of a bulk sample
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp
import torch

from lib import parallel
from lib.data.batches import CellDataset
from lib.models import aggregated_posterior, conditions, outliers
from lib.models.gmvae import GMVAE
from lib.models.likelihoods import Likelihood, sample_counts
from lib.models.profiles import counts_per_type, shrunken_ratio

BLOCK_CELLS = 256  # cells sampled at a time
N_PROFILE_CELLS = 1024  # sampled to measure a type's mean profile


class Shift(NamedTuple):
    """Affine map of z for groups of new cells (bulk sample x type), and log ratios of genes for bulk samples."""

    matrix: torch.Tensor  # (n_groups, n_latent, n_latent): z becomes matrix @ z + offset
    offset: torch.Tensor  # (n_groups, n_latent)
    log_ratio: torch.Tensor | None = None  # (n_samples, n_genes), added to the logits of all cells of a sample


@torch.no_grad()
def fit_prior(
    model: GMVAE,
    dataset: CellDataset,
    held_out: CellDataset | None,
    seed: int,
    of_cells: conditions.Conditions | None = None,
) -> None:
    """Set `model.prior`, from which `sample` takes z, library sizes and mean corrections.

    Parameters
    ----------
    dataset
        Train cells.
    held_out
        Cells not used in training, which count for the types' means; or None.
    of_cells
        Conditions of the cells; None for cells of types alone.
    """
    generator = torch.Generator(dataset.device).manual_seed(seed)
    cells = aggregated_posterior.select_cells(dataset.cell_type_idx, model.n_cell_types, np.random.default_rng(seed))
    points, types = _sample_posterior(model, dataset, cells, generator), dataset.cell_type_idx[cells]
    of_conditions: aggregated_posterior.Prior = {}
    if of_cells is not None:
        condition_idx = of_cells.idx[cells]
        shift = conditions.fit_shift(points, types, of_cells._replace(idx=condition_idx))
        points = points - shift.mean[condition_idx, types]
        of_conditions = shift.tensors("condition_shift") | {"condition_frequency": of_cells.frequency()}
    model.prior = aggregated_posterior.fit_prior(points, types, model.n_cell_types) | of_conditions
    observed = counts_per_type(dataset, model.n_cell_types)
    if held_out is not None:
        observed += counts_per_type(held_out, model.n_cell_types)
    _correct_means(model, observed, generator, of_cells)


def _sample_posterior(model: GMVAE, dataset: CellDataset, cells: np.ndarray, generator: torch.Generator) -> np.ndarray:
    """z sampled from q(z|x,y) and log library size of these cells: (n_cells, n_latent + 1)."""
    order = np.argsort(cells)
    mean, log_var, _ = model.get_latent_representation(dataset.subset(cells[order]))
    z = mean + (0.5 * log_var).exp() * torch.randn(mean.shape, generator=generator, device=generator.device).cpu()
    library_size = torch.from_numpy(dataset.library_size[cells[order]].astype(np.float32))
    log_library = model.log_library(library_size.to(model.device)).cpu()
    return torch.cat([z, log_library], dim=1).numpy()[np.argsort(order)]


def _correct_means(
    model: GMVAE, observed: np.ndarray, generator: torch.Generator, of_cells: conditions.Conditions | None
) -> None:
    """Log ratio of real to new cells' mean counts for each type and gene, by empirical Bayes. observed: (n_cell_types, n_genes).

    With conditions, also the log ratio of each condition's cells to those of all conditions.
    """
    assert model.prior is not None
    profiles = np.stack([_mean_profile(model, k, generator) for k in range(model.n_cell_types)])
    expected = profiles * observed.sum(axis=1, keepdims=True)
    ratio = shrunken_ratio(observed, expected + 1e-9)
    model.prior["log_ratio"] = torch.from_numpy(np.log(ratio)).float()
    if of_cells is not None:
        log_ratio = conditions.fit_log_ratio(of_cells, *_shifted_profiles(model, profiles * ratio))
        model.prior |= log_ratio.tensors("condition_log_ratio")


def _shifted_profiles(model: GMVAE, profiles: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The types' mean profiles after the shift of each condition, to first order (exact change of the logits at the mean of z).

    Returns
    -------
    Conditions x types x genes, rows sum to 1; theta, types x genes.
    """
    assert model.prior is not None
    y = torch.arange(model.n_cell_types, device=model.device)
    one, mean = torch.ones(len(y), device=model.device), model.prior["mean"][:, :-1].to(model.device)
    middle = model.p_x(mean, one, y)
    shifts = model.prior["condition_shift"][:, :, :-1].to(model.device)
    change = torch.stack([model.p_x(mean + shift, one, y).logits - middle.logits for shift in shifts])
    shifted = profiles * change.double().exp().cpu().numpy()
    theta = middle.log_theta.expand(len(y), -1).double().exp().cpu().numpy()
    return shifted / shifted.sum(axis=2, keepdims=True), theta


def _mean_profile(model: GMVAE, cell_type_idx: int, generator: torch.Generator) -> np.ndarray:
    """Mean expression of new cells of a type, as a fraction of their counts: (n_genes,)."""
    total = torch.zeros((), dtype=torch.float64)
    for _ in range(N_PROFILE_CELLS // BLOCK_CELLS):
        y = torch.full((BLOCK_CELLS,), cell_type_idx, device=generator.device)
        z, log_library = sample_z(model, y, 1.0, generator)
        library_size = log_library.exp()
        total = (
            total + (library_size[:, None] * model.p_x(z, library_size, y).logits.softmax(dim=1)).sum(dim=0).double()
        )
    return (total / total.sum()).cpu().numpy()


def sample_z(
    model: GMVAE, cell_type_idx: torch.Tensor, latent_spread: float, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """z, (n_cells, n_latent), and log(l / median l), (n_cells,), of new cells: from the fitted prior, else from p(z|y) p(l|z,y)."""
    mean, log_var = model.p_z(cell_type_idx)
    if model.prior is not None:
        *z, log_library = aggregated_posterior.sample_prior(model.prior, cell_type_idx, generator).unbind(dim=1)
        middle = model.prior["mean"][:, :-1].to(mean.device)[cell_type_idx]
        return middle + latent_spread * (torch.stack(z, dim=1) - middle), log_library
    new_z = mean + latent_spread * (0.5 * log_var).exp() * torch.randn(
        mean.shape, generator=generator, device=mean.device
    )
    l_mean, l_log_var = model.p_l(new_z, cell_type_idx)
    return new_z, l_mean + (0.5 * l_log_var).exp() * torch.randn(l_mean.shape, generator=generator, device=mean.device)


def sample(
    model: GMVAE, cell_type_idx: np.ndarray, seed: int, latent_spread: float = 1.0, blocks: range | None = None,
    shift: Shift | None = None, groups: np.ndarray | None = None, condition_idx: np.ndarray | None = None,
) -> Iterator[sp.csr_matrix]:  # fmt: skip
    """New cells of the given types, `BLOCK_CELLS` at a time.

    Parameters
    ----------
    cell_type_idx
        (n_cells,) type of each new cell.
    seed
        The same seed gives the same cells.
    latent_spread
        Factor of a cell's distance in z from the mean of its type: below 1 cells are more alike, above 1 less.
    blocks
        Numbers of the blocks to sample; None for all.
    shift, groups
        What bulk samples say about the states of the cells, and the group of each cell, (n_cells,): sample x n_cell_types + type.
    condition_idx
        (n_cells,) condition of each new cell, for a model with conditions; None: random, as frequent as in the type's train cells.

    Yields
    ------
    Cells x n_genes, raw counts, CSR.
    """
    prior = model.prior or {}
    if condition_idx is None and "condition_shift" in prior:
        condition_idx = conditions.assign(prior, cell_type_idx, seed)

    of_outliers = model.outlier_group.cpu().numpy(), model.outlier_rate.cpu().numpy(), model.outlier_sizes.cpu().numpy()

    @torch.no_grad()
    def sample_block(stream: tuple[slice, torch.Generator]) -> sp.csr_matrix:
        rows, generator = stream
        y = torch.from_numpy(np.asarray(cell_type_idx[rows], dtype=np.int64)).to(model.device)
        z, log_library = sample_z(model, y, latent_spread, generator)
        log_ratio = None
        if condition_idx is not None:
            kind = torch.from_numpy(condition_idx[rows].astype(np.int64)), y.cpu()
            moved, log_ratio = (prior[name][kind].to(z) for name in ("condition_shift", "condition_log_ratio"))
            z, log_library = z + moved[:, :-1], log_library + moved[:, -1]
        if shift is not None:
            assert groups is not None
            group = torch.from_numpy(groups[rows].astype(np.int64)).to(model.device)
            z = torch.einsum("nij,nj->ni", shift.matrix.to(z)[group], z) + shift.offset.to(z)[group]
            if shift.log_ratio is not None:
                of_sample = shift.log_ratio.to(z)[group // model.n_cell_types]
                log_ratio = of_sample if log_ratio is None else log_ratio + of_sample
        order = y.argsort(stable=True)
        likelihoods = _by_type(model, y, z, log_library.exp() * model.library_median, log_ratio, order)
        counts = sample_counts(likelihoods, generator)[order.argsort().cpu().numpy()]
        outliers.put_back(counts, *of_outliers, generator)
        return counts

    streams = random_streams(len(cell_type_idx), seed, blocks, model.device)
    yield from parallel.in_threads(sample_block, streams, model.device)


def _by_type(
    model: GMVAE, y: torch.Tensor, z: torch.Tensor, library_size: torch.Tensor, log_ratio: torch.Tensor | None,
    order: torch.Tensor,
) -> Iterator[Likelihood]:  # fmt: skip
    """p(x|z,y,l) of new cells, those of one type together, so that the parameters of a type are computed once.

    log_ratio: (n_cells, n_genes), added to the logits of each cell, or None; order: the cells' numbers, sorted by type.
    """
    for cells in order.split(y.bincount().tolist()):
        if len(cells):
            of_type = y[cells[:1]]
            likelihood = model.p_x(z[cells], library_size[cells], of_type)
            if model.prior is not None:
                likelihood.logits += model.prior["log_ratio"].to(z)[of_type]
            if log_ratio is not None:
                likelihood.logits += log_ratio[cells]
            likelihood.log_theta = likelihood.log_theta.view(-1)
            yield likelihood


def generate(model: GMVAE, cell_type_idx: np.ndarray, seed: int, *arguments: Any, **options: Any) -> sp.csr_matrix:
    """All new cells in one matrix, n_cells x n_genes, raw counts. Arguments as in `sample`."""
    return sp.vstack(list(sample(model, cell_type_idx, seed, *arguments, **options)), format="csr")


@torch.no_grad()
def reconstruct(model: GMVAE, dataset: CellDataset, seed: int) -> tuple[np.ndarray, sp.csr_matrix]:
    """z sampled from q(z|x,y) for labelled cells, (n_cells, n_latent), and counts sampled from p(x|z,y,l) at the cells' library sizes."""
    generator = torch.Generator(dataset.device).manual_seed(seed)
    z, counts = [], []
    for batch in dataset.in_order(BLOCK_CELLS):
        mean, log_var = model.q_z(model.encode_genes(batch), batch)
        z.append(mean + (0.5 * log_var).exp() * torch.randn(mean.shape, generator=generator, device=mean.device))
        counts.append(model.p_x(z[-1], batch.library_size, batch.cell_type_idx).sample(generator))
    return torch.cat(z).cpu().numpy(), sp.vstack(counts, format="csr")


def random_streams(
    n_cells: int, seed: int, blocks: range | None, device: torch.device
) -> Iterator[tuple[slice, torch.Generator]]:
    """Rows and random generator of each block of new cells. blocks: numbers of the blocks; None for all."""
    for number in range(n_blocks(n_cells)) if blocks is None else blocks:
        stream = np.random.SeedSequence([seed, number]).generate_state(1, np.uint64)[0]
        rows = slice(number * BLOCK_CELLS, min(n_cells, (number + 1) * BLOCK_CELLS))
        yield rows, torch.Generator(device).manual_seed(int(stream >> np.uint64(1)))


def n_blocks(n_cells: int) -> int:
    """Number of blocks in which `sample` samples so many cells."""
    return -(-n_cells // BLOCK_CELLS)
