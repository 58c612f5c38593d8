"""Layers of the networks."""

import math

import torch
from torch import nn

from lib.data.batches import transposed


class SparseProduct(torch.autograd.Function):
    """x @ weight for a sparse x that needs no gradient; torch's own gradient of it takes four times as long."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.x = x
        return _product(x, weight)

    @staticmethod
    def backward(ctx, upstream):
        return None, _product(transposed(ctx.x), upstream)


def _product(x: torch.Tensor, dense: torch.Tensor) -> torch.Tensor:
    """x @ dense, sparse x; unlike `@`, without filling the result with zeros first and copying it afterwards."""
    return dense.new_empty(x.shape[0], dense.shape[1]).addmm_(x, dense, beta=0)


class SparseLinear(nn.Module):
    """A linear layer whose input is sparse: genes to n_out."""

    def __init__(self, n_genes: int, n_out: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n_genes, n_out) / math.sqrt(n_genes))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return sparse_linear(x, self)


def sparse_linear(x: torch.Tensor, *layers: SparseLinear) -> torch.Tensor:
    """The outputs of several layers side by side, in one product: (n_rows, sum of n_out)."""
    with torch.autocast(x.device.type, enabled=False):  # sparse products have no half precision everywhere
        return SparseProduct.apply(
            x, torch.cat([layer.weight for layer in layers], dim=1) if len(layers) > 1 else layers[0].weight
        )


def mlp(sizes: tuple[int, ...], dropout: float = 0.0) -> nn.Sequential:
    """Linear layers with LayerNorm, ReLU and dropout after each."""
    layers = []
    for n_in, n_out in zip(sizes, sizes[1:]):
        layers += [nn.Linear(n_in, n_out), nn.LayerNorm(n_out), nn.ReLU(), nn.Dropout(dropout)]
    return nn.Sequential(*layers)


class Tower(nn.Module):
    """(genes + extra)-hidden-...-n_out, from where the genes have been multiplied by the first layer's weights."""

    def __init__(self, n_extra: int, hidden: tuple[int, ...], n_out: int, dropout: float):
        super().__init__()
        self.extra = nn.Linear(n_extra, hidden[0])
        self.rest = nn.Sequential(
            nn.LayerNorm(hidden[0]), nn.ReLU(), nn.Dropout(dropout), mlp(hidden, dropout), nn.Linear(hidden[-1], n_out)
        )

    def forward(self, genes: torch.Tensor, extra: torch.Tensor) -> torch.Tensor:
        return self.rest(genes + self.extra(extra))
