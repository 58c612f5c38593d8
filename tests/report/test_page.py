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
from helpers import STAGES, simulated_dataset

from lib import options
from lib.bulk.deconvolution import Estimate
from lib.evaluation.plots_style import COLOURS
from lib.report import page, provenance
from lib.report.sentences import METRICS

EVIL = "<script>alert(1)</script>"
EVIL_BULK = "<img src=x onerror=alert(2)>.csv"


def results(folder: Path) -> page.Results:
    """A run with three types, one of which has a name that must stay text; two bulk samples, one with such a name."""
    types = [EVIL, "type 1", 'type "2" & co']
    data = simulated_dataset(n_cells=120)
    data.obs["cell_type"] = data.obs["cell_type"].cat.rename_categories(types)
    data.uns["source"] = EVIL
    is_test = np.arange(data.n_obs) % 3 == 0
    train, test = data[~is_test].copy(), data[is_test].copy()
    for cells in (train, test):
        cells.obs["cell_type"] = cells.obs["cell_type"].cat.set_categories(types)
    rng = np.random.default_rng(0)
    umap = pd.DataFrame({
        "source": ["test", "generated"] * 30, "cell_type": np.repeat(types, 20), "sample": [np.nan, EVIL] * 30,
        "library_size": 400, "genes_detected": 50, "umap_1": rng.normal(size=60), "umap_2": rng.normal(size=60),
    })  # fmt: skip
    metrics = [(cells, name, 0.6, 0.5) for cells in ("all", *types) for name in METRICS]
    umap.to_csv(folder / "umap.csv", index=False)
    pd.DataFrame(metrics, columns=["cells", "figure", "generated", "real"]).to_csv(folder / "metrics.csv", index=False)
    shares = pd.DataFrame([[0.2, 0.3, 0.5], [0.6, 0.1, 0.3]], ["first", EVIL], types)
    shares.to_csv(folder / "predicted_proportions.csv")
    samples = pd.DataFrame(
        {"reference_r": 0.2, "unexplained_genes": EVIL, "warning": "unlike the reference"}, shares.index
    )
    estimate = Estimate(shares, shares * 0 + 0.02, shares, shares * 0 + 0.02, pd.DataFrame(), samples, shares, None)
    pd.DataFrame({"epoch": [1, 2], "train_loss": [3.0, 2.0], "held_out_loss": [3.5, 3.0]}).to_csv(
        folder / "gmvae_history.csv"
    )
    made_by = {"constants": {"SEED": 123, "DATASET": EVIL}}
    about = {"stage": STAGES[3], "constants": {"EPOCHS": 7}, "made_by": made_by, "cell_types": types, "gene_names": ["G1", "G2"],
             "dataset": EVIL, "epoch": 2, "arguments": {}, "weights": {}}  # fmt: skip
    written = [folder / name for name in ("umap.csv", "metrics.csv", "predicted_proportions.csv")]
    deconvolution = page.Deconvolution("regression", estimate, 0.5, None, about, EVIL_BULK)
    return page.Results(
        written, [], [folder / "gmvae_history.csv"], about, "gmvae", deconvolution, (train, test), 100 * shares, 2500
    )


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    return page.write(results(folder), folder / "report.html")


class Elements(HTMLParser):
    """Elements and their attributes, and the text outside of scripts and styles."""

    def __init__(self, html: str):
        super().__init__()
        self.found: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.found and self.found[-1][0] not in ("script", "style"):
            self.text += data


def test_names_from_users_stay_text(written):
    html = written.read_text()
    elements = Elements(html)
    assert EVIL in elements.text and EVIL_BULK in elements.text and 'type "2" & co' in elements.text
    assert not any("onerror" in attributes for _, attributes in elements.found)
    assert "<script>alert" not in html
    boxes = [attributes["value"] for tag, attributes in elements.found if tag == "input"]
    assert boxes == [EVIL, "type 1", 'type "2" & co']


def test_nothing_is_loaded_from_elsewhere(written):
    elements = Elements(written.read_text()).found
    assert not [tag for tag, _ in elements if tag in ("iframe", "object", "embed", "base")]
    for tag, attributes in elements:
        assert tag not in ("script", "img", "link") or attributes.get("src", "data:").startswith("data:"), attributes
        if "href" in attributes:
            assert attributes["href"].startswith(("#", "data:")), attributes
    assert not re.search(r"url\((?!['\"]?data:)|@import", (page.TEMPLATES / "style.css").read_text())


def test_every_link_inside_the_page_has_a_target_and_every_picture_a_text(written):
    elements = Elements(written.read_text()).found
    ids = [attributes["id"] for _, attributes in elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = {
        attributes["href"][1:] for tag, attributes in elements if tag == "a" and attributes["href"].startswith("#")
    }
    assert targets <= set(ids)
    assert all(attributes.get("alt") for tag, attributes in elements if tag == "img")


def test_the_table_that_is_saved_is_the_file(written):
    links = {
        a["download"]: a["href"] for tag, a in Elements(written.read_text()).found if tag == "a" and "download" in a
    }
    content = base64.b64decode(links["predicted_proportions.csv"].partition(",")[2])
    assert content == (written.parent / "predicted_proportions.csv").read_bytes()


def test_the_bars_hold_the_shares_in_the_colours_of_the_types(written):
    rects = [
        a
        for tag, a in Elements(written.read_text()).found
        if tag == "rect" and a.get("height") == "10" and "width" in a
    ]
    first = [(a["fill"], float(a["width"])) for a in rects if a["width"] != "10"][:3]
    assert first == [(COLOURS[0], 20.0), (COLOURS[1], 30.0), (COLOURS[2], 50.0)]


def test_a_run_without_bulk_and_without_test_cells_says_so(tmp_path):
    few = results(tmp_path)._replace(deconvolution=None, cells=None, written=[], histories=[])
    text = Elements(page.write(few, tmp_path / "report.html").read_text()).text
    assert "No bulk was read" in text and "were not compared with real cells, because no test cells are at hand" in text
    assert (tmp_path / "report.html").stat().st_size < 100_000  # without BokehJS


def test_constants_are_compared_with_those_of_the_script():
    constants, of_stage_5 = (
        {name: value for name, (value, _) in options.defaults((options.ROOT / STAGES[k]).read_text()).items()}
        for k in (3, 5)
    )
    assert constants["EPOCHS"] == 300 and constants["HIDDEN"] == 128
    as_read = of_stage_5 | {"XGBOOST_CELLS": list(of_stage_5["XGBOOST_CELLS"])}  # from a record
    assert provenance.changed_constants(STAGES[5], as_read, None) == []
    changed = constants | {"EPOCHS": 50, "HIDDEN": 9, "RESUME": True, "PATIENCE": None, "DATA_DIR": "elsewhere"}
    found = provenance.changed_constants(STAGES[3], changed, None)
    assert {one.name: one.value for one in found} == {
        "EPOCHS": "50",
        "HIDDEN": "9",
        "RESUME": "True",
        "PATIENCE": "none",
    }
    stage = provenance.Stage(STAGES[3], None, None, found, {}, None)
    assert stage.shown_command == f"python {STAGES[3]} --hidden 9 --epochs 50 --patience none --resume"


def test_the_page_of_the_pipeline_tells_the_commands_and_the_numbers(pipeline):
    path = pipeline.fig / "report.html"
    text = Elements(path.read_text()).text
    assert path.stat().st_size < 8_000_000
    for stage in STAGES:
        assert f"python {stage}" in text
    assert "DATASET = pbmc68k_reduced" in text
    metrics = pd.read_csv(pipeline.fig / "metrics.csv").set_index(["cells", "figure"])
    auc = metrics.loc[("all", "forest AUC")]
    assert (
        f"in {100 * auc['generated']:.0f} % of all pairs" in text
        and f"a real train cell in {100 * auc['real']:.0f} %" in text
    )
    shares = pd.read_csv(pipeline.data / "predicted_proportions.csv", index_col=0).iloc[0]
    for name, share in shares.items():
        assert f"{100 * share:.1f} %" in text and name in text
    umap = pd.read_csv(pipeline.fig / "umap.csv")
    cells = ad.read_h5ad(pipeline.data / "generated.h5ad")
    assert (umap["source"] == "generated").sum() == cells.n_obs
    of_generated = umap[umap["source"] == "generated"].set_index("cell")
    np.testing.assert_array_equal(
        of_generated.loc[[f"{name}-generated" for name in cells.obs_names], "library_size"], cells.obs["library_size"]
    )


def test_no_report_leaves_the_page_out(pipeline, tmp_path):
    pipeline.main(
        STAGES[5],
        CELL_COUNTS="3",
        REPORT=False,
        EVALUATE=False,
        OUTPUT=str(tmp_path / "cells.h5ad"),
        FIG_DIR=str(tmp_path),
    )
    assert not (tmp_path / "report.html").exists()


# --- in a browser


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: .ci/requirements.txt")
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with playwright.sync_playwright() as run:
        if program is None and not Path(run.chromium.executable_path).exists():
            pytest.skip("no Chromium is installed, so the report is not opened in a browser")
        one = run.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield one
        one.close()


def opened(browser, path: Path, **context):
    """The page, and what went wrong on it: errors, dialogs and requests for anything but the file itself."""
    tab, wrong = browser.new_context(**context).new_page(), []
    tab.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
    tab.on("pageerror", lambda error: wrong.append(str(error)))
    tab.on("dialog", lambda dialog: (wrong.append(dialog.message), dialog.dismiss()))
    tab.on(
        "request",
        lambda request: None if request.url.startswith(("data:", path.as_uri())) else wrong.append(request.url),
    )
    tab.goto(path.as_uri())
    tab.wait_for_function("window.Bokeh && Bokeh.documents.length && Bokeh.documents[0].is_idle")
    return tab, wrong


@pytest.mark.slow
@pytest.mark.parametrize("which", ["hostile names", "pipeline"])
def test_the_page_works_in_a_browser(browser, request, which):
    is_ours = which == "hostile names"
    path = request.getfixturevalue("written") if is_ours else request.getfixturevalue("pipeline").fig / "report.html"
    tab, wrong = opened(browser, path, viewport={"width": 1280, "height": 900})
    for details in tab.query_selector_all("details"):
        details.evaluate("one => one.open = true")
    assert tab.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    assert tab.evaluate("[...document.querySelectorAll('.plot')].every(panel => panel.clientHeight > 300)")

    shown = "Bokeh.documents[0].get_model_by_name('shown_both').booleans.filter(Boolean).length"
    n_cells, box = tab.evaluate(shown), tab.locator("#types input").first
    n_of_type = tab.evaluate(
        "name => Array.from(Bokeh.documents[0].get_model_by_name('cells').data.cell_type).filter(one => one === name).length",
        box.get_attribute("value"),
    )
    box.focus()
    tab.keyboard.press("Space")
    assert n_of_type > 0 and tab.evaluate(shown) == n_cells - n_of_type
    tab.get_by_text("Hide all").click()
    assert tab.evaluate(shown) == 0
    tab.get_by_text("Show all").click()
    assert tab.evaluate(shown) == n_cells

    heading = tab.locator("#proportions th", has_text="Cells")
    for order in ("descending", "ascending"):
        heading.get_by_role("button").press("Enter")
        column = heading.evaluate("one => one.cellIndex")
        values = tab.evaluate(
            "column => [...document.querySelectorAll('#proportions tbody tr')].map(row => +row.cells[column].dataset.value)",
            column,
        )
        assert heading.get_attribute("aria-sort") == order
        assert values == sorted(values, reverse=order == "descending") and len(set(values)) > 1
    if is_ours:
        tab.select_option("#sample-filter", EVIL)
        assert tab.locator("#proportions tbody tr:visible").count() == 3
    assert wrong == []


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_the_page_without_scrolling_sideways(browser, pipeline, scheme):
    tab, wrong = opened(
        browser, pipeline.fig / "report.html", viewport={"width": 390, "height": 844}, color_scheme=scheme
    )
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390
    red, green, blue = map(int, re.findall(r"\d+", tab.evaluate("getComputedStyle(document.body).backgroundColor"))[:3])
    assert (red + green + blue < 200) == (scheme == "dark")
    assert wrong == []
