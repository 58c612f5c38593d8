"""The random forest of the metrics against sklearn's."""

import numpy as np
from sklearn.ensemble import RandomForestClassifier

from lib.evaluation.forest import N_TREES, forest_probability


def test_the_trees_are_those_of_sklearn():
    rng = np.random.default_rng(0)
    features, labels = rng.normal(size=(90, 6)).astype(np.float32), np.array(["b", "c", "a"])[rng.integers(0, 3, 90)]
    features[labels == "a"] += 0.5
    sklearns = RandomForestClassifier(N_TREES, random_state=7).fit(features[:60], labels[:60])
    ours = forest_probability(features[:60], labels[:60], features[60:], seed=7)
    np.testing.assert_allclose(ours, sklearns.predict_proba(features[60:]), atol=1e-12)
    assert (np.unique(labels)[ours.argmax(axis=1)] == sklearns.predict(features[60:])).all()
