"""The Gaussian-mixture VAE of fig. 1: single-cell counts per cell type, learned and generated.

The generative model of one cell, y its type, l its library size, x its counts:

    y                ~ Categorical(p(y))
    z | y            ~ Normal(mean(y), variance(y))                        p(z|y)
    log l | z, y     ~ Normal(mean(z), scale(y)^2)                         p(l|z)
    x | z, y, l      ~ NB or ZINB(mu = l softmax(a(y) f(z) + log profile(y)), theta(y))   p(x|z,y)

f is linear by default, so that z holds what makes cells of one type differ, along axes that start where the data's own lie
(`lib.models.axes`); a(y), near 1, says how far a gene follows them in each type. In the paper f is a network, profile and theta(y) know
no type, there is no a(y), and z must hold the type too. q(y|x) and
q(z|x,y) are the encoders. A labelled cell is trained on its own type's bound, exactly; a cell without a label on
the sum over all types weighted by q(y|x) (Kingma et al. 2014, "Semi-supervised learning with deep generative models", eqs.
6-7), which is K times the work.
"""

import math
from collections.abc import Iterator

import numpy as np
import scipy.sparse as sp
import torch
import torch.nn.functional as F
from torch import nn

from lib.data.batches import Batch, CellDataset
from lib.models.axes import Axes
from lib.models.copula import Prior, fit_prior, respread, sample_prior, within_type_variance
from lib.models.layers import SparseLinear, Tower, mlp, sparse_linear
from lib.models.likelihoods import Likelihood, gaussian_kl, gaussian_log_prob
from lib.models.profiles import GeneMarginals, counts_per_type, shrunken_ratio

LOG_THETA_RANGE = (math.log(1e-3), math.log(1e6))
LOG_THETA_SD = 1.5  # of the genes' log theta about its mean, a priori
LOG_THETA_RATIO_SD = 0.5  # of a type's log theta about the gene's, a priori
LOG_LOADING_RATIO_SD = 0.5  # of a(y), as a logarithm, a priori
SPREAD_RANGE = (0.25, 2.0)  # of what the variance of z may be multiplied by after training
GENERATED_AT_ONCE = 256  # cells; each block has a random stream of its own


class GMVAE(nn.Module):
    """
    Parameters
    ----------
    n_genes, n_cell_types
        Sizes of the data.
    n_latent
        Dimensions of z.
    hidden
        Layers of q(z|x,y) from the genes down; p(x|z) has the same in reverse. q(y|x) and p(z|y) have the first alone.
    likelihood
        "nb" or "zinb".
    decoder
        "linear": f is one matrix, and each type has its own mean profile and loading ratios; "mlp": layers as in the paper, one profile for all.
    dispersion
        "gene": one theta a gene; "gene-type": one a gene and type; "gene-cell": a head of the decoder, as in the paper.
    dropout
        In the encoders and the decoder.
    """

    def __init__(
        self, n_genes: int, n_cell_types: int, n_latent: int = 32, hidden: tuple[int, ...] = (128, 64),
        likelihood: str = "nb", decoder: str = "linear", dispersion: str = "gene-type", dropout: float = 0.0,
    ):  # fmt: skip
        super().__init__()
        self.arguments = dict(
            n_genes=n_genes, n_cell_types=n_cell_types, n_latent=n_latent, hidden=tuple(hidden),
            likelihood=likelihood, decoder=decoder, dispersion=dispersion, dropout=dropout,
        )  # fmt: skip
        self.n_genes, self.n_cell_types, self.n_latent = n_genes, n_cell_types, n_latent
        self.q_genes = SparseLinear(
            n_genes, 3 * hidden[0]
        )  # first layer of the three towers that see x, in one product
        self.q_y_x = Tower(1, hidden[:1], n_cell_types, dropout)
        self.q_z_xy_mean = Tower(n_cell_types + 1, hidden, n_latent, dropout)
        self.q_z_xy_log_var = Tower(n_cell_types + 1, hidden, n_latent, dropout)
        self.p_z_y_mean = nn.Sequential(nn.Linear(n_cell_types, hidden[0]), nn.ReLU(), nn.Linear(hidden[0], n_latent))
        self.p_z_y_log_var = nn.Sequential(
            nn.Linear(n_cell_types, hidden[0]), nn.ReLU(), nn.Linear(hidden[0], n_latent)
        )
        self.q_axes = SparseLinear(n_genes, n_latent) if decoder == "linear" else None  # adds to the mean of q(z|x,y)
        self.q_axes_offset = nn.Parameter(torch.zeros(n_cell_types, n_latent)) if decoder == "linear" else None
        self.p_x_z = nn.Identity() if decoder == "linear" else mlp((n_latent, *reversed(hidden)), dropout)
        n_decoded = n_latent if decoder == "linear" else hidden[0]
        self.p_x_z_log_mean = nn.Linear(n_decoded, n_genes)
        self.p_x_z_zi_logits = nn.Linear(n_decoded, n_genes) if likelihood == "zinb" else None
        self.p_x_z_log_theta = nn.Linear(n_decoded, n_genes) if dispersion == "gene-cell" else None
        self.log_loading_ratio = (
            nn.Parameter(torch.zeros(n_cell_types, n_genes)) if decoder == "linear" else None
        )  # log a(y)
        self.log_theta = nn.Parameter(torch.zeros(n_genes))
        self.log_theta_ratio = nn.Parameter(torch.zeros(n_cell_types, n_genes)) if dispersion == "gene-type" else None
        self.p_l_z_mean = nn.Linear(n_latent, 1)
        self.log_library_scale = nn.Parameter(torch.zeros(n_cell_types))
        self.prior: Prior | None = None
        self.register_buffer("log_profiles", torch.zeros(n_cell_types, n_genes))
        self.register_buffer("log_theta_mean", torch.tensor(0.0))
        self.register_buffer("n_cells", torch.tensor(1.0))  # trained on
        self.register_buffer("library_median", torch.tensor(1.0))
        self.register_buffer("type_frequency", torch.full((n_cell_types,), 1 / n_cell_types))

    @torch.no_grad()
    def initialise(self, dataset: CellDataset, marginals: GeneMarginals, axes: Axes | None = None) -> None:
        """Start where the data are: marginals, library sizes and, for a linear decoder, axes of the training cells."""
        cell_type_idx, library_size = dataset.cell_type_idx, dataset.library_size
        self.library_median.fill_(float(np.median(library_size)))
        self.n_cells.fill_(len(library_size))
        n_per_type = np.bincount(cell_type_idx[cell_type_idx >= 0], minlength=self.n_cell_types)
        self.type_frequency.copy_(torch.from_numpy((n_per_type + 1) / (n_per_type + 1).sum()))
        mean_profile = self.type_frequency.cpu().double().numpy() @ marginals.profiles
        self.log_profiles.copy_(
            torch.from_numpy(np.log(marginals.profiles if self.q_axes is not None else mean_profile))
        )
        nn.init.zeros_(self.p_x_z_log_mean.bias)
        self.p_x_z_log_mean.weight.mul_(0.1)
        self.log_theta.copy_(torch.from_numpy(marginals.log_theta))
        self.log_theta_mean.fill_(float(mean_profile @ marginals.log_theta))
        for head, bias in ((self.p_x_z_log_theta, 0.0), (self.p_x_z_zi_logits, -4.0)):
            if head is not None:
                nn.init.zeros_(head.weight), nn.init.constant_(head.bias, bias)
        nn.init.zeros_(self.p_l_z_mean.bias)
        self.log_library_scale.fill_(float(np.log(np.log(library_size).std() + 1e-2)))
        if axes is not None:
            self._start_on(axes)

    def _start_on(self, axes: Axes) -> None:
        """q(z|x,y) and p(x|z,y) as the axes say, p(z|y) standard normal; the networks start small and add what is missing."""
        self.p_x_z_log_mean.weight.copy_(torch.from_numpy(axes.loadings))
        self.q_axes.weight.copy_(torch.from_numpy(axes.projection))
        self.q_axes_offset.copy_(torch.from_numpy(axes.offset))
        for last in (
            self.q_z_xy_mean.rest[-1],
            self.q_z_xy_log_var.rest[-1],
            self.p_z_y_mean[-1],
            self.p_z_y_log_var[-1],
        ):
            last.weight.mul_(0.1), nn.init.zeros_(last.bias)
        self.q_z_xy_log_var.rest[-1].bias.copy_(torch.from_numpy(np.log(axes.variance)))

    @torch.no_grad()
    def fit_prior(self, dataset: CellDataset, held_out: CellDataset | None, seed: int) -> None:
        """Fit, after training, where each type's z and library sizes lie; `sample` then draws from there.

        dataset: train cells; held_out: cells not trained on, which tell how far apart cells really lie.
        """
        generator = torch.Generator(dataset.device).manual_seed(seed)
        points, types = self._points(dataset, generator)
        self.prior = fit_prior(points, types, self.n_cell_types, np.random.default_rng(seed))
        observed = counts_per_type(dataset, self.n_cell_types)
        self._fit_ratio(observed, generator)
        if held_out is not None:
            observed = observed + counts_per_type(held_out, self.n_cell_types)
            for _ in range(2):  # the encoder does not see twice the spread as twice the spread
                respread(self.prior, self._missing_spread(held_out, seed))
                self._fit_ratio(observed, generator)

    def _fit_ratio(self, observed: np.ndarray, generator: torch.Generator) -> None:
        """What the mean counts of new cells lack of those of real cells, per type and gene, by empirical Bayes. observed: (n_cell_types, n_genes)."""
        expected = np.stack([self._mean_profile(k, generator) for k in range(self.n_cell_types)]) * observed.sum(
            axis=1, keepdims=True
        )
        self.prior["log_ratio"] = torch.from_numpy(np.log(shrunken_ratio(observed, expected + 1e-9))).float()

    def _missing_spread(self, held_out: CellDataset, seed: int) -> np.ndarray:
        """By how much to spread z so that new cells lie as far apart as held-out ones, both as the encoder sees them: (n_latent,).

        The encoder and the decoder know their train cells, so the z of these is no measure.
        """
        variance = [self._seen_variance(held_out)]
        types = np.resize(held_out.cell_type_idx[held_out.cell_type_idx >= 0], 2000)
        for noise_factor in (0.0, 1.0):
            cells = sp.vstack(list(self.sample(types, seed, noise_factor)), format="csr")
            variance.append(self._seen_variance(CellDataset(cells, types, held_out.device)))
        wanted, without, present = variance
        return np.sqrt(np.clip((wanted - without) / (present - without), *SPREAD_RANGE))

    def _seen_variance(self, dataset: CellDataset) -> np.ndarray:
        """Variance within the types of the means of q(z|x,y) of labelled cells: (n_latent,)."""
        means, types = zip(
            *((self.q_z(self.encode_genes(b), b)[0].cpu(), b.cell_type_idx.cpu()) for b in self._labelled(dataset))
        )
        return within_type_variance(torch.cat(means).double().numpy(), torch.cat(types).numpy())

    @staticmethod
    def _labelled(dataset: CellDataset) -> Iterator[Batch]:
        for batch in dataset.in_order(512):
            yield batch.select(batch.cell_type_idx >= 0)

    def _points(self, dataset: CellDataset, generator: torch.Generator) -> tuple[np.ndarray, np.ndarray]:
        """z, drawn from q(z|x,y), and log library size of each labelled cell, and its type."""
        points, types = [], []
        for batch in self._labelled(dataset):
            mean, log_var = self.q_z(self.encode_genes(batch), batch)
            z = mean + (0.5 * log_var).exp() * torch.randn(mean.shape, generator=generator, device=mean.device)
            points.append(torch.cat([z, self.log_library(batch.library_size)], dim=1).cpu())
            types.append(batch.cell_type_idx.cpu())
        return torch.cat(points).numpy(), torch.cat(types).numpy()

    def _mean_profile(self, cell_type_idx: int, generator: torch.Generator, n_cells: int = 1024) -> np.ndarray:
        """Mean expression of new cells of a type, as a fraction of their counts: (n_genes,)."""
        total = 0.0
        for _ in range(n_cells // GENERATED_AT_ONCE):
            y = torch.full((GENERATED_AT_ONCE,), cell_type_idx, device=generator.device)
            z, log_library = self.sample_z(y, 1.0, generator)
            total = (
                total
                + (log_library.exp()[:, None] * F.softmax(self.p_x(z, log_library.exp(), y).logits, dim=1))
                .sum(dim=0)
                .double()
            )
        return (total / total.sum()).cpu().numpy()

    def sample_z(
        self, cell_type_idx: torch.Tensor, noise_factor: float, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """z (n_cells, n_latent) and log library size (n_cells,), relative to the median, of new cells: fitted, or p(z|y) p(l|z)."""
        mean, log_var = self.p_z(cell_type_idx)
        if self.prior is not None:
            *z, log_library = sample_prior(self.prior, cell_type_idx, generator).unbind(dim=1)
            middle = self.prior["mean"][:, :-1].to(mean.device)[cell_type_idx]
            return middle + noise_factor * (torch.stack(z, dim=1) - middle), log_library
        z = mean + noise_factor * (0.5 * log_var).exp() * torch.randn(
            mean.shape, generator=generator, device=mean.device
        )
        l_mean, l_log_var = self.p_l(z, cell_type_idx)
        return z, l_mean + (0.5 * l_log_var).exp() * torch.randn(l_mean.shape, generator=generator, device=mean.device)

    def log_library(self, library_size: torch.Tensor) -> torch.Tensor:
        """log(l / median l of the training cells), (n_cells, 1)."""
        return (library_size / self.library_median).log()[:, None]

    def one_hot(self, cell_type_idx: torch.Tensor) -> torch.Tensor:
        return F.one_hot(cell_type_idx, self.n_cell_types).float()

    def encode_genes(self, batch: Batch) -> torch.Tensor:
        """All that q(y|x) and q(z|x,y) take of x: inputs of the three towers and, of a linear decoder, place on the axes."""
        layers = [self.q_genes] if self.q_axes is None else [self.q_genes, self.q_axes]
        return sparse_linear(batch.log_normalized(self.library_median), *layers)

    def _parts(self, seen: torch.Tensor) -> list[torch.Tensor]:
        """What `encode_genes` returned, for each tower, and the place on the axes (or None)."""
        width = self.q_genes.weight.shape[1] // 3
        return [*seen[:, : 3 * width].split(width, dim=1), seen[:, 3 * width :] if self.q_axes is not None else None]

    def q_y(self, seen: torch.Tensor, batch: Batch) -> torch.Tensor:
        """q(y|x) as logits, (n_cells, n_cell_types). encoded: from `encode_genes`."""
        return self.q_y_x(self._parts(seen)[0], self.log_library(batch.library_size))

    def q_z(self, seen: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """q(z|x,y): mean and log-variance, each (n_cells, n_latent). encoded: from `encode_genes`."""
        extra = torch.cat([self.one_hot(batch.cell_type_idx), self.log_library(batch.library_size)], dim=1)
        _, for_mean, for_log_var, on_axes = self._parts(seen)
        mean = self.q_z_xy_mean(for_mean, extra).float()
        if on_axes is not None:
            mean = mean + on_axes + self.q_axes_offset[batch.cell_type_idx]
        return mean, self.q_z_xy_log_var(for_log_var, extra).float().clamp(-10, 6)

    def p_z(self, cell_type_idx: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """p(z|y): mean and log-variance, each (n_cells, n_latent)."""
        y = self.one_hot(cell_type_idx)
        return self.p_z_y_mean(y).float(), self.p_z_y_log_var(y).float().clamp(-10, 6)

    def p_x(self, z: torch.Tensor, library_size: torch.Tensor, cell_type_idx: torch.Tensor) -> Likelihood:
        """p(x|z,y,l). z: (n_cells, n_latent); library_size, cell_type_idx: (n_cells,)."""
        h = self.p_x_z(z)
        y = self.one_hot(cell_type_idx)
        logits = self.p_x_z_log_mean(h).float()
        if self.log_loading_ratio is not None:
            logits = logits * (y @ self.log_loading_ratio.exp())
        logits = logits + self.log_profiles[cell_type_idx]
        log_theta = self.log_theta
        if self.log_theta_ratio is not None:
            log_theta = log_theta + y @ self.log_theta_ratio
        if self.p_x_z_log_theta is not None:
            log_theta = log_theta + self.p_x_z_log_theta(h).float()
        zi_logits = None if self.p_x_z_zi_logits is None else self.p_x_z_zi_logits(h).float()
        return Likelihood(logits, library_size.log(), log_theta.clamp(*LOG_THETA_RANGE), zi_logits)

    def shrinkage_penalty(self) -> torch.Tensor:
        """-log of the normal priors of log theta and log a(y), in nats per train cell, up to a constant: rare genes and types lean on the others."""
        penalty = ((self.log_theta - self.log_theta_mean) / LOG_THETA_SD).square().sum()
        if self.log_theta_ratio is not None:
            penalty = penalty + (self.log_theta_ratio / LOG_THETA_RATIO_SD).square().sum()
        if self.log_loading_ratio is not None:
            penalty = penalty + (self.log_loading_ratio / LOG_LOADING_RATIO_SD).square().sum()
        return 0.5 * penalty / self.n_cells

    def p_l(self, z: torch.Tensor, cell_type_idx: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """p(log l|z,y), l relative to the median: mean and log-variance, each (n_cells,)."""
        return self.p_l_z_mean(z)[:, 0].float(), 2 * self.log_library_scale[cell_type_idx]

    def elbo_terms(self, seen: torch.Tensor, batch: Batch, noise: torch.Tensor) -> dict[str, torch.Tensor]:
        """The parts of the bound on log p(x, l | y) of cells whose type is given; each (n_cells,), in nats.

        `reconstruction_loss` = -log p(x|z,l), `library_loss` = -log p(log l|z,y), `kl_z` = KL(q(z|x,y) || p(z|y)), at
        z = mean + standard deviation x noise of q(z|x,y); noise: (n_cells, n_latent), standard normal.
        """
        q_mean, q_log_var = self.q_z(seen, batch)
        p_mean, p_log_var = self.p_z(batch.cell_type_idx)
        z = q_mean + (0.5 * q_log_var).exp() * noise
        l_mean, l_log_var = self.p_l(z, batch.cell_type_idx)
        return {
            "reconstruction_loss": -self.p_x(z, batch.library_size, batch.cell_type_idx).log_prob(batch),
            "library_loss": -gaussian_log_prob(self.log_library(batch.library_size)[:, 0], l_mean, l_log_var),
            "kl_z": gaussian_kl(q_mean, q_log_var, p_mean, p_log_var),
        }

    def forward(self, batch: Batch, noise: torch.Tensor, kl_weight: float = 1.0) -> dict[str, torch.Tensor]:
        """Mean loss per cell and its parts, in nats; `loss` is what to minimise. noise: as in `elbo_terms`.

        Labelled cells: reconstruction + library + kl_weight x kl_z, and -log q(y|x) of their label (`kl_y`, the KL between
        the label and q(y|x)). Cells of unknown type: the same bound for every type, weighted by q(y|x), and
        kl_weight x KL(q(y|x) || p(y)).
        """
        seen = self.encode_genes(batch)
        if not batch.all_labelled:
            unknown = batch.cell_type_idx < 0
            parts = [self._unlabelled_terms(seen[unknown], batch.select(unknown), noise[unknown], kl_weight)]
            if not unknown.all():
                parts.append(self._labelled_terms(seen[~unknown], batch.select(~unknown), noise[~unknown], kl_weight))
            terms = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        else:
            terms = self._labelled_terms(seen, batch, noise, kl_weight)
        loss = terms.pop("loss").mean() + self.shrinkage_penalty()
        elbo = -(terms["reconstruction_loss"] + terms["library_loss"] + terms["kl_z"])
        return {"loss": loss, "elbo": elbo.mean().detach()} | {
            name: value.mean().detach() for name, value in terms.items()
        }

    def _labelled_terms(
        self, seen: torch.Tensor, batch: Batch, noise: torch.Tensor, kl_weight: float
    ) -> dict[str, torch.Tensor]:
        terms = self.elbo_terms(seen, batch, noise)
        terms["kl_y"] = F.cross_entropy(self.q_y(seen, batch).float(), batch.cell_type_idx, reduction="none")
        bound = terms["reconstruction_loss"] + terms["library_loss"] + kl_weight * terms["kl_z"]
        return terms | {"loss": bound + terms["kl_y"]}

    def _unlabelled_terms(
        self, seen: torch.Tensor, batch: Batch, noise: torch.Tensor, kl_weight: float
    ) -> dict[str, torch.Tensor]:
        log_q_y = F.log_softmax(self.q_y(seen, batch).float(), dim=1)
        q_y = log_q_y.exp()
        terms = dict.fromkeys(("reconstruction_loss", "library_loss", "kl_z"), 0.0)
        for k in range(self.n_cell_types):
            for name, value in self.elbo_terms(seen, batch.of_type(k), noise).items():
                terms[name] = terms[name] + q_y[:, k] * value
        terms["kl_y"] = (q_y * (log_q_y - self.type_frequency.log())).sum(dim=1)
        bound = terms["reconstruction_loss"] + terms["library_loss"] + kl_weight * (terms["kl_z"] + terms["kl_y"])
        return terms | {"loss": bound}

    @torch.no_grad()
    def log_likelihood(
        self, dataset: CellDataset, n_samples: int = 50, batch_size: int = 128, seed: int = 0
    ) -> np.ndarray:
        """log of the integral of p(x|z,l) p(z|y) over z, of every cell of known type, in nats, l given.

        The importance-weighted bound of Burda et al. 2016, eq. 8:

        log 1/S sum_s p(x|z_s,l) p(z_s|y) / q(z_s|x,y), z_s ~ q. It rises to the likelihood as n_samples grows.
        """
        generator = torch.Generator(dataset.device).manual_seed(seed)
        log_likelihood = []
        for batch in dataset.in_order(batch_size):
            q_mean, q_log_var = self.q_z(self.encode_genes(batch), batch)
            p_mean, p_log_var = self.p_z(batch.cell_type_idx)
            weights = []
            for _ in range(n_samples):
                z = q_mean + (0.5 * q_log_var).exp() * torch.randn(
                    q_mean.shape, generator=generator, device=q_mean.device
                )
                log_ratio = gaussian_log_prob(z, p_mean, p_log_var) - gaussian_log_prob(z, q_mean, q_log_var)
                weights.append(
                    self.p_x(z, batch.library_size, batch.cell_type_idx).log_prob(batch) + log_ratio.sum(dim=1)
                )
            log_likelihood.append(torch.logsumexp(torch.stack(weights), dim=0) - math.log(n_samples))
        return torch.cat(log_likelihood).cpu().numpy()

    @torch.no_grad()
    def sample(
        self, cell_type_idx: np.ndarray, seed: int, noise_factor: float = 1.0, blocks: range | None = None,
        shift: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None] | None = None, groups: np.ndarray | None = None,
    ) -> Iterator[sp.csr_matrix]:  # fmt: skip
        """New cells of the given types, `GENERATED_AT_ONCE` at a time.

        Parameters
        ----------
        cell_type_idx
            (n_cells,) type of each cell wanted.
        seed
            The same seed gives the same cells; each block of cells has a stream of its own, so blocks can be shared out.
        noise_factor
            Multiplies a cell's distance in z from its type's middle: below 1 cells are more alike, above 1 less.
        blocks
            Numbers of the blocks wanted; None for all.
        shift, groups
            What bulk samples say of the cells' states (`bulk_encoder.Shift`): matrix (n_groups, n_latent, n_latent), offset
            (n_groups, n_latent) and log_ratio (n_samples, n_genes) or None; groups (n_cells,), sample x n_cell_types + type. z
            becomes matrix @ z + offset, and the log ratio is added to the logits.

        Yields
        ------
        Cells x n_genes, raw counts, CSR.
        """
        device = self.log_theta.device
        for rows, generator in streams(len(cell_type_idx), seed, blocks, device):
            y = torch.from_numpy(np.asarray(cell_type_idx[rows], dtype=np.int64)).to(device)
            z, log_library = self.sample_z(y, noise_factor, generator)
            if shift is not None:
                group = torch.from_numpy(groups[rows].astype(np.int64)).to(device)
                matrix, offset, log_ratio = (None if part is None else part.to(device) for part in shift)
                z = torch.einsum("nij,nj->ni", matrix[group], z) + offset[group]
            likelihood = self.p_x(z, log_library.exp() * self.library_median, y)
            if shift is not None and log_ratio is not None:
                likelihood.logits += log_ratio[group // self.n_cell_types]
            if self.prior is not None:
                likelihood.logits += self.prior["log_ratio"].to(device)[y]
            yield likelihood.sample(generator)


def streams(
    n_cells: int, seed: int, blocks: range | None, device: torch.device
) -> Iterator[tuple[slice, torch.Generator]]:
    """Rows of each block of new cells, and a random stream of the block's own; blocks: numbers of those wanted, None for all."""
    for number in range(n_blocks(n_cells)) if blocks is None else blocks:
        stream = np.random.SeedSequence([seed, number]).generate_state(1, np.uint64)[0]
        rows = slice(number * GENERATED_AT_ONCE, min(n_cells, (number + 1) * GENERATED_AT_ONCE))
        yield rows, torch.Generator(device).manual_seed(int(stream >> np.uint64(1)))


def n_blocks(n_cells: int) -> int:
    """Into how many blocks `GMVAE.sample` parts so many cells."""
    return -(-n_cells // GENERATED_AT_ONCE)
