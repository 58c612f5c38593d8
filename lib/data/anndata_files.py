"""Counts in .h5ad, .zarr and 10x .h5 files, as streams; HDF5 files are read in a process of their own, which may crash or loop."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp
import zarr

from lib.data.counts import check_values
from lib.data.hdf5 import check_sparse, check_structure, from_child
from lib.data.streams import CellStream, blocks_of_rows, entries_of_columns, sorted_by_cell
from lib.files import reading
from lib.records import Unusable

FIRST_CELLS = 2048  # that show whether a matrix holds counts


class Header(NamedTuple):
    """What is read before the counts."""

    obs: pd.DataFrame
    gene_names: pd.Index
    where: str  # name of the matrix in the file
    n_entries: int | None  # of a matrix by gene, which is read as `Entries`; None: it is read in blocks of cells


def open_anndata(path: Path, scratch: Path | None = None) -> CellStream:
    """Open the first of `layers["counts"]`, `raw.X` and `X` whose first cells hold counts, in an .h5ad file or a .zarr folder.

    Raises
    ------
    ValueError
        If none does; the message says what is wrong with each.
    """
    is_zarr = path.suffix.lower() == ".zarr"
    items = _items_of_zarr(path) if is_zarr else from_child(path, partial(_items_of_h5ad, path))
    header = next(items)
    if header.where != "X":
        print(f"counts are taken from {header.where}")
    shape = len(header.obs), len(header.gene_names)
    blocks = items if header.n_entries is None else sorted_by_cell(items, shape, header.n_entries, scratch)
    return CellStream(header.obs, header.gene_names, blocks, f"{header.where} of {path}")


def _items_of_zarr(path: Path) -> Iterator[Any]:
    with reading(path, "an AnnData in zarr format"):
        root = zarr.open_group(path, mode="r")
        missing = [name for name in ("obs", "var") if name not in root]
        if missing:
            raise Unusable(f"{path} lacks {' and '.join(missing)}: save it again with AnnData.write_zarr")
        yield from _items(root, path)


def _items_of_h5ad(path: Path) -> Iterator[Any]:
    check_structure(path, ("obs", "var"), indices=False)
    with reading(path, "an .h5ad file"), h5py.File(path) as file:
        if isinstance(file["obs"], h5py.Group):
            yield from _items(file, path)
            return
    check_structure(path)  # written by anndata before 0.7: read as a whole
    with reading(path, "an .h5ad file"):
        adata = ad.read_h5ad(path)
    matrices = {"layers['counts']": (adata.layers.get("counts"), adata.var_names), "X": (adata.X, adata.var_names)}
    if adata.raw is not None:
        matrices["raw.X"] = adata.raw.X, adata.raw.var_names
    yield from _items_of_matrices(adata.obs, matrices, path)


def _items(root: Any, path: Path) -> Iterator[Any]:
    """The header of an AnnData on disk, and its counts."""
    gene_names = ad.io.read_elem(root["var"]).index
    matrices = {"layers['counts']": (root.get("layers/counts"), gene_names), "X": (root.get("X"), gene_names)}
    if root.get("raw/X") is not None:
        matrices["raw.X"] = root["raw/X"], ad.io.read_elem(root["raw/var"]).index
    yield from _items_of_matrices(ad.io.read_elem(root["obs"]), matrices, path)


def _items_of_matrices(obs: pd.DataFrame, matrices: dict[str, tuple[Any, pd.Index]], path: Path) -> Iterator[Any]:
    """The header and the items of the first matrix whose first item holds counts."""
    refused = []
    for where in ("layers['counts']", "raw.X", "X"):
        matrix, gene_names = matrices.get(where, (None, None))
        if matrix is None:
            continue
        assert gene_names is not None
        n_entries, read = _reader(matrix, (len(obs), len(gene_names)), f"{where} of {path}", path)
        try:
            for item in read():
                values = item.values if n_entries is not None else item.data
                check_values(values.astype(np.float32), f"{where} of {path}")
                break
        except Unusable:
            raise
        except ValueError as error:
            refused.append(str(error))
            continue
        yield Header(obs, gene_names, where, n_entries)
        yield from read()
        return
    raise Unusable("; ".join(refused) or f"{path} holds no matrix; expected raw counts in X, raw.X or layers['counts']")


def _reader(
    matrix: Any, shape: tuple[int, int], what: str, path: Path
) -> tuple[int | None, Callable[[], Iterator[Any]]]:
    """Number of entries of a matrix by gene (None for others), and a function that reads its items.

    Raises
    ------
    Unusable
        If it is damaged, or its shape is not that of the names.
    """
    if sp.issparse(matrix) or isinstance(matrix, np.ndarray):
        rows = sp.csr_matrix(matrix)
        return None, lambda: (rows[start : start + FIRST_CELLS] for start in range(0, shape[0], FIRST_CELLS))
    is_dense = hasattr(matrix, "shape")
    found = tuple(int(n) for n in (matrix.shape if is_dense else _sparse_shape(matrix)))
    if found != shape:
        raise Unusable(
            f"{what} is damaged: it has the shape {found}, expected {shape} as there are names: save the file again"
        )
    if is_dense:
        return None, partial(blocks_of_rows, matrix, shape, path)
    check_sparse(matrix, path, indices=False)
    kind = matrix.attrs.get("encoding-type", matrix.attrs.get("h5sparse_format", ""))
    if str(kind).startswith("csr"):
        return None, partial(blocks_of_rows, matrix, shape, path)
    return int(matrix["data"].shape[0]), partial(entries_of_columns, matrix, shape, path)


def _sparse_shape(group: Any) -> Any:
    return group.attrs.get("shape", group.attrs.get("h5sparse_shape", ()))


def open_10x(path: Path) -> CellStream:
    """Open a 10x .h5 file of Cell Ranger 2 or 3 (genes only, no antibodies), after a check of its structure."""
    items = from_child(path, partial(_items_of_10x, path))
    obs, gene_names, is_gene = next(items)
    cells = CellStream(obs, gene_names, items, str(path))
    return cells if is_gene.all() else cells.select_genes(is_gene)


def _items_of_10x(path: Path) -> Iterator[Any]:
    """Barcodes, names of the features and which of them are genes; then the counts, which are stored by cell.

    Raises
    ------
    Unusable
        If there is no such table, or several.
    """
    check_structure(path, indices=False)
    with reading(path, "a 10x .h5 file of Cell Ranger"), h5py.File(path) as file:
        names = ["matrix"] if "matrix" in file else list(file)
        if len(names) != 1:
            raise Unusable(f"{path} has tables of {len(names)} genomes ({', '.join(names)}), expected one")
        table = file[names[0]]
        features = table["features/name"] if "features" in table else table["gene_names"]
        kinds = table.get("features/feature_type")
        n_genes, n_cells = (int(n) for n in table["shape"][()])
        is_gene = np.ones(n_genes, dtype=bool) if kinds is None else kinds[()] == b"Gene Expression"
        obs = pd.DataFrame(index=table["barcodes"].asstr()[()])
        gene_names = pd.Index(features.asstr()[()])
        if (len(obs), len(gene_names), len(is_gene)) != (n_cells, n_genes, n_genes):
            raise Unusable(
                f"{path} is damaged: it has {len(obs):,} barcodes and {len(gene_names):,} features for a table of "
                f"{n_cells:,} x {n_genes:,}: save or download it again"
            )
        yield obs, gene_names, is_gene
        yield from blocks_of_rows(table, (n_cells, n_genes), path)
