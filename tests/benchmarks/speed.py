"""How fast does the GMVAE train? Beside the published model and scVI.

run     python tests/benchmarks/speed.py --data data/counts.h5ad       (pbmc3k: 5 minutes)
needs   tests/benchmarks/requirements.txt for scVI, which is left out without it

All contenders get the same cells, batch size and number of threads, in one process, one after the other in every round, so that a busy
machine slows all of them down. The published model makes one step in each round (an epoch would take minutes): as lib/models has it, and
by its formula as it is written, on dense input.
"""

import importlib
import importlib.util
import tempfile
import time
import warnings
from collections.abc import Callable

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from shared import CPU, MIN_CELLS, parser, plain_paper_loss, read

from lib.data.batches import CellDataset
from lib.models.paper_gmvae import PaperGMVAE
from lib.models.profiles import gene_marginals
from lib.training import cell_batches, keep_freed_memory

stage = importlib.import_module("_3_train_gmvae")
Contender = Callable[[], int]  # trains on some cells; their number


def ours(dataset: CellDataset, n_cell_types: int, likelihood: str) -> Contender:
    """An epoch of our GMVAE, with the optimizer of stage 3."""
    torch.manual_seed(0)
    stage.LIKELIHOOD = likelihood
    model = stage.make_model(dataset, gene_marginals(dataset, n_cell_types))
    optimizer = torch.optim.Adam(stage.parameter_groups(model), lr=stage.LEARNING_RATE, fused=True)
    generator = torch.Generator().manual_seed(0)

    def epoch() -> int:
        for inputs, _, _ in cell_batches(dataset, model, stage.BATCH_SIZE, generator):
            optimizer.zero_grad()
            model(*inputs)["loss"].backward()
            optimizer.step()
        return len(dataset)

    return epoch


def published(dataset: CellDataset, n_cell_types: int, as_written: bool) -> Contender:
    model = PaperGMVAE(dataset.n_genes, n_cell_types)
    optimizer = torch.optim.Adam(model.parameters(), lr=6e-6, fused=not as_written)
    batch = next(dataset.shuffled(stage.BATCH_SIZE, torch.Generator().manual_seed(0)))
    dense = batch.raw().to_dense()

    def step() -> int:
        epsilon = torch.randn(batch.n_cells, *model.epsilon_shape)
        optimizer.zero_grad()
        if as_written:
            plain_paper_loss(model, dense, batch.cell_type_idx, epsilon).backward()
        else:
            model(batch, epsilon)["loss"].backward()
        optimizer.step()
        return batch.n_cells

    return step


def scvi_epochs(counts: sp.csr_matrix, likelihood: str, n_epochs: int = 3) -> Contender:
    """scvi-tools' SCVI, its own data loader and defaults."""
    import scvi

    scvi.settings.seed = 0
    scvi.settings.logging_dir = tempfile.gettempdir()
    adata = ad.AnnData(counts)
    scvi.model.SCVI.setup_anndata(adata)
    model = scvi.model.SCVI(adata, gene_likelihood=likelihood)

    def epochs() -> int:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            settings = {"accelerator": "cpu", "enable_progress_bar": False, "logger": False}
            model.train(n_epochs, batch_size=stage.BATCH_SIZE, train_size=1.0, **settings)
        return n_epochs * counts.shape[0]

    return epochs


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--n-cell-types", type=int, default=17, help="K, of equal size, whatever the data have")
    options.add_argument("--batch-size", type=int, default=256)
    options.add_argument("--rounds", type=int, default=5)
    arguments = options.parse_args()
    stage.BATCH_SIZE = arguments.batch_size
    keep_freed_memory()
    counts, n_cell_types = read(arguments.data).X, arguments.n_cell_types
    counts = counts[:, counts.getnnz(axis=0) >= MIN_CELLS]
    counts.sort_indices()
    density = counts.nnz / np.prod(counts.shape)
    print(f"{counts.shape[0]:,} cells x {counts.shape[1]:,} genes, {density:.1%} of the counts above zero")
    dataset = CellDataset(counts, np.arange(counts.shape[0]) % n_cell_types, CPU)
    contenders: dict[str, Contender] = {}
    for likelihood in ("nb", "zinb"):
        contenders[f"ours, {likelihood}"] = ours(dataset, n_cell_types, likelihood)
        if importlib.util.find_spec("scvi") is not None:
            contenders[f"scVI, {likelihood}"] = scvi_epochs(counts, likelihood)
    contenders["published model, as written"] = published(dataset, n_cell_types, as_written=True)
    contenders["published model, lib/models"] = published(dataset, n_cell_types, as_written=False)
    speeds: dict[str, list[float]] = {name: [] for name in contenders}
    for round_number in range(arguments.rounds + 1):
        for name, train in contenders.items():
            started = time.perf_counter()
            speed = train() / (time.perf_counter() - started)
            if round_number:  # the first warms up
                speeds[name].append(speed)
    table = pd.DataFrame(speeds).describe(percentiles=[]).T[["50%", "min", "max"]].rename(columns={"50%": "median"})
    print(f"\ncells/s, batch {stage.BATCH_SIZE}, K = {n_cell_types}, {torch.get_num_threads()} threads")
    print(table.round(1).to_string())
    for likelihood in ("nb", "zinb"):
        ratio = table["median"][f"ours, {likelihood}"] / table["median"]
        print(f"\ntimes as fast is ours, {likelihood}, as\n{ratio.drop(f'ours, {likelihood}').round(2).to_string()}")


if __name__ == "__main__":
    main()
