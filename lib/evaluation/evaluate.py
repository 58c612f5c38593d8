"""The evaluation at the end of stage 5: predicted proportions and generated cells, compared with test cells.

Every comparison has a real reference: train cells, compared with the same test cells in the same way. No generator can be better
than these. Figures and tables are written to the figure folder; each function returns the files that it wrote.
"""

import functools
from pathlib import Path
from typing import NamedTuple

import anndata as ad
import numpy as np
import pandas as pd
from sklearn.manifold import TSNE
from torch import nn

from lib.baselines import registry
from lib.bulk.bulk_encoder import BulkEncoder
from lib.bulk.deconvolution import Deconvolution, content_of_mixtures, estimate, methods_of, nnls
from lib.bulk.pseudobulk import read_test_mixtures
from lib.bulk.regression import Reference, signature_genes
from lib.bulk.sctape import ScTAPE
from lib.data.batches import CellDataset
from lib.data.counts import select_cells
from lib.data.embedding import embed, mde, principal_components, variable_genes
from lib.evaluation import metrics, plots_bulk, plots_cells, plots_paper
from lib.evaluation.metrics import EvaluationCells
from lib.evaluation.plots_paper import Network
from lib.evaluation.transfer import read_classes, transfer_table
from lib.models.gmvae import GMVAE
from lib.models.paper_gmvae import PaperGMVAE
from lib.models.profiles import find_outliers, log_fold_changes, nb_baseline, nb_per_type_log_likelihood, top_genes
from lib.models.sampling import reconstruct
from lib.run import detail, replacing

N_SIGNATURE_MARKERS = 6  # genes of each type in signature.png
MAX_MEMBERS = 10_000  # train cells, and as many generated and test cells, of the membership test: random ones
N_PCS, N_NEIGHBORS, MIN_DIST = 50, 15, 0.375  # of the UMAP of fig. 3 (original code), on all genes


class Settings(NamedTuple):
    """Constants of stage 5 for the evaluation."""

    max_cells_evaluated: int  # test cells that are compared
    max_cells_plotted: int  # of each set
    n_top_genes: int
    n_pcs: int
    n_neighbors: int
    n_correlation_genes: int
    n_type_markers: int
    mde: bool
    four_stages: bool
    xgboost: bool
    xgboost_cells: tuple[int, int, int]
    class_file: Path | None  # coarse classes of the types, for xgboost
    seed: int


def evaluate(
    model: nn.Module, deconvolution: Deconvolution | None, train: ad.AnnData, test: ad.AnnData, generated: Path,
    others: dict[str, nn.Module], settings: Settings, fig: Path, data: Path,
) -> list[Path]:  # fmt: skip
    """Compare proportions, generated cells and generators with the test cells; returns the files that were written to `fig`.

    model: the generator of `generated`; deconvolution: None if the user gave the numbers of cells; others: trained generators,
    compared with `model`; data: folder of the mixtures of test cells.
    """
    cells = ad.read_h5ad(generated, backed="r")
    # What depends on the bulk, and on the cells that were generated for it
    written = [] if deconvolution is None else plot_proportions(deconvolution, train, test, settings.seed, fig, data)
    written += plot_paper_figures(model, deconvolution, test, cells, settings, fig)
    written += plot_cells(model, train, test, cells, settings, fig)
    # What depends on the generator and the split alone
    if isinstance(model, GMVAE):  # the other generators have no likelihood of counts
        some = random_part(test, settings.max_cells_plotted, np.random.default_rng(settings.seed))
        print_likelihood(model, train, some, settings.seed)
    evaluation = select_evaluation_cells(train, test, settings)
    pooled, files = evaluate_generator(model, evaluation, fig)
    written += files
    if settings.xgboost:
        written.append(evaluate_transfer(model, train, test, settings, fig))
    if others:
        written += compare_generators(str(cells.uns["generator"]), pooled, others, evaluation, fig)
    return written


def write_table(table: pd.DataFrame, path: Path, index: bool = False, float_format: str = "%.5f") -> None:
    with replacing(path) as temporary:
        table.to_csv(temporary, index=index, float_format=float_format)


def plot_proportions(
    deconvolution: Deconvolution, train: ad.AnnData, test: ad.AnnData, seed: int, fig: Path, data: Path
) -> list[Path]:
    """Errors of the deconvolution on mixtures of test cells, and the proportions and the signature matrix of the bulk."""
    result = deconvolution.estimate
    frequencies = train.obs["cell_type"].value_counts(normalize=True)[result.proportions.columns]
    mixtures = evaluate_mixtures(deconvolution, test.uns["split_id"], frequencies, seed, fig, data)
    bulk, of_test_cells = result.proportions.rename(index=str), sum_of_test_cells(deconvolution, test)
    if of_test_cells is not None:
        error, constant = (metrics.mae(of_test_cells["true"], x) for x in (of_test_cells["predicted"], frequencies))
        print(f"all test cells as one bulk, one mixture: MAE {error:.4f}; of the train frequencies: {constant:.4f}")
        bulk = of_test_cells.T.rename(index="test cells, {}".format)
    random = {name: table[~table.index.str.startswith("own")] for name, table in mixtures.items()}
    true, estimates = random["true"], random[deconvolution.method]
    agreement = metrics.proportion_agreement(true, estimates)
    constant = metrics.mae(true, random["constant: train frequencies"])
    plots_bulk.proportions(true, estimates, agreement, constant, bulk, fig / "proportions.png")
    shares = {"cells": (result.proportions, *result.interval())}
    written = [fig / name for name in ("proportions.png", "proportions_of_bulk.png", "mixtures.csv")]
    if result.signature is not None:  # the bulk encoder predicts shares of cells alone, without profiles
        shares["RNA"] = (result.rna_proportions, *result.rna_interval())
        reference = Reference.from_checkpoint(deconvolution.checkpoint["reference"])
        reference = reference.of_genes(signature_genes(reference))
        profiles = pd.DataFrame(reference.mean, reference.cell_types, reference.gene_names)
        written.append(fig / "signature.png")
        single_cells, adapted = marker_expression(profiles, result.signature)
        plots_bulk.signature(single_cells, adapted, written[-1])
    plots_bulk.intervals(shares, fig / "proportions_of_bulk.png")
    return written


def sum_of_test_cells(deconvolution: Deconvolution | None, test: ad.AnnData) -> pd.DataFrame | None:
    """True and predicted proportions, cell types x 2, where the bulk is the sum of the test cells, else None."""
    if deconvolution is None or deconvolution.bulk_file is not None:
        return None
    predicted = deconvolution.estimate.proportions.iloc[0]
    true = test.obs["cell_type"].value_counts(normalize=True)[predicted.index]
    return pd.DataFrame({"true": true, "predicted": predicted})


def evaluate_mixtures(
    deconvolution: Deconvolution, split_id: str, frequencies: pd.Series, seed: int, fig: Path, data: Path
) -> dict[str, pd.DataFrame]:
    """Proportions of the mixtures of test cells, "true" and by every method and baseline (samples x types); mixtures.csv."""
    method, checkpoint = deconvolution.method, deconvolution.checkpoint
    content = content_of_mixtures(checkpoint)
    tpm, true = read_test_mixtures(data, split_id, checkpoint["gene_length_bp"] is not None, content is not None)
    methods = [name for name in methods_of(checkpoint) if name == method or not name.startswith("sctape-")]
    mixtures = {name: estimate(checkpoint, tpm, name, 0, seed, content).proportions for name in methods}
    mixtures["constant: train frequencies"] = pd.DataFrame([frequencies] * len(true), true.index)
    if method != "bulk_encoder":
        mixtures["NNLS on markers"] = nnls(checkpoint, tpm, content)
    rows = []
    for mixing in ("own", "dirichlet"):
        chosen = true.index.str.startswith(mixing)
        for name, estimates in mixtures.items():
            agreement = metrics.proportion_agreement(true[chosen], estimates[chosen]).loc["all types"]
            label = {"mixtures of test cells": f"{mixing} ({chosen.sum()})", "deconvolution": name}
            rows.append(label | agreement.to_dict())
    table = pd.DataFrame(rows)
    detail(table.to_string(index=False, float_format="{:.4f}".format))
    write_table(table, fig / "mixtures.csv")
    return {"true": true} | mixtures


def marker_expression(reference: pd.DataFrame, adapted: pd.DataFrame) -> list[pd.DataFrame]:
    """Both tables (types x genes) as `plots_bulk.signature` plots them, for the genes of largest fold change in the reference."""
    shared = reference.columns.intersection(adapted.columns)
    per_10k = [table[shared].div(table[shared].sum(axis=1), axis=0) * 1e4 for table in (reference, adapted)]
    fold_changes = log_fold_changes(per_10k[0].dropna().to_numpy())  # a type without train cells has no profile
    markers = shared[list(dict.fromkeys(top_genes(fold_changes, N_SIGNATURE_MARKERS).ravel()))]
    return [np.log1p(table[markers]) / np.log1p(per_10k[0][markers]).max() for table in per_10k]


def random_part(cells: ad.AnnData, n_cells: int, rng: np.random.Generator) -> ad.AnnData:
    """At most so many cells, in memory, in their order."""
    return select_cells(cells, np.sort(rng.permutation(cells.n_obs)[:n_cells]))


def together(test: ad.AnnData, generated: ad.AnnData) -> tuple[ad.AnnData, np.ndarray]:
    """Test cells and generated cells with obs["source"] and the types in the order of the test cells; mask of the generated ones."""
    both = ad.concat({"test": test, "generated": generated}, label="source", index_unique="-")
    both.obs["cell_type"] = pd.Categorical(both.obs["cell_type"], test.obs["cell_type"].cat.categories)
    return both, (both.obs["source"] == "generated").to_numpy()


def plot_paper_figures(
    model: nn.Module, deconvolution: Deconvolution | None, test: ad.AnnData, generated: ad.AnnData, settings: Settings, fig: Path
) -> list[Path]:  # fmt: skip
    """paper_fig1.png (of a GMVAE; other generators have other parts) and paper_fig3.png."""
    written = [fig / "paper_fig3.png"]
    if isinstance(model, GMVAE | PaperGMVAE):
        written.append(fig / "paper_fig1.png")
        plots_paper.figure_1(networks_of(model, deconvolution), written[-1])
    shares = sum_of_test_cells(deconvolution, test)
    error = float("nan") if shares is None else metrics.mae(shares["true"], shares["predicted"])
    rng = np.random.default_rng([settings.seed, 3])
    both, is_generated = together(*(random_part(cells, settings.max_cells_plotted, rng) for cells in (test, generated)))
    umap = embed(principal_components(both, None, N_PCS), N_NEIGHBORS, settings.seed, MIN_DIST).obsm["X_umap"]
    plots_paper.figure_3(shares, error, umap, is_generated, both.obs["cell_type"], written[0])
    return written


def networks_of(model: GMVAE | PaperGMVAE, deconvolution: Deconvolution | None) -> dict[str, list[Network]]:
    """The four boxes of fig. 1: title -> networks with the sizes of their layers."""
    n_types, n_latent, moments = model.n_cell_types, model.n_latent, ("mean", "log-variance")
    if isinstance(model, GMVAE):
        n_genes = model.n_genes
        encoder = [Network("$x, y, l$", (n_genes + n_types + 1, n_latent), "mean of $q(z|x,y)$")]
        encoder.append(Network("$y, l$", layers(model.q_z_xy_log_var), "log-variance of $q(z|x,y)$"))
        prior = [Network("$y$", (n_types, n_latent), f"{moment} of $p(z|y)$") for moment in moments]
        decoder = [Network("$z, y$", layers(model.p_x_zyl_log_mean), "mean / library size")]
        decoder.append(Network("$y$", (n_types, n_genes), "dispersion"))
        if model.p_x_zyl_zi_logits is not None:
            decoder.append(Network("$z$", layers(model.p_x_zyl_zi_logits), "extra zeros"))
        library = [Network("$z$", layers(model.p_l_zy_mean), "library size")]
        blurred = Network("$y$", (n_types, n_latent + 1), "$z, l$ like those\nof train cells")
        source = prior + library if model.prior is None else [blurred]
    else:
        n_genes, library = len(model.q_genes.weight), []
        sizes = (n_genes + n_types, *layers(model.q_z_xy_mean))
        encoder = [Network("$x, y$", sizes, f"{moment} of $q(z|x,y)$") for moment in moments]
        prior = source = [Network("$y$", layers(model.p_z_y_mean), f"{moment} of $p(z|y)$") for moment in moments]
        heads = {"mean": model.p_x_z_mean, "dispersion": model.p_x_z_theta, "extra zeros": model.p_x_z_zeros}
        decoder = [Network("$z$", (n_latent, *layers(head)), name) for name, head in heads.items()]
    if model.q_y_x is not None:
        encoder.append(Network("$x$", (n_genes, *layers(model.q_y_x)), "$q(y|x)$"))
    return {
        "I. GMVAE: encoder and prior ($x$: counts, $y$: type, $l$: library size)": encoder + prior,
        "I. GMVAE: decoder ($z$ sampled from $q(z|x,y)$)": decoder + library,
        **deconvolution_network(deconvolution),
        "III. Generation of cells ($y$: the wanted types)": source + decoder,
    }


def deconvolution_network(deconvolution: Deconvolution | None) -> dict[str, list[Network]]:
    if deconvolution is None:
        return {"II. No deconvolution: the numbers of cells are given": []}
    arguments, signature = deconvolution.checkpoint["arguments"], deconvolution.estimate.signature
    if signature is None:
        name, sizes = "bulk encoder", (*layers(BulkEncoder(**arguments).body), arguments["n_cell_types"])
    elif deconvolution.method.startswith("sctape"):
        name, sizes = "scTAPE", layers(ScTAPE(**arguments).encoder)
    else:
        name, sizes = "regression on profiles", signature.shape[::-1]
    return {f"II. Deconvolution: {name}": [Network("bulk RNA", sizes, "proportions\nof the types")]}


def layers(network: nn.Module) -> tuple[int, ...]:
    """Input of the first linear layer, and outputs of all, of a sequence of layers."""
    linear = [layer for layer in network.modules() if isinstance(layer, nn.Linear)]
    return (linear[0].in_features, *(layer.out_features for layer in linear))


def print_likelihood(model: GMVAE, train: ad.AnnData, test: ad.AnnData, seed: int) -> None:
    """log p(x|y,l) of test cells under the GMVAE and under `nb_baseline` of the train cells; outliers replaced in both."""
    train_cells = CellDataset(train.X, train.obs["cell_type"].cat.codes, model.device, in_memory=False)
    test_cells = CellDataset(test.X, test.obs["cell_type"].cat.codes, model.device)
    outliers = find_outliers(train_cells, model.n_cell_types, seed)
    train_cells, test_cells = (cells.corrected(outliers.replace) for cells in (train_cells, test_cells))
    ours = model.log_likelihood(test_cells, n_samples=20, seed=seed).mean()
    baseline = nb_per_type_log_likelihood(nb_baseline(train_cells, model.n_cell_types), test_cells).mean()
    values = f"GMVAE {ours:.1f}; one negative binomial per gene and type {baseline:.1f}"
    print(f"log-likelihood of the test cells, nats per cell: {values}")


def plot_cells(
    model: nn.Module, train: ad.AnnData, test: ad.AnnData, generated: ad.AnnData, settings: Settings, fig: Path
) -> list[Path]:
    """Plots of generated cells beside test cells: embeddings, composition, correlation of types and of genes."""
    rng = np.random.default_rng(settings.seed)
    parts = [random_part(cells, settings.max_cells_plotted, rng) for cells in (generated, test, train)]
    generated_part, test_part, train_part = parts
    written = plot_embeddings(test_part, generated_part, settings, fig)
    sets = {"train cells": train.obs, "test cells": test.obs, "generated cells": generated.obs}
    plots_cells.composition(metrics.type_proportions(sets), fig / "composition.png")
    correlation = metrics.type_correlation(test_part, generated_part, settings.n_type_markers)
    plots_cells.type_correlation(*correlation, fig / "type_correlation.png")
    genes = variable_genes(train_part, settings.n_correlation_genes)
    in_generated, in_test, in_train = (metrics.gene_correlation(part, genes) for part in parts)
    r, r_train = (metrics.correlation_agreement(in_test, matrix)[0] for matrix in (in_generated, in_train))
    tree, names = metrics.cluster_tree(in_test), list(train.var_names[genes])
    plots_paper.figure_4(in_test, in_generated, names, tree, r, r_train, fig / "paper_fig4.png")
    written += [fig / f"{name}.png" for name in ("composition", "type_correlation", "paper_fig4")]
    if settings.four_stages and isinstance(model, GMVAE):
        written.append(fig / "four_stages.png")
        plot_four_stages(model, test_part, generated_part, settings, written[-1])
    return written


def plot_embeddings(test: ad.AnnData, generated: ad.AnnData, settings: Settings, fig: Path) -> list[Path]:
    """Test and generated cells in one embedding, UMAP and, if asked for, MDE: by source and by cell type; umap.csv."""
    both, is_generated = together(test, generated)
    pcs = principal_components(both, settings.n_top_genes, settings.n_pcs)
    embeddings = {"UMAP": embed(pcs, settings.n_neighbors, settings.seed).obsm["X_umap"]}
    if settings.mde:
        embeddings["MDE"] = mde(pcs, settings.n_neighbors, settings.seed)
    table = both.obs.reindex(columns=["source", "cell_type", "sample"]).join(metrics.library_and_genes(both))
    written = [fig / "umap.csv"]
    for method, embedding in embeddings.items():
        name = method.lower()
        table[[f"{name}_1", f"{name}_2"]] = embedding
        files = [fig / f"{name}_{what}.png" for what in ("original_vs_generated", "by_cell_type")]
        plots_cells.original_vs_generated(embedding, is_generated, files[0], method)
        plots_cells.original_vs_generated_by_type(embedding, is_generated, both.obs["cell_type"], files[1], method)
        written += files
    write_table(table.rename_axis("cell"), fig / "umap.csv", index=True, float_format="%.5g")
    return written


def plot_four_stages(model: GMVAE, test: ad.AnnData, generated: ad.AnnData, settings: Settings, path: Path) -> None:
    """t-SNE and UMAP of input, latent, reconstructed and generated cells (bulk2sc, scGMVAE)."""
    seed = settings.seed
    z, counts = reconstruct(model, CellDataset(test.X, test.obs["cell_type"].cat.codes, model.device), seed)
    stages = (test, ad.AnnData(counts, obs=test.obs, var=test.var), generated)
    features = [principal_components(cells, settings.n_top_genes, settings.n_pcs) for cells in stages]
    features.insert(1, z.astype(np.float32))
    embeddings: dict[str, list[np.ndarray]] = {"t-SNE": [], "UMAP": []}
    for x in features:
        tsne = TSNE(perplexity=min(30, (len(x) - 1) / 3), init="pca", random_state=seed)
        embeddings["t-SNE"].append(tsne.fit_transform(x))
        embeddings["UMAP"].append(embed(x, settings.n_neighbors, seed).obsm["X_umap"])
    cell_types = [test.obs["cell_type"]] * 3 + [generated.obs["cell_type"]]
    plots_cells.four_stages(embeddings, cell_types, path)


def select_evaluation_cells(train: ad.AnnData, test: ad.AnnData, settings: Settings) -> EvaluationCells:
    """At most `max_cells_evaluated` test cells, and the train cells that they are compared with."""
    rng = np.random.default_rng([settings.seed, 5])
    cells = random_part(test, settings.max_cells_evaluated, rng)
    real_reference = select_cells(train, metrics.select_like(train, cells.obs["cell_type"], rng))
    genes = variable_genes(random_part(train, settings.max_cells_plotted, rng), metrics.N_CORRELATED_GENES)
    labelled = rng.permutation(np.flatnonzero(train.obs["cell_type"].notna()))[:MAX_MEMBERS]
    members, non_members = select_cells(train, np.sort(labelled)), random_part(test, MAX_MEMBERS, rng)
    return EvaluationCells(cells, real_reference, members, non_members, genes, settings.seed)


def generate(model: nn.Module, evaluation: EvaluationCells) -> list[ad.AnnData]:
    """New cells of the types of the test cells, and of the types of the train cells of the membership test."""
    generated = []
    for cells, seed in ((evaluation.test, evaluation.seed + 1), (evaluation.members, evaluation.seed + 3)):
        counts = registry.generate(model, cells.obs["cell_type"].cat.codes.to_numpy(), seed)
        generated.append(ad.AnnData(counts, obs=cells.obs[["cell_type"]].copy(), var=cells.var[[]].copy()))
    return generated


def evaluate_generator(model: nn.Module, evaluation: EvaluationCells, fig: Path) -> tuple[pd.DataFrame, list[Path]]:
    """Fidelity of new cells of the test cells' types: metrics.csv and fidelity.png. Returns the metrics over all cells as well."""
    generated, more = generate(model, evaluation)
    table = metrics.fidelity_table(evaluation, generated, more)
    write_table(table, fig / "metrics.csv")
    pooled = table[table["cells"] == "all"].set_index("figure")[["generated", "real"]]
    shown = pooled.rename(columns={"real": "train cells"})
    n_cells = f"{evaluation.test.n_obs:,}"
    print(f"{n_cells} test cells compared with as many generated cells, and with train cells of the same types:")
    print(shown.loc[["forest AUC", "linear AUC", "iLISI"]].to_string(float_format="{:.3f}".format))
    detail(shown.to_string(float_format="{:.3f}".format, na_rep=""))
    sets = {"test": evaluation.test, "train": evaluation.real_reference, "generated": generated}
    statistics = metrics.library_and_genes, metrics.gene_statistics, metrics.type_fold_changes
    cells, genes, changes = ({name: of(part) for name, part in sets.items()} for of in statistics)
    mean_r = metrics.pearson(genes["test"]["mean"], genes["generated"]["mean"])
    cell_types = list(evaluation.test.obs["cell_type"].cat.categories)
    plots_cells.fidelity(table, cells, genes, changes, mean_r, cell_types, fig / "fidelity.png")
    return pooled, [fig / "fidelity.png", fig / "metrics.csv"]


def compare_generators(
    chosen: str, pooled: pd.DataFrame, others: dict[str, nn.Module], evaluation: EvaluationCells, fig: Path
) -> list[Path]:
    """The same metrics for other generators: comparison.csv and comparison.png. pooled: from `evaluate_generator`."""
    values = {chosen: pooled["generated"]}
    for name, model in others.items():
        values[name] = metrics.fidelity_and_membership(evaluation, *generate(model, evaluation))
    generators = pd.DataFrame({name: values[name] for name in registry.CLASSES if name in values}, index=pooled.index)
    table = generators.assign(**{"real train cells": pooled["real"]})
    write_table(table, fig / "comparison.csv", index=True)
    print("the generators in models/, each compared with the same test cells:")
    print(table.to_string(float_format="{:.3f}".format, na_rep=""))
    plots_cells.comparison(generators, pooled["real"].fillna({"membership AUC": 0.5}), fig / "comparison.png")
    return [fig / "comparison.png", fig / "comparison.csv"]


def evaluate_transfer(model: nn.Module, train: ad.AnnData, test: ad.AnnData, settings: Settings, fig: Path) -> Path:
    """Precision, recall and F1 of XGBoost classifiers trained and tested on real and generated cells: xgboost.csv."""
    labelled = select_cells(train, np.flatnonzero(train.obs["cell_type"].notna()))
    all_test = select_cells(test, np.arange(test.n_obs))
    types = list(test.obs["cell_type"].cat.categories)
    classes = None if settings.class_file is None else read_classes(settings.class_file, types)
    sample = functools.partial(registry.generate, model)
    table = transfer_table(labelled, all_test, sample, settings.seed + 2, classes, *settings.xgboost_cells)
    write_table(table, fig / "xgboost.csv")
    print("XGBoost, trained and tested on real (train, test) and synthetic cells:")
    print(table.to_string(index=False, float_format="{:.3f}".format))
    return fig / "xgboost.csv"
