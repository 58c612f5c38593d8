"""Read the user's tables of what to generate: numbers of cells (CELL_COUNTS) or proportions (PROPORTIONS_FILE) per type."""

from pathlib import Path

import numpy as np
import pandas as pd

from lib.data.tables import read_table


def read_cell_numbers(path: Path, types: list[str]) -> pd.DataFrame:
    """Samples x cell types, whole numbers; a type that the table lacks gets 0.

    The table has one row per sample and one column per type, or one row per type and one column of numbers.

    Raises
    ------
    ValueError
        For a type that is not in `types`, and for values that are not numbers of cells.
    """
    table = _numbers_by_name(path)
    if table.shape[1] == 1 and table.index.isin(types).any():  # one row per type
        table = table.T.set_axis(["cells"])
    unknown = [str(name) for name in table.columns if name not in types]
    if unknown:
        raise ValueError(
            f"{path} asks for cell types that the model does not know: {', '.join(unknown)}; it knows {', '.join(types)}"
        )
    table = table.reindex(columns=types, fill_value=0)
    if not ((table >= 0) & (table % 1 == 0)).all(axis=None) or table.to_numpy().sum() == 0:
        raise ValueError(
            f"{path} must hold numbers of cells: whole, not negative, not all zero; expected one row per sample and one column "
            "per type, or one row per type and one column"
        )
    return table.astype(np.int64)


def read_proportions(path: Path, types: list[str]) -> pd.DataFrame:
    """Samples x cell types, rows scaled to sum to 1; a type that the table lacks gets 0.

    Raises
    ------
    ValueError
        For a type that is not in `types`, for rows that are not proportions, and for shares of RNA.
    """
    table = _numbers_by_name(path)
    if "rna" in str(table.index.name).lower():
        raise ValueError(
            f"{path} holds shares of RNA (its first column is headed {table.index.name!r}); expected shares of cells: "
            "give predicted_proportions.csv, written beside predicted_rna_proportions.csv"
        )
    unknown = [str(name) for name in table.columns if name not in types]
    if unknown or table.empty or not (table >= 0).all(axis=None) or not np.allclose(table.sum(axis=1), 1, atol=0.01):
        raise ValueError(
            f"{path} must hold proportions: one row per sample, not negative, summing to 1, in columns named like the model's types"
            f"{f' (unknown: {chr(44).join(unknown)})' if unknown else ''}; the types: {', '.join(types)}"
        )
    values = table.reindex(columns=types, fill_value=0.0)
    return values.div(values.sum(axis=1), axis=0)


def _numbers_by_name(path: Path) -> pd.DataFrame:
    """A table of numbers, NaN where there is none, with row names in the first column.

    Raises
    ------
    ValueError
        If two rows have the same name.
    """
    table = read_table(path)
    table = table.set_index(table.columns[0]) if table.shape[1] else table
    table.index = table.index.str.strip() if len(table) else table.index
    if table.index.has_duplicates:
        raise ValueError(
            f"{path} has two rows called {table.index[table.index.duplicated()][0]!r}; expected names of their own"
        )
    return table.apply(pd.to_numeric, errors="coerce")
