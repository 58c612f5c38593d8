"""The states that cells of one type are in, as places in the GMVAE's latent space, and bulk samples that favour some of them.

The axes are the principal axes of z within the types, the same for all types: a programme that several types share, such as
the answer to interferon, is one direction in all of them, because one decoder reads z for all. A mixture is made to favour a
state by drawing its cells with weights exp(strength x place on an axis), as the cells of one donor favour one.
"""

import numpy as np
import scipy.sparse as sp
import torch

from lib.data.batches import CellDataset
from lib.models.gmvae import GMVAE

MIN_SHARE = 0.01  # of the variance within types that an axis must hold
MAX_STRENGTH = 2.5  # of the weights, per standard deviation: to so many of them the mean of a type is moved
SHARED_SHARE = 0.5  # of the mixtures in which all types favour one state; in the others, each type its own
STILL_SHARE = 0.1  # of the mixtures that favour no state

Axes = dict[str, torch.Tensor]


@torch.no_grad()
def encode(model: GMVAE, dataset: CellDataset) -> tuple[np.ndarray, np.ndarray]:
    """q(z|x,y) of every cell of known type: means and variances, each (n_cells, n_latent)."""
    parts = [torch.stack(model.q_z(model.encode_genes(batch), batch)).cpu() for batch in dataset.in_order(512)]
    mean, log_var = torch.cat(parts, dim=1).numpy()
    return mean, np.exp(log_var)


def find_axes(mean: np.ndarray, variance: np.ndarray, cell_type_idx: np.ndarray, n_cell_types: int) -> Axes:
    """
    Returns
    -------
    middle (n_cell_types, n_latent): mean of z of each type; axes (n_latent, n_axes), orthonormal, those of most variance first;
    spread (n_axes,): standard deviation of the cells' means within the types; noise (n_axes,): mean variance of q(z|x,y).
    """
    middle = np.stack(
        [
            mean[cell_type_idx == k].mean(axis=0) if (cell_type_idx == k).any() else mean.mean(axis=0)
            for k in range(n_cell_types)
        ]
    )
    within = mean - middle[cell_type_idx]
    values, vectors = np.linalg.eigh(within.T @ within / len(within))
    kept = np.flatnonzero(values[::-1] > MIN_SHARE * values.sum())
    axes = vectors[:, ::-1][:, kept]
    noise = (variance @ axes**2).mean(axis=0)
    arrays = {"middle": middle, "axes": axes, "spread": np.sqrt(values[::-1][kept]), "noise": noise}
    return {name: torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32)) for name, array in arrays.items()}


def places(axes: Axes, mean: np.ndarray, cell_type_idx: np.ndarray) -> np.ndarray:
    """Where cells lie on the axes, about their type's middle, in standard deviations: (n_cells, n_axes)."""
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
    """What the GMVAE expects of some genes in cells whose q(z|x,y) is given, at one draw of z each: (n_cells, n genes chosen)."""
    device = model.log_theta.device
    generator = torch.Generator(device).manual_seed(seed)
    log_ratio = 0.0 if model.prior is None or "log_ratio" not in model.prior else model.prior["log_ratio"].to(device)
    expected = []
    for rows in np.array_split(np.arange(len(mean)), -(-len(mean) // 256)):
        m, s, l = (
            torch.from_numpy(a[rows].astype(np.float32)).to(device) for a in (mean, np.sqrt(variance), library_size)
        )
        z = m + s * torch.randn(m.shape, generator=generator, device=device)
        y = torch.from_numpy(cell_type_idx[rows].astype(np.int64)).to(device)
        of_type = log_ratio if isinstance(log_ratio, float) else log_ratio[y]
        share = (model.p_x(z, l, y).logits + of_type).softmax(dim=1)[:, torch.from_numpy(genes).to(device)]
        expected.append((l[:, None] * share).cpu())
    return torch.cat(expected).numpy()


def mixtures(
    cells_per_type: np.ndarray,
    cell_type_idx: np.ndarray,
    place: np.ndarray,
    noise: np.ndarray,
    rng: np.random.Generator,
) -> tuple[sp.csr_matrix, np.ndarray, np.ndarray]:
    """Mixtures that favour states, and where the cells of each of their types lie.

    Parameters
    ----------
    cells_per_type
        Mixtures x types, whole numbers.
    cell_type_idx, place
        Of the cells to mix, -1 for a cell that is in no mixture; from `places`.
    noise
        (n_axes,) mean variance of q(z|x,y), in units of the axes' own variance.

    Returns
    -------
    Mixtures x cells (how often each cell is in it); means and log-scales, each mixtures x types x axes: the mean place of the
    type's cells, and half the logarithm of their variance over that of all cells of the type, both with the noise of q(z|x,y).
    """
    n, n_types, n_axes = *cells_per_type.shape, place.shape[1]
    n_active = rng.integers(1, 4, (n, 1))
    direction = rng.normal(size=(n, n_axes)) * (rng.random((n, n_axes)).argsort(axis=1) < n_active)
    strength = rng.uniform(0, MAX_STRENGTH, n) * (rng.random(n) >= STILL_SHARE)
    is_shared = rng.random(n) < SHARED_SHARE
    mixing = sp.csr_matrix((n, len(cell_type_idx)), dtype=np.float32)
    means, log_scales = np.zeros((2, n, n_types, n_axes), np.float32)
    for k in range(n_types):
        pool = np.flatnonzero(cell_type_idx == k)
        if not cells_per_type[:, k].any():
            continue
        if len(pool) == 0:
            raise ValueError(f"cell type number {k} has no cells to mix, expected at least one")
        own = direction[rng.permutation(n)]
        towards = np.where(is_shared[:, None], direction, own)
        towards = towards / np.linalg.norm(towards, axis=1, keepdims=True)
        drawn = np.zeros((n, len(pool)), np.float32)
        for rows in np.array_split(np.arange(n), -(-n // 500)):  # 500 mixtures x 500 cells at a time
            logits = strength[rows, None] * (towards[rows] @ place[pool].T)
            weights = np.exp(logits - logits.max(axis=1, keepdims=True))
            drawn[rows] = rng.multinomial(cells_per_type[rows, k], weights / weights.sum(axis=1, keepdims=True))
        total = np.maximum(drawn.sum(axis=1, keepdims=True), 1)
        mean = drawn @ place[pool] / total
        variance = np.maximum(drawn @ place[pool] ** 2 / total - mean**2, 0) + noise
        means[:, k], log_scales[:, k] = mean, 0.5 * np.log(variance / (place[pool].var(axis=0) + noise))
        row, column = drawn.nonzero()
        mixing += sp.csr_matrix((drawn[row, column], (row, pool[column])), shape=mixing.shape)
    return mixing, means, log_scales
