"""Damaged sound files, hundreds of them: each is read whole, or refused by name; none crashes or stops the reader, and none is lost in a corpus."""
import json
import os
import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path

import damaged
import pytest

from essl_nb.data.audio import load_audio
from essl_nb.data.corpus import load_corpus

COUNTS = [pytest.param(105, id="some"), pytest.param(1000, id="thousand", marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def sounds():
    clips = [u for u in load_corpus("bundled") if 0.6 < u.seconds < 2][:200:40]
    return [load_audio(u.path).numpy() for u in clips]


def read_in_a_child(paths: list) -> tuple:
    "What `damaged.read_all` says of each file; a file at which the child ended is told apart, and another child goes on behind it."
    said, ended = {}, {}
    while paths:
        done = subprocess.run([sys.executable, damaged.__file__], input=json.dumps(paths), capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        lines = [json.loads(line) for line in done.stdout.splitlines()]
        said |= {line["name"]: line for line in lines if "name" in line}
        begun = [line["begins"] for line in lines if "begins" in line]
        assert begun, done.stderr[-2000:]
        if begun[-1] not in said:
            ended[begun[-1]] = f"exit status {done.returncode}: {done.stderr[-500:]}"
        paths = paths[len(begun) :]
    return said, ended


@pytest.mark.parametrize("count", COUNTS)
def test_each_is_read_whole_or_refused_by_name(tmp_path, sounds, count):
    rows = damaged.make(tmp_path, sounds, count, seed=1)
    said, ended = read_in_a_child([str(tmp_path / r["name"]) for r in rows])
    assert not ended, f"the reader ended at {ended}"
    outcomes, wrong = Counter(), []
    for row in rows:
        got = said[str(tmp_path / row["name"])]
        outcomes["read" if "samples" in got else "refused"] += 1
        if "error" in got or ("refused" in got and row["name"] not in got["refused"]):
            wrong.append((row, got))
        if "samples" in got and row["tells"] and got["samples"] < 0.96 * row["samples"]:
            wrong.append((row, got))  # a part was dropped without a word
        if "refused" in got and row["damage"] in ("same", "joined", "tagged"):
            wrong.append((row, got))  # nothing is wrong with it but its name, that it is two, or a player's tag
    print(f"{count} files: {dict(outcomes)}")
    assert not wrong, "\n".join(map(str, wrong[:20]))
    assert min(outcomes.values()) > count / 5


@pytest.mark.parametrize("count", COUNTS)
def test_a_corpus_of_them_holds_or_names_each(tmp_path, sounds, count, monkeypatch):
    monkeypatch.setenv("ESSL_CACHE", str(tmp_path / "cache"))
    (tmp_path / "sound").mkdir()
    rows = damaged.make(tmp_path / "sound", sounds, count, seed=2)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        corpus = load_corpus(tmp_path / "sound")
        features = corpus.features(progress=False)
    ids = {Path(r["name"]).stem for r in rows}
    assert set(corpus.by_id) | set(corpus.left_out) == ids and not set(corpus.by_id) & set(corpus.left_out)
    assert set(features.ids) == set(corpus.by_id) and all(abs(features.lengths[u.id] / 100 - u.seconds) < 0.2 for u in corpus)
    for id, why in corpus.left_out.items():
        assert id in why and "\n" not in why
    assert 1 <= len([w for w in said if "left out" in str(w.message)]) <= 2 and all(len(str(w.message)) < 10000 for w in said)
    again = load_corpus(tmp_path / "sound")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert again.features(progress=False).path == features.path and again.left_out == corpus.left_out
    assert again.data_hash == corpus.data_hash
    print(f"{count} files: {len(corpus)} in the corpus, {len(corpus.left_out)} left out")
