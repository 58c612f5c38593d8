"""How good are the generated cells of a type that has 10, 20 or 30 train cells, and what do they lack?

run     python tests/benchmarks/rare.py --data data/counts.h5ad             (one seed; 4 trainings of the GMVAE, 5 minutes)

Every other type, in the order of size, of those with 20 test cells is made rare: of its train cells only so many random ones are
kept. The other types keep all. Everything is trained by the real stage 3 on these cells. For each rare type, generated cells are
compared with its test cells: AUCs on the components and genes of this type alone, and `F1`: a forest learns all types
from generated cells, as many of each type as test cells, and predicts the types of the test cells; F1 of this type. Printed: means over
the rare types and, after +-, half the range.

`all cells` has all train cells of the rare types: what more cells would give. The rows below the GMVAE show what is missing: the
same model, whose mean expression of the rare types, or theta, or both, is that of all train cells (the theta of the model in
`all cells`). What an AUC does not lose by both is due to z and library size.
"""

import anndata as ad
import numpy as np
import pandas as pd
import torch
from fidelity import REAL, independent_nb
from shared import CPU, load, mean_and_half_range, parser, train_gmvae, with_counts
from sklearn.ensemble import RandomForestClassifier
from sklearn.metrics import f1_score

from lib.data.batches import CellDataset
from lib.data.embedding import principal_components
from lib.evaluation import metrics
from lib.models import sampling
from lib.models.gmvae import GMVAE
from lib.models.profiles import counts_per_type

SIZES = (10, 20, 30)  # train cells of a rare type


def rare_types(test: ad.AnnData) -> list[str]:
    n_cells = test.obs["cell_type"].value_counts()
    return list(n_cells.index[n_cells >= metrics.MIN_CELLS_PER_TYPE][1::2])


def thinned(train: ad.AnnData, rare: list[str], size: int, seed: int) -> ad.AnnData:
    """The train cells without all but `size` random cells of each rare type."""
    rng = np.random.default_rng([seed, size])
    keep = ~train.obs["cell_type"].isin(rare).to_numpy()
    for name in rare:
        keep[rng.permutation(np.flatnonzero(train.obs["cell_type"] == name))[:size]] = True
    return train[keep].copy()


def set_theta(model: GMVAE, like: GMVAE, k: int) -> None:
    """Give type k the theta of another model."""
    assert model.log_theta_ratio is not None and like.log_theta_ratio is not None
    model.log_theta_ratio.data[k] = (like.log_theta + like.log_theta_ratio[k] - model.log_theta).data


def set_mean(model: GMVAE, train: ad.AnnData, k: int, seed: int) -> None:
    """Give type k the mean expression of these train cells; genes without a count there keep theirs."""
    assert model.prior is not None
    idx = train.obs["cell_type"].cat.codes.to_numpy(dtype=np.int64)
    real = counts_per_type(CellDataset(train.X, idx, CPU), model.n_cell_types)[k]
    made = np.asarray(sampling.generate(model, np.full(2000, k), seed + 1).sum(axis=0)).ravel()
    half = 0.5  # of a count, on both sides
    ratio = (real + half) / (real.sum() + half * len(real)) / ((made + half) / (made.sum() + half * len(made)))
    model.prior["log_ratio"][k] += torch.from_numpy(np.log(ratio)).float()


def sets_of_cells(
    train: ad.AnnData, test: ad.AnnData, rare: list[str], sizes: list[int], seed: int
) -> dict[str, ad.AnnData]:
    """Generated cells of all types, in the order of the test cells, of each way to make them."""
    types = test.obs["cell_type"].cat.codes.to_numpy(dtype=np.int64)
    numbers = [test.obs["cell_type"].cat.categories.get_loc(name) for name in rare]
    complete, _ = train_gmvae(train, seed)
    made = {
        "all cells: GMVAE": sampling.generate(complete, types, seed),
        "all cells: NB per gene and type": independent_nb(train, types, seed),
    }
    for size in sizes:
        few = thinned(train, rare, size, seed)
        made[f"{size} cells: NB per gene and type"] = independent_nb(few, types, seed)
        model, _ = train_gmvae(few, seed)
        assert model.prior is not None
        made[f"{size} cells: GMVAE"] = sampling.generate(model, types, seed)
        ratio = model.prior["log_ratio"].clone()
        for k in numbers:
            set_mean(model, train, k, seed)
        made[f"{size} cells: GMVAE, mean of all"] = sampling.generate(model, types, seed)
        model.prior["log_ratio"] = ratio
        for k in numbers:
            set_theta(model, complete, k)
        made[f"{size} cells: GMVAE, theta of all"] = sampling.generate(model, types, seed)
        for k in numbers:
            set_mean(model, train, k, seed)
        made[f"{size} cells: GMVAE, mean and theta of all"] = sampling.generate(model, types, seed)
    return {name: with_counts(test, counts) for name, counts in made.items()}


def compare(test: ad.AnnData, cells: ad.AnnData, rare: list[str], seed: int) -> pd.DataFrame:
    """Rare types x figures."""
    pcs = principal_components(ad.concat([test, cells], index_unique="-"), metrics.N_TOP_GENES, metrics.N_PCS)
    forest = RandomForestClassifier(300, n_jobs=-1, random_state=seed)
    predicted = forest.fit(pcs[test.n_obs :], cells.obs["cell_type"].astype(str)).predict(pcs[: test.n_obs])
    rows = {}
    for name in rare:
        real, made = (part[(part.obs["cell_type"] == name).to_numpy()].copy() for part in (test, cells))
        own = principal_components(ad.concat([real, made], index_unique="-"), metrics.N_TOP_GENES, metrics.N_PCS)
        is_second = np.arange(len(own)) >= real.n_obs
        rows[name] = {
            "forest AUC": metrics.forest_auc(own, is_second, seed),
            "linear AUC": metrics.linear_auc(real, made, seed),
            "F1": f1_score(test.obs["cell_type"] == name, predicted == name),
        }
    return pd.DataFrame.from_dict(rows, orient="index")


def main() -> None:
    options = parser(__doc__, seeds=1)
    options.add_argument(
        "--sizes", nargs="+", type=int, default=SIZES, help=f"train cells; default: {' '.join(map(str, SIZES))}"
    )
    arguments = options.parse_args()
    train, test = load(arguments.data)
    rare, tables = rare_types(test), []
    for seed in range(arguments.seeds):
        sets = sets_of_cells(train, test, rare, arguments.sizes, seed)
        reference = metrics.select_like(train, test.obs["cell_type"], np.random.default_rng(seed))
        for name, cells in ({REAL: train[reference].copy()} | sets).items():
            tables.append(compare(test, cells, rare, seed).set_axis([name] * len(rare)))
            print(f"{name}, seed {seed}\n{tables[-1].set_axis(rare).round(3).to_string()}", flush=True)
    shown = mean_and_half_range(pd.concat(tables).groupby(level=0, sort=False))
    print(f"\n{arguments.data}, {arguments.seeds} seeds; rare: {', '.join(rare)}\n{shown.to_string()}")


if __name__ == "__main__":
    main()
