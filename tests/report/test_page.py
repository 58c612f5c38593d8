"""fig/report.html: self-contained, escaped, and the same in a real browser."""

import base64
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from helpers import ROOT, STAGES

from lib import options
from lib.bulk.deconvolution import Deconvolution, Estimate
from lib.evaluation.plots_cells import COLOURS
from lib.report import page

EVIL = "<script>alert(1)</script>"
EVIL_BULK = "<img src=x onerror=alert(2)>.csv"
TYPES = [EVIL, "type 1", 'type "2" & co']


def results(folder: Path) -> page.Results:
    """A run with three types, one of which has a name that must stay text; two bulk samples, one with such a name."""
    obs = pd.DataFrame({"cell_type": pd.Categorical(TYPES * 40)}, pd.RangeIndex(120).astype(str))
    cells = ad.AnnData(obs=obs, uns={"source": EVIL}), ad.AnnData(obs=obs[:60])  # train, test
    umap = pd.DataFrame({"source": ["test", "generated"] * 30, "cell_type": np.repeat(TYPES, 20)})
    umap[["sample", "library_size", "genes_detected"]] = EVIL, 400, 50
    umap[["umap_1", "umap_2"]] = np.random.default_rng(0).normal(size=(60, 2))
    figures = "forest AUC", "linear AUC", "MMD", "iLISI", "fold change r"
    metrics = [(name, figure, 0.6, 0.5, 57) for name in ("all", *TYPES) for figure in figures]
    shares = pd.DataFrame([[0.2, 0.3, 0.5], [0.6, 0.1, 0.3]], ["first", EVIL], TYPES)
    spread = shares * 0 + 0.02
    quality = {"reference_r": 0.2, "is_unlike_reference": True, "unexplained_genes": [(EVIL,), (EVIL,)]}
    quality = pd.DataFrame(quality, shares.index)
    estimate = Estimate(shares, spread, shares, spread, pd.DataFrame(), quality, shares, None, 10)
    methods = "regression", "constant: train frequencies", "regression"
    tables = {
        "umap": umap,
        "metrics": pd.DataFrame(metrics, columns=["cells", "figure", "generated", "real", "n_cells"]),
        "mixtures": pd.DataFrame(zip(["dirichlet (5)", "dirichlet (5)", "own (5)"], methods, [0.0312, 0.09, 0.5])),
        "predicted_proportions": shares,
        "gmvae_history": pd.DataFrame({"epoch": [1, 2], "train_loss": [3.0, 2.0], "held_out_loss": [3.0, 3.5]}),
    }
    tables["mixtures"].columns = ["mixtures of test cells", "deconvolution", "MAE"]
    for name, table in tables.items():
        table.to_csv(folder / f"{name}.csv")
    *written, history = (folder / f"{name}.csv" for name in tables)
    made_by = {"stage": STAGES[3], "constants": {"GENERATOR": EVIL}, "versions": {"torch": EVIL}, "commit": None}
    checkpoint = {"cell_types": TYPES, "gene_names": ["G1", "G2"], "dataset": EVIL, "epoch": 2, "weights": {}}
    deconvolution = Deconvolution("regression", checkpoint, shares, estimate, None, EVIL_BULK)
    return page.Results(checkpoint, "gmvae", deconvolution, cells, 100 * shares, [made_by], [history], written)


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    return page.write(results(folder), folder / "report.html")


class Elements(HTMLParser):
    """Elements and their attributes, and the text outside of scripts and styles."""

    def __init__(self, path: Path):
        super().__init__()
        self.all: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        self.all.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.all and self.all[-1][0] not in ("script", "style"):
            self.text += data


def test_names_from_users_stay_text(written):
    elements = Elements(written)
    assert EVIL in elements.text and EVIL_BULK in elements.text
    assert "<script>alert" not in written.read_text()
    assert not any("onerror" in attributes for _, attributes in elements.all)
    assert [attributes["value"] for tag, attributes in elements.all if tag == "input"] == TYPES


def test_the_page_holds_all_that_it_shows(written):
    elements = Elements(written).all
    ids = [attributes["id"] for _, attributes in elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for tag, attributes in elements:
        assert tag not in ("iframe", "object", "embed", "base")
        assert tag not in ("script", "img", "link") or attributes.get("src", "data:").startswith("data:"), attributes
        assert tag != "img" or attributes["alt"]
        assert attributes.get("href", "data:").startswith("data:") or attributes["href"][1:] in ids, attributes
    assert not re.search(r"url\((?!['\"]?data:)|@import", (page.TEMPLATES / "style.css").read_text())
    links = {a["download"]: a["href"] for tag, a in elements if tag == "a" and "download" in a}
    content = base64.b64decode(links["predicted_proportions.csv"].partition(",")[2])
    assert content == (written.parent / "predicted_proportions.csv").read_bytes()


def test_the_numbers_are_those_of_the_tables(written):
    elements = Elements(written)
    assert "57 test cells were compared" in elements.text  # of 60
    assert "MMD" not in elements.text and "Differences between the cell types" in elements.text
    assert "20.0 % 15.5-24.5 %" in elements.text  # 0.2 -+ t(0.975, 9) * 0.02
    assert "off by 3.1 percentage points on average" in elements.text and "off by 9.0" in elements.text
    rects = [a for tag, a in elements.all if tag == "rect" and a.get("height") == "10" and a["width"] != "10"]
    bar = [(a["fill"], float(a["width"])) for a in rects[:3]]
    assert bar == [(COLOURS[0], 20.0), (COLOURS[1], 30.0), (COLOURS[2], 50.0)]


def test_a_run_without_bulk_and_without_test_cells_says_so(tmp_path):
    few = results(tmp_path)._replace(deconvolution=None, cells=None, written=[], histories=[])
    text = Elements(page.write(few, tmp_path / "report.html")).text
    assert "No bulk was read" in text and "were not compared with real cells, because no test cells are at hand" in text
    assert (tmp_path / "report.html").stat().st_size < 100_000  # without BokehJS


@pytest.mark.parametrize(
    ("epoch", "which"), [(1, "where the model predicted the held-out data best; later it"), (2, "the last one")]
)
def test_the_epoch_is_the_one_whose_weights_are_used(tmp_path, epoch, which):
    run = results(tmp_path)
    run.generator["epoch"] = epoch
    assert f"The weights of epoch {epoch} are used, {which}" in Elements(page.write(run, tmp_path / "report.html")).text


def test_constants_are_compared_with_those_of_the_script():
    for stage in STAGES:
        constants = {name: value for name, (value, _) in options.defaults((ROOT / stage).read_text()).items()}
        as_json = {name: list(value) if isinstance(value, tuple) else value for name, value in constants.items()}
        made_by = {"stage": stage, "constants": as_json | {"FIG_DIR": "elsewhere"}}
        assert page.changed_constants(made_by) == (f"python {stage}", [])
    changed = {"EPOCHS": 50, "RESUME": True, "PATIENCE": None, "CONDITION": "a donor"}
    command, rows = page.changed_constants({"stage": STAGES[3], "constants": changed})
    values = {name: value for name, value, _, _ in rows}
    assert values == {"EPOCHS": "50", "RESUME": "True", "PATIENCE": "none", "CONDITION": "a donor"}
    assert all(f"--{word}" in command for word in ("epochs 50", "resume", "patience none", "condition 'a donor'"))


def test_the_page_of_the_pipeline_tells_the_commands_and_the_numbers(pipeline):
    path = pipeline.fig / "report.html"
    text = Elements(path).text
    assert path.stat().st_size < 8_000_000
    assert all(f"python {stage}" in text for stage in STAGES) and "DATASET = pbmc68k_reduced" in text
    assert text.count("Picture: ") == len(page.PICTURES) and re.search(r"Axis \d+: .*, opposite ", text)
    auc = pd.read_csv(pipeline.fig / "metrics.csv").set_index(["cells", "figure"]).loc[("all", "forest AUC")]
    generated, real = (f"{100 * auc[name]:.0f} %" for name in ("generated", "real"))
    assert f"in {generated} of all pairs; it picks a real train cell in {real}" in text
    for name, share in pd.read_csv(pipeline.data / "predicted_proportions.csv", index_col=0).iloc[0].items():
        assert f"{100 * share:.1f} %" in text and name in text


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_works_in_the_browser_of_a_phone(written, scheme):
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: .ci/requirements.txt")
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with playwright.sync_playwright() as run:
        if program is None and not Path(run.chromium.executable_path).exists():
            pytest.skip("no Chromium is installed, so the report is not opened in a browser")
        browser = run.chromium.launch(executable_path=program, args=["--no-sandbox"])
        tab, wrong = browser.new_page(viewport={"width": 390, "height": 844}, color_scheme=scheme), []
        tab.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
        tab.on("pageerror", lambda error: wrong.append(str(error)))
        tab.on("dialog", lambda dialog: (wrong.append(dialog.message), dialog.dismiss()))
        tab.on("request", lambda one: None if one.url.startswith(("data:", "file:")) else wrong.append(one.url))
        tab.goto(written.as_uri())
        tab.wait_for_function("window.Bokeh && Bokeh.documents.length && Bokeh.documents[0].is_idle")

        assert tab.evaluate("document.documentElement.scrollWidth") <= 390
        assert tab.evaluate("[...document.querySelectorAll('.plot')].every(panel => panel.clientHeight > 300)")
        colour = tab.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, re.findall(r"\d+", colour)[:3])) < 200) == (scheme == "dark")
        shown = "Bokeh.documents[0].get_model_by_name('shown_both').booleans.filter(Boolean).length"
        assert tab.evaluate(shown) == 60
        for element, n_shown in (("label >> nth=0", 40), ("text=Hide all", 0), ("text=Show all", 60)):
            tab.click(f"#types >> {element}")
            assert tab.evaluate(shown) == n_shown
        for order in ("descending", "ascending"):
            tab.click("#proportions th >> nth=2 >> button")
            rows = tab.query_selector_all("#proportions tbody tr td:nth-child(3)")
            shares = [float(row.get_attribute("data-value")) for row in rows]
            assert tab.get_attribute("#proportions th >> nth=2", "aria-sort") == order
            assert shares == sorted([0.1, 0.2, 0.3, 0.3, 0.5, 0.6], reverse=order == "descending")
        tab.select_option("#sample-filter", EVIL)
        assert tab.locator("#proportions tbody tr:visible").count() == 3
        assert wrong == []
