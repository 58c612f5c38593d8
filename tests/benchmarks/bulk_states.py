"""Does a bulk change the generated cells themselves? Cells for a bulk whose cells respond to interferon, with and without the bulk encoder.

run     python tests/benchmarks/bulk_states.py --data data/counts.h5ad       (pbmc3k: 10 minutes a seed on one core)

Real cells, split as in fidelity.py. A response to interferon is simulated on them: 28 interferon-stimulated genes gain molecules
(Poisson; the gain varies with gene, type and cell, 4 % of a cell's counts on average), six ribosomal ones lose half. A third of
the train cells of every type responds (--responding); no model is told which. The GMVAE and the bulk encoder are trained by the
real stages 3 and 4 with their defaults. Then the encoder gets two bulks of test cells, one whose cells
all respond and one whose cells do not, and as many cells of each type are generated as there are test cells: shifted by
the bulk, and not shifted. They are compared with the bulk's own cells, beside two references of real train cells: those in the
bulk's state (the best that can be reached) and all (what knows nothing of the bulk). With --responding 0 no train cell
responds: a state that the reference does not contain.
"""

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from shared import CPU, load, mean_and_half_range, parser, with_counts, workplace

from lib.baselines import registry
from lib.bulk import bulk_encoder
from lib.bulk.pseudobulk import tpm
from lib.data.embedding import variable_genes
from lib.evaluation import cell_statistics, metrics
from lib.models.sampling import generate
from lib.training import load_checkpoint

STIMULATED = (
    "ISG15 ISG20 IFI6 IFI16 IFI27 IFI35 IFI44 IFI44L IFIT1 IFIT2 IFIT3 IFIT5 IFITM1 IFITM2 IFITM3 MX1 MX2 OAS1 OAS2 OAS3 OASL LY6E "
    "STAT1 IRF7 CXCL10 RSAD2 XAF1 EPSTI1"
).split()
LOWERED = "RPS2 RPL3 RPLP0 RPS4X RPL5 RPS6".split()
GAIN = 0.04  # of a cell's counts


def respond(cells: ad.AnnData, responds: np.ndarray, seed: int) -> sp.csr_matrix:
    """Counts in which the given cells respond to interferon; the pattern over genes and types is the same for every seed."""
    pattern, rng = np.random.default_rng(0), np.random.default_rng(seed)
    up, down = (np.flatnonzero(cells.var_names.isin(genes)) for genes in (STIMULATED, LOWERED))
    gain = pattern.lognormal(0, 1, len(up))
    gain = GAIN * gain / gain.sum() * pattern.lognormal(0, 0.4, (len(cells.obs["cell_type"].cat.categories), len(up)))
    strength = rng.lognormal(0, 0.4, cells.n_obs) * responds
    counts = cells.X.tolil(copy=True)
    library = np.asarray(cells.X.sum(axis=1)).ravel()
    gained = rng.poisson((library * strength)[:, None] * gain[cells.obs["cell_type"].cat.codes])
    counts[:, up] = cells.X[:, up].toarray() + gained
    lost = rng.binomial(cells.X[:, down].toarray().astype(int), np.where(responds, 0.5, 0.0)[:, None])
    counts[:, down] = cells.X[:, down].toarray() - lost
    return sp.csr_matrix(counts, dtype=np.float32)


def trained(train: ad.AnnData, seed: int) -> tuple[torch.nn.Module, dict]:
    """The GMVAE and the bulk encoder's checkpoint, by the real stages."""
    with workplace(train, train) as place:  # stage 2 needs test cells too; only its table of genes is used here
        place.main("_2_make_pseudobulk.py", SEED=seed, N_TRAIN_SAMPLES=100)
        place.main("_3_train_gmvae.py", SEED=seed)
        place.main("_4_train_sctape.py", SEED=seed, NETWORK="bulk_encoder")
        model = registry.load(load_checkpoint(place.models / "gmvae.pt", "_3_train_gmvae.py"), CPU)
        return model, load_checkpoint(place.models / "bulk_encoder.pt", "_4_train_sctape.py")


def cells_for(
    bulk_cells: ad.AnnData, model: torch.nn.Module, checkpoint: dict, seed: int
) -> tuple[dict[str, sp.csr_matrix], np.ndarray]:
    """Counts of cells generated for the sum of these cells, shifted and not, and the proportions that the encoder predicts."""
    types = bulk_cells.obs["cell_type"].cat.codes.to_numpy(dtype=np.int64)
    genes = bulk_cells.var_names
    bulk = pd.DataFrame(tpm(np.asarray(bulk_cells.X.sum(axis=0)).reshape(1, -1)), index=["bulk"], columns=genes)
    shift = bulk_encoder.shift(checkpoint, bulk)
    proportions = bulk_encoder.predict(checkpoint, bulk).to_numpy()
    with_genes = bulk_encoder.with_genes(shift, model, list(genes), None, proportions, bulk, seed)
    counts = {
        "shifted by the bulk": generate(model, types, seed, shift=with_genes, groups=types),
        "shifted in z alone": generate(model, types, seed, shift=shift, groups=types),
        "not shifted": generate(model, types, seed),
    }
    return counts, proportions[0]


def references(
    train: ad.AnnData, reference: ad.AnnData, test: ad.AnnData, all_respond: bool, seed: int
) -> dict[str, ad.AnnData]:
    """Real train cells of the test cells' types and numbers: as they are, and all in the bulk's state."""
    rng = np.random.default_rng(seed)
    every = reference[metrics.select_like(reference, test.obs["cell_type"], rng)].copy()
    alike = with_counts(train, respond(train, np.full(train.n_obs, all_respond), seed + 3000))
    alike = alike[metrics.select_like(alike, test.obs["cell_type"], rng)].copy()
    return {"real train cells, all": every, "real train cells in the bulk's state": alike}


def distances(real: ad.AnnData, other: ad.AnnData, genes: np.ndarray, seed: int) -> dict[str, float]:
    """RMSE of the types' mean log(1 + counts per 10,000), over all and over the changed genes; and figures of fidelity."""
    changed = real.var_names.isin([*STIMULATED, *LOWERED])
    errors = []
    for name in real.obs["cell_type"].cat.categories:
        parts = [cells[(cells.obs["cell_type"] == name).to_numpy()] for cells in (real, other)]
        if parts[0].n_obs >= metrics.MIN_CELLS_PER_TYPE:
            errors.append(np.subtract(*(cell_statistics.gene_statistics(part)["mean"] for part in parts)))
    squared = np.square(errors)
    found = metrics.fidelity(real, other, genes, seed)
    return {
        "type means RMSE": np.sqrt(squared.mean()),
        "the same, changed genes": np.sqrt(squared[:, changed].mean()),
        **found[["forest AUC", "linear AUC", "MMD", "iLISI", "gene mean MAE"]],
    }


def main() -> None:
    options = parser(__doc__, seeds=1)
    options.add_argument(
        "--responding", type=float, default=1 / 3, help="share of the train cells that respond; default: 1/3"
    )
    arguments = options.parse_args()
    train, test = load(arguments.data)
    frequencies = np.bincount(test.obs["cell_type"].cat.codes) / test.n_obs
    rows = {}
    for seed in range(arguments.seeds):
        responds = np.random.default_rng([seed, 1]).random(train.n_obs) < arguments.responding
        reference = with_counts(train, respond(train, responds, seed + 1000))
        reference.uns |= train.uns
        model, checkpoint = trained(reference, seed)
        genes = variable_genes(reference, metrics.N_CORRELATED_GENES)
        for bulk_name, all_respond in (("cells that respond", True), ("cells that do not", False)):
            real = with_counts(test, respond(test, np.full(test.n_obs, all_respond), seed + 2000))
            counts, proportions = cells_for(real, model, checkpoint, seed)
            sets = {name: with_counts(test, of_set) for name, of_set in counts.items()}
            sets |= references(train, reference, test, all_respond, seed)
            error = np.abs(proportions - frequencies).mean()
            print(f"seed {seed}, bulk of {bulk_name}: MAE of the proportions {error:.4f}", flush=True)
            rows |= {(bulk_name, name, seed): distances(real, cells, genes, seed) for name, cells in sets.items()}
    table = pd.DataFrame(rows).T.rename_axis(["bulk of", "cells", "seed"])
    print(mean_and_half_range(table.groupby(["bulk of", "cells"], sort=False), "{:.4f}").to_string())


if __name__ == "__main__":
    main()
