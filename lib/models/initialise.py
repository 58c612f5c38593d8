"""Where the training of the GMVAE starts: at the marginals, library sizes and axes of variation of the train cells."""

import numpy as np
import torch
from torch import nn

from lib.data.batches import CellDataset
from lib.models.axes import Axes
from lib.models.gmvae import GMVAE
from lib.models.profiles import GeneMarginals


@torch.no_grad()
def initialise(model: GMVAE, dataset: CellDataset, marginals: GeneMarginals, axes: Axes | None = None) -> None:
    """Set the parameters that can be estimated without gradients.

    Parameters
    ----------
    dataset, marginals
        Train cells, and the profiles and dispersions of their genes.
    axes
        For a linear decoder: q(z|x,y) and p(x|z,y,l) start on these axes. None: z starts at random.
    """
    cell_type_idx, library_size = dataset.cell_type_idx, dataset.library_size
    model.library_median.fill_(float(np.median(library_size)))
    model.n_train_cells.fill_(len(library_size))
    n_per_type = np.bincount(cell_type_idx[cell_type_idx >= 0], minlength=model.n_cell_types)
    model.type_frequency.copy_(torch.from_numpy((n_per_type + 1) / (n_per_type + 1).sum()))
    mean_profile = model.type_frequency.cpu().double().numpy() @ marginals.profiles
    model.log_profiles.copy_(
        torch.from_numpy(np.log(marginals.profiles if model.q_z_xy_axes is not None else mean_profile))
    )
    nn.init.zeros_(model.p_x_zyl_log_mean.bias)
    model.p_x_zyl_log_mean.weight.mul_(0.1)
    model.log_theta.copy_(torch.from_numpy(marginals.log_theta))
    model.log_theta_mean.fill_(float(mean_profile @ marginals.log_theta))
    if model.p_x_zyl_zi_logits is not None:
        nn.init.zeros_(model.p_x_zyl_zi_logits.weight)
        nn.init.constant_(model.p_x_zyl_zi_logits.bias, -4.0)
    nn.init.zeros_(model.p_l_zy_mean.bias)
    model.p_l_zy_log_scale.fill_(float(np.log(np.log(library_size).std() + 1e-2)))
    if axes is not None:
        _start_on_axes(model, axes)


def _start_on_axes(model: GMVAE, axes: Axes) -> None:
    """Linear parts of q(z|x,y) and p(x|z,y,l) from the axes, p(z|y) standard normal; the networks start near zero."""
    assert model.q_z_xy_axes is not None and model.q_z_xy_axes_offset is not None
    model.p_x_zyl_log_mean.weight.copy_(torch.from_numpy(axes.loadings))
    model.q_z_xy_axes.weight.copy_(torch.from_numpy(axes.projection))
    model.q_z_xy_axes_offset.copy_(torch.from_numpy(axes.offset))
    for network in (model.q_z_xy_mean.rest, model.q_z_xy_log_var.rest, model.p_z_y_mean, model.p_z_y_log_var):
        last = network[-1]
        assert isinstance(last, nn.Linear)
        last.weight.mul_(0.1)
        nn.init.zeros_(last.bias)
        if network is model.q_z_xy_log_var.rest:
            last.bias.copy_(torch.from_numpy(np.log(axes.variance)))
