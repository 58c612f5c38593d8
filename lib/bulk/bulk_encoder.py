"""The bulk encoder: predicts, from a bulk profile, the proportions of the cell types and the states of each type's cells.

    profile -> 600 -> 300 -> proportions; for each type, mean and log-scale of its cells' z on the state axes

For a new bulk, z is sampled from the prior of each type, then shifted and scaled as predicted: the bulk changes the cells themselves.
A state axis is a principal axis of z within the types, the same for all types: one decoder reads z for all types, so a programme
that several types share, such as the interferon response, is one direction in all of them. The encoder is trained on mixtures of
train cells that favour some states, as the cells of one donor do; it cannot show a state that the GMVAE was not trained on.

Source: bulk2sc (scGMVAE, bulk encoder; Kang et al.), an older system of the same authors, whose bulk encoder learns mean, variance
and proportion of each component of a Gaussian mixture: layer sizes and Adam at 1e-3. Ours: batch size, dropout, early stopping,
the training mixtures, axes in place of single dimensions of z, and `with_genes`.
"""

from typing import Any, NamedTuple

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from torch import nn

from lib.bulk.pseudobulk import largest_remainder, sample_cells_per_type, tpm
from lib.bulk.sctape import bulk_profiles, scale
from lib.data.batches import CellDataset
from lib.data.counts import digest, hold_out
from lib.data.embedding import variable_genes
from lib.models.gmvae import GMVAE, mlp
from lib.models.profiles import type_means
from lib.models.sampling import Shift, generate

INPUT_NOISE = 2.0  # standard deviations of Gaussian noise on each gene in training, so that no gene decides alone
MIN_CELLS = 60  # train cells that a type needs to be shifted; the states of rarer types are not known well enough
# Single genes (`with_genes`)
THRESHOLD = 2.0  # a gene changes by the part of its log ratio, bulk over cells, beyond so many standard deviations
GENES_ALIKE = 500  # genes of similar expression, over which this standard deviation is taken
PSEUDO_TPM = 20.0  # added to both sides of the ratio, which shrinks the ratios of lowly expressed genes
CELLS_SUMMED = 1000  # generated cells per sample whose sum is compared with the bulk
# Mixtures that favour some states
MIN_SHARE = 0.01  # of the variance within types that a state axis must explain
MAX_STRENGTH = 2.5  # of the sampling weights, per standard deviation: a type's mean moves by up to so many
SHARED_SHARE = 0.5  # of the mixtures, in which all types favour the same state; in the others, each type its own
UNSHIFTED_SHARE = 0.1  # of the mixtures, which favour no state
MAX_POOL = 500  # cells of each type to mix from
SHARES = {"sparse": 0.1, "rare": 0.2, "near": 0.4}  # of the mixtures' proportions, see `sample_proportions`

Data = tuple[torch.Tensor, ...]  # the arguments of BulkEncoder.forward


class BulkEncoder(nn.Module):
    """The network. n_axes: number of state axes; hidden, n_latent: sizes of its two layers."""

    mixed_precision = True  # trained in bfloat16 on a GPU
    gene_mean: torch.Tensor  # (n_genes,) over the training mixtures
    gene_scale: torch.Tensor  # (n_genes,) standard deviation over the training mixtures, plus 0.01
    is_shifted: torch.Tensor  # (n_cell_types,) 1: cells of the type are shifted; 0: they are not

    def __init__(
        self, n_genes: int, n_cell_types: int, n_axes: int, hidden: int = 600, n_latent: int = 300, dropout: float = 0.1
    ):
        super().__init__()
        sizes = dict(n_genes=n_genes, n_cell_types=n_cell_types, n_axes=n_axes, hidden=hidden, n_latent=n_latent)
        self.arguments, self.shape = {**sizes, "dropout": dropout}, (n_cell_types, n_axes)
        self.body = mlp((n_genes, hidden, n_latent), dropout)
        self.to_proportions = nn.Linear(n_latent, n_cell_types)
        self.to_mean, self.to_log_scale = (nn.Linear(n_latent, n_cell_types * n_axes) for _ in range(2))
        for head in (self.to_mean, self.to_log_scale):
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)
        self.register_buffer("gene_mean", torch.zeros(n_genes))
        self.register_buffer("gene_scale", torch.ones(n_genes))
        self.register_buffer("is_shifted", torch.ones(n_cell_types))

    def initialise(self, profiles: torch.Tensor, n_cells: np.ndarray) -> None:
        """Store the mean and standard deviation of the training mixtures, and which types have enough train cells to be shifted."""
        self.is_shifted.copy_(torch.from_numpy(n_cells >= MIN_CELLS))
        self.gene_mean.copy_(profiles.mean(dim=0))
        self.gene_scale.copy_(profiles.std(dim=0) + 0.01)

    def encode(self, profiles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Predict proportions, (n_samples, n_cell_types), and states from profiles, (n_samples, n_genes), output of `sctape.scale`.

        States, each (n_samples, n_cell_types, n_axes), in units of the train cells' standard deviation: mean of the type's cells on
        the axes, and logarithm of their standard deviation.
        """
        x = (profiles - self.gene_mean) / self.gene_scale
        h = self.body(x + INPUT_NOISE * torch.randn_like(x) if self.training else x)
        states = (head(h).unflatten(1, self.shape) for head in (self.to_mean, self.to_log_scale))
        mean, log_scale = (state * self.is_shifted[:, None] for state in states)
        return self.to_proportions(h).softmax(dim=1), mean, log_scale

    def forward(
        self, profiles: torch.Tensor, proportions: torch.Tensor, mean: torch.Tensor, log_scale: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Absolute error of proportions, squared errors of the states of present types, and the loss. Shapes as in `encode`."""
        p, m, s = self.encode(profiles)
        present = ((proportions > 0) * self.is_shifted)[:, :, None]
        present = present / (self.shape[1] * present.sum()).clamp(min=1)
        proportion_loss = (p - proportions).abs().mean()
        mean_loss, scale_loss = (((a - b).square() * present).sum() for a, b in ((m, mean), (s, log_scale)))
        loss = self.shape[0] * proportion_loss + mean_loss + scale_loss
        return {"loss": loss, "proportion_loss": proportion_loss, "mean_loss": mean_loss, "scale_loss": scale_loss}


# --- what a bulk tells


@torch.no_grad()
def read(checkpoint: dict[str, Any], bulk: pd.DataFrame) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Predict proportions, means and log-scales of bulk samples (samples x genes, TPM), in the form of `BulkEncoder.encode`."""
    command = "_4_train_sctape.py --network bulk_encoder --bulk-file"
    profiles = bulk_profiles(checkpoint, bulk, "the bulk encoder", command)
    model = BulkEncoder(**checkpoint["arguments"])
    model.load_state_dict(checkpoint["weights"])
    return model.eval().encode(profiles)


def predict(checkpoint: dict[str, Any], bulk: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Predict proportions, samples x cell types, rows sum to 1, and states of the cells. bulk: samples x genes, TPM.

    States: one row for each sample, cell type and axis of state, mean and spread of the type's cells on the axis. axis: 1, 2, ...; the
    first varies most between train cells, whose mean and spread are 0 and 1 for each type.
    """
    shares, mean, log_scale = read(checkpoint, bulk)
    levels = bulk.index, checkpoint["cell_types"], range(1, mean.shape[2] + 1)
    rows = pd.MultiIndex.from_product(levels, names=["sample", "cell_type", "axis"])
    states = pd.DataFrame({"mean": mean.ravel(), "spread": log_scale.exp().ravel()}, rows)
    return pd.DataFrame(shares.numpy(), bulk.index, checkpoint["cell_types"]), states


def shift_of_cells(
    checkpoint: dict[str, Any], model: nn.Module, gene_names: list[str], proportions: np.ndarray, bulk: pd.DataFrame, seed: int
) -> Shift:  # fmt: skip
    """How the cells of each sample and type are shifted: z (`shift`), then genes (`with_genes`); ValueError for another GMVAE."""
    if not isinstance(model, GMVAE) or weights_id(model) != checkpoint["gmvae_id"]:
        remedy = "run _4_train_sctape.py --network bulk_encoder again, or set DECONVOLUTION to regression"
        raise ValueError(f"models/bulk_encoder.pt was trained for another model than models/gmvae.pt; {remedy}")
    lengths = checkpoint["gene_length_bp"]
    return with_genes(shift(checkpoint, bulk), model, gene_names, lengths, proportions, bulk, seed)


def shift(checkpoint: dict[str, Any], bulk: pd.DataFrame) -> Shift:
    """The affine map of z for every sample and, within it, every type.

    On the axes, a cell's coordinate relative to its type's mean is multiplied by the predicted scale, then the mean is added.
    """
    axes, (_, means, log_scales) = checkpoint["axes"], read(checkpoint, bulk)
    vectors, type_mean = axes["axes"], axes["type_mean"].repeat(len(bulk), 1)
    means, scales = means.flatten(0, 1), log_scales.flatten(0, 1).exp()
    matrix = torch.eye(len(vectors)) + torch.einsum("ia,ga,ja->gij", vectors, scales - 1, vectors)
    offset = type_mean - torch.einsum("gij,gj->gi", matrix, type_mean) + (means * axes["spread"]) @ vectors.T
    return Shift(matrix, offset)


def with_genes(
    moved: Shift, model: GMVAE, gene_names: list[str], gene_length_bp: dict[str, float] | None, proportions: np.ndarray,
    bulk: pd.DataFrame, seed: int,
) -> Shift:  # fmt: skip
    """Add to a shift the log ratio of each gene, bulk over the sum of the shifted cells, as far as it stands out (`excess`).

    gene_names: of the GMVAE; gene_length_bp: by which the bulk (samples x genes, TPM) is divided, or None; genes without a length or
    a value in the bulk do not change. proportions: samples x cell types.
    """
    n_samples, n_types = proportions.shape
    n_cells = largest_remainder(proportions, CELLS_SUMMED)
    groups = np.arange(n_samples * n_types).repeat(n_cells.ravel())
    counts = generate(model, groups % n_types, seed, shift=moved, groups=groups)
    summed = sp.csr_matrix((np.ones(len(groups)), (groups // n_types, np.arange(len(groups))))) @ counts
    names = pd.Index(gene_names)
    shared = names.isin(bulk.columns) & (gene_length_bp is None or names.isin(list(gene_length_bp)))
    genes = np.asarray(gene_names)[shared]
    lengths = None if gene_length_bp is None else pd.Series(gene_length_bp)[genes].to_numpy()
    observed = tpm(bulk[genes].to_numpy()) + PSEUDO_TPM
    generated = tpm(summed[:, shared].toarray(), lengths) + PSEUDO_TPM
    log_ratio = np.zeros((n_samples, len(gene_names)), np.float32)
    log_ratio[:, shared] = [excess(np.log(a / b), a * b) for a, b in zip(observed, generated)]
    return moved._replace(log_ratio=torch.from_numpy(log_ratio))


def excess(log_ratio: np.ndarray, expression: np.ndarray) -> np.ndarray:
    """The part of each gene's log ratio beyond `THRESHOLD` robust standard deviations of genes of similar expression, 0 for most.

    Platform differences affect all genes, so they set the standard deviation, and change no gene.
    """
    result = np.zeros(len(log_ratio))
    for alike in np.array_split(np.argsort(expression, kind="stable"), max(1, len(result) // GENES_ALIKE)):
        deviation = log_ratio[alike] - np.median(log_ratio[alike])
        spread = 1.4826 * np.median(np.abs(deviation))
        result[alike] = np.sign(deviation) * np.maximum(np.abs(deviation) - THRESHOLD * spread, 0)
    return result


def weights_id(model: nn.Module) -> str:
    """Digest of all weights: it names the one GMVAE whose z a bulk encoder was trained on."""
    return digest([], *(value.cpu().numpy() for value in model.state_dict().values()))


# --- mixtures to train on


class StateMixtures(NamedTuple):
    genes: np.ndarray  # positions of the genes that the encoder uses
    axes: dict[str, torch.Tensor]  # as in `state_axes`
    fit: Data
    held_out: Data  # of cells that are in no mixture of `fit`
    mean_profile: np.ndarray  # (n_genes,) mean share of each gene in the mixtures to train on


def make_mixtures(
    gmvae: GMVAE, cells: ad.AnnData, usable: np.ndarray, gene_length_bp: np.ndarray | None, n_genes: int, n_samples: int,
    cells_per_sample: int, validation_fraction: float, seed: int,
) -> StateMixtures:  # fmt: skip
    """Make mixtures of labelled train cells, and the mean and scale of their cells' states as the encoder's targets.

    The profiles to train on are sums of the counts that the GMVAE expects of each cell: of observed counts, which are in thousands
    of mixtures, the encoder memorises the sampling error (on held-out cells it explains 30 instead of 42 % of the means' variance).

    usable: mask of the genes, of which the encoder uses the most variable ones; gene_length_bp: by which bulk profiles are divided,
    or None; validation_fraction: of the mixtures, and of the cells of each type, which are in these alone.
    """
    n_types = len(cells.obs["cell_type"].cat.categories)
    codes = cells.obs["cell_type"].cat.codes.to_numpy(dtype=np.int64)
    genes = np.flatnonzero(usable)
    genes = genes[variable_genes(cells[:, genes], n_genes)]
    rng = np.random.default_rng([seed, 4])
    is_held_out = hold_out(codes, validation_fraction, rng)
    dataset = CellDataset(cells.X, codes, gmvae.device)
    q_mean, q_log_var, _ = gmvae.get_latent_representation(dataset)
    axes = state_axes(q_mean[~is_held_out].numpy(), q_log_var[~is_held_out].numpy(), codes[~is_held_out], n_types)
    type_mean, vectors, spread = (axes[name].numpy() for name in ("type_mean", "axes", "spread"))
    coordinates = (q_mean.numpy() - type_mean[codes]) @ vectors / spread  # in the types' standard deviations
    posterior_variance = axes["posterior_variance"].numpy() / spread**2

    def sample(is_chosen: np.ndarray, share: float) -> tuple[np.ndarray, sp.csr_matrix, list[np.ndarray]]:
        """Rows of the cells, how often each one is in each mixture, and the mixtures' proportions and states."""
        of_types = (np.flatnonzero(is_chosen & (codes == k)) for k in range(n_types))
        rows = np.sort(np.concatenate([rng.permutation(cells)[:MAX_POOL] for cells in of_types]))
        composition = np.where(np.isin(np.arange(n_types), codes[rows]), np.bincount(codes, minlength=n_types), 0)
        n = max(1, round(share * n_samples))
        cells_per_type = sample_cells_per_type(n, cells_per_sample, composition / composition.sum(), SHARES, rng)
        mixing, *states = mix_states(cells_per_type, codes[rows], coordinates[rows], posterior_variance, rng)
        return rows, mixing, [(cells_per_type / cells_per_sample).astype(np.float32), *states]

    def to_data(counts: np.ndarray, targets: list[np.ndarray]) -> Data:
        profiles = scale(counts if gene_length_bp is None else counts / gene_length_bp[genes])
        return tuple(map(torch.from_numpy, (profiles, *targets)))

    rows, mixing, targets = sample(~is_held_out, 1 - validation_fraction)
    library_size = torch.from_numpy(dataset.library_size.astype(np.float32))
    of_cells = (part[rows] for part in (q_mean, q_log_var, library_size, torch.from_numpy(codes)))
    fit = to_data(mixing @ expected_counts(gmvae, genes, seed, *of_cells), targets)
    rows, mixing, targets = sample(is_held_out, validation_fraction)
    held_out = to_data((mixing @ cells.X[rows][:, genes]).toarray(), targets)
    total = np.expm1(fit[0].numpy().astype(np.float64)).sum(axis=0)
    return StateMixtures(genes, axes, fit, held_out, total / total.sum())


def state_axes(
    mean: np.ndarray, log_var: np.ndarray, cell_type_idx: np.ndarray, n_cell_types: int
) -> dict[str, torch.Tensor]:
    """Principal axes of the cells' posterior means within the types. mean, log_var: of q(z|x,y), each (n_cells, n_latent).

    type_mean: (n_cell_types, n_latent); axes: (n_latent, n_axes), orthonormal, by decreasing variance; each (n_axes,): spread, standard
    deviation of the means within the types, and posterior_variance, mean variance of q(z|x,y).
    """
    type_mean = type_means(mean, cell_type_idx, n_cell_types)
    within = mean - type_mean[cell_type_idx]
    values, vectors = np.linalg.eigh(within.T @ within / len(within))
    kept = np.flatnonzero(values[::-1] > MIN_SHARE * values.sum())
    axes, spread = vectors[:, ::-1][:, kept], np.sqrt(values[::-1][kept])
    variance = (np.exp(log_var) @ axes**2).mean(axis=0)
    arrays = {"type_mean": type_mean, "axes": axes, "spread": spread, "posterior_variance": variance}
    return {name: torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32)) for name, array in arrays.items()}


@torch.no_grad()
def expected_counts(model: GMVAE, genes: np.ndarray, seed: int, *of_cells: torch.Tensor) -> np.ndarray:
    """E[x|z,y,l] of some genes (positions), one z from q(z|x,y) per cell; of_cells: its mean and log-variance, library size, type."""
    device, expected = model.device, []
    generator = torch.Generator(device).manual_seed(seed)
    n_batches = -(-len(of_cells[0]) // 256)
    for batch in zip(*(part.tensor_split(n_batches) for part in of_cells)):
        mean, log_var, library, y = (part.to(device) for part in batch)
        z = mean + (0.5 * log_var).exp() * torch.randn(mean.shape, generator=generator, device=device)
        logits = model.p_x(z, library, y).logits
        if model.prior is not None:
            logits = logits + model.prior["log_ratio"].to(device)[y]
        expected.append((library[:, None] * logits.softmax(dim=1)[:, genes]).cpu())
    return torch.cat(expected).numpy()


def mix_states(
    cells_per_type: np.ndarray, cell_type_idx: np.ndarray, coordinates: np.ndarray, posterior_variance: np.ndarray,
    rng: np.random.Generator,
) -> tuple[sp.csr_matrix, np.ndarray, np.ndarray]:  # fmt: skip
    """Sample mixtures of `cells_per_type` (mixtures x cell types) whose cells have weights exp(strength x coordinate on an axis).

    posterior_variance: (n_axes,) mean variance of q(z|x,y), in the unit of the coordinates (cells x axes). Returns how often
    each cell is in each mixture, and, each mixtures x cell types x axes, mean and log-scale of the coordinates of a type's cells:
    half the log of their variance over that of all its cells, both including `posterior_variance`.
    """
    n, n_types, n_axes = len(cells_per_type), cells_per_type.shape[1], coordinates.shape[1]
    n_active = rng.integers(1, 4, (n, 1))
    direction = rng.normal(size=(n, n_axes)) * (rng.random((n, n_axes)).argsort(axis=1) < n_active)
    strength = rng.uniform(0, MAX_STRENGTH, n) * (rng.random(n) >= UNSHIFTED_SHARE)
    is_shared = rng.random(n) < SHARED_SHARE
    mixing = sp.csr_matrix((n, len(cell_type_idx)), dtype=np.float32)
    means, log_scales = np.zeros((2, n, n_types, n_axes), np.float32)
    for k in np.flatnonzero(cells_per_type.any(axis=0)):
        pool = np.flatnonzero(cell_type_idx == k)
        of_pool = coordinates[pool]
        favoured = np.where(is_shared[:, None], direction, direction[rng.permutation(n)])
        favoured = favoured / np.linalg.norm(favoured, axis=1, keepdims=True)
        sampled = np.zeros((n, len(pool)), np.float32)
        for rows in np.array_split(np.arange(n), -(-n // 500)):  # 500 mixtures x 500 cells at a time
            logits = strength[rows, None] * (favoured[rows] @ of_pool.T)
            weights = np.exp(logits - logits.max(axis=1, keepdims=True))
            sampled[rows] = rng.multinomial(cells_per_type[rows, k], weights / weights.sum(axis=1, keepdims=True))
        total = np.maximum(sampled.sum(axis=1, keepdims=True), 1)
        means[:, k] = sampled @ of_pool / total
        variance = np.maximum(sampled @ of_pool**2 / total - means[:, k] ** 2, 0) + posterior_variance
        log_scales[:, k] = 0.5 * np.log(variance / (of_pool.var(axis=0) + posterior_variance))
        row, column = sampled.nonzero()
        mixing += sp.csr_matrix((sampled[row, column], (row, pool[column])), shape=mixing.shape)
    return mixing, means, log_scales
