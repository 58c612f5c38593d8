"""Stage 5: from bulk to single cells: read the proportions out of bulk samples, generate cells in these proportions, compare.

reads   models/gmvae.pt (or another GENERATOR's), models/sctape.pt, data/train.h5ad, data/test.h5ad, data/pseudobulk_test_*.csv, and BULK_FILE
writes  data/generated.h5ad: raw counts, obs["cell_type"], obs["sample"]; data/predicted_proportions.csv, predicted_spread.csv,
        predicted_samples.csv, signature_matrix.csv, and in high-resolution mode cell_type_expression.h5ad; fig/proportions.png, signature.png,
        umap_original_vs_generated.png, umap_by_cell_type.png, gene_correlation.png, fidelity.png, composition.png, type_correlation.png;
        fig/metrics.csv; fig/comparison.png and .csv where models/ holds several generators
run     python _5_generate.py
        torchrun --nproc-per-node 4 _5_generate.py            on four GPUs, or processors: the same cells, made together
time    650 test cells x 13,000 genes: 1 minute; 2,500 x 19,000: 3-5 minutes, most of it the judgement
"""

import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import anndata as ad
import numpy as np
import pandas as pd
import scipy.io
import scipy.sparse as sp
import torch

from lib import options, parallel
from lib.baselines import registry as generators
from lib.bulk import bulk_encoder, proportions
from lib.bulk.cell_counts_table import read_cell_numbers, read_proportions
from lib.bulk.pseudobulk import largest_remainder
from lib.bulk.tables import read_bulk, read_gene_ids, to_tpm
from lib.data import noise
from lib.data.batches import CellDataset
from lib.data.counts import read_split, row_blocks, select_cells, write_blocks, write_counts
from lib.data.embedding import embed, load_pymde, mde, principal_components
from lib.evaluation import classifier_transfer as classify
from lib.evaluation import comparison, metrics, plots_cells, views
from lib.files import ROOT, folder, replacing, report, user_path
from lib.models.gmvae import GMVAE, n_blocks
from lib.models.profiles import nb_per_type_log_likelihood
from lib.training import check_checkpoint, keep_freed_memory, load_checkpoint

# What to generate
GENERATOR: Literal["gmvae", "beta_vae", "pca_cvae", "conv_cvae"] = "gmvae"  # of those that stage 3 has trained
DECONVOLVER: Literal["sctape", "bulk_encoder"] = (
    "sctape"  # of those that stage 4 has trained; bulk_encoder moves the cells of the GMVAE as the bulk says
)
MOVE_GENES = (
    True  # bulk_encoder: single genes too, where the bulk exceeds the moved cells more than genes in general do
)
BULK_FILE: str | None = None  # bulk table, csv, tsv or xlsx, genes in rows or columns; none: the sum of the test cells
BULK_UNITS: Literal["auto", "tpm", "fpkm", "counts", "log2"] = "auto"  # of BULK_FILE; auto: recognised, and said
GENE_IDS: str | None = None  # table of Ensembl IDs and gene names, for a bulk with IDs
REPLICATES: str | None = None  # table of samples and groups: the samples of a group are pooled
N_CELLS = (
    1000  # cells generated for each sample of BULK_FILE; the sum of the test cells gets as many as there are test cells
)
CELL_COUNTS: str | None = (
    None  # instead of predicting: "test" (as many of each type as the test cells), a number (of each type), or a table of numbers
)
PROPORTIONS_FILE: str | None = (
    None  # instead of predicting: a table of proportions, samples x types, such as a predicted_proportions.csv kept from before
)
DECONVOLUTION: Literal["overall", "high-resolution", "none", "network"] = (
    "overall"  # what adapts to the bulk: see README
)
PROPORTIONS_OF: Literal["cells", "rna"] = "cells"  # what predicted_proportions.csv holds shares of
N_MEMBERS = 10  # of the ensemble that gives the spread of the proportions
NOISE_CLUSTER_CELLS: int | None = (
    None  # generated cells whose Leiden cluster has fewer cells are dropped as noise (Bulk2Single: 25)
)
LEIDEN_RESOLUTION = 1.0  # of these clusters (scanpy's)
NOISE_FACTOR = 1.0  # spread of the cells of a type: 1 as learned, less for typical cells (original code: factor)

# Where it goes
OUTPUT = "generated.h5ad"  # file name in DATA_DIR, or a path
WRITE_MTX = False  # also as MTX, genes and clusters csv, as the original writes it, in a folder named like OUTPUT

# Figures
N_CORRELATION_GENES = 145  # most variable genes of the train cells (paper)
N_TOP_GENES = 2000  # highly variable genes for the UMAP
N_PCS = 50  # principal components for the UMAP
N_NEIGHBORS = 15  # neighbours for the UMAP
N_TYPE_MARKERS = 200  # marker genes of each type in type_correlation.png (Bulk2Single)
MDE = False  # the same pictures as of the UMAP by minimum-distortion embedding (Bulk2Single); needs pip install pymde
FOUR_STAGES = (
    False  # four_stages.png: input, latent, reconstructed and generated cells, t-SNE and UMAP (bulk2sc; a minute more)
)
MAX_CELLS_JUDGED = (
    2500  # test cells, at most, held against as many generated and as many train cells (metrics.csv): a random draw
)
MAX_CELLS_DRAWN = 5000  # generated, test and train cells, of each at most, that are compared and drawn: a random draw

# XGBoost (Generative genomics): types named by classifiers of real and of synthetic cells
XGBOOST = False  # real to real, real to synthetic, synthetic to real: fig/xgboost.csv
XGBOOST_CELLS = (1000, 2000, 100)  # synthetic cells a type to test on, to train on, and to stop by (theirs)
CLASS_FILE: str | None = None  # csv or tsv of cell types and their coarse classes, to be scored as well

# Running
DEVICE: Literal["auto", "cpu", "cuda"] = "auto"  # auto: a GPU where there is one
SEED = 123  # of everything random in this stage
DATA_DIR = "data"  # folder
MODELS_DIR = "models"  # folder
FIG_DIR = "fig"  # folder


def main() -> None:
    data, models, fig = folder(DATA_DIR), folder(MODELS_DIR), folder(FIG_DIR)
    keep_freed_memory()
    device = parallel.start(DEVICE)
    output = output_path(data)
    given = [name for name in ("BULK_FILE", "CELL_COUNTS", "PROPORTIONS_FILE") if globals()[name] is not None]
    if len(given) > 1:
        raise ValueError(
            f"{' and '.join(given)} are both set; cell numbers come either from a bulk or from a table: set one of them to none"
        )
    if len(XGBOOST_CELLS) != 3 or min(XGBOOST_CELLS) < 1:
        raise ValueError(
            f"XGBOOST_CELLS is {XGBOOST_CELLS}; expected three numbers of cells: to test on, to train on, to stop by"
        )
    if MDE:
        load_pymde()  # before any work, should it be missing
    train, test = read_split(data)
    cell_types = list(test.obs["cell_type"].cat.categories)
    model = load_generator(GENERATOR, models, test, data, device)

    written, shift = [], None
    if PROPORTIONS_FILE is not None:
        predicted = read_proportions(user_path(PROPORTIONS_FILE), cell_types)
        cells_per_type = pd.DataFrame(largest_remainder(predicted.to_numpy(), N_CELLS), predicted.index, cell_types)
    elif CELL_COUNTS is None:
        stage = "_4_train_sctape.py" + f" --network {DECONVOLVER}" * (DECONVOLVER != "sctape")
        checkpoint = load_checkpoint(models / f"{DECONVOLVER}.pt", stage)
        check_checkpoint(
            checkpoint,
            models / f"{DECONVOLVER}.pt",
            stage,
            checkpoint["gene_names"],
            cell_types,
            test.uns["split_id"],
            data / "test.h5ad",
        )
        bulk = bulk_samples(test, checkpoint)
        estimate = proportions.estimate(checkpoint, bulk, DECONVOLUTION, N_MEMBERS, SEED)
        predicted = estimate.proportions
        if DECONVOLVER == "bulk_encoder":
            check_same_gmvae(checkpoint, model)
            shift = bulk_encoder.shift(checkpoint, bulk)
            if MOVE_GENES:
                shift = bulk_encoder.with_genes(
                    shift, model, list(test.var_names), checkpoint["gene_length_bp"], predicted.to_numpy(), bulk, SEED
                )
        totals = test.n_obs if BULK_FILE is None else N_CELLS
        cells_per_type = pd.DataFrame(largest_remainder(predicted.to_numpy(), totals), predicted.index, cell_types)
        if parallel.IS_FIRST:
            written += proportions.write(estimate, checkpoint, PROPORTIONS_OF, data)
            own_bulk = BULK_FILE is None  # whose truth is known
            written += proportions.judge(checkpoint, estimate, DECONVOLUTION, SEED, train, test, own_bulk, data, fig)
    else:
        cells_per_type = wanted_cells(test.obs["cell_type"])

    generate(model, cells_per_type, test, output, shift)
    if not parallel.IS_FIRST:
        return
    written.append(output)
    if NOISE_CLUSTER_CELLS is not None:
        drop_noise(output)
    generated = ad.read_h5ad(output, backed="r")
    if WRITE_MTX:
        written.append(write_mtx(generated.to_memory(), output.with_suffix("")))
    compare(model, train, test, generated, fig)
    judged = judge_cells(model, train, test, fig)
    names = (
        "umap_original_vs_generated",
        "umap_by_cell_type",
        "gene_correlation",
        "fidelity",
        "composition",
        "type_correlation",
    )
    names += ("mde_original_vs_generated", "mde_by_cell_type") * MDE + ("four_stages",) * FOUR_STAGES
    written += [fig / f"{name}.png" for name in names]
    written.append(fig / "metrics.csv")
    if XGBOOST:
        written.append(judge_by_xgboost(model, train, test, fig))
    others = other_generators(models, test, data, device)
    if others:
        compare_generators(others, *judged, fig)
        written += [fig / "comparison.png", fig / "comparison.csv"]
    report("stage 5", written, f"look at {FIG_DIR}/*.png, or open the cells: scanpy.read_h5ad({str(output)!r})")


def load_generator(name: str, models: Path, test: ad.AnnData, data: Path, device: torch.device) -> torch.nn.Module:
    """A generator that stage 3 has trained, refused if it was trained on other cells."""
    stage = "_3_train_gmvae.py" + f" --generator {name}" * (name != "gmvae")
    checkpoint = load_checkpoint(models / f"{name}.pt", stage)
    cell_types = list(test.obs["cell_type"].cat.categories)
    check_checkpoint(
        checkpoint,
        models / f"{name}.pt",
        stage,
        list(test.var_names),
        cell_types,
        test.uns["split_id"],
        data / "test.h5ad",
    )
    return generators.load(checkpoint, device)


def other_generators(models: Path, test: ad.AnnData, data: Path, device: torch.device) -> dict[str, torch.nn.Module]:
    """All that stands in models/ beside the chosen one, but for what was trained on other cells."""
    others = {}
    for name in generators.CLASSES:
        if name != GENERATOR and (models / f"{name}.pt").exists():
            try:
                others[name] = load_generator(name, models, test, data, device)
            except ValueError as error:
                print(f"{name} is left out of the comparison: {error}")
    return others


def bulk_samples(test: ad.AnnData, checkpoint: dict[str, Any]) -> pd.DataFrame:
    """The bulk to start from, samples x genes, in TPM."""
    lengths = checkpoint["gene_length_bp"]
    lengths = None if lengths is None else pd.Series(lengths)
    if BULK_FILE is None:
        summed = sum(np.asarray(counts.sum(axis=0), dtype=np.float64) for _, counts in row_blocks(test.X))
        total = pd.DataFrame(summed.reshape(1, -1), index=["test_cells"], columns=test.var_names)
        return to_tpm(total, "counts", lengths)
    gene_ids = read_gene_ids(user_path(GENE_IDS)) if GENE_IDS else None
    replicates = user_path(REPLICATES) if REPLICATES else None
    return to_tpm(read_bulk(user_path(BULK_FILE), list(test.var_names), gene_ids), BULK_UNITS, lengths, replicates)


def wanted_cells(cell_type: pd.Series) -> pd.DataFrame:
    """Samples x cell types: the numbers of cells that CELL_COUNTS asks for."""
    types = list(cell_type.cat.categories)
    if CELL_COUNTS == "test":
        return pd.DataFrame([cell_type.value_counts()[types].to_numpy()], index=["test_cells"], columns=types)
    if CELL_COUNTS.isdigit():
        return pd.DataFrame(int(CELL_COUNTS), index=["cells"], columns=types)
    return read_cell_numbers(user_path(CELL_COUNTS), types)


def check_same_gmvae(checkpoint: dict[str, Any], model: torch.nn.Module) -> None:
    """The bulk encoder speaks of one GMVAE's z, so it serves no other."""
    if bulk_encoder.weights_id(model) != checkpoint["gmvae_id"]:
        raise ValueError(
            f"models/bulk_encoder.pt was trained for another model than models/{GENERATOR}.pt as it is now; "
            "run _4_train_sctape.py --network bulk_encoder again, with GENERATOR = gmvae, or set DECONVOLVER to sctape"
        )


def generate(
    model: torch.nn.Module,
    cells_per_type: pd.DataFrame,
    test: ad.AnnData,
    output: Path,
    shift: bulk_encoder.Shift | None,
) -> None:
    """New cells of all samples, sample by sample and type by type, written while they are made."""
    n_cells = cells_per_type.to_numpy()
    types = np.tile(np.arange(n_cells.shape[1]), len(n_cells)).repeat(n_cells.ravel())
    samples = np.repeat(cells_per_type.index.astype(str).to_numpy(), n_cells.sum(axis=1))
    print(f"generating {len(types):,} cells for {len(n_cells):,} bulk sample{'s' * (len(n_cells) > 1)}")
    obs = pd.DataFrame(
        {
            "cell_type": pd.Categorical.from_codes(types, cells_per_type.columns),
            "sample": pd.Categorical(samples, categories=pd.unique(samples)),
            "library_size": np.zeros(len(types)),
        },
        index=[f"generated_{i + 1}" for i in range(len(types))],
    )
    uns = {
        "dataset": test.uns["dataset"],
        "split_id": test.uns["split_id"],
        "seed": SEED,
        "noise_factor": NOISE_FACTOR,
        "generator": GENERATOR,
    }
    cells = ad.AnnData(obs=obs, var=pd.DataFrame(index=test.var_names), uns=uns)
    edges = np.linspace(0, n_blocks(len(types)), parallel.N_RANKS + 1).astype(
        int
    )  # each process makes the blocks between two of these
    numbers = range(*edges[parallel.RANK :][:2])
    groups = np.arange(n_cells.size).repeat(n_cells.ravel())  # sample by sample, type by type, as the shift counts them
    moved = {} if shift is None else {"shift": shift, "groups": groups}
    mine = model.sample(types, SEED, NOISE_FACTOR, numbers, **moved)
    started = time.perf_counter()
    if parallel.IS_FIRST:
        of_all = itertools.chain(mine, taken_over(output, range(edges[1], edges[-1])))
        write_blocks(cells, with_library_size(of_all, cells.obs), output)
        seconds = time.perf_counter() - started
        print(f"generated and written in {seconds:.1f} s: {len(types) / seconds:,.0f} cells/s")
    else:
        for number, counts in zip(numbers, mine):
            sp.save_npz(part_path(output, number), counts, compressed=False)
        parallel.wait()


def part_path(output: Path, number: int) -> Path:
    """A block on its way from another process to the first."""
    return output.with_suffix(f".part{number}.npz")


def taken_over(output: Path, numbers: range) -> Iterator[sp.csr_matrix]:
    """The blocks that other processes made."""
    parallel.wait()
    for number in numbers:
        yield sp.load_npz(part_path(output, number))
        part_path(output, number).unlink()


def with_library_size(blocks: Iterator[sp.csr_matrix], obs: pd.DataFrame) -> Iterator[sp.csr_matrix]:
    """The blocks as they come, and the sums of their rows in the table of cells."""
    done = 0
    for counts in blocks:
        obs.iloc[done : done + counts.shape[0], obs.columns.get_loc("library_size")] = np.asarray(
            counts.sum(axis=1)
        ).ravel()
        done += counts.shape[0]
        yield counts


def drop_noise(output: Path) -> None:
    """The generated cells without those in small clusters, in the same file."""
    cells = ad.read_h5ad(output)
    kept = noise.in_large_clusters(cells, NOISE_CLUSTER_CELLS, N_TOP_GENES, N_PCS, N_NEIGHBORS, LEIDEN_RESOLUTION, SEED)
    write_counts(cells[kept].copy(), output)


def output_path(data: Path) -> Path:
    path = Path(OUTPUT).expanduser()
    taken = ("counts.h5ad", "train.h5ad", "test.h5ad", "pseudobulk_train.h5ad")
    if path.suffix != ".h5ad" or path.name in taken:
        raise ValueError(f"OUTPUT is {OUTPUT!r}; expected a name that ends in .h5ad and is none of {', '.join(taken)}")
    path = data / path if path.parent == Path(".") else ROOT / path
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def write_mtx(generated: ad.AnnData, path: Path) -> Path:
    """The original's form: counts.mtx (cells x genes), genes.csv, clusters.csv."""
    path.mkdir(exist_ok=True)
    with replacing(path / "counts.mtx") as temporary:
        scipy.io.mmwrite(temporary, generated.X.astype(np.int64))
    with replacing(path / "genes.csv") as temporary:
        pd.Series(generated.var_names, name="gene").to_csv(temporary, index=False)
    with replacing(path / "clusters.csv") as temporary:
        generated.obs[["cell_type", "sample"]].to_csv(temporary, index_label="barcode")
    return path


def compare(model: torch.nn.Module, train: ad.AnnData, test: ad.AnnData, generated: ad.AnnData, fig: Path) -> None:
    """Likelihood of the test cells, and the figures that hold generated cells against them."""
    rng = np.random.default_rng(SEED)
    drawn_generated, drawn_test, drawn_train = (
        select_cells(cells, np.sort(rng.permutation(cells.n_obs)[:MAX_CELLS_DRAWN]))
        for cells in (generated, test, train)
    )
    if isinstance(model, GMVAE):  # the other generators have no likelihood of counts
        ours, baseline = (part.mean() for part in likelihoods(model, train, drawn_test))
        print(
            f"log-likelihood of the test cells, nats per cell: GMVAE {ours:.1f}; one negative binomial per gene and type {baseline:.1f}"
        )

    both = ad.concat({"original": drawn_test, "generated": drawn_generated}, label="source", index_unique="-")
    both.obs["cell_type"] = pd.Categorical(both.obs["cell_type"], categories=test.obs["cell_type"].cat.categories)
    is_generated = (both.obs["source"] == "generated").to_numpy()
    pcs = principal_components(both, N_TOP_GENES, N_PCS)
    embeddings = {"UMAP": embed(pcs, N_NEIGHBORS, SEED).obsm["X_umap"]} | (
        {"MDE": mde(pcs, N_NEIGHBORS, SEED)} if MDE else {}
    )
    for method, places in embeddings.items():
        plots_cells.original_vs_generated(
            places, is_generated, fig / f"{method.lower()}_original_vs_generated.png", method
        )
        plots_cells.original_vs_generated_by_type(
            places, is_generated, both.obs["cell_type"], fig / f"{method.lower()}_by_cell_type.png", method
        )

    sets = {"train cells": train.obs, "test cells": test.obs, "generated": generated.obs}
    plots_cells.composition(metrics.type_proportions(sets), fig / "composition.png")
    by_type = metrics.type_correlation(drawn_test, drawn_generated, N_TYPE_MARKERS)
    plots_cells.type_correlation(*by_type, fig / "type_correlation.png")
    if FOUR_STAGES:
        if not isinstance(model, GMVAE):
            raise ValueError(
                f"FOUR_STAGES draws the GMVAE's stages, but GENERATOR is {GENERATOR}; set it to gmvae, or FOUR_STAGES to False"
            )
        embeddings, types = views.four_embeddings(
            model, drawn_test, drawn_generated, N_TOP_GENES, N_PCS, N_NEIGHBORS, SEED
        )
        plots_cells.four_stages(embeddings, types, fig / "four_stages.png")

    genes = metrics.variable_genes(drawn_train, N_CORRELATION_GENES)
    of_test, of_generated, of_train = (
        metrics.gene_correlation(part, genes) for part in (drawn_test, drawn_generated, drawn_train)
    )
    plots_cells.gene_correlation(
        of_test,
        of_generated,
        metrics.cluster_order(of_test),
        metrics.correlation_agreement(of_test, of_generated)[0],
        metrics.correlation_agreement(of_test, of_train)[0],
        fig / "gene_correlation.png",
    )


def judge_cells(
    model: torch.nn.Module, train: ad.AnnData, test: ad.AnnData, fig: Path
) -> tuple[ad.AnnData, ad.AnnData, np.ndarray, pd.DataFrame]:
    """Test cells held against new cells of the same types and numbers, and against train cells: what a generator could reach at best.

    Returns what `compare_generators` needs: the test cells, the train cells, the genes whose correlations are compared, and the
    pooled figures, columns `generated` and `real`.
    """
    rng = np.random.default_rng([SEED, 5])
    real = select_cells(test, np.sort(rng.permutation(test.n_obs)[:MAX_CELLS_JUDGED]))
    floor_rows = metrics.select_like(train, real.obs["cell_type"], rng)
    other_rows = np.sort(rng.permutation(np.setdiff1d(np.arange(train.n_obs), floor_rows))[: real.n_obs])
    floor, others = select_cells(train, floor_rows), select_cells(train, other_rows)
    counts = sp.vstack(list(model.sample(real.obs["cell_type"].cat.codes.to_numpy(), SEED + 1)), format="csr")
    made = ad.AnnData(counts, obs=real.obs[["cell_type"]].copy(), var=real.var[[]].copy())
    genes = metrics.variable_genes(
        select_cells(train, np.sort(rng.permutation(train.n_obs)[:MAX_CELLS_DRAWN])), metrics.N_CORRELATED_GENES
    )
    table = metrics.fidelity_table(real, made, floor, others, genes, SEED)
    with replacing(fig / "metrics.csv") as temporary:
        table.to_csv(temporary, index=False, float_format="%.5f")
    pooled = table[table["cells"] == "all"].drop(columns="cells").set_index("figure")
    print(f"{real.n_obs:,} test cells against as many generated ones, and against real train cells of the same types:")
    print(pooled.rename(columns={"real": "real train cells"}).to_string(float_format="{:.3f}".format))
    sets = {"test": real, "train": floor, "generated": made}
    statistics = {name: metrics.cell_statistics(cells) for name, cells in sets.items()}
    mean_r = metrics.pearson(statistics["test"].genes["mean"], statistics["generated"].genes["mean"])
    cell_types = list(real.obs["cell_type"].cat.categories)
    plots_cells.fidelity(table, statistics, mean_r, cell_types, fig / "fidelity.png")
    return real, floor, genes, pooled


def judge_by_xgboost(model: torch.nn.Module, train: ad.AnnData, test: ad.AnnData, fig: Path) -> Path:
    """Precision, recall and F1 of classifiers that learn the types from real or from synthetic cells."""
    classes = (
        None
        if CLASS_FILE is None
        else classify.read_classes(user_path(CLASS_FILE), list(test.obs["cell_type"].cat.categories))
    )
    known = select_cells(train, np.flatnonzero(train.obs["cell_type"].notna()))

    def sample(types: np.ndarray, seed: int) -> sp.csr_matrix:
        return sp.vstack(list(model.sample(types, seed)), format="csr")

    table = classify.protocol(
        known, select_cells(test, np.arange(test.n_obs)), sample, SEED + 2, classes, *XGBOOST_CELLS
    )
    with replacing(fig / "xgboost.csv") as temporary:
        table.to_csv(temporary, index=False, float_format="%.5f")
    print(
        "XGBoost, trained and tested on real (train, test) and synthetic cells:\n"
        + table.to_string(index=False, float_format="{:.3f}".format)
    )
    return fig / "xgboost.csv"


def compare_generators(
    others: dict[str, torch.nn.Module],
    real: ad.AnnData,
    floor: ad.AnnData,
    genes: np.ndarray,
    pooled: pd.DataFrame,
    fig: Path,
) -> None:
    """The same judgement, of all cells together, for every other generator in models/, beside that of the one chosen."""
    table = (
        pooled[["generated"]].set_axis([GENERATOR], axis=1).join(comparison.table_of(others, real, floor, genes, SEED))
    )
    table = table[[name for name in generators.CLASSES if name in table]].assign(**{"real train cells": pooled["real"]})
    with replacing(fig / "comparison.csv") as temporary:
        table.to_csv(temporary, float_format="%.5f")
    print(
        "the generators in models/, each against the same test cells:\n" + table.to_string(float_format="{:.3f}".format)
    )
    plots_cells.comparison(table.drop(columns="real train cells"), table["real train cells"], fig / "comparison.png")


def likelihoods(model: GMVAE, train: ad.AnnData, test: ad.AnnData) -> tuple[np.ndarray, np.ndarray]:
    """log p(x|y,l) of each test cell under the model and under per-type negative binomials fitted to the train cells."""
    device = model.log_theta.device
    train_cells = CellDataset(train.X, train.obs["cell_type"].cat.codes, device, in_memory=False)
    test_cells = CellDataset(test.X, test.obs["cell_type"].cat.codes, device)
    return model.log_likelihood(test_cells, n_samples=20, seed=SEED), nb_per_type_log_likelihood(
        train_cells, test_cells
    )


if __name__ == "__main__":
    options.run(globals())
