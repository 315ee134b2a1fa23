"""A front of hundreds of points: those are named that have to be, and nothing grows with the square of their number."""
import numpy as np
import pandas as pd

from essl_nb.viz.pareto import MANY, overlaps, pareto_figure


def points(n: int) -> pd.DataFrame:
    generator = np.random.default_rng(0)
    y = generator.random(n)
    return pd.DataFrame(dict(label=[f"encoder {i}" for i in range(n)], family="attention", cost=1 + generator.random(n), score=y, low=y - 0.01, high=y + 0.01))


def named(fig) -> set:
    return {a.text for a in fig.layout.annotations if a.name == "label"}


def test_of_many_only_those_are_named_that_matter():
    few, many = points(MANY), points(600)
    assert len(named(pareto_figure(few, "cost", "score"))) > MANY / 4
    fig = pareto_figure(many, "cost", "score", keep=["encoder 7"], chosen="encoder 9")
    must = {t.name for t in fig.data if (t.meta or {}).get("must")}
    assert named(fig) == must and {"encoder 7", "encoder 9"} <= must and len(must) < MANY
    drawn = [t for t in fig.data if (t.meta or {}).get("role") == "point"]
    assert sorted(name for t in drawn for name in t.customdata) == sorted(many.label), "every point is there, and can be clicked"
    assert all(len(t.x) == len(t.error_y.array) == len(t.hovertext) for t in drawn) and len(drawn) == len(must) + 1, "one family, one trace"


def test_overlaps_are_counted_one_by_one():
    generator = np.random.default_rng(1)
    boxes = [(a, a + w, b, b + h) for a, b, w, h in generator.random((50, 4))]
    for box in boxes[:10]:
        assert overlaps(box, boxes) == sum(box[0] < b[1] and b[0] < box[1] and box[2] < b[3] and b[2] < box[3] for b in boxes)
    assert overlaps(boxes[0], []) == 0


def test_baselines_are_lines_with_names():
    fig = pareto_figure(points(5), "cost", "score", baselines=[("log-mel", 0.2), ("<b>more</b>", 0.21)])
    lines, names = [s for s in fig.layout.shapes if s.type == "line"], [a for a in fig.layout.annotations if a.name == "baseline"]
    assert [s.y0 for s in lines] == [0.2, 0.21] == [s.y1 for s in lines] and all(s.xref == "x domain" for s in lines)
    assert len(names) == 2 and names[1].y - names[0].y > 0.01 and "<b>" not in names[1].text
