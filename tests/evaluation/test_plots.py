"""The figures hold the numbers they are given, one colour per cell type, and no label is lost."""

import numpy as np
import pandas as pd
import pytest
from helpers import simulated_dataset
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from scipy.cluster.hierarchy import leaves_list
from scipy.spatial.distance import pdist

from lib.evaluation import metrics, plots_bulk, plots_cells, plots_paper
from lib.evaluation.plots_cells import COMPARED, palette

TYPES = ["B", "NK", "T"]
COLOURS = [colour.lower() for colour in palette(TYPES).values()]


@pytest.fixture
def saved(monkeypatch) -> list[Figure]:
    """The figures that were written."""
    figures, write = [], plots_cells.save
    for module in (plots_cells, plots_bulk, plots_paper):
        monkeypatch.setattr(module, "save", lambda figure, *more: (figures.append(figure), write(figure, *more)))
    return figures


def titles(figure: Figure) -> str:
    return "|".join(axes.get_title() for axes in figure.axes)


def labels(texts) -> list[str]:
    return [text.get_text() for text in texts]


def test_stacked_bars_have_the_heights_and_colours_of_the_types(saved, tmp_path):
    table = pd.DataFrame([[0.2, 0.3, 0.5], [0.6, 0.1, 0.3]], index=["s_1", "s_2"], columns=TYPES)
    plots_cells.composition(table, tmp_path / "composition.png")
    axes = saved[0].axes[0]
    tops = np.array([[bar.get_y() + bar.get_height() for bar in bars] for bars in axes.containers])
    np.testing.assert_allclose(tops.T, table.cumsum(axis=1))
    assert [to_hex(bars[0].get_facecolor()) for bars in axes.containers] == COLOURS
    assert labels(axes.get_xticklabels()) == ["s 1", "s 2"]


def test_a_type_keeps_its_colour_where_other_types_have_no_cells():
    axes = Figure().subplots()
    cell_type = pd.Series(pd.Categorical(["T"] * 5, categories=TYPES))
    plots_cells.scatter_by_type(axes, np.arange(10.0).reshape(5, 2), cell_type)
    assert {to_hex(colour) for colour in axes.collections[0].get_facecolors()} == {COLOURS[2]}
    assert labels(axes.texts) == ["3"] and axes.get_legend_handles_labels()[1] == ["1  B", "2  NK", "3  T"]


def test_numbers_of_types_do_not_overlap_where_cells_are_mixed():
    rng = np.random.default_rng(0)
    names = np.array(["a", "b", "c", "d"])[rng.integers(0, 4, 400)]
    embedding = rng.normal(size=(400, 2))
    places = plots_cells.label_places(embedding, names, ["a", "b", "c", "d", "absent"])
    assert list(places) == ["a", "b", "c", "d"]
    assert pdist(list(places.values())).min() >= 0.04 * np.ptp(embedding, axis=0).max()


def test_loss_curves_have_a_panel_for_each_part(saved, tmp_path):
    names = "epoch train_loss held_out_loss train_kl_z held_out_kl_z held_out_stopping_criterion held_out_elbo"
    history = pd.DataFrame([[1, 3.0, 4.0, 1, 1, 4, -4.0], [2, 2.0, 3.5, 1, 1, 3, -3.5]], columns=names.split())
    plots_cells.loss_curves(history, 2, "nats per cell", tmp_path / "loss.png")
    assert titles(saved[0]) == "loss|KL divergence of z|stopping criterion"
    train, held_out, best = saved[0].axes[0].lines
    np.testing.assert_array_equal([train.get_ydata(), held_out.get_ydata()], [[3, 2], [4, 3.5]])
    assert best.get_xdata()[0] == 2 and saved[0].axes[0].get_ylabel() == "nats per cell"
    assert len(saved[0].axes[2].lines) == 2  # the stopping criterion is of held-out data alone


def test_proportions_of_the_mixtures_and_of_the_bulk(saved, tmp_path):
    rng = np.random.default_rng(0)
    true, estimate = (pd.DataFrame(rng.dirichlet(np.ones(3), 6), columns=TYPES) for _ in range(2))
    agreement = metrics.proportion_agreement(true, estimate)
    bulk = pd.concat([estimate.iloc[:2].set_axis(["s1", "s2"])] * 30)
    plots_bulk.proportions(true, estimate, agreement, 0.25, bulk.iloc[:2], tmp_path / "proportions.png")
    scatter, bars = saved[0].axes[0], saved[0].axes[-1]
    np.testing.assert_allclose(scatter.collections[0].get_offsets(), np.column_stack([true["B"], estimate["B"]]))
    assert "CCC {CCC:.2f}".format(**agreement.loc["B"]) in scatter.get_title()
    assert labels(bars.get_xticklabels()) == ["s1", "s2"]
    plots_bulk.proportions(true, estimate, agreement, 0.25, bulk, tmp_path / "proportions.png")
    assert saved[1].axes[-1].get_title() == "first 40 of 60 samples"


def test_intervals_of_shares_of_cells_and_of_rna(saved, tmp_path):
    cells = pd.DataFrame(np.random.default_rng(0).dirichlet(np.ones(3), 5), [f"s{i}" for i in range(5)], TYPES)
    rna = cells[::-1].set_axis(cells.index)
    for n in (2, 5):  # a panel per sample, a panel per type
        with_interval = cells[:n], 0.8 * cells[:n], 0.5 + 0.5 * cells[:n]
        without = rna[:n], np.nan * rna[:n], np.nan * rna[:n]
        plots_bulk.intervals({"cells": with_interval, "RNA": without}, tmp_path / "bulk.png")
    by_sample, by_type = (figure.axes for figure in saved)
    assert titles(saved[0]) == "s0|s1" and titles(saved[1]) == "B|NK|T"
    assert labels(by_sample[0].get_yticklabels()) == TYPES
    cell_lines, cell_dots, _, rna_dots = by_type[1].collections[:4]
    np.testing.assert_allclose(cell_dots.get_offsets()[:, 0], cells["NK"])
    np.testing.assert_allclose(rna_dots.get_offsets()[:, 0], rna["NK"])
    ends = np.array([segment[:, 0] for segment in cell_lines.get_segments()])
    np.testing.assert_allclose(ends, np.column_stack([0.8 * cells["NK"], 0.5 + 0.5 * cells["NK"]]))
    assert "95 % intervals" in saved[0].get_supxlabel()
    plots_bulk.intervals({"cells": without}, tmp_path / "bulk.png")
    assert "no intervals" in saved[2].get_supxlabel()  # and not lines that are not there


def test_fidelity_shows_auc_below_one_half_and_every_type(saved, tmp_path):
    cells = simulated_dataset(n_cells=60)
    types = list(cells.obs["cell_type"].cat.categories)
    rows = [("all", "forest AUC", 0.6, 0.5), ("all", "linear AUC", 0.7, 0.45), (types[1], "forest AUC", 0.8, 0.3)]
    table = pd.DataFrame(rows, columns=["cells", "figure", "generated", "real"])
    statistics = metrics.library_and_genes, metrics.gene_statistics, metrics.type_fold_changes
    tables = [{name: statistic(cells) for name in ("test", "train", "generated")} for statistic in statistics]
    plots_cells.fidelity(table, *tables, 0.5, types, tmp_path / "fidelity.png")
    all_types, within, *_ = saved[0].axes
    widths = {bars.get_label(): [bar.get_width() for bar in bars] for bars in all_types.containers}
    assert widths["train cells"] == pytest.approx([-0.05, 0.0])  # linear, forest
    assert widths["generated cells"] == pytest.approx([0.2, 0.1])
    assert within.get_xlim()[0] < 0.3 and labels(within.get_yticklabels()) == [types[1]]
    colours = {to_hex(dots.get_facecolors()[0]) for dots in saved[0].axes[7].collections}
    assert colours == {colour.lower() for colour in palette(types).values()}
    plots_cells.fidelity(table[:2], *tables, 0.5, types, tmp_path / "fidelity.png")
    assert not labels(saved[1].axes[1].get_yticklabels())  # too few cells of any type


def test_figure_1_shows_each_network_with_the_sizes_of_its_layers(saved, tmp_path):
    network = plots_paper.Network
    boxes = {"encoder": [network("x", (1234, 128, 17), "q(y|x)"), network("y", (17, 21), "p(z|y)")], "decoder": []}
    boxes |= {"deconvolution": [network("bulk", (48, 17), "proportions")], "generation": []}
    plots_paper.figure_1(boxes, tmp_path / "paper_fig1.png")
    encoder, decoder, deconvolution, _ = ([text for text in labels(axes.texts) if text] for axes in saved[0].axes)
    assert encoder == ["y", "p(z|y)", "17", "21", "x", "q(y|x)", "1,234", "128", "17"]
    assert not decoder and deconvolution == ["bulk", "proportions", "48", "17"]


def test_figure_3_shows_each_type_once_and_all_cells(saved, tmp_path):
    shares = pd.DataFrame({"predicted": [0.5, 0.3, 0.2], "true": [0.6, 0.3, 0.1]}, index=TYPES)
    umap, is_generated = np.random.default_rng(0).normal(size=(30, 2)), np.arange(30) >= 12
    cell_type = pd.Series(pd.Categorical(np.resize(TYPES, 30), categories=TYPES))
    plots_paper.figure_3(shares, 0.0667, umap, is_generated, cell_type, tmp_path / "paper_fig3.png")
    scatter, both, _, test, generated, _ = saved[0].axes
    np.testing.assert_array_equal(scatter.collections[0].get_offsets(), shares[["predicted", "true"]])
    assert "MAE: 0.0667" in scatter.get_title() and scatter.get_xlabel() == "predicted proportion"
    for axes, shown in ((test, umap[:12]), (generated, umap[12:]), (both, umap)):
        np.testing.assert_array_equal(np.sort(axes.collections[1].get_offsets(), axis=0), np.sort(shown, axis=0))
    assert both.get_xlim() == test.get_xlim() == generated.get_xlim()
    plots_paper.figure_3(None, np.nan, umap, is_generated, cell_type, tmp_path / "paper_fig3.png")
    assert "were not predicted" in labels(saved[1].axes[0].texts)[0]


def test_figure_4_shows_both_sets_in_the_order_of_one_tree_with_all_names(saved, tmp_path):
    a, b = (np.corrcoef(np.random.default_rng(i).normal(size=(5, 20))) for i in range(2))
    tree = metrics.cluster_tree(a)
    plots_paper.figure_4(a, b, list("ABCDE"), tree, 0.5, 0.75, tmp_path / "paper_fig4.png")
    order = leaves_list(tree)
    for axes, matrix in zip((axes for axes in saved[0].axes if axes.images), (a, b), strict=True):
        np.testing.assert_array_equal(axes.images[0].get_array(), matrix[order][:, order])
        assert axes.images[0].get_clim() == (-1, 1)
        assert labels(axes.get_xticklabels()) == labels(axes.get_yticklabels()) == ["ABCDE"[i] for i in order]
    assert "r = 0.50 (train cells: 0.75)" in titles(saved[0])
    assert saved[0].axes[0].yaxis.get_inverted()  # the tree at the left begins at the top, as the rows of the heat map


def test_comparison_shows_each_generator_and_the_reference_and_says_what_is_missing(saved, tmp_path):
    table = pd.DataFrame({"gmvae": 0.6, "beta_vae": -0.1}, index=list(COMPARED))
    table.loc["marker overlap"] = np.nan
    reference = pd.Series(0.5, index=table.index)
    reference["membership AUC"] = np.nan
    plots_cells.comparison(table, reference, tmp_path / "comparison.png")
    axes = dict(zip(COMPARED, saved[0].axes, strict=True))
    first, missing, membership = (axes[name] for name in ("forest AUC", "marker overlap", "membership AUC"))
    assert labels(first.get_yticklabels()) == ["gmvae", "beta_vae"] and first.lines[0].get_xdata()[0] == 0.5
    assert [bar.get_width() for bar in first.patches] == [0.6, -0.1] and first.get_xlim()[0] < -0.1
    assert "too few cells" in missing.get_title() and labels(missing.texts) == ["", ""]
    assert labels(membership.texts) == ["0.600", "-0.100"] and np.isfinite(membership.get_xlim()).all()


def test_heat_maps_show_their_tables(saved, tmp_path):
    table = pd.DataFrame([[0.9, -0.2, 0.1]], index=["B"], columns=TYPES)
    plots_cells.type_correlation(table, 30, tmp_path / "type_correlation.png")
    assert labels(saved[0].axes[0].texts) == ["0.90", "-0.20", "0.10"] and "30 marker genes" in titles(saved[0])
    markers = pd.DataFrame(np.eye(3), TYPES, ["CD19", "NKG7", "CD3D"])
    plots_bulk.signature(markers, markers / 2, tmp_path / "signature.png")
    single_cells, bulk = (axes for axes in saved[1].axes if axes.get_title())
    np.testing.assert_array_equal(single_cells.images[0].get_array(), markers)
    np.testing.assert_array_equal(bulk.images[0].get_array(), markers / 2)
    assert labels(bulk.get_xticklabels()) == list(markers) and labels(bulk.get_yticklabels()) == TYPES


def test_embeddings_have_a_title_with_the_number_of_cells(saved, tmp_path):
    rng = np.random.default_rng(0)
    embedding, is_second = rng.normal(size=(30, 2)), np.arange(30) < 10
    cell_type = pd.Series(pd.Categorical(rng.choice(TYPES, 30), categories=TYPES))
    plots_cells.umap_reference(embedding, cell_type, is_second, tmp_path / "umap_reference.png")
    plots_cells.original_vs_generated(embedding, is_second, tmp_path / "original.png", "MDE")
    plots_cells.original_vs_generated_by_type(embedding, is_second, cell_type, tmp_path / "by_type.png")
    stages, cell_types = ([table[:n] for n in (30, 30, 30, 20)] for table in (embedding, cell_type))
    plots_cells.four_stages({"t-SNE": stages, "UMAP": stages}, cell_types, tmp_path / "four_stages.png")
    assert titles(saved[0]) == "cell types (30 cells)|split"
    assert titles(saved[1]) == "test cells (20)|generated cells (10)|both"
    assert titles(saved[2]) == "test cells (20)|generated cells (10)"
    assert titles(saved[3]).count("30 cells") == 6 and titles(saved[3]).count("generated, 20 cells") == 2
    assert saved[1].axes[0].get_xlabel() == "MDE 1"
