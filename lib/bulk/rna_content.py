"""mRNA per cell of each type, which turns the shares of RNA that a bulk shows into shares of cells.

The counts of a droplet reference do not show it: a monocyte holds about 3.6 times the mRNA of a T cell, but has 1.2 times its UMI
counts. rna_per_cell.csv holds measured values of three sources in their own units. EPIC's are used as they are; a type that
EPIC lacks takes the geometric mean of the other sources, each brought to EPIC's scale by the types that both have. A type of the
reference matches a type of the table if its name matches and it expresses the marker genes of that type.
"""

import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from lib.bulk.regression import Reference
from lib.data.tables import read_table
from lib.run import user_path

TABLE = Path(__file__).with_name("rna_per_cell.csv")
FIRST_SOURCE = "EPIC"  # whose scale the others are brought to
SETTINGS = ("auto", "reference")
PUBLISHED_LOG_SD = 0.3  # of log published values: the sources of the table differ by so much, on one scale
UNKNOWN_LOG_SD = 0.55  # of the log of the reference's counts: half of log 3, the ratio of a monocyte's to a T cell's
MIN_MARKERS = 2  # of a kind, among the genes of the reference: with fewer, a match cannot be confirmed
MIN_RELATIVE = 0.3  # expression of the markers in the type, relative to the type that expresses them most, on average
MIN_CPM = 20  # counts per million of a marker that is expressed; half of the markers must be
# whole words of states and tumours, whose mRNA content is another than that of the type in the name
OTHER_STATES = (
    r"plasma(blast|cyte)?s?|progenitors?|precursors?|stem|hsp?cs?\d*|cd34(pos)?|pr[eo] ?[bt]( ?cells?)?|prolif\w*|cycling|doublets?|"
    r"malignan\w+|tumou?rs?\d*|cancer(s|ous)?\d*|leuka?emi\w+|lymphomas?\d*"
)


class Kind(NamedTuple):
    """How a type of the table is recognised in a reference."""

    words: str  # of its names, a regular expression for whole words in lower case
    markers: list[str]


# in this order, the first whose words fit: plasmacytoid dendritic cells before dendritic ones, and NK T cells are T cells
KINDS = {
    "plasmacytoid dendritic": Kind(r"pdcs?|plasmacytoid", "LILRA4 CLEC4C IL3RA TCF4 IRF7 GZMB".split()),
    "dendritic": Kind(r"[cm]?dcs?\d?|dendritic", "FCER1A CLEC10A CD1C HLA-DQA1 HLA-DPB1 CST3".split()),
    "macrophage": Kind(r"macrophages?", "CD68 MARCO MSR1 MRC1 CD163 C1QA C1QB".split()),
    "monocyte": Kind(r"mono(cyte)?s?", "LYZ CD14 FCN1 CST3 LST1 S100A9".split()),
    "neutrophil": Kind(r"neutrophils?", "FCGR3B CSF3R CXCR2 S100A8 S100A9 G0S2".split()),
    "basophil": Kind(r"basophils?", "CLC GATA2 CPA3 HDC MS4A2".split()),
    "T": Kind(r"t( ?cells?)?|gdt|nk ?t|tregs?|th ?\d+|mait|cd[48]", "CD3D CD3E CD3G CD2 TRAC IL32".split()),
    "NK": Kind(r"nk|natural killers?", "NKG7 GNLY KLRD1 KLRF1 PRF1 CTSW".split()),
    "B": Kind(r"b( ?cells?)?", "MS4A1 CD79A CD79B CD19 BANK1".split()),
}


def to_rna(proportions: np.ndarray, rna_per_cell: np.ndarray) -> np.ndarray:
    """Shares of RNA from shares of cells (last axis: types), which sum to 1: each type times its RNA per cell."""
    rna = proportions * rna_per_cell
    return rna / rna.sum(axis=-1, keepdims=True)


def to_cells(rna: np.ndarray, rna_per_cell: np.ndarray) -> np.ndarray:
    """Shares of cells from shares of RNA, rows sum to 1: each type divided by its mRNA per cell."""
    return to_rna(rna, 1 / rna_per_cell)


def published_values() -> pd.DataFrame:
    """rna_per_cell, on EPIC's scale, and source, by type of the table."""
    table = pd.read_csv(TABLE).pivot(index="cell_type", columns="source", values="value")
    first, others = table[FIRST_SOURCE], table.drop(columns=FIRST_SOURCE)
    log_scale = np.log(others.rdiv(first, axis=0)).mean()  # of the types that both have
    values = first.fillna(np.exp((np.log(others) + log_scale).mean(axis=1)))
    source = "published, " + table.index + np.where(first.isna(), " (other sources on EPIC's scale)", "")
    return pd.DataFrame({"rna_per_cell": values, "source": source})


def kind_of(name: str) -> str | None:
    """The type of the table that a name stands for, by whole words, or None."""
    plain = re.sub(r"[^a-z0-9]+", " ", name.lower())
    patterns = {None: OTHER_STATES} | {name: kind.words for name, kind in KINDS.items()}
    return next((name for name, words in patterns.items() if re.search(rf"\b({words})\b", plain)), None)


def is_confirmed(kind: str, cell_type_idx: int, reference: Reference) -> bool:
    """Whether the type expresses the markers of this kind, absolutely and in comparison with the other types."""
    genes = np.flatnonzero(np.isin([name.upper() for name in reference.gene_names], KINDS[kind].markers))
    if len(genes) < MIN_MARKERS:
        return False
    cpm = 1e6 * reference.mean[:, genes] / reference.mean.sum(axis=1, keepdims=True)
    relative = cpm[cell_type_idx] / np.maximum(cpm.max(axis=0), 1e-12)
    return relative.mean() >= MIN_RELATIVE and (cpm[cell_type_idx] >= MIN_CPM).mean() >= 0.5


def rna_per_cell(setting: str, reference: Reference) -> pd.DataFrame:
    """mRNA per cell of every type of the reference, in one relative unit: types x (rna_per_cell, log_sd of its error, source).

    setting: "auto": the table for types that match it, the reference's counts brought to its scale for the others; "reference": mean
    counts per cell; or the path of the user's table.
    """
    if setting not in SETTINGS:
        return own_values(setting, reference.cell_types)
    counts, source = reference.mean.sum(axis=1), "counts per cell of the reference"
    content = pd.DataFrame({"rna_per_cell": counts, "log_sd": 0.0, "source": source}, reference.cell_types)
    kinds = [kind_of(name) for name in reference.cell_types]
    kinds = [kind if kind and is_confirmed(kind, k, reference) else None for k, kind in enumerate(kinds)]
    is_known = np.array([kind is not None for kind in kinds])
    if setting == "reference" or not is_known.any():
        return content
    published = published_values().reindex(kinds)
    scale = np.exp(np.log(published["rna_per_cell"].to_numpy() / counts)[is_known].mean())
    content["rna_per_cell"] = np.where(is_known, published["rna_per_cell"], scale * counts)
    content["log_sd"] = np.where(is_known, PUBLISHED_LOG_SD, UNKNOWN_LOG_SD)
    content["source"] = published["source"].fillna(f"{source}, scaled").to_numpy()
    return content


def table_path(name: str) -> Path:
    """Path of the user's table of mRNA contents; ValueError if RNA_PER_CELL is neither a setting nor a file."""
    try:
        return user_path(name)
    except FileNotFoundError as error:
        expected = f"{', '.join(SETTINGS)} or the path of a table of cell_type and rna_per_cell"
        raise ValueError(f"RNA_PER_CELL is {name!r}; expected {expected}: {error}") from None


def own_values(name: str, types: list[str]) -> pd.DataFrame:
    """The user's values, from a table of cell_type and rna_per_cell, in any unit; ValueError for a type without one."""
    path = table_path(name)
    table = read_table(path)
    if not {"cell_type", "rna_per_cell"} <= set(table.columns):
        raise ValueError(f"{path} has the columns {', '.join(table.columns)}; expected cell_type and rna_per_cell")
    by_type = table.drop_duplicates("cell_type").set_index("cell_type")["rna_per_cell"]
    values = pd.to_numeric(by_type, errors="coerce").astype(np.float64).reindex(types)
    bad = ", ".join(values.index[~((values > 0) & np.isfinite(values))])
    if bad:
        raise ValueError(f"{path} has no positive rna_per_cell for {bad}; expected one for each of {', '.join(types)}")
    return pd.DataFrame({"rna_per_cell": values, "log_sd": 0.0, "source": path.name}, index=types)


def print_rna_per_cell(content: pd.DataFrame) -> None:
    """Each type's value and source; a warning for types whose mRNA content is not published, where that of others is."""
    print("mRNA per cell (relative), which turns shares of RNA into shares of cells (RNA_PER_CELL):")
    print(content[["rna_per_cell", "source"]].to_string(float_format="{:.4g}".format))
    unknown = content.index[content["log_sd"] == UNKNOWN_LOG_SD]
    if len(unknown):
        print(
            f"WARNING: no published mRNA content was found for {', '.join(unknown)}: counts per cell of the reference may be wrong "
            "by a factor of 3; see predicted_rna_proportions.csv, or give RNA_PER_CELL a table"
        )
