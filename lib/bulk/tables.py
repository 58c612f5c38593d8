"""Read bulk tables: csv, tsv, xlsx or h5ad, genes in rows or columns, symbols or Ensembl IDs, counts, TPM, CPM, FPKM or log2."""

import re
from pathlib import Path

import numpy as np
import pandas as pd

from lib.bulk.anndata_bulk import read_h5ad_bulk
from lib.bulk.pseudobulk import tpm
from lib.data.tables import read_rows, read_table

ENSEMBL = re.compile(r"^(ENS[A-Z]*G\d{6,})(\.\d+)?$")  # an Ensembl gene ID and its version
SYMBOL_COLUMNS = ("gene name", "gene_name", "symbol", "gene_symbol", "hgnc_symbol", "external_gene_name", "gene")
LARGEST_LOG2 = 25  # of log2(TPM + 1): 2^25 is more than a million
UNIT_NAMES = {
    "counts": "counts",
    "log2": "log2",
    "tpm": "tpm or counts per million",
    "fpkm": "fpkm or another linear scale",
}
MIN_SHARED = 0.1  # of the single cells' genes; a bulk that has fewer gets a warning
LARGEST_INTENSITY = 2**17  # of a microarray


def read_bulk(
    path: Path, known_genes: list[str], gene_ids: dict[str, str] | None = None, group: str | None = None
) -> pd.DataFrame:
    """Read a bulk table, samples x genes. Genes are on the side that shares more names with the single cells.

    Parameters
    ----------
    known_genes
        Gene names of the single cells.
    gene_ids
        Gene names by Ensembl ID without version (`read_gene_ids`), for a bulk with IDs and cells with names.
    group
        Column of obs by which the rows of an .h5ad are summed (`anndata_bulk.read_h5ad_bulk`).

    Raises
    ------
    ValueError
        If no gene is shared, or a value is not a finite number of at least 0 (log2 values may be slightly below).
    """
    known = set(known_genes)
    if path.suffix == ".h5ad":
        table = read_h5ad_bulk(path, group)
    elif group is not None:
        raise ValueError(
            f"BULK_GROUP is {group!r}, a column of obs, but {path} is no .h5ad file; give REPLICATES a table of samples and groups instead"
        )
    else:
        table = name_rows(read_strings(path), path, known, gene_ids or {})
    table.index, table.columns = (gene_names(axis, known, gene_ids or {}) for axis in (table.index, table.columns))
    in_rows, in_columns = (sum(name in known for name in names) for names in (table.index, table.columns))
    if not in_rows and not in_columns:
        shown = f"its rows are called {', '.join(table.index[:3])}, its columns {', '.join(table.columns[:3])}"
        is_ensembl = any(ENSEMBL.match(name) for name in (*table.index[:50], *table.columns[:50]))
        remedy = "; give GENE_IDS a table of Ensembl IDs and gene names" if is_ensembl else ""
        raise ValueError(
            f"{path} shares no gene with the single cells: {shown}; expected gene names like {', '.join(known_genes[:3])}{remedy}"
        )
    if in_rows > in_columns:
        table = table.T
    table = table.apply(pd.to_numeric, errors="coerce").astype(np.float64)
    not_numbers = (~np.isfinite(table.to_numpy())).sum()
    if not_numbers:
        sample, gene = (
            axis[i] for axis, i in zip((table.index, table.columns), np.argwhere(~np.isfinite(table.to_numpy()))[0])
        )
        raise ValueError(
            f"{path} has {not_numbers:,} values that are missing or not numbers (the first: {gene} in {sample}); "
            "expected a table of numbers with one column or row of names"
        )
    if table.index.has_duplicates:
        raise ValueError(
            f"{path} has two samples called {table.index[table.index.duplicated()][0]}; expected names of their own"
        )
    shared = len(known.intersection(table.columns))
    print(
        f"{path.name}: {len(table):,} bulk samples, {table.columns.nunique():,} genes, "
        f"{shared:,} of them in the single cells ({len(known):,})"
    )
    if shared < MIN_SHARED * len(known):
        print(
            f"WARNING: only {shared / len(known):.1%} of the single cells' genes are in the bulk "
            f"(bulk: {', '.join(table.columns[:3])}; cells: {', '.join(known_genes[:3])}); "
            "for other gene names give GENE_IDS, for a panel or an array of few genes lower MIN_GENE_COVERAGE of stage 4"
        )
    return table


def read_strings(path: Path) -> pd.DataFrame:
    """Read a table as text: first column as index, first row as columns, names stripped of blanks and quotes."""
    header, *rows = read_rows(path) or [[]]
    if not rows or len(rows[0]) < 2:
        raise ValueError(
            f"{path} has {len(rows):,} rows and {len(header)} columns; expected a header, and names and numbers in each row"
        )
    n_values = len(rows[0]) - 1
    table = pd.DataFrame(
        [row[1:] for row in rows],
        index=[row[0] for row in rows],
        columns=header[len(header) - n_values :],
        dtype=object,
    )
    table.index, table.columns = (
        pd.Index(axis.astype(str).str.strip().str.strip('"')) for axis in (table.index, table.columns)
    )
    return table


def name_rows(table: pd.DataFrame, path: Path, known: set[str], gene_ids: dict[str, str]) -> pd.DataFrame:
    """Remove columns of text such as descriptions; one that names more known genes than the first column becomes the index."""
    first_rows = table.iloc[:200]
    is_text = np.array(
        [pd.to_numeric(first_rows.iloc[:, i], errors="coerce").isna().all() for i in range(table.shape[1])], dtype=bool
    )
    if not is_text.any() or is_text.all():
        return table

    def n_known(names) -> int:
        return sum(name in known for name in gene_names(pd.Index(names), known, gene_ids))

    best = max(np.flatnonzero(is_text), key=lambda i: n_known(table.iloc[:, i]))
    names = table.iloc[:, best].str.strip()
    rest = table.loc[:, ~is_text]
    dropped = ", ".join(table.columns[is_text][:5])
    if n_known(names) > n_known(table.index):
        print(
            f"{path.name}: genes are named by column {table.columns[best]!r}; columns of text are left out ({dropped})"
        )
        return rest.set_axis(names, axis=0)
    if n_known(table.index):
        print(f"{path.name}: columns of text are left out ({dropped})")
        return rest
    return table


def gene_names(names: pd.Index, known: set[str], gene_ids: dict[str, str]) -> pd.Index:
    """Ensembl IDs without version, translated to gene names where `gene_ids` has them; other names unchanged."""

    def name(given: str) -> str:
        match = ENSEMBL.match(given)
        if given in known or not match:
            return given
        return gene_ids.get(match[1], match[1])

    return pd.Index([name(given) for given in names])


def read_gene_ids(path: Path) -> dict[str, str]:
    """Read gene names by Ensembl ID from a table with one column of each, such as an export of Ensembl's BioMart.

    Raises
    ------
    ValueError
        If the table lacks a column of Ensembl gene IDs or a column of names.
    """
    table = read_table(path)
    is_id = [table[c].str.match(ENSEMBL).mean() for c in table]
    others = [c for c in table if str(c).strip().lower() in SYMBOL_COLUMNS] or [
        c for c, share in zip(table, is_id) if share == 0
    ]
    if not len(table) or max(is_id, default=0) < 0.5 or not others:
        raise ValueError(
            f"{path} has the columns {', '.join(map(str, table))}; expected one of Ensembl gene IDs and one of gene names, with a header"
        )
    ids = table.iloc[:, int(np.argmax(is_id))].str.replace(ENSEMBL, r"\1", regex=True)
    named = table[others[0]].str.strip() != ""
    return dict(zip(ids[named], table[others[0]].str.strip()[named]))


def recognised_units(bulk: pd.DataFrame) -> str:
    """Guess the unit of the values: "log2", "counts", "tpm" (or counts per million) or "fpkm" (any other scale)."""
    values = bulk.to_numpy()
    if (values % 1 == 0).all():
        return "counts"
    if values.max() < LARGEST_LOG2:
        return "log2"
    totals = values.sum(axis=1)
    return "tpm" if (np.abs(totals / 1e6 - 1) < 0.05).all() else "fpkm"


def to_tpm(
    bulk: pd.DataFrame, units: str, gene_length_bp: pd.Series | None, replicates: Path | None = None
) -> pd.DataFrame:
    """Convert a bulk to TPM, samples x genes: duplicate genes summed, replicates pooled. Each step is printed.

    Parameters
    ----------
    units
        "tpm" or "fpkm": scaled to a million (which makes TPM of FPKM); "counts": divided by gene length first, if lengths are
        given; "log2": log2(value + 1) undone first; "auto": recognised.
    gene_length_bp
        By gene name; None for networks trained without lengths. Genes without a length are left out.
    replicates
        Table of samples and groups (`pooled_replicates`).

    Raises
    ------
    ValueError
        For a sample without expression, and for values that are impossible in the unit.
    """
    if units == "auto":
        units = recognised_units(bulk)
        print(f"units of the bulk: recognised as {UNIT_NAMES[units]} (set BULK_UNITS if this is wrong)")
    values = bulk.to_numpy(dtype=np.float64)
    if units == "log2":
        if values.min() < -1 or values.max() > 40:
            raise ValueError(
                f"the bulk's values go from {values.min():.3g} to {values.max():.3g}; "
                "expected log2(value + 1) between 0 and 25, not standardised"
            )
        bulk = pd.DataFrame(np.maximum(2**values - 1, 0), bulk.index, bulk.columns)
        units = recognised_units(bulk.round(6))
        print("log2(value + 1) undone")
    elif values.min() < 0:
        raise ValueError(
            "the bulk has negative values; expected TPM, FPKM, counts or log2(value + 1), neither standardised nor batch-corrected"
        )
    elif values.max() < LARGEST_LOG2 and (values % 1 != 0).any():
        raise ValueError(
            f"the largest value of the bulk is {values.max():.3g}: it looks log-transformed; "
            f"expected {units}: set BULK_UNITS to log2 or auto"
        )
    bulk = summed_duplicates(bulk)
    if is_array_like(bulk):
        print(
            "WARNING: every gene of the bulk is above 0 in every sample, as in microarrays: their background is not subtracted here, "
            "which draws proportions together; TPM or counts of RNA-seq are read better"
        )
    if units == "counts" and not is_whole(bulk.to_numpy()):
        print(
            "WARNING: BULK_UNITS is counts, but the bulk holds fractions: are these TPM? (Expected counts of RSEM or salmon are fine.)"
        )
    if replicates is not None:
        bulk = pooled_replicates(bulk, replicates)
    if units == "tpm" and (bulk.sum(axis=1) > 1.5e6).any():
        print(
            f"WARNING: the bulk's samples sum to up to {bulk.sum(axis=1).max():,.0f}; TPM sum to 1,000,000: are these counts (BULK_UNITS)?"
        )
    if units == "counts" and gene_length_bp is not None:
        bulk = bulk.loc[:, bulk.columns.isin(gene_length_bp.index)]
        return pd.DataFrame(tpm(bulk.to_numpy(), gene_length_bp[bulk.columns].to_numpy()), bulk.index, bulk.columns)
    return pd.DataFrame(tpm(bulk.to_numpy()), bulk.index, bulk.columns)


def is_whole(values: np.ndarray) -> bool:
    """Whether all values are whole numbers, up to the rounding of logarithms that were undone."""
    return bool(np.allclose(values, np.rint(values), rtol=1e-4, atol=1e-4))


def is_array_like(bulk: pd.DataFrame) -> bool:
    """Intensities of a microarray: thousands of genes, none of them 0 anywhere, fractions, no value beyond the scanner's range."""
    values = bulk.to_numpy()
    return values.shape[1] > 2000 and values.min() > 0 and values.max() < LARGEST_INTENSITY and not is_whole(values)


def summed_duplicates(bulk: pd.DataFrame) -> pd.DataFrame:
    """Sum duplicate genes (transcripts, or several IDs of one name), with a message. Right for every unit except logarithms."""
    if not bulk.columns.has_duplicates:
        return bulk
    print(f"{bulk.columns.duplicated().sum():,} duplicate genes were summed")
    return bulk.T.groupby(level=0, sort=False).sum().T


def pooled_replicates(bulk: pd.DataFrame, path: Path) -> pd.DataFrame:
    """Average the samples of each group, in the order of first appearance.

    Parameters
    ----------
    bulk
        Samples x genes, counts or any linear unit. With counts, deeper replicates have more weight.
    path
        csv or tsv with columns sample and group, one row per sample. Samples that are not in the table are not pooled.

    Raises
    ------
    ValueError
        If no sample of the bulk is in the table, or one is in two groups.
    """
    table = read_table(path)
    if table.shape[1] < 2 or not table.iloc[:, 0].isin(bulk.index).any():
        raise ValueError(
            f"{path} names no sample of the bulk (such as {bulk.index[0]}); expected a header, then one row per sample: sample, group"
        )
    group = table.drop_duplicates().set_index(table.columns[0]).iloc[:, 0]
    if group.index.has_duplicates:
        raise ValueError(
            f"{path} puts {group.index[group.index.duplicated()][0]} into two groups; expected one row per sample"
        )
    groups = pd.Index([group.get(sample, sample) for sample in bulk.index])
    pooled = bulk.groupby(groups, sort=False).mean()
    print(f"{len(bulk):,} bulk samples pooled to {len(pooled):,} groups of replicates")
    return pooled


def sample_totals(values: np.ndarray) -> np.ndarray:
    """Sum of each sample over the given genes, samples x 1.

    Raises
    ------
    ValueError
        For a sample without expression in these genes.
    """
    total = values.sum(axis=1, keepdims=True)
    if (total <= 0).any():
        raise ValueError(
            f"{np.sum(total <= 0)} of {len(values)} bulk samples have no expression in the {values.shape[1]:,} genes of the model; "
            "expected some"
        )
    return total
