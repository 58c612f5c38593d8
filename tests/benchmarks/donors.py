"""Do generated cells of a donor look like that donor's held-out cells, and a new donor like a donor that no model has seen?

run     python tests/benchmarks/donors.py --data data/counts.h5ad                          (simulated donors; 5 minutes a seed)
        python tests/benchmarks/donors.py --data data/counts.h5ad --donor-key donor        (real donors, such as those of GSE130148)

Without --donor-key, donors are simulated: every cell gets one of six donors at random, of very different size, and its real counts
are thinned, gene by gene, by factors of the donor (`EFFECT_SHARE` of the genes, in all types) and of the donor and type. Thinning
keeps everything else of real cells. Real donors also differ in states, dispersion and correlations, so simulated ones are easier.

Known donors: a quarter of each donor's cells of each type are test cells. Compared with them, as many cells of the same types and
donors: train cells; the GMVAE with CONDITION; the same model without; one negative binomial per gene, type and donor.
`donor F1`: a forest learns the donors from these cells and predicts those of the test cells. `donor fold change r`: the fold
changes of all genes between the donors, in these and in the test cells. The AUCs are those of `lib.evaluation.metrics`.

A new donor: all cells of one of the large donors are left out of the training (each seed another one). Compared with these cells, as
many of the same types: those of another large donor, of donors that the GMVAE makes up (GENERATE_CONDITION = "new"), and of all
known donors. Best is not 0.5 or 0 but the value of the other real donors: new donors should be as different as these.
`distance`: root mean square log ratio of mean expression between the two sets, over genes with 1 count per 10,000 and types.
"""

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
from fidelity import REAL, independent_nb
from shared import mean_and_half_range, parser, read, split, train_gmvae, with_counts

from lib.data.counts import hold_out
from lib.data.embedding import principal_components
from lib.evaluation import metrics
from lib.evaluation.metrics import mean_expression
from lib.models import conditions, sampling
from lib.models.gmvae import GMVAE

DONOR_SHARES = (0.3, 0.25, 0.2, 0.15, 0.07, 0.03)  # of the simulated donors among the cells
EFFECT_SHARE, TYPE_EFFECT_SHARE = 0.15, 0.05  # of the genes that a simulated donor thins in all types, and in one type
MAX_THINNED_LIBRARY = 0.4  # share of all counts that a simulated donor loses, at most
TEST_FRACTION = 0.25  # of the cells of each donor and type
N_NEW = 3  # new donors of each seed


def simulate_donors(cells: ad.AnnData, seed: int) -> None:
    """Set obs["donor"], and thin the counts: every count stays with probability exp(-|effect|) of its donor, type and gene."""
    rng = np.random.default_rng(seed)
    types = cells.obs["cell_type"].cat.codes.to_numpy()
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


def without_conditions(model: GMVAE) -> None:
    """Make the new cells of a model those of no donor: what is left is the model of the types, fitted to all donors."""
    assert model.prior is not None
    model.prior = {name: value for name, value in model.prior.items() if not name.startswith("condition_")}


def like(cells: ad.AnnData, wanted: pd.Series, groups: pd.Series, seed: int) -> ad.AnnData:
    """Random cells, as many of each group as `wanted` says (all where there are fewer). groups: of `cells`."""
    numbered = ad.AnnData(cells.X, obs=pd.DataFrame({"cell_type": groups.to_numpy()}, index=cells.obs_names))
    return cells[metrics.select_like(numbered, wanted, np.random.default_rng(seed))].copy()


def groups_of(cells: ad.AnnData) -> pd.Series:
    return cells.obs["donor"].astype(str) + "|" + cells.obs["cell_type"].astype(str)


def with_donors(test: ad.AnnData, counts: sp.csr_matrix) -> ad.AnnData:
    cells = with_counts(test, counts)
    cells.obs["donor"] = test.obs["donor"].to_numpy()
    return cells


def known_donors(train: ad.AnnData, test: ad.AnnData, seed: int) -> dict[str, ad.AnnData]:
    """Sets of cells of the types and donors of the test cells."""
    types = test.obs["cell_type"].cat.codes.to_numpy(dtype=np.int64)
    model, checkpoint = train_gmvae(train, seed, CONDITION="donor")
    donors = checkpoint["conditions"]["values"]  # in the order of their numbers
    counts = {
        "GMVAE, by type and donor": sampling.generate(
            model, types, seed, condition_idx=np.array([donors.index(name) for name in test.obs["donor"]])
        )
    }
    without_conditions(model)
    counts["GMVAE, by type"] = sampling.generate(model, types, seed)
    grouped = ad.AnnData(train.X, obs=pd.DataFrame({"cell_type": groups_of(train).astype("category")}))
    groups = grouped.obs["cell_type"].cat.categories.get_indexer(groups_of(test))
    counts["NB per gene, type and donor"] = independent_nb(grouped, groups, seed)
    reference = like(train, groups_of(test), groups_of(train), seed)
    return {REAL: reference} | {name: with_donors(test, made) for name, made in counts.items()}


def compare_known(test: ad.AnnData, cells: ad.AnnData, seed: int) -> pd.Series:
    pcs = principal_components(ad.concat([test, cells], index_unique="-"), metrics.N_TOP_GENES, metrics.N_PCS)
    is_second = np.arange(len(pcs)) >= test.n_obs
    donors = [part.obs["donor"].astype(str).to_numpy() for part in (test, cells)]
    by_donor = [
        ad.AnnData(part.X, obs=pd.DataFrame({"cell_type": pd.Categorical(names)}), var=part.var)
        for part, names in zip((test, cells), donors)
    ]
    return pd.Series(
        {
            "forest AUC": metrics.forest_auc(pcs, is_second, seed),
            "linear AUC": metrics.linear_auc(test, cells, seed),
            "donor F1": metrics.transfer_f1(pcs[is_second], donors[1], pcs[~is_second], donors[0], seed),
            "donor fold change r": metrics.marker_recovery(*by_donor)[1],
            "library size KS": metrics.distribution_distances(test, cells)["library size KS"],
        }
    )


def new_donor(cells: ad.AnnData, seed: int) -> list[pd.Series]:
    """Leave out one donor; compare its cells with those of other donors, real and new."""
    n_cells = cells.obs["donor"].value_counts()  # the largest first
    large = list(n_cells.index[n_cells >= n_cells.iloc[0] / 2])
    left_out = large[seed % len(large)]
    train, test = split(cells, (cells.obs["donor"] == left_out).to_numpy())
    sets = [("another real donor", train[train.obs["donor"] == name]) for name in large if name != left_out]
    model, _ = train_gmvae(train, seed, CONDITION="donor")
    prior = model.prior
    codes = test.obs["cell_type"].cat.codes.to_numpy(dtype=np.int64)
    for number in range(N_NEW):
        assert prior is not None
        model.prior = conditions.add_new(prior, seed * N_NEW + number)
        last = np.full(len(codes), len(model.prior["condition_shift"]) - 1)
        made = sampling.generate(model, codes, seed * N_NEW + number, condition_idx=last)
        sets.append(("a new donor", with_counts(test, made)))
    model.prior = prior
    sets.append(("all known donors", with_counts(test, sampling.generate(model, codes, seed))))
    rows, n = [], min(part.n_obs for _, part in sets)
    some = test[np.sort(np.random.default_rng(seed).permutation(test.n_obs)[:n])].copy()
    for name, others in sets:
        others = like(others.copy(), some.obs["cell_type"], others.obs["cell_type"], seed)
        rows.append(compare_new(some, others, seed).rename(name))
    return rows


def compare_new(test: ad.AnnData, cells: ad.AnnData, seed: int) -> pd.Series:
    pcs = principal_components(ad.concat([test, cells], index_unique="-"), metrics.N_TOP_GENES, metrics.N_PCS)
    is_second = np.arange(len(pcs)) >= test.n_obs
    genes = np.arange(test.n_vars)
    first, second = (mean_expression(part, genes).dropna() for part in (test, cells))
    types = first.index.intersection(second.index)
    ratio = np.log2((second.loc[types] + 0.1) / (first.loc[types] + 0.1)).to_numpy()[first.loc[types] > 1]
    return pd.Series(
        {
            "forest AUC": metrics.forest_auc(pcs, is_second, seed),
            "linear AUC": metrics.linear_auc(test, cells, seed),
            "distance": float(np.sqrt((ratio**2).mean())),
        }
    )


def show(rows: list[pd.Series], seed: int) -> list[pd.Series]:
    """Print the rows of one seed, and return them."""
    for row in rows:
        print(
            f"{row.name}, seed {seed}: " + ", ".join(f"{name} {value:.3f}" for name, value in row.items()), flush=True
        )
    return rows


def main() -> None:
    options = parser(__doc__, seeds=3)
    options.add_argument(
        "--donor-key", metavar="COLUMN", help="column of obs with real donors; default: simulated donors"
    )
    options.add_argument("--only", nargs="+", choices=("known", "new"), default=["known", "new"], help="default: both")
    arguments = options.parse_args()
    known, new = [], []
    for seed in range(arguments.seeds):
        cells = read(arguments.data, arguments.donor_key)
        if arguments.donor_key is None:
            simulate_donors(cells, seed)
            cells = cells[np.asarray(cells.X.sum(axis=1)).ravel() > 0].copy()
        else:
            cells.obs["donor"] = cells.obs[arguments.donor_key]
        if "known" in arguments.only:
            group = groups_of(cells).astype("category").cat.codes.to_numpy(dtype=np.int64)
            train, test = split(cells, hold_out(group, TEST_FRACTION, np.random.default_rng(seed)))
            sets = known_donors(train, test, seed)
            known += show([compare_known(test, part, seed).rename(name) for name, part in sets.items()], seed)
        if "new" in arguments.only:
            new += show(new_donor(cells, seed), seed)
    for title, rows in (("known donors", known), ("a donor that was left out", new)):
        if rows:
            print(
                f"\n{arguments.data}, {title}\n{mean_and_half_range(pd.DataFrame(rows).groupby(level=0, sort=False)).T.to_string()}"
            )


if __name__ == "__main__":
    main()
