"""What several test files share: the project on the path, small data, the six stages run once."""

import importlib
import subprocess
import sys
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # pytest's rootdir is tests/ for files without a package

STAGES = (
    "_0_download_data.py", "_1_split_train_test.py", "_2_make_pseudobulk.py",
    "_3_train_gmvae.py", "_4_train_sctape.py", "_5_generate.py",
)  # fmt: skip


class Workplace:
    """The folders of one pipeline run, and the stages run in them."""

    def __init__(self, path: Path):
        self.path = path
        self.data, self.models, self.fig = path / "data", path / "models", path / "fig"

    def run(self, stage: str, *options: str, check: bool = True) -> subprocess.CompletedProcess:
        """A stage as a user runs it, from another folder."""
        folders = ["--data-dir", str(self.data)]
        if stage[1] in "345":
            folders += ["--models-dir", str(self.models)]
        if stage[1] in "1345":
            folders += ["--fig-dir", str(self.fig)]
        self.path.mkdir(exist_ok=True)
        done = subprocess.run([sys.executable, str(ROOT / stage), *folders, *options], cwd=self.path, capture_output=True, text=True)
        if check and done.returncode:
            raise AssertionError(f"{stage} failed:\n{done.stdout}\n{done.stderr}")
        return done

    def main(self, stage: str, **constants) -> None:
        """A stage run inside this process with some constants set, which is faster."""
        script = importlib.reload(importlib.import_module(stage.removesuffix(".py")))
        folders = {"DATA_DIR": str(self.data), "MODELS_DIR": str(self.models), "FIG_DIR": str(self.fig)}
        for name, value in ({k: v for k, v in folders.items() if hasattr(script, k)} | constants).items():
            assert hasattr(script, name), f"{stage} has no constant {name}"
            setattr(script, name, value)
        script.main()


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory) -> Workplace:
    """All six stages, run once with their defaults on the real cells that scanpy carries."""
    place = Workplace(tmp_path_factory.mktemp("pipeline"))
    place.output = {}
    for stage in STAGES:
        options = ["--dataset", "pbmc68k_reduced"] if stage == STAGES[0] else []
        place.output[stage] = place.run(stage, *options).stdout
    return place


def simulated_cells(n_cells: int = 300, n_genes: int = 60, n_types: int = 3, seed: int = 0) -> tuple[sp.csr_matrix, np.ndarray]:
    """Counts of a mixture of negative binomials with one latent programme inside each type, and the cells' types."""
    rng = np.random.default_rng(seed)
    cell_type_idx = np.sort(rng.integers(0, n_types, n_cells))
    profiles = rng.lognormal(0, 1.5, (n_types, n_genes))
    programme = rng.normal(0, 1, n_cells)[:, None] * rng.normal(0, 0.8, n_genes)
    mu = profiles[cell_type_idx] * np.exp(programme)
    mu *= rng.lognormal(np.log(400), 0.4, n_cells)[:, None] / mu.sum(axis=1, keepdims=True)
    counts = rng.poisson(rng.gamma(5.0, mu / 5.0)).astype(np.float32)
    counts[counts.sum(axis=1) == 0, 0] = 1
    return sp.csr_matrix(counts), cell_type_idx


def simulated_dataset(**arguments) -> ad.AnnData:
    counts, cell_type_idx = simulated_cells(**arguments)
    genes = [f"GENE{i}" for i in range(counts.shape[1])]
    obs = pd.DataFrame({"cell_type": pd.Categorical([f"type {k}" for k in cell_type_idx])}, index=[f"cell_{i}" for i in range(len(cell_type_idx))])
    return ad.AnnData(counts, obs=obs, var=pd.DataFrame(index=genes))
