"""How do generated cells score in the protocol that CFGen publishes, beside real train cells, which its tables leave out?

run     python tests/benchmarks/cfgen.py --data data/counts.h5ad            (3 seeds; scVI takes 20 minutes a seed, the rest 2)
        python tests/benchmarks/cfgen.py --data pbmc68k_reduced --only real ours nb
needs   tests/benchmarks/requirements.txt: scikit-misc selects the genes of data with more than 2,000 genes; scVI

The protocol (theislab/CFGen, `cfgen/eval`; Palma et al., ICLR 2025): genes that 30 cells hold, a fifth of each type as test cells, 2,000
variable genes selected on the test cells' counts (seurat_v3), counts scaled to 10,000 per cell, log(1 + x), 30 principal components of
the test cells, in which the other cells are placed. In each type, as many new cells as test cells: their 2-Wasserstein distance, and
their squared maximum mean discrepancy (MMD) with a sum of five Gaussian kernels; means over the types with at least two test cells.

Neither is 0 for real cells. The three narrow kernels of the biased MMD see little but the pairs of a cell with itself, which sum to 6 / n
for a type of n cells: nearly a lower limit, printed as well. W2 is mostly sampling noise, and grows as types get smaller. So figures can
be compared only within one split, with the train cells as the reference. `type means`, where all cells of a type are its mean profile,
shows how far W2 rewards cells that do not vary.
"""

from collections.abc import Callable
from functools import partial

import anndata as ad
import numpy as np
import pandas as pd
import scanpy as sc
import scipy.sparse as sp
from fidelity import BASELINES, CONTENDERS, Sampler
from scipy.optimize import linear_sum_assignment
from shared import codes, load, mean_and_half_range, parser, real_cells, with_counts
from sklearn.decomposition import PCA
from sklearn.metrics.pairwise import euclidean_distances

from lib.data.counts import log_normalize
from lib.models.profiles import type_means

GENE_CELLS = 30  # cells of the data set that must hold a gene
TEST_FRACTION = 0.2  # of the cells of each type
N_TOP_GENES, N_PCS = 2000, 30
TARGET = 1e4  # counts per cell after normalisation
KERNEL_WIDTHS = (0.01, 0.1, 1.0, 10.0, 100.0)  # of the Gaussian kernels of the MMD, in units of the components
PUBLISHED = "published for PBMC3K (another split, eight types), MMD / W2: c-CFGen .45 / 11.17, scVI .58 / 13.39, best .39 / 9.80"


def space_of(test: ad.AnnData) -> Callable[[ad.AnnData], np.ndarray]:
    """A function that places cells in the principal components of the test cells: cells x components."""
    genes = np.arange(test.n_vars)
    if test.n_vars > N_TOP_GENES:
        table = sc.pp.highly_variable_genes(test, flavor="seurat_v3", n_top_genes=N_TOP_GENES, inplace=False)
        genes = np.flatnonzero(table["highly_variable"])
    logs = partial(log_normalize, target=TARGET)
    pca = PCA(N_PCS, svd_solver="covariance_eigh").fit(logs(test.X)[:, genes].toarray())
    return lambda cells: pca.transform(logs(cells.X)[:, genes].toarray())


def wasserstein(x: np.ndarray, y: np.ndarray) -> float:
    """2-Wasserstein distance of as many points: the root of the smallest mean squared distance of pairs of x and y.

    CFGen uses `emd2` of POT. Between equal numbers of points of equal weight, one of the optimal plans pairs the points
    (Birkhoff), so the linear assignment of scipy is exact as well. ValueError for unequal numbers.
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


def distances(place: Callable[[ad.AnnData], np.ndarray], test: ad.AnnData, cells: ad.AnnData) -> pd.Series:
    """Mean MMD and W2 over the types with at least two test cells. cells: of the same types as `test`, in any order."""
    placed = [(place(part), part.obs["cell_type"].to_numpy()) for part in (test, cells)]
    n_test = test.obs["cell_type"].value_counts()
    pairs = [[points[types == name] for points, types in placed] for name in n_test.index[n_test > 1]]
    return pd.DataFrame({"MMD": [mmd(*pair) for pair in pairs], "W2": [wasserstein(*pair) for pair in pairs]}).mean()


def constant(train: ad.AnnData, _: int) -> Sampler:
    """All cells of a type are the mean log-normalised profile of its train cells: no variation at all."""
    means = type_means(log_normalize(train.X, TARGET).toarray(), codes(train), codes(train).max() + 1)
    return lambda types, _: sp.csr_matrix(np.expm1(means)[types], dtype=np.float32)


def main() -> None:
    options = parser(__doc__, seeds=3)
    contenders = CONTENDERS | {"means": ("type means", constant)}
    text = f"default: {' '.join(contenders)}"
    options.add_argument("--only", nargs="+", choices=contenders | BASELINES, default=list(contenders), help=text)
    arguments = options.parse_args()
    train, test = load(arguments.data, GENE_CELLS, TEST_FRACTION)
    place, rows = space_of(test), []
    for seed in range(arguments.seeds):
        for name, make in ((contenders | BASELINES)[key] for key in arguments.only):
            cells = real_cells(train, test, seed)
            if make is not None:
                cells = with_counts(test, make(train, seed)(codes(test), seed))
            rows.append(distances(place, test, cells).rename(name))
            print(f"{name}, seed {seed}: MMD {rows[-1]['MMD']:.3f}, W2 {rows[-1]['W2']:.2f}", flush=True)
    table = mean_and_half_range(pd.DataFrame(rows).groupby(level=0, sort=False))
    n_test = np.bincount(codes(test))
    print(f"\n{arguments.data}, {arguments.seeds} seeds\n{table.to_string()}")
    print(f"narrow kernels, cells with themselves: MMD {(6 / n_test[n_test > 1]).mean():.3f}\n{PUBLISHED}")


if __name__ == "__main__":
    main()
