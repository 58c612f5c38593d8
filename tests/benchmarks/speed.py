"""Training speed: ours beside the original formulation, scVI, and what the matrix products alone would take.

run     python tests/benchmarks/speed.py            (needs tests/benchmarks/requirements.txt for scVI; about 15 minutes)
        python tests/benchmarks/speed.py --rounds 5 --no-likelihood

All contenders see the same cells, hidden sizes, batch size and number of threads, in one process, one after the other in
every round, so that a busy machine slows all of them. Peak memory is that of a process that trains one contender alone.
"""

import argparse
import importlib
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
import torch.nn.functional as F
from torch import nn

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from lib.data.batches import Batch, CellDataset  # noqa: E402
from lib.data.counts import select_per_type  # noqa: E402
from lib.models.layers import SparseLinear  # noqa: E402
from lib.training import keep_freed_memory  # noqa: E402

stage = importlib.import_module("_3_train_gmvae")
CPU = torch.device("cpu")
PBMC3K = ROOT.parent / "shared" / "data" / "pbmc3k.h5ad"


class Original(nn.Module):
    """The published formulation, from its description: every step decodes all K components, from dense input, with the plain
    ZINB formula, three heads, Adam 6e-6; each term weighted by q(y|x) and summed over K."""

    def __init__(self, n_genes: int, n_cell_types: int, n_latent: int = 32):
        super().__init__()
        self.n_cell_types = n_cell_types

        def mlp(*sizes):
            layers = [part for a, b in zip(sizes, sizes[1:-1]) for part in (nn.Linear(a, b), nn.ReLU())]
            return nn.Sequential(*layers, nn.Linear(*sizes[-2:]))

        self.q_y_x = mlp(n_genes, 128, n_cell_types)
        self.q_z_mean, self.q_z_log_var = (mlp(n_genes + n_cell_types, 128, 64, n_latent) for _ in range(2))
        self.p_z_mean, self.p_z_log_var = (mlp(n_cell_types, 128, n_latent) for _ in range(2))
        self.decoder = mlp(n_latent, 64, 128)
        self.heads = nn.ModuleList(nn.Linear(128, n_genes) for _ in range(3))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        logits = self.q_y_x(x)
        q_y = logits.softmax(dim=1)
        loss = F.cross_entropy(logits, y)
        for k in range(self.n_cell_types):
            one_hot = F.one_hot(torch.full((len(x),), k), self.n_cell_types).float()
            q_mean, q_log_var = (tower(torch.cat([x, one_hot], dim=1)) for tower in (self.q_z_mean, self.q_z_log_var))
            p_mean, p_log_var = self.p_z_mean(one_hot), self.p_z_log_var(one_hot)
            z = q_mean + (0.5 * q_log_var).exp() * torch.randn_like(q_mean)
            h = torch.relu(self.decoder(z))
            zi_logits, mu, theta = (
                self.heads[0](h),
                F.softplus(self.heads[1](h)) + 1e-6,
                F.softplus(self.heads[2](h)) + 1e-6,
            )
            log_nb = (
                torch.lgamma(x + theta) - torch.lgamma(theta) - torch.lgamma(x + 1)
                + theta * (theta / (theta + mu)).log() + x * (mu / (theta + mu)).log()
            )  # fmt: skip
            pi = torch.sigmoid(zi_logits)
            log_zinb = torch.where(
                x == 0, (pi + (1 - pi) * log_nb.exp() + 1e-10).log(), (1 - pi + 1e-10).log() + log_nb
            )
            kl = 0.5 * (
                p_log_var - q_log_var + (q_log_var - p_log_var).exp() + (q_mean - p_mean) ** 2 / p_log_var.exp() - 1
            )
            loss = loss + (q_y[:, k] * (kl.sum(dim=1) - log_zinb.sum(dim=1))).mean()
        return loss


class Products(nn.Module):
    """What our model multiplies, and nothing else: the sparse input by the first layers, z by the heads."""

    def __init__(self, n_genes: int, n_latent: int, n_heads: int):
        super().__init__()
        self.n_latent = n_latent
        self.encoder = SparseLinear(n_genes, 3 * stage.HIDDEN[0] + n_latent)
        self.heads = nn.ModuleList(nn.Linear(n_latent, n_genes) for _ in range(n_heads))

    def forward(self, x: torch.Tensor, upstream: torch.Tensor) -> None:
        h = self.encoder(x)
        torch.autograd.backward([head(h[:, : self.n_latent]) for head in self.heads], [upstream] * len(self.heads))


class OursEpoch:
    def __init__(self, dataset: CellDataset, n_cell_types: int, likelihood: str):
        torch.manual_seed(0)
        stage.LIKELIHOOD = likelihood
        self.model = stage.make_model(dataset, n_cell_types)
        self.optimizer = torch.optim.AdamW(stage.parameter_groups(self.model), lr=stage.LEARNING_RATE, fused=True)
        self.dataset, self.generator = dataset, torch.Generator().manual_seed(0)

    def __call__(self, epoch: int = 0) -> None:
        stage.train_epoch(self.model, self.optimizer, self.dataset, epoch, self.generator)


class ProductsEpoch:
    def __init__(self, dataset: CellDataset, n_latent: int, n_heads: int):
        self.model = Products(dataset.n_genes, n_latent, n_heads)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.dataset, self.generator = dataset, torch.Generator().manual_seed(0)
        batches = list(dataset.shuffled(stage.BATCH_SIZE, self.generator))  # cut beforehand: not part of the limit
        self.batches = [(b.log_normalized(2000.0), torch.full((b.n_cells, dataset.n_genes), 1e-6)) for b in batches[:8]]

    def __call__(self) -> int:
        for x, upstream in self.batches:
            self.optimizer.zero_grad()
            self.model(x, upstream)
            self.optimizer.step()
        return sum(len(upstream) for _, upstream in self.batches)


class OriginalSteps:
    """A few steps: an epoch would take minutes."""

    def __init__(self, dataset: CellDataset, n_cell_types: int, n_steps: int = 1):
        self.model = Original(dataset.n_genes, n_cell_types)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=6e-6)
        batches: list[Batch] = list(dataset.shuffled(stage.BATCH_SIZE, torch.Generator().manual_seed(0)))[:n_steps]
        self.batches = [
            (torch.zeros(b.n_cells, b.n_genes).index_put((b.cells, b.genes), b.counts), b.cell_type_idx)
            for b in batches
        ]

    def __call__(self) -> int:
        for x, y in self.batches:
            self.optimizer.zero_grad()
            self.model(x, y).backward()
            self.optimizer.step()
        return sum(len(y) for _, y in self.batches)


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
            self.adata, n_hidden=stage.HIDDEN[0], n_layers=2, n_latent=stage.N_LATENT, gene_likelihood=likelihood
        )

    def train(self, epochs: int, **arguments) -> list[float]:
        """Seconds of each epoch, its validation left out."""
        from lightning.pytorch.callbacks import Callback

        class Clock(Callback):
            seconds: list[float] = []

            def on_train_epoch_start(self, *_):
                self.started = time.perf_counter()

            def on_train_epoch_end(self, *_):
                self.seconds.append(time.perf_counter() - self.started)

        clock = Clock()
        clock.seconds = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.model.train(
                max_epochs=epochs, batch_size=stage.BATCH_SIZE, accelerator="cpu", callbacks=[clock], enable_progress_bar=False,
                **({} if "early_stopping" in arguments else {"logger": False}), **arguments,
            )  # fmt: skip
        return clock.seconds


def load(path: Path | None, n_cell_types: int) -> tuple[sp.csr_matrix, np.ndarray]:
    """Counts, and K types: those of the data cut into K parts, since the number of types is all that matters for speed."""
    if path is not None and path.exists():
        adata = ad.read_h5ad(path)
        print(
            f"{path.name}: {adata.n_obs:,} cells x {adata.n_vars:,} genes, {adata.X.nnz / np.prod(adata.shape):.1%} of the counts above zero"
        )
        counts = sp.csr_matrix(adata.X, dtype=np.float32)
    else:
        rng = np.random.default_rng(0)
        profile = rng.lognormal(0, 2, 13_714)
        mu = profile / profile.sum() * rng.lognormal(np.log(2300), 0.4, 2600)[:, None]
        counts = sp.csr_matrix(rng.poisson(rng.gamma(2, mu / 2)).astype(np.float32))
        print(f"simulated: {counts.shape[0]:,} cells x {counts.shape[1]:,} genes")
    counts.sort_indices()
    return counts, np.arange(counts.shape[0]) % n_cell_types


def throughput(counts: sp.csr_matrix, types: np.ndarray, n_cell_types: int, rounds: int) -> None:
    dataset = CellDataset(counts, types, CPU)
    contenders = {}
    for likelihood in ("nb", "zinb"):
        ours = OursEpoch(dataset, n_cell_types, likelihood)
        products = ProductsEpoch(dataset, ours.model.n_latent, 1 if likelihood == "nb" else 2)
        contenders[f"ours, {likelihood}"] = lambda ours=ours: (len(dataset), ours())[0]
        contenders[f"matrix products + Adam, {likelihood}"] = products
    for likelihood in ("nb", "zinb"):
        try:
            scvi = Scvi(counts, likelihood)
        except ImportError:
            print("scvi-tools is not installed: left out")
            break
        contenders[f"scVI, {likelihood}"] = lambda scvi=scvi: counts.shape[0] / np.median(scvi.train(3, train_size=1.0))
    contenders["original formulation, zinb"] = OriginalSteps(dataset, n_cell_types)
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
        parts.append(f"{ours / median['original formulation, zinb']:.0f} x the original formulation")
        print(f"ours, {likelihood}: " + ", ".join(parts))


def time_to_likelihood(
    counts: sp.csr_matrix, types: np.ndarray, n_cell_types: int, likelihood: str, max_epochs: int
) -> None:
    """How long ours takes to the held-out bound that scVI ends at.

    Both are bounds on log p(x | l) of the same held-out cells: scVI's ELBO, and our ELBO + log p(y), which is below it, since
    p(x) >= p(x, y). Seconds are those of training alone. scVI stops by its own early stopping, on those cells; its clock stops
    at its best epoch.
    """
    held_out = select_per_type(types, 0.1, np.random.default_rng(0))
    order = np.r_[np.flatnonzero(~held_out), np.flatnonzero(held_out)]
    scvi = Scvi(counts[order], likelihood)
    seconds = scvi.train(
        max_epochs, train_size=float(np.mean(~held_out)), shuffle_set_split=False, early_stopping=True, check_val_every_n_epoch=1,
    )  # fmt: skip
    elbo = scvi.model.history["elbo_validation"].iloc[:, 0].astype(float)
    best = int(np.argmin(elbo.to_numpy()))
    target, its_seconds = -float(elbo.iloc[best]), sum(seconds[: best + 1])

    dataset = CellDataset(counts, types, CPU, np.flatnonzero(~held_out))
    judge = CellDataset(counts, types, CPU, np.flatnonzero(held_out))
    ours = OursEpoch(dataset, n_cell_types, likelihood)
    log_p_y = float(ours.model.type_frequency.log()[judge.cell_type_idx].mean())
    spent, best_bound, reached = 0.0, -np.inf, None
    for epoch in range(stage.EPOCHS):
        started = time.perf_counter()
        ours(epoch)
        spent += time.perf_counter() - started
        with torch.no_grad():
            means = stage.validate(ours.model, judge)
        bound = -(means["reconstruction_loss"] + means["kl_z"]) + log_p_y
        best_bound = max(best_bound, bound)
        if bound >= target and reached is None:
            reached = spent
        if reached is not None and epoch > 30:
            break
    print(
        f"\nheld-out bound on log p(x | l), nats per cell, {likelihood}: scVI {target:.1f} after {its_seconds:.1f} s ({best + 1} epochs, its best)"
    )
    if reached is None:
        print(f"ours: not reached; {best_bound:.1f} after {spent:.1f} s")
    else:
        print(f"ours: there after {reached:.1f} s, {its_seconds / reached:.1f} times sooner; best {best_bound:.1f}")


def peak_memory(arguments: list[str]) -> None:
    print("\npeak memory of a process that trains one contender alone, GB")
    for name in ("ours, nb", "ours, zinb", "scVI, zinb", "original formulation, zinb"):
        done = subprocess.run([sys.executable, __file__, "--only", name, *arguments], capture_output=True, text=True)
        last = done.stdout.strip().splitlines()
        print(
            f"{name:30s} {float(last[-1]) / 1e6:.2f}"
            if done.returncode == 0
            else f"{name:30s} failed: {done.stderr.strip().splitlines()[-1]}"
        )


def train_one(name: str, counts: sp.csr_matrix, types: np.ndarray, n_cell_types: int) -> None:
    likelihood = name.split(", ")[1]
    dataset = CellDataset(counts, types, CPU)
    if name.startswith("ours"):
        OursEpoch(dataset, n_cell_types, likelihood)()
    elif name.startswith("scVI"):
        Scvi(counts, likelihood).train(1, train_size=1.0)
    else:
        OriginalSteps(dataset, n_cell_types)()
    print(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, default=PBMC3K, help="h5ad with raw counts in X; simulated where it does not exist"
    )
    parser.add_argument("--n-cell-types", type=int, default=17)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--max-epochs", type=int, default=200, help="of scVI, for the time to a likelihood")
    parser.add_argument(
        "--likelihood", action=argparse.BooleanOptionalAction, default=True, help="time to scVI's held-out likelihood"
    )
    parser.add_argument("--only", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    stage.BATCH_SIZE = arguments.batch_size
    keep_freed_memory()
    counts, types = load(arguments.data, arguments.n_cell_types)
    if arguments.only:
        return train_one(arguments.only, counts, types, arguments.n_cell_types)
    throughput(counts, types, arguments.n_cell_types, arguments.rounds)
    if arguments.likelihood:
        labels = types
        if arguments.data.exists() and "cell_type" in (obs := ad.read_h5ad(arguments.data, backed="r").obs):
            labels = obs["cell_type"].astype("category").cat.codes.to_numpy(dtype=np.int64)
        for likelihood in ("nb", "zinb"):
            time_to_likelihood(counts, labels, labels.max() + 1, likelihood, arguments.max_epochs)
    peak_memory(
        [
            "--data",
            str(arguments.data),
            "--batch-size",
            str(arguments.batch_size),
            "--n-cell-types",
            str(arguments.n_cell_types),
        ]
    )


if __name__ == "__main__":
    main()
