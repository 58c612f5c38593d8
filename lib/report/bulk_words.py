"""What is in the bulk: the proportions with their intervals as rows of a table, and warnings with what to do about them."""

import re
from typing import NamedTuple

import numpy as np
import pandas as pd

from lib.bulk.deconvolution import FAR_ABOVE, MIN_R, Estimate
from lib.bulk.rna_content import KINDS, kind_of
from lib.report.sentences import joined, percent

N_SD = 2  # standard deviations to each side of an interval: about 95 %
FEW_SHARED = 0.8  # share of the reference's signature genes below which the bulk has few of them (ours)
ABSENT = 0.001  # largest share of a type that is called absent (ours)
WIDE = 0.5  # standard deviation relative to the share, from which an estimate is called uncertain (ours)
COMMON = 0.05  # mean share from which an uncertain type is worth a warning (ours)
N_HINT = 2  # unexplained genes that are markers of a kind of cell, for a hint (ours)


class Share(NamedTuple):
    """One type in one sample; shares from 0 to 1."""

    sample: str
    cell_type: str
    cells: float
    cells_interval: tuple[float, float] | None  # None: the method gives no spread
    rna: float | None  # None: the method predicts shares of cells alone
    rna_interval: tuple[float, float] | None
    true: float | None  # share of cells, where it is known


class Advice(NamedTuple):
    """A warning in plain words."""

    what: str
    do: str
    is_serious: bool = True


def shares(estimate: Estimate, truth: pd.Series | None) -> list[Share]:
    """One row per sample and type, in the order of the tables. truth: true shares of cells of the only sample, by type."""
    has_rna = estimate.signature is not None
    rows = []
    for i, sample in enumerate(estimate.proportions.index):
        for k, name in enumerate(estimate.proportions.columns):
            values = [float(table.iat[i, k]) for table in estimate[:4]]
            cells, spread, rna, rna_spread = values
            rows.append(
                Share(
                    str(sample),
                    str(name),
                    cells,
                    interval(cells, spread),
                    rna if has_rna else None,
                    interval(rna, rna_spread) if has_rna else None,
                    None if truth is None else float(truth[name]),
                )
            )
    return rows


def interval(share: float, spread: float) -> tuple[float, float] | None:
    """`N_SD` standard deviations to each side, within 0 and 1; None without a spread."""
    if not np.isfinite(spread):
        return None
    return max(0.0, share - N_SD * spread), min(1.0, share + N_SD * spread)


def summary(estimate: Estimate) -> str:
    """The answer to "what is in my bulk?" in one or two sentences."""
    mean = estimate.proportions.mean().sort_values(ascending=False, kind="stable")
    top = [str(name) for name in mean.index[mean > ABSENT][:3]]
    if len(estimate.proportions) == 1:
        sample, row = str(estimate.proportions.index[0]), estimate.proportions.iloc[0]
        parts = []
        for name in top:
            limits = interval(float(row[name]), float(estimate.spread.iloc[0][name]))
            parts.append(f"{name} {percent(row[name])}" + ("" if limits is None else f" ({between(limits)})"))
        return f"The most frequent cell types of sample {sample} are {joined(parts)}."
    lowest, highest = estimate.proportions.min(), estimate.proportions.max()
    parts = [f"{name} {percent(mean[name])} (from {percent(lowest[name])} to {percent(highest[name])})" for name in top]
    return (
        f"The most frequent cell types of the {len(estimate.proportions):,} samples are, on average, {joined(parts)}."
    )


def between(limits: tuple[float, float], digits: int = 0) -> str:
    """An interval of shares, such as "38 to 52 %"."""
    return f"{100 * limits[0]:.{digits}f} to {100 * limits[1]:.{digits}f} %"


def advice(estimate: Estimate, coverage: float | None, content: pd.DataFrame | None) -> list[Advice]:
    """Everything that a reader must know before using the proportions, the most serious first.

    Parameters
    ----------
    coverage
        Share of the signature genes of the reference that the bulk has; None: not known.
    content
        Table of `rna_content.rna_per_cell`; None if the shares of RNA were not turned into shares of cells by it.
    """
    found = [unlike_the_reference(estimate), few_shared_genes(coverage), missing_types(estimate)]
    found += [unknown_rna_content(content), *hardly_distinguished(estimate), uncertain(estimate), absent(estimate)]
    listed = [one for one in found if one is not None]
    return sorted(listed, key=lambda one: not one.is_serious)


def unlike_the_reference(estimate: Estimate) -> Advice | None:
    if "warning" not in estimate.samples:
        return None
    bad = estimate.samples[estimate.samples["warning"] != ""]
    if bad.empty:
        return None
    r = bad["reference_r"]
    which = f"{len(bad)} of {len(estimate.samples)} samples ({joined([str(name) for name in bad.index])})"
    return Advice(
        f"{which} do not look like any mixture of the cell types of the reference: the correlation is {r.min():.2f} to {r.max():.2f}, "
        f"expected at least {MIN_R}.",
        "Do not use these proportions before you know why: is it the same tissue and species, are the units right (BULK_UNITS), "
        "does the reference hold all cell types of this tissue?",
    )


def few_shared_genes(coverage: float | None) -> Advice | None:
    if coverage is None or coverage >= FEW_SHARED:
        return None
    return Advice(
        f"The bulk has only {percent(coverage)} of the genes that distinguish the cell types in the reference.",
        "Check that both use the same gene names and the same species; a bulk with Ensembl IDs needs GENE_IDS. "
        "If the bulk is a panel or an array of few genes, trust the wider intervals.",
    )


def missing_types(estimate: Estimate) -> Advice | None:
    """Genes that the mixture of the reference does not explain, in at least half of the samples, and whose markers they are."""
    if "unexplained_genes" not in estimate.samples or not len(estimate.samples):
        return None
    listed = [gene for genes in estimate.samples["unexplained_genes"] for gene in str(genes).split(", ") if gene]
    counts = pd.Series(listed, dtype=object).value_counts()
    genes = [str(gene) for gene in counts.index[counts >= max(1, len(estimate.samples) / 2)]]
    if not genes:
        return None
    present = {kind_of(str(name)) for name in estimate.proportions}
    hints = [
        kind for kind, (_, markers) in KINDS.items() if kind not in present and len(set(genes) & set(markers)) >= N_HINT
    ]
    hint = ""
    if hints:
        hint = f" These are markers of another kind of cell, {joined(hints)}, which the reference lacks."
    return Advice(
        f"The bulk has more than {FAR_ABOVE} times as much of {joined(genes, 8)} as the reference explains.{hint}",
        "This can be a difference between the technologies, or a cell type that the reference lacks. The share of such a type is divided "
        "among the others, because shares always sum to 1: compare the genes with the markers of the types that you expect.",
        is_serious=bool(hints),
    )


def unknown_rna_content(content: pd.DataFrame | None) -> Advice | None:
    if content is None:
        return None
    unknown = [
        str(name) for name, source in content["source"].items() if source.endswith("scaled") and "counts" in source
    ]
    if not unknown:
        return None
    return Advice(
        f"How much RNA a cell holds is not published for {joined(unknown)}; the counts per cell of the reference are used instead.",
        "Their shares of cells may be wrong by a factor of up to 3. Compare the shares of RNA, which do not need this number, or give "
        "RNA_PER_CELL a table with values that you know.",
        is_serious=False,
    )


def hardly_distinguished(estimate: Estimate) -> list[Advice]:
    found = []
    if len(estimate.merged):
        for names, rows in estimate.merged.groupby("cell_types"):
            total = f"{percent(rows['proportion'].mean())} ± {percent(N_SD * rows['spread'].mean())}"
            found.append(
                Advice(
                    f"The bulk hardly distinguishes {' from '.join(str(names).split(' + '))}.",
                    f"Use their sum, which is more certain: {total} of the cells (mean of the samples; predicted_merged.csv).",
                    is_serious=False,
                )
            )
    return found


def uncertain(estimate: Estimate) -> Advice | None:
    mean, sd = estimate.proportions.mean(), estimate.spread.mean()
    names = [str(name) for name in mean.index if mean[name] >= COMMON and sd[name] >= WIDE * mean[name]]
    if not names:
        return None
    return Advice(
        f"The shares of {joined(names)} are uncertain: their intervals are as wide as the shares themselves, or wider.",
        "Do not interpret differences between samples that are smaller than the intervals.",
        is_serious=False,
    )


def absent(estimate: Estimate) -> Advice | None:
    names = [str(name) for name, top in estimate.proportions.max().items() if top <= ABSENT]
    if not names:
        return None
    return Advice(
        f"No sample holds cells of {joined(names)}: their shares are estimated as 0.",
        "They may still be present in small numbers, or in a state that differs from that of the reference.",
        is_serious=False,
    )


def mixture_sentence(accuracy: pd.DataFrame | None, method: str) -> str:
    """How exact the method is on mixtures of test cells; empty where that was not measured. accuracy: mixtures.csv."""
    if accuracy is None:
        return ""
    table = accuracy[~accuracy["mixtures of test cells"].str.startswith("own")].set_index("deconvolution")["MAE"]
    constant = table.filter(regex="^constant")
    if method not in table or constant.empty:
        return ""
    n_mixtures = re.findall(r"\d+", str(accuracy["mixtures of test cells"].iloc[-1]))[-1]
    error, guess = (f"{100 * value:.1f} percentage points" for value in (table[method], constant.iloc[0]))
    return (
        f"On {n_mixtures} mixtures of test cells with known, random proportions, an estimated share is off by {error} on "
        f"average; the proportions of the train cells, as a guess for all mixtures, are off by {guess}. A real bulk was measured with "
        "another technology, so expect larger errors there."
    )
