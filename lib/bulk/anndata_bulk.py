"""Bulk samples from an .h5ad file: rows are bulk samples, or single cells that are summed to pseudo-bulk samples."""

from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

from lib.data.hdf5 import check_foreign, read_h5ad

LARGEST_SHARE_OF_ZEROS = (
    0.8  # of the median bulk sample; single cells of droplets have 85-98 % zeros, bulk samples 10-60 %
)


def read_h5ad_bulk(path: Path, group: str | None = None) -> pd.DataFrame:
    """Samples x genes of an .h5ad: its rows, or the sums of its rows by a column of obs.

    The values are `layers["counts"]`, else `raw.X`, else `X`. Rows that look like single cells are summed even without `group`: to
    one sample, "all_cells".

    Parameters
    ----------
    group
        Column of obs; rows with the same value are summed, rows without a value are left out.

    Raises
    ------
    ValueError
        If obs has no such column, or if single cells hold values other than counts.
    """
    check_foreign(path, ("obs", "var"))
    adata = read_h5ad(path)
    if group is not None and group not in adata.obs:
        raise ValueError(
            f"{path} has no column {group!r} in obs; it has {', '.join(map(str, adata.obs.columns)) or 'none'}: "
            "set BULK_GROUP to one of these"
        )
    values, genes = values_of(adata)
    is_cells = is_of_cells(values)
    if is_cells and (values.data % 1 != 0).any():
        raise ValueError(
            f"{path} looks like single cells, but holds fractions (largest {values.max():.3g}); "
            "expected raw counts, to be summed to pseudo-bulk"
        )
    if group is None and not is_cells:
        return pd.DataFrame(values.toarray().astype(np.float64), adata.obs_names.astype(str), genes)
    groups = pd.Series("all_cells", adata.obs_names) if group is None else adata.obs[group]
    kept = groups.notna().to_numpy()
    codes, names = pd.factorize(groups[kept].astype(str))
    member = sp.csr_matrix((np.ones(len(codes)), (codes, np.arange(len(codes)))), shape=(len(names), len(codes)))
    what = "single cells" if is_cells else "rows"
    print(
        f"{path.name}: {kept.sum():,} {what} summed to {len(names):,} samples"
        + (" (BULK_GROUP sums them by a column of obs)" if group is None else "")
    )
    return pd.DataFrame((member @ values[kept]).toarray(), pd.Index(names), genes)


def values_of(adata: ad.AnnData) -> tuple[sp.csr_matrix, pd.Index]:
    if "counts" in adata.layers:
        return sp.csr_matrix(adata.layers["counts"]), adata.var_names
    if adata.raw is not None:
        return sp.csr_matrix(adata.raw.X), adata.raw.var_names
    return sp.csr_matrix(adata.X), adata.var_names


def is_of_cells(values: sp.csr_matrix) -> bool:
    """Whether rows look like single cells: most genes are zero in the median row."""
    return bool(np.median(values.getnnz(axis=1)) < (1 - LARGEST_SHARE_OF_ZEROS) * values.shape[1])


def holds_cells(path: Path) -> bool:
    """Whether a bulk file is an .h5ad of single cells; their sum has the RNA content of their counts."""
    return path.suffix == ".h5ad" and is_of_cells(values_of(read_h5ad(path))[0])
