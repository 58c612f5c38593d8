"""Tables that the user gives: a bulk (file format, gene names, units, replicates), numbers of cells, and proportions."""

import re
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse as sp

from lib.bulk.pseudobulk import tpm
from lib.data.counts import read_h5ad
from lib.data.readers import check_foreign
from lib.data.tables import read_rows, read_table

ENSEMBL = re.compile(r"^(ENS[A-Z]*G\d{6,})(\.\d+)?$")  # an Ensembl gene ID and its version
SYMBOL_COLUMNS = ("gene name", "gene_name", "symbol", "gene_symbol", "hgnc_symbol", "external_gene_name", "gene")
LINEAR_UNITS = {"counts": "counts", "tpm": "tpm or counts per million", "fpkm": "fpkm or another linear scale"}
LOG_BASES = {"log2": 2.0, "ln": np.e}  # units of log(value + 1)
LOWEST_LOG, LARGEST_LOG = -1, 25  # of log(value + 1): 2^25 is more than a million; small offsets make values below 0
LARGEST_INTENSITY = 2**17  # of a microarray
MOST_ZEROS = 0.8  # share in the median bulk sample, which has 10-60 %; single cells of droplets have 85-98 %
LAYOUT = "one row per sample and one column per type, or one row per type and one column"  # of what to generate


def read_bulk(
    path: Path, known_genes: list[str], gene_ids: dict[str, str] | None = None, group: str | None = None
) -> pd.DataFrame:
    """Read a bulk, samples x genes, from a table or an .h5ad. Genes are on the side that shares more names with `known_genes`.

    gene_ids: names by Ensembl ID, for a bulk with IDs and cells with names. group: column of obs by which the rows of an .h5ad are
    summed. ValueError if no gene is shared, a value is not a finite number, or two samples have one name.
    """
    known, gene_ids = set(known_genes), gene_ids or {}
    if path.suffix == ".h5ad":
        table = _read_h5ad(path, group)
    elif group is not None:
        raise ValueError(f"BULK_GROUP is {group!r}, but {path} is no .h5ad file; give REPLICATES a table instead")
    else:
        table = _without_text_columns(_read_text(path), path, known, gene_ids)
    table.index, table.columns = (_gene_names(axis, known, gene_ids) for axis in table.axes)
    in_rows, in_columns = (axis.isin(known).sum() for axis in table.axes)
    if not in_rows and not in_columns:
        rows, columns, expected = (", ".join(names[:3]) for names in (*table.axes, known_genes))
        is_ensembl = any(axis.str.match(ENSEMBL).any() for axis in table.axes)
        remedy = "; give GENE_IDS a table of Ensembl IDs and gene names" * is_ensembl
        raise ValueError(
            f"{path} shares no gene with the single cells: its rows are called {rows}, its columns {columns}; "
            f"expected gene names like {expected}{remedy}"
        )
    table = _numbers(table)
    bulk = table.T if in_rows > in_columns else table
    missing = np.argwhere(~np.isfinite(bulk.to_numpy()))
    if len(missing):
        sample, gene = bulk.index[missing[0, 0]], bulk.columns[missing[0, 1]]
        raise ValueError(
            f"{path} has {len(missing):,} values that are missing or not numbers, the first: {gene} in {sample}"
        )
    _check_unique(bulk.index, path, "samples")
    shared = f"{len(known.intersection(bulk.columns)):,} of the {len(known):,} genes of the single cells"
    print(f"{path.name}: {len(bulk):,} bulk samples, {bulk.columns.nunique():,} genes, {shared}")
    return bulk


def _read_text(path: Path) -> pd.DataFrame:
    """A table of text with names, which may repeat, in its first column and first row."""
    header, *rows = read_rows(path) or [[]]
    if not rows or len(rows[0]) < 2:
        raise ValueError(f"{path} has {len(rows):,} rows of values; expected a header, and a name and numbers per row")
    table = pd.DataFrame([row[1:] for row in rows], [row[0] for row in rows], header[1 - len(rows[0]) :], dtype=object)
    table.index, table.columns = (axis.str.strip().str.strip('"') for axis in table.axes)
    return table


def _without_text_columns(table: pd.DataFrame, path: Path, known: set[str], gene_ids: dict[str, str]) -> pd.DataFrame:
    """Without columns of text, if genes are in rows, which are named by the text column (or the index) with most known genes."""
    is_text = _numbers(table.iloc[:200]).isna().all().to_numpy()
    names = [table.index, *(pd.Index(table.iloc[:, i].str.strip()) for i in np.flatnonzero(is_text))]
    n_known = [_gene_names(column, known, gene_ids).isin(known).sum() for column in names]
    if len(names) == 1 or is_text.all() or max(n_known) == 0:
        return table
    best, texts = int(np.argmax(n_known)), table.columns[is_text]
    if best > 0:
        print(f"{path.name}: genes are named by column {texts[best - 1]!r}")
    print(f"{path.name}: columns of text are left out ({', '.join(texts[:5])})")
    return table.loc[:, ~is_text].set_axis(names[best], axis=0)


def _numbers(table: pd.DataFrame) -> pd.DataFrame:
    """The values as float64, NaN where they are no numbers."""
    values = pd.to_numeric(table.to_numpy().ravel(), errors="coerce").astype(np.float64)
    return pd.DataFrame(values.reshape(table.shape), table.index, table.columns)


def _check_unique(names: pd.Index, path: Path, what: str) -> None:
    if names.has_duplicates:
        raise ValueError(f"{path} has two {what} called {names[names.duplicated()][0]}; expected names of their own")


def _gene_names(names: pd.Index, known: set[str], gene_ids: dict[str, str]) -> pd.Index:
    """Ensembl IDs without version, translated to gene names where `gene_ids` has them; known and other names unchanged."""
    without_version = names.str.replace(ENSEMBL, r"\1", regex=True)
    return pd.Index([name if name in known else gene_ids.get(i, i) for name, i in zip(names, without_version)])


def read_gene_ids(path: Path) -> dict[str, str]:
    """Gene names by Ensembl ID, from a table with one column of each, such as an export of BioMart; ValueError if it lacks one."""
    table = read_table(path)
    is_id = {column: table[column].str.match(ENSEMBL).mean() >= 0.5 for column in table}
    ids, names = ([column for column in table if is_id[column] == wanted] for wanted in (True, False))
    if not ids or not names:
        raise ValueError(
            f"{path} has columns {', '.join(table)}; expected Ensembl gene IDs and gene names, with a header"
        )
    symbols = next((column for column in names if column.lower() in SYMBOL_COLUMNS), names[0])
    named = table[table[symbols].str.strip() != ""]
    return dict(zip(named[ids[0]].str.replace(ENSEMBL, r"\1", regex=True), named[symbols].str.strip()))


def _read_h5ad(path: Path, group: str | None) -> pd.DataFrame:
    """Samples x genes of an .h5ad: its rows, or their sums by a column of obs, without the rows that have no value there.

    Rows that look like single cells are summed even without `group`, to one sample, "all_cells"; ValueError if they are no counts.
    """
    check_foreign(path, ("obs", "var"))
    obs, values, genes, are_cells = _read_h5ad_values(path)
    if group is not None and group not in obs:
        columns = ", ".join(obs.columns) or "none"
        raise ValueError(f"{path} has no column {group!r} in obs; it has {columns}: set BULK_GROUP to one of these")
    if are_cells and (values.data % 1 != 0).any():
        raise ValueError(f"{path} looks like single cells, but holds fractions; expected raw counts, to be summed")
    if group is None and not are_cells:
        return pd.DataFrame(values.toarray(), obs.index, genes)
    groups = (pd.Series("all_cells", obs.index) if group is None else obs[group]).astype("string")
    is_in = pd.get_dummies(groups, dtype=float)[groups.dropna().unique()]
    print(f"{path.name}: {groups.count():,} rows summed to {is_in.shape[1]:,} samples (BULK_GROUP: by a column of obs)")
    return pd.DataFrame((sp.csr_matrix(is_in.T) @ values).toarray(), is_in.columns.astype(object), genes)


def holds_cells(path: Path) -> bool:
    """Whether a bulk file is an .h5ad of single cells; their sum has the RNA content of their counts."""
    return path.suffix == ".h5ad" and _read_h5ad_values(path)[-1]


def _read_h5ad_values(path: Path) -> tuple[pd.DataFrame, sp.csr_matrix, pd.Index, bool]:
    """obs; layers["counts"], else raw.X, else X; its genes; whether rows look like single cells: the median row is mostly 0."""
    adata = read_h5ad(path)
    source = adata if adata.raw is None or "counts" in adata.layers else adata.raw
    values = sp.csr_matrix(adata.layers.get("counts", source.X))
    are_cells = bool(np.median(values.getnnz(axis=1)) < (1 - MOST_ZEROS) * values.shape[1])
    return adata.obs, values, source.var_names, are_cells


def recognised_units(bulk: pd.DataFrame) -> str:
    """Recognise the units: "counts", "tpm" (or counts per million), "fpkm" (another linear scale), "log2" or "ln" of one of them + 1.

    The base of a logarithm is the one whose undoing gives counts or a sum of 1,000,000; ValueError if it is neither or both.
    """
    values = bulk.to_numpy()
    if values.max() >= LARGEST_LOG or values.min() < LOWEST_LOG or (values % 1 == 0).all():
        return _linear_units(values)
    linear = {units: np.maximum(base**values - 1, 0) for units, base in LOG_BASES.items()}
    fitting = [units for units in LOG_BASES if _linear_units(linear[units]) != "fpkm"]
    if len(fitting) == 1:
        return fitting[0]
    if _is_array_like(linear["log2"]) and linear["ln"].max() > LARGEST_INTENSITY:
        return "log2"
    totals = ", ".join(f"{np.median(linear[units].sum(axis=1)):,.0f} if {units} is undone" for units in LOG_BASES)
    raise ValueError(
        "the bulk looks log-transformed, but the base cannot be recognised: samples sum to "
        f"{totals}, expected 1,000,000, or whole numbers; set BULK_UNITS to log2 or ln"
    )


def _linear_units(values: np.ndarray) -> str:
    """The unit of values that are no logarithms; where a logarithm was undone, only counts below 1,000 are nearly whole numbers."""
    small = values[values < 1000]
    if np.allclose(small, np.rint(small), rtol=1e-4, atol=1e-4) and (small.any() or (values % 1 == 0).all()):
        return "counts"
    return "tpm" if np.allclose(values.sum(axis=1), 1e6, rtol=0.05) else "fpkm"


def _is_array_like(values: np.ndarray) -> bool:
    """Intensities of a microarray: thousands of genes, none of them 0 anywhere, fractions, no value beyond the scanner's range."""
    in_range = values.min() > 0 and values.max() < LARGEST_INTENSITY
    return bool(in_range and values.shape[1] > 2000 and _linear_units(values) != "counts")


def to_tpm(
    bulk: pd.DataFrame, units: str, gene_length_bp: pd.Series | None, replicates: Path | None = None
) -> pd.DataFrame:
    """Convert a bulk to TPM, samples x genes: logarithms undone, duplicate genes summed, replicates pooled. Each step is printed.

    units: one of `LINEAR_UNITS` or `LOG_BASES`, or "auto": recognised. gene_length_bp: by gene name, by which counts are divided, genes
    without a length left out; None: of networks trained without lengths. replicates: table of `_pooled`. ValueError for a sample
    without expression, and for values that are impossible in the units.
    """
    if units == "auto":
        units = recognised_units(bulk)
        print(f"units of the bulk: recognised as {LINEAR_UNITS.get(units, units)} (set BULK_UNITS if this is wrong)")
    bulk, units = _linear(bulk, units)
    if bulk.columns.has_duplicates:
        print(f"{bulk.columns.duplicated().sum():,} duplicate genes were summed")
        bulk = bulk.T.groupby(level=0, sort=False).sum().T
    if _is_array_like(bulk.to_numpy()):
        print("WARNING: no gene is 0 in any sample, as in microarrays: their background draws proportions together")
    if units == "counts" and _linear_units(bulk.to_numpy()) != "counts":
        print("WARNING: BULK_UNITS is counts, but the bulk holds fractions: are these TPM? (Counts of RSEM are fine.)")
    if replicates is not None:
        bulk = _pooled(bulk, replicates)
    if units == "tpm" and (largest := bulk.sum(axis=1).max()) > 1.5e6:
        print(f"WARNING: a sample sums to {largest:,.0f}, TPM to 1,000,000: are these counts (BULK_UNITS)?")
    if units != "counts" or gene_length_bp is None:
        return pd.DataFrame(tpm(bulk.to_numpy()), bulk.index, bulk.columns)
    bulk = bulk.loc[:, bulk.columns.isin(gene_length_bp.index)]
    return pd.DataFrame(tpm(bulk.to_numpy(), gene_length_bp[bulk.columns].to_numpy()), bulk.index, bulk.columns)


def _linear(bulk: pd.DataFrame, units: str) -> tuple[pd.DataFrame, str]:
    """The bulk with a logarithm undone, and its linear units; ValueError for values that are impossible in the units."""
    lowest, largest, is_log = bulk.min(axis=None), bulk.max(axis=None), units in LOG_BASES
    if lowest < (LOWEST_LOG if is_log else 0) or (is_log and largest > LARGEST_LOG):
        raise ValueError(
            f"the bulk has values from {lowest:.3g} to {largest:.3g}, impossible in {units}; expected TPM, FPKM, counts or log2 or ln of "
            f"(value + 1) up to {LARGEST_LOG}, neither standardised nor batch-corrected"
        )
    if is_log:
        print(f"{units}(value + 1) undone")
        bulk = (LOG_BASES[units] ** bulk - 1).clip(lower=0)
        return bulk, _linear_units(bulk.to_numpy())
    if largest < LARGEST_LOG and (bulk % 1 != 0).any(axis=None):
        raise ValueError(f"the bulk looks log-transformed; expected {units}: set BULK_UNITS to log2, ln or auto")
    return bulk, units


def _pooled(bulk: pd.DataFrame, path: Path) -> pd.DataFrame:
    """Average the samples of each group of a table with the columns sample and group; with counts, deeper replicates have more weight.

    Samples that are not in the table are not pooled. ValueError if it names no sample, or puts one into two groups.
    """
    table = read_table(path)
    if table.shape[1] < 2 or not table.iloc[:, 0].isin(bulk.index).any():
        raise ValueError(f"{path} names no sample of the bulk, such as {bulk.index[0]}; expected columns sample, group")
    group = table.drop_duplicates().set_index(table.columns[0]).iloc[:, 0]
    _check_unique(group.index, path, "groups for the sample")
    pooled = bulk.groupby([group.get(sample, sample) for sample in bulk.index], sort=False).mean()
    print(f"{len(bulk):,} bulk samples pooled to {len(pooled):,} groups of replicates")
    return pooled


def read_cell_numbers(path: Path, types: list[str]) -> pd.DataFrame:
    """Numbers of cells to generate, samples x cell types; ValueError for other types than `types`, and for other numbers."""
    table = _read_numbers_of_types(path, types)
    if not ((table >= 0) & (table % 1 == 0)).all(axis=None) or table.to_numpy().sum() == 0:
        raise ValueError(f"{path} must hold numbers of cells: whole, not negative, not all zero; expected {LAYOUT}")
    return table.astype(np.int64)


def read_proportions(path: Path, types: list[str]) -> pd.DataFrame:
    """Shares of cells, samples x cell types, rows scaled to sum to 1; ValueError for other types, other numbers, and shares of RNA."""
    table = _read_numbers_of_types(path, types)
    if "shares of RNA" in str(table.index.name):  # as `deconvolution.write` heads them
        raise ValueError(
            f"{path} holds shares of RNA; expected shares of cells: give predicted_proportions.csv beside it"
        )
    if not (table >= 0).all(axis=None) or not np.allclose(table.sum(axis=1), 1, atol=0.01):
        raise ValueError(f"{path} must hold proportions, not negative, summing to 1 in each sample; expected {LAYOUT}")
    return table.div(table.sum(axis=1), axis=0)


def _read_numbers_of_types(path: Path, types: list[str]) -> pd.DataFrame:
    """A table in this layout: samples x types, NaN where it has no number, 0 for a type that it lacks."""
    table = read_table(path)
    if table.empty:
        raise ValueError(f"{path} is empty; expected {LAYOUT}")
    table = table.set_index(table.columns[0])
    table.index = table.index.str.strip()
    _check_unique(table.index, path, "rows")
    table = _numbers(table)
    if table.shape[1] == 1 and table.index.isin(types).any():
        table = table.T.set_axis(["cells"])
    unknown = ", ".join(table.columns.difference(types, sort=False))
    if unknown:
        raise ValueError(f"{path} has types that the model does not know: {unknown}; it knows {', '.join(types)}")
    return table.reindex(columns=types, fill_value=0.0)
