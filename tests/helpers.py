"""Shared by tests and benchmarks: a folder to run the stages in, simulated cells, a small trained model."""

import contextlib
import importlib
import io
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
import torch.nn.functional as F

import lib.options
from lib.data.batches import CellDataset
from lib.data.counts import Fingerprint
from lib.data.readers import open_dataset
from lib.models.gmvae import GMVAE
from lib.models.paper_gmvae import PaperGMVAE
from lib.models.profiles import gene_marginals
from lib.models.start import initialise, within_type_axes

CPU = torch.device("cpu")

ROOT = Path(__file__).resolve().parent.parent

STAGES = (
    "_0_download_data.py", "_1_split_train_test.py", "_2_make_pseudobulk.py",
    "_3_train_gmvae.py", "_4_train_sctape.py", "_5_generate.py",
)  # fmt: skip

FEW = {"MAX_CELLS_EVALUATED": 60, "MAX_CELLS_PLOTTED": 100}  # of stage 5: an evaluation that runs, whatever it finds


def read_dataset(path: Path, **arguments) -> ad.AnnData:
    """A data set as stage 0 reads it, in memory."""
    return open_dataset(path, **arguments).in_memory()


class Workplace:
    """The folders of one pipeline run, and the stages run in them."""

    def __init__(self, path: Path):
        self.path = path
        self.data, self.models, self.fig = path / "data", path / "models", path / "fig"

    def copy(self, path: Path) -> "Workplace":
        shutil.copytree(self.path, path)
        return Workplace(path)

    def cells(self, name: str) -> ad.AnnData:
        return ad.read_h5ad(self.data / f"{name}.h5ad")

    def table(self, name: str) -> pd.DataFrame:
        return pd.read_csv(self.data / f"{name}.csv", index_col=0, comment="#")

    def folders(self, stage: str) -> list[str]:
        """Options that name these folders, as far as the stage has them."""
        folders = {"--data-dir": "012345", "--models-dir": "345", "--fig-dir": "1345"}  # numbers of the stages
        paths = zip(folders.items(), (self.data, self.models, self.fig))
        return [word for (name, stages), path in paths if stage[1] in stages for word in (name, str(path))]

    def process(self, stage: str, *options: str, program: tuple[str, ...] = (sys.executable,)) -> str:
        """What a stage prints in a process of its own, started from another folder, as a user starts it."""
        self.path.mkdir(exist_ok=True)
        command = [*program, str(ROOT / stage), *self.folders(stage), *options]
        done = subprocess.run(command, cwd=self.path, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, f"{stage} failed:\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def run(self, stage: str, *options: str, check: bool = True) -> subprocess.CompletedProcess:
        """A stage with options of the command line, run inside this process, which is faster."""
        self.path.mkdir(exist_ok=True)
        words, out, err = [stage, *self.folders(stage), *options], io.StringIO(), io.StringIO()
        argv, given = mock.patch.object(sys, "argv", words), mock.patch.object(lib.options, "GIVEN", set())
        code = 0
        with contextlib.chdir(self.path), argv, given, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                runpy.run_path(str(ROOT / stage), run_name="__main__")
            except SystemExit as ended:
                code = int(ended.code or 0)
        assert code == 0 or not check, f"{stage} failed:\n{out.getvalue()}\n{err.getvalue()}"
        return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())

    def main(self, stage: str, **constants) -> None:
        """A stage with some constants set, run inside this process, which is faster."""
        script = importlib.reload(importlib.import_module(stage.removesuffix(".py")))
        folders = {"DATA_DIR": str(self.data), "MODELS_DIR": str(self.models), "FIG_DIR": str(self.fig)}
        for name, value in ({k: v for k, v in folders.items() if hasattr(script, k)} | constants).items():
            assert hasattr(script, name), f"{stage} has no constant {name}"
            setattr(script, name, value)
        script.main()


def simulated_cells(n_cells: int = 300, n_genes: int = 60, n_types: int = 3, seed: int = 0) -> tuple:
    """Counts of a mixture of negative binomials with one latent programme inside each type (CSR), and the cells' types."""
    rng = np.random.default_rng(seed)
    cell_type_idx = np.sort(rng.integers(0, n_types, n_cells))
    profiles = rng.lognormal(0, 1.5, (n_types, n_genes))
    programme = rng.normal(0, 1, n_cells)[:, None] * rng.normal(0, 0.8, n_genes)
    mu = profiles[cell_type_idx] * np.exp(programme)
    mu *= rng.lognormal(np.log(400), 0.4, n_cells)[:, None] / mu.sum(axis=1, keepdims=True)
    counts = rng.poisson(rng.gamma(5.0, mu / 5.0)).astype(np.float32)
    counts[counts.sum(axis=1) == 0, 0] = 1
    return sp.csr_matrix(counts), cell_type_idx


def fingerprint(adata: ad.AnnData) -> str:
    """`Fingerprint` of all cells as one block."""
    whole = Fingerprint(adata.obs, adata.var_names)
    whole.add(adata.X)
    return str(whole)


def simulated_dataset(**arguments) -> ad.AnnData:
    counts, cell_type_idx = simulated_cells(**arguments)
    types = pd.Categorical([f"type {k}" for k in cell_type_idx])
    obs = pd.DataFrame({"cell_type": types}, index=[f"cell_{i}" for i in range(len(types))])
    return ad.AnnData(counts, obs=obs, var=pd.DataFrame(index=[f"GENE{i}" for i in range(counts.shape[1])]))


def split_only(tmp_path, adata: ad.AnnData, **constants) -> Workplace:
    """Stages 0 and 1 on these cells."""
    place = Workplace(tmp_path)
    tmp_path.mkdir(exist_ok=True)
    adata.write_h5ad(tmp_path / "source.h5ad")
    place.main(STAGES[0], DATASET=str(tmp_path / "source.h5ad"))
    place.main(STAGES[1], **dict(MIN_GENES=None, MAX_GENES=None, MAX_COUNTS=None, REMOVE_DOUBLETS=False) | constants)
    return place


def trained_gmvae(counts, cell_type_idx, epochs: int = 150, seed: int = 0, **arguments) -> GMVAE:
    """A GMVAE of three types."""
    torch.manual_seed(seed)
    dataset, generator = CellDataset(counts, cell_type_idx, CPU), torch.Generator().manual_seed(seed)
    marginals = gene_marginals(dataset, 3)
    axes = within_type_axes(dataset, marginals, 8, seed)
    has_unknown = bool((cell_type_idx < 0).any())
    model = GMVAE(counts.shape[1], 3, len(axes.variance), 32, with_classifier=has_unknown, **arguments)
    initialise(model, dataset, marginals, axes)
    dispersion = [p for n, p in model.named_parameters() if n.startswith(("log_theta", "log_loading"))]
    others = [p for n, p in model.named_parameters() if not n.startswith(("log_theta", "log_loading"))]
    optimizer = torch.optim.Adam([{"params": dispersion, "lr": 2e-2}, {"params": others}], lr=3e-3)
    for _ in range(epochs):
        for batch in dataset.shuffled(64, generator):
            optimizer.zero_grad()
            model(batch, torch.randn(batch.n_cells, model.n_latent, generator=generator))["loss"].backward()
            optimizer.step()
    return model.eval()


def plain_log_zinb(x: torch.Tensor, mu: torch.Tensor, theta: torch.Tensor, pi: torch.Tensor) -> torch.Tensor:
    """log ZINB(x; mu, theta, pi), elementwise, as it is written in a paper."""
    log_nb = torch.lgamma(x + theta) - torch.lgamma(theta) - torch.lgamma(x + 1)
    log_nb = log_nb + theta * (theta / (theta + mu)).log() + x * (mu / (theta + mu)).log()
    return torch.where(x == 0, (pi + (1 - pi) * log_nb.exp()).log(), (1 - pi).log() + log_nb)


def plain_paper_loss(model: PaperGMVAE, x: torch.Tensor, types: torch.Tensor, epsilon: torch.Tensor) -> torch.Tensor:
    """The loss of the paper as it is written: dense counts x, every type decoded, one type after the other.

    types: (n_cells,) labels; epsilon: (n_cells, K, n_latent), standard normal.
    """

    def elu_plus_one(h: torch.Tensor) -> torch.Tensor:
        return F.elu(h) + 1

    wide = len(model.q_y_x_bias)
    genes_y, *genes_z = model.q_genes.weight.T.split(wide)  # the genes' part of the first layers
    q_y = F.softmax(model.q_y_x(F.relu(F.linear(x, genes_y, model.q_y_x_bias))), dim=1)
    total = torch.zeros(len(x), dtype=x.dtype)
    for k in range(model.n_cell_types):
        y = F.one_hot(torch.full((len(x),), k), model.n_cell_types).to(x.dtype)
        xy, q_z = torch.cat([x, y], dim=1), []
        towers = zip((model.q_z_xy_mean, model.q_z_xy_log_var), genes_z, model.q_z_xy_types.weight.split(wide),
                     model.q_z_xy_types.bias.split(wide))  # fmt: skip
        for tower, of_genes, of_types, bias in towers:
            q_z.append(tower(F.relu(F.linear(xy, torch.cat([of_genes, of_types], dim=1), bias))))
        std = (q_z[1] / 2).exp()
        p = torch.distributions.Normal(model.p_z_y_mean(y), (model.p_z_y_log_var(y) / 2).exp())
        kl_z = torch.distributions.kl_divergence(torch.distributions.Normal(q_z[0], std), p).sum(dim=1)
        h = model.p_x_z_trunk(q_z[0] + std * epsilon[:, k])
        mu, theta = elu_plus_one(model.p_x_z_mean(h)), elu_plus_one(model.p_x_z_theta(h))
        log_p_x = plain_log_zinb(x, mu, theta, torch.sigmoid(model.p_x_z_zeros(h))).sum(dim=1)
        kl_y = q_y[:, k].log() - ((types == k).to(x.dtype) + 1e-10).log()
        total = total + q_y[:, k] * (kl_z - log_p_x + kl_y)
    return total.mean()
