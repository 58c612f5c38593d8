"""How close are generated cells to held-out real cells? The GMVAE, other generators, independent negative binomials, and real train cells.

run     python tests/benchmarks/fidelity.py --data data/counts.h5ad          (3 seeds; scVI takes 20 minutes a seed, the rest 2)
        python tests/benchmarks/fidelity.py --data pbmc68k_reduced --only real ours nb
        python tests/benchmarks/fidelity.py --only real ours pca_cvae conv_cvae beta_vae --seeds 1    (hours)
        python tests/benchmarks/fidelity.py --ablation                       (what each choice of stage 3 is worth; 10 minutes a seed)
        python tests/benchmarks/fidelity.py --limit --only real ours         (how good a model without misfit would be)
needs   tests/benchmarks/requirements.txt for scVI

The data are split once, 75/25 within the cell types. Each generator is trained with each seed on the train cells alone, those of stage 3
by the real stage with its defaults, and generates as many cells of each type as there are test cells and, for the membership test, as
train cells. `lib.evaluation.metrics` compares all with the same test cells. The real reference are train cells of the same types and
numbers, selected anew with each seed. CPU seconds are those of the training (with OMP_NUM_THREADS=1: of one core).

--limit replaces the data by as many cells of the GMVAE itself, trained on the train cells: without misfit, the figures show what the error
of the estimates alone costs with so many cells. --ablation never uses the test cells: a quarter of the train cells, other ones with each
seed, takes their place; each model generates cells six times, and the means of these count. --plot saves the test cells and the GMVAE's
cells of the first seed in one UMAP, by cell type: the picture of the README.
"""

import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
from shared import REAL, codes, dataset, evaluation_set, load, mean_and_half_range, parser, split, trained, with_counts

from lib.baselines import registry
from lib.data.counts import select_per_type
from lib.data.embedding import embed, principal_components
from lib.evaluation import metrics, plots_cells
from lib.models.profiles import nb_baseline

N_NEIGHBORS = 15  # of the UMAP of --plot, as in stage 5
N_DRAWS = 6  # of --ablation: how often each model generates cells
Sampler = Callable[[np.ndarray, int], sp.csr_matrix]  # types of the new cells, seed: counts
Generator = Callable[[ad.AnnData, int], Sampler]  # train cells, seed


def stage_3(train: ad.AnnData, seed: int, **constants: Any) -> Sampler:
    """A generator of the real stage 3, and the sampling of stage 5."""
    model, _ = trained(train, seed, **constants)
    return lambda types, draw: registry.generate(model, types, draw)


def independent_nb(train: ad.AnnData, _: int) -> Sampler:
    """One negative binomial per gene and type, no latent variable; library sizes are those of the type's train cells."""
    cells = dataset(train)
    idx, library_size = cells.cell_type_idx, cells.library_size
    profiles, log_theta = nb_baseline(cells, idx.max() + 1)
    theta = np.exp(log_theta)

    def sample(types: np.ndarray, seed: int) -> sp.csr_matrix:
        rng, blocks = np.random.default_rng(seed), []
        for some in np.array_split(types, -(-len(types) // 1000)):
            library = np.array([rng.choice(library_size[idx == k]) for k in some])
            shape, mu = theta[some], library[:, None] * profiles[some]
            blocks.append(sp.csr_matrix(rng.poisson(rng.gamma(shape, mu / shape)), dtype=np.float32))
        return sp.vstack(blocks, format="csr")

    return sample


def scvi_posterior_predictive(train: ad.AnnData, seed: int) -> Sampler:
    """SCVI with its defaults, types as labels; a new cell is sampled from the posterior predictive of a train cell of its type."""
    import scvi

    scvi.settings.seed = seed
    scvi.settings.logging_dir = tempfile.gettempdir()
    data, idx = train.copy(), codes(train)
    scvi.model.SCVI.setup_anndata(data, labels_key="cell_type")
    model = scvi.model.SCVI(data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.train(accelerator="cpu", enable_progress_bar=False)

    def sample(types: np.ndarray, draw: int) -> sp.csr_matrix:
        rng = np.random.default_rng(draw)
        cells = np.array([rng.choice(np.flatnonzero(idx == k)) for k in types])
        counts = model.posterior_predictive_sample(indices=cells, n_samples=1)
        return sp.csr_matrix(np.asarray(counts.todense()).reshape(len(types), -1).astype(np.float32))

    return sample


# Option of --only: name and generator; None: the real reference
CONTENDERS: dict[str, tuple[str, Generator | None]] = {
    "real": (REAL, None),
    "ours": ("ours", stage_3),
    "scvi": ("scVI", scvi_posterior_predictive),
    "nb": ("independent NB per type", independent_nb),
}
BASELINES: dict[str, tuple[str, Generator | None]] = {
    name: (name, partial(stage_3, GENERATOR=name)) for name in registry.CLASSES if name not in ("gmvae", "paper_gmvae")
}
VARIANTS: dict[str, Generator | None] = {
    REAL: None,
    "ours": stage_3,
    "zero-inflated": partial(stage_3, LIKELIHOOD="zinb"),
    "theta per gene": partial(stage_3, DISPERSION="gene"),
    "Gaussian p(z|y)": partial(stage_3, PRIOR="gaussian"),
}


def compare(
    make: Generator | None, train: ad.AnnData, seed: int, evaluations: list[metrics.EvaluationCells]
) -> tuple[list[pd.Series], ad.AnnData]:
    """Figures of the cells generated for each evaluation, with its seed, and the last of these cells."""
    started, rows = time.process_time(), []
    sample = make(train, seed) if make else None
    seconds = time.process_time() - started
    for evaluation in evaluations:
        test, cells = evaluation.test, evaluation.real_reference
        if sample is None:
            rows.append(metrics.fidelity(test, cells, evaluation.genes, evaluation.seed))
            continue
        cells = with_counts(test, sample(codes(test), evaluation.seed))
        more = with_counts(train, sample(codes(train), evaluation.seed + 1000))
        rows.append(metrics.fidelity_and_membership(evaluation, cells, more))
        rows[-1]["training, CPU s"] = seconds
    return rows, cells


def own_cells(train: ad.AnnData, test: ad.AnnData, seed: int) -> tuple[ad.AnnData, ad.AnnData]:
    """Train and test cells of the same types and numbers, all of them new cells of a GMVAE trained on the train cells."""
    both = ad.concat([train, test], index_unique="-", merge="same")
    both.obs["cell_type"] = both.obs["cell_type"].astype(train.obs["cell_type"].dtype)
    new = with_counts(both, stage_3(train, seed)(codes(both), seed))
    new.uns["dataset"] = f"cells of the GMVAE, seed {seed}"
    return split(new, np.arange(new.n_obs) >= train.n_obs)


def main() -> None:
    options = parser(__doc__, seeds=3)
    everything, default = CONTENDERS | BASELINES, list(CONTENDERS)
    options.add_argument("--only", nargs="+", choices=everything, default=default, help=f"default: {' '.join(default)}")
    options.add_argument("--epochs", type=int, help=f"at most, of {', '.join(BASELINES)}; default: as published")
    modes = options.add_mutually_exclusive_group()
    modes.add_argument("--ablation", action="store_true", help="variants of stage 3, on parts of the train cells")
    modes.add_argument("--limit", action="store_true", help="cells of the GMVAE itself instead of the data")
    modes.add_argument("--plot", type=Path, metavar="PNG", help="UMAP by cell type: test cells, and those of ours")
    arguments = options.parse_args()
    if arguments.epochs:
        for name, (_, make) in BASELINES.items():
            everything[name] = (name, partial(make, GENERATOR_SETTINGS=(f"epochs={arguments.epochs}",)))
    contenders = VARIANTS if arguments.ablation else dict(everything[key] for key in arguments.only)
    all_train, all_test = load(arguments.data)
    train, test, of_seeds = all_train, all_test, []
    for seed in range(arguments.seeds):
        if arguments.ablation:
            train, test = split(all_train, select_per_type(codes(all_train), 0.25, np.random.default_rng(seed)))
        if arguments.limit:
            train, test = own_cells(all_train, all_test, seed)
        draws = range(N_DRAWS) if arguments.ablation else [seed]
        evaluations = [evaluation_set(train, test, draw) for draw in draws]
        for name, make in contenders.items():
            rows, cells = compare(make, train, seed, evaluations)
            of_seeds.append(pd.DataFrame(rows).mean().rename(name))
            figures = ", ".join(f"{figure} {value:.3f}" for figure, value in of_seeds[-1].items())
            print(f"{name}, seed {seed}: {figures}", flush=True)
            if arguments.plot and seed == 0 and name == "ours":
                both = ad.concat([test, cells], index_unique="-")
                pcs = principal_components(both, metrics.N_TOP_GENES, metrics.N_PCS)
                umap, types = embed(pcs, N_NEIGHBORS, seed).obsm["X_umap"], pd.concat([test.obs["cell_type"]] * 2)
                is_new = np.arange(both.n_obs) >= test.n_obs
                plots_cells.original_vs_generated_by_type(umap, is_new, types, arguments.plot)
    groups = pd.DataFrame(of_seeds).groupby(level=0, sort=False)
    print(f"\n{arguments.data}, {arguments.seeds} seeds\n" + mean_and_half_range(groups).T.to_string())


if __name__ == "__main__":
    main()
