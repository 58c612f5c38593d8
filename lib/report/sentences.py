"""Cells, proportions and axes of variation in words. Every threshold stands at the top, and the page states it.

A verdict compares generated cells with test cells, and real train cells with the same test cells: what real cells do not reach, no
generator is asked to reach.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy.stats import false_discovery_control, hypergeom

from lib.bulk.deconvolution import FAR_ABOVE, MIN_R, Estimate
from lib.bulk.rna_content import KINDS, UNKNOWN_LOG_SD, kind_of

FOLDER = Path(__file__).parent  # of metrics.csv, advice.csv (warnings about a bulk), programmes.csv (of genes)

# Generated cells
MIN_TRAIN_CELLS = 30  # of a type, for a verdict: the paper drops smaller clusters
Z_95 = 1.96  # standard errors to each side of a 95 % interval
SMALL_AUC, CLEAR_AUC = 0.70, 0.85  # below: small differences; below: clear differences; else: easily told apart (ours)
AS_GOOD, SLIGHTLY, CLEARLY = 0.05, 0.25, 0.5  # share of the way from real cells to the worst value of a metric (ours)
AS_GOOD_RATIO, SLIGHTLY_RATIO, CLEARLY_RATIO = 1.25, 2.0, 4.0  # of the errors of a metric without a worst value (ours)
LEVELS = {  # in words: of a metric over all cells, of a cell type
    "good": ("as good as real cells", "cannot be told from real cells"),
    "small": ("slightly worse than real cells", "small differences from real cells"),
    "clear": ("clearly worse than real cells", "clear differences from real cells"),
    "bad": ("much worse than real cells", "easily told from real cells"),
    "unknown": ("not judged", "not judged: too few cells to compare"),
}

# Proportions
FEW_SHARED = 0.8  # share of the reference's signature genes below which the bulk has few of them (ours)
ABSENT = 0.001  # largest share of a type that is called absent (ours)
WIDE = 0.5  # standard deviation relative to the share, from which an estimate is called uncertain (ours)
COMMON = 0.05  # mean share from which an uncertain type is worth a warning (ours)
N_HINT = 2  # unexplained genes that are markers of a kind of cell, for a hint (ours)

# Axes of variation
MIN_SHARE = 2e-5  # of all RNA, mean over cells: less expressed genes do not name an axis (ours)
N_TOP = 40  # genes of each end of an axis that are compared with the programmes (ours)
MIN_RELATIVE = 0.15  # loading of such a gene, relative to the largest of the axis (ours)
MIN_GENES, MAX_FDR = 3, 1e-3  # of a programme among these genes; false discovery rate of the names (ours)
N_SHOWN = 8  # genes of each end on the page


def percent(share: float, digits: int = 0) -> str:
    """Such as "59 %"; a share between 0 and half of the last digit is "< 1 %"; "-" for NaN."""
    if not np.isfinite(share):
        return "-"
    smallest = 10.0**-digits
    return f"< {smallest:g} %" if 0 < 100 * share < smallest / 2 else f"{100 * share:.{digits}f} %"


def between(low: float, high: float, digits: int = 0) -> str:
    """An interval of shares, such as "38-52 %"."""
    return f"{100 * low:.{digits}f}-{100 * high:.{digits}f} %"


def joined(names: list[str], most: int = 6) -> str:
    """Such as "A, B and C"; longer lists end with the number of the others."""
    shown = names if len(names) <= most else [*names[:most], f"{len(names) - most} more"]
    return " and ".join(filter(None, [", ".join(shown[:-1]), *shown[-1:]]))


# --- generated cells


def level(generated: float, real: float, best: float, worst: float) -> str:
    """How much worse generated cells are than real ones, a key of `LEVELS`; worst: NaN if the metric has no worst value."""
    if not np.isfinite(real):
        return "unknown"
    error, real_error = abs(generated - best), abs(real - best)
    if np.isnan(worst):
        excess, limits = error / max(real_error, 1e-12), (AS_GOOD_RATIO, SLIGHTLY_RATIO, CLEARLY_RATIO)
    else:
        room = max(abs(worst - best) - real_error, 1e-12)
        excess, limits = (error - real_error) / room, (AS_GOOD, SLIGHTLY, CLEARLY)
    return list(LEVELS)[int(np.searchsorted(limits, excess))]


def metric_readings(metrics: pd.DataFrame) -> pd.DataFrame:
    """The metrics over all cells in words: columns title, generated, real, sentence, level. metrics: fig/metrics.csv."""
    values = metrics[metrics["cells"] == "all"].set_index("figure")[["generated", "real"]].dropna(subset="generated")
    table = pd.read_csv(FOLDER / "metrics.csv").join(values, on="figure", how="inner")
    table["level"] = [level(row.generated, row.real, row.best, row.worst) for row in table.itertuples()]
    for name in ("generated", "real"):
        table[name] = table[name].map(percent).where(table["is_share"], table[name].map("{:.3g}".format))
    table["sentence"] = [row.sentence.format(generated=row.generated, real=row.real) for row in table.itertuples()]
    return table


def auc_error(auc: float, n_first: int, n_second: int) -> float:
    """Standard error of an AUC (Hanley and McNeil 1982, eq. 1). auc: below 0.5 it is taken as 0.5."""
    a = max(auc, 0.5)
    q1, q2 = a / (2 - a), 2 * a**2 / (1 + a)
    variance = a * (1 - a) + (n_first - 1) * (q1 - a**2) + (n_second - 1) * (q2 - a**2)
    return float(np.sqrt(max(variance, 0) / (n_first * n_second)))


class Verdict(NamedTuple):
    """Whether the generated cells of a type can be told from real ones."""

    cell_type: str
    n_train: int
    n_cells: int = 0  # test cells, compared with as many generated cells; 0: too few for a comparison
    level: str = "unknown"  # a key of LEVELS
    text: str = LEVELS["unknown"][1]
    generated: float = np.nan  # AUC of the classifier that tells the generated cells apart best, NaN: not measured
    low: float = np.nan  # 95 % interval of `generated`
    high: float = np.nan
    real: float = np.nan  # AUC of the same classifier for train cells


def type_verdicts(metrics: pd.DataFrame, n_train: pd.Series) -> list[Verdict]:
    """A verdict of each type. metrics: fig/metrics.csv; n_train: train cells of each type."""
    auc = metrics[metrics["figure"].isin(["forest AUC", "linear AUC"])]
    excess = (auc["generated"] - auc["real"]).sort_values()
    auc = auc.loc[excess.index].drop_duplicates("cells", keep="last")  # of the classifier that exceeds real cells most
    verdicts = {name: Verdict(str(name), int(n)) for name, n in n_train.items()}
    for row in auc[auc["cells"].isin(n_train.index)].itertuples():
        verdicts[row.cells] = verdict(row.cells, row.generated, row.real, int(n_train[row.cells]), row.n_cells)
    return list(verdicts.values())


def verdict(cell_type: str, generated: float, real: float, n_train: int, n_cells: int) -> Verdict:
    """The verdict from the AUC of generated cells and of real train cells, each against the same `n_cells` test cells.

    The cells differ if the AUC exceeds both 0.5 and that of real cells by more than chance explains. If not, they cannot be told
    apart only if the whole 95 % interval of the AUC lies below `SMALL_AUC`.
    """
    error, real_error = auc_error(generated, n_cells, n_cells), auc_error(real, n_cells, max(min(n_train, n_cells), 2))
    low, high = max(0.0, generated - Z_95 * error), min(1.0, generated + Z_95 * error)
    of_type, real_cells_differ = "unknown", real - 0.5 > Z_95 * real_error
    if n_train < MIN_TRAIN_CELLS:
        text = f"{n_train} train cells, not reliable"
    elif low > 0.5 and generated - real > Z_95 * np.hypot(error, real_error):
        of_type = ("small", "clear", "bad")[int(np.searchsorted((SMALL_AUC, CLEAR_AUC), generated, side="right"))]
        text = LEVELS[of_type][1]
    elif high <= SMALL_AUC:
        of_type, text = "good", LEVELS["good"][1]
    else:
        why = f"real cells have {percent(real)}" if real_cells_differ else "too few cells to judge"
        text = f"not shown to differ (AUC {percent(generated)}, {between(low, high)}): {why}"
    return Verdict(cell_type, n_train, n_cells, of_type, text, generated, low, high, real)


def cells_sentence(readings: pd.DataFrame, verdicts: list[Verdict]) -> str:
    """The answer to "are the generated cells good?" in a few sentences."""
    types = {key: [one.cell_type for one in verdicts if one.level == key] for key in LEVELS}
    unknown, differ = types["unknown"], types["clear"] + types["bad"]
    n_judged, n = len(verdicts) - len(unknown), readings["level"].value_counts().reindex(LEVELS, fill_value=0)
    n_metrics = n.drop("unknown").sum()
    parts = {
        f"Generated cells cannot be told from real cells in {len(types['good'])} of {n_judged} types that could be judged.": n_judged,
        f"They differ a little in {joined(types['small'])}.": types["small"],
        f"They differ clearly in {joined(differ)}.": differ,
        f"{len(unknown)} of {len(verdicts)} types could not be judged: {joined(unknown)}.": unknown,
        f"Over all cells, {n['good']} of {n_metrics} metrics are as good as those of real cells, {n['small']} slightly worse, "
        f"{n['clear'] + n['bad']} clearly or much worse.": n_metrics,
    }
    return " ".join(text for text, applies in parts.items() if applies)


# --- proportions


def bulk_summary(estimate: Estimate) -> str:
    """The answer to "what is in my bulk?" in a sentence."""
    shares = estimate.proportions
    if len(shares) == 1:
        who, what = f"sample {shares.index[0]}", ", with 95 % intervals"
        low, high = (limits.iloc[0] for limits in estimate.interval())
    else:
        who, what = f"the {len(shares):,} samples", ", on average, with the lowest and the highest share"
        low, high = shares.min(), shares.max()
    mean, has_limits = shares.mean().sort_values(ascending=False, kind="stable"), bool(low.notna().all())
    top = mean[mean > ABSENT][:3].items()
    parts = [f"{name} {percent(x)}" + f" ({between(low[name], high[name])})" * has_limits for name, x in top]
    return f"The most frequent cell types of {who} are {joined(parts)}{what * has_limits}."


def advice(estimate: Estimate, coverage: float | None, content: pd.DataFrame | None) -> list[Any]:
    """Everything that a reader must know before using the proportions, the most serious first: rows of advice.csv.

    coverage: share of the signature genes of the reference that the bulk has, None if not known; content: table of
    `rna_content.rna_per_cell`, None if the shares of RNA were not turned into shares of cells by it.
    """
    columns = ["is_unlike_reference", "reference_r", "unexplained_genes"]  # NaN where the method does not give them
    samples, mean = estimate.samples.reindex(columns=columns), estimate.proportions.mean()
    unlike = samples[samples["is_unlike_reference"].eq(True)]
    n_samples = samples["unexplained_genes"].explode().value_counts()
    genes = list(n_samples.index[n_samples >= len(samples) / 2])
    present = {kind_of(str(name)) for name in mean.index}
    n_markers = {name: len(set(kind.markers).intersection(genes)) for name, kind in KINDS.items()}
    missing = [name for name, n in n_markers.items() if n >= N_HINT and name not in present]
    which = {  # names that a case applies to; none: the case does not apply
        "unlike the reference": list(unlike.index.astype(str)),
        "few shared genes": [percent(coverage)] if coverage is not None and coverage < FEW_SHARED else [],
        "missing type": genes if missing else [],
        "unexplained genes": [] if missing else genes,
        "RNA not known": [] if content is None else list(content.index[content["log_sd"] >= UNKNOWN_LOG_SD]),
        "hardly distinguished": merged_types(estimate.merged),
        "uncertain": list(mean.index[(mean >= COMMON) & (estimate.spread.mean() >= WIDE * mean)]),
        "absent": list(mean.index[estimate.proportions.max() <= ABSENT]),
    }
    r = unlike["reference_r"]
    values = {"MIN_R": MIN_R, "FAR_ABOVE": FAR_ABOVE, "missing": joined(missing), "n_samples": len(samples)}
    values |= {"n_unlike": len(unlike), "lowest_r": r.min(), "highest_r": r.max()}
    rows = [row for row in pd.read_csv(FOLDER / "advice.csv").itertuples() if which[row.case]]
    return [row._replace(what=row.what.format(which=joined(which[row.case]), **values)) for row in rows]


def merged_types(merged: pd.DataFrame) -> list[str]:
    """Groups of types that the bulk hardly distinguishes, with the mean over the samples of their sum."""
    rows = merged.groupby("cell_types")[["proportion", "low", "high"]].mean().itertuples() if len(merged) else ()
    return [f"{' from '.join(row.Index)} (sum {percent(row.proportion)}, {between(row.low, row.high)})" for row in rows]


# --- axes of variation


class End(NamedTuple):
    """One end of an axis."""

    programme: str | None  # None: no known gene programme fits
    source: str  # of the programme
    genes: list[str]  # those of the programme first, then the largest loadings


def axes_of(checkpoint: dict[str, Any]) -> list[tuple[int, list[End]]]:
    """Number and ends of every axis of a GMVAE, the strongest first; none for other models. checkpoint: models/gmvae.pt.

    The end with the larger loadings comes first, and an end without clear genes is left out.
    """
    weights = checkpoint["weights"]
    if "log_profiles" not in weights:
        return []
    loadings = weights["p_x_zyl_log_mean.weight"].double().numpy()
    share = (weights["type_frequency"].double() @ weights["log_profiles"].double().softmax(dim=1)).numpy()
    is_expressed = share >= MIN_SHARE
    loadings, share = loadings[is_expressed], share[is_expressed] / share[is_expressed].sum()
    # the end with the larger loadings becomes the positive one
    loadings *= np.where(loadings.max(axis=0) >= -loadings.min(axis=0), 1, -1)
    strength = np.sqrt(share @ loadings**2)  # of the log fold changes per unit of z, root mean square over the RNA
    axes = [int(j) for j in np.argsort(-strength, kind="stable") if strength[j] > 0]
    if not axes:
        return []
    tops = [top_genes(side) for j in axes for side in (loadings[:, j], -loadings[:, j])]
    ends = named_ends(tops, np.array(checkpoint["gene_names"])[is_expressed])
    return [(j + 1, [end for end in pair if end.genes]) for j, pair in zip(axes, zip(ends[::2], ends[1::2]))]


def top_genes(loadings: np.ndarray) -> np.ndarray:
    """Indices of the genes with the largest positive loadings, at most `N_TOP`."""
    top = np.argsort(-loadings, kind="stable")[:N_TOP]
    return top[loadings[top] >= MIN_RELATIVE * np.abs(loadings).max()]


def named_ends(tops: list[np.ndarray], gene_names: np.ndarray) -> list[End]:
    """The programme, if any, that has more of the genes of each end than chance explains.

    Chance: as many genes selected at random from all, P(at least so many of the programme) (hypergeometric), corrected for all
    programmes and all ends together (Benjamini and Hochberg 1995). tops: indices into `gene_names`, largest loadings first.
    """
    table, names = pd.read_csv(FOLDER / "programmes.csv"), pd.Series(gene_names)
    patterns = table["genes"].str.replace(" ", "|")  # regular expressions for whole names in capitals
    is_member = np.array([names.str.upper().str.fullmatch(pattern) for pattern in patterns])  # programmes x genes
    n_hits = np.array([is_member[:, top].sum(axis=1) for top in tops])  # ends x programmes
    n_top = np.array([[len(top)] for top in tops])
    p = hypergeom.sf(n_hits - 1, len(names), is_member.sum(axis=1), n_top)
    fdr = false_discovery_control(p.ravel()).reshape(p.shape)
    p[(n_hits < MIN_GENES) | (fdr > MAX_FDR)] = np.inf
    ends = []
    for top, best, lowest in zip(tops, p.argmin(axis=1), p.min(axis=1)):
        programme, source = table.loc[best, ["programme", "source"]] if lowest < np.inf else (None, "")
        genes = top if programme is None else top[np.argsort(~is_member[best, top], kind="stable")]
        ends.append(End(programme, source, list(names[genes[:N_SHOWN]])))
    return ends


def axis_sentence(ends: list[End]) -> str:
    """Such as "interferon response (ISG15, IFI6, ...), opposite RPL3, RPS2, ..."."""
    if not ends:
        return "no gene stands out"
    lists = [(end.programme, ", ".join(end.genes)) for end in ends]
    words = [genes if programme is None else f"{programme} ({genes})" for programme, genes in lists]
    return "no known programme; " * all(end.programme is None for end in ends) + ", opposite ".join(words)
