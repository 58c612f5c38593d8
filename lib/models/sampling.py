"""New cells from a trained GMVAE: everything that happens after training.

fit_prior    z and library size of new cells: the aggregated posterior of the train cells of their type; a correction of its mean counts
sample       cells of given types in blocks, each with its own random stream, so that processes can share the work

Training brings q(z|x,y) and p(z|y) together, but not completely: the aggregated posterior of a type's cells (Tomczak and Welling,
"VAE with a VampPrior", AISTATS 2018) is not Gaussian, because programmes that only few cells switch on are skewed and heavy-tailed, and a
type may consist of several groups of cells. New cells therefore take z and library size from samples of q(z|x,y) of the train cells,
blurred by the deviations of other cells: the fewer cells a type has, the more (a smoothed bootstrap, Silverman and Young 1987).
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from lib import parallel
from lib.data.batches import CellDataset
from lib.models import conditions
from lib.models.gmvae import GMVAE, Prior
from lib.models.likelihoods import Likelihood, sample_counts
from lib.models.profiles import add_outliers, counts_per_type, posterior_ratio, type_means

BLOCK_CELLS = 256  # cells sampled at a time
N_PROFILE_CELLS = 1024  # sampled to measure a type's mean profile
MAX_POINTS = 10_000  # train cells of each type whose z and library size are kept
PRIOR_CELLS = 10  # weight, in cells, of the deviations of all types in the variance of one type

Stream = tuple[slice, torch.Generator]  # rows of a block of new cells, and their random generator


class Shift(NamedTuple):
    """Affine map of z for groups of new cells (bulk sample x type), and log ratios of genes for bulk samples (`lib.bulk.bulk_encoder`)."""

    matrix: Tensor  # (n_groups, n_latent, n_latent): z becomes matrix @ z + offset
    offset: Tensor  # (n_groups, n_latent)
    log_ratio: Tensor | None = None  # (n_samples, n_genes), added to the logits of all cells of a sample


@torch.no_grad()
def fit_prior(
    model: GMVAE, dataset: CellDataset, held_out: CellDataset | None, seed: int, condition_idx: np.ndarray | None = None
) -> None:
    """Set `model.prior`: z, library sizes and mean corrections of new cells. dataset: train cells; held_out: cells not used in training,
    which count for the types' means; condition_idx: condition of every cell of the file of both.
    """
    generator = torch.Generator(dataset.device).manual_seed(seed)
    cells = select_cells(dataset.cell_type_idx, model.n_cell_types, np.random.default_rng(seed))
    points, types = _sample_posterior(model, dataset, cells, generator), dataset.cell_type_idx[cells]
    of_conditions: Prior = {}
    if condition_idx is not None:
        of_cells = conditions.read_conditions(condition_idx, dataset, held_out, model.n_cell_types)
        idx = condition_idx[dataset.cells[cells]]
        shift = conditions.fit_shift(points, types, idx, *of_cells.n_cells.shape)
        points = points - shift.mean[idx, types]
        of_conditions = shift.tensors("condition_shift") | {"condition_frequency": of_cells.frequency()}
    model.prior = aggregated_posterior(points, types, model.n_cell_types) | of_conditions
    # log ratio of real to new cells' mean counts for each type and gene, and of each condition's cells to those of all conditions
    parts = [dataset] if held_out is None else [dataset, held_out]
    observed = np.sum([counts_per_type(part, model.n_cell_types) for part in parts], axis=0)
    profiles = np.stack([_mean_profile(model, k, generator) for k in range(model.n_cell_types)])
    ratio = posterior_ratio(observed, profiles * observed.sum(axis=1, keepdims=True) + 1e-9)[0]
    model.prior["log_ratio"] = torch.from_numpy(np.log(ratio)).float()
    if condition_idx is not None:
        log_ratio = conditions.fit_log_ratio(of_cells, *_shifted_profiles(model, model.prior, profiles * ratio))
        model.prior |= log_ratio.tensors("condition_log_ratio")


def select_cells(cell_type_idx: np.ndarray, n_cell_types: int, rng: np.random.Generator) -> np.ndarray:
    """Numbers of the cells whose points are kept: at most `MAX_POINTS` random ones of each type, by type."""
    members = [np.flatnonzero(cell_type_idx == k) for k in range(n_cell_types)]
    return np.concatenate([rng.permutation(cells)[:MAX_POINTS] for cells in members])


def _sample_posterior(model: GMVAE, dataset: CellDataset, cells: np.ndarray, generator: torch.Generator) -> np.ndarray:
    """z sampled from q(z|x,y) and log library size of these cells: (n_cells, n_latent + 1)."""
    order = np.argsort(cells)
    mean, log_var, _ = model.get_latent_representation(dataset.subset(cells[order]))
    z = mean + (0.5 * log_var).exp() * torch.randn(mean.shape, generator=generator, device=generator.device).cpu()
    library_size = torch.from_numpy(dataset.library_size[cells[order]].astype(np.float32))
    log_library = model.log_library(library_size.to(model.device)).cpu()
    return torch.cat([z, log_library], dim=1).numpy()[np.argsort(order)]


def aggregated_posterior(points: np.ndarray, cell_type_idx: np.ndarray, n_cell_types: int) -> Prior:
    """mean of each type (types x dimensions); deviations of the points from it (points x dimensions); n_points (types).

    points: cells x dimensions, z and, as the last column, log library size of selected train cells, type by type.
    """
    points = points.astype(np.float64)
    mean = type_means(points, cell_type_idx, n_cell_types)
    deviations = torch.from_numpy(points - mean[cell_type_idx]).float()
    n_points = torch.from_numpy(np.bincount(cell_type_idx, minlength=n_cell_types))
    return {"mean": torch.from_numpy(mean).float(), "deviations": deviations, "n_points": n_points}


def sample_aggregated_posterior(prior: Prior, cell_type_idx: Tensor, generator: torch.Generator) -> Tensor:
    """New points for cells of the given types, (n_cells, n_dims).

    With w = PRIOR_CELLS / (n + PRIOR_CELLS) for a type of n cells: its mean + sqrt(1 - w) x the deviation of a random cell of the type
    + sqrt(w) x the deviation of a random cell of any type from the mean of its own.
    """
    device = cell_type_idx.device
    mean, deviations, n_points = (prior[name].to(device) for name in ("mean", "deviations", "n_points"))
    n_own, start = n_points[cell_type_idx], (n_points.cumsum(0) - n_points)[cell_type_idx]
    u, v = torch.rand(2, len(cell_type_idx), generator=generator, device=device, dtype=torch.float64)
    own = deviations[(start + u * n_own).long().clamp(max=len(deviations) - 1)]
    other = deviations[(v * len(deviations)).long()]
    weight = (PRIOR_CELLS / (n_own + PRIOR_CELLS))[:, None]  # 1 for a type without cells
    return mean[cell_type_idx] + (1 - weight).sqrt() * own + weight.sqrt() * other


def _shifted_profiles(model: GMVAE, prior: Prior, profiles: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean profiles after the shift of each condition, conditions x types x genes, to first order: the change of the logits is exact
    at the mean of z; theta, types x genes.
    """
    y = torch.arange(model.n_cell_types, device=model.device)
    one, mean = torch.ones(len(y), device=model.device), prior["mean"][:, :-1].to(model.device)
    at_mean = model.p_x(mean, one, y)
    shifts = prior["condition_shift"][:, :, :-1].to(model.device)
    change = torch.stack([model.p_x(mean + shift, one, y).logits - at_mean.logits for shift in shifts])
    shifted = profiles * change.double().exp().cpu().numpy()
    theta = at_mean.log_theta.expand(len(y), -1).double().exp().cpu().numpy()
    return shifted / shifted.sum(axis=2, keepdims=True), theta


def _mean_profile(model: GMVAE, cell_type_idx: int, generator: torch.Generator) -> np.ndarray:
    """Mean expression of new cells of a type, as a fraction of their counts: (n_genes,)."""
    total = torch.zeros((), dtype=torch.float64)
    y = torch.full((BLOCK_CELLS,), cell_type_idx, device=generator.device)
    for _ in range(N_PROFILE_CELLS // BLOCK_CELLS):
        z, log_library = sample_z(model, y, 1.0, generator)
        fractions = model.p_x(z, log_library.exp(), y).logits.softmax(dim=1)
        total = total + (log_library.exp()[:, None] * fractions).sum(dim=0).double()
    return (total / total.sum()).cpu().numpy()


def sample_z(model: GMVAE, y: Tensor, latent_spread: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """z, (n_cells, n_latent), and log(l / median l), (n_cells,), of new cells: from the fitted prior, else from p(z|y) p(l|z,y)."""
    mean, log_var = model.p_z(y)
    if model.prior is not None:
        points = sample_aggregated_posterior(model.prior, y, generator)
        mean = model.prior["mean"][:, :-1].to(mean.device)[y]
        return mean + latent_spread * (points[:, :-1] - mean), points[:, -1]
    noise = torch.randn(mean.shape, generator=generator, device=mean.device)
    z = mean + latent_spread * (0.5 * log_var).exp() * noise
    l_mean, l_log_var = model.p_l(z, y)
    return z, l_mean + (0.5 * l_log_var).exp() * torch.randn(l_mean.shape, generator=generator, device=mean.device)


def sample(
    model: GMVAE, cell_type_idx: np.ndarray, seed: int, latent_spread: float = 1.0, blocks: range | None = None,
    shift: Shift | None = None, groups: np.ndarray | None = None, condition_idx: np.ndarray | None = None,
) -> Iterator[sp.csr_matrix]:  # fmt: skip
    """New cells of the given types, (n_cells,), `BLOCK_CELLS` at a time: cells x n_genes, raw counts, CSR. The same seed, the same cells.

    latent_spread: factor of a cell's distance in z from the mean of its type; blocks: numbers of the blocks to sample (None: all);
    shift, groups: what bulk samples say about the states of the cells, and each cell's group, sample x n_cell_types + type, (n_cells,);
    condition_idx: (n_cells,) for a model with conditions (None: random ones, as frequent as in the type's train cells).
    """
    prior = model.prior or {}
    if condition_idx is None and "condition_shift" in prior:
        condition_idx = conditions.assign(prior, cell_type_idx, seed)
    outliers = model.outlier_group.cpu().numpy(), model.outlier_rate.cpu().numpy(), model.outlier_sizes.cpu().numpy()

    @torch.no_grad()
    def sample_block(stream: Stream) -> sp.csr_matrix:
        rows, generator = stream
        y = torch.from_numpy(np.asarray(cell_type_idx[rows], dtype=np.int64)).to(model.device)
        z, log_library = sample_z(model, y, latent_spread, generator)
        log_ratios = []  # (n_cells, n_genes), added to the logits
        if condition_idx is not None:
            effect = torch.from_numpy(condition_idx[rows].astype(np.int64)), y.cpu()
            point_shift, log_ratio = (prior[f"condition_{name}"][effect].to(z) for name in ("shift", "log_ratio"))
            z, log_library = z + point_shift[:, :-1], log_library + point_shift[:, -1]
            log_ratios.append(log_ratio)
        if shift is not None:
            assert groups is not None
            group = torch.from_numpy(groups[rows].astype(np.int64)).to(model.device)
            z = torch.einsum("nij,nj->ni", shift.matrix.to(z)[group], z) + shift.offset.to(z)[group]
            if shift.log_ratio is not None:
                log_ratios.append(shift.log_ratio.to(z)[group // model.n_cell_types])
        order = y.argsort(stable=True)
        likelihoods = _by_type(model, y, z, log_library.exp() * model.library_median, log_ratios, order)
        counts = sample_counts(likelihoods, generator)[order.argsort().cpu().numpy()]
        add_outliers(counts, *outliers, generator)
        return counts

    streams = random_streams(len(cell_type_idx), seed, blocks, model.device)
    yield from parallel.in_threads(sample_block, streams, model.device)


def _by_type(
    model: GMVAE, y: Tensor, z: Tensor, library_size: Tensor, log_ratios: list[Tensor],
    order: Tensor,
) -> Iterator[Likelihood]:  # fmt: skip
    """p(x|z,y,l) of new cells, type by type, so that the parameters of a type are computed once. order: the cells sorted by type."""
    for cells in order.split(y.bincount().tolist()):
        if len(cells):
            cell_type = y[cells[:1]]
            likelihood = model.p_x(z[cells], library_size[cells], cell_type)
            if model.prior is not None:
                likelihood.logits += model.prior["log_ratio"].to(z)[cell_type]
            for log_ratio in log_ratios:
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


def random_streams(n_cells: int, seed: int, blocks: range | None, device: torch.device) -> Iterator[Stream]:
    """Rows and random generator of each block of new cells. blocks: as of `sample`."""
    for number in range(n_blocks(n_cells)) if blocks is None else blocks:
        stream = np.random.SeedSequence([seed, number]).generate_state(1, np.uint64)[0]
        rows = slice(number * BLOCK_CELLS, min(n_cells, (number + 1) * BLOCK_CELLS))
        yield rows, torch.Generator(device).manual_seed(int(stream >> np.uint64(1)))


def n_blocks(n_cells: int) -> int:
    """Number of blocks in which `sample` samples so many cells."""
    return -(-n_cells // BLOCK_CELLS)
