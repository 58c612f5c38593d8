"""Random damage to every file that users and stages give: an error of one line that names the file, or a result that its reader promises.

Where a format has checksums (gzip, zip) the result must be that of the whole file. Plain text and HDF5 have none.
"""

import gzip
import io
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import STAGES, read_dataset, simulated_dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lib.bulk.rna_content import own_values
from lib.bulk.tables import read_bulk, read_cell_numbers, read_gene_ids, read_proportions
from lib.data.labels import read_labels, read_markers
from lib.data.readers import read_count_table, read_gene_lengths
from lib.data.tables import read_table
from lib.evaluation.transfer import read_classes
from lib.training import CHECKPOINT_FORMAT, load_checkpoint

TYPES = ["B cell", "T cell", "NK cell"]
CELLS = simulated_dataset(n_cells=12, n_genes=8)
GENES, BARCODES = list(CELLS.var_names), list(CELLS.obs_names)
COUNTS = CELLS.to_df()
BULK = pd.DataFrame(np.arange(16.0).reshape(8, 2) + 0.5, GENES, ["a", "b"])
CHECKPOINT = {"format": CHECKPOINT_FORMAT, "stage": STAGES[3], "constants": {}, "arguments": {}, "gene_names": GENES, "cell_types": TYPES,
              "split_id": "0", "weights": {"w": torch.arange(50.0)}, "epoch": 1}  # fmt: skip


@st.composite
def damage(draw, content: bytes) -> bytes:
    """A file after damage of one or two places."""
    for _ in range(draw(st.integers(1, 2))):
        start = draw(st.integers(0, max(0, len(content) - 1)))
        end = start + draw(st.integers(1, 40))
        before, part, after = content[:start], content[start:end], content[end:]
        flipped, inserted = bytes(byte ^ 4 for byte in part[:1]) + part[1:], draw(st.binary(min_size=1, max_size=8))
        ends = [b"", flipped + after, after, inserted + part + after, bytes(len(part)) + after, part + part + after]
        content = before + draw(st.sampled_from(ends))
    return content


FIELDS = st.one_of(
    st.sampled_from(["", " ", "0", "1", "2.5", "-1", "nan", "inf", "1e400", "1e-320", "NA", '"', "True", "0x10", "\ufeff"]),
    st.sampled_from([*TYPES, *GENES[:4], *BARCODES[:3], "sample", "group", "cell_type", "rna_per_cell", "positive", "length"]),
    st.floats().map(str), st.text(max_size=5),
)  # fmt: skip
TEXT_TABLES = st.tuples(st.lists(st.lists(FIELDS, max_size=5), max_size=6), st.sampled_from(",\t;")).map(
    lambda drawn: "\n".join(drawn[1].join(row) for row in drawn[0]).encode("utf-8", "replace")
)


def written(write, *arguments) -> bytes:
    buffer = io.BytesIO()
    write(*arguments, buffer)
    return buffer.getvalue()


def h5ad(folder: Path) -> bytes:
    CELLS.write_h5ad(folder / "whole.h5ad", compression="gzip")
    return (folder / "whole.h5ad").read_bytes()


LABELS = "barcode,cell_type\n" + "".join(f"{barcode},{TYPES[i % 3]}\n" for i, barcode in enumerate(BARCODES))
MARKERS = "cell_type,positive,negative\nB cell,GENE1 GENE2,\nT cell,GENE3,GENE1\n"
NUMBERS, SHARES = "sample,B cell,T cell\na,3,4\nb,5,6\n", "sample,B cell,T cell\na,0.5,0.5\n"
RNA, CLASSES = "cell_type,rna_per_cell\nB cell,2\nT cell,3\nNK cell,1\n", "type,class\nB cell,B\nT cell,T\nNK cell,T\n"
FUZZED = {  # what: file name, whole content, reader, what the reader promises
    "counts.csv.gz": (gzip.compress(COUNTS.to_csv().encode(), mtime=0), lambda p: read_count_table(p, "cells_in_rows"),
                      lambda adata: adata.to_df().equals(COUNTS)),
    "bulk.xlsx": (written(BULK.to_excel), lambda p: read_bulk(p, GENES), lambda bulk: np.array_equal(bulk, BULK.T)),
    "gmvae.pt": (written(torch.save, CHECKPOINT), lambda p: load_checkpoint(p, STAGES[3]),
                 lambda got: torch.equal(got["weights"]["w"], CHECKPOINT["weights"]["w"]) and got["gene_names"] == GENES),
    "cells.h5ad": (h5ad, read_dataset, lambda adata: adata.shape[0] > 0 and (adata.X.data > 0).all()),
    "counts.csv": (COUNTS.to_csv(), lambda p: read_count_table(p, "cells_in_rows"), lambda adata: adata.X.shape == adata.shape),
    "bulk.csv": (BULK.to_csv(), lambda p: read_bulk(p, GENES), lambda bulk: np.isfinite(bulk.to_numpy()).all() and bulk.index.is_unique),
    "labels.csv": (LABELS, lambda p: read_labels(p, pd.Index(BARCODES)), lambda obs: list(obs.index) == BARCODES),
    "markers.csv": (MARKERS, lambda p: read_markers(p, None), lambda types: all(markers.positive for markers in types.values())),
    "numbers.csv": (NUMBERS, lambda p: read_cell_numbers(p, TYPES), lambda n: (n >= 0).all(axis=None) and n.to_numpy().sum() > 0),
    "shares.csv": (SHARES, lambda p: read_proportions(p, TYPES), lambda shares: np.allclose(shares.sum(axis=1), 1)),
    "lengths.csv": ("gene,length\nGENE1,200\n", read_gene_lengths, lambda bp: np.isfinite(bp).all() and (bp > 0).all()),
    "rna.csv": (RNA, lambda p: own_values(str(p), TYPES), lambda table: (table["rna_per_cell"] > 0).all()),
    "classes.csv": (CLASSES, lambda p: read_classes(p, TYPES), lambda classes: len(classes) == len(TYPES)),
    "ids.csv": ("id,name\nENSG00000000001,GENE1\n", read_gene_ids, lambda names: "" not in names.values()),
    "table.csv": (LABELS, read_table, lambda table: table.columns.is_unique and table.notna().all(axis=None)),
}  # fmt: skip


@pytest.mark.parametrize("n_examples", [17, pytest.param(200, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", FUZZED)
def test_damage_is_an_error_of_one_line_or_does_no_harm(name, n_examples, tmp_path):
    whole, read, is_promised = FUZZED[name]
    if callable(whole):
        whole = whole(tmp_path)
    files = st.one_of(damage(whole.encode()), TEXT_TABLES) if isinstance(whole, str) else damage(whole)
    path, checks = tmp_path / name, list(HealthCheck)

    @settings(max_examples=n_examples, deadline=None, derandomize=True, database=None, suppress_health_check=checks)
    @given(files)
    def fuzz(content):
        path.write_bytes(content)
        try:
            result = read(path)
        except (ValueError, OSError) as error:
            text = str(error)
            assert path.name in text and "\n" not in text and len(text) < 1500, text
        else:
            assert is_promised(result)

    path.write_bytes(whole.encode() if isinstance(whole, str) else whole)
    assert is_promised(read(path))
    fuzz()
