"""Stage 2: mix single cells into bulk samples of known composition: few of test cells to test on, many of train cells to train on.

reads   data/train.h5ad, data/test.h5ad
writes  data/pseudobulk_test_counts.csv, _tpm.csv (samples x genes), _proportions.csv (samples x cell types);
        data/pseudobulk_train.h5ad: X counts, obsm["proportions"] (columns: uns["cell_types"]), obs["role"]
run     python _2_make_pseudobulk.py
time    15,000 mixtures of 1,200 cells x 16,000 genes: half a minute, 1 GB on disk; 700 genes: seconds
"""

from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp
from tqdm import tqdm

from lib import options
from lib.bulk import pseudobulk
from lib.data.counts import hold_out, n_entries, read_split
from lib.files import folder, replacing, report

# Mixtures of train cells, to train the deconvolution
N_TRAIN_SAMPLES = 15_000  # original code
CELLS_PER_SAMPLE = 1_200  # original code; drawn with replacement
MIN_DISTINCT_CELLS: int | None = (
    3  # a type's cells in a mixture come from a random handful, about so many or more; none: from all (original)
)
VALIDATION_FRACTION = (
    0.15  # of the mixtures, and of the train cells, which make these mixtures alone: they judge new cells (ours)
)

# Mixtures of test cells, to judge it
N_TEST_OWN = (
    5  # at the test set's own composition: a third to 0.4 of its cells each, drawn independently (original: nested)
)
N_TEST_DIRICHLET = 45  # at compositions drawn at random, with rare and absent types (ours)

# How compositions are drawn (ours): shares of the samples, the rest uniform on the simplex
SPARSE_SHARE = 0.25  # a random half of the types is absent
RARE_SHARE = 0.25  # a random half of the types is rare
NEAR_SHARE = 0.25  # near the train cells' own composition (mixtures of train cells only)

# TPM
USE_GENE_LENGTHS = (
    False  # divide by gene length, as the original does; right for full-length counts, not for UMI counts
)

# Other
MEMORY_GB = 0.5  # that the train cells may take; a larger set is read from disk several times
SEED = 123  # of everything random in this stage
DATA_DIR = "data"  # folder


def main() -> None:
    if min(N_TRAIN_SAMPLES, N_TEST_OWN, N_TEST_DIRICHLET) < 1 or not 0 < VALIDATION_FRACTION < 1:
        raise ValueError(
            f"N_TRAIN_SAMPLES = {N_TRAIN_SAMPLES}, N_TEST_OWN = {N_TEST_OWN}, N_TEST_DIRICHLET = {N_TEST_DIRICHLET}, "
            f"VALIDATION_FRACTION = {VALIDATION_FRACTION}; expected at least one of each, and a fraction between 0 and 1"
        )
    data = folder(DATA_DIR)
    train, test = read_split(data)
    gene_length_bp = gene_lengths(train) if USE_GENE_LENGTHS else None
    written = write_test_tables(test, gene_length_bp, data)
    written.append(write_train_samples(train, gene_length_bp, data / "pseudobulk_train.h5ad"))
    report("stage 2", written, "python _3_train_gmvae.py")


def gene_lengths(adata: ad.AnnData) -> pd.Series:
    """Length of every gene in base pairs, missing where the table lacks the gene."""
    if "gene_length_bp" not in adata.var:
        raise ValueError(
            "USE_GENE_LENGTHS is on, but the data came without gene lengths; give stage 0 a table (GENE_LENGTHS) "
            "and run stages 0 and 1 again"
        )
    lengths = adata.var["gene_length_bp"]
    print(f"TPM over the {lengths.notna().sum():,} of {len(lengths):,} genes whose length is known")
    return lengths


def write_test_tables(test: ad.AnnData, gene_length_bp: pd.Series | None, data: Path) -> list[Path]:
    """Counts, TPM and true proportions of the mixtures of test cells, as csv."""
    mixing = test_mixing_matrix(test.obs["cell_type"].cat)
    names = [f"own_{i + 1}" for i in range(N_TEST_OWN)] + [f"dirichlet_{i + 1}" for i in range(N_TEST_DIRICHLET)]
    index = pd.Index(names, name=pseudobulk.sample_header(test.uns["split_id"], gene_length_bp is not None))
    counts = pd.DataFrame(pseudobulk.mix(mixing, test.X).astype(np.int64), index=index, columns=test.var_names)
    has_length = slice(None) if gene_length_bp is None else gene_length_bp.notna().to_numpy()
    lengths = None if gene_length_bp is None else gene_length_bp[has_length].to_numpy()
    tpm = counts.loc[:, has_length]
    tpm = pd.DataFrame(pseudobulk.tpm(tpm.to_numpy(), lengths), index=index, columns=tpm.columns)
    tables = {
        "counts": counts,
        "tpm": tpm,
        "proportions": true_proportions(mixing, test.obs["cell_type"]).set_axis(index),
    }
    paths = []
    for name, table in tables.items():
        paths.append(data / f"pseudobulk_test_{name}.csv")
        with replacing(paths[-1]) as temporary:
            table.to_csv(temporary, float_format="%.6g" if name == "tpm" else None)
    present = tables["proportions"] > 0
    absent = (~present).to_numpy().mean()
    print(
        f"mixtures of test cells: {N_TEST_OWN} of their own composition, {N_TEST_DIRICHLET} of random ones; {absent:.0%} of the types absent"
    )
    return paths


def test_mixing_matrix(cell_type) -> sp.csr_matrix:
    """Mixtures x test cells."""
    rng = np.random.default_rng([SEED, 2])
    codes = cell_type.codes.to_numpy()
    own = np.zeros((N_TEST_OWN, len(codes)), np.float32)
    for row in own:
        n_cells = rng.integers(len(codes) // 3, int(0.4 * len(codes)) + 1)
        row[rng.choice(len(codes), n_cells, replace=False)] = 1
    n_types = len(cell_type.categories)
    composition = np.bincount(codes, minlength=n_types) / len(codes)
    present = composition > 0
    proportions = np.zeros((N_TEST_DIRICHLET, n_types))
    proportions[:, present] = pseudobulk.sample_proportions(
        N_TEST_DIRICHLET, composition[present], shares(near=0.0), rng
    )
    drawn = pseudobulk.sample_cells(pseudobulk.largest_remainder(proportions, CELLS_PER_SAMPLE), codes, rng)
    return sp.vstack([sp.csr_matrix(own), drawn], format="csr")


def shares(near: float) -> dict[str, float]:
    drawn = {"sparse": SPARSE_SHARE, "rare": RARE_SHARE, "near": near}
    if min(drawn.values()) < 0 or sum(drawn.values()) > 1:
        raise ValueError(
            f"SPARSE_SHARE + RARE_SHARE + NEAR_SHARE is {sum(drawn.values())}; expected shares of at least 0 that sum to 1 at most"
        )
    return drawn


def true_proportions(mixing: sp.csr_matrix, cell_type: pd.Series) -> pd.DataFrame:
    """What part of each mixture's cells is of each type."""
    indicator = pd.get_dummies(cell_type).to_numpy(dtype=np.float64)
    cells_per_type = mixing @ indicator
    return pd.DataFrame(cells_per_type / cells_per_type.sum(axis=1, keepdims=True), columns=cell_type.cat.categories)


def write_train_samples(train: ad.AnnData, gene_length_bp: pd.Series | None, path: Path) -> Path:
    """Thousands of mixtures of train cells, written block by block."""
    rng = np.random.default_rng([SEED, 1])
    counts = train.X[:] if n_entries(train.X) * 8 <= MEMORY_GB * 1e9 else train.X
    cell_types = list(train.obs["cell_type"].cat.categories)
    codes = train.obs["cell_type"].cat.codes.to_numpy()
    fit_codes, validation_codes = part_cells(codes, rng)
    composition = np.bincount(codes[codes >= 0], minlength=len(cell_types)) / np.sum(codes >= 0)
    proportions = pseudobulk.sample_proportions(N_TRAIN_SAMPLES, composition, shares(NEAR_SHARE), rng)
    cells_per_type = pseudobulk.largest_remainder(proportions, CELLS_PER_SAMPLE)
    n_validation = round(VALIDATION_FRACTION * N_TRAIN_SAMPLES)
    n_fit = N_TRAIN_SAMPLES - n_validation
    names = pd.Index([f"sample_{i + 1}" for i in range(N_TRAIN_SAMPLES)])
    samples = ad.AnnData(
        obs=pd.DataFrame({"role": pd.Categorical(["fit"] * n_fit + ["validation"] * n_validation)}, index=names),
        var=pd.DataFrame(index=train.var_names),
        obsm={"proportions": cells_per_type / CELLS_PER_SAMPLE},
        uns={"cell_types": cell_types, "dataset": train.uns["dataset"], "split_id": train.uns["split_id"]},
    )
    if gene_length_bp is not None:
        samples.var["gene_length_bp"] = gene_length_bp
    with replacing(path) as temporary:
        samples.write_h5ad(temporary)
        with (
            h5py.File(temporary, "a") as file,
            tqdm(total=N_TRAIN_SAMPLES, desc="mixtures of train cells", unit="") as progress,
        ):
            file.pop("X", None)
            X = file.create_dataset("X", (N_TRAIN_SAMPLES, train.n_vars), np.float32)
            X.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
            written = 0
            parts = (
                (cells_per_type[:n_fit], fit_codes, MIN_DISTINCT_CELLS),
                (cells_per_type[n_fit:], validation_codes, None),
            )
            for part, (cells, pool, min_distinct) in enumerate(parts):
                for block in pseudobulk.simulate(cells, pool, counts, 2 * SEED + part, min_distinct):
                    X[written : written + len(block)] = block
                    written += len(block)
                    progress.update(len(block))
    return path


def part_cells(codes: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Type of each cell in the fit mixtures and in the validation mixtures; -1 for a cell of the other kind."""
    held_out = hold_out(codes, VALIDATION_FRACTION, rng)
    only_cell = ~np.isin(codes, codes[held_out])  # of its type: in both, so that the type can be learned and validated
    return np.where(held_out, -1, codes), np.where(held_out | only_cell, codes, -1)


if __name__ == "__main__":
    options.run(globals())
