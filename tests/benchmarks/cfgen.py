"""How do generated cells score in the protocol that CFGen publishes, beside real train cells, which its tables leave out?

run     python tests/benchmarks/cfgen.py --data data/counts.h5ad            (3 seeds; scVI takes 20 minutes a seed, the rest 2)
        python tests/benchmarks/cfgen.py --data pbmc68k_reduced --only real ours nb
needs   tests/benchmarks/requirements.txt: scikit-misc selects the genes of data with more than 2,000 genes; scVI

The protocol (theislab/CFGen, `cfgen/eval`; Palma et al., ICLR 2025): genes that 30 cells hold, a fifth of each type as test cells,
2,000 variable genes selected on the test cells' counts (seurat_v3), counts scaled to 10,000 per cell, log(1 + x), 30 principal
components of the test cells, in which the other cells are placed. In each type, as many new cells as test cells: their
2-Wasserstein distance, and their squared maximum mean discrepancy (MMD) with a sum of five Gaussian kernels. Printed: the means
over the types with at least two test cells; mean and, after +-, half the range over the seeds. 0 is best for both.

Neither is 0 for real cells. Two cells are several units apart in 30 components, so the three narrow kernels of the biased MMD see
little but the pairs of a cell with itself, which sum to 6 / n for a type of n cells: nearly a lower limit, printed as well. W2 is
mostly sampling noise too, and grows as types get smaller. So figures can be compared only within one split, with the train cells
as the reference. `type means`, where all cells of a type are its mean profile, shows how far W2 rewards cells that do not vary.
"""

import functools
import importlib.util
from typing import NamedTuple

import anndata as ad
import numpy as np
import pandas as pd
import scanpy as sc
import scipy.sparse as sp
from fidelity import GENERATORS, Generator
from generators import NAMES, generate
from scipy.optimize import linear_sum_assignment
from shared import SPLIT_SEED, evaluation_cells, mean_and_half_range, parser, read, split, with_counts
from sklearn.metrics.pairwise import euclidean_distances

from lib.data.counts import log_normalize, select_per_type
from lib.models.profiles import type_means

GENE_CELLS = 30  # cells of the data set that must hold a gene
TEST_FRACTION = 0.2  # of the cells of each type
N_TOP_GENES, N_PCS = 2000, 30
TARGET = 1e4  # counts per cell after normalisation
KERNEL_WIDTHS = (0.01, 0.1, 1.0, 10.0, 100.0)  # of the Gaussian kernels of the MMD, in units of the components
PUBLISHED = "published for PBMC3K (another split, eight types), MMD / W2: c-CFGen .45 / 11.17, scVI .58 / 13.39, best .39 / 9.80"


class Space(NamedTuple):
    """The principal components of the test cells."""

    genes: np.ndarray  # (n_top_genes,) places of the variable genes
    mean: np.ndarray  # (n_top_genes,) of their log-normalised counts
    components: np.ndarray  # (n_top_genes, N_PCS)

    def place(self, cells: ad.AnnData) -> np.ndarray:
        """Cells x components."""
        return (log_normalize(cells.X, TARGET)[:, self.genes].toarray() - self.mean) @ self.components


def space_of(test: ad.AnnData) -> Space:
    genes = np.arange(test.n_vars)
    if test.n_vars > N_TOP_GENES:
        chosen = sc.pp.highly_variable_genes(test, flavor="seurat_v3", n_top_genes=N_TOP_GENES, inplace=False)
        genes = np.flatnonzero(chosen["highly_variable"])
    logs = log_normalize(test.X, TARGET)[:, genes].toarray()
    _, components, _ = sc.pp.pca(logs, n_comps=N_PCS, svd_solver="covariance_eigh", return_info=True)[:3]
    return Space(genes, logs.mean(axis=0), components.T)


def wasserstein(x: np.ndarray, y: np.ndarray) -> float:
    """2-Wasserstein distance of as many points: the root of the smallest mean squared distance of pairs of x and y.

    CFGen uses `emd2` of POT. Between equal numbers of points of equal weight, one of the optimal plans pairs the points
    (Birkhoff), so the linear assignment of scipy is exact as well.

    Raises
    ------
    ValueError
        If there are not as many points in x as in y.
    """
    if len(x) != len(y):
        raise ValueError(f"got {len(x)} and {len(y)} cells; expected as many generated cells of a type as test cells")
    cost = euclidean_distances(x, y, squared=True)
    return float(np.sqrt(cost[linear_sum_assignment(cost)].mean()))


def mmd(x: np.ndarray, y: np.ndarray) -> float:
    """Biased squared MMD (Gretton et al. 2012, eq. 5), kernel sum over s of exp(-d^2 / (2 s^2)), s in `KERNEL_WIDTHS`."""
    squared = euclidean_distances(np.vstack([x, y]), squared=True)
    kernel = sum(np.exp(-squared / (2 * width**2)) for width in KERNEL_WIDTHS)
    n = len(x)
    return float(kernel[:n, :n].mean() + kernel[n:, n:].mean() - 2 * kernel[:n, n:].mean())


def distances(space: Space, test: ad.AnnData, cells: ad.AnnData) -> pd.Series:
    """Mean MMD and W2 over the types with at least two test cells. cells: of the same types as `test`, in any order."""
    placed = [(space.place(part), part.obs["cell_type"].to_numpy()) for part in (test, cells)]
    n_test = test.obs["cell_type"].value_counts()
    pairs = [[points[types == name] for points, types in placed] for name in n_test.index[n_test > 1]]
    found = {"MMD": [mmd(*pair) for pair in pairs], "W2": [wasserstein(*pair) for pair in pairs]}
    return pd.Series({name: np.mean(values) for name, values in found.items()})


def constant(train: ad.AnnData, types: np.ndarray, seed: int) -> sp.csr_matrix:
    """All cells of a type are the mean log-normalised profile of its train cells: no variation at all."""
    idx = train.obs["cell_type"].cat.codes.to_numpy()
    logs = log_normalize(train.X, TARGET).toarray()
    return sp.csr_matrix(np.expm1(type_means(logs, idx, idx.max() + 1))[types], dtype=np.float32)


def baseline(name: str, train: ad.AnnData, types: np.ndarray, seed: int) -> sp.csr_matrix:
    """Another generator of stage 3, with its published settings."""
    return generate(name, train, types, seed, None)[0]


CONTENDERS: dict[str, tuple[str, Generator | None]] = GENERATORS | {"means": ("type means", constant)}
BASELINES = {name: (name, functools.partial(baseline, name)) for name in NAMES if name != "gmvae"}


def load(data: str) -> tuple[ad.AnnData, ad.AnnData]:
    """Train and test cells, over the genes that `GENE_CELLS` cells hold."""
    cells = read(data)
    cells = cells[:, cells.X.getnnz(axis=0) >= GENE_CELLS].copy()
    codes = cells.obs["cell_type"].cat.codes.to_numpy(dtype=np.int64)
    train, test = split(cells, select_per_type(codes, TEST_FRACTION, np.random.default_rng(SPLIT_SEED)))
    print(f"{data}: {train.n_obs:,} train cells, {test.n_obs:,} test cells, {train.n_vars:,} genes")
    return train, test


def main() -> None:
    options = parser(__doc__, seeds=3)
    everything = CONTENDERS | BASELINES
    options.add_argument(
        "--only", nargs="+", choices=everything, default=list(CONTENDERS), help=f"default: {' '.join(CONTENDERS)}"
    )
    arguments = options.parse_args()
    chosen = dict.fromkeys(arguments.only)
    if "scvi" in chosen and importlib.util.find_spec("scvi") is None:
        print("scVI is left out: it is not installed (tests/benchmarks/requirements.txt)")
        del chosen["scvi"]
    train, test = load(arguments.data)
    types = test.obs["cell_type"].cat.codes.to_numpy(dtype=np.int64)
    space, rows = space_of(test), []
    for seed in range(arguments.seeds):
        reference = evaluation_cells(train, test, seed).real_reference
        for name, make in (everything[key] for key in chosen):
            cells = with_counts(test, make(train, types, seed)) if make else reference
            rows.append(distances(space, test, cells).rename(name))
            print(f"{name}, seed {seed}: MMD {rows[-1]['MMD']:.3f}, W2 {rows[-1]['W2']:.2f}", flush=True)
    found = mean_and_half_range(pd.DataFrame(rows).groupby(level=0, sort=False))
    n_test = np.bincount(types)
    print(f"\n{arguments.data}, {arguments.seeds} seeds\n{found.to_string()}")
    print(f"narrow kernels, cells with themselves: MMD {(6 / n_test[n_test > 1]).mean():.3f}\n{PUBLISHED}")


if __name__ == "__main__":
    main()
