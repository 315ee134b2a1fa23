"""A cost label is well-formed, needs nothing outside itself, says what was not measured, and no name is markup in it."""
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest

from essl_nb.core.places import study_dir
from essl_nb.core.registry import EsslError
from essl_nb.mixers.base import mixers
from essl_nb.study.results import cost_table, load_results
from essl_nb.viz.cost_label import BOLD, LETTER, WIDTH, cost_label, label_of_tables
from essl_nb.viz.style import family_colour

SVG = "{http://www.w3.org/2000/svg}"
PROBE = "masked phones, 200 ms"
SCORE = dict(encoder="one", mixer="one", family="none", objective="o", task="a_task", metric="accuracy", head="linear", labels="all", split="test", span_ms=np.nan, n=70, seeds=3, value=0.244, low=0.23, high=0.259)
COST = dict(encoder="one", parameters=1.9e6, machine="here", deployment_setup="1 thread, fp32, 10 s of audio", training_setup="1 thread, bf16", disk_bytes_fp32=7.4e6, disk_bytes_int8=1.9e6, deployment_peak_bytes=40 * 2**20,
            deployment_latency_s=0.032, deployment_latency_s_ratio=0.84, deployment_baseline_latency_s=0.04, streaming_streams=True, streaming_latency_ms=152.5, streaming_chunk_ms=160.0, streaming_state_bytes=1536.0, training_step_s_ratio=0.77)


def texts(svg: str) -> list:
    return [t.text for t in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def label(score=None, **cost) -> str:
    return label_of_tables(pd.DataFrame([SCORE | (score or {})]), pd.DataFrame([COST | cost]))


def test_a_label_says_everything_that_was_measured():
    words = " ".join(texts(label()))
    for part in ("one", "accuracy 24.4 % [23.0, 25.9]", "a task", "n = 70 utterances, 3 seeds", "1.9 million", "float32 7.4 · int8 1.9", "40 MiB", "33.6 ms", "0.84 × attention's", "here, 1 thread, fp32", "chunks of 160 ms, look-ahead 152 ms",
                 "1.54 kB", "0.77 × attention's", "here, 1 thread, bf16"):
        assert part in words, part
    assert "not measured" not in words and "bfloat16" not in words
    assert "phone error rate 24.4 %" in " ".join(texts(label(dict(metric="per"))))


def test_what_was_not_measured_is_said():
    bare = texts(label_of_tables(pd.DataFrame([SCORE]), pd.DataFrame([dict(encoder="one", parameters=1e6)])))
    assert bare.count("not measured") == 5 and "1 million" in bare
    assert texts(label_of_tables(pd.DataFrame([SCORE]), pd.DataFrame())).count("not measured") == 6
    assert "does not stream" in texts(label(streaming_streams=False, streaming_latency_ms=np.nan))
    with pytest.raises(EsslError, match="no such score"):
        label_of_tables(pd.DataFrame(), pd.DataFrame())


NASTY = ["</text><script>alert(1)</script>", '"><img src=x onerror=y>', "a & b < c > d ' \"", "\x00\x01\x7f control", "]]>", "&amp;lt;", "ß∂語 " + "long " * 60, "x" * 500]


@pytest.mark.parametrize("name", NASTY, ids=range(len(NASTY)))
def test_no_name_is_markup(name):
    svg = label(dict(encoder=name, mixer=name, family=name, objective=name, task=name, metric=name, head=name, labels=name), encoder=name, machine=name, deployment_setup=name)
    root = ElementTree.fromstring(svg.encode())
    assert {e.tag for e in root.iter()} == {SVG + t for t in ("svg", "title", "rect", "line", "text")}
    assert not [k for e in root.iter() for k in e.attrib if k.startswith("on") or "href" in k or k == "style"]
    assert svg.count("://") == 1 + name.count("://") and "url(" not in svg
    for t in root.iter(f"{SVG}text"):
        letter = BOLD if t.get("font-weight") else LETTER
        assert float(t.get("x")) + letter * float(t.get("font-size")) * len(t.text or "") <= WIDTH, "texts stay inside"


def test_a_label_of_the_shipped_study():
    frame = load_results(study_dir("small"))
    costs = cost_table(frame).set_index("encoder")
    known, new = costs.index[:2]
    frame = frame[(frame.encoder != new) | (frame.kind != "cost")]  # nothing of it was measured
    for name in (known, new):
        svg = cost_label(frame, name, PROBE)
        assert texts(svg)[0] == name and family_colour(mixers.get(name).meta["family"]) in svg
        assert ("not measured" in texts(svg)) == (name == new)
    with pytest.raises(EsslError, match="no 'accuracy' of"):
        cost_label(frame, "nobody", PROBE)
