"""The axes of variation of a GMVAE in words: their genes, and the known gene programmes that these belong to."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy.stats import hypergeom

TABLE = Path(__file__).with_name("programmes.csv")
MIN_SHARE = 2e-5  # of all RNA, mean over cells: less expressed genes do not name an axis (ours)
N_TOP = 40  # genes of each direction of an axis that are compared with the programmes (ours)
MIN_RELATIVE = 0.15  # loading of such a gene, relative to the largest of the axis (ours)
MIN_GENES, MAX_P = 3, 1e-3  # of a programme among these genes; Bonferroni-corrected p of so many by chance (ours)
N_SHOWN = 8  # genes of each direction on the page


class Direction(NamedTuple):
    """One end of an axis."""

    programme: str | None  # None: no known programme fits
    source: str  # of the programme
    genes: list[str]  # those of the programme first, then the largest loadings


class Axis(NamedTuple):
    """An axis of variation within the cell types."""

    number: int  # in the model, from 1
    strength: float  # root mean square of the log fold changes per unit of z, weighted by expression
    ends: list[Direction]  # the end with the larger loadings first; a direction without clear genes is left out


def read_programmes() -> pd.DataFrame:
    """Columns programme, genes (regular expressions for whole names in capitals, separated by blanks), source."""
    return pd.read_csv(TABLE)


def axes_of(checkpoint: dict[str, Any]) -> list[Axis]:
    """The axes of the GMVAE, the strongest first; none for other models.

    checkpoint: models/gmvae.pt.
    """
    weights = checkpoint["weights"]
    if "log_profiles" not in weights:
        return []
    loadings = weights["p_x_zyl_log_mean.weight"].double().numpy()
    share = (weights["type_frequency"].double() @ weights["log_profiles"].double().softmax(dim=1)).numpy()
    names = np.array(checkpoint["gene_names"])
    expressed = share >= MIN_SHARE
    if expressed.sum() < N_TOP or not loadings.any():
        return []
    loadings, share, names = loadings[expressed], share[expressed] / share[expressed].sum(), names[expressed]
    strength = np.sqrt(share @ loadings**2)
    order = np.argsort(-strength, kind="stable")
    return [Axis(int(j) + 1, float(strength[j]), _ends(loadings[:, j], names)) for j in order if strength[j] > 0]


def _ends(loadings: np.ndarray, names: np.ndarray) -> list[Direction]:
    ends = []
    for sign in sorted((1, -1), key=lambda sign: -float((sign * loadings).max())):
        top = np.argsort(-sign * loadings, kind="stable")[:N_TOP]
        genes = [names[g] for g in top if sign * loadings[g] >= MIN_RELATIVE * np.abs(loadings).max()]
        if genes:
            ends.append(_in_words(genes, list(names)))
    return ends


def _in_words(genes: Sequence[str], universe: Sequence[str]) -> Direction:
    found = best_programme(genes, universe)
    if found is None:
        return Direction(None, "", list(genes[:N_SHOWN]))
    name, source, hits = found
    return Direction(name, source, [*hits, *(gene for gene in genes if gene not in hits)][:N_SHOWN])


def best_programme(genes: Sequence[str], universe: Sequence[str]) -> tuple[str, str, list[str]] | None:
    """The programme that has more of these genes than chance explains: name, source, and its genes among them.

    Chance: as many genes selected at random from the universe, P(at least so many of the programme) (hypergeometric), times the
    number of programmes. None if no programme has `MIN_GENES` of the genes and a p of at most `MAX_P`.
    """
    table, best, best_p = read_programmes(), None, MAX_P
    for row in table.itertuples():
        pattern = re.compile(row.genes.replace(" ", "|"))
        hits = [gene for gene in genes if pattern.fullmatch(gene.upper())]
        if len(hits) < MIN_GENES:
            continue
        n_members = sum(pattern.fullmatch(gene.upper()) is not None for gene in universe)
        p = len(table) * hypergeom.sf(len(hits) - 1, len(universe), n_members, len(genes))
        if p <= best_p:
            best, best_p = (row.programme, row.source, hits), p
    return best


def axis_sentence(axis: Axis) -> str:
    """Such as "interferon response (ISG15, IFI6, ...), opposite RPL3, RPS2, ..."."""
    if not axis.ends:
        return "no gene stands out"
    lists = [(end.programme, ", ".join(end.genes)) for end in axis.ends]
    words = [genes if programme is None else f"{programme} ({genes})" for programme, genes in lists]
    unnamed = all(end.programme is None for end in axis.ends)
    return ("no known programme; " if unnamed else "") + ", opposite ".join(words)
