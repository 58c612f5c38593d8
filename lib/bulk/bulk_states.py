"""States of the cells within a type, and mixtures that favour some states: the training data of the bulk encoder.

A state axis is a principal axis of z within the types, the same for all types: one decoder reads z for all types, so a
programme that several types share, such as the interferon response, is one direction in all of them. A mixture favours a state
because its cells are sampled with weights exp(strength x coordinate on an axis), as the cells of one donor favour a state.

The profiles to train on are sums of the counts that the GMVAE expects of each cell, not of the observed counts. A network that
sees the same few hundred cells in thousands of mixtures memorises the sampling error of their counts: on held-out cells of
pbmc3k's train part it then explains 30 % of the variance of the means instead of 42 %. The mixtures that decide when to stop
are sums of observed counts of held-out cells.
"""

from typing import NamedTuple

import anndata as ad
import numpy as np
import scipy.sparse as sp
import torch

from lib.bulk.bulk_encoder import BulkEncoder
from lib.bulk.network_input import scale
from lib.bulk.pseudobulk import sample_cells_per_type
from lib.data.batches import CellDataset
from lib.data.counts import hold_out
from lib.data.embedding import variable_genes
from lib.models.gmvae import GMVAE
from lib.models.profiles import type_means

MIN_SHARE = 0.01  # of the variance within types that a state axis must explain
MAX_STRENGTH = 2.5  # of the sampling weights, per standard deviation: a type's mean moves by up to so many
SHARED_SHARE = 0.5  # of the mixtures, in which all types favour the same state; in the others, each type its own
UNSHIFTED_SHARE = 0.1  # of the mixtures, which favour no state
MAX_POOL = 500  # cells of each type to mix from
SHARES = {"sparse": 0.1, "rare": 0.2, "near": 0.4}  # of the mixtures' proportions, see `sample_proportions`

StateAxes = dict[str, torch.Tensor]
Data = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]  # the arguments of BulkEncoder.forward


class StateMixtures(NamedTuple):
    genes: np.ndarray  # positions of the genes that the encoder uses
    axes: StateAxes
    fit: Data
    held_out: Data  # of cells that are in no mixture of `fit`

    def mean_profile(self) -> np.ndarray:
        """(n_genes,) mean share of each gene in the mixtures to train on."""
        total = np.expm1(self.fit[0].numpy().astype(np.float64)).sum(axis=0)
        return total / total.sum()


def make_mixtures(
    gmvae: GMVAE, cells: ad.AnnData, usable: np.ndarray, gene_length_bp: np.ndarray | None, n_genes: int, n_samples: int,
    cells_per_sample: int, validation_fraction: float, seed: int,
) -> StateMixtures:  # fmt: skip
    """Make mixtures of train cells, and the mean and scale of their cells' states as the encoder's targets.

    Parameters
    ----------
    cells
        Labelled train cells, in memory.
    usable
        Mask of the genes to select from.
    gene_length_bp
        Length of every gene by which bulk profiles are divided, known for usable genes; None if they are not divided.
    n_genes
        Number of genes that the encoder uses: the most variable ones.
    n_samples, cells_per_sample
        Number of mixtures in all, and cells in each.
    validation_fraction
        Share of the mixtures that are held out, and of the cells of each type that are in these mixtures alone.
    """
    n_types = len(cells.obs["cell_type"].cat.categories)
    codes = cells.obs["cell_type"].cat.codes.to_numpy(dtype=np.int64)
    composition = np.bincount(codes, minlength=n_types) / len(codes)
    genes = np.flatnonzero(usable)
    genes = genes[variable_genes(cells[:, genes], n_genes)]
    lengths = None if gene_length_bp is None else gene_length_bp[genes]
    rng = np.random.default_rng([seed, 4])
    is_held_out = hold_out(codes, validation_fraction, rng)
    dataset = CellDataset(cells.X, codes, gmvae.device)
    q_mean, q_log_var, _ = gmvae.get_latent_representation(dataset)
    mean, variance = q_mean.numpy(), np.exp(q_log_var.numpy())
    axes = find_axes(mean[~is_held_out], variance[~is_held_out], codes[~is_held_out], n_types)
    coordinates = state_coordinates(axes, mean, codes)
    posterior_variance = (axes["posterior_variance"] / axes["spread"] ** 2).numpy()
    sampled = []
    for chosen, share in ((~is_held_out, 1 - validation_fraction), (is_held_out, validation_fraction)):
        rows = select_pool(chosen, codes, n_types, rng)
        of_pool = np.where(np.bincount(codes[rows], minlength=n_types) > 0, composition, 0)
        cells_per_type = sample_cells_per_type(
            max(1, round(share * n_samples)), cells_per_sample, of_pool / of_pool[of_pool > 0].sum(), SHARES, rng
        )
        mixing, *states = mix_states(cells_per_type, codes[rows], coordinates[rows], posterior_variance, rng)
        sampled.append((rows, mixing, ((cells_per_type / cells_per_sample).astype(np.float32), *states)))
    rows, mixing, targets = sampled[0]
    expected = expected_counts(gmvae, mean[rows], variance[rows], dataset.library_size[rows], codes[rows], genes, seed)
    fit = to_data(mixing @ expected, lengths, targets)
    rows, mixing, targets = sampled[1]
    held_out = to_data((mixing @ cells.X[rows][:, genes]).toarray(), lengths, targets)
    return StateMixtures(genes, axes, fit, held_out)


def select_pool(
    chosen: np.ndarray, cell_type_idx: np.ndarray, n_cell_types: int, rng: np.random.Generator
) -> np.ndarray:
    """Rows of at most `MAX_POOL` random cells of each type among the chosen ones (a mask), ascending."""
    of_types = (np.flatnonzero(chosen & (cell_type_idx == k)) for k in range(n_cell_types))
    return np.sort(np.concatenate([rng.permutation(rows)[:MAX_POOL] for rows in of_types]))


def to_data(profiles: np.ndarray, gene_length_bp: np.ndarray | None, targets: tuple[np.ndarray, ...]) -> Data:
    """Scaled profiles and targets, as tensors. profiles: counts, mixtures x genes."""
    profiles = profiles if gene_length_bp is None else profiles / gene_length_bp
    scaled, proportions, means, log_scales = (torch.from_numpy(array) for array in (scale(profiles), *targets))
    return scaled, proportions, means, log_scales


def find_axes(mean: np.ndarray, variance: np.ndarray, cell_type_idx: np.ndarray, n_cell_types: int) -> StateAxes:
    """Principal axes of the cells' posterior means within the types.

    Parameters
    ----------
    mean, variance
        Of q(z|x,y), each (n_cells, n_latent).

    Returns
    -------
    middle
        (n_cell_types, n_latent) mean of z of each type.
    axes
        (n_latent, n_axes) orthonormal, in order of decreasing variance.
    spread
        (n_axes,) standard deviation of the posterior means within the types.
    posterior_variance
        (n_axes,) mean variance of q(z|x,y) along each axis.
    """
    middle = type_means(mean, cell_type_idx, n_cell_types)
    within = mean - middle[cell_type_idx]
    values, vectors = np.linalg.eigh(within.T @ within / len(within))
    kept = np.flatnonzero(values[::-1] > MIN_SHARE * values.sum())
    axes = vectors[:, ::-1][:, kept]
    arrays = {
        "middle": middle,
        "axes": axes,
        "spread": np.sqrt(values[::-1][kept]),
        "posterior_variance": (variance @ axes**2).mean(axis=0),
    }
    return {name: torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32)) for name, array in arrays.items()}


def state_coordinates(axes: StateAxes, mean: np.ndarray, cell_type_idx: np.ndarray) -> np.ndarray:
    """Coordinates of the cells on the state axes, relative to their type's mean, in standard deviations: (n_cells, n_axes)."""
    middle, vectors, spread = (axes[name].numpy() for name in ("middle", "axes", "spread"))
    return (mean - middle[cell_type_idx]) @ vectors / spread


@torch.no_grad()
def expected_counts(
    model: GMVAE,
    mean: np.ndarray,
    variance: np.ndarray,
    library_size: np.ndarray,
    cell_type_idx: np.ndarray,
    genes: np.ndarray,
    seed: int,
) -> np.ndarray:
    """E[x|z,y,l] of some genes, with one sample of z from q(z|x,y) per cell: (n_cells, n_genes).

    Parameters
    ----------
    mean, variance
        Of q(z|x,y), each (n_cells, n_latent).
    genes
        Positions of the genes.
    """
    device = model.log_theta.device
    generator = torch.Generator(device).manual_seed(seed)
    log_ratio = None if model.prior is None else model.prior.get("log_ratio")
    gene_idx = torch.from_numpy(genes).to(device)
    standard_deviation = np.sqrt(variance)
    expected = []
    for rows in np.array_split(np.arange(len(mean)), -(-len(mean) // 256)):
        q_mean, q_sd, library = (
            torch.from_numpy(values[rows].astype(np.float32)).to(device)
            for values in (mean, standard_deviation, library_size)
        )
        z = q_mean + q_sd * torch.randn(q_mean.shape, generator=generator, device=device)
        y = torch.from_numpy(cell_type_idx[rows].astype(np.int64)).to(device)
        correction = 0.0 if log_ratio is None else log_ratio.to(device)[y]
        share = (model.p_x(z, library, y).logits + correction).softmax(dim=1)[:, gene_idx]
        expected.append((library[:, None] * share).cpu())
    return torch.cat(expected).numpy()


def mix_states(
    cells_per_type: np.ndarray,
    cell_type_idx: np.ndarray,
    coordinates: np.ndarray,
    posterior_variance: np.ndarray,
    rng: np.random.Generator,
) -> tuple[sp.csr_matrix, np.ndarray, np.ndarray]:
    """Sample mixtures that favour states.

    Parameters
    ----------
    cells_per_type
        Mixtures x cell types, whole numbers.
    cell_type_idx
        Type of each cell; -1 for a cell that no mixture may hold.
    coordinates
        Of the cells, as `state_coordinates` gives them.
    posterior_variance
        (n_axes,) mean variance of q(z|x,y) along each axis, in units of the axis' own variance.

    Returns
    -------
    mixing
        Mixtures x cells: how often each cell is in each mixture.
    means
        Mixtures x cell types x axes: mean coordinate of the type's cells in the mixture.
    log_scales
        Mixtures x cell types x axes: half the logarithm of the ratio of two variances, that of the type's cells in the mixture
        over that of all cells of the type; both include `posterior_variance`.
    """
    n, n_types, n_axes = len(cells_per_type), cells_per_type.shape[1], coordinates.shape[1]
    n_active = rng.integers(1, 4, (n, 1))
    direction = rng.normal(size=(n, n_axes)) * (rng.random((n, n_axes)).argsort(axis=1) < n_active)
    strength = rng.uniform(0, MAX_STRENGTH, n) * (rng.random(n) >= UNSHIFTED_SHARE)
    is_shared = rng.random(n) < SHARED_SHARE
    mixing = sp.csr_matrix((n, len(cell_type_idx)), dtype=np.float32)
    means, log_scales = np.zeros((2, n, n_types, n_axes), np.float32)
    for k in range(n_types):
        pool = np.flatnonzero(cell_type_idx == k)
        if not cells_per_type[:, k].any():
            continue
        if len(pool) == 0:
            raise ValueError(f"cell type number {k} has no cells to mix, expected at least one")
        of_pool = coordinates[pool]
        own = direction[rng.permutation(n)]
        favoured = np.where(is_shared[:, None], direction, own)
        favoured = favoured / np.linalg.norm(favoured, axis=1, keepdims=True)
        sampled = np.zeros((n, len(pool)), np.float32)
        for rows in np.array_split(np.arange(n), -(-n // 500)):  # 500 mixtures x 500 cells at a time
            logits = strength[rows, None] * (favoured[rows] @ of_pool.T)
            weights = np.exp(logits - logits.max(axis=1, keepdims=True))
            sampled[rows] = rng.multinomial(cells_per_type[rows, k], weights / weights.sum(axis=1, keepdims=True))
        total = np.maximum(sampled.sum(axis=1, keepdims=True), 1)
        mean = sampled @ of_pool / total
        variance = np.maximum(sampled @ of_pool**2 / total - mean**2, 0) + posterior_variance
        means[:, k] = mean
        log_scales[:, k] = 0.5 * np.log(variance / (of_pool.var(axis=0) + posterior_variance))
        row, column = sampled.nonzero()
        mixing += sp.csr_matrix((sampled[row, column], (row, pool[column])), shape=mixing.shape)
    return mixing, means, log_scales


@torch.no_grad()
def explained(model: BulkEncoder, data: Data) -> dict[str, float]:
    """Accuracy of the encoder on mixtures.

    Returns
    -------
    mae
        Mean absolute error of the proportions.
    means, scales
        Share of the variation of the means and of the log-scales that is explained, for types that are 5 % of their mixture or
        more.
    means_rare, scales_rare
        The same for rarer types.
    """
    profiles, proportions, means, log_scales = data
    p, m, s = (part.cpu() for part in model.eval().encode(profiles.to(model.gene_mean.device)))
    found = {"mae": float((p - proportions).abs().mean())}
    movable = model.moves.cpu() > 0
    common, rare = movable & (proportions >= 0.05), movable & (proportions > 0) & (proportions < 0.05)
    for suffix, chosen in (("", common), ("_rare", rare)):
        for name, predicted, true in (("means", m, means), ("scales", s, log_scales)):
            error = (predicted - true)[chosen].square().sum() / true[chosen].square().sum()
            found[name + suffix] = 1 - float(error)
    return found
