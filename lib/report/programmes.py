"""The axes of variation of a GMVAE in words: their genes, and the known gene programmes that these belong to."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy.stats import false_discovery_control, hypergeom

# columns programme, genes (regular expressions for whole names in capitals, separated by blanks), source
TABLE = Path(__file__).with_name("programmes.csv")
MIN_SHARE = 2e-5  # of all RNA, mean over cells: less expressed genes do not name an axis (ours)
N_TOP = 40  # genes of each end of an axis that are compared with the programmes (ours)
MIN_RELATIVE = 0.15  # loading of such a gene, relative to the largest of the axis (ours)
MIN_GENES, MAX_FDR = 3, 1e-3  # of a programme among these genes; false discovery rate of the names (ours)
N_SHOWN = 8  # genes of each end on the page


class End(NamedTuple):
    """One end of an axis."""

    programme: str | None  # None: no known programme fits
    source: str  # of the programme
    genes: list[str]  # those of the programme first, then the largest loadings


class Axis(NamedTuple):
    """An axis of variation within the cell types."""

    number: int  # in the model, from 1
    ends: list[End]  # the end with the larger loadings first; an end without clear genes is left out


def axes_of(checkpoint: dict[str, Any]) -> list[Axis]:
    """The axes of the GMVAE, the strongest first; none for other models. checkpoint: models/gmvae.pt."""
    weights = checkpoint["weights"]
    if "log_profiles" not in weights:
        return []
    loadings = weights["p_x_zyl_log_mean.weight"].double().numpy()
    share = (weights["type_frequency"].double() @ weights["log_profiles"].double().softmax(dim=1)).numpy()
    is_expressed = share >= MIN_SHARE
    if is_expressed.sum() < N_TOP or not loadings.any():
        return []
    loadings, share = loadings[is_expressed], share[is_expressed] / share[is_expressed].sum()
    # the end with the larger loadings becomes the positive one
    loadings *= np.where(loadings.max(axis=0) >= -loadings.min(axis=0), 1, -1)
    strength = np.sqrt(share @ loadings**2)  # of the log fold changes per unit of z, root mean square over the RNA
    axes = [int(j) for j in np.argsort(-strength, kind="stable") if strength[j] > 0]
    tops = [top_genes(side) for j in axes for side in (loadings[:, j], -loadings[:, j])]
    ends = named_ends(tops, np.array(checkpoint["gene_names"])[is_expressed])
    pairs = zip(ends[::2], ends[1::2])
    return [Axis(j + 1, [end for end in pair if end.genes]) for j, pair in zip(axes, pairs)]


def top_genes(loadings: np.ndarray) -> np.ndarray:
    """Indices of the genes with the largest positive loadings, at most `N_TOP`."""
    top = np.argsort(-loadings, kind="stable")[:N_TOP]
    return top[loadings[top] >= MIN_RELATIVE * np.abs(loadings).max()]


def named_ends(tops: list[np.ndarray], gene_names: np.ndarray) -> list[End]:
    """The programme, if any, that has more of the genes of each end than chance explains.

    Chance: as many genes selected at random from all, P(at least so many of the programme) (hypergeometric), corrected for all
    programmes and all ends together (Benjamini and Hochberg 1995).

    Parameters
    ----------
    tops
        Indices of the genes of each end of all axes, largest loadings first.
    gene_names
        All genes that could be among them.
    """
    table, names = pd.read_csv(TABLE), pd.Series(gene_names)
    patterns = table["genes"].str.replace(" ", "|")
    is_member = np.array([names.str.upper().str.fullmatch(pattern) for pattern in patterns])  # programmes x genes
    n_hits = np.array([is_member[:, top].sum(axis=1) for top in tops])  # ends x programmes
    n_top = np.array([[len(top)] for top in tops])
    p = hypergeom.sf(n_hits - 1, len(names), is_member.sum(axis=1), n_top)
    fdr = false_discovery_control(p.ravel()).reshape(p.shape)
    p = np.where((n_hits >= MIN_GENES) & (fdr <= MAX_FDR), p, np.nan)
    ends = []
    for top, p_of_end in zip(tops, p):
        programme, source = None, ""
        if np.isfinite(p_of_end).any():
            best = np.nanargmin(p_of_end)
            programme, source = table.loc[best, ["programme", "source"]]
            top = top[np.argsort(~is_member[best, top], kind="stable")]
        ends.append(End(programme, source, list(names[top[:N_SHOWN]])))
    return ends


def axis_sentence(axis: Axis) -> str:
    """Such as "interferon response (ISG15, IFI6, ...), opposite RPL3, RPS2, ..."."""
    if not axis.ends:
        return "no gene stands out"
    lists = [(end.programme, ", ".join(end.genes)) for end in axis.ends]
    words = [genes if programme is None else f"{programme} ({genes})" for programme, genes in lists]
    unnamed = all(end.programme is None for end in axis.ends)
    return ("no known programme; " if unnamed else "") + ", opposite ".join(words)
