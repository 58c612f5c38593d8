"""Training of the bulk encoder: mixtures of train cells that favour some states, and the epochs.

The mixtures to train on are sums of what the GMVAE expects of the cells, not of their counts: a network that sees the same
few hundred cells in thousands of mixtures learns each cell's chance counts by heart (on the held-out cells of pbmc3k's train
part it then reads 30 % of the means' variation, not 42 %). The mixtures that it is stopped by are sums of counts of cells that
it has not seen.
"""

from typing import Any, NamedTuple

import anndata as ad
import numpy as np
import torch

from lib import parallel
from lib.bulk import states
from lib.bulk.bulk_encoder import BulkEncoder
from lib.bulk.pseudobulk import largest_remainder, sample_proportions
from lib.bulk.sctape import scale
from lib.data.batches import CellDataset
from lib.data.counts import hold_out
from lib.data.embedding import variable_genes
from lib.models.gmvae import GMVAE
from lib.training import Trainer, tensor_epoch

MAX_POOL = 500  # cells of each type to mix from
SHARES = {"sparse": 0.1, "rare": 0.2, "near": 0.4}  # of the mixtures' compositions, see `sample_proportions`

Data = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]  # profiles, proportions, means, log-scales


class Mixtures(NamedTuple):
    genes: np.ndarray  # places of those that are read
    axes: states.Axes
    fit: Data
    held_out: Data  # of cells that are in no mixture of `fit`


def make_mixtures(
    gmvae: GMVAE, cells: ad.AnnData, usable: np.ndarray, gene_length_bp: np.ndarray | None, n_genes: int, n_samples: int,
    cells_per_sample: int, validation_fraction: float, seed: int,
) -> Mixtures:  # fmt: skip
    """
    Parameters
    ----------
    cells
        Train cells of known type, in memory.
    usable
        Mask of the genes that a bulk has.
    gene_length_bp
        Of all genes, known for usable ones, by which the bulk's counts are divided; None for counts as they are.
    n_genes
        That are read: the most variable ones.
    validation_fraction
        Of the mixtures, and of the cells of each type, which make these mixtures alone.
    """
    codes, n_types = (
        cells.obs["cell_type"].cat.codes.to_numpy(dtype=np.int64),
        len(cells.obs["cell_type"].cat.categories),
    )
    genes = np.flatnonzero(usable)
    genes = genes[variable_genes(cells[:, genes], n_genes)]
    rng = np.random.default_rng([seed, 4])
    is_held_out = hold_out(codes, validation_fraction, rng)
    dataset = CellDataset(cells.X, codes, gmvae.log_theta.device)
    mean, variance = states.encode(gmvae, dataset)
    axes = states.find_axes(mean[~is_held_out], variance[~is_held_out], codes[~is_held_out], n_types)
    place, noise = states.places(axes, mean, codes), (axes["noise"] / axes["spread"] ** 2).numpy()
    composition = np.bincount(codes, minlength=n_types) / len(codes)
    made = []
    for of_part, share in ((~is_held_out, 1 - validation_fraction), (is_held_out, validation_fraction)):
        rows = np.sort(
            np.concatenate([rng.permutation(np.flatnonzero(of_part & (codes == k)))[:MAX_POOL] for k in range(n_types)])
        )
        present = np.bincount(codes[rows], minlength=n_types) > 0
        proportions = np.zeros((max(1, round(share * n_samples)), n_types))
        proportions[:, present] = sample_proportions(
            len(proportions), composition[present] / composition[present].sum(), SHARES, rng
        )
        cells_per_type = largest_remainder(proportions, cells_per_sample)
        mixing, means, log_scales = states.mixtures(cells_per_type, codes[rows], place[rows], noise, rng)
        if made:
            profiles = (mixing @ cells.X[rows][:, genes]).toarray()
        else:
            profiles = mixing @ states.expected_counts(
                gmvae, mean[rows], variance[rows], dataset.library_size[rows], codes[rows], genes, seed
            )
        profiles = profiles if gene_length_bp is None else profiles / gene_length_bp[genes]
        arrays = scale(profiles), (cells_per_type / cells_per_sample).astype(np.float32), means, log_scales
        made.append(tuple(torch.from_numpy(array) for array in arrays))
    return Mixtures(genes, axes, *made)


def fit(trainer: Trainer, mixtures: Mixtures, epochs: int, batch_size: int, max_gradient_norm: float) -> None:
    device = next(trainer.model.parameters()).device
    train, held_out = (tuple(part.to(device) for part in data) for data in (mixtures.fit, mixtures.held_out))
    shared = parallel.shared(trainer.model)

    def validate() -> dict[str, float]:
        losses = {name: float(value) for name, value in trainer.model(*held_out).items()}
        return losses | {"stopping_criterion": losses["loss"]}

    trainer.fit(
        epochs,
        lambda _: tensor_epoch(shared, trainer.optimizer, train, batch_size, max_gradient_norm, trainer.generator),
        validate,
    )


@torch.no_grad()
def explained(model: BulkEncoder, data: Data) -> dict[str, Any]:
    """What is read of mixtures: `mae` of the proportions, and the shares of the means' and the log-scales' variation that are explained,
    of types that are 5 % of their mixture or more (`means`, `scales`) and of rarer ones (`means_rare`, `scales_rare`)."""
    profiles, proportions, means, log_scales = data
    p, m, s = model.eval().encode(profiles.to(model.gene_mean.device))
    found = {"mae": float((p.cpu() - proportions).abs().mean())}
    moves = model.moves.cpu() > 0
    for suffix, chosen in (
        ("", moves & (proportions >= 0.05)),
        ("_rare", moves & (proportions > 0) & (proportions < 0.05)),
    ):
        for name, read, true in (("means", m.cpu(), means), ("scales", s.cpu(), log_scales)):
            found[name + suffix] = 1 - float((read - true)[chosen].square().sum() / true[chosen].square().sum())
    return found
