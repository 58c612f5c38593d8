"""Metrics by hand."""

import numpy as np
import pytest

from lib.metrics import ccc, mae, pearson


def test_by_hand():
    true, estimate = np.array([[0.0, 1.0], [2.0, 3.0]]), np.array([[1.0, 1.0], [3.0, 3.0]])
    assert mae(true, estimate) == 0.5
    assert pearson(true, estimate) == pytest.approx(np.corrcoef(true.ravel(), estimate.ravel())[0, 1])
    # covariance 1, variances 1.25 and 1, means 1.5 and 2
    assert ccc(true, estimate) == pytest.approx(2 * 1.0 / (1.25 + 1.0 + 0.25))


def test_ccc_sees_scale_and_shift_that_r_does_not():
    true = np.linspace(0, 1, 11)
    assert pearson(true, 0.5 * true + 0.2) == pytest.approx(1)
    assert ccc(true, 0.5 * true + 0.2) < 0.9
    assert ccc(true, true) == pytest.approx(1)
    assert ccc(true, np.full(11, 0.5)) == pytest.approx(0)
