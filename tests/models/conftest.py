"""A small GMVAE that several test files share."""

import numpy as np
import pytest
from helpers import simulated_cells, trained_gmvae

from lib.models.gmvae import GMVAE


@pytest.fixture(scope="session")
def data():
    """Counts and types of train cells, and of test cells."""
    counts, types = simulated_cells(n_cells=900)
    part = np.random.default_rng(0).random(900) < 0.8
    return (counts[part], types[part]), (counts[~part], types[~part])


@pytest.fixture(scope="session")
def model(data) -> GMVAE:
    return trained_gmvae(*data[0], epochs=60)
