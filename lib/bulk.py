"""Bulk tables as people have them: csv or tsv, genes in rows or columns."""

from pathlib import Path

import numpy as np
import pandas as pd

from lib.pseudobulk import tpm
from lib.tables import read_header, separator


def read_bulk(path: Path, known_genes: list[str]) -> pd.DataFrame:
    """Samples x genes. The genes' side is told by the names that it shares with the single cells; duplicates are summed.

    Raises
    ------
    ValueError
        If no gene is shared, or a value is not a non-negative number.
    """
    header = read_header(path)
    table = pd.read_csv(path, sep=separator(path), header=None, skiprows=1, index_col=0, dtype=str, keep_default_na=False)
    table.columns = header[len(header) - table.shape[1] :]  # not pandas' names: it renames what stands twice
    table.index, table.columns = table.index.astype(str).str.strip(), table.columns.astype(str).str.strip()
    known = set(known_genes)
    in_rows, in_columns = (sum(name in known for name in names) for names in (table.index, table.columns))
    if not in_rows and not in_columns:
        raise ValueError(
            f"{path} shares no gene with the single cells: its rows are called {', '.join(table.index[:3])}, its columns "
            f"{', '.join(table.columns[:3])}; expected gene names like {', '.join(known_genes[:3])}"
        )
    if in_rows > in_columns:
        table = table.T
    table = table.apply(pd.to_numeric, errors="coerce")
    not_numbers = table.isna().sum().sum()
    if not_numbers:
        sample, gene = (axis[i] for axis, i in zip((table.index, table.columns), np.argwhere(table.isna().to_numpy())[0]))
        raise ValueError(
            f"{path} has {not_numbers:,} values that are missing or not numbers (the first: {gene} in {sample}); "
            "expected a table of numbers with one column or row of names"
        )
    if (table.to_numpy() < 0).any():
        raise ValueError(f"{path} has negative values; expected TPM or counts, before any logarithm or scaling")
    if table.to_numpy().max() < 25:
        raise ValueError(
            f"the largest value of {path} is {table.to_numpy().max():.3g}: it looks log-transformed; "
            "expected TPM or counts, before any logarithm"
        )
    if table.index.has_duplicates:
        raise ValueError(f"{path} has two samples called {table.index[table.index.duplicated()][0]}; expected names of their own")
    if table.columns.has_duplicates:
        print(f"{path.name}: {table.columns.duplicated().sum():,} genes that stand more than once were summed")
        table = table.T.groupby(level=0, sort=False).sum().T
    shared = len(known.intersection(table.columns))
    print(f"{path.name}: {len(table):,} bulk samples, {table.shape[1]:,} genes, {shared:,} of them in the single cells ({len(known):,})")
    return table


def to_tpm(bulk: pd.DataFrame, units: str, gene_length_bp: pd.Series | None) -> pd.DataFrame:
    """Samples x genes in TPM.

    Parameters
    ----------
    units
        "tpm": scaled to a million; "counts": divided by gene length first, if the network was trained so.
    gene_length_bp
        By gene name; None for networks trained without lengths. Genes without a length are left out.

    Raises
    ------
    ValueError
        For a sample without expression.
    """
    if units == "tpm":
        totals = bulk.sum(axis=1)
        if (totals > 1.5e6).any():
            print(f"WARNING: the bulk's samples sum to up to {totals.max():,.0f}; TPM sum to 1,000,000: are these counts (BULK_UNITS)?")
    if units == "counts" and (bulk.to_numpy() % 1 != 0).any():
        print("WARNING: BULK_UNITS is counts, but the bulk holds fractions: are these TPM? (Expected counts of RSEM or salmon are fine.)")
    if units == "counts" and gene_length_bp is not None:
        bulk = bulk.loc[:, bulk.columns.isin(gene_length_bp.index)]
        return pd.DataFrame(tpm(bulk.to_numpy(), gene_length_bp[bulk.columns].to_numpy()), bulk.index, bulk.columns)
    return pd.DataFrame(tpm(bulk.to_numpy()), bulk.index, bulk.columns)
