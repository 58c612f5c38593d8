"""The sentences follow from the numbers: verdicts, levels, warnings and names of axes, each against numbers worked out elsewhere."""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import rankdata

from lib.bulk.deconvolution import Estimate
from lib.bulk.rna_content import UNKNOWN_LOG_SD
from lib.report import sentences


def test_the_error_of_an_auc_is_that_of_simulated_scores():
    """Exponential scores have the AUC r / (1 + r) for a ratio r of their means, the case for which the formula is exact."""
    rng = np.random.default_rng(0)
    for ratio, n, m in ((1.0, 40, 40), (3.0, 30, 60)):
        is_second = np.arange(n + m) >= n
        ranks = rankdata(rng.exponential(np.where(is_second, ratio, 1.0), (4000, n + m)), axis=1)
        auc = (ranks[:, n:].sum(axis=1) - m * (m + 1) / 2) / (n * m)  # Mann and Whitney's U
        expected = ratio / (1 + ratio)
        assert abs(np.mean(auc) - expected) < 0.005
        # n cells of the class with the lower scores
        assert sentences.auc_error(expected, m, n) == pytest.approx(np.std(auc), rel=0.05)


@pytest.mark.parametrize(
    ("generated", "real", "n_train", "n_cells", "level", "text"),
    [
        (0.52, 0.50, 6000, 2000, "good", "cannot be told from real cells"),
        (0.62, 0.60, 600, 200, "good", "cannot be told from real cells"),  # real cells are told apart as easily
        (0.74, 0.56, 96, 32, "unknown", "not shown to differ (AUC 74 %, 62-86 %): too few cells to judge"),
        (0.90, 0.89, 6000, 2000, "unknown", "not shown to differ (AUC 90 %, 89-91 %): real cells have 89 %"),
        (0.64, 0.50, 600, 200, "small", "small differences from real cells"),
        (0.80, 0.50, 600, 200, "clear", "clear differences from real cells"),
        (0.95, 0.50, 600, 200, "bad", "easily told from real cells"),
        (0.50, 0.50, 10, 200, "unknown", "10 train cells, not reliable"),
    ],
)
def test_a_verdict_weighs_the_difference_by_its_error(generated, real, n_train, n_cells, level, text):
    verdict = sentences.verdict("T", generated, real, n_train, n_cells)
    assert (verdict.level, verdict.text) == (level, text)


def test_only_types_that_were_judged_count_as_good():
    auc = [("all", 0.7, 0.5, 900), ("A", 0.5, 0.5, 2000), ("B", 0.74, 0.56, 32), ("C", 0.64, 0.5, 200), ("D", 0.5, 0.5, 300)]  # fmt: skip
    rows = [(cells, figure, *row) for cells, *row in auc for figure in ("forest AUC", "linear AUC")]
    rows[-1] = ("D", "linear AUC", 0.9, 0.5, 300)  # the classifier that exceeds real cells most decides
    rows += [("all", "MMD", 0.1, 1e-6, 900), ("all", "iLISI", 1.834, 1.882, 900)]  # MMD of real cells: noise about 0
    metrics = pd.DataFrame(rows, columns=["cells", "figure", "generated", "real", "n_cells"])
    verdicts = sentences.type_verdicts(metrics, pd.Series({"A": 6000, "B": 96, "C": 600, "D": 900, "NK": 40}))
    assert [one.level for one in verdicts] == ["good", "unknown", "small", "bad", "unknown"]
    assert [one.n_cells for one in verdicts] == [2000, 32, 200, 300, 0]
    readings = sentences.metric_readings(metrics).set_index("figure")
    assert "generated one in 70 % of all pairs; it picks a real train cell in 50 %" in readings["sentence"].iloc[0]
    assert list(readings.loc["iLISI", ["generated", "real", "level"]]) == ["1.83", "1.88", "small"]
    assert sentences.cells_sentence(readings, verdicts) == (
        "Generated cells cannot be told from real cells in 1 of 3 types that could be judged. They differ a little in C. "
        "They differ clearly in D. 2 of 5 types could not be judged: B and NK. "
        "Over all cells, 0 of 3 metrics are as good as those of real cells, 1 slightly worse, 2 clearly or much worse."
    )


@pytest.mark.parametrize(
    ("generated", "real", "best", "worst", "expected"),
    [
        (0.52, 0.50, 0.5, 1.0, "good"),  # 4 % of the way from 0.50 to 1
        (0.60, 0.50, 0.5, 1.0, "small"),
        (0.90, 0.50, 0.5, 1.0, "bad"),
        (0.40, 0.50, 0.5, 1.0, "small"),  # below guessing is as far from it as above
        (0.95, 0.90, 1.0, 0.0, "good"),  # better than real cells
        (0.15, 0.10, 0.0, np.nan, "small"),
        (0.50, 0.10, 0.0, np.nan, "bad"),
        (0.51, np.nan, 0.5, 1.0, "unknown"),
    ],
)
def test_a_level_is_the_way_from_real_cells_to_the_worst_value(generated, real, best, worst, expected):
    assert sentences.level(generated, real, best, worst) == expected


def estimate(shares: dict[str, list[float]], **quality) -> Estimate:
    table = pd.DataFrame(shares, index=[f"sample {i}" for i in range(len(next(iter(shares.values()))))])
    samples = {"reference_r": 0.9, "is_unlike_reference": False, "unexplained_genes": [()] * len(table)} | quality
    spread = table * 0 + 0.01
    return Estimate(table, spread, table, spread, pd.DataFrame(), pd.DataFrame(samples, table.index), table, None, 10)


def test_the_summary_of_a_bulk_names_its_largest_types_with_intervals():
    one = estimate({"T": [0.6], "B": [0.3], "NK": [0.01], "rare": [0.0]})  # t(0.975, 9) = 2.262
    text = "sample sample 0 are T 60 % (58-62 %), B 30 % (28-32 %) and NK 1 % (0-3 %), with 95 % intervals."
    assert sentences.bulk_summary(one) == f"The most frequent cell types of {text}"
    assert "are T 60 %, B 30 % and NK 1 %." in sentences.bulk_summary(one._replace(spread=one.spread * np.nan))
    assert "T 60 % (50-70 %)" in sentences.bulk_summary(estimate({"T": [0.5, 0.7], "B": [0.5, 0.3]}))


def test_warnings_say_what_and_what_to_do():
    assert sentences.advice(estimate({"T": [0.6], "B": [0.4]}), 0.95, None) == []
    content = pd.DataFrame({"log_sd": [0.3, UNKNOWN_LOG_SD]}, ["T", "B"])
    merged = pd.DataFrame({"cell_types": [("CD4", "CD8")], "proportion": 0.4, "low": 0.36, "high": 0.44})
    genes = [("S100A8", "G0S2", "FCGR3B")]
    bad = estimate({"T": [1.0], "B": [0.0]}, reference_r=0.31, is_unlike_reference=True, unexplained_genes=genes)
    cases = sentences.advice(bad._replace(merged=merged), 0.6, content)
    text = " ".join(one.what + one.do for one in cases)
    for part in (
        "(sample 0) do not look like any", "correlation is 0.31", "BULK_UNITS", "only 60 % of the genes", "GENE_IDS",
        "neutrophil, which the reference lacks", "not published for B", "No sample holds cells of B",
        "hardly distinguishes CD4 from CD8 (sum 40 %, 36-44 %)",
    ):  # fmt: skip
        assert part in text
    assert [one.is_serious for one in cases] == [True] * 3 + [False] * 3


def test_an_axis_has_the_name_of_the_programme_that_its_genes_belong_to():
    interferon, ribosomal = ["ISG15", "IFI6", "IFIT3", "MX1"], ["RPL3", "RPS2", "RPL10A"]
    names = np.array([f"GENE{i}" for i in range(2000)] + interferon + ribosomal + ["OAS1"])
    others, three, two = np.arange(30), np.arange(2004, 2007), np.arange(2000, 2002)
    tops = [np.append(others, np.arange(2000, 2004)), three, others, np.append(others, two)]  # two genes name nothing
    ends = sentences.named_ends(tops, names)
    assert [end.programme for end in ends] == ["interferon response", "ribosomal proteins", None, None]
    assert ends[0].genes == [*interferon, *names[:4]] and "MSigDB" in ends[0].source


def test_names_of_programmes_are_corrected_for_all_axes_together():
    """3 of 40 genes are the 3 of a programme among 2,003: p = 7.4e-6; times 28 lists below 0.001, times 28 lists and 40 ends above."""
    names = np.array([f"GENE{i}" for i in range(2000)] + ["RPL3", "RPS2", "RPL10A"])
    top = np.append(np.arange(37), [2000, 2001, 2002])
    assert sentences.named_ends([top], names)[0].programme == "ribosomal proteins"
    random = [np.arange(40 * i, 40 * i + 40) for i in range(1, 40)]
    assert sentences.named_ends([top, *random], names)[0].programme is None
