"""A study that is told to stop lets its processes save; one whose process dies goes on with the others."""
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import essl_nb.study.study as study_module
from essl_nb.core.config import from_json
from essl_nb.core.files import Busy, load_tensors, read_json, read_lines
from essl_nb.core.fresh import Fresh, run_fresh
from essl_nb.core.registry import EsslError
from essl_nb.core.stop import StoppedBySignal
from essl_nb.data.corpus import load_corpus
from essl_nb.mixers.base import list_mixers
from essl_nb.objectives.objective import objectives
from essl_nb.study.results import known_rows
from essl_nb.study.study import Study, retry_while_busy, run_fact
from essl_nb.train.config import PretrainConfig

FIRST, SECOND = list_mixers()[:2]
OBJECTIVE = objectives.names()[0]


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    "Twenty short sentences."
    folder = tmp_path_factory.mktemp("clips")
    read = sorted((u for u in load_corpus("bundled") if u.part == "readru"), key=lambda u: u.seconds)
    chosen = [u for split, n in {"train": 14, "valid": 4, "test": 2}.items() for u in [u for u in read if u.split == split][:n]]
    with open(folder / "manifest.csv", "w", newline="") as m:
        sounds = csv.writer(m)
        sounds.writerow(["id", "path", "split"])
        for u in chosen:
            shutil.copy(u.path, folder / u.path.name)
            sounds.writerow([u.id, u.path.name, u.split])
    return str(folder)


def grid(clips, steps=20):
    return {
        "name": "stops",
        "corpus": clips,
        "encoders": [{"name": n, "config": {"mixer": n, "dim": 16, "depth": 1}} for n in (FIRST, SECOND)],
        "objectives": [{"name": OBJECTIVE, "kw": objectives.get(OBJECTIVE).meta.get("tiny", {})}],
        "pretrain": {"steps": steps, "batch_seconds": 8},
        "seeds": [0],
        "probes": [],
        "baselines": [],
    }


def runs(study):
    return [c for c in study.cells() if c.kind == "run"]


def stand_in(monkeypatch, do):
    "A stand-in for the isolated process, which does something of its own first."
    def fresh(fn, kind, what, weights, lock, word):
        do(what["encoder"], Path(lock))
        Path(weights).mkdir(parents=True, exist_ok=True)
        (Path(weights) / "result.json").write_text("{}")
        value = {"steps": 20, "stopped": None, "parameters": 7, "last": {"step": 20, "loss": 1.0}}
        return Fresh({"value": value, "made": {"seconds": 1.0, "seconds_per_step": 0.05}}, 10**6, 1.0)

    monkeypatch.setattr(study_module, "run_fresh", fresh)


@pytest.mark.parametrize("name, error", [("SIGTERM", StoppedBySignal), ("SIGINT", KeyboardInterrupt)])
def test_a_study_told_to_stop_tells_its_processes_and_waits_for_them(name, error, clips, tmp_path, monkeypatch):
    told = []

    def work(encoder, lock):
        word = lock.read_text()
        os.kill(os.getpid(), getattr(signal, name))
        end = time.monotonic() + 30
        while lock.read_text() == word and time.monotonic() < end:
            time.sleep(0.01)
        told.append(lock.read_text())

    stand_in(monkeypatch, work)
    study = Study(grid(clips), tmp_path)
    with pytest.raises(error):
        study.run(progress=False)
    assert told == [""] and read_lines(tmp_path / "rows.jsonl")[0] == []
    stand_in(monkeypatch, lambda *a: None)
    assert study.run(progress=False).done == 2


@pytest.mark.parametrize("error", [OSError(12, "Cannot allocate memory"), RuntimeError("exit status -9"), ValueError(""), EsslError("no.")])
def test_whatever_one_cell_meets_the_others_go_on(error, clips, tmp_path, monkeypatch):
    def work(encoder, lock):
        if encoder == FIRST:
            raise error

    stand_in(monkeypatch, work)
    outcome = Study(grid(clips), tmp_path).run(progress=False)
    assert outcome.done == 1 and [c.what["encoder"] for c, _ in outcome.failed] == [FIRST] and all(why for _, why in outcome.failed)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def big(blob):
    return len(blob)


def test_a_fresh_process_that_dies_is_an_error_and_no_wait():
    with pytest.raises(RuntimeError, match="exit status -9"):
        run_fresh(die)


def test_a_fresh_process_that_dies_before_it_has_read_is_an_error_too(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="exit status 1"):
        run_fresh(big, b"x" * 2**20)


def test_rows_cut_at_any_byte_are_made_again_and_the_others_kept(clips, tmp_path, monkeypatch):
    stand_in(monkeypatch, lambda *a: None)
    study = Study(grid(clips), tmp_path)
    study.run(progress=False)
    text = study.rows_file.read_bytes()
    first = text.index(b"\n") + 1
    for end in (first + 1, (first + len(text)) // 2, len(text) - 2):
        study.rows_file.write_bytes(text[:end])
        assert len(known_rows(study.rows_file)) == 1 and study.run(progress=False).done == 1
        assert len(read_lines(study.rows_file)[0]) == 2 and read_lines(study.rows_file)[1] is None


def test_a_run_that_ended_before_its_row_was_written_is_not_begun_again_and_other_data_are_refused(clips, tmp_path):
    shutil.copytree(clips, tmp_path / "clips")
    cell = runs(Study(grid(str(tmp_path / "clips"), steps=4), tmp_path / "study"))[0]
    config = from_json(PretrainConfig, cell.what["pretrain"])
    value, _ = run_fact(config, tmp_path / "run")
    before = (tmp_path / "run" / "result.json").stat().st_mtime_ns
    assert run_fact(config, tmp_path / "run")[0] == value and (tmp_path / "run" / "result.json").stat().st_mtime_ns == before
    table = tmp_path / "clips" / "manifest.csv"
    table.write_text(table.read_text().replace(",valid", ",train"))
    with pytest.raises(EsslError, match="made on other data"):
        run_fact(config, tmp_path / "run")


def test_a_folder_that_is_still_being_saved_is_waited_for():
    tries = []

    def busy():
        tries.append(1)
        if len(tries) < 3:
            raise Busy("still there")
        return "done"

    assert retry_while_busy(busy) == "done"
    with pytest.raises(Busy):
        retry_while_busy(lambda: (_ for _ in ()).throw(Busy("for ever")), seconds=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGKILL"])
def test_a_real_study_stopped_in_a_run_saves_it_and_ends_as_a_calm_one(name, clips, tmp_path):
    number = getattr(signal, name)
    (tmp_path / "grid.json").write_text(json.dumps(grid(clips, steps=240)))
    study = Study(tmp_path / "grid.json", tmp_path / "cut")
    first = runs(study)[0]
    start = lambda folder: subprocess.Popen([sys.executable, "-c", "import sys; from essl_nb.core.command import essl_study; sys.exit(essl_study())", tmp_path / "grid.json", "--folder", folder], stderr=subprocess.PIPE, text=True)
    log, state = (tmp_path / "cut" / "runs" / first.key / n for n in ("metrics.jsonl", "last.safetensors"))
    child = start(tmp_path / "cut")
    end = time.monotonic() + 300
    while not (log.exists() and log.stat().st_size) and time.monotonic() < end and child.poll() is None:
        time.sleep(0.01)
    child.send_signal(number)
    said = child.communicate()[1]
    assert child.returncode == (-9 if name == "SIGKILL" else 128 + number), said
    while not state.exists() and time.monotonic() < end:
        time.sleep(0.05)
    assert 20 <= int(load_tensors(state)["step"]) < 240  # saved long before the first 250 steps were over
    for folder in ("cut", "calm"):
        child = start(tmp_path / folder)
        assert child.communicate()[1] is not None and child.returncode == 0
    a, b = ({r["key"]: r["value"] for r in read_lines(tmp_path / f / "rows.jsonl")[0]} for f in ("cut", "calm"))
    assert a == b and len(a) == 2
    for key in a:
        x, y = ((tmp_path / f / "runs" / key / "encoder" / "model.safetensors").read_bytes() for f in ("cut", "calm"))
        assert x == y
    assert read_json(tmp_path / "cut" / "runs" / first.key / "result.json")["value"]["steps"] == 240
