"""Generated cells held against held-out real cells: ours, scVI, independent negative binomials, and real train cells.

run     python tests/benchmarks/fidelity.py            (needs tests/benchmarks/requirements.txt for scVI, which takes 20 minutes a seed; the rest 2)
        python tests/benchmarks/fidelity.py --data my.h5ad --seeds 1
        python tests/benchmarks/fidelity.py --ablation             (what each choice of stage 3 is worth; 15 minutes a seed)

The data are parted once, 75/25 within the author's types, seed 123; genes seen in three train cells. Each generator is
trained with each seed on the train cells alone, ours by the real stage 3 with its default constants, and makes as many cells
of each type as there are test cells. All are judged by `lib.evaluation.metrics.fidelity`, the same code and the same test cells; the
floor are train cells, drawn anew with each seed. Printed: mean and, after +-, half the range over the seeds.

The ablation never sees the test cells: a quarter of the train cells, other ones with each seed, takes their place.
"""

import argparse
import functools
import importlib
import sys
import tempfile
import time
import warnings
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from lib.baselines import registry as models  # noqa: E402
from lib.data.batches import CellDataset  # noqa: E402
from lib.data.counts import digest, select_per_type, write_counts  # noqa: E402
from lib.evaluation import metrics  # noqa: E402
from lib.evaluation.comparison import judged  # noqa: E402
from lib.models.profiles import gene_marginals  # noqa: E402

CPU = torch.device("cpu")
SPLIT_SEED = 123
PBMC3K = ROOT.parent / "shared" / "data" / "pbmc3k.h5ad"


PAPER_EPOCHS = 200  # of the paper's 4,000, which would take hours
VARIANTS = {
    "ours": {},
    "zero-inflated": {"LIKELIHOOD": "zinb"},
    "theta a gene": {"DISPERSION": "gene"},
    "Gaussian p(z|y)": {"PRIOR": "gaussian"},
    "mlp decoder": {"DECODER": "mlp", "KL_WARMUP_EPOCHS": 50},
    f"the paper's ({PAPER_EPOCHS} epochs)": {"PAPER": True},
}


def load(data: str) -> tuple[ad.AnnData, ad.AnnData]:
    """Train and test cells."""
    if data == "pbmc68k_reduced":
        from lib.data.datasets import load as load_dataset

        adata = load_dataset(data, Path(tempfile.mkdtemp()), "", None).adata
    else:
        adata = ad.read_h5ad(data)
    counts = sp.csr_matrix(adata.X, dtype=np.float32)
    cell_type = pd.Categorical(adata.obs["cell_type"].astype(str))
    is_test = select_per_type(cell_type.codes.astype(np.int64), 0.25, np.random.default_rng(SPLIT_SEED))
    whole = ad.AnnData(
        counts,
        obs=pd.DataFrame({"cell_type": cell_type}, index=adata.obs_names),
        var=pd.DataFrame(index=adata.var_names),
    )
    whole.uns["dataset"] = str(data)
    train, test = part(whole, is_test)
    print(
        f"{data}: {train.n_obs:,} train cells, {test.n_obs:,} test cells, {train.n_vars:,} genes, {len(cell_type.categories)} types"
    )
    return train, test


def part(cells: ad.AnnData, is_test: np.ndarray) -> tuple[ad.AnnData, ad.AnnData]:
    """Train and test cells, with the genes that three train cells have."""
    genes = cells.X[~is_test].getnnz(axis=0) >= 3
    parts = []
    for rows in (~is_test, is_test):
        chosen = ad.AnnData(cells.X[rows][:, genes], obs=cells.obs[rows].copy(), var=cells.var[genes].copy())
        chosen.X.sort_indices()
        chosen.uns |= {
            "dataset": cells.uns["dataset"],
            "split_id": digest([cells.uns["dataset"], str(is_test.tobytes())]),
        }
        parts.append(chosen)
    return parts[0], parts[1]


def ours(train: ad.AnnData, types: np.ndarray, seed: int, **constants) -> sp.csr_matrix:
    """The real stage 3, and the sampling of stage 5."""
    stage = importlib.reload(importlib.import_module("_3_train_gmvae"))
    paper = stage.as_in_the_paper()
    stage.as_in_the_paper = lambda: paper | {"EPOCHS": PAPER_EPOCHS}
    with tempfile.TemporaryDirectory() as folder:
        write_counts(train, Path(folder) / "train.h5ad")
        for name, value in {
            "DATA_DIR": folder,
            "MODELS_DIR": folder,
            "FIG_DIR": folder,
            "SEED": seed,
            **constants,
        }.items():
            setattr(stage, name, value)
        stage.main()
        checkpoint = torch.load(Path(folder) / "gmvae.pt", weights_only=True)
    return sp.vstack(list(models.load(checkpoint, CPU).sample(types, seed)), format="csr")


def independent_nb(train: ad.AnnData, types: np.ndarray, seed: int) -> sp.csr_matrix:
    """Every gene of a type a negative binomial of its own: no latent variable; library sizes drawn from the type's train cells."""
    rng = np.random.default_rng(seed)
    idx = train.obs["cell_type"].cat.codes.to_numpy(dtype=np.int64)
    dataset = CellDataset(train.X, idx, CPU)
    marginals = gene_marginals(dataset, idx.max() + 1)
    theta = np.exp(marginals.log_theta)
    library = np.array([rng.choice(dataset.library_size[idx == k]) for k in types])
    mu = library[:, None] * marginals.profiles[types]
    return sp.csr_matrix(rng.poisson(rng.gamma(theta, mu / theta)).astype(np.float32))


def scvi_posterior_predictive(train: ad.AnnData, types: np.ndarray, seed: int) -> sp.csr_matrix:
    """SCVI with its defaults, types as labels; a new cell is drawn from the posterior predictive of a train cell of its type."""
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
    drawn = model.posterior_predictive_sample(indices=cells, n_samples=1)
    return sp.csr_matrix(np.asarray(drawn.todense()).reshape(len(types), -1).astype(np.float32))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", default=str(PBMC3K), help="h5ad with raw counts in X and obs['cell_type'], or pbmc68k_reduced"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="+", help="some of: real ours scvi nb")
    parser.add_argument(
        "--ablation", action="store_true", help="variants of stage 3, judged on cells cut from the train cells"
    )
    arguments = parser.parse_args()
    all_train, test = load(arguments.data)
    train = all_train
    generators = {"ours": ours, "scVI": scvi_posterior_predictive, "independent NB per type": independent_nb}
    wanted = {"real": "real vs real", "ours": "ours", "scvi": "scVI", "nb": "independent NB per type"}
    names = [wanted[key] for key in arguments.only or wanted]
    if arguments.ablation:
        generators = {name: functools.partial(ours, **constants) for name, constants in VARIANTS.items()}
        names = ["real vs real", *generators]
    rows = []
    for seed in range(arguments.seeds):
        if arguments.ablation:
            train, test = part(
                all_train,
                select_per_type(
                    all_train.obs["cell_type"].cat.codes.to_numpy().astype(np.int64), 0.25, np.random.default_rng(seed)
                ),
            )
        types = test.obs["cell_type"].cat.codes.to_numpy(dtype=np.int64)
        genes = metrics.variable_genes(train, metrics.N_CORRELATED_GENES)
        floor_rows = metrics.select_like(train, test.obs["cell_type"], np.random.default_rng(seed))
        floor = train[floor_rows].copy()
        for name in names:
            started = time.perf_counter()
            if name == "real vs real":
                cells = floor
            else:
                cells = ad.AnnData(
                    generators[name](train, types, seed), obs=test.obs[["cell_type"]].copy(), var=test.var[[]].copy()
                )
            seconds = time.perf_counter() - started
            found = (
                metrics.fidelity(test, floor, genes, seed)
                if cells is floor
                else judged(test, floor, cells, genes, seed)
            )
            rows.append(found.rename((name, seed)))
            print(
                f"{name}, seed {seed}: {seconds:.0f} s; "
                + ", ".join(f"{k} {v:.3f}" for k, v in found.iloc[:5].items()),
                flush=True,
            )
    table = pd.DataFrame(rows)
    table.index = pd.MultiIndex.from_tuples(table.index, names=["cells", "seed"])
    by_name = table.groupby("cells", sort=False)
    mean, half = by_name.mean(), (by_name.max() - by_name.min()) / 2
    shown = mean.map("{:.3f}".format) + " +- " + half.map("{:.3f}".format)
    print(f"\n{arguments.seeds} seeds\n" + shown.T.to_string())


if __name__ == "__main__":
    main()
