"""The evaluation at the end of stage 5: predicted proportions and generated cells, compared with test cells.

Every comparison has a real reference: train cells, compared with the same test cells in the same way. No generator can be better
than these. Figures and tables are written to the figure folder; each function returns the files that it wrote.
"""

from pathlib import Path
from typing import Any, NamedTuple

import anndata as ad
import numpy as np
import pandas as pd
from sklearn.manifold import TSNE
from torch import nn

from lib.baselines import registry
from lib.bulk import proportions
from lib.bulk.deconvolution import Estimate
from lib.bulk.pseudobulk import read_test_mixtures
from lib.bulk.reference import Reference, signature_genes
from lib.data.batches import CellDataset
from lib.data.counts import select_cells
from lib.data.embedding import embed, mde, principal_components, variable_genes
from lib.evaluation import cell_statistics, classifier_transfer, metrics, plots_bulk, plots_cells, plots_paper
from lib.files import replacing
from lib.log import detail
from lib.models import outliers
from lib.models.gmvae import GMVAE
from lib.models.profiles import gene_marginals, log_fold_changes, nb_per_type_log_likelihood, top_genes
from lib.models.sampling import reconstruct

N_SIGNATURE_MARKERS = 6  # genes of each type in signature.png


class PlotSettings(NamedTuple):
    """Constants of stage 5 for the plots of cells."""

    max_cells: int  # of each set
    n_top_genes: int
    n_pcs: int
    n_neighbors: int
    n_correlation_genes: int
    n_type_markers: int
    mde: bool
    four_stages: bool
    seed: int


class EvaluationCells(NamedTuple):
    """What every generator is compared with."""

    test: ad.AnnData  # test cells
    real_reference: ad.AnnData  # train cells of the same types and numbers
    unseen_train: ad.AnnData  # other train cells, for the memorisation check of the real reference
    genes: np.ndarray  # indices of the genes whose correlations are compared, selected by train cells
    seed: int


def evaluate_proportions(
    checkpoint: dict[str, Any], estimate: Estimate, method: str, train: ad.AnnData, test: ad.AnnData, of_test_cells: bool,
    data: Path, fig: Path, seed: int,
) -> list[Path]:  # fmt: skip
    """Errors of every deconvolution method on the mixtures of test cells, beside two baselines; plots of these and of the bulk.

    estimate, method: for the bulk at hand; of_test_cells: whether that bulk is the sum of the test cells.
    """
    content = proportions.content_of_mixtures(checkpoint)
    by_length = checkpoint["gene_length_bp"] is not None
    tpm, true = read_test_mixtures(data, test.uns["split_id"], by_length, content is not None)
    frequencies = train.obs["cell_type"].value_counts(normalize=True)[true.columns].to_numpy()
    baselines = {
        "constant: train frequencies": pd.DataFrame(np.tile(frequencies, (len(true), 1)), true.index, true.columns)
    }
    methods = [name for name in proportions.methods_of(checkpoint) if name == method or not name.startswith("sctape-")]
    if method != "bulk_encoder":
        baselines["NNLS on markers"] = proportions.nnls(checkpoint, tpm, content)
    estimates = {name: proportions.estimate(checkpoint, tpm, name, 0, seed, content).proportions for name in methods}
    rows = []
    for kind in ("own", "dirichlet"):
        of_kind = true.index.str.startswith(kind)
        for name, table in (estimates | baselines).items():
            agreement = metrics.proportion_agreement(true[of_kind], table[of_kind]).loc["all types"]
            rows.append(
                {"mixtures of test cells": f"{kind} ({of_kind.sum()})", "deconvolution": name} | agreement.to_dict()
            )
    detail(pd.DataFrame(rows).to_string(index=False, float_format="{:.4f}".format))
    with replacing(fig / "mixtures.csv") as temporary:
        pd.DataFrame(rows).to_csv(temporary, index=False, float_format="%.5f")
    truth = None
    if of_test_cells:
        truth = test.obs["cell_type"].value_counts(normalize=True)[true.columns].to_frame("test_cells").T
        error, constant = metrics.mae(truth, estimate.proportions), metrics.mae(truth, frequencies)
        print(
            f"all test cells as one bulk: MAE {error:.4f}; a constant (the train frequencies) has {constant:.4f}, "
            "so this one mixture says little"
        )
    random = ~true.index.str.startswith("own")
    plots_bulk.proportions(
        true[random], estimates[method][random], metrics.proportion_agreement(true[random], estimates[method][random]),
        metrics.mae(true[random], baselines["constant: train frequencies"][random]), truth, estimate.proportions, fig / "proportions.png",
    )  # fmt: skip
    shares = {"cells": (estimate.proportions, estimate.spread), "RNA": (estimate.rna_proportions, estimate.rna_spread)}
    if estimate.signature is None:  # the bulk encoder predicts shares of cells alone
        del shares["RNA"]
    plots_bulk.intervals(shares, fig / "proportions_of_bulk.png")
    written = [fig / "proportions.png", fig / "proportions_of_bulk.png", fig / "mixtures.csv"]
    if estimate.signature is None:
        return written
    reference = Reference.from_checkpoint(checkpoint["reference"])
    reference = reference.of_genes(signature_genes(reference))
    profiles = pd.DataFrame(reference.mean, reference.cell_types, reference.gene_names)
    markers = signature_markers(profiles, estimate.signature)
    plots_bulk.signature(profiles, estimate.signature, markers, fig / "signature.png")
    return [*written, fig / "signature.png"]


def signature_markers(reference: pd.DataFrame, adapted: pd.DataFrame) -> list[str]:
    """Genes of both tables (types x genes) with the largest fold changes between types in the reference, type by type."""
    shared = reference.columns.intersection(adapted.columns)
    per_10k = reference[shared].div(reference[shared].sum(axis=1), axis=0) * 1e4
    fold_changes = log_fold_changes(per_10k.dropna().to_numpy())  # a type without train cells has no profile
    return list(shared[list(dict.fromkeys(top_genes(fold_changes, N_SIGNATURE_MARKERS).ravel()))])


def print_likelihood(model: GMVAE, train: ad.AnnData, test: ad.AnnData, seed: int) -> None:
    """log p(x|y,l) of test cells under the GMVAE and one negative binomial per gene and type of the train cells; outliers replaced."""
    train_cells = CellDataset(train.X, train.obs["cell_type"].cat.codes, model.device, in_memory=False)
    test_cells = CellDataset(test.X, test.obs["cell_type"].cat.codes, model.device)
    found = outliers.find(train_cells, model.n_cell_types, seed)
    train_cells, test_cells = (cells.corrected(found.replace) for cells in (train_cells, test_cells))
    ours = model.log_likelihood(test_cells, n_samples=20, seed=seed).mean()
    baseline = nb_per_type_log_likelihood(gene_marginals(train_cells, model.n_cell_types), test_cells).mean()
    print(
        f"log-likelihood of the test cells, nats per cell: GMVAE {ours:.1f}; one negative binomial per gene and type {baseline:.1f}"
    )


def plot_cells(
    model: nn.Module, train: ad.AnnData, test: ad.AnnData, generated: ad.AnnData, settings: PlotSettings, fig: Path
) -> list[Path]:
    """Plots of generated cells beside test cells: embeddings, composition, correlation of types and of genes."""
    rng = np.random.default_rng(settings.seed)
    generated_part, test_part, train_part = (
        select_cells(cells, np.sort(rng.permutation(cells.n_obs)[: settings.max_cells]))
        for cells in (generated, test, train)
    )
    if isinstance(model, GMVAE):  # the other generators have no likelihood of counts
        print_likelihood(model, train, test_part, settings.seed)
    written = _plot_embeddings(test_part, generated_part, settings, fig)

    sets = {"train cells": train.obs, "test cells": test.obs, "generated cells": generated.obs}
    plots_cells.composition(cell_statistics.type_proportions(sets), fig / "composition.png")
    correlation, n_genes = metrics.type_correlation(test_part, generated_part, settings.n_type_markers)
    plots_cells.type_correlation(correlation, n_genes, fig / "type_correlation.png")
    genes = variable_genes(train_part, settings.n_correlation_genes)
    of_test, of_generated, of_train = (
        cell_statistics.gene_correlation(part, genes) for part in (test_part, generated_part, train_part)
    )
    r_generated, r_reference = (
        metrics.correlation_agreement(of_test, matrix)[0] for matrix in (of_generated, of_train)
    )
    plots_paper.figure_4(
        of_test, of_generated, list(train.var_names[genes]), cell_statistics.cluster_tree(of_test), r_generated, r_reference,
        fig / "paper_fig4.png",
    )  # fmt: skip
    written += [fig / f"{name}.png" for name in ("composition", "type_correlation", "paper_fig4")]
    if settings.four_stages:
        assert isinstance(model, GMVAE)
        _plot_four_stages(model, test_part, generated_part, settings, fig / "four_stages.png")
        written.append(fig / "four_stages.png")
    return written


def _plot_embeddings(test: ad.AnnData, generated: ad.AnnData, settings: PlotSettings, fig: Path) -> list[Path]:
    """Test and generated cells in one embedding, UMAP and, if asked for, MDE: by source and by cell type."""
    both = ad.concat({"original": test, "generated": generated}, label="source", index_unique="-")
    cell_type = pd.Series(
        pd.Categorical(both.obs["cell_type"], categories=test.obs["cell_type"].cat.categories), both.obs.index
    )
    is_generated = (both.obs["source"] == "generated").to_numpy()
    pcs = principal_components(both, settings.n_top_genes, settings.n_pcs)
    embeddings = {"UMAP": embed(pcs, settings.n_neighbors, settings.seed).obsm["X_umap"]}
    if settings.mde:
        embeddings["MDE"] = mde(pcs, settings.n_neighbors, settings.seed)
    with replacing(fig / "umap.csv") as temporary:
        _embedding_table(both, embeddings).to_csv(temporary, float_format="%.5g")
    written = [fig / "umap.csv"]
    for method, embedding in embeddings.items():
        by_source, by_type = (
            fig / f"{method.lower()}_{what}.png" for what in ("original_vs_generated", "by_cell_type")
        )
        plots_cells.original_vs_generated(embedding, is_generated, by_source, method)
        plots_cells.original_vs_generated_by_type(embedding, is_generated, cell_type, by_type, method)
        written += [by_source, by_type]
    return written


def _embedding_table(both: ad.AnnData, embeddings: dict[str, np.ndarray]) -> pd.DataFrame:
    """One row per cell: its source, cell type, sample (of generated cells), library size, genes detected and places."""
    table = both.obs[["source", "cell_type"]].assign(sample=both.obs.get("sample"))
    table["library_size"], table["genes_detected"] = cell_statistics.library_and_genes(both)
    for method, embedding in embeddings.items():
        for axis in (0, 1):
            table[f"{method.lower()}_{axis + 1}"] = embedding[:, axis]
    table["source"] = table["source"].astype(str).replace("original", "test")
    return table.rename_axis("cell")


def _plot_four_stages(
    model: GMVAE, test: ad.AnnData, generated: ad.AnnData, settings: PlotSettings, path: Path
) -> None:
    """t-SNE and UMAP of input, latent, reconstructed and generated cells (bulk2sc, scGMVAE)."""
    dataset = CellDataset(test.X, test.obs["cell_type"].cat.codes, model.device)
    z, counts = reconstruct(model, dataset, settings.seed)
    reconstructed = ad.AnnData(counts, obs=test.obs[["cell_type"]].copy(), var=test.var[[]].copy())
    features = [
        principal_components(cells, settings.n_top_genes, settings.n_pcs) for cells in (test, reconstructed, generated)
    ]
    features.insert(1, z.astype(np.float32))
    tsne = [
        TSNE(perplexity=min(30, (len(x) - 1) / 3), init="pca", random_state=settings.seed).fit_transform(x)
        for x in features
    ]
    umap = [embed(x, settings.n_neighbors, settings.seed).obsm["X_umap"] for x in features]
    plots_cells.four_stages(
        {"t-SNE": tsne, "UMAP": umap}, [test.obs["cell_type"]] * 3 + [generated.obs["cell_type"]], path
    )


def select_evaluation_cells(
    train: ad.AnnData, test: ad.AnnData, max_cells: int, max_gene_cells: int, seed: int
) -> EvaluationCells:
    """At most `max_cells` test cells, and the train cells that they are compared with.

    max_gene_cells: train cells, at most, that select the genes whose correlations are compared.
    """
    rng = np.random.default_rng([seed, 5])
    cells = select_cells(test, np.sort(rng.permutation(test.n_obs)[:max_cells]))
    reference_rows = metrics.select_like(train, cells.obs["cell_type"], rng)
    unseen_rows = np.sort(rng.permutation(np.setdiff1d(np.arange(train.n_obs), reference_rows))[: cells.n_obs])
    gene_cells = select_cells(train, np.sort(rng.permutation(train.n_obs)[:max_gene_cells]))
    genes = variable_genes(gene_cells, metrics.N_CORRELATED_GENES)
    return EvaluationCells(cells, select_cells(train, reference_rows), select_cells(train, unseen_rows), genes, seed)


def generate_like(model: nn.Module, cells: ad.AnnData, seed: int) -> ad.AnnData:
    """New cells of the same types as `cells`, in the same order."""
    counts = registry.generate(model, cells.obs["cell_type"].cat.codes.to_numpy(), seed)
    return ad.AnnData(counts, obs=cells.obs[["cell_type"]].copy(), var=cells.var[[]].copy())


def evaluate_generator(model: nn.Module, evaluation: EvaluationCells, fig: Path) -> tuple[pd.DataFrame, list[Path]]:
    """Fidelity of new cells of the test cells' types: metrics.csv and fidelity.png. Returns the metrics over all cells as well."""
    generated = generate_like(model, evaluation.test, evaluation.seed + 1)
    table = metrics.fidelity_table(
        evaluation.test,
        generated,
        evaluation.real_reference,
        evaluation.unseen_train,
        evaluation.genes,
        evaluation.seed,
    )
    with replacing(fig / "metrics.csv") as temporary:
        table.to_csv(temporary, index=False, float_format="%.5f")
    pooled = table[table["cells"] == "all"].drop(columns="cells").set_index("figure")
    print(
        f"{evaluation.test.n_obs:,} test cells compared with as many generated cells, and with train cells of the same types:"
    )
    table_of_all = pooled.rename(columns={"real": "train cells"})
    print(table_of_all.loc[["forest AUC", "linear AUC", "iLISI"]].to_string(float_format="{:.3f}".format))
    detail(table_of_all.to_string(float_format="{:.3f}".format))
    sets = {"test": evaluation.test, "train": evaluation.real_reference, "generated": generated}
    statistics = {name: cell_statistics.summarise(cells) for name, cells in sets.items()}
    mean_r = metrics.pearson(statistics["test"].genes["mean"], statistics["generated"].genes["mean"])
    cell_types = list(evaluation.test.obs["cell_type"].cat.categories)
    plots_cells.fidelity(table, statistics, mean_r, cell_types, fig / "fidelity.png")
    return pooled, [fig / "fidelity.png", fig / "metrics.csv"]


def fidelity_and_memorisation(evaluation: EvaluationCells, generated: ad.AnnData) -> pd.Series:
    """All metrics of generated cells against test cells, as in `metrics.fidelity_table`, over all cells."""
    found = metrics.fidelity(evaluation.test, generated, evaluation.genes, evaluation.seed)
    both = ad.concat([evaluation.test, evaluation.real_reference, generated], index_unique="-")
    pcs = principal_components(both, metrics.N_TOP_GENES, metrics.N_PCS)
    n, m = evaluation.test.n_obs, evaluation.real_reference.n_obs
    found["nearest real cell is a train cell"] = metrics.memorisation(pcs[n + m :], pcs[n : n + m], pcs[:n])
    return found


def compare_generators(
    chosen: str, pooled: pd.DataFrame, others: dict[str, nn.Module], evaluation: EvaluationCells, fig: Path
) -> list[Path]:
    """The same metrics for other generators of models/: comparison.csv and comparison.png.

    pooled: metrics of the chosen generator, from `evaluate_generator`.
    """
    table = {chosen: pooled["generated"]}
    table |= {
        name: fidelity_and_memorisation(evaluation, generate_like(model, evaluation.test, evaluation.seed + 1))
        for name, model in others.items()
    }
    generators = pd.DataFrame({name: table[name] for name in registry.CLASSES if name in table}, index=pooled.index)
    both = generators.assign(**{"real train cells": pooled["real"]})
    with replacing(fig / "comparison.csv") as temporary:
        both.to_csv(temporary, float_format="%.5f")
    print(
        "the generators in models/, each compared with the same test cells:\n"
        + both.to_string(float_format="{:.3f}".format)
    )
    plots_cells.comparison(generators, pooled["real"], fig / "comparison.png")
    return [fig / "comparison.png", fig / "comparison.csv"]


def evaluate_transfer(
    model: nn.Module,
    train: ad.AnnData,
    test: ad.AnnData,
    classes: list[str] | None,
    n_cells: tuple[int, ...],
    seed: int,
    fig: Path,
) -> list[Path]:
    """Precision, recall and F1 of XGBoost classifiers trained and tested on real and generated cells: xgboost.csv."""
    labelled = select_cells(train, np.flatnonzero(train.obs["cell_type"].notna()))
    all_test = select_cells(test, np.arange(test.n_obs))

    def sample(types: np.ndarray, seed: int):
        return registry.generate(model, types, seed)

    table = classifier_transfer.transfer_table(labelled, all_test, sample, seed + 2, classes, *n_cells)
    with replacing(fig / "xgboost.csv") as temporary:
        table.to_csv(temporary, index=False, float_format="%.5f")
    print(
        "XGBoost, trained and tested on real (train, test) and synthetic cells:\n"
        + table.to_string(index=False, float_format="{:.3f}".format)
    )
    return [fig / "xgboost.csv"]
