"""mRNA per cell of each type, which turns the shares of RNA that a bulk shows into shares of cells.

The counts of a droplet reference do not show it: a monocyte holds about 3.6 times the mRNA of a T cell, but has 1.2 times its UMI
counts. rna_per_cell.csv holds measured values of three sources in their own units. EPIC's are used as they are; a type that
EPIC lacks takes the geometric mean of the other sources, each brought to EPIC's scale by the types that both have.

A type of the reference matches a type of the table if its name matches and it expresses the marker genes of that type.
"""

import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from lib.bulk.reference import Reference
from lib.data.tables import read_table
from lib.files import user_path

TABLE = Path(__file__).with_name("rna_per_cell.csv")
FIRST_SOURCE = "EPIC"  # whose scale the others are brought to
SETTINGS = ("auto", "reference", "published")
PUBLISHED_LOG_SD = 0.3  # of log published values: the sources of the table differ by so much, on one scale
UNKNOWN_LOG_SD = 0.55  # of the log of the reference's counts: half of log 3, the ratio of a monocyte's to a T cell's
MIN_MARKERS = 2  # of a kind, among the genes of the reference: with fewer, a match cannot be confirmed
MIN_RELATIVE = 0.3  # expression of the markers in the type, relative to the type that expresses them most, on average
MIN_CPM = 20  # counts per million of a marker that is expressed; half of the markers must be
OTHER_STATE = re.compile(
    r"plasma(?!cytoid)|progenitor|precursor|stem|\bhsc|cd34|\bpr[eo] ?b|"
    r"malignan|tumou?r|cancer|leuk|lymphoma|doublet|prolifer|cycling"
)


class Kind(NamedTuple):
    """How a type of the table is recognised in a reference."""

    pattern: str  # in the name: lower case, everything but letters and digits replaced by blanks
    markers: tuple[str, ...]


# In this order, the first whose pattern fits: "plasmacytoid dendritic cell" before "plasma" and "dendritic", NK T cells are T cells
KINDS = {
    "plasmacytoid dendritic": Kind(r"\bpdcs?\b|plasmacytoid", ("LILRA4", "CLEC4C", "IL3RA", "TCF4", "IRF7", "GZMB")),
    "dendritic": Kind(r"\b[cm]?dcs?\d?\b|dendritic", ("FCER1A", "CLEC10A", "CD1C", "HLA-DQA1", "HLA-DPB1", "CST3")),
    "macrophage": Kind(r"macrophage", ("CD68", "MARCO", "MSR1", "MRC1", "CD163", "C1QA", "C1QB")),
    "monocyte": Kind(r"\bmono(cyte)?s?\b", ("LYZ", "CD14", "FCN1", "CST3", "LST1", "S100A9")),
    "neutrophil": Kind(r"neutrophil", ("FCGR3B", "CSF3R", "CXCR2", "S100A8", "S100A9", "G0S2")),
    "basophil": Kind(r"basophil", ("CLC", "GATA2", "CPA3", "HDC", "MS4A2")),
    "T": Kind(
        r"\bt\b|\bt ?cells?\b|\bgdt\b|\bnk ?t\b|\btregs?\b|\bth ?\d+\b|\bmait\b|\bcd[48]\b",
        ("CD3D", "CD3E", "CD3G", "CD2", "TRAC", "IL32"),
    ),
    "NK": Kind(r"\bnk\b|natural killer", ("NKG7", "GNLY", "KLRD1", "KLRF1", "PRF1", "CTSW")),
    "B": Kind(r"\bb\b|\bb ?cells?\b", ("MS4A1", "CD79A", "CD79B", "CD19", "BANK1")),
}


def to_rna(proportions: np.ndarray, rna_per_cell: np.ndarray) -> np.ndarray:
    """Shares of RNA from shares of cells (last axis: types), which sum to 1: each type times its RNA per cell."""
    rna = proportions * rna_per_cell
    return rna / rna.sum(axis=-1, keepdims=True)


def to_cells(rna: np.ndarray, rna_per_cell: np.ndarray) -> np.ndarray:
    """Shares of cells from shares of RNA, rows sum to 1: each type divided by its mRNA per cell."""
    return to_rna(rna, 1 / rna_per_cell)


def published_values() -> pd.Series:
    """mRNA per cell by type of the table, on EPIC's scale."""
    table = pd.read_csv(TABLE).pivot(index="cell_type", columns="source", values="value")
    first, others = table[FIRST_SOURCE], table.drop(columns=FIRST_SOURCE)
    log_scale = np.log(others.rdiv(first, axis=0)).mean()  # of the types that both have
    return first.fillna(np.exp((np.log(others) + log_scale).mean(axis=1)))


def kind_of(name: str) -> str | None:
    """The type of the table that a name stands for, or None."""
    plain = re.sub(r"[^a-z0-9]+", " ", name.lower())
    if OTHER_STATE.search(plain):
        return None
    return next((kind for kind, (pattern, _) in KINDS.items() if re.search(pattern, plain)), None)


def is_confirmed(kind: str, cell_type_idx: int, reference: Reference) -> bool:
    """Whether the type expresses the markers of this kind, absolutely and in comparison with the other types."""
    places = {name.upper(): g for g, name in enumerate(reference.gene_names)}
    genes = [places[marker] for marker in KINDS[kind].markers if marker in places]
    if len(genes) < MIN_MARKERS:
        return False
    cpm = 1e6 * reference.mean[:, genes] / reference.mean.sum(axis=1, keepdims=True)
    relative = cpm[cell_type_idx] / np.maximum(cpm.max(axis=0), 1e-12)
    return relative.mean() >= MIN_RELATIVE and (cpm[cell_type_idx] >= MIN_CPM).mean() >= 0.5


def rna_per_cell(setting: str, reference: Reference) -> pd.DataFrame:
    """mRNA per cell of every type of the reference, in one relative unit, and where each value comes from.

    Parameters
    ----------
    setting
        "auto": the table for types that match it, the reference's counts brought to its scale for the others; "reference": mean
        counts per cell only; "published": the table, for all types; or the path of a table of cell_type and rna_per_cell.
    reference
        All genes of the single cells.

    Returns
    -------
    Types x (rna_per_cell, log_sd, source), in the order of the reference; log_sd: uncertainty of log(rna_per_cell).

    Raises
    ------
    ValueError
        If a type has no value under "published", or in the user's table.
    """
    types, counts = reference.cell_types, reference.mean.sum(axis=1)
    if setting == "reference":
        return pd.DataFrame(
            {"rna_per_cell": counts, "log_sd": 0.0, "source": "counts per cell of the reference"}, index=types
        )
    if setting not in SETTINGS:
        return own_values(setting, types)
    named = [kind_of(name) for name in types]
    known = [
        kind is not None and (setting == "published" or is_confirmed(kind, k, reference))
        for k, kind in enumerate(named)
    ]
    if setting == "published" and not all(known):
        without = ", ".join(name for name, is_known in zip(types, known) if not is_known)
        raise ValueError(
            f"RNA_PER_CELL is published, but there is no published mRNA content for {without}; the table has {', '.join(KINDS)}: "
            "set RNA_PER_CELL to auto, or to a table of your own with the columns cell_type and rna_per_cell"
        )
    if not any(known):
        return rna_per_cell("reference", reference)
    by_kind, is_known = published_values(), np.array(known)
    matched = np.array([by_kind[kind] if found else np.nan for kind, found in zip(named, known)])
    scale = np.exp(np.mean(np.log(matched[is_known] / counts[is_known])))
    epic = epic_types()
    published = [f"published, {kind}" + ("" if kind in epic else " (other sources on EPIC's scale)") for kind in named]
    source = np.where(is_known, published, "counts per cell of the reference, scaled")
    log_sd = np.where(is_known, PUBLISHED_LOG_SD, UNKNOWN_LOG_SD)
    values = np.where(is_known, matched, scale * counts)
    return pd.DataFrame({"rna_per_cell": values, "log_sd": log_sd, "source": source}, index=types)


def epic_types() -> set[str]:
    table = pd.read_csv(TABLE)
    return set(table.loc[table["source"] == FIRST_SOURCE, "cell_type"])


def table_path(name: str) -> Path:
    """Path of the user's table of mRNA contents.

    Raises
    ------
    ValueError
        If RNA_PER_CELL is neither a setting nor a file.
    """
    try:
        return user_path(name)
    except FileNotFoundError as error:
        raise ValueError(
            f"RNA_PER_CELL is {name!r}; expected {', '.join(SETTINGS)} or the path of a table of cell_type and rna_per_cell: {error}"
        ) from None


def own_values(name: str, types: list[str]) -> pd.DataFrame:
    """The user's values, from a table of cell_type and rna_per_cell, in any unit."""
    path = table_path(name)
    table = read_table(path)
    if not {"cell_type", "rna_per_cell"} <= set(table.columns):
        raise ValueError(
            f"{path} has the columns {', '.join(map(str, table.columns))}; expected cell_type and rna_per_cell"
        )
    values = pd.to_numeric(
        table.drop_duplicates("cell_type").set_index("cell_type")["rna_per_cell"], errors="coerce"
    ).reindex(types)
    bad = list(values.index[~(values > 0)])
    if bad:
        raise ValueError(
            f"{path} has no positive rna_per_cell for {', '.join(bad)}; expected one row for each of {', '.join(types)}"
        )
    return pd.DataFrame(
        {"rna_per_cell": values.to_numpy(dtype=np.float64), "log_sd": 0.0, "source": path.name}, index=types
    )


def print_rna_per_cell(content: pd.DataFrame) -> None:
    """Each type's value and source; a warning for types whose mRNA content is not known."""
    print("mRNA per cell (relative), which turns shares of RNA into shares of cells (RNA_PER_CELL):")
    print(content[["rna_per_cell", "source"]].to_string(float_format="{:.4g}".format))
    unknown = content.index[content["source"].str.startswith("counts") & content["source"].str.endswith("scaled")]
    if len(unknown):
        print(
            f"WARNING: no published mRNA content was found for {', '.join(unknown)} (by name, confirmed by marker genes); "
            "the reference's counts per cell are used instead and may be wrong by a factor of 3: "
            "see predicted_rna_proportions.csv, or give RNA_PER_CELL a table"
        )
