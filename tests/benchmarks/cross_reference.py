"""Deconvolution with another reference: mixtures of one set of blood cells, read with the profiles of the other.

run     python tests/benchmarks/cross_reference.py [--seeds 0 1 2] [--samples 9]        (a minute for three seeds)
needs   in --folder pbmc3k.h5ad and pbmc_facs.h5ad, as deconvolution.py

Settings of the regression are selected here, never on a real bulk. A series is a handful of samples as one laboratory would measure them:
cells of pbmc3k or of pbmc_facs in proportions like blood's, with the mRNA per cell of published values; what a type expresses differs
from the cells' (log-normal, by series and by sample); every gene is seen by another platform (log-normal, some genes far off); a type
that the reference lacks makes up a few percent of the RNA. The reference is the other set, or the half of the same set that is in no
mixture, with its types as they are or merged to broad ones.
"""

import contextlib
import io
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
from deconvolution import BLOOD_GROUPS, DATA, read_cells, reference_of, summed
from shared import parser

from lib.bulk.deconvolution import MODES, deconvolve
from lib.bulk.rna_content import rna_per_cell
from lib.evaluation import metrics

BLOOD = {"B": 0.08, "CD4": 0.32, "CD8": 0.18, "NK": 0.10, "Mono": 0.26, "DC": 0.025}  # mean shares of cells
CONCENTRATION = 40  # of the Dirichlet about them: of a series' mean, and of its samples
STATE_SD, DONOR_SD = 0.3, 0.2  # of the log expression of a gene in a type: of a series, of a sample
PLATFORM_SD, ODD_GENES, ODD_SD = 1.0, 0.05, 1.5  # of log f; odd genes have so much more
OTHER_RNA = 0.04  # mean share of RNA of types that are in no group
DEPTH = 2e7  # reads of a sample
# of a cell (EPIC; DC as monocytes)
RNA = {"B": 0.4016, "CD4": 0.3952, "CD8": 0.3952, "NK": 0.4396, "Mono": 1.4196, "DC": 1.4196}
MERGED = {"CD4": "T", "CD8": "T"}


def series(
    cells: ad.AnnData, groups: dict[str, str], n_samples: int, rng: np.random.Generator
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Bulk samples x genes, TPM, and the true shares of cells, samples x groups. groups: of the cells' types."""
    have = [group for group in BLOOD if group in groups.values()]
    mean = np.array([BLOOD[group] for group in have])
    mean = rng.dirichlet(CONCENTRATION * mean / mean.sum())
    shares = pd.DataFrame(rng.dirichlet(CONCENTRATION * mean + 0.2, n_samples), columns=have)
    within = {}  # share of each type in its group
    for group in have:
        types = [name for name in groups if groups[name] == group]
        within |= dict(zip(types, rng.dirichlet(5 * np.ones(len(types)))))
    bulk = np.zeros((n_samples, cells.n_vars))
    for name in cells.obs["cell_type"].cat.categories:
        rows = np.flatnonzero(cells.obs["cell_type"] == name)
        state = np.exp(rng.normal(0, STATE_SD, cells.n_vars))
        for i in range(n_samples):
            some = rng.choice(rows, max(20, len(rows) // 2))
            profile = np.asarray(cells.X[some].sum(axis=0)).ravel()
            amount = OTHER_RNA * rng.gamma(2, 0.5)
            if name in groups:
                amount = shares.loc[i, groups[name]] * within[name] * RNA[groups[name]] / 0.6
            bulk[i] += amount * profile / profile.sum() * state * np.exp(rng.normal(0, DONOR_SD, cells.n_vars))
    log_f = rng.normal(0, PLATFORM_SD, cells.n_vars)
    log_f += rng.normal(0, ODD_SD, cells.n_vars) * (rng.random(cells.n_vars) < ODD_GENES)
    bulk *= np.exp(log_f)
    bulk = rng.poisson(bulk / bulk.sum(axis=1, keepdims=True) * DEPTH)
    return pd.DataFrame(bulk / bulk.sum(axis=1, keepdims=True) * 1e6, columns=cells.var_names), shares


def scored(true: pd.DataFrame, estimate: pd.DataFrame, groups: dict[str, str]) -> dict[str, float]:
    """Figures over T, B, NK, Mono and DC, as far as both have them. groups: of the columns of the estimate."""
    estimate, true = summed(estimate, groups), summed(true, {group: MERGED.get(group, group) for group in true})
    both = [group for group in true if group in estimate]
    true, estimate = (table[both].div(table[both].sum(axis=1), axis=0) for table in (true, estimate))
    major = [group for group in both if group != "DC"]
    log_scale = np.log(np.maximum(estimate.mean(), 1e-3) / true.mean())[major]
    r = np.mean([metrics.pearson(true[group], estimate[group]) for group in major])
    figures = metrics.proportion_agreement(true, estimate).loc["all types", ["MAE", "CCC"]].to_dict()
    return figures | {"mean r": r, "|log scale|": log_scale.abs().mean()}


def main() -> None:
    options = parser(__doc__, data=False)
    options.add_argument("--folder", type=Path, default=DATA, help="of the cells; default: ../shared/data")
    options.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    options.add_argument("--samples", type=int, default=9, help="of a series")
    options.add_argument("--mode", choices=MODES, default="regression")
    arguments = options.parse_args()
    sets, rows = {name: read_cells(arguments.folder, name) for name in BLOOD_GROUPS}, []
    for broad, source, target in ((b, s, t) for b in (False, True) for s in BLOOD_GROUPS for t in BLOOD_GROUPS):
        mixed, cells, groups = sets[source], sets[target], BLOOD_GROUPS[target]
        groups = {name: MERGED.get(group, group) for name, group in groups.items()}
        if source == target:
            is_reference = np.random.default_rng(5).random(cells.n_obs) < 0.5
            mixed, cells = cells[~is_reference].copy(), cells[is_reference].copy()
        if broad:
            cells = cells.copy()
            cells.obs["cell_type"] = cells.obs["cell_type"].astype(str).map(groups).fillna("other").astype("category")
            groups = {group: group for group in groups.values()}
        reference = reference_of(cells[:, cells.X.getnnz(axis=0) >= 3])
        content = rna_per_cell("auto", reference)
        for seed in arguments.seeds:
            rng = np.random.default_rng([seed, arguments.samples])
            bulk, true = series(mixed, BLOOD_GROUPS[source], arguments.samples, rng)
            with contextlib.redirect_stdout(io.StringIO()):
                estimate = deconvolve(reference, bulk, arguments.mode, 0, content=content).proportions
            names = {"cells of": source, "reference": target + ", broad types" * broad}
            rows.append(names | scored(true, estimate, groups))
    groups_of_rows = pd.DataFrame(rows).groupby(["cells of", "reference"], sort=False).mean()
    print(groups_of_rows.to_string(float_format="{:.3f}".format))
    print("mean of all:", groups_of_rows.mean().map("{:.4f}".format).to_dict())


if __name__ == "__main__":
    main()
