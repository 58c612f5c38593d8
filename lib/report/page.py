"""fig/report.html: one self-contained page of the results of stage 5, in the order of a reader's questions.

All values enter the templates as text and are escaped there: names of files, samples, cell types and genes come from users. The page
loads nothing from a network; library, styles, pictures and tables are part of it.
"""

import base64
from pathlib import Path
from typing import Any, NamedTuple

import anndata as ad
import jinja2
import numpy as np
import pandas as pd

from lib.bulk.deconvolution import Estimate
from lib.evaluation.plots_style import palette
from lib.files import replacing
from lib.report import bulk_words, programmes, provenance, sentences
from lib.report.embedding_plot import embedding_plot

TEMPLATES = Path(__file__).with_name("templates")
MAX_BARS, MAX_ROWS = 60, 2000  # samples in the bars, rows in the table of proportions; all are in the files
MAX_AXES = 12  # axes of variation that are listed
MAX_DOWNLOAD, MAX_PICTURES = 400_000, 3_000_000  # bytes of one table, and of all pictures, inside the page
PICTURES = {  # in this order while they fit; section, caption
    "proportions.png": ("bulk", "Estimated against true proportions on mixtures of test cells; on the dashed line both are equal."),
    "fidelity.png": ("cells", "AUC of all cells and of each type, library sizes, genes detected, and statistics of single genes."),
    "type_correlation.png": ("cells", "Mean expression of each generated type against each real type; the diagonal should be largest."),
    "signature.png": ("bulk", "Marker genes of the cell types in the reference, and as the platform of the bulk measures them."),
}  # fmt: skip


class Deconvolution(NamedTuple):
    """How the proportions were estimated."""

    method: str
    estimate: Estimate
    coverage: float | None  # share of the signature genes of the reference that the bulk has
    content: pd.DataFrame | None  # mRNA per cell, of `rna_content.rna_per_cell`, if it was used
    checkpoint: dict[str, Any]  # of stage 4
    bulk: str | None  # the file; None: the sum of the test cells


class Results(NamedTuple):
    """What stage 5 has at hand when it ends."""

    written: list[Path]  # files of this run, the only ones that the page shows
    last_files: list[Path]  # the last file of each stage before this one; its record tells about the run
    histories: list[Path]  # losses by epoch of the models in use, <name>_history.csv
    generator: dict[str, Any]  # checkpoint of stage 3
    generator_name: str
    deconvolution: Deconvolution | None
    cells: tuple[ad.AnnData, ad.AnnData] | None  # train and test
    generated: pd.DataFrame  # samples x types: numbers of generated cells
    max_cells_evaluated: int


def write(results: Results, path: Path) -> Path:
    """Write the page; returns its path."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )  # fmt: skip
    environment.filters |= {
        "percent": sentences.percent, "between": bulk_words.between, "duration": provenance.duration,
        "sentence": programmes.axis_sentence, "joined": sentences.joined,
    }  # fmt: skip
    html = environment.get_template("page.html").render(contents(results))
    with replacing(path) as temporary:
        temporary.write_text(html, encoding="utf-8")
    return path


def contents(results: Results) -> dict[str, Any]:
    """Everything that the template shows."""
    cell_types = [str(name) for name in results.generator["cell_types"]]
    return {
        "cell_types": cell_types,
        "colours": palette(cell_types),
        "glossary": pd.read_csv(Path(__file__).with_name("glossary.csv")).to_dict("records"),
        "dataset": str(results.generator["dataset"]),
        "generator_name": results.generator_name,
        "limits": {
            name: getattr(module, name)
            for module in (sentences, bulk_words, programmes)
            for name in vars(module)
            if name.isupper()
        },
        "done": what_was_done(results),
        "bulk": None if results.deconvolution is None else bulk_section(results),
        "generated": generated_section(results),
        "good": None if results.cells is None else cells_section(results, cell_types),
        "models": models_section(results),
        "pictures": pictures(results.written),
        "downloads": downloads(results.written),
    }


def what_was_done(results: Results) -> dict[str, Any]:
    """The data, and every stage: command, seconds, changed constants, versions."""
    used = [results.generator] + ([results.deconvolution.checkpoint] if results.deconvolution else [])
    stages = provenance.stages(results.last_files, used)
    known = [stage for stage in stages if stage.versions]
    source = {} if results.cells is None else dict(results.cells[0].uns)
    return {
        "stages": stages,
        "seconds": sum(stage.seconds for stage in stages if stage.seconds is not None),
        "versions": known[-1].versions if known else {},
        "commit": known[-1].commit if known else None,
        "source": str(source.get("source", "")),
        "n_genes": len(results.generator["gene_names"]),
        "n_train": None if results.cells is None else results.cells[0].n_obs,
        "n_test": None if results.cells is None else results.cells[1].n_obs,
    }


def bulk_section(results: Results) -> dict[str, Any]:
    """Proportions with intervals, their summary, and warnings."""
    assert results.deconvolution is not None
    method, estimate, coverage, content, _, bulk = results.deconvolution
    truth = None
    if bulk is None and results.cells is not None:
        truth = results.cells[1].obs["cell_type"].value_counts(normalize=True)
    rows = bulk_words.shares(estimate, truth)
    n_types = estimate.proportions.shape[1]
    shown = max(1, MAX_ROWS // n_types) * n_types
    accuracy = _table(results.written, "mixtures.csv")
    return {
        "name": "the sum of the test cells" if bulk is None else Path(bulk).name,
        "is_own": bulk is not None,
        "method": method,
        "n_samples": len(estimate.proportions),
        "summary": bulk_words.summary(estimate),
        "accuracy": bulk_words.mixture_sentence(accuracy, method),
        "advice": bulk_words.advice(estimate, coverage, content),
        "rows": rows[:shown],
        "n_rows": len(rows),
        "bars": [rows[i : i + n_types] for i in range(0, min(len(rows), MAX_BARS * n_types), n_types)],
        "has_rna": rows[0].rna is not None,
        "has_truth": truth is not None,
        "coverage": coverage,
    }


def generated_section(results: Results) -> dict[str, Any]:
    """Numbers of generated cells."""
    n_cells = results.generated
    return {"n_cells": int(n_cells.to_numpy().sum()), "n_samples": len(n_cells), "by_type": n_cells.sum().to_dict()}


def cells_section(results: Results, cell_types: list[str]) -> dict[str, Any] | None:
    """The embedding, a verdict of every type, every metric in words; None if nothing was evaluated."""
    assert results.cells is not None
    metrics, umap = _table(results.written, "metrics.csv"), _table(results.written, "umap.csv")
    if metrics is None or umap is None:
        return None
    train, test = (cells.obs["cell_type"].value_counts().reindex(cell_types, fill_value=0) for cells in results.cells)
    n_compared = (test * min(1.0, results.max_cells_evaluated / test.sum())).round().astype(int)
    readings = sentences.metric_readings(metrics)
    verdicts = sentences.type_verdicts(metrics, train, n_compared)
    still = next((path for path in results.written if path.name == "umap_by_cell_type.png"), None)
    return {
        "summary": sentences.cells_sentence(readings, verdicts),
        "readings": readings,
        "verdicts": verdicts,
        "n_compared": int(n_compared.sum()),
        "plot": embedding_plot(umap.assign(sample=umap["sample"].fillna("")), cell_types),
        "still": None if still is None else _data_uri(still, "image/png"),
    }


def models_section(results: Results) -> dict[str, Any]:
    """Losses by epoch and, of a GMVAE, the axes of variation."""
    axes = programmes.axes_of(results.generator)
    return {
        "losses": [loss_curve(path) for path in results.histories if path.exists()],
        "axes": axes[:MAX_AXES],
        "n_axes": len(axes),
        "epoch": results.generator["epoch"],
    }


def loss_curve(path: Path) -> dict[str, Any]:
    """Losses by epoch as lines of an SVG of 320 x 160; the y axis ends at the 98th percentile, so that the first epochs do not fill it."""
    history = pd.read_csv(path)
    columns = {"train": "train_loss", "held-out": "held_out_loss"}
    losses = {label: history[column].to_numpy() for label, column in columns.items() if column in history}
    both = np.concatenate(list(losses.values()))
    low, high = float(both.min()), float(np.quantile(both, 0.98))
    x = 320 * np.arange(len(history)) / max(1, len(history) - 1)
    lines = {}
    for label, values in losses.items():
        y = 160 - 160 * np.clip((values - low) / max(high - low, 1e-12), 0, 1)
        lines[label] = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y))
    last = {label: f"{values[-1]:,.5g}" for label, values in losses.items()}
    criterion = history.get("held_out_stopping_criterion", history.get("held_out_loss"))
    best = None if criterion is None else int(np.argmin(criterion)) + 1
    return {
        "name": path.name.removesuffix("_history.csv"),
        "lines": lines,
        "low": f"{low:,.5g}",
        "high": f"{high:,.5g}",
        "n_epochs": len(history),
        "last": last,
        "best": best,
    }


def pictures(written: list[Path]) -> list[dict[str, str]]:
    """The figures of this run that the page holds beside its own, while they fit."""
    listed, room = [], MAX_PICTURES
    by_name = {path.name: path for path in written}
    for name, (section, caption) in PICTURES.items():
        if name in by_name and (size := by_name[name].stat().st_size) <= room:
            room -= size
            listed.append({"section": section, "caption": caption, "uri": _data_uri(by_name[name], "image/png")})
    return listed


def downloads(written: list[Path]) -> list[dict[str, str]]:
    """The tables of this run that are small enough, as links that hold them."""
    tables = [path for path in written if path.suffix == ".csv" and path.stat().st_size <= MAX_DOWNLOAD]
    return [{"name": path.name, "uri": _data_uri(path, "text/csv")} for path in tables]


def _data_uri(path: Path, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def _table(written: list[Path], name: str) -> pd.DataFrame | None:
    """A table of this run; None if the run did not write it."""
    path = next((path for path in written if path.name == name), None)
    return None if path is None else pd.read_csv(path, dtype={"cells": str, "cell_type": str, "sample": str})
