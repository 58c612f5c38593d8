"""The sentences follow from the numbers: verdicts, levels, warnings and names of axes, each against numbers worked out elsewhere."""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import rankdata

from lib.bulk.deconvolution import Estimate
from lib.report import bulk_words, programmes, sentences


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
    ("generated", "real", "n_train", "n_test", "kind", "words"),
    [
        (0.52, 0.50, 600, 200, "good", "cannot be told from real cells"),
        (0.62, 0.60, 600, 200, "good", "cannot be told from real cells"),  # real cells are told apart as easily
        (0.60, 0.50, 70, 20, "good", "with 20 test cells only large differences would show"),
        (0.64, 0.50, 600, 200, "small", "small differences from real cells"),
        (0.80, 0.50, 600, 200, "clear", "clear differences from real cells"),
        (0.95, 0.50, 600, 200, "bad", "easily told from real cells"),
    ],
)
def test_a_verdict_weighs_the_difference_by_its_error(generated, real, n_train, n_test, kind, words):
    got_kind, text = sentences.verdict(generated, real, n_train, n_test)
    assert got_kind == kind and words in text


def metrics_table(**auc: tuple[float, float]) -> pd.DataFrame:
    rows = [(name.replace("_", " "), "forest AUC", *values) for name, values in auc.items()]
    rows += [(name.replace("_", " "), "linear AUC", 0.5, 0.5) for name in auc]
    return pd.DataFrame(rows, columns=["cells", "figure", "generated", "real"])


def test_each_type_has_a_verdict_and_few_train_cells_are_not_reliable():
    metrics = metrics_table(all=(0.7, 0.5), B=(0.5, 0.5), Platelet=(0.5, 0.5), T=(0.9, 0.5))
    n_train, n_test = (
        pd.Series({"B": 300, "NK": 40, "Platelet": 10, "T": 900}),
        pd.Series({"B": 100, "NK": 12, "Platelet": 20, "T": 300}),
    )
    verdicts = {one.cell_type: one for one in sentences.type_verdicts(metrics, n_train, n_test)}
    assert verdicts["B"].text == "cannot be told from real cells"
    assert verdicts["Platelet"].text == "10 train cells, not reliable"
    assert verdicts["NK"].text == "not judged: 12 test cells are too few"
    assert verdicts["T"].text == "easily told from real cells" and verdicts["T"].generated == 0.9
    said = sentences.cells_sentence([], list(verdicts.values()))
    assert "cannot be told from real cells in 1 of 2 types" in said and "differ clearly in T." in said
    assert "Too few cells for a verdict: NK and Platelet." in said


def test_the_worse_of_the_two_classifiers_decides():
    metrics = metrics_table(B=(0.5, 0.5))
    metrics.loc[metrics["figure"] == "linear AUC", ["generated", "real"]] = 0.9, 0.5
    (one,) = sentences.type_verdicts(metrics, pd.Series({"B": 500}), pd.Series({"B": 200}))
    assert one.kind == "bad" and one.generated == 0.9


@pytest.mark.parametrize(
    ("generated", "real", "best", "worst", "expected"),
    [
        (0.52, 0.50, 0.5, 1.0, 0),  # 4 % of the way from 0.50 to 1
        (0.60, 0.50, 0.5, 1.0, 1),
        (0.70, 0.50, 0.5, 1.0, 2),
        (0.90, 0.50, 0.5, 1.0, 3),
        (0.40, 0.50, 0.5, 1.0, 1),  # below guessing is as far from it as above
        (0.85, 0.90, 1.0, 0.0, 1),
        (0.95, 0.90, 1.0, 0.0, 0),  # better than real cells
        (0.12, 0.10, 0.0, None, 0),
        (0.15, 0.10, 0.0, None, 1),
        (0.50, 0.10, 0.0, None, 3),
    ],
)
def test_a_level_is_the_way_from_real_cells_to_the_worst_value(generated, real, best, worst, expected):
    assert sentences.level(generated, real, best, worst) == sentences.LEVELS[expected]


def test_a_metric_that_was_not_measured_has_no_level():
    assert sentences.level(np.nan, 0.5, 0.5, 1.0) == "not measured"


def test_the_numbers_of_a_metric_stand_in_its_sentence():
    metrics = pd.DataFrame([("all", "forest AUC", 0.594, 0.52), ("all", "iLISI", 1.834, 1.882), ("B", "iLISI", 1.0, 1.0)],
                           columns=["cells", "figure", "generated", "real"])  # fmt: skip
    forest, ilisi = sentences.metric_readings(metrics)
    assert "59 % of all pairs" in forest.sentence and "in 52 %" in forest.sentence
    assert "holds 1.83 sets" in ilisi.sentence and ilisi.real == "1.88" and ilisi.level == sentences.LEVELS[1]


def estimate(proportions: dict[str, list[float]], spread: float = 0.01, **quality) -> Estimate:
    table = pd.DataFrame(proportions, index=[f"sample {i}" for i in range(len(next(iter(proportions.values()))))])
    samples = pd.DataFrame({"reference_r": 0.9, "unexplained_genes": "", "warning": ""} | quality, index=table.index)
    return Estimate(table, table * 0 + spread, table, table * 0 + spread, pd.DataFrame(), samples, table, None)


def test_the_summary_of_a_bulk_names_its_largest_types():
    one = estimate({"T": [0.6], "B": [0.3], "NK": [0.1], "rare": [0.0]})
    assert bulk_words.summary(one) == (
        "The most frequent cell types of sample sample 0 are T 60 % (58 to 62 %), B 30 % (28 to 32 %) and NK 10 % (8 to 12 %)."
    )
    assert "T 60 % (from 50 % to 70 %)" in bulk_words.summary(estimate({"T": [0.5, 0.7], "B": [0.5, 0.3]}))


def test_intervals_stay_within_0_and_1_and_need_a_spread():
    assert bulk_words.interval(0.01, 0.02) == (0.0, 0.05)
    assert bulk_words.interval(0.5, np.nan) is None


def test_a_bulk_that_fits_has_no_advice():
    assert bulk_words.advice(estimate({"T": [0.6], "B": [0.4]}), 0.95, None) == []


def test_warnings_say_what_and_what_to_do():
    content = pd.DataFrame({"source": ["published, T", "counts per cell of the reference, scaled"]}, ["T", "B"])
    bad = estimate(
        {"T": [1.0], "B": [0.0]},
        warning="unlike the reference",
        reference_r=0.31,
        unexplained_genes="S100A8, G0S2, FCGR3B",
    )
    found = bulk_words.advice(bad, 0.6, content)
    text = " ".join(one.what + one.do for one in found)
    assert "correlation is 0.31" in text and "BULK_UNITS" in text
    assert "only 60 % of the genes" in text and "GENE_IDS" in text
    assert "neutrophil, which the reference lacks" in text
    assert "not published for B" in text and "No sample holds cells of B" in text
    assert [one.is_serious for one in found] == [True, True, True, False, False]


def test_types_that_a_bulk_hardly_distinguishes_are_summed():
    merged = pd.DataFrame({"proportion": [0.4], "spread": [0.02]},
                          pd.MultiIndex.from_tuples([("sample 0", "CD4 + CD8")], names=["sample", "cell_types"]))  # fmt: skip
    (one,) = bulk_words.advice(estimate({"CD4": [0.3], "CD8": [0.7]})._replace(merged=merged), None, None)
    assert "hardly distinguishes CD4 from CD8" in one.what and "40 % ± 4 %" in one.do


def test_an_axis_has_the_name_of_the_programme_that_its_genes_belong_to():
    others = [f"GENE{i}" for i in range(2000)]
    interferon = ["ISG15", "IFI6", "IFIT3", "MX1"]
    universe = [*others, *interferon, "OAS1", "RPL3", "RPS2", "RPL10A"]
    name, source, hits = programmes.best_programme([*others[:30], *interferon], universe)
    assert name == "interferon response" and hits == interferon and "MSigDB" in source
    assert programmes.best_programme(others[:34], universe) is None
    assert programmes.best_programme([*others[:30], *interferon[:2]], universe) is None  # two genes name nothing
    ribosomal = programmes.best_programme(["RPL3", "RPS2", "RPL10A"], universe)
    assert ribosomal is not None and ribosomal[0] == "ribosomal proteins"


def test_every_programme_has_genes_and_a_source():
    table = programmes.read_programmes()
    assert table["programme"].is_unique and not table.isna().any(axis=None)
    for genes in table["genes"].str.split(" "):
        assert len(genes) == len(set(genes)) and len(genes) >= 1
