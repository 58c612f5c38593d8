"""How close are generated cells to held-out real cells? The GMVAE, scVI, independent negative binomials, and real train cells.

run     python tests/benchmarks/fidelity.py --data data/counts.h5ad          (3 seeds; scVI takes 20 minutes a seed, the rest 2)
        python tests/benchmarks/fidelity.py --data pbmc68k_reduced --only real ours nb
        python tests/benchmarks/fidelity.py --ablation                       (what each choice of stage 3 is worth; 10 minutes a seed)
        python tests/benchmarks/fidelity.py --limit --only real ours         (how good a model without misfit would be)
needs   tests/benchmarks/requirements.txt for scVI

The data are split once, 75/25 within the cell types; genes are those that three train cells hold. Each generator is trained
with each seed on the train cells alone, the GMVAE by the real stage 3 with its defaults, and generates as many cells of each
type as there are test cells. `lib.evaluation.metrics` compares all of them with the same test cells. The real reference are
train cells of the same types and numbers, selected anew with each seed. Printed: the mean and, after +-, half the range over
the seeds.

--limit replaces the data by as many cells of the GMVAE itself, trained on the train cells. On these cells the GMVAE has no misfit, so
its figures show what the error of the estimates alone costs with so many cells. The difference to a run without --limit is misfit.
--ablation never uses the test cells: a quarter of the train cells, other ones with each seed, takes their place. Each model generates
cells six times, and the means of these count.
--plot saves the test cells and the GMVAE's cells of the first seed in one UMAP, by cell type: the picture of the README.
"""

import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
from lib.evaluation.report import fidelity_and_memorisation
from shared import CPU, evaluation_cells, load, mean_and_half_range, parser, split, train_gmvae, with_counts

from lib.baselines import registry
from lib.data.batches import CellDataset
from lib.data.counts import select_per_type
from lib.data.embedding import embed, principal_components
from lib.evaluation import metrics, plots_cells
from lib.evaluation.metrics import EvaluationCells
from lib.models.profiles import gene_marginals

N_NEIGHBORS = 15  # of the UMAP of --plot, as in stage 5
N_DRAWS = 6  # of --ablation: how often each model generates cells
VARIANTS: dict[str, dict[str, object]] = {
    "ours": {},
    "zero-inflated": {"LIKELIHOOD": "zinb"},
    "theta per gene": {"DISPERSION": "gene"},
    "Gaussian p(z|y)": {"PRIOR": "gaussian"},
}
Generator = Callable[[ad.AnnData, np.ndarray, int], sp.csr_matrix]  # train cells, types of the new cells, seed: counts


def ours(train: ad.AnnData, types: np.ndarray, seed: int, **constants) -> sp.csr_matrix:
    """The real stage 3, and the sampling of stage 5."""
    model, _ = train_gmvae(train, seed, **constants)
    return registry.generate(model, types, seed)


def trained(train: ad.AnnData, seed: int, **constants) -> Generator:
    """New cells of one model, trained on these cells by the real stage 3."""
    model, _ = train_gmvae(train, seed, **constants)
    return lambda _, types, draw: registry.generate(model, types, draw)


def independent_nb(train: ad.AnnData, types: np.ndarray, seed: int) -> sp.csr_matrix:
    """One negative binomial per gene and type, no latent variable; library sizes are those of the type's train cells."""
    rng = np.random.default_rng(seed)
    idx = train.obs["cell_type"].cat.codes.to_numpy(dtype=np.int64)
    dataset = CellDataset(train.X, idx, CPU)
    marginals = gene_marginals(dataset, idx.max() + 1)
    theta = np.exp(marginals.log_theta)
    library = np.array([rng.choice(dataset.library_size[idx == k]) for k in types])
    mu = library[:, None] * marginals.profiles[types]
    return sp.csr_matrix(rng.poisson(rng.gamma(theta, mu / theta)).astype(np.float32))


def scvi_posterior_predictive(train: ad.AnnData, types: np.ndarray, seed: int) -> sp.csr_matrix:
    """SCVI with its defaults, types as labels; a new cell is sampled from the posterior predictive of a train cell of its type."""
    import scvi

    scvi.settings.seed = seed
    scvi.settings.logging_dir = tempfile.gettempdir()
    data = train.copy()
    scvi.model.SCVI.setup_anndata(data, labels_key="cell_type")
    model = scvi.model.SCVI(data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.train(accelerator="cpu", enable_progress_bar=False)
    rng = np.random.default_rng(seed)
    idx = train.obs["cell_type"].cat.codes.to_numpy()
    cells = np.array([rng.choice(np.flatnonzero(idx == k)) for k in types])
    counts = model.posterior_predictive_sample(indices=cells, n_samples=1)
    return sp.csr_matrix(np.asarray(counts.todense()).reshape(len(types), -1).astype(np.float32))


REAL = "real train cells"
GENERATORS: dict[str, tuple[str, Generator | None]] = {
    "real": (REAL, None),
    "ours": ("ours", ours),
    "scvi": ("scVI", scvi_posterior_predictive),
    "nb": ("independent NB per type", independent_nb),
}


def compare(
    train: ad.AnnData, evaluation: EvaluationCells, contenders: dict[str, Generator | None]
) -> tuple[pd.DataFrame, dict[str, ad.AnnData]]:
    """Contenders x figures, and the cells of each contender; a contender without a generator is the real reference."""
    types = evaluation.test.obs["cell_type"].cat.codes.to_numpy(dtype=np.int64)
    cells, rows = {}, []
    for name, generate in contenders.items():
        started = time.perf_counter()
        cells[name] = (
            with_counts(evaluation.test, generate(train, types, evaluation.seed))
            if generate
            else evaluation.real_reference
        )
        seconds = time.perf_counter() - started
        if generate:
            found = fidelity_and_memorisation(evaluation, cells[name])
        else:
            found = metrics.fidelity(evaluation.test, cells[name], evaluation.genes, evaluation.seed)
        rows.append(found.rename(name))
        figures = ", ".join(f"{figure} {value:.3f}" for figure, value in found.iloc[:5].items())
        print(f"{name}, seed {evaluation.seed}: {seconds:.0f} s; {figures}", flush=True)
    return pd.DataFrame(rows), cells


def own_cells(train: ad.AnnData, test: ad.AnnData, seed: int) -> tuple[ad.AnnData, ad.AnnData]:
    """Train and test cells of the same types and numbers, all of them new cells of a GMVAE trained on the train cells."""
    both = ad.concat([train, test], index_unique="-", merge="same")
    both.obs["cell_type"] = both.obs["cell_type"].astype(train.obs["cell_type"].dtype)
    new = with_counts(both, ours(train, both.obs["cell_type"].cat.codes.to_numpy(dtype=np.int64), seed))
    new.uns["dataset"] = f"cells of the GMVAE, seed {seed}"
    return split(new, np.arange(new.n_obs) >= train.n_obs)


def plot(test: ad.AnnData, generated: ad.AnnData, seed: int, path: Path) -> None:
    both = ad.concat({"original": test, "generated": generated}, label="source", index_unique="-")
    both.obs["cell_type"] = both.obs["cell_type"].astype(test.obs["cell_type"].dtype)
    umap = embed(principal_components(both, metrics.N_TOP_GENES, metrics.N_PCS), N_NEIGHBORS, seed).obsm["X_umap"]
    is_generated = (both.obs["source"] == "generated").to_numpy()
    plots_cells.original_vs_generated_by_type(umap, is_generated, both.obs["cell_type"], path)
    print(f"wrote {path}")


def main() -> None:
    options = parser(__doc__, seeds=3)
    options.add_argument("--only", nargs="+", choices=GENERATORS, default=list(GENERATORS), help="default: all")
    options.add_argument(
        "--ablation", action="store_true", help="variants of stage 3, compared with held-out train cells"
    )
    options.add_argument("--limit", action="store_true", help="cells of the GMVAE itself instead of the data")
    options.add_argument("--plot", type=Path, metavar="PNG", help="UMAP by cell type: test cells and generated ones")
    arguments = options.parse_args()
    if arguments.limit and (arguments.ablation or arguments.plot):
        options.error("--limit goes with neither --ablation nor --plot: start them one after the other")
    if arguments.plot and (arguments.ablation or "ours" not in arguments.only):
        options.error("--plot shows the cells of ours: leave out --ablation, and name ours in --only")
    all_train, all_test = load(arguments.data)
    train, test, contenders = all_train, all_test, dict(GENERATORS[key] for key in arguments.only)
    tables = {}
    for seed in range(arguments.seeds):
        if arguments.ablation:
            codes = all_train.obs["cell_type"].cat.codes.to_numpy().astype(np.int64)
            train, test = split(all_train, select_per_type(codes, 0.25, np.random.default_rng(seed)))
            contenders = {REAL: None} | {
                name: trained(train, seed, **constants) for name, constants in VARIANTS.items()
            }
        if arguments.limit:
            train, test = own_cells(all_train, all_test, seed)
        for draw in range(N_DRAWS) if arguments.ablation else [seed]:
            tables[seed, draw], cells = compare(train, evaluation_cells(train, test, draw), contenders)
        if arguments.plot and seed == 0:
            plot(test, cells["ours"], seed, arguments.plot)
    of_seeds = pd.concat(tables).groupby(level=[0, 2], sort=False).mean()
    groups = of_seeds.groupby(level=1, sort=False)
    print(f"\n{arguments.data}, {arguments.seeds} seeds\n" + mean_and_half_range(groups).T.to_string())


if __name__ == "__main__":
    main()
