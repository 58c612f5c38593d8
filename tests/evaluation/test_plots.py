"""The figures hold the numbers they are given, one colour per cell type, and no label is lost."""

import numpy as np
import pandas as pd
import pytest
from helpers import simulated_dataset
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from scipy.cluster.hierarchy import leaves_list

from lib.evaluation import (
    cell_statistics,
    metrics,
    paper_figures,
    plots_bulk,
    plots_cells,
    plots_paper,
    plots_style,
    plots_training,
    report,
)
from lib.models.gmvae import GMVAE
from lib.models.paper_gmvae import PaperGMVAE

TYPES = ["B", "NK", "T"]


@pytest.fixture
def saved(monkeypatch) -> list[Figure]:
    """The figures that would be saved."""
    figures = []
    for module in (plots_cells, plots_bulk, plots_training, plots_paper):
        monkeypatch.setattr(module, "save", lambda figure, path, *_: figures.append(figure))
    return figures


def titles(figure: Figure) -> str:
    return "|".join(axes.get_title() for axes in figure.axes)


def test_stacked_bars_have_the_heights_and_colours_of_the_types():
    axes = Figure().subplots()
    table = pd.DataFrame([[0.2, 0.3, 0.5], [1.0, 0.0, 0.0]], index=["s_1", "s_2"], columns=TYPES)
    plots_style.stacked_bars(axes, table, rotation=0)
    heights = np.array([[bar.get_height() for bar in bars] for bars in axes.containers])
    np.testing.assert_allclose(heights.T, table)
    bottoms = np.array([[bar.get_y() for bar in bars] for bars in axes.containers])
    np.testing.assert_allclose(bottoms.T, table.cumsum(axis=1) - table, atol=1e-12)
    assert [to_hex(bars[0].get_facecolor()) for bars in axes.containers] == [
        colour.lower() for colour in plots_style.palette(TYPES).values()
    ]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["s 1", "s 2"]


def test_a_type_keeps_its_colour_where_other_types_have_no_cells():
    axes = Figure().subplots()
    cell_type = pd.Series(pd.Categorical(["T"] * 5, categories=TYPES))
    plots_style.scatter_by_type(axes, np.arange(10.0).reshape(5, 2), cell_type)
    assert {to_hex(colour) for colour in axes.collections[0].get_facecolors()} == {plots_style.COLOURS[2].lower()}
    assert [text.get_text() for text in axes.texts] == ["3"]
    assert axes.get_legend_handles_labels()[1] == ["1  B", "2  NK", "3  T"]


def test_numbers_of_types_do_not_overlap_where_cells_are_mixed():
    rng = np.random.default_rng(0)
    names = np.array(["a", "b", "c", "d"])[rng.integers(0, 4, 400)]
    embedding = rng.normal(size=(400, 2))
    places = plots_style.label_places(embedding, names, ["a", "b", "c", "d", "absent"])
    assert list(places) == ["a", "b", "c", "d"]
    distances = [np.linalg.norm(places[x] - places[y]) for x in places for y in places if x < y]
    assert min(distances) >= 0.04 * np.ptp(embedding, axis=0).max()


def test_loss_curves_have_a_panel_for_each_part(saved, tmp_path):
    history = pd.DataFrame(
        {"epoch": [1, 2], "train_loss": [3.0, 2.0], "held_out_loss": [4.0, 3.5], "train_kl_z": [1.0, 1.0]}
        | {"held_out_kl_z": [1.0, 1.0], "held_out_stopping_criterion": [4.0, 3.0], "held_out_elbo": [-4.0, -3.5]}
    )
    plots_training.loss_curves(history, 2, "nats per cell", tmp_path / "loss.png")
    assert titles(saved[0]) == "loss|KL divergence of z|stopping criterion"
    train, held_out, best = saved[0].axes[0].lines
    np.testing.assert_array_equal([train.get_ydata(), held_out.get_ydata()], [[3, 2], [4, 3.5]])
    assert best.get_xdata()[0] == 2 and saved[0].axes[0].get_ylabel() == "nats per cell"
    assert len(saved[0].axes[2].lines) == 2  # the stopping criterion is of held-out data alone


def test_proportions_of_the_mixtures_and_of_the_bulk(saved, tmp_path):
    rng = np.random.default_rng(0)
    true, estimate = (pd.DataFrame(rng.dirichlet(np.ones(3), 6), columns=TYPES) for _ in range(2))
    agreement = metrics.proportion_agreement(true, estimate)
    bulk = estimate.iloc[:2].set_axis(["s1", "s2"])
    plots_bulk.proportions(true, estimate, agreement, 0.25, bulk.iloc[::-1], bulk, tmp_path / "proportions.png")
    scatter, bars = saved[0].axes[0], saved[0].axes[-1]
    np.testing.assert_allclose(scatter.collections[0].get_offsets(), np.column_stack([true["B"], estimate["B"]]))
    assert scatter.get_title() == "B\nr {r:.2f}, CCC {CCC:.2f}".format(**agreement.loc["B"])
    labels = [label.get_text() for label in bars.get_xticklabels()]
    assert labels == ["s2, true", "s1, true", "s1, predicted", "s2, predicted"]
    many = pd.concat([bulk] * 30)
    plots_bulk.proportions(true, estimate, agreement, 0.25, None, many, tmp_path / "proportions.png")
    assert saved[1].axes[-1].get_title() == "first 40 of 60 samples"


def test_intervals_of_shares_of_cells_and_of_rna(saved, tmp_path):
    cells = pd.DataFrame(np.random.default_rng(0).dirichlet(np.ones(3), 5), [f"s{i}" for i in range(5)], TYPES)
    rna = cells[::-1].set_axis(cells.index)
    for n in (2, 5):  # a panel per sample, a panel per type
        plots_bulk.intervals(
            {"cells": (cells[:n], 0.1 * cells[:n]), "RNA": (rna[:n], np.nan * rna[:n])}, tmp_path / "bulk.png"
        )
    by_sample, by_type = (figure.axes for figure in saved)
    assert [axes.get_title() for axes in by_sample] == ["s0", "s1"] and [axes.get_title() for axes in by_type] == TYPES
    assert [label.get_text() for label in by_sample[0].get_yticklabels()] == TYPES
    cell_lines, cell_dots, _, rna_dots = by_type[1].collections[:4]
    np.testing.assert_allclose(cell_dots.get_offsets()[:, 0], cells[TYPES[1]])
    np.testing.assert_allclose(rna_dots.get_offsets()[:, 0], rna[TYPES[1]])
    ends = np.array([segment[:, 0] for segment in cell_lines.get_segments()])
    np.testing.assert_allclose(ends, np.outer(cells[TYPES[1]], [0.8, 1.2]).clip(0, 1))


def test_signature_shows_the_markers_of_each_type(saved, tmp_path):
    genes = [f"GENE{i}" for i in range(40)]
    profiles = pd.DataFrame(np.ones((3, 40)), TYPES, genes)
    for k in range(3):
        profiles.iloc[k, 10 * k : 10 * k + 6] = 50
    adapted = profiles.mul(np.linspace(0.5, 2, 40)).drop(columns="GENE30")
    plots_bulk.signature(profiles, adapted, report.signature_markers(profiles, adapted), tmp_path / "signature.png")
    shown = [label.get_text() for label in saved[0].axes[1].get_xticklabels()]
    assert shown == [f"GENE{10 * k + i}" for k in range(3) for i in range(6)]
    single_cells = saved[0].axes[0].images[0].get_array()
    assert (single_cells.argmax(axis=0) == np.repeat([0, 1, 2], 6)).all() and single_cells.max() == 1


def test_fidelity_shows_auc_below_one_half_and_every_type(saved, tmp_path):
    cells = simulated_dataset(n_cells=60)
    types = list(cells.obs["cell_type"].cat.categories)
    rows = [("all", "forest AUC", 0.6, 0.5), ("all", "linear AUC", 0.7, 0.45), (types[1], "forest AUC", 0.8, 0.3)]
    table = pd.DataFrame(rows, columns=["cells", "figure", "generated", "real"])
    statistics = {name: cell_statistics.summarise(cells) for name in ("test", "train", "generated")}
    plots_cells.fidelity(table, statistics, 0.5, types, tmp_path / "fidelity.png")
    all_types, within, *_ = saved[0].axes
    widths = {bars.get_label(): [bar.get_width() for bar in bars] for bars in all_types.containers}
    assert widths["train cells"] == pytest.approx([-0.05, 0.0])  # linear, forest
    assert widths["generated cells"] == pytest.approx([0.2, 0.1])
    assert within.get_xlim()[0] < 0.3 and [label.get_text() for label in within.get_yticklabels()] == [types[1]]
    colours = {to_hex(dots.get_facecolors()[0]) for dots in saved[0].axes[7].collections}
    assert colours == {colour.lower() for colour in plots_style.palette(types).values()}


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for axes in figure.axes for text in axes.texts]


@pytest.mark.parametrize(
    ("model", "sizes"),
    [
        (PaperGMVAE(1234, 17), {"1,234": 7, "17": 4, "128": 13, "64": 4, "32": 8, "48": 1}),
        (GMVAE(1234, 17, n_latent=21), {"1,234": 5, "17": 4, "128": 1, "21": 8, "1": 2, "48": 1}),
    ],
)  # fmt: skip
def test_figure_1_shows_the_sizes_of_all_layers(model, sizes, saved, tmp_path):
    plots_paper.figure_1(paper_figures.architecture_of(model), ("regression", (48, 17)), tmp_path / "paper_fig1.png")
    shown = [text for text in texts(saved[0]) if text.replace(",", "").isdigit()]
    assert {size: shown.count(size) for size in set(shown)} == sizes


def test_figure_3_shows_each_type_once_and_all_cells(saved, tmp_path):
    shares = pd.DataFrame({"predicted": [0.5, 0.3, 0.2], "true": [0.6, 0.3, 0.1]}, index=TYPES)
    umap, is_generated = np.random.default_rng(0).normal(size=(30, 2)), np.arange(30) >= 12
    cell_type = pd.Series(pd.Categorical(np.resize(TYPES, 30), categories=TYPES))
    plots_paper.figure_3(shares, 0.0667, umap, is_generated, cell_type, tmp_path / "paper_fig3.png")
    scatter, both, _, original, generated, _ = saved[0].axes
    np.testing.assert_array_equal(scatter.collections[0].get_offsets(), shares[["predicted", "true"]])
    line = scatter.lines[0].get_xydata()
    np.testing.assert_array_equal(line[:, 0], line[:, 1])
    assert "MAE: 0.0667" in scatter.get_title() and scatter.get_xlabel() == "predicted proportion"
    np.testing.assert_array_equal(original.collections[0].get_offsets(), umap[:12])
    np.testing.assert_array_equal(generated.collections[0].get_offsets(), umap[12:])
    assert both.get_xlim() == original.get_xlim() == generated.get_xlim()
    plots_paper.figure_3(None, np.nan, umap, is_generated, cell_type, tmp_path / "paper_fig3.png")
    assert "were not predicted" in texts(saved[1])[0]


def test_figure_4_shows_both_sets_in_the_order_of_one_tree_with_all_names(saved, tmp_path):
    a, b = (np.corrcoef(np.random.default_rng(i).normal(size=(5, 20))) for i in range(2))
    tree = cell_statistics.cluster_tree(a)
    plots_paper.figure_4(a, b, list("ABCDE"), tree, 0.5, 0.75, tmp_path / "paper_fig4.png")
    order = leaves_list(tree)
    maps = [axes for axes in saved[0].axes if axes.images]
    for axes, matrix in zip(maps, (a, b), strict=True):
        np.testing.assert_array_equal(axes.images[0].get_array(), matrix[order][:, order])
        assert axes.images[0].get_clim() == (-1, 1)
        for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
            assert [label.get_text() for label in labels] == ["ABCDE"[i] for i in order]
    assert "r = 0.50 (train cells: 0.75)" in titles(saved[0])


def test_comparison_shows_each_generator_and_the_reference(saved, tmp_path):
    table = pd.DataFrame({"gmvae": 0.6, "beta_vae": -0.1}, index=list(plots_cells.COMPARED))
    plots_cells.comparison(table, pd.Series(0.5, index=table.index), tmp_path / "comparison.png")
    axes = saved[0].axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["gmvae", "beta_vae"]
    assert [bar.get_width() for bar in axes.patches] == [0.6, -0.1] and axes.lines[0].get_xdata()[0] == 0.5
    assert axes.get_xlim()[0] < -0.1 and len(saved[0].axes) == 12


def test_comparison_says_where_a_metric_could_not_be_computed(saved, tmp_path):
    table = pd.DataFrame({"gmvae": 0.6, "beta_vae": 0.1}, index=list(plots_cells.COMPARED))
    table.loc["marker overlap"] = np.nan
    plots_cells.comparison(table, pd.Series(0.5, index=table.index), tmp_path / "comparison.png")
    axes = saved[0].axes[plots_cells.COMPARED.index("marker overlap")]
    assert "too few cells" in axes.get_title() and not axes.patches


def test_type_correlation_and_composition_show_their_tables(saved, tmp_path):
    table = pd.DataFrame([[0.9, -0.2, 0.1]], index=["B"], columns=TYPES)
    plots_cells.type_correlation(table, 30, tmp_path / "type_correlation.png")
    assert [text.get_text() for text in saved[0].axes[0].texts] == ["0.90", "-0.20", "0.10"]
    assert "30 marker genes" in titles(saved[0])
    plots_cells.composition(table.abs() / 1.2, tmp_path / "composition.png")
    assert len(saved[1].axes[0].patches) == 3


def test_embeddings_have_a_title_with_the_number_of_cells(saved, tmp_path):
    rng = np.random.default_rng(0)
    embedding, is_second = rng.normal(size=(30, 2)), np.arange(30) < 10
    cell_type = pd.Series(pd.Categorical(rng.choice(TYPES, 30), categories=TYPES))
    plots_cells.umap_reference(embedding, cell_type, is_second, tmp_path / "umap_reference.png")
    plots_cells.original_vs_generated(embedding, is_second, tmp_path / "original.png", "MDE")
    plots_cells.original_vs_generated_by_type(embedding, is_second, cell_type, tmp_path / "by_type.png")
    stages = [embedding[:n] for n in (30, 30, 30, 20)]
    of_stages = [cell_type[:n] for n in (30, 30, 30, 20)]
    plots_cells.four_stages({"t-SNE": stages, "UMAP": stages}, of_stages, tmp_path / "four_stages.png")
    assert titles(saved[0]) == "cell types (30 cells)|split"
    assert titles(saved[1]) == "test cells (20)|generated cells (10)|both"
    assert titles(saved[2]) == "test cells (20)|generated cells (10)"
    assert titles(saved[3]).count("30 cells") == 6 and titles(saved[3]).count("generated, 20 cells") == 2
    assert saved[1].axes[0].get_xlabel() == "MDE 1"
