"""Random damage to every file that users and stages give: an error of one line that names the file, or the result of the clean file.

Where a format has checksums (gzip, zip, recorded files) the result must be that of the clean file. Plain text and HDF5 have none, so
there a result must keep what its reader promises.
"""

import gzip
import io
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import scipy.stats
import torch
from helpers import CPU, STAGES, simulated_dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lib import options, records
from lib.bulk.tables import read_cell_numbers, read_proportions
from lib.bulk.rna_content import own_values
from lib.bulk.tables import read_bulk, read_gene_ids
from lib.checkpoints import load_checkpoint
from lib.data.batches import CellDataset
from lib.data.hdf5 import read_h5ad
from lib.data.labels import read_labels
from lib.data.markers import read_markers
from lib.data.readers import read_count_table, read_gene_lengths
from lib.data.tables import read_table
from lib.evaluation.transfer import read_classes
from lib.files import require
from lib.models.likelihoods import nb_log_prob

TYPES = ["B cell", "T cell", "NK cell"]
CELLS = simulated_dataset(n_cells=12, n_genes=8)
GENES, BARCODES = list(CELLS.var_names), CELLS.obs_names


@st.composite
def damage(draw, content: bytes) -> bytes:
    """A file after damage of one or two places."""
    for _ in range(draw(st.integers(1, 2))):
        start = draw(st.integers(0, max(0, len(content) - 1)))
        end = min(len(content), start + draw(st.integers(1, 40)))
        kind = draw(st.sampled_from(["cut", "flip", "delete", "insert", "zero", "repeat"]))
        if kind == "cut":
            content = content[:start]
        elif kind == "flip" and content:
            content = content[:start] + bytes([content[start] ^ (1 << draw(st.integers(0, 7)))]) + content[start + 1 :]
        elif kind == "delete":
            content = content[:start] + content[end:]
        elif kind == "insert":
            content = content[:start] + draw(st.binary(min_size=1, max_size=8)) + content[start:]
        elif kind == "zero":
            content = content[:start] + bytes(end - start) + content[end:]
        else:
            content = content[:end] + content[start:]
    return content


FIELDS = st.one_of(
    st.sampled_from(["", " ", "0", "1", "2.5", "-1", "nan", "inf", "1e400", "1e-320", "NA", '"', "True", "0x10", "\ufeff"]),
    st.sampled_from([*TYPES, *GENES[:4], *BARCODES[:3], "sample", "group", "cell_type", "rna_per_cell", "positive", "length"]),
    st.floats().map(str), st.text(max_size=5),
)  # fmt: skip
TEXT_TABLES = st.lists(st.lists(FIELDS, max_size=5), max_size=6).flatmap(
    lambda rows: st.sampled_from([",", "\t", ";"]).map(lambda sep: "\n".join(sep.join(row) for row in rows).encode("utf-8", "replace"))
)  # fmt: skip


def outcome(read, path: Path):
    """What a reader returns; None for an error of one line that names the file. Any other error is a fault."""
    try:
        return read(path)
    except (ValueError, OSError) as error:
        text = str(error)
        assert path.name in text and "\n" not in text and len(text) < 1500, text
        return None


def in_file(content: bytes, name: str, folder: Path) -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


# --- with checksums: an error, or the clean result

COUNT_TABLE = CELLS.to_df().astype(int).to_csv().encode()
BULK = pd.DataFrame(np.arange(16.0).reshape(8, 2) + 0.5, GENES, ["a", "b"])
CHECKPOINT = {"format": 3, "stage": STAGES[3], "constants": {}, "arguments": {}, "gene_names": GENES, "cell_types": TYPES,
              "split_id": "0", "weights": {"w": torch.arange(50.0)}, "epoch": 1}  # fmt: skip


def excel() -> bytes:
    buffer = io.BytesIO()
    BULK.to_excel(buffer)
    return buffer.getvalue()


def checkpoint_file() -> bytes:
    buffer = io.BytesIO()
    torch.save(CHECKPOINT, buffer)
    return buffer.getvalue()


def check_gzip(content: bytes, folder: Path) -> None:
    path = in_file(content, "counts.csv.gz", folder)
    found = outcome(lambda p: read_count_table(p, "cells_in_rows"), path)
    if found is not None:
        np.testing.assert_array_equal(found.X.toarray(), CELLS.X.toarray())
        assert list(found.var_names) == GENES and list(found.obs_names) == list(BARCODES)


def check_excel(content: bytes, folder: Path) -> None:
    found = outcome(lambda p: read_bulk(p, GENES), in_file(content, "bulk.xlsx", folder))
    if found is not None:
        pd.testing.assert_frame_equal(found, BULK.T, check_names=False)


def check_checkpoint(content: bytes, folder: Path) -> None:
    found = outcome(lambda p: load_checkpoint(p, STAGES[3]), in_file(content, "gmvae.pt", folder))
    if found is not None:
        assert torch.equal(found["weights"]["w"], CHECKPOINT["weights"]["w"]) and found["gene_names"] == GENES


def check_recorded(content: bytes, folder: Path) -> None:
    path = in_file(H5AD, "train.h5ad", folder)
    records.add(path, stage=STAGES[1])
    path.write_bytes(content)
    found = outcome(lambda p: read_h5ad(require(p, STAGES[1])), path)
    records.record_path(path).unlink()
    if found is not None:
        assert content == H5AD


def h5ad() -> bytes:
    buffer = io.BytesIO()
    import h5py

    with h5py.File(buffer, "w") as file:
        ad.io.write_elem(file, "/", CELLS)
    return buffer.getvalue()


H5AD = h5ad()


# --- without checksums: an error, or what the reader promises


def check_bulk(content: bytes, folder: Path) -> None:
    found = outcome(lambda p: read_bulk(p, GENES), in_file(content, "bulk.csv", folder))
    if found is not None:
        assert np.isfinite(found.to_numpy()).all() and found.index.is_unique and found.columns.isin(GENES).any()


def check_count_table(content: bytes, folder: Path) -> None:
    found = outcome(lambda p: read_count_table(p, "cells_in_rows"), in_file(content, "counts.csv", folder))
    if found is not None:
        assert sp.issparse(found.X) and found.shape == (len(found.obs_names), len(found.var_names))


def check_labels(content: bytes, folder: Path) -> None:
    found = outcome(lambda p: read_labels(p, BARCODES), in_file(content, "labels.csv", folder))
    if found is not None:
        assert list(found.index) == list(BARCODES) and found["cell_type"].notna().any()


def check_markers(content: bytes, folder: Path) -> None:
    found = outcome(lambda p: read_markers(p, None), in_file(content, "markers.csv", folder))
    if found is not None:
        assert all(markers.positive for markers in found.values())


def check_wanted(content: bytes, folder: Path) -> None:
    path = in_file(content, "wanted.csv", folder)
    numbers, shares = (
        outcome(lambda p: read_cell_numbers(p, TYPES), path),
        outcome(lambda p: read_proportions(p, TYPES), path),
    )
    if numbers is not None:
        assert list(numbers) == TYPES and (numbers >= 0).all(axis=None) and numbers.to_numpy().sum() > 0
    if shares is not None:
        np.testing.assert_allclose(shares.sum(axis=1), 1)


def check_small_tables(content: bytes, folder: Path) -> None:
    path = in_file(content, "table.csv", folder)
    lengths = outcome(read_gene_lengths, path)
    assert lengths is None or (np.isfinite(lengths).all() and (lengths > 0).all() and lengths.index.is_unique)
    values = outcome(lambda p: own_values(str(p), TYPES), path)
    assert values is None or (np.isfinite(values["rna_per_cell"]).all() and (values["rna_per_cell"] > 0).all())
    classes = outcome(lambda p: read_classes(p, TYPES), path)
    assert classes is None or len(classes) == len(TYPES)
    for reader in (read_gene_ids, read_table):
        outcome(reader, path)


def check_likelihood(values: tuple[float, float, float], _: Path) -> None:
    """log NB(x | mu, theta) over the whole range of float32 that training can reach, against scipy."""
    x, log_mu, log_theta = round(values[0]), values[1], values[2]
    dataset = CellDataset(sp.csr_matrix([[float(x), 1.0]], dtype=np.float32), np.zeros(1), CPU)
    logits = torch.tensor([[log_mu, 0.0]])
    ours = nb_log_prob(
        dataset.in_memory_cells.batch(np.arange(1)), logits, logits.logsumexp(1), torch.tensor([log_theta, 0.0])
    )
    mu, theta = np.exp(logits[0].double().numpy()), np.exp(torch.tensor([log_theta, 0.0]).double().numpy())
    expected = scipy.stats.nbinom.logpmf([x, 1], theta, theta / (theta + mu)).sum()
    assert np.isfinite(ours.item())
    np.testing.assert_allclose(ours.item(), expected, rtol=1e-4, atol=1e-2)


SCRIPT = '''"""Stage 9: a script."""
from typing import Literal
from lib.ranges import Count, Part, Positive
EPOCHS: Count = 300  # passes
RATE: Positive | None = None  # of learning
DROPOUT: Part = 0.1  # share
WIDTHS: tuple[Count, ...] = (128, 64)  # layers
DEVICE: Literal["auto", "cpu"] = "auto"  # to run on
RESUME = False  # go on
'''
WORDS = st.lists(
    st.one_of(
        st.sampled_from(["--epochs", "--rate", "--dropout", "--widths", "--device", "--resume", "--no-resume", "--epochs=", "none"]),
        st.sampled_from(["0", "1", "-1", "0.5", "1e999", "nan", "cpu", "gpu", "", "9" * 30]), st.text(max_size=4),
    ), max_size=6,
)  # fmt: skip


def check_options(words: list[str], folder: Path) -> None:
    path = in_file(SCRIPT.encode(), "stage.py", folder)
    module = {"__file__": str(path), "__name__": "stage"}
    exec(compile(SCRIPT, str(path), "exec"), module)
    try:
        options.from_command_line(module, words)
    except SystemExit as ended:
        assert ended.code in (0, 2)
        return
    assert 1 <= module["EPOCHS"] < 2**31 and 0 <= module["DROPOUT"] < 1 and module["DEVICE"] in ("auto", "cpu")
    assert module["RATE"] is None or 0 < module["RATE"] < float("inf")
    assert all(1 <= width < 2**31 for width in module["WIDTHS"])


def text_or(clean: str) -> st.SearchStrategy[bytes]:
    return st.one_of(damage(clean.encode()), TEXT_TABLES)


LABELS = "barcode,cell_type\n" + "".join(f"{barcode},{TYPES[i % 3]}\n" for i, barcode in enumerate(BARCODES))
WANTED = "sample,B cell,T cell\na,3,4\nb,5,6\n"
FUZZED = {
    "count table, gzip": (damage(gzip.compress(COUNT_TABLE, mtime=0)), check_gzip),
    "bulk, xlsx": (damage(excel()), check_excel),
    "checkpoint": (damage(checkpoint_file()), check_checkpoint),
    "recorded h5ad": (damage(H5AD), check_recorded),
    "bulk, text": (text_or(BULK.to_csv()), check_bulk),
    "count table, text": (text_or(COUNT_TABLE.decode()), check_count_table),
    "labels": (text_or(LABELS), check_labels),
    "markers": (text_or("cell_type,positive,negative\nB cell,GENE1 GENE2,\nT cell,GENE3,GENE1\n"), check_markers),
    "wanted cells": (st.one_of(text_or(WANTED), text_or("sample,B cell,T cell\na,0.5,0.5\n")), check_wanted),
    "small tables": (st.one_of(text_or("gene,length\nGENE1,200\n"), text_or("cell_type,rna_per_cell\nB cell,2\n")), check_small_tables),
    "options": (WORDS, check_options),
    "likelihood": (st.tuples(st.floats(0, 1e5), st.floats(-20, 12), st.floats(-7, 14)), check_likelihood),
}  # fmt: skip


def fuzz(name: str, n_examples: int, folder: Path) -> None:
    strategy, check = FUZZED[name]

    @settings(
        max_examples=n_examples, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(strategy)
    def body(example):
        check(example, folder)

    body()


@pytest.mark.parametrize("name", FUZZED)
def test_damage_is_an_error_of_one_line_or_does_no_harm(name, tmp_path):
    fuzz(name, 17, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", FUZZED)
def test_much_damage_is_an_error_of_one_line_or_does_no_harm(name, tmp_path):
    fuzz(name, 200, tmp_path)
