"""fig/report.html: one self-contained page of the results of stage 5, in the order of a reader's questions.

All values enter the templates as text and are escaped there: names of files, samples, cell types and genes come from users. The page
loads nothing from a network; library, styles, pictures and tables are part of it.
"""

import base64
import shlex
from pathlib import Path
from typing import Any, NamedTuple

import anndata as ad
import jinja2
import numpy as np
import pandas as pd
from bokeh.embed import components
from bokeh.models import BooleanFilter, CDSView, ColumnDataSource, HoverTool, Range1d
from bokeh.plotting import figure
from bokeh.resources import Resources
from bokeh.transform import factor_cmap

from lib import options
from lib.bulk.deconvolution import Deconvolution, scaled_reference, signature_coverage
from lib.evaluation.plots_cells import GENERATED, REAL, label_places, palette
from lib.report import sentences
from lib.run import ROOT, description, git, replacing

TEMPLATES, GLOSSARY = Path(__file__).with_name("templates"), Path(__file__).with_name("glossary.csv")
FOLDERS = {"DATA_DIR", "MODELS_DIR", "FIG_DIR", "OUTPUT"}  # constants that change no number
MAX_CELLS = 10_000  # in the map, of both sets, so that the page stays small
MAX_FILE = 700_000  # bytes of a picture or table inside the page
PICTURES = {  # section, caption
    "proportions.png": ("bulk", "Estimated against true proportions on mixtures of test cells; on the dashed line both are equal."),
    "umap_by_cell_type.png": ("cells", "Test cells and generated cells in one UMAP, by cell type: the map above as a picture."),
    "fidelity.png": ("cells", "AUC of all cells and of each type, library sizes, genes detected, and statistics of single genes."),
    "type_correlation.png": ("cells", "Mean expression of each generated type against each real type; the diagonal should be largest."),
    "signature.png": ("bulk", "Marker genes of the cell types in the reference, and as the platform of the bulk measures them."),
}  # fmt: skip
TOOLTIPS = [
    ("cell type", "@cell_type"), ("set", "@source"), ("sample", "@sample"), ("counts", "@library_size{0,0}"),
    ("genes detected", "@genes_detected{0,0}"),
]  # fmt: skip
PANEL: dict[str, Any] = {
    "sizing_mode": "stretch_width", "height": 340, "min_border": 4, "tools": "pan,wheel_zoom,box_zoom,reset",
    "toolbar_location": "below", "background_fill_color": "#FFFFFF", "border_fill_color": "#FFFFFF", "outline_line_color": None,
}  # fmt: skip
NUMBER: dict[str, Any] = {
    "text_align": "center", "text_baseline": "middle", "text_font_size": "12px", "text_font_style": "bold", "text_color": "#000000",
    "background_fill_color": "#FFFFFF", "background_fill_alpha": 0.75,
}  # fmt: skip


class Results(NamedTuple):
    """What stage 5 has at hand when it ends."""

    generator: dict[str, Any]  # checkpoint of stage 3
    generator_name: str
    deconvolution: Deconvolution | None
    cells: tuple[ad.AnnData, ad.AnnData] | None  # train and test
    generated: pd.DataFrame  # samples x types: numbers of generated cells
    made_by: list[dict[str, Any]]  # `run.description` of every stage before this one, as far as it is known
    histories: list[Path]  # <name>_history.csv: losses by epoch of the generator, then of the deconvolution's network
    written: list[Path]  # files of this run, the only ones that the page shows


def write(results: Results, path: Path) -> Path:
    """Write the page; returns its path."""
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, lstrip_blocks=True)
    environment.undefined = jinja2.StrictUndefined
    environment.filters |= {"percent": sentences.percent, "between": sentences.between}
    html = environment.get_template("page.html").render(contents(results))
    with replacing(path) as temporary:
        temporary.write_text(html, encoding="utf-8")
    return path


def contents(results: Results) -> dict[str, Any]:
    """Everything that the template shows."""
    cell_types = [str(name) for name in results.generator["cell_types"]]
    files = {path.name: path for path in results.written}
    small = {name: path for name, path in files.items() if path.stat().st_size <= MAX_FILE}
    stages = sorted(filter(None, [*results.made_by, description()]), key=lambda made_by: made_by["stage"])
    return {
        "results": results,
        "dataset": str(results.generator["dataset"]),
        "cell_types": cell_types,
        "colours": palette(cell_types),
        "glossary": pd.read_csv(GLOSSARY).to_dict("records"),
        "sentences": sentences,
        "stages": [(made_by["stage"], *changed_constants(made_by)) for made_by in stages],
        "last": stages[-1] if stages else {"versions": {}, "commit": None},
        "bulk": None if results.deconvolution is None else bulk_section(results, results.deconvolution, files),
        "good": None if results.cells is None else cells_section(results.cells[0], cell_types, files),
        "losses": loss_curves(results),
        "axes": sentences.axes_of(results.generator),
        "pictures": [(*PICTURES[name], _data_uri(small[name], "image/png")) for name in PICTURES if name in small],
        "downloads": {name: _data_uri(path, "text/csv") for name, path in small.items() if path.suffix == ".csv"},
    }


def changed_constants(made_by: dict[str, Any]) -> tuple[str, list[tuple[str, str, str, str]]]:
    """A command with the constants of a run, and those that differ from the script at its commit: name, value, default, comment."""
    script, commit, words, changed = made_by["stage"], made_by.get("commit"), ["python", made_by["stage"]], []
    text = git("show", f"{commit.split()[0]}:{script}") if commit else None
    for name, (default, comment) in options.defaults(text or (ROOT / script).read_text(encoding="utf-8")).items():
        got = made_by["constants"].get(name, default)
        if name in FOLDERS or _words(got) == _words(default):
            continue
        changed.append((name, " ".join(_words(got)), " ".join(_words(default)), comment))
        option = name.lower().replace("_", "-")
        if isinstance(got, bool):
            words.append(f"--{option}" if got else f"--no-{option}")
        else:
            words += [f"--{option}", *_words(got)]
    return shlex.join(words), changed


def _words(constant: Any) -> list[str]:
    """The words of a constant on the command line."""
    values = constant if isinstance(constant, list | tuple) else [constant]
    return ["none" if one is None else str(one) for one in values]


def bulk_section(results: Results, deconvolution: Deconvolution, files: dict[str, Path]) -> dict[str, Any]:
    """Proportions with intervals, their summary, and warnings. files: of this run, by name."""
    estimate, bulk_file, coverage, errors = deconvolution.estimate, deconvolution.bulk_file, None, None
    shares, mixtures = estimate.proportions, _table(files, "mixtures.csv")
    columns = dict(zip(("cells", "cells_low", "cells_high"), (shares, *estimate.interval())))
    if estimate.signature is not None:
        columns |= zip(("rna", "rna_low", "rna_high"), (estimate.rna_proportions, *estimate.rna_interval()))
    rows = pd.MultiIndex.from_product([shares.index.astype(str), shares.columns], names=["sample", "cell_type"])
    table = pd.DataFrame({name: part.to_numpy().ravel() for name, part in columns.items()}, rows).reset_index()
    if bulk_file is None and results.cells is not None:
        table["true"] = list(results.cells[1].obs["cell_type"].value_counts(normalize=True)[shares.columns])
    if mixtures is not None:
        is_random = mixtures["mixtures of test cells"].str.startswith("dirichlet")
        error = 100 * mixtures[is_random].set_index("deconvolution")["MAE"]
        errors = error[[deconvolution.method, "constant: train frequencies"]].to_list()
    if "reference" in deconvolution.checkpoint:
        coverage = signature_coverage(scaled_reference(deconvolution.checkpoint), deconvolution.bulk, 0.0)
    return {
        "name": "the sum of the test cells" if bulk_file is None else Path(bulk_file).name,
        "is_own": bulk_file is not None,
        "method": deconvolution.method,
        "n_samples": len(shares),
        "summary": sentences.bulk_summary(estimate),
        "errors": errors,
        "advice": sentences.advice(estimate, coverage, deconvolution.content),
        "rows": table.to_dict("records"),
        "has_rna": "rna" in table,
        "has_truth": "true" in table,
        "coverage": coverage,
    }


def cells_section(train: ad.AnnData, cell_types: list[str], files: dict[str, Path]) -> dict[str, Any] | None:
    """The embedding, a verdict of every type, every metric in words; None if nothing was evaluated."""
    metrics, umap = _table(files, "metrics.csv"), _table(files, "umap.csv")
    if metrics is None or umap is None:
        return None
    readings = sentences.metric_readings(metrics)
    verdicts = sentences.type_verdicts(metrics, train.obs["cell_type"].value_counts()[cell_types])
    return {
        "summary": sentences.cells_sentence(readings, verdicts),
        "readings": readings.to_dict("records"),
        "verdicts": verdicts,
        "n_compared": int(metrics.loc[metrics["cells"] == "all", "n_cells"].iloc[0]),
        "plot": embedding_plot(umap, cell_types),
    }


def embedding_plot(cells: pd.DataFrame, cell_types: list[str]) -> dict[str, Any]:
    """Three linked panels of Bokeh from fig/umap.csv; the page's own buttons set the filters "shown_<panel>" to hide types."""
    columns = ["source", "cell_type", "sample", "library_size", "genes_detected", "umap_1", "umap_2"]
    # in random order, so that no type is plotted on top of all others
    cells = cells[columns].sample(min(len(cells), MAX_CELLS), random_state=0)
    cells = cells.fillna({"cell_type": "no type", "sample": ""}).astype({"umap_1": np.float32, "umap_2": np.float32})
    source, places = ColumnDataSource(cells, name="cells"), cells[["umap_1", "umap_2"]].to_numpy()
    low, high = places.min(axis=0), places.max(axis=0)
    margin = 0.04 * (high - low) + 1e-6
    x_range, y_range = (Range1d(start=float(a), end=float(b)) for a, b in zip(low - margin, high + margin))
    # the number of each type beside its median cell: types are told apart without colours
    labels = label_places(places, cells["cell_type"].to_numpy(dtype=object), cell_types)
    rows = [(str(i), *map(float, labels[name])) for i, name in enumerate(cell_types, start=1) if name in labels]
    numbers = ColumnDataSource(pd.DataFrame(rows, columns=["number", "x", "y"]))
    by_type = factor_cmap("cell_type", list(palette(cell_types).values()), cell_types, nan_color="#888888")
    by_source = factor_cmap("source", [REAL, GENERATED], ["test", "generated"])
    dots: dict[str, Any] = {"size": float(np.clip(160 / np.sqrt(len(cells)), 2, 7)), "line_color": None, "alpha": 0.8}
    panels: dict[str, Any] = {}
    for name, colours in (("test", by_type), ("generated", by_type), ("both", by_source)):
        panel = panels[name] = figure(name=name, x_range=x_range, y_range=y_range, **PANEL)
        panel.axis.visible, panel.grid.visible = False, False
        panel.toolbar.logo, panel.toolbar.active_drag = None, None  # a finger on the plot scrolls the page
        is_shown = [name in (one, "both") for one in cells["source"]]
        view = CDSView(filter=BooleanFilter(booleans=is_shown, name=f"shown_{name}"))
        drawn = panel.scatter("umap_1", "umap_2", source=source, view=view, color=colours, **dots)
        panel.add_tools(HoverTool(tooltips=TOOLTIPS, renderers=[drawn]))
        if name != "both":
            panel.text("x", "y", "number", source=numbers, **NUMBER)
    script, divs = components(panels, wrap_script=False)
    library = "\n".join(Resources(mode="inline", components=["bokeh"]).js_raw)
    return {"library": library, "script": script, "panels": divs, "n_cells": cells["source"].value_counts()}


def loss_curves(results: Results) -> list[dict[str, Any]]:
    """Losses by epoch of the models, as lines of an SVG of 320 x 160, and the epoch whose weights are used."""
    checkpoints = [results.generator] + ([results.deconvolution.checkpoint] if results.deconvolution else [])
    curves = []
    for path, checkpoint in zip(results.histories, checkpoints):
        if path.exists():
            history = pd.read_csv(path).rename(columns={"train_loss": "train", "held_out_loss": "held-out"})
            loss = history.filter(["train", "held-out"])
            low, high = loss.min(axis=None), np.quantile(loss, 0.98)  # the first epochs do not fill the y axis
            x = np.linspace(0, 320, len(loss))
            y = 160 * (high - loss.clip(low, high)) / max(high - low, 1e-12)
            criterion = history.get("held_out_stopping_criterion", history.get("held-out"))
            curves.append({
                "name": path.name.removesuffix("_history.csv"),
                "lines": {name: " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y[name])) for name in loss},
                "low": low, "high": high, "last": loss.iloc[-1], "n_epochs": len(loss), "used": checkpoint["epoch"],
                "best": None if criterion is None else int(criterion.argmin()) + 1,
            })  # fmt: skip
    return curves


def _data_uri(path: Path, media_type: str) -> str:
    return f"data:{media_type};base64,{base64.b64encode(path.read_bytes()).decode()}"


def _table(files: dict[str, Path], name: str) -> pd.DataFrame | None:
    """A table of this run; None if the run did not write it."""
    return pd.read_csv(files[name], dtype={"cells": str, "cell_type": str, "sample": str}) if name in files else None
