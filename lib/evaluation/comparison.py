"""Generators held against the same test cells, with real train cells beside them."""

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
from torch import nn

from lib.evaluation import metrics


def judged(real: ad.AnnData, floor: ad.AnnData, made: ad.AnnData, genes: np.ndarray, seed: int) -> pd.Series:
    """Every figure of cells against test cells, `real`, and the memorisation check; `floor` are as many train cells. As in `fidelity_table`."""
    found = metrics.fidelity(real, made, genes, seed)
    pcs = metrics.principal_components(
        ad.concat([real, floor, made], index_unique="-"), metrics.N_TOP_GENES, metrics.N_PCS
    )
    n, m = real.n_obs, floor.n_obs
    found["nearest real cell is a train cell"] = metrics.memorisation(pcs[n + m :], pcs[n : n + m], pcs[:n])
    return found


def table_of(
    models: dict[str, nn.Module], real: ad.AnnData, floor: ad.AnnData, genes: np.ndarray, seed: int
) -> pd.DataFrame:
    """Figures x generators; each makes as many cells of each type as `real` holds."""
    types = real.obs["cell_type"].cat.codes.to_numpy()
    table = {}
    for name, model in models.items():
        counts = sp.vstack(list(model.sample(types, seed + 1)), format="csr")
        table[name] = judged(
            real, floor, ad.AnnData(counts, obs=real.obs[["cell_type"]].copy(), var=real.var[[]].copy()), genes, seed
        )
    return pd.DataFrame(table)
