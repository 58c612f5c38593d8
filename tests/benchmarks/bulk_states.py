"""Does a bulk change the generated cells themselves? Cells for a bulk whose cells respond to interferon, with and without the bulk encoder.

run     python tests/benchmarks/bulk_states.py --data data/counts.h5ad       (pbmc3k: 10 minutes a seed on one core)

A response to interferon is simulated on real cells, split as in fidelity.py: 28 interferon-stimulated genes gain molecules (4 % of a
cell's counts on average), six ribosomal ones lose half. A third of the train cells of every type responds (--responding; 0: a state that
the reference does not contain); no model is told which. The GMVAE and the bulk encoder are trained by the real stages 3 and 4. Then the
encoder gets two bulks of test cells, one whose cells all respond and one whose cells do not, and as many cells of each type are generated
as there are test cells: shifted by the bulk, and not. They are compared with the bulk's own cells, beside two references of real train
cells: those in the bulk's state (the best that can be reached) and all (what knows nothing of the bulk).
"""

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
from shared import CPU, STAGES, codes, load, mean_and_half_range, parser, real_cells, with_counts, workplace

from lib.baselines import registry
from lib.bulk import bulk_encoder
from lib.bulk.pseudobulk import tpm
from lib.data.embedding import variable_genes
from lib.evaluation import metrics
from lib.models.gmvae import GMVAE
from lib.models.sampling import generate
from lib.training import load_checkpoint

STIMULATED = (
    "ISG15 ISG20 IFI6 IFI16 IFI27 IFI35 IFI44 IFI44L IFIT1 IFIT2 IFIT3 IFIT5 IFITM1 IFITM2 IFITM3 MX1 MX2 OAS1 OAS2 OAS3 OASL LY6E "
    "STAT1 IRF7 CXCL10 RSAD2 XAF1 EPSTI1"
).split()
LOWERED = "RPS2 RPL3 RPLP0 RPS4X RPL5 RPS6".split()
GAIN = 0.04  # of a cell's counts
SHOWN = ["forest AUC", "linear AUC", "iLISI", "gene mean MAE"]


def respond(cells: ad.AnnData, responds: np.ndarray, seed: int) -> ad.AnnData:
    """Cells of which the given ones respond to interferon; the pattern over genes and types is the same for every seed."""
    pattern, rng = np.random.default_rng(0), np.random.default_rng(seed)
    up, down = (np.flatnonzero(cells.var_names.isin(genes)) for genes in (STIMULATED, LOWERED))
    gain = pattern.lognormal(0, 1, len(up))
    gain = GAIN * gain / gain.sum() * pattern.lognormal(0, 0.4, (len(cells.obs["cell_type"].cat.categories), len(up)))
    strength = rng.lognormal(0, 0.4, cells.n_obs) * responds
    counts = cells.X.tolil(copy=True)
    library = np.asarray(cells.X.sum(axis=1)).ravel()
    counts[:, up] = cells.X[:, up].toarray() + rng.poisson((library * strength)[:, None] * gain[codes(cells)])
    lost = rng.binomial(cells.X[:, down].toarray().astype(int), np.where(responds, 0.5, 0.0)[:, None])
    counts[:, down] = cells.X[:, down].toarray() - lost
    return with_counts(cells, sp.csr_matrix(counts, dtype=np.float32))


def trained(train: ad.AnnData, seed: int) -> tuple[GMVAE, dict]:
    """The GMVAE and the bulk encoder's checkpoint, by the real stages."""
    with workplace(train=train, test=train) as place:  # stage 2 needs test cells, which are not used here
        place.main(STAGES[2], SEED=seed, N_TRAIN_SAMPLES=100)
        place.main(STAGES[3], SEED=seed)
        place.main(STAGES[4], SEED=seed, NETWORK="bulk_encoder")
        model = registry.load(load_checkpoint(place.models / "gmvae.pt", STAGES[3]), CPU)
        return model, load_checkpoint(place.models / "bulk_encoder.pt", STAGES[4])


def cells_for(cells: ad.AnnData, model: GMVAE, checkpoint: dict, seed: int) -> tuple[dict[str, ad.AnnData], np.ndarray]:
    """Cells generated for the sum of these cells, shifted and not, and the proportions that the encoder predicts."""
    types, genes = codes(cells), cells.var_names
    bulk = pd.DataFrame(tpm(np.asarray(cells.X.sum(axis=0)).reshape(1, -1)), index=["bulk"], columns=genes)
    shift = bulk_encoder.shift(checkpoint, bulk)
    proportions = bulk_encoder.predict(checkpoint, bulk)[0].to_numpy()
    with_genes = bulk_encoder.with_genes(shift, model, list(genes), None, proportions, bulk, seed)
    counts = {
        "shifted by the bulk": generate(model, types, seed, shift=with_genes, groups=types),
        "shifted in z alone": generate(model, types, seed, shift=shift, groups=types),
        "not shifted": generate(model, types, seed),
    }
    return {name: with_counts(cells, matrix) for name, matrix in counts.items()}, proportions[0]


def distances(real: ad.AnnData, other: ad.AnnData, genes: np.ndarray, seed: int) -> pd.Series:
    """RMSE of the types' mean log(1 + counts per 10,000), over all and over the changed genes; and figures of fidelity."""
    n_cells = real.obs["cell_type"].value_counts()
    types, every = n_cells.index[n_cells >= metrics.MIN_CELLS_PER_TYPE], np.arange(real.n_vars)
    means = (metrics.mean_expression(cells, every).loc[types] for cells in (real, other))
    squared = np.square(np.subtract(*means).to_numpy())
    changed = real.var_names.isin([*STIMULATED, *LOWERED])
    rmse = np.sqrt([squared.mean(), squared[:, changed].mean()])
    figures = pd.Series(rmse, ["type means RMSE", "the same, changed genes"])
    return pd.concat([figures, metrics.fidelity(real, other, genes, seed)[SHOWN]])


def main() -> None:
    options = parser(__doc__, seeds=1)
    options.add_argument("--responding", type=float, default=1 / 3, help="share of the train cells; default: 1/3")
    arguments = options.parse_args()
    train, test = load(arguments.data)
    frequencies, rows = np.bincount(codes(test)) / test.n_obs, {}
    for seed in range(arguments.seeds):
        responds = np.random.default_rng([seed, 1]).random(train.n_obs) < arguments.responding
        reference = respond(train, responds, seed + 1000)
        reference.uns |= train.uns
        model, checkpoint = trained(reference, seed)
        genes = variable_genes(reference, metrics.N_CORRELATED_GENES)
        for name, all_respond in (("cells that respond", True), ("cells that do not", False)):
            real = respond(test, np.full(test.n_obs, all_respond), seed + 2000)
            alike = respond(train, np.full(train.n_obs, all_respond), seed + 3000)
            sets, proportions = cells_for(real, model, checkpoint, seed)
            sets["real train cells, all"] = real_cells(reference, test, seed)
            sets["real train cells in the bulk's state"] = real_cells(alike, test, seed + 1)
            error = np.abs(proportions - frequencies).mean()
            print(f"seed {seed}, bulk of {name}: MAE of the proportions {error:.4f}", flush=True)
            rows |= {(name, of_set, seed): distances(real, cells, genes, seed) for of_set, cells in sets.items()}
    table = pd.DataFrame(rows).T.rename_axis(["bulk of", "cells", "seed"])
    print(mean_and_half_range(table.groupby(["bulk of", "cells"], sort=False), "{:.4f}").to_string())


if __name__ == "__main__":
    main()
