"""Do generated cells of a donor look like that donor's held-out cells, and a new donor like a donor that no model has seen?

run     python tests/benchmarks/donors.py --data data/counts.h5ad                          (simulated donors; 5 minutes a seed)
        python tests/benchmarks/donors.py --data data/counts.h5ad --donor-key donor        (real donors, such as those of GSE130148)

Without --donor-key, six donors are simulated: real counts are thinned by factors of donor and gene, and of donor, type and gene. Real
donors also differ in states, dispersion and correlations, so simulated ones are easier.

known: a quarter of each donor's cells of each type are test cells. Compared with them, as many cells of the same types and donors: train
cells; the GMVAE with CONDITION; the same model without; one negative binomial per gene, type and donor. `donor F1`: a forest learns the
donors from these cells and predicts those of the test cells. `donor fold change r`: of all genes between the donors, in both sets.

new: all cells of one of the large donors are left out of the training (each seed another one). Compared with these cells, as many of the
same types: those of another large donor, of donors that the GMVAE makes up (GENERATE_CONDITION = "new"), and of all known donors. Best is
the value of the other real donors: new donors should be as different as these. `distance`: root mean square log ratio of mean expression
between the two sets, over genes with 1 count per 10,000 and types.
"""

import anndata as ad
import numpy as np
import pandas as pd
from fidelity import independent_nb
from shared import REAL, aucs, codes, components, mean_and_half_range, parser, read, split, trained, with_counts

from lib.data.counts import hold_out
from lib.evaluation import metrics
from lib.models import conditions
from lib.models.sampling import generate

DONOR_SHARES = (0.3, 0.25, 0.2, 0.15, 0.07, 0.03)  # of the simulated donors among the cells
EFFECT_SHARE, TYPE_EFFECT_SHARE = 0.15, 0.05  # of the genes that a simulated donor thins in all types, and in one type
MAX_THINNED_LIBRARY = 0.4  # share of all counts that a simulated donor loses, at most
TEST_FRACTION = 0.25  # of the cells of each donor and type
N_NEW = 3  # new donors of each seed


def simulate_donors(cells: ad.AnnData, seed: int) -> ad.AnnData:
    """Set obs["donor"], and thin the counts: every count stays with probability exp(-|effect|) of its donor, type and gene."""
    rng = np.random.default_rng(seed)
    types = codes(cells)
    n_donors, n_types, n_genes = len(DONOR_SHARES), types.max() + 1, cells.n_vars
    donor = rng.choice(n_donors, cells.n_obs, p=DONOR_SHARES)
    effect = np.abs(rng.normal(0, 1, (n_donors, 1, n_genes))) * (rng.random((n_donors, 1, n_genes)) < EFFECT_SHARE)
    of_type = rng.random((n_donors, n_types, n_genes)) < TYPE_EFFECT_SHARE
    effect = effect + np.abs(rng.normal(0, 1, of_type.shape)) * of_type
    library = rng.uniform(1 - MAX_THINNED_LIBRARY, 1, n_donors)
    rows = np.repeat(np.arange(cells.n_obs), np.diff(cells.X.indptr))
    stays = library[donor[rows]] * np.exp(-effect[donor[rows], types[rows], cells.X.indices])
    cells.X.data = rng.binomial(cells.X.data.astype(np.int64), stays).astype(np.float32)
    cells.X.eliminate_zeros()
    cells.obs["donor"] = [f"donor{d + 1}" for d in donor]
    return cells[cells.X.getnnz(axis=1) > 0].copy()


def labelled(cells: ad.AnnData, labels: pd.Series) -> ad.AnnData:
    """The same counts, with other labels in obs["cell_type"]."""
    obs = pd.DataFrame({"cell_type": pd.Categorical(labels.astype(str))}, index=cells.obs_names)
    return ad.AnnData(cells.X, obs=obs, var=cells.var)


def like(cells: ad.AnnData, groups: pd.Series, expected: pd.Series, seed: int) -> ad.AnnData:
    """Random cells, as many of each group as `expected` has (all where there are fewer). groups: of `cells`."""
    return cells[metrics.select_like(labelled(cells, groups), expected, np.random.default_rng(seed))].copy()


def known_donors(cells: ad.AnnData, seed: int) -> list[pd.Series]:
    """Compare sets of cells of the types and donors of the test cells with these."""
    cells.obs["group"] = cells.obs["donor"].astype(str) + "|" + cells.obs["cell_type"].astype(str)
    group_idx = cells.obs["group"].astype("category").cat.codes.to_numpy(dtype=np.int64)
    train, test = split(cells, hold_out(group_idx, TEST_FRACTION, np.random.default_rng(seed)))
    types = codes(test)
    model, checkpoint = trained(train, seed, CONDITION="donor")
    donors = checkpoint["conditions"]["values"]  # in the order of their numbers
    donor_idx = np.array([donors.index(name) for name in test.obs["donor"]])
    counts = {"GMVAE, by type and donor": generate(model, types, seed, condition_idx=donor_idx)}
    # without conditions, what is left is the model of the types, fitted to all donors
    model.prior = {name: value for name, value in model.prior.items() if not name.startswith("condition_")}
    counts["GMVAE, by type"] = generate(model, types, seed)
    grouped = labelled(train, train.obs["group"])
    groups = grouped.obs["cell_type"].cat.categories.get_indexer(test.obs["group"])
    counts["NB per gene, type and donor"] = independent_nb(grouped, seed)(groups, seed)
    sets = {name: with_counts(test, matrix) for name, matrix in counts.items()}
    for part in sets.values():
        part.obs["donor"] = test.obs["donor"].to_numpy()
    sets = {REAL: like(train, train.obs["group"], test.obs["group"], seed)} | sets
    return [compare_known(test, part, seed).rename(name) for name, part in sets.items()]


def compare_known(test: ad.AnnData, cells: ad.AnnData, seed: int) -> pd.Series:
    pcs, donors = components(test, cells), [part.obs["donor"].astype(str) for part in (test, cells)]
    by_donor = [labelled(part, names) for part, names in zip((test, cells), donors)]
    figures = {
        "donor F1": metrics.transfer_f1(pcs[1], donors[1].to_numpy(), pcs[0], donors[0].to_numpy(), seed),
        "donor fold change r": metrics.marker_recovery(*by_donor)[1],
        "library size KS": metrics.distribution_distances(test, cells)["library size KS"],
    }
    return pd.Series(aucs(test, cells, pcs, seed) | figures)


def new_donor(cells: ad.AnnData, seed: int) -> list[pd.Series]:
    """Leave out one donor; compare its cells with those of other donors, real and new."""
    n_cells = cells.obs["donor"].value_counts()  # the largest first
    large = list(n_cells.index[n_cells >= n_cells.iloc[0] / 2])
    left_out = large[seed % len(large)]
    train, test = split(cells, (cells.obs["donor"] == left_out).to_numpy())
    sets = [("another real donor", train[train.obs["donor"] == name]) for name in large if name != left_out]
    model, _ = trained(train, seed, CONDITION="donor")
    prior, types = model.prior, codes(test)
    for number in range(N_NEW):
        model.prior = conditions.add_new(prior, seed * N_NEW + number)
        last = np.full(len(types), len(model.prior["condition_shift"]) - 1)
        counts = generate(model, types, seed * N_NEW + number, condition_idx=last)
        sets.append(("a new donor", with_counts(test, counts)))
    model.prior = prior
    sets.append(("all known donors", with_counts(test, generate(model, types, seed))))
    n = min(part.n_obs for _, part in sets)
    some, rows = test[np.sort(np.random.default_rng(seed).permutation(test.n_obs)[:n])].copy(), []
    for name, part in sets:
        others = like(part.copy(), part.obs["cell_type"], some.obs["cell_type"], seed)
        figures = aucs(some, others, components(some, others), seed) | {"distance": distance(some, others)}
        rows.append(pd.Series(figures, name=name))
    return rows


def distance(test: ad.AnnData, cells: ad.AnnData) -> float:
    first, second = (metrics.mean_expression(part, np.arange(test.n_vars)).dropna() for part in (test, cells))
    types = first.index.intersection(second.index)
    ratio = np.log2((second.loc[types] + 0.1) / (first.loc[types] + 0.1)).to_numpy()[first.loc[types] > 1]
    return float(np.sqrt((ratio**2).mean()))


def main() -> None:
    options = parser(__doc__, seeds=3)
    options.add_argument("--donor-key", nargs=1, default=[], metavar="COLUMN", help="of obs, with real donors")
    options.add_argument("--only", nargs="+", choices=("known", "new"), default=["known", "new"], help="default: both")
    arguments = options.parse_args()
    tables: dict[str, list[pd.Series]] = {name: [] for name in arguments.only}
    for seed in range(arguments.seeds):
        cells = read(arguments.data, *arguments.donor_key)
        if arguments.donor_key:
            cells.obs["donor"] = cells.obs[arguments.donor_key[0]]
        else:
            cells = simulate_donors(cells, seed)
        for name in arguments.only:
            rows = known_donors(cells, seed) if name == "known" else new_donor(cells, seed)
            tables[name] += rows
            print(f"{name}, seed {seed}\n{pd.DataFrame(rows).round(3).to_string()}", flush=True)
    for name, rows in tables.items():
        shown = mean_and_half_range(pd.DataFrame(rows).groupby(level=0, sort=False)).T
        print(f"\n{arguments.data}, {name} donors\n{shown.to_string()}")


if __name__ == "__main__":
    main()
