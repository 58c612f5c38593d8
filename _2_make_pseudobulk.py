"""Stage 2: mix single cells into bulk samples of known proportions: test cells to evaluate the deconvolution, train cells to train it.

reads   data/train.h5ad, data/test.h5ad
writes  data/pseudobulk_test_counts.csv, _tpm.csv (samples x genes), _proportions.csv (samples x cell types);
        data/pseudobulk_train.h5ad: obsm["proportions"] (columns: uns["cell_types"]), obs["role"], and from which cells each mixture
        is made; with WRITE_TRAIN_COUNTS also X, the counts. Proportions are of cells
run     python _2_make_pseudobulk.py
time    seconds; with WRITE_TRAIN_COUNTS, 15,000 mixtures of 1,200 cells x 16,000 genes: a minute, 0.4 GB on disk

Stage 4 makes the mixtures of train cells and trains scTAPE on them; the default deconvolution, a regression on the train cells'
mean profiles, does not use them. Stage 5 evaluates the deconvolution on the mixtures of test cells.
"""

from pathlib import Path
from typing import Any, Literal

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

from lib import options
from lib.bulk import pseudobulk
from lib.bulk.regression import reference_profiles
from lib.bulk.rna_content import print_rna_per_cell, rna_per_cell
from lib.data.counts import hold_out, read_split, write_blocks, write_h5ad
from lib.options import Count, NotNegative, Part, Seed, Several, Share
from lib.run import folder, print_written, replacing

# Preset
PRESET: Literal["ours", "paper"] = "ours"  # paper: the settings of the paper, except constants that you set yourself

# Mixtures of train cells, to train scTAPE
N_TRAIN_SAMPLES: Several = 15_000  # original code
CELLS_PER_SAMPLE: Count = 1_200  # original code; sampled with replacement
MIN_DISTINCT_CELLS: Count | None = 3  # smallest random subset that a type's cells come from; none: all cells (original)
VALIDATION_FRACTION: Part = 0.15  # share of train cells held out; as many mixtures are made of them (ours; paper: 0)
WRITE_TRAIN_COUNTS = False  # also write the counts of these mixtures (0.4 GB); stage 4 then reads them

# Mixtures of test cells, to evaluate the deconvolution
N_TEST_OWN: Count = 5  # at the test set's own proportions: random 33-40 % of its cells each (original: nested subsets)
N_TEST_DIRICHLET: Count = 45  # at random proportions, with rare and absent types (ours)

# How the proportions are sampled (ours; paper: half sparse, half uniform): shares of the samples; the rest is uniform on the simplex
SPARSE_SHARE: Share = 0.25  # a random half of the types is absent
RARE_SHARE: Share = 0.25  # a random half of the types is rare
NEAR_SHARE: Share = 0.25  # close to the train cells' own proportions (mixtures of train cells only)

# mRNA and TPM
RNA_PER_CELL = "reference"  # of cells: their own counts; or auto, or a table (lib/bulk/README.md)
USE_GENE_LENGTHS = False  # divide by gene length (original); right for full-length counts, not for UMI counts

# Other
MEMORY_GB: NotNegative = 0.5  # that the train cells may take; a larger set is read from disk several times
SEED: Seed = 123  # of everything random in this stage
DATA_DIR = "data"  # folder


def main() -> None:
    if PRESET == "paper":
        options.apply_preset(globals(), paper_preset())
    shares = SPARSE_SHARE, RARE_SHARE, NEAR_SHARE
    if sum(shares) > 1:
        raise ValueError(f"SPARSE_SHARE, RARE_SHARE, NEAR_SHARE = {str(shares)[1:-1]}; expected a sum of at most 1")
    data = folder(DATA_DIR)
    train, test = read_split(data)
    gene_length_bp = gene_lengths(train) if USE_GENE_LENGTHS else None
    content, weight = mrna_contents(train)
    header = pseudobulk.sample_header(test.uns["split_id"], gene_length_bp is not None, content is not None)
    written = write_test_mixtures(test, weight, gene_length_bp, header, data)
    mixtures = describe_train_mixtures(train, content, weight, gene_length_bp)
    written.append(data / "pseudobulk_train.h5ad")
    if WRITE_TRAIN_COUNTS:
        blocks = pseudobulk.train_mixtures(mixtures, train, memory_gb=MEMORY_GB)
        write_blocks(mixtures, (sp.csr_matrix(counts) for _, counts in blocks), written[-1])
    else:
        write_h5ad(mixtures, written[-1])
    print_written("stage 2", written, f"python _3_train_gmvae.py{options.preset_option(PRESET)}")


def paper_preset() -> dict[str, tuple[Any, Any]]:
    """Constants that PRESET changes: default above, value in the paper (its code, and scTAPE's, where the text does not say)."""
    return {
        "MIN_DISTINCT_CELLS": (3, None), "VALIDATION_FRACTION": (0.15, 0.0), "USE_GENE_LENGTHS": (False, True),
        "SPARSE_SHARE": (0.25, 0.5), "RARE_SHARE": (0.25, 0.0), "NEAR_SHARE": (0.25, 0.0),
    }  # fmt: skip


def mrna_contents(train: ad.AnnData) -> tuple[np.ndarray | None, np.ndarray]:
    """mRNA per cell of each type (`rna_content.rna_per_cell`; None: its own counts), and the weight that gives its cells this mRNA."""
    cell_type = train.obs["cell_type"].cat
    cell_types = list(cell_type.categories)
    if RNA_PER_CELL == "reference":
        return None, np.ones(len(cell_types))
    reference = reference_profiles(train.X, cell_type.codes.to_numpy(), list(train.var_names), cell_types)
    content = rna_per_cell(RNA_PER_CELL, reference)
    print_rna_per_cell(content)
    rna = content["rna_per_cell"].to_numpy()
    weight = rna / reference.mean.sum(axis=1)
    return rna, weight / np.average(weight, weights=reference.n_cells)


def gene_lengths(adata: ad.AnnData) -> pd.Series:
    """Length in base pairs of every gene whose length is known."""
    if "gene_length_bp" not in adata.var:
        raise ValueError(
            "USE_GENE_LENGTHS is on, but the data have no gene lengths: give stage 0 GENE_LENGTHS, run 0, 1"
        )
    lengths = adata.var["gene_length_bp"].dropna()
    print(f"TPM over the {len(lengths):,} of {adata.n_vars:,} genes whose length is known")
    return lengths


def write_test_mixtures(
    test: ad.AnnData, weight: np.ndarray, gene_length_bp: pd.Series | None, header: str, data: Path
) -> list[Path]:
    """Counts, TPM (of genes whose length is known) and true proportions of the mixtures of test cells, as csv."""
    cell_type = test.obs["cell_type"]
    mixing = test_mixing_matrix(cell_type)
    weighted = pseudobulk.weighted(mixing, cell_type.cat.codes.to_numpy(), weight)
    names = [f"own_{i + 1}" for i in range(N_TEST_OWN)] + [f"dirichlet_{i + 1}" for i in range(N_TEST_DIRICHLET)]
    index = pd.Index(names, name=header)
    counts = pd.DataFrame(np.rint(pseudobulk.mix(weighted, test.X)).astype(np.int64), index, test.var_names)
    measured = counts if gene_length_bp is None else counts[gene_length_bp.index]
    tpm = pseudobulk.tpm(measured.to_numpy(), None if gene_length_bp is None else gene_length_bp.to_numpy())
    cells_per_type = mixing @ pd.get_dummies(cell_type).to_numpy(dtype=np.float64)
    proportions = cells_per_type / cells_per_type.sum(axis=1, keepdims=True)
    tables = {"counts": counts, "tpm": pd.DataFrame(tpm, index, measured.columns)}
    tables["proportions"] = pd.DataFrame(proportions, index, cell_type.cat.categories)
    for name, table in tables.items():
        with replacing(data / f"pseudobulk_test_{name}.csv") as temporary:
            table.to_csv(temporary, float_format="%.6g" if name == "tpm" else None)
    n_cells = f"{N_TEST_OWN} at the test set's proportions, {N_TEST_DIRICHLET} at random ones"
    print(f"mixtures of test cells: {n_cells}; {(proportions == 0).mean():.0%} of all proportions are 0")
    return [data / f"pseudobulk_test_{name}.csv" for name in tables]


def test_mixing_matrix(cell_type: pd.Series) -> sp.csr_matrix:
    """Mixtures x test cells: first those at the test set's own proportions, without replacement, then the random ones."""
    rng = np.random.default_rng([SEED, 2])
    codes, n_types = cell_type.cat.codes.to_numpy(), len(cell_type.cat.categories)
    own = np.zeros((N_TEST_OWN, len(codes)), np.float32)
    for row in own:
        n_cells = rng.integers(len(codes) // 3, int(0.4 * len(codes)) + 1)
        row[rng.choice(len(codes), n_cells, replace=False)] = 1
    composition = np.bincount(codes, minlength=n_types) / len(codes)
    shares = {"sparse": SPARSE_SHARE, "rare": RARE_SHARE, "near": 0.0}
    cells_per_type = pseudobulk.sample_cells_per_type(N_TEST_DIRICHLET, CELLS_PER_SAMPLE, composition, shares, rng)
    return sp.vstack([sp.csr_matrix(own), pseudobulk.sample_cells(cells_per_type, codes, rng)], format="csr")


def describe_train_mixtures(
    train: ad.AnnData, content: np.ndarray | None, weight: np.ndarray, gene_length_bp: pd.Series | None
) -> ad.AnnData:
    """Thousands of mixtures of train cells: all but their counts, and the recipe by which these are made."""
    rng = np.random.default_rng([SEED, 1])
    cell_types = list(train.obs["cell_type"].cat.categories)
    codes = train.obs["cell_type"].cat.codes.to_numpy()
    fit_codes, validation_codes = split_cells(codes, rng)
    composition = np.bincount(codes[codes >= 0], minlength=len(cell_types)) / np.sum(codes >= 0)
    shares = {"sparse": SPARSE_SHARE, "rare": RARE_SHARE, "near": NEAR_SHARE}
    cells_per_type = pseudobulk.sample_cells_per_type(N_TRAIN_SAMPLES, CELLS_PER_SAMPLE, composition, shares, rng)
    n_fit = N_TRAIN_SAMPLES - round(VALIDATION_FRACTION * N_TRAIN_SAMPLES)
    role = np.where(np.arange(N_TRAIN_SAMPLES) < n_fit, "fit", "validation")
    recipe = pseudobulk.Recipe(CELLS_PER_SAMPLE, fit_codes, validation_codes, 2 * SEED, MIN_DISTINCT_CELLS or 0, weight)
    mixtures = ad.AnnData(
        obs=pd.DataFrame({"role": pd.Categorical(role)}, index=[f"sample_{i + 1}" for i in range(N_TRAIN_SAMPLES)]),
        var=pd.DataFrame(index=train.var_names),
        obsm={"proportions": cells_per_type / CELLS_PER_SAMPLE},
        uns={"cell_types": cell_types, "dataset": train.uns["dataset"], "split_id": train.uns["split_id"], "recipe": recipe._asdict()},
    )  # fmt: skip
    if gene_length_bp is not None:
        mixtures.var["gene_length_bp"] = gene_length_bp
    if content is not None:
        mixtures.uns["rna_per_cell"] = content
    return mixtures


def split_cells(codes: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Type of each cell for the mixtures to train on, and for the held-out ones; -1: of the other part. A type's only cell is in both."""
    if VALIDATION_FRACTION == 0:
        return codes, np.full_like(codes, -1)
    is_held_out = hold_out(codes, VALIDATION_FRACTION, rng)
    only_cell = ~np.isin(codes, codes[is_held_out])
    return np.where(is_held_out, -1, codes), np.where(is_held_out | only_cell, codes, -1)


if __name__ == "__main__":
    options.run(globals())
