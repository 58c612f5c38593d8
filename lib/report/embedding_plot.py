"""The interactive plot of the page: test cells, generated cells and both in one embedding (Bokeh)."""

from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from bokeh.core.properties import value
from bokeh.embed import components
from bokeh.models import BooleanFilter, CDSView, ColumnDataSource, HoverTool, Range1d, Text
from bokeh.plotting import figure
from bokeh.resources import Resources
from bokeh.transform import factor_cmap

from lib.evaluation.plots_style import GENERATED, REAL, label_places, palette

MAX_CELLS = 10_000  # of both sets, so that the page stays small
PANELS = {"test": "test cells", "generated": "generated cells", "both": "both"}
TOOLTIPS = [
    ("cell type", "@cell_type"), ("set", "@source"), ("sample", "@sample"), ("counts", "@library_size{0,0}"),
    ("genes detected", "@genes_detected{0,0}"),
]  # fmt: skip
TOOLS = "pan,wheel_zoom,box_zoom,reset"


class EmbeddingPlot(NamedTuple):
    """What the page holds of it."""

    library: str  # BokehJS
    script: str
    panels: dict[str, str]  # name of the panel: HTML
    n_cells: dict[str, int]  # cells of each set that are shown


def embedding_plot(cells: pd.DataFrame, cell_types: list[str], seed: int = 0) -> EmbeddingPlot:
    """Three linked panels; the page's own buttons set the filters "shown_<panel>" to hide types.

    Parameters
    ----------
    cells
        umap.csv: one row per cell; columns source ("test" or "generated"), cell_type, sample, library_size, genes_detected, umap_1,
        umap_2.
    cell_types
        In the order of their colours.
    """
    rng = np.random.default_rng(seed)  # also the order of plotting, so that no type lies on top of all others
    cells = cells.iloc[rng.permutation(len(cells))[:MAX_CELLS]].reset_index(drop=True)
    places = cells[["umap_1", "umap_2"]].to_numpy()
    columns = {name: cells[name] for name in ("source", "sample", "library_size", "genes_detected")}
    columns["cell_type"] = cells["cell_type"].fillna("no type").astype(str)
    columns |= {"x": places[:, 0].astype(np.float32), "y": places[:, 1].astype(np.float32)}
    source = ColumnDataSource(columns, name="cells")
    ranges = [_range(places[:, axis]) for axis in (0, 1)]
    size = float(np.clip(160 / np.sqrt(max(len(cells), 1)), 2, 7))
    numbers = _numbers(places, columns["cell_type"], cell_types)
    panels: dict[str, Any] = {name: _panel(name, source, ranges, size, cell_types, numbers) for name in PANELS}
    script, divs = components(panels, wrap_script=False)
    counts = cells["source"].value_counts()
    return EmbeddingPlot(
        "\n".join(Resources(mode="inline", components=["bokeh"]).js_raw),
        script,
        divs,
        {name: int(counts.get(name, 0)) for name in ("test", "generated")},
    )


def _range(values: np.ndarray) -> Range1d:
    low, high = float(values.min()), float(values.max())
    margin = 0.04 * (high - low) + 1e-6
    return Range1d(start=low - margin, end=high + margin)


def _numbers(places: np.ndarray, cell_type: pd.Series, cell_types: list[str]) -> ColumnDataSource:
    """The number of each type beside its median cell: types are told apart without colours."""
    at = label_places(places, cell_type.to_numpy(dtype=object), cell_types)
    found = [(str(i), *at[name]) for i, name in enumerate(cell_types, start=1) if name in at]
    number, x, y = zip(*found) if found else ((), (), ())
    return ColumnDataSource({"number": list(number), "x": list(x), "y": list(y)})


def _panel(
    name: str, source: ColumnDataSource, ranges: list[Range1d], size: float, cell_types: list[str], numbers: ColumnDataSource
) -> figure:  # fmt: skip
    panel = figure(
        name=name,
        x_range=ranges[0],
        y_range=ranges[1],
        sizing_mode="stretch_width",
        height=340,
        tools=TOOLS,
        toolbar_location="below",
        output_backend="canvas",
        background_fill_color="#FFFFFF",
        border_fill_color="#FFFFFF",
        outline_line_color=None,
        min_border=4,
    )
    panel.axis.visible, panel.grid.visible = False, False
    panel.toolbar.logo, panel.toolbar.active_drag = None, None  # a finger on the plot scrolls the page
    if name == "both":
        colour, is_shown = (
            factor_cmap("source", [REAL, GENERATED], ["test", "generated"]),
            [True] * len(source.data["x"]),
        )
    else:
        colours = palette(cell_types)
        colour = factor_cmap("cell_type", list(colours.values()), list(colours), nan_color="#888888")
        is_shown = [one == name for one in source.data["source"]]
    view = CDSView(filter=BooleanFilter(booleans=is_shown, name=f"shown_{name}"))
    dots = panel.scatter("x", "y", source=source, view=view, size=size, color=colour, line_color=None, alpha=0.8)
    panel.add_tools(HoverTool(tooltips=TOOLTIPS, renderers=[dots]))
    if name != "both":
        style: dict[str, Any] = {"text_align": "center", "text_baseline": "middle", "text_font_style": "bold"}
        style |= {"text_font": value("sans-serif"), "text_font_size": "12px", "text_color": "#000000", "padding": 1}
        panel.add_glyph(
            numbers, Text(text="number", background_fill_color="#FFFFFF", background_fill_alpha=0.75, **style)
        )
    return panel
