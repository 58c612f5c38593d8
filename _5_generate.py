"""Stage 5: from bulk to single cells: read the proportions out of bulk samples, generate cells in these proportions, compare.

reads   models/gmvae.pt, models/sctape.pt, data/train.h5ad, data/test.h5ad, data/pseudobulk_test_*.csv, and BULK_FILE
writes  data/generated.h5ad: raw counts, obs["cell_type"], obs["sample"]; data/predicted_proportions.csv, predicted_spread.csv,
        predicted_samples.csv, signature_matrix.csv, and in high-resolution mode cell_type_expression.h5ad; fig/proportions.png, signature.png,
        umap_original_vs_generated.png, umap_by_cell_type.png, gene_correlation.png, fidelity.png; fig/metrics.csv
run     python _5_generate.py
        torchrun --nproc-per-node 4 _5_generate.py            on four GPUs, or processors: the same cells, made together
time    650 test cells x 13,000 genes: 1 minute; 2,500 x 19,000: 3-5 minutes, most of it the judgement
"""

import itertools
import time
from pathlib import Path
from typing import Any, Iterator, Literal

import anndata as ad
import numpy as np
import pandas as pd
import scipy.io
import scipy.sparse as sp
import torch

from lib import metrics, options, parallel, plots, sctape
from lib.batches import CellDataset
from lib.bulk import read_bulk, read_gene_ids, to_tpm
from lib.counts import read_split, row_blocks, take, write_blocks
from lib.deconvolution import Estimate, deconvolve, to_rna
from lib.embedding import embed, principal_components
from lib.files import ROOT, folder, replacing, report, user_path
from lib.gmvae import GMVAE, n_blocks
from lib.profiles import nb_per_type_log_likelihood
from lib.pseudobulk import largest_remainder, read_test_mixtures
from lib.reference import Reference, nnls_on_markers, signature_genes
from lib.sctape import ScTAPE
from lib.tables import separator
from lib.training import check_checkpoint, keep_freed_memory, load_checkpoint

# What to generate
BULK_FILE: str | None = None  # bulk table, csv, tsv or xlsx, genes in rows or columns; none: the sum of the test cells
BULK_UNITS: Literal["auto", "tpm", "fpkm", "counts", "log2"] = "auto"  # of BULK_FILE; auto: recognised, and said
GENE_IDS: str | None = None  # table of Ensembl IDs and gene names, for a bulk with IDs
REPLICATES: str | None = None  # table of samples and groups: the samples of a group are pooled
N_CELLS = 1000  # cells generated for each sample of BULK_FILE; the sum of the test cells gets as many as there are test cells
CELL_COUNTS: str | None = None  # instead of predicting: "test" (as many of each type as the test cells), or a table of cell numbers
DECONVOLUTION: Literal["overall", "high-resolution", "none", "network"] = "overall"  # what adapts to the bulk: see README
PROPORTIONS_OF: Literal["cells", "rna"] = "cells"  # what predicted_proportions.csv holds shares of
N_MEMBERS = 10  # of the ensemble that gives the spread of the proportions
NOISE_FACTOR = 1.0  # spread of the cells of a type: 1 as learned, less for typical cells (original code: factor)

# Where it goes
OUTPUT = "generated.h5ad"  # file name in DATA_DIR, or a path
WRITE_MTX = False  # also as MTX, genes and clusters csv, as the original writes it, in a folder named like OUTPUT

# Figures
N_CORRELATION_GENES = 145  # most variable genes of the train cells (paper)
N_TOP_GENES = 2000  # highly variable genes for the UMAP
N_PCS = 50  # principal components for the UMAP
N_NEIGHBORS = 15  # neighbours for the UMAP
MAX_CELLS_JUDGED = 2500  # test cells, at most, held against as many generated and as many train cells (metrics.csv): a random draw
MAX_CELLS_DRAWN = 5000  # generated, test and train cells, of each at most, that are compared and drawn: a random draw

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
    if BULK_FILE is not None and CELL_COUNTS is not None:
        raise ValueError("BULK_FILE and CELL_COUNTS are both set; cell numbers come either from a bulk or from a table: set one of them to none")
    train, test = read_split(data)
    cell_types = list(test.obs["cell_type"].cat.categories)
    gmvae_checkpoint = load_checkpoint(models / "gmvae.pt", "_3_train_gmvae.py")
    check_checkpoint(gmvae_checkpoint, models / "gmvae.pt", "_3_train_gmvae.py", list(test.var_names), cell_types, test.uns["split_id"], data / "test.h5ad")
    model = load_model(gmvae_checkpoint, device)

    written = []
    if CELL_COUNTS is None:
        checkpoint = load_checkpoint(models / "sctape.pt", "_4_train_sctape.py")
        check_checkpoint(checkpoint, models / "sctape.pt", "_4_train_sctape.py", checkpoint["gene_names"], cell_types, test.uns["split_id"], data / "test.h5ad")
        bulk = bulk_samples(test, checkpoint)
        if "reference" not in checkpoint:
            raise ValueError(f"{models / 'sctape.pt'} is of an older version: it holds no reference profiles; run _4_train_sctape.py again")
        reference = Reference.from_checkpoint(checkpoint["reference"])
        estimate = read_proportions(checkpoint, reference, bulk)
        predicted = estimate.proportions
        totals = test.n_obs if BULK_FILE is None else N_CELLS
        cells_per_type = pd.DataFrame(largest_remainder(predicted.to_numpy(), totals), predicted.index, cell_types)
        if parallel.IS_FIRST:
            written += write_estimate(estimate, reference, data)
            judge_proportions(checkpoint, reference, estimate, train, test, data, fig)
            written += [fig / "proportions.png", fig / "signature.png"]
    else:
        cells_per_type = wanted_cells(test.obs["cell_type"])

    generate(model, cells_per_type, test, output)
    if not parallel.IS_FIRST:
        return
    written.append(output)
    generated = ad.read_h5ad(output, backed="r")
    if WRITE_MTX:
        written.append(write_mtx(generated.to_memory(), output.with_suffix("")))
    compare(model, train, test, generated, fig)
    judge_cells(model, train, test, fig)
    written += [fig / f"{name}.png" for name in ("umap_original_vs_generated", "umap_by_cell_type", "gene_correlation", "fidelity")]
    written.append(fig / "metrics.csv")
    report("stage 5", written, f"look at {FIG_DIR}/*.png, or open the cells: scanpy.read_h5ad({str(output)!r})")


def load_model(checkpoint: dict[str, Any], device: torch.device) -> GMVAE:
    model = GMVAE(**checkpoint["arguments"])
    model.load_state_dict(checkpoint["weights"])
    model.prior = checkpoint.get("prior")  # fitted when the training ends
    return model.to(device).eval()


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


def read_proportions(checkpoint: dict[str, Any], reference: Reference, bulk: pd.DataFrame, mode: str | None = None, n_members: int | None = None) -> Estimate:
    """What `DECONVOLUTION` asks for, of a bulk in TPM; `mode` and `n_members` set here take the place of the constants."""
    mode = mode or DECONVOLUTION
    lengths = checkpoint["gene_length_bp"]
    scaled_reference = reference.per_length(None if lengths is None else pd.Series(lengths))
    least = checkpoint["constants"]["MIN_GENE_COVERAGE"]
    members = N_MEMBERS if n_members is None else n_members
    estimate = deconvolve(scaled_reference, bulk, "none" if mode == "network" else mode, members, SEED, least)
    if mode == "network":
        network = ScTAPE.from_checkpoint(checkpoint)
        signature = pd.DataFrame(network.signature_matrix().numpy(), checkpoint["cell_types"], checkpoint["gene_names"])
        estimate = estimate._replace(proportions=sctape.predict(checkpoint, bulk), spread=estimate.spread * np.nan, signature=np.expm1(signature))
    return estimate


def write_estimate(estimate: Estimate, reference: Reference, data: Path) -> list[Path]:
    """The tables of the deconvolution; says which samples to trust less."""
    shares = estimate.proportions
    if PROPORTIONS_OF == "rna":
        shares = pd.DataFrame(to_rna(shares.to_numpy(), reference.mean.sum(axis=1)), shares.index, shares.columns)
    summary = shares.map("{:.3f}".format) + " +- " + estimate.spread.map("{:.3f}".format)
    print(f"proportions of {PROPORTIONS_OF} (deconvolution: {DECONVOLUTION}) and their spread over an ensemble of {N_MEMBERS}:")
    print(summary.head(10).to_string() + ("" if len(summary) <= 10 else f"\n... and {len(summary) - 10:,} more samples"))
    for sample, row in estimate.samples[estimate.samples["warning"] != ""].iterrows():
        print(
            f"WARNING: {sample}: {row['warning']} (r = {row['reference_r']:.2f}; unexplained: {row['unexplained_genes']}): "
            "another tissue, a type that the reference lacks, or other units?"
        )
    tables = {"predicted_proportions": shares, "predicted_spread": estimate.spread, "predicted_samples": estimate.samples, "signature_matrix": estimate.signature}
    paths = []
    for name, table in tables.items():
        paths.append(data / f"{name}.csv")
        with replacing(paths[-1]) as temporary:
            table.to_csv(temporary, float_format="%.6f" if name.startswith("predicted") else "%.6g")
    if estimate.expression is not None:
        obs = estimate.proportions.rename(index=str).stack().rename_axis(["sample", "cell_type"]).rename("proportion").reset_index()
        obs.index = obs["sample"] + ": " + obs["cell_type"]
        expression = estimate.expression.astype(np.float32).reshape(len(obs), -1)
        cells = ad.AnnData(expression, obs=obs, var=pd.DataFrame(index=estimate.signature.columns))
        paths.append(data / "cell_type_expression.h5ad")
        with replacing(paths[-1]) as temporary:
            cells.write_h5ad(temporary)
    return paths


def wanted_cells(cell_type: pd.Series) -> pd.DataFrame:
    """Samples x cell types: the numbers of cells that CELL_COUNTS asks for."""
    types = list(cell_type.cat.categories)
    if CELL_COUNTS == "test":
        return pd.DataFrame([cell_type.value_counts()[types].to_numpy()], index=["test_cells"], columns=types)
    path = user_path(CELL_COUNTS)
    table = pd.read_csv(path, sep=separator(path), index_col=0, dtype=str, keep_default_na=False)
    table.index, table.columns = table.index.astype(str).str.strip(), table.columns.astype(str).str.strip()
    table = table.apply(pd.to_numeric, errors="coerce")
    if table.shape[1] == 1 and table.index.isin(types).any():  # one row a type
        table = table.T.set_axis(["cells"])
    unknown = [str(name) for name in table.columns if name not in types]
    if unknown:
        raise ValueError(f"{path} asks for cell types that the model does not know: {', '.join(unknown)}; it knows {', '.join(types)}")
    table = table.reindex(columns=types, fill_value=0)
    if not ((table >= 0) & (table % 1 == 0)).all(axis=None) or table.to_numpy().sum() == 0:
        raise ValueError(
            f"{path} must hold numbers of cells: whole, not negative, not all zero; "
            "a row a sample and a column a type, or a row a type and one column"
        )
    return table.astype(np.int64)


def generate(model: GMVAE, cells_per_type: pd.DataFrame, test: ad.AnnData, output: Path) -> None:
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
    uns = {"dataset": test.uns["dataset"], "split_id": test.uns["split_id"], "seed": SEED, "noise_factor": NOISE_FACTOR}
    cells = ad.AnnData(obs=obs, var=pd.DataFrame(index=test.var_names), uns=uns)
    edges = np.linspace(0, n_blocks(len(types)), parallel.N_RANKS + 1).astype(int)  # each process makes the blocks between two of these
    numbers = range(*edges[parallel.RANK :][:2])
    mine = model.sample(types, SEED, NOISE_FACTOR, numbers)
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
        obs.iloc[done : done + counts.shape[0], obs.columns.get_loc("library_size")] = np.asarray(counts.sum(axis=1)).ravel()
        done += counts.shape[0]
        yield counts


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


def judge_proportions(
    checkpoint: dict[str, Any], reference: Reference, estimate: Estimate, train: ad.AnnData, test: ad.AnnData, data: Path, fig: Path
) -> None:
    """The deconvolution on the mixtures of test cells, beside baselines: what its proportions can be trusted for."""
    tpm, true = read_test_mixtures(data, test.uns["split_id"], checkpoint["gene_length_bp"] is not None)
    frequencies = train.obs["cell_type"].value_counts(normalize=True)[true.columns].to_numpy()
    constant = pd.DataFrame(np.tile(frequencies, (len(true), 1)), true.index, true.columns)
    estimates = {mode: read_proportions(checkpoint, reference, tpm, mode, n_members=0).proportions for mode in ("overall", "high-resolution", "none", "network")}
    lengths = checkpoint["gene_length_bp"]
    markers = nnls_on_markers(tpm, reference.per_length(None if lengths is None else pd.Series(lengths)))
    others = {"NNLS on markers": markers, "constant: train frequencies": constant}
    rows = []
    for kind in ("own", "dirichlet"):
        of_kind = true.index.str.startswith(kind)
        for name, table in (estimates | others).items():
            pair = true[of_kind].to_numpy(), table[of_kind].to_numpy()
            rows.append([f"{kind} ({of_kind.sum()})", name, metrics.mae(*pair), metrics.ccc(*pair), metrics.pearson(*pair)])
    table = pd.DataFrame(rows, columns=["mixtures of test cells", "deconvolution", "MAE", "CCC", "r"])
    print(table.to_string(index=False, float_format="{:.4f}".format))
    own_truth = None
    if BULK_FILE is None:
        own_truth = test.obs["cell_type"].value_counts(normalize=True)[true.columns].to_frame("test_cells").T
        errors = metrics.mae(own_truth, estimate.proportions), metrics.mae(own_truth, frequencies)
        print("all test cells as one bulk: MAE {:.4f}; the train frequencies score {:.4f}, so this one mixture says little".format(*errors))
    plots.proportions(true, estimates[DECONVOLUTION], constant, own_truth, estimate.proportions, estimate.spread, fig / "proportions.png")
    chosen = reference.of_genes(signature_genes(reference))
    plots.signature(pd.DataFrame(chosen.mean, chosen.cell_types, chosen.gene_names), estimate.signature, fig / "signature.png")


def compare(model: GMVAE, train: ad.AnnData, test: ad.AnnData, generated: ad.AnnData, fig: Path) -> None:
    """Likelihood of the test cells, and the figures that hold generated cells against them."""
    rng = np.random.default_rng(SEED)
    drawn_generated, drawn_test, drawn_train = (
        take(cells, np.sort(rng.permutation(cells.n_obs)[:MAX_CELLS_DRAWN])) for cells in (generated, test, train)
    )
    ours, baseline = (part.mean() for part in likelihoods(model, train, drawn_test))
    print(f"log-likelihood of the test cells, nats per cell: GMVAE {ours:.1f}; one negative binomial per gene and type {baseline:.1f}")

    both = ad.concat({"original": drawn_test, "generated": drawn_generated}, label="source", index_unique="-")
    both.obs["cell_type"] = pd.Categorical(both.obs["cell_type"], categories=test.obs["cell_type"].cat.categories)
    is_generated = (both.obs["source"] == "generated").to_numpy()
    umap = embed(principal_components(both, N_TOP_GENES, N_PCS), N_NEIGHBORS, SEED).obsm["X_umap"]
    plots.umap_original_vs_generated(umap, is_generated, fig / "umap_original_vs_generated.png")
    plots.umap_by_cell_type(umap, is_generated, both.obs["cell_type"], fig / "umap_by_cell_type.png")

    genes = metrics.variable_genes(drawn_train, N_CORRELATION_GENES)
    correlations = [metrics.gene_correlation(part, genes) for part in (drawn_test, drawn_generated, drawn_train)]
    plots.gene_correlation(*correlations, fig / "gene_correlation.png")


def judge_cells(model: GMVAE, train: ad.AnnData, test: ad.AnnData, fig: Path) -> None:
    """Test cells held against new cells of the same types and numbers, and against train cells: what a generator could reach at best."""
    rng = np.random.default_rng([SEED, 5])
    real = take(test, np.sort(rng.permutation(test.n_obs)[:MAX_CELLS_JUDGED]))
    floor_rows = metrics.draw_like(train, real.obs["cell_type"], rng)
    other_rows = np.sort(rng.permutation(np.setdiff1d(np.arange(train.n_obs), floor_rows))[: real.n_obs])
    floor, others = take(train, floor_rows), take(train, other_rows)
    counts = sp.vstack(list(model.sample(real.obs["cell_type"].cat.codes.to_numpy(), SEED + 1)), format="csr")
    made = ad.AnnData(counts, obs=real.obs[["cell_type"]].copy(), var=real.var[[]].copy())
    genes = metrics.variable_genes(take(train, np.sort(rng.permutation(train.n_obs)[:MAX_CELLS_DRAWN])), metrics.N_CORRELATED_GENES)
    table = metrics.fidelity_table(real, made, floor, others, genes, SEED)
    with replacing(fig / "metrics.csv") as temporary:
        table.to_csv(temporary, index=False, float_format="%.5f")
    pooled = table[table["cells"] == "all"].drop(columns="cells").set_index("figure")
    print(f"{real.n_obs:,} test cells against as many generated ones, and against real train cells of the same types:")
    print(pooled.rename(columns={"real": "real train cells"}).to_string(float_format="{:.3f}".format))
    plots.fidelity(table, real, made, floor, fig / "fidelity.png")


def likelihoods(model: GMVAE, train: ad.AnnData, test: ad.AnnData) -> tuple[np.ndarray, np.ndarray]:
    """log p(x|y,l) of each test cell under the model and under per-type negative binomials fitted to the train cells."""
    device = model.log_theta.device
    train_cells = CellDataset(train.X, train.obs["cell_type"].cat.codes, device, in_memory=False)
    test_cells = CellDataset(test.X, test.obs["cell_type"].cat.codes, device)
    return model.log_likelihood(test_cells, n_samples=20, seed=SEED), nb_per_type_log_likelihood(train_cells, test_cells)


if __name__ == "__main__":
    options.run(globals())
