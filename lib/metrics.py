"""How close estimates are to the truth."""

import numpy as np


def mae(true: np.ndarray, estimate: np.ndarray) -> float:
    """Mean absolute error over all entries."""
    return float(np.abs(np.asarray(true) - np.asarray(estimate)).mean())


def pearson(true: np.ndarray, estimate: np.ndarray) -> float:
    """Pearson's r over all entries; nan if one side does not vary."""
    x, y = np.ravel(true).astype(float), np.ravel(estimate).astype(float)
    x, y = x - x.mean(), y - y.mean()
    scale = np.sqrt((x @ x) * (y @ y))
    return float(x @ y / scale) if scale > 0 else float("nan")


def ccc(true: np.ndarray, estimate: np.ndarray) -> float:
    """Concordance correlation coefficient over all entries (Lin 1989): 2 cov / (var + var + (difference of the means)^2).

    1 only if the estimates equal the truth; a constant estimate scores 0.
    """
    x, y = np.ravel(true).astype(float), np.ravel(estimate).astype(float)
    spread = x.var() + y.var() + (x.mean() - y.mean()) ** 2
    return float(2 * ((x - x.mean()) * (y - y.mean())).mean() / spread) if spread > 0 else float("nan")
