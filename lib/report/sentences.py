"""Numbers of the evaluation in words. Every threshold stands at the top, and the page states it.

A verdict compares generated cells with test cells, and real train cells with the same test cells: what real cells do not reach, no
generator is asked to reach.
"""

from typing import NamedTuple

import numpy as np
import pandas as pd

MIN_TRAIN_CELLS = 30  # of a type, for a verdict: the paper drops smaller clusters
N_ERRORS = 2  # standard errors by which a classifier must exceed both guessing and real cells
SMALL_AUC, CLEAR_AUC = 0.70, 0.85  # below: small differences; below: clear differences; else: easily told apart (ours)
AS_GOOD, SLIGHTLY, CLEARLY = 0.05, 0.25, 0.5  # share of the way from real cells to the worst value of a metric (ours)
AS_GOOD_RATIO, SLIGHTLY_RATIO, CLEARLY_RATIO = 1.25, 2.0, 4.0  # of the errors of a metric without a worst value (ours)
LEVELS = ("as good as real cells", "slightly worse than real cells", "clearly worse than real cells",
          "much worse than real cells")  # fmt: skip
CLASSIFIERS = {"forest AUC": "random forest", "linear AUC": "linear classifier"}


class Metric(NamedTuple):
    """How a metric of metrics.csv is read."""

    title: str
    best: float
    worst: float | None  # None: the metric has no worst value
    sentence: str  # with {generated} and {real}, formatted as `percent` says
    percent: bool = False


METRICS = {
    "forest AUC": Metric(
        "Told apart by a random forest", 0.5, 1.0,
        "Of one real and one generated cell, a random forest picks the generated one in {generated} of all pairs; "
        "it picks a real train cell in {real}. Guessing has 50 %.", True,
    ),
    "linear AUC": Metric(
        "Told apart by single genes", 0.5, 1.0,
        "The same of a linear classifier on single genes and counts per cell: {generated} for generated cells, {real} for real ones.", True,
    ),
    "iLISI": Metric(
        "Mixing of real and generated cells", 2.0, 1.0,
        "A cell's neighbourhood holds {generated} sets of cells on average, {real} if both sets are real; 2 is a perfect mixture.",
    ),
    "MMD": Metric(
        "Distance of the two clouds of cells", 0.0, None,
        "The distance between the distributions is {generated}; between two sets of real cells it is {real}. 0 is best.",
    ),
    "gene correlation r": Metric(
        "Genes that vary together", 1.0, 0.0,
        "The correlations between genes agree with r = {generated}; those of two sets of real cells agree with r = {real}.",
    ),
    "gene mean MAE": Metric(
        "Mean expression", 0.0, None,
        "The mean of a gene is off by {generated} on average, in log(1 + counts per 10,000); by {real} for real cells.",
    ),
    "gene zeros MAE": Metric(
        "Zeros", 0.0, 1.0,
        "The share of cells without any count of a gene is off by {generated} on average; by {real} for real cells.", True,
    ),
    "library size KS": Metric(
        "Counts per cell", 0.0, 1.0,
        "The distributions of counts per cell are at most {generated} apart; those of two sets of real cells {real}.", True,
    ),
    "genes detected KS": Metric(
        "Genes detected per cell", 0.0, 1.0,
        "The distributions of the number of genes detected are at most {generated} apart; those of two sets of real cells {real}.", True,
    ),
    "marker overlap": Metric(
        "Marker genes", 1.0, 0.0,
        "Of a type's 50 strongest marker genes, generated and real cells share {generated}; two sets of real cells share {real}.", True,
    ),
    "F1 train on these, test on real": Metric(
        "Usefulness for naming cells", 1.0, 0.0,
        "A classifier that learns the cell types from generated cells and names real ones reaches F1 = {generated}; "
        "one that learns from real cells {real}.",
    ),
}  # fmt: skip


class Reading(NamedTuple):
    """One metric in words."""

    metric: str
    title: str
    generated: str
    real: str
    sentence: str
    level: str


class Verdict(NamedTuple):
    """One cell type in words."""

    cell_type: str
    n_train: int
    n_test: int  # compared with as many generated cells
    generated: float  # AUC of the classifier that tells generated cells apart best; NaN: not measured
    real: float  # of the same classifier, of train cells
    kind: str  # one of good, small, clear, bad, unknown
    text: str


def percent(share: float, digits: int = 0) -> str:
    """Such as "59 %"; a share between 0 and half of the last digit is "< 1 %"."""
    if not np.isfinite(share):
        return "unknown"
    smallest = 10.0**-digits
    if 0 < 100 * share < smallest / 2:
        return f"< {smallest:g} %"
    return f"{100 * share:.{digits}f} %"


def level(generated: float, real: float, best: float, worst: float | None) -> str:
    """How much worse generated cells are than real ones, as one of `LEVELS`; "not measured" for NaN."""
    if not np.isfinite([generated, real]).all():
        return "not measured"
    of_generated, of_real = abs(generated - best), abs(real - best)
    if worst is None:
        if of_generated <= of_real:
            return LEVELS[0]
        excess, limits = of_generated / max(of_real, 1e-12), (AS_GOOD_RATIO, SLIGHTLY_RATIO, CLEARLY_RATIO)
    else:
        room = max(abs(worst - best) - of_real, 1e-12)
        excess, limits = (of_generated - of_real) / room, (AS_GOOD, SLIGHTLY, CLEARLY)
    return LEVELS[int(np.searchsorted(limits, excess))]


def metric_readings(metrics: pd.DataFrame) -> list[Reading]:
    """The metrics over all cells in words. metrics: metrics.csv."""
    pooled = metrics[metrics["cells"] == "all"].set_index("figure")
    readings = []
    for name, (title, best, worst, sentence, is_share) in METRICS.items():
        if name in pooled.index:
            generated, real = (float(pooled.loc[name, column]) for column in ("generated", "real"))
            ours, reference = (percent(value) if is_share else f"{value:.3g}" for value in (generated, real))
            text = sentence.format(generated=ours, real=reference)
            readings.append(Reading(name, title, ours, reference, text, level(generated, real, best, worst)))
    return readings


def auc_error(auc: float, n_first: int, n_second: int) -> float:
    """Standard error of an AUC (Hanley and McNeil 1982, eq. 1). auc: below 0.5 it is taken as 0.5."""
    a = max(auc, 0.5)
    q1, q2 = a / (2 - a), 2 * a**2 / (1 + a)
    variance = a * (1 - a) + (n_first - 1) * (q1 - a**2) + (n_second - 1) * (q2 - a**2)
    return float(np.sqrt(max(variance, 0) / (n_first * n_second)))


def type_verdicts(metrics: pd.DataFrame, n_train: pd.Series, n_test: pd.Series) -> list[Verdict]:
    """Whether the generated cells of each type can be told from real ones.

    The verdict is that of the classifier (random forest or linear) that exceeds the value of real cells most.

    Parameters
    ----------
    metrics
        metrics.csv.
    n_train, n_test
        Cells of each type to train on, and cells that were compared; same index.
    """
    auc = metrics[metrics["figure"].isin(list(CLASSIFIERS))]
    verdicts = []
    for name in n_train.index:
        counts = int(n_train[name]), int(n_test[name])
        of_type = auc[auc["cells"] == str(name)]
        if of_type.empty:
            text = f"not judged: {counts[1]} test cells are too few"
            verdicts.append(Verdict(str(name), *counts, np.nan, np.nan, "unknown", text))
            continue
        worst = of_type.loc[(of_type["generated"] - of_type["real"]).idxmax()]
        generated, real = float(worst["generated"]), float(worst["real"])
        verdicts.append(Verdict(str(name), *counts, generated, real, *verdict(generated, real, *counts)))
    return [few_train_cells(one) for one in verdicts]


def few_train_cells(one: Verdict) -> Verdict:
    """The same verdict; "not reliable" if the type has fewer than `MIN_TRAIN_CELLS` train cells."""
    if one.n_train >= MIN_TRAIN_CELLS:
        return one
    return one._replace(kind="unknown", text=f"{one.n_train} train cells, not reliable")


def verdict(generated: float, real: float, n_train: int, n_test: int) -> tuple[str, str]:
    """Kind and words of a verdict from the AUC of generated cells and of real train cells, each against `n_test` test cells."""
    n_real = max(min(n_train, n_test), 2)
    own_error = auc_error(generated, n_test, n_test)
    error = float(np.hypot(own_error, auc_error(real, n_test, n_real)))
    if not (generated - 0.5 > N_ERRORS * own_error and generated - real > N_ERRORS * error):
        if 0.5 + N_ERRORS * error > SMALL_AUC:
            return (
                "good",
                f"cannot be told from real cells, but with {n_test} test cells only large differences would show",
            )
        return "good", "cannot be told from real cells"
    if generated < SMALL_AUC:
        return "small", "small differences from real cells"
    if generated < CLEAR_AUC:
        return "clear", "clear differences from real cells"
    return "bad", "easily told from real cells"


def joined(names: list[str], most: int = 4) -> str:
    """Such as "A, B and C"; longer lists end with the number of the others."""
    if len(names) > most:
        return f"{', '.join(names[:most])} and {len(names) - most} more"
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def cells_sentence(readings: list[Reading], verdicts: list[Verdict]) -> str:
    """The answer to "are the generated cells good?" in two sentences."""

    def of_kind(*kinds: str) -> list[str]:
        return [one.cell_type for one in verdicts if one.kind in kinds]

    good, small, large, unknown = of_kind("good"), of_kind("small"), of_kind("clear", "bad"), of_kind("unknown")
    n_judged = len(good) + len(small) + len(large)
    parts = []
    if n_judged:
        parts.append(
            f"Generated cells cannot be told from real cells in {len(good)} of {n_judged} types with enough cells."
        )
    if small:
        parts.append(f"They differ a little in {joined(small)}.")
    if large:
        parts.append(f"They differ clearly in {joined(large)}.")
    if unknown:
        parts.append(f"Too few cells for a verdict: {joined(unknown)}.")
    levels = pd.Series([one.level for one in readings if one.level in LEVELS])
    if len(levels):
        counts = levels.value_counts().reindex(LEVELS, fill_value=0)
        parts.append(
            f"Over all cells, {counts.iloc[0]} of {len(levels)} metrics are as good as those of real cells, "
            f"{counts.iloc[1]} slightly worse, {counts.iloc[2:].sum()} clearly or much worse."
        )
    return " ".join(parts)
