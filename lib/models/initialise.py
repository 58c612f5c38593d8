"""Where the training of the GMVAE starts: at the marginals, library sizes and axes of variation of the train cells."""

import numpy as np
import torch
from torch import nn

from lib.data.batches import CellDataset
from lib.models.axes import Axes
from lib.models.gmvae import GMVAE
from lib.models.profiles import GeneMarginals


@torch.no_grad()
def initialise(model: GMVAE, dataset: CellDataset, marginals: GeneMarginals, axes: Axes) -> None:
    """Set the parameters that can be estimated without gradients.

    Parameters
    ----------
    dataset, marginals
        Train cells, and the profiles and dispersions of their genes.
    axes
        q(z|x,y) and p(x|z,y,l) start on these axes, p(z|y) on a standard normal distribution.
    """
    cell_type_idx, library_size = dataset.cell_type_idx, dataset.library_size
    model.library_median.fill_(float(np.median(library_size)))
    model.n_train_cells.fill_(len(library_size))
    n_per_type = np.bincount(cell_type_idx[cell_type_idx >= 0], minlength=model.n_cell_types)
    model.type_frequency.copy_(torch.from_numpy((n_per_type + 1) / (n_per_type + 1).sum()))
    mean_profile = model.type_frequency.cpu().double().numpy() @ marginals.profiles
    model.log_profiles.copy_(torch.from_numpy(np.log(marginals.profiles)))
    nn.init.zeros_(model.p_x_zyl_log_mean.bias)
    model.p_x_zyl_log_mean.weight.copy_(torch.from_numpy(axes.loadings))
    model.q_z_xy_axes.weight.copy_(torch.from_numpy(axes.projection))
    for of_type_and_library in (model.q_z_xy_mean, model.q_z_xy_log_var):
        nn.init.zeros_(of_type_and_library.weight)
        nn.init.zeros_(of_type_and_library.bias)
    model.q_z_xy_mean.weight[:, :-1] = torch.from_numpy(axes.offset.T)
    model.q_z_xy_log_var.bias.copy_(torch.from_numpy(np.log(axes.variance)))
    model.log_theta.copy_(torch.from_numpy(marginals.log_theta))
    model.log_theta_mean.fill_(float(mean_profile @ marginals.log_theta))
    if model.p_x_zyl_zi_logits is not None:
        nn.init.zeros_(model.p_x_zyl_zi_logits.weight)
        nn.init.constant_(model.p_x_zyl_zi_logits.bias, -4.0)
    nn.init.zeros_(model.p_l_zy_mean.bias)
    model.p_l_zy_log_scale.fill_(float(np.log(np.log(library_size).std() + 1e-2)))
