"""Fixtures that several test files share."""

import os

# OpenMP threads that wait by spinning cost minutes where other jobs use the same cores; set before torch and XGBoost are loaded
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if "PYTEST_XDIST_WORKER" in os.environ:  # the workers share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from helpers import STAGES, Workplace
from server import Site


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory) -> Workplace:
    """All six stages, run once on the real cells that come with scanpy, with the default settings but fewer mixtures.

    They run in this process, so that UMAP is compiled once.
    """
    options = {STAGES[0]: ("--dataset", "pbmc68k_reduced"), STAGES[2]: ("--n-train-samples", "2000")}
    place = Workplace(tmp_path_factory.mktemp("pipeline"))
    for stage in STAGES:
        place.run(stage, *options.get(stage, ()))
    return place


@pytest.fixture
def site():
    site = Site()
    yield site
    site.stop()
