"""How the cells of one condition, such as a donor or a batch, differ from the other cells of their type.

The GMVAE is trained on all conditions together. After training, each condition c gets a shift of z and log library size, s(c,y), and
a log ratio of mean counts per gene, r(c,y), and its cells are sampled from

    z, log l = sample for y + s(c,y);        p(x|z,y,l) with logits + r(c,y).

Both are sums of an effect on all types and one on each type, shrunk by empirical Bayes: a condition with few cells of a type borrows from
its other types, and where these are few as well, from the other conditions. A condition that the train cells lack is sampled from a
normal distribution (`add_new`): its covariance is that of the estimated effects, plus their posterior variance, which these lack.
"""

from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch

from lib.data.batches import CellDataset
from lib.models.gmvae import Prior
from lib.models.profiles import counts_per_type, posterior_ratio, type_means


class Conditions(NamedTuple):
    counts: np.ndarray  # (n_conditions, n_cell_types, n_genes) sums over all train cells, with those held out
    n_cells: np.ndarray  # (n_conditions, n_cell_types) their numbers

    def frequency(self) -> torch.Tensor:
        """Share of each condition in the cells of each type, or in all cells where a type has none: conditions x types."""
        n_cells = np.where(self.n_cells.any(axis=0), self.n_cells, self.n_cells.sum(axis=1, keepdims=True))
        return torch.from_numpy(n_cells / n_cells.sum(axis=0)).float()


def condition_column(obs: pd.DataFrame, column: str, min_cells: int) -> pd.Categorical:
    """The conditions of the train cells, a column of `obs`; ValueError unless it has `min_cells` cells of each on average."""
    usable = [name for name in obs if name not in ("cell_type", "sample", "library_size")]
    if column not in usable:
        raise ValueError(
            f"CONDITION is {column!r}; expected a column of obs, of another name than those of generated cells: "
            f"{', '.join(usable) or 'there is none'}; set it to one of them, or to none"
        )
    n_values, n_missing = obs[column].nunique(), obs[column].isna().sum()
    if n_missing or not 2 <= n_values <= len(obs) / min_cells:
        raise ValueError(
            f"CONDITION = {column!r} has {n_values:,} values and is missing for {n_missing:,} of {len(obs):,} cells; expected a "
            f"value for every cell, two values or more, and {min_cells} cells of each on average; choose another column"
        )
    return pd.Categorical(obs[column].astype(str))


def read_conditions(
    condition_idx: np.ndarray, train: CellDataset, held_out: CellDataset | None, n_cell_types: int
) -> Conditions:
    """The conditions of two data sets that are parts of one file. condition_idx: of all cells of the file, none unknown."""
    shape = (condition_idx.max() + 1, n_cell_types)
    counts, n_cells = np.zeros((*shape, train.n_genes)), np.zeros(shape, dtype=np.int64)
    for dataset in (train, held_out) if held_out is not None else (train,):
        groups = condition_idx[dataset.cells] * n_cell_types + dataset.cell_type_idx
        groups[dataset.cell_type_idx < 0] = -1
        counts += counts_per_type(dataset, n_cells.size, groups).reshape(counts.shape)
        n_cells += np.bincount(groups[groups >= 0], minlength=n_cells.size).reshape(shape)
    return Conditions(counts, n_cells)


class Effects(NamedTuple):
    """Estimated effects of the conditions, and their posterior variances, means over the conditions."""

    mean: np.ndarray  # (n_conditions, n_cell_types, n_dims)
    variance: np.ndarray  # (1 + n_cell_types, n_dims) of the effect on all types, then of those on each type

    def tensors(self, name: str) -> Prior:
        """As entries of the prior."""
        return {name: torch.from_numpy(self.mean).float(), f"{name}_variance": torch.from_numpy(self.variance).float()}


def fit_shift(
    points: np.ndarray, types: np.ndarray, condition_idx: np.ndarray, n_conditions: int, n_cell_types: int
) -> Effects:
    """Estimate s(c,y): shift from the mean of the type's cells. points: cells x dimensions, z and, as the last column, log library size."""
    deviations = points - type_means(points, types, n_cell_types)[types]
    on_all, variance_on_all = shrunken_means(deviations, condition_idx, n_conditions)
    groups = condition_idx * n_cell_types + types
    on_type, variance = shrunken_means(deviations - on_all[condition_idx], groups, n_conditions * n_cell_types)
    return _combined(on_all, variance_on_all, on_type, variance)


def shrunken_means(x: np.ndarray, groups: np.ndarray, n_groups: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean of each group, shrunk towards 0: mean x between / (between + within / n); its posterior variance; each groups x dimensions.

    `between` is the variance of the groups' true means and `within` that of cells in a group, by the moments of the one-way analysis of
    variance (Searle, Casella and McCulloch, "Variance Components", 1992, ch. 3). x: cells x dimensions, with mean 0; groups: (n_cells,).
    """
    n = np.bincount(groups, minlength=n_groups)
    mean = np.zeros((n_groups, x.shape[1]))
    np.add.at(mean, groups, x)
    mean /= np.maximum(n, 1)[:, None]
    n_present = np.count_nonzero(n)
    within = ((x - mean[groups]) ** 2).sum(axis=0) / max(1, len(x) - n_present)
    sum_of_squares = (n[:, None] * mean**2).sum(axis=0)
    between = np.maximum(sum_of_squares - (n_present - 1) * within, 0) / max(len(x) - (n**2).sum() / len(x), 1e-9)
    weight = n[:, None] * between / np.maximum(n[:, None] * between + within, 1e-300)
    return mean * weight, between * (1 - weight)


def fit_log_ratio(conditions: Conditions, profiles: np.ndarray, theta: np.ndarray) -> Effects:
    """Estimate r(c,y): log ratio of the mean counts of a condition's cells to those that the model expects.

    profiles: conditions x types x genes, mean expression of new cells with shift s(c,y), as fractions of their counts; theta: (n_genes,)
    or types x genes. Counts are divided by the ratio of variance to mean, as in `lib.models.profiles.type_profiles`.
    """
    counts, n_cells = conditions.counts, conditions.n_cells[:, :, None]
    expected = profiles * counts.sum(axis=2, keepdims=True)
    overdispersion = 1 + expected / np.maximum(n_cells, 1) / theta
    observed, expected = counts / overdispersion, expected / overdispersion + 1e-9
    on_all, variance_on_all = posterior_ratio(observed.sum(axis=1), expected.sum(axis=1))
    expected = expected * on_all[:, None]
    on_type, variance = posterior_ratio(*(x.reshape(-1, x.shape[2]) for x in (observed, expected)))
    # variances of the logs, as of log-normal ratios
    variance_on_all, variance = np.log1p(variance_on_all / on_all**2), np.log1p(variance / on_type**2)
    return _combined(np.log(on_all), variance_on_all, np.log(on_type), variance)


def _combined(on_all: np.ndarray, variance_on_all: np.ndarray, on_type: np.ndarray, variance: np.ndarray) -> Effects:
    """Sum of the effects on all types, conditions x dimensions, and on each type, (conditions x types) x dimensions."""
    shape = (len(on_all), -1, on_all.shape[1])
    mean = on_all[:, None] + on_type.reshape(shape)
    return Effects(mean, np.vstack([variance_on_all.mean(axis=0), variance.reshape(shape).mean(axis=0)]))


def assign(prior: Prior, cell_type_idx: np.ndarray, seed: int) -> np.ndarray:
    """A random condition for each new cell, with the frequencies of its type's train cells: (n_cells,)."""
    share = prior["condition_frequency"].double().cumsum(dim=0).numpy()  # conditions x types
    u = np.random.default_rng([seed, 6]).random(len(cell_type_idx))
    return (u > share[:-1, cell_type_idx]).sum(axis=0)


def choose(model: Any, values: list[str], wanted: str | None, cell_type_idx: np.ndarray, seed: int) -> pd.Categorical:
    """The condition of each new cell: the wanted one; "new" for one that the train cells lack, which is added to `model.prior`; None for
    random ones (`assign`). ValueError for a condition that the model does not know.
    """
    if wanted not in (None, "new", *values):
        raise ValueError(f"GENERATE_CONDITION is {wanted!r}; expected {', '.join(values)}, new or none")
    if wanted is None:
        return pd.Categorical.from_codes(assign(model.prior, cell_type_idx, seed), values)
    if wanted not in values:
        model.prior, values = add_new(model.prior, seed), [*values, wanted]
    return pd.Categorical.from_codes(np.full(len(cell_type_idx), values.index(wanted)), values)


def add_new(prior: Prior, seed: int) -> Prior:
    """The prior with one more condition, the last one: the mean over the conditions, plus their deviations from it weighted by normal
    numbers of variance 1 / (n_conditions - 1), which have the covariance of the estimates, plus those of the posterior variance.
    """
    rng = np.random.default_rng([seed, 7])
    n_conditions = len(prior["condition_shift"])
    epsilon = rng.normal(0, (n_conditions - 1) ** -0.5, n_conditions)
    weight = torch.from_numpy(epsilon - epsilon.mean() + 1 / n_conditions).float()
    more = {}
    for name in ("condition_shift", "condition_log_ratio"):
        sd = prior[f"{name}_variance"].sqrt()
        noise = sd * torch.from_numpy(rng.normal(size=tuple(sd.shape))).float()
        new = torch.einsum("c,c...->...", weight, prior[name]) + noise[0] + noise[1:]
        if name == "condition_log_ratio":  # the mean of a ratio, not of its log, stays the same
            new = new - 0.5 * (sd[0].square() + sd[1:].square())
        more[name] = torch.cat([prior[name], new[None]])
    return prior | more
