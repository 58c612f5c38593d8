"""How fast does the GMVAE train? Beside the published model, scVI, and the matrix products alone.

run     python tests/benchmarks/speed.py --data data/counts.h5ad       (pbmc3k: 15 minutes)
        python tests/benchmarks/speed.py --data simulated --rounds 5 --no-likelihood
needs   tests/benchmarks/requirements.txt for scVI, which is left out without it

All contenders get the same cells, hidden sizes, batch size and number of threads, in one process, one after the other in
every round, so that a busy machine slows all of them down. Peak memory is that of a process that trains one contender alone.
"""

import argparse
import importlib.util
import re
import subprocess
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
from shared import CPU, add_data_option, plain_paper_loss, read
from torch import nn

from lib.data.batches import Batch, CellDataset
from lib.data.counts import select_per_type
from lib.models.layers import SparseLinear
from lib.models.paper_gmvae import PaperGMVAE
from lib.models.profiles import gene_marginals
from lib.training import keep_freed_memory

stage = importlib.import_module("_3_train_gmvae")
SIMULATED = "simulated"
HAS_SCVI = importlib.util.find_spec("scvi") is not None
MIN_CELLS = 3  # that must hold a gene


class Products(nn.Module):
    """The matrix products of our model and nothing else: the sparse input times the first layers, z times the heads."""

    def __init__(self, n_genes: int, n_latent: int, n_heads: int):
        super().__init__()
        self.n_latent = n_latent
        self.encoder = SparseLinear(n_genes, stage.HIDDEN + n_latent)
        self.heads = nn.ModuleList(nn.Linear(n_latent, n_genes) for _ in range(n_heads))

    def forward(self, x: torch.Tensor, upstream: torch.Tensor) -> None:
        h = self.encoder(x)
        torch.autograd.backward([head(h[:, : self.n_latent]) for head in self.heads], [upstream] * len(self.heads))


class OursEpoch:
    def __init__(self, dataset: CellDataset, n_cell_types: int, likelihood: str):
        torch.manual_seed(0)
        stage.LIKELIHOOD = likelihood
        self.model = stage.make_model(dataset, gene_marginals(dataset, n_cell_types))
        self.optimizer = torch.optim.Adam(stage.parameter_groups(self.model), lr=stage.LEARNING_RATE, fused=True)
        self.dataset, self.generator = dataset, torch.Generator().manual_seed(0)

    def __call__(self) -> None:
        stage.train_epoch(self.model, self.optimizer, self.dataset, self.generator)


class ProductsEpoch:
    def __init__(self, dataset: CellDataset, n_latent: int, n_heads: int):
        self.model = Products(dataset.n_genes, n_latent, n_heads)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.dataset, self.generator = dataset, torch.Generator().manual_seed(0)
        batches = list(dataset.shuffled(stage.BATCH_SIZE, self.generator))  # made beforehand: not part of the limit
        self.batches = [(b.log_normalized(2000.0), torch.full((b.n_cells, dataset.n_genes), 1e-6)) for b in batches[:8]]

    def __call__(self) -> int:
        for x, upstream in self.batches:
            self.optimizer.zero_grad()
            self.model(x, upstream)
            self.optimizer.step()
        return sum(len(upstream) for _, upstream in self.batches)


class PublishedSteps:
    """A few steps of the paper's model: an epoch would take minutes. plain: its formula as it is written, on dense input."""

    def __init__(self, dataset: CellDataset, n_cell_types: int, plain: bool, n_steps: int = 1):
        self.model, self.plain = PaperGMVAE(dataset.n_genes, n_cell_types), plain
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=6e-6, fused=not plain)
        self.batches: list[Batch] = list(dataset.shuffled(stage.BATCH_SIZE, torch.Generator().manual_seed(0)))[:n_steps]
        self.dense = [batch.raw().to_dense() for batch in self.batches] if plain else self.batches

    def __call__(self) -> int:
        for batch, x in zip(self.batches, self.dense):
            epsilon = torch.randn(batch.n_cells, *self.model.epsilon_shape)
            self.optimizer.zero_grad()
            self.loss(batch, x, epsilon).backward()
            self.optimizer.step()
        return sum(batch.n_cells for batch in self.batches)

    def loss(self, batch: Batch, x: torch.Tensor, epsilon: torch.Tensor) -> torch.Tensor:
        if self.plain:
            return plain_paper_loss(self.model, x, batch.cell_type_idx, epsilon)
        return self.model(batch, epsilon)["loss"]


class Scvi:
    """scvi-tools' SCVI, its own data loader and defaults but for the sizes."""

    def __init__(self, counts: sp.csr_matrix, likelihood: str):
        import scvi

        scvi.settings.seed = 0
        scvi.settings.logging_dir = tempfile.gettempdir()
        scvi.settings.progress_bar_style = "tqdm"
        self.adata = ad.AnnData(counts)
        scvi.model.SCVI.setup_anndata(self.adata)
        self.model = scvi.model.SCVI(
            self.adata, n_hidden=stage.HIDDEN, n_layers=2, n_latent=stage.N_LATENT, gene_likelihood=likelihood
        )

    def train(self, epochs: int, **arguments) -> list[float]:
        """Seconds of each epoch, its validation left out."""
        from lightning.pytorch.callbacks import Callback

        class Clock(Callback):
            def __init__(self):
                self.seconds: list[float] = []

            def on_train_epoch_start(self, *_):
                self.started = time.perf_counter()

            def on_train_epoch_end(self, *_):
                self.seconds.append(time.perf_counter() - self.started)

        clock = Clock()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.model.train(
                max_epochs=epochs, batch_size=stage.BATCH_SIZE, accelerator="cpu", callbacks=[clock], enable_progress_bar=False,
                **({} if "early_stopping" in arguments else {"logger": False}), **arguments,
            )  # fmt: skip
        return clock.seconds


def load(data: str) -> tuple[sp.csr_matrix, np.ndarray | None]:
    """Counts, and the cells' types; simulated cells, of the size of pbmc3k, have none."""
    if data == SIMULATED:
        rng = np.random.default_rng(0)
        profile = rng.lognormal(0, 2, 13_714)
        mu = profile / profile.sum() * rng.lognormal(np.log(2300), 0.4, 2600)[:, None]
        counts, types = sp.csr_matrix(rng.poisson(rng.gamma(2, mu / 2)).astype(np.float32)), None
    else:
        cells = read(data)
        counts = cells.X[:, cells.X.getnnz(axis=0) >= MIN_CELLS]
        types = cells.obs["cell_type"].cat.codes.to_numpy(dtype=np.int64)
    counts.sort_indices()
    density = counts.nnz / np.prod(counts.shape)
    print(f"{data}: {counts.shape[0]:,} cells x {counts.shape[1]:,} genes, {density:.1%} of the counts above zero")
    return counts, types


def throughput(counts: sp.csr_matrix, types: np.ndarray, n_cell_types: int, rounds: int) -> None:
    dataset = CellDataset(counts, types, CPU)
    contenders = {}
    for likelihood in ("nb", "zinb"):
        ours = OursEpoch(dataset, n_cell_types, likelihood)
        products = ProductsEpoch(dataset, ours.model.n_latent, 1 if likelihood == "nb" else 2)
        contenders[f"ours, {likelihood}"] = lambda ours=ours: (len(dataset), ours())[0]
        contenders[f"matrix products + Adam, {likelihood}"] = products
    for likelihood in ("nb", "zinb") if HAS_SCVI else ():
        scvi = Scvi(counts, likelihood)
        contenders[f"scVI, {likelihood}"] = lambda scvi=scvi: counts.shape[0] / np.median(scvi.train(3, train_size=1.0))
    contenders["published model, plain formula"] = PublishedSteps(dataset, n_cell_types, plain=True)
    contenders["published model, lib/models"] = PublishedSteps(dataset, n_cell_types, plain=False)
    speeds: dict[str, list[float]] = {name: [] for name in contenders}
    for round_number in range(rounds + 1):
        for name, run in contenders.items():
            started = time.perf_counter()
            done = run()
            speed = done if name.startswith("scVI") else done / (time.perf_counter() - started)
            if round_number:  # the first warms up
                speeds[name].append(speed)
    table = pd.DataFrame(
        {name: np.percentile(values, [50, 0, 100]) for name, values in speeds.items()},
        index=["median", "lowest", "highest"],
    ).T
    print(
        f"\ncells/s, batch {stage.BATCH_SIZE}, {torch.get_num_threads()} threads, K = {n_cell_types}, {rounds} rounds"
    )
    print(table.round(1).to_string())
    median = table["median"]
    for likelihood in ("nb", "zinb"):
        ours = median[f"ours, {likelihood}"]
        parts = [f"{ours / median[f'matrix products + Adam, {likelihood}']:.0%} of the matrix-product limit"]
        if f"scVI, {likelihood}" in median:
            parts.append(f"{ours / median[f'scVI, {likelihood}']:.1f} x scVI")
        parts.append(f"{ours / median['published model, plain formula']:.0f} x the published model, plain formula")
        print(f"ours, {likelihood}: " + ", ".join(parts))


def time_to_likelihood(
    counts: sp.csr_matrix, types: np.ndarray, n_cell_types: int, likelihood: str, max_epochs: int
) -> None:
    """Time until ours reaches the held-out bound that scVI ends with.

    Both are bounds on log p(x|l) of the same held-out cells: scVI's ELBO, and our ELBO + log p(y), which is the lower one because
    p(x) >= p(x, y). Seconds are those of training alone. scVI stops by its own early stopping on these cells; its seconds are
    those until its best epoch.
    """
    held_out = select_per_type(types, 0.1, np.random.default_rng(0))
    order = np.r_[np.flatnonzero(~held_out), np.flatnonzero(held_out)]
    scvi = Scvi(counts[order], likelihood)
    seconds = scvi.train(
        max_epochs, train_size=float(np.mean(~held_out)), shuffle_set_split=False, early_stopping=True, check_val_every_n_epoch=1,
    )  # fmt: skip
    elbo = scvi.model.history["elbo_validation"].iloc[:, 0].astype(float)
    best = int(np.argmin(elbo.to_numpy()))
    target, scvi_seconds = -float(elbo.iloc[best]), sum(seconds[: best + 1])

    dataset = CellDataset(counts, types, CPU, np.flatnonzero(~held_out))
    validation = CellDataset(counts, types, CPU, np.flatnonzero(held_out))
    ours = OursEpoch(dataset, n_cell_types, likelihood)
    log_p_y = float(ours.model.type_frequency.log()[validation.cell_type_idx].mean())
    spent, best_bound, reached = 0.0, -np.inf, None
    for epoch in range(stage.EPOCHS):
        started = time.perf_counter()
        ours()
        spent += time.perf_counter() - started
        with torch.no_grad():
            means = stage.validate(ours.model, validation)
        bound = -(means["reconstruction_loss"] + means["kl_z"]) + log_p_y
        best_bound = max(best_bound, bound)
        if bound >= target and reached is None:
            reached = spent
        if reached is not None and epoch > 30:
            break
    print(f"\nheld-out bound on log p(x|l), nats per cell, {likelihood}")
    print(f"scVI: {target:.1f} after {scvi_seconds:.1f} s ({best + 1} epochs, its best)")
    if reached is None:
        print(f"ours: not reached; {best_bound:.1f} after {spent:.1f} s")
    else:
        print(f"ours: the same after {reached:.1f} s, {scvi_seconds / reached:.1f} times sooner; best {best_bound:.1f}")


def peak_memory(arguments: list[str]) -> None:
    print("\npeak memory of a process that trains one contender alone, GB")
    for name in ("ours, nb", "ours, zinb", *["scVI, zinb"] * HAS_SCVI, "published model, plain formula"):
        done = subprocess.run([sys.executable, __file__, "--only", name, *arguments], capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{name} failed:\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}")
        print(f"{name:30s} {float(done.stdout.split()[-1]) / 1e6:.2f}")


def train_one(name: str, counts: sp.csr_matrix, types: np.ndarray, n_cell_types: int) -> None:
    likelihood = name.split(", ")[1]
    dataset = CellDataset(counts, types, CPU)
    if name.startswith("ours"):
        OursEpoch(dataset, n_cell_types, likelihood)()
    elif name.startswith("scVI"):
        Scvi(counts, likelihood).train(1, train_size=1.0)
    else:
        PublishedSteps(dataset, n_cell_types, plain=True)()
    print(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_option(options, f"{SIMULATED}: 2,600 simulated cells")
    options.add_argument("--n-cell-types", type=int, default=17, help="K of the throughput, whatever the data have")
    options.add_argument("--batch-size", type=int, default=256)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--max-epochs", type=int, default=200, help="of scVI, for the time to a likelihood")
    options.add_argument(
        "--likelihood", action=argparse.BooleanOptionalAction, default=True, help="time to scVI's held-out likelihood"
    )
    options.add_argument("--only", help=argparse.SUPPRESS)
    arguments = options.parse_args()
    stage.BATCH_SIZE = arguments.batch_size
    keep_freed_memory()
    counts, own_types = load(arguments.data)
    types = np.arange(counts.shape[0]) % arguments.n_cell_types  # of equal size: for speed only their number matters
    if arguments.only:
        train_one(arguments.only, counts, types, arguments.n_cell_types)
        return
    throughput(counts, types, arguments.n_cell_types, arguments.rounds)
    if arguments.likelihood and HAS_SCVI:
        labels = types if own_types is None else own_types
        for likelihood in ("nb", "zinb"):
            time_to_likelihood(counts, labels, labels.max() + 1, likelihood, arguments.max_epochs)
    sizes = {"--batch-size": arguments.batch_size, "--n-cell-types": arguments.n_cell_types}
    peak_memory(["--data", arguments.data, *(str(word) for item in sizes.items() for word in item)])


if __name__ == "__main__":
    main()
