"""Deconvolution with another reference: mixtures of one set of blood cells, read with the profiles of the other.

run     python tests/benchmarks/cross_reference.py [--seeds 0 1 2] [--samples 9]        (a minute for three seeds)

Settings of the regression are chosen here, never on a real bulk. A series is a handful of samples as one laboratory would
measure them: cells of pbmc3k or of pbmc_facs in proportions like blood's, with the mRNA per cell of published values; what a
type expresses differs from the cells' (log-normal, by series and by sample); every gene is seen by another platform (log-normal,
some genes far off); a type that the reference lacks makes up a few percent of the RNA. The reference is the other set, or the
half of the same set that is in no mixture, with its types as they are or merged to broad ones.
"""

import argparse
import contextlib
import io
from typing import NamedTuple

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
from deconvolution import BLOOD_GROUPS, DATA

from lib.bulk.deconvolution import MODES, deconvolve
from lib.bulk.regression import Reference, reference_profiles
from lib.bulk.rna_content import rna_per_cell
from lib.evaluation import metrics

BLOOD = {"B": 0.08, "CD4": 0.32, "CD8": 0.18, "NK": 0.10, "Mono": 0.26, "DC": 0.025}  # mean shares of cells
CONCENTRATION = 40  # of the Dirichlet about them: of a series' mean, and of its samples
STATE_SD, DONOR_SD = 0.3, 0.2  # of the log expression of a gene in a type: of a series, of a sample
PLATFORM_SD, ODD_GENES, ODD_SD = 1.0, 0.05, 1.5  # of log f; odd genes have so much more
OTHER_RNA = 0.04  # mean share of RNA of types that are in no group
DEPTH = 2e7  # reads of a sample
RNA = {
    "B": 0.4016,
    "CD4": 0.3952,
    "CD8": 0.3952,
    "NK": 0.4396,
    "Mono": 1.4196,
    "DC": 1.4196,
}  # of a cell (EPIC; DC as monocytes)
CASES = [
    (a, b, broad) for broad in (False, True) for a in BLOOD_GROUPS for b in BLOOD_GROUPS
]  # cells of, reference, merged types


class Cells(NamedTuple):
    counts: sp.csr_matrix
    cell_type: np.ndarray
    gene_names: list[str]


def read_cells(name: str) -> Cells:
    adata = ad.read_h5ad(DATA / f"{name}.h5ad")
    return Cells(
        sp.csr_matrix(adata.X, dtype=np.float32), adata.obs["cell_type"].astype(str).to_numpy(), list(adata.var_names)
    )


def halves(cells: Cells) -> np.ndarray:
    """The half of the cells that is the reference where both are of one set."""
    return np.random.default_rng(5).random(len(cells.cell_type)) < 0.5


def reference_of(cells: Cells, kept: np.ndarray, groups: dict[str, str], broad: bool) -> Reference:
    counts, names = cells.counts[kept], cells.cell_type[kept]
    if broad:
        names = np.array([merged(groups.get(name, "other")) for name in names])
    types, codes = np.unique(names, return_inverse=True)
    seen = counts.getnnz(axis=0) >= 3
    return reference_profiles(
        counts[:, seen], codes, [gene for gene, is_seen in zip(cells.gene_names, seen) if is_seen], list(types)
    )


def merged(group: str) -> str:
    return "T" if group in ("CD4", "CD8") else group


def series(
    cells: Cells, usable: np.ndarray, groups: dict[str, str], n_samples: int, rng: np.random.Generator
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Bulk samples x genes, TPM, and the true shares of cells, samples x groups."""
    have = [group for group in BLOOD if group in groups.values()]
    mean = np.array([BLOOD[group] for group in have])
    mean = rng.dirichlet(CONCENTRATION * mean / mean.sum())
    shares = rng.dirichlet(CONCENTRATION * mean + 0.2, n_samples)
    n_genes = len(cells.gene_names)
    bulk = np.zeros((n_samples, n_genes))
    within = {
        group: dict(zip(names := [n for n in groups if groups[n] == group], rng.dirichlet(5 * np.ones(len(names)))))
        for group in have
    }
    for name in np.unique(cells.cell_type):
        rows = np.flatnonzero((cells.cell_type == name) & usable)
        state = np.exp(rng.normal(0, STATE_SD, n_genes))
        for i in range(n_samples):
            some = rng.choice(rows, max(20, len(rows) // 2))
            profile = np.asarray(cells.counts[some].sum(axis=0)).ravel()
            amount = OTHER_RNA * rng.gamma(2, 0.5)
            if name in groups:
                amount = shares[i, have.index(groups[name])] * within[groups[name]][name] * RNA[groups[name]] / 0.6
            bulk[i] += amount * profile / profile.sum() * state * np.exp(rng.normal(0, DONOR_SD, n_genes))
    log_f = rng.normal(0, PLATFORM_SD, n_genes) + rng.normal(0, ODD_SD, n_genes) * (rng.random(n_genes) < ODD_GENES)
    bulk *= np.exp(log_f)
    bulk = rng.poisson(bulk / bulk.sum(axis=1, keepdims=True) * DEPTH)
    return pd.DataFrame(bulk / bulk.sum(axis=1, keepdims=True) * 1e6, columns=cells.gene_names), pd.DataFrame(
        shares, columns=have
    )


def scored(true: pd.DataFrame, found: pd.DataFrame, groups: dict[str, str], broad: bool) -> dict[str, float]:
    """Figures over T, B, NK, Mono and DC, as far as both have them."""
    groups = (
        {name: name for name in found if name != "other"}
        if broad
        else {name: merged(group) for name, group in groups.items()}
    )
    estimate = found[list(groups)].T.groupby(groups).sum().T
    true = true.T.groupby(merged).sum().T
    both = [group for group in true if group in estimate]
    a, b = (table[both].div(table[both].sum(axis=1), axis=0).to_numpy() for table in (true, estimate))
    major = [k for k, group in enumerate(both) if group != "DC"]
    scale = np.abs(np.log(np.maximum(b.mean(axis=0), 1e-3) / a.mean(axis=0)))[major].mean()
    r = np.mean([metrics.pearson(a[:, k], b[:, k]) for k in major])
    return {"MAE": metrics.mae(a, b), "CCC": metrics.ccc(a, b), "mean r": r, "|log scale|": scale}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--samples", type=int, default=9, help="of a series")
    parser.add_argument("--mode", choices=MODES, default="regression")
    arguments = parser.parse_args()
    sets = {name: read_cells(name) for name in BLOOD_GROUPS}
    rows = []
    for source, target, broad in CASES:
        first_half = halves(sets[target])
        kept = first_half if source == target else np.ones(len(first_half), bool)
        usable = ~first_half if source == target else np.ones(len(sets[source].cell_type), bool)
        reference = reference_of(sets[target], kept, BLOOD_GROUPS[target], broad)
        content = rna_per_cell("auto", reference)
        for seed in arguments.seeds:
            bulk, true = series(
                sets[source],
                usable,
                BLOOD_GROUPS[source],
                arguments.samples,
                np.random.default_rng([seed, arguments.samples]),
            )
            with contextlib.redirect_stdout(io.StringIO()):
                found = deconvolve(reference, bulk, arguments.mode, 0, content=content).proportions
            case = {"cells of": source, "reference": target + (", broad types" if broad else "")}
            rows.append(case | scored(true, found, BLOOD_GROUPS[target], broad))
    table = pd.DataFrame(rows)
    print(table.groupby(["cells of", "reference"], sort=False).mean().to_string(float_format="{:.3f}".format))
    print("mean of all:", table.drop(columns=["cells of", "reference"]).mean().map("{:.4f}".format).to_dict())


if __name__ == "__main__":
    main()
