"""Who is on a Pareto front, and who is within a budget."""
import numpy as np
import pandas as pd
import pytest

from essl_nb.core.registry import EsslError
from essl_nb.study.pareto import pareto_front, pareto_mask, within_budget


@pytest.mark.parametrize("up", [("y",), (), ("x",), ("x", "y")], ids=str)
def test_front_agrees_with_its_definition(up):
    generator = np.random.default_rng(1)
    for _ in range(60):
        points = pd.DataFrame(generator.integers(0, 5, (int(generator.integers(0, 14)), 2)).astype(float), columns=["x", "y"])
        points = points.mask(generator.random(points.shape) < 0.08)
        a = points * [1 if c not in up else -1 for c in "xy"]  # all to be small
        beaten = [any((a.iloc[j] <= a.iloc[i]).all() and (a.iloc[j] < a.iloc[i]).any() for j in range(len(a))) for i in range(len(a))]
        truth = [not b and not points.iloc[i].isna().any() for i, b in enumerate(beaten)]
        assert pareto_mask(points, "x", "y", maximise=up).tolist() == truth
        assert pareto_front(points, "x", "y", maximise=up).x.is_monotonic_increasing


def test_front_and_budget_name_what_is_wrong():
    points = pd.DataFrame(dict(cost=[1.0, np.nan, 3.0], name=list("abc")))
    with pytest.raises(EsslError, match="no column 'cots'"):
        pareto_front(points, "cots", "name")
    with pytest.raises(EsslError, match="other than numbers"):
        pareto_front(points, "cost", "name")
    with pytest.raises(EsslError, match="neither axis"):
        pareto_front(points, "cost", "cost", maximise="speed")
    with pytest.raises(EsslError, match="must not exceed"):
        within_budget(points, {"cost": (3, 1)})
    assert within_budget(points, {"cost": 2}).tolist() == [True, False, False]  # an unknown cost is within no budget
