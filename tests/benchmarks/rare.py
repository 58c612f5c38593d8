"""How good are the generated cells of a type that has 10, 20 or 30 train cells, and what do they lack?

run     python tests/benchmarks/rare.py --data data/counts.h5ad             (one seed; 4 trainings of the GMVAE, 5 minutes)

Every other type, in the order of size, of those with 20 test cells is made rare: only so many random train cells of it are kept. For each
rare type, generated cells are compared with its test cells: AUCs on the components and genes of this type alone, and `F1` of this type: a
forest learns all types from generated cells and predicts those of the test cells. Printed: means over the rare types +- half the range.

`all cells` has all train cells of the rare types: what more cells would give. The rows below the GMVAE show what is missing: the same
model, whose mean expression of the rare types, or theta, or both, is that of all train cells (the theta of the model in `all cells`).
What an AUC does not lose by both is due to z and library size.
"""

from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import torch
from fidelity import REAL, independent_nb
from shared import aucs, codes, components, dataset, load, mean_and_half_range, parser, real_cells, trained, with_counts
from sklearn.ensemble import RandomForestClassifier
from sklearn.metrics import f1_score

from lib.evaluation import metrics
from lib.models.profiles import counts_per_type
from lib.models.sampling import generate

SIZES = (10, 20, 30)  # train cells of a rare type


def thinned(train: ad.AnnData, rare: list[str], size: int, seed: int) -> ad.AnnData:
    """The train cells without all but `size` random cells of each rare type."""
    rng = np.random.default_rng([seed, size])
    keep = ~train.obs["cell_type"].isin(rare).to_numpy()
    for name in rare:
        keep[rng.permutation(np.flatnonzero(train.obs["cell_type"] == name))[:size]] = True
    return train[keep].copy()


def set_mean(model: Any, train: ad.AnnData, k: int, seed: int) -> None:
    """Give type k the mean expression of these train cells; genes without a count there keep theirs."""
    real = counts_per_type(dataset(train), model.n_cell_types)[k]
    new = np.asarray(generate(model, np.full(2000, k), seed + 1).sum(axis=0)).ravel()
    half = 0.5  # of a count, on both sides
    ratio = (real + half) / (real.sum() + half * len(real)) / ((new + half) / (new.sum() + half * len(new)))
    model.prior["log_ratio"][k] += torch.from_numpy(np.log(ratio)).float()


def sets_of_cells(
    train: ad.AnnData, test: ad.AnnData, rare: list[str], sizes: list[int], seed: int
) -> dict[str, ad.AnnData]:
    """Generated cells of all types, in the order of the test cells, of each way to make them."""
    types = codes(test)
    numbers = [test.obs["cell_type"].cat.categories.get_loc(name) for name in rare]
    complete, _ = trained(train, seed)
    counts = {
        "all cells: GMVAE": generate(complete, types, seed),
        "all cells: NB per gene and type": independent_nb(train, seed)(types, seed),
    }
    for size in sizes:
        few = thinned(train, rare, size, seed)
        counts[f"{size} cells: NB per gene and type"] = independent_nb(few, seed)(types, seed)
        model, _ = trained(few, seed)
        counts[f"{size} cells: GMVAE"] = generate(model, types, seed)
        ratio = model.prior["log_ratio"].clone()
        for changes in ("mean", "theta", "mean and theta"):
            model.prior["log_ratio"] = ratio.clone()
            for k in numbers:
                if "theta" in changes:  # before the mean, which is measured on new cells
                    theirs = complete.log_theta + complete.log_theta_ratio[k]
                    model.log_theta_ratio.data[k] = (theirs - model.log_theta).data
                if "mean" in changes:
                    set_mean(model, train, k, seed)
            counts[f"{size} cells: GMVAE, {changes} of all"] = generate(model, types, seed)
    return {name: with_counts(test, matrix) for name, matrix in counts.items()}


def compare(test: ad.AnnData, cells: ad.AnnData, rare: list[str], seed: int) -> pd.DataFrame:
    """Rare types x figures."""
    test_pcs, pcs = components(test, cells)
    forest = RandomForestClassifier(300, n_jobs=-1, random_state=seed)
    predicted = forest.fit(pcs, cells.obs["cell_type"].astype(str)).predict(test_pcs)
    rows = {}
    for name in rare:
        of_type = [part[(part.obs["cell_type"] == name).to_numpy()].copy() for part in (test, cells)]
        f1 = f1_score(test.obs["cell_type"] == name, predicted == name)
        rows[name] = aucs(*of_type, components(*of_type), seed) | {"F1": f1}
    return pd.DataFrame.from_dict(rows, orient="index")


def main() -> None:
    options = parser(__doc__, seeds=1)
    options.add_argument("--sizes", nargs="+", type=int, default=SIZES, help=f"train cells; default: {SIZES}")
    arguments = options.parse_args()
    train, test = load(arguments.data)
    n_test, tables = test.obs["cell_type"].value_counts(), []
    rare = list(n_test.index[n_test >= metrics.MIN_CELLS_PER_TYPE][1::2])
    for seed in range(arguments.seeds):
        sets = {REAL: real_cells(train, test, seed)}
        sets |= sets_of_cells(train, test, rare, arguments.sizes, seed)
        for name, cells in sets.items():
            table = compare(test, cells, rare, seed)
            print(f"{name}, seed {seed}\n{table.round(3).to_string()}", flush=True)
            tables.append(table.set_axis([name] * len(rare)))
    shown = mean_and_half_range(pd.concat(tables).groupby(level=0, sort=False))
    print(f"\n{arguments.data}, {arguments.seeds} seeds; rare: {', '.join(rare)}\n{shown.to_string()}")


if __name__ == "__main__":
    main()
