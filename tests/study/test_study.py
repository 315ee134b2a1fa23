"""A study: what it asks, that a kill changes nothing, and what its tables say."""
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from torch import nn

import essl_nb.study.study as study_module
from essl_nb.core.files import append_line, read_lines
from essl_nb.core.fresh import Fresh
from essl_nb.core.intervals import bootstrap_interval
from essl_nb.core.registry import EsslError
from essl_nb.data.corpus import load_corpus
from essl_nb.mixers.base import Mixer, list_mixers, mixers
from essl_nb.objectives.objective import objectives
from essl_nb.study.grid import grid_cells, key_of, read_grid
from essl_nb.study.pareto import pareto_front
from essl_nb.study.results import cost_table, known_rows, load_results, paired_table, pareto_table, score_table, ship
from essl_nb.study.study import Outcome, Study, essl_study, locked_folder

FIRST, SECOND = list_mixers()[:2]
OBJECTIVE = objectives.names()[0]


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    "A folder of the thirty shortest read sentences, with their phones."
    folder, wanted = tmp_path_factory.mktemp("clips"), {"train": 16, "valid": 10, "test": 4}
    read = sorted((u for u in load_corpus("bundled") if u.part == "readru"), key=lambda u: u.seconds)
    chosen = [u for split, n in wanted.items() for u in [u for u in read if u.split == split][:n]]
    with open(folder / "manifest.csv", "w", newline="") as m, open(folder / "phones.csv", "w", newline="") as p:
        sounds, phones = csv.writer(m), csv.writer(p)
        sounds.writerow(["id", "path", "split", "part", "language"])
        phones.writerow(["id", "phone", "start", "end"])
        for u in chosen:
            shutil.copy(u.path, folder / u.path.name)
            sounds.writerow([u.id, u.path.name, u.split, u.part, u.language])
            phones.writerows([u.id, q.label, q.start, q.end] for q in u.phones)
    return str(folder)


def tiny_grid(clips="bundled", names=(FIRST, SECOND), **changes):
    return {
        "name": "tiny",
        "corpus": clips,
        "encoders": [{"name": n, "config": {"mixer": n, "dim": 16, "depth": 1}} for n in names],
        "objectives": [{"name": OBJECTIVE, "kw": objectives.get(OBJECTIVE).meta.get("tiny", {})}],
        "pretrain": {"steps": 20, "batch_seconds": 8},
        "seeds": [0],
        "probes": [{"name": "phones", "kw": {"steps": 20}, "untrained": False}],
        "baselines": [],
        **changes,
    }


def start(grid, folder):
    command = folder.parent / "essl_study"
    command.write_text("import sys\n\nfrom essl_nb.core.command import essl_study\n\nsys.exit(essl_study())\n")
    with open(folder.parent / f"{folder.name}.log", "ab") as log:
        return subprocess.Popen([sys.executable, str(command), str(grid), "--folder", str(folder)], stdout=log, stderr=log)


def said(folder):
    return (folder.parent / f"{folder.name}.log").read_text()


def children(pid):
    import psutil

    return psutil.Process(pid).children(recursive=True)


def wait_until(there, seconds=900):
    end = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def two_studies(clips, tmp_path_factory):
    "The same study twice: left alone, and killed in the middle of its second pre-training with a torn line on top."
    here = tmp_path_factory.mktemp("studies")
    values = tiny_grid(clips, pretrain={"steps": 320, "batch_seconds": 4}, probes=[{"name": "phones", "kw": {"steps": 20}, "untrained": False, "encoders": [SECOND]}])
    (here / "grid.json").write_text(json.dumps(values))
    calm, cut = here / "calm", here / "cut"
    assert start(here / "grid.json", calm).wait() == 0, said(calm)
    process = start(here / "grid.json", cut)
    second = [c for c in grid_cells(read_grid(values)) if c.kind == "run"][1].key
    wait_until(lambda: (cut / "runs" / second / "last.safetensors").exists() or process.poll() is not None)
    orphans = children(process.pid)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    state = [r["kind"] for r in read_lines(cut / "rows.jsonl")[0]], (cut / "runs" / second / "last.safetensors").exists()
    with open(cut / "rows.jsonl", "ab") as f:
        f.write(b'{"key": "half a li')
    wait_until(lambda: not any(p.is_running() and p.status() != "zombie" for p in orphans), 120)
    assert start(here / "grid.json", cut).wait() == 0, said(cut)
    return calm, cut, state


def test_the_kill_came_in_the_middle(two_studies):
    assert two_studies[2] == (["run"], True)  # one run on file, a saved state of the second


def test_killed_and_resumed_rows_equal_the_calm_ones(two_studies):
    calm, cut = ({r["key"]: r for r in read_lines(f / "rows.jsonl")[0]} for f in two_studies[:2])
    assert list(calm) == list(cut) and len(calm) == 3
    for key in calm:
        for part in ("kind", "what", "value"):
            assert json.dumps(calm[key][part]) == json.dumps(cut[key][part]), (key, part)


def test_killed_and_resumed_weights_equal_the_calm_ones_bit_for_bit(two_studies):
    calm, cut = (sorted(f.glob("runs/*/encoder/model.safetensors")) for f in two_studies[:2])
    assert [a.parent.parent.name for a in calm] == [b.parent.parent.name for b in cut] and len(calm) == 2
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(calm, cut))


def test_rows_say_how_they_were_made(two_studies):
    for row in read_lines(two_studies[0] / "rows.jsonl")[0]:
        assert {"when", "seconds", "machine", "versions", "git", "data_hash", "peak_rss", "jobs"} <= set(row["made"])
        assert not {"seconds", "when"} & set(row["value"])
    run = read_lines(two_studies[0] / "rows.jsonl")[0][0]["value"]
    assert run["steps"] == 320 and 0.3 < run["masked_share"] < 0.5 and len(run["weights"]) >= 12


def test_a_finished_study_says_so_at_once(two_studies, capsys):
    before, begun = (two_studies[0] / "rows.jsonl").read_bytes(), time.perf_counter()
    essl_study(str(two_studies[0].parent / "grid.json"), folder=str(two_studies[0]))
    assert "nothing to do" in capsys.readouterr().out and time.perf_counter() - begun < 60
    assert (two_studies[0] / "rows.jsonl").read_bytes() == before


def test_ship_writes_small_checkpoints_that_load(two_studies, tmp_path):
    from essl_nb.models.encoder import load_encoder

    study = Study(two_studies[0] / "grid.json")
    for path in ship(study, tmp_path):
        load_encoder(path)
        whole = study.folder / "runs" / json.loads((path / "origin.json").read_text())["run"] / "encoder" / "model.safetensors"
        assert (path / "model.safetensors").stat().st_size < whole.stat().st_size
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([FIRST, SECOND])
    shutil.rmtree(study.folder / "runs", ignore_errors=True)
    with pytest.raises(EsslError, match="no weights"):
        ship(study, tmp_path)
    assert [c.kind for c in study.todo()] == []  # facts do not need their weights


def test_a_mixer_of_one_decorator_goes_through_a_study(clips, tmp_path):
    @mixers.register("shift_test", family="pooling", complexity="T", paper="none", tiny={})
    class Shift(Mixer):
        needs_position = False

        def __init__(self, dim, *, causal=False):
            super().__init__(dim, causal=causal)
            self.out = nn.Linear(dim, dim)

        def forward(self, x, mask=None):
            # (B,T,D) → (B,T,D)
            x = x if mask is None else x.masked_fill(~mask[..., None], 0)
            y = self.out(x + nn.functional.pad(x, (0, 0, 1, 0))[:, :-1])
            return y if mask is None else y.masked_fill(~mask[..., None], 0)

    try:
        study = Study(tiny_grid(clips, ["shift_test"]), tmp_path)
        outcome = study.run(progress=False)
        assert outcome == Outcome(2, [], []), outcome
        table = score_table(tmp_path)
        assert set(table.encoder) == {"shift_test"} and set(table.family) == {"pooling"}
    finally:
        mixers.remove("shift_test")
    assert len(load_results(tmp_path)) >= 2  # the rows can be read where nobody knows the mixer any more


class Stand:
    "Takes the place of run_fresh: instant facts, a record of what ran beside what, failures on demand."

    def __init__(self, fail=(), slow=0.0):
        self.fail, self.slow, self.now, self.beside, self.order, self.guard = set(fail), slow, [], [], [], threading.Lock()

    def __call__(self, fn, kind, what, weights, lock, word):
        with self.guard:
            self.now.append(kind)
            self.order.append((kind, what["encoder"], what.get("seed"), what.get("state")))
            self.beside.append(tuple(self.now))
        time.sleep(self.slow)
        with self.guard:
            self.now.remove(kind)
        if (kind, what["encoder"]) in self.fail:
            raise EsslError("it was told to fail.")
        if kind == "run":
            Path(weights).mkdir(parents=True, exist_ok=True)
            (Path(weights) / "result.json").write_text("{}")
        return Fresh({"value": self.value(kind, what), "made": {"seconds": 1.0, "seconds_per_step": 0.05} if kind == "run" else {"seconds": 2.0}}, 10**6, 1.0)

    def value(self, kind, what):
        if kind == "run":
            return {"steps": what["pretrain"]["steps"], "stopped": None, "parameters": 7, "last": {"step": 20, "loss": 1.0}}
        if kind == "cost":
            return {"card": what["card"], "mixer": what["mixer"], "rtf": 0.01 if what["encoder"] == FIRST else 0.02, "points": [{"seconds": 1.0, "latency_s": 0.1}]}
        chance = {"pretrained": 0.6, "untrained": 0.4, "baseline": 0.5}[what["state"]] + (0.1 if what["encoder"] == FIRST else 0.0)
        generator = np.random.default_rng(what.get("seed") or 0)
        units = [[int(generator.binomial(100, chance)), 100] for _ in range(30)]
        low, high = bootstrap_interval(units)
        share = sum(u[0] for u in units) / 3000
        return {"probe": what["call"], "metric": "accuracy", "value": share, "low": low, "high": high, "n": 30, "count": 3000, "units": units,
                "unit_ids_hash": "same", "head": "linear", "labels": "all", "split": "test", "settings": {"span_ms": 200}, "also": []}


FULL = dict(seeds=[0, 1], probes=[{"name": "phones"}], baselines=[0, 100], costs=[{"card": "deployment", "kw": {"quick": True}}])


@pytest.fixture
def stand(monkeypatch):
    def put(**kw):
        double = Stand(**kw)
        monkeypatch.setattr(study_module, "run_fresh", double)
        return double

    return put


def test_order_runs_by_seed_then_scores_by_seed_then_costs_alone(clips, tmp_path, stand):
    double = stand(slow=0.02)
    study = Study(tiny_grid(clips, **FULL), tmp_path)
    assert study.run(jobs=3, progress=False) == Outcome(len(study.cells()), [], [])
    kinds = [o[0] for o in double.order]
    assert kinds == sorted(kinds, key=["run", "score", "cost"].index)
    for kind in ("run", "score"):
        seeds = [o[2] or 0 for o in double.order if o[0] == kind]
        assert seeds == sorted(seeds)
    assert all(len(b) == 1 for b in double.beside if "cost" in b)
    assert max(map(len, double.beside)) > 1


def test_a_failure_leaves_no_row_and_the_others_go_on(clips, tmp_path, stand, capsys):
    stand(fail=[("run", FIRST)])
    (tmp_path / "grid.json").write_text(json.dumps(tiny_grid(clips, **FULL)))
    code = essl_study(str(tmp_path / "grid.json"))
    told = capsys.readouterr().err
    assert code == 1 and "it was told to fail" in told and "To go on:" in told and "wait for pre-trainings" in told
    study = Study(tmp_path / "grid.json")
    assert {(c.kind, c.what["encoder"]) for c in study.todo()} == {("run", FIRST), ("score", FIRST)}
    stand()
    assert study.run(progress=False) == Outcome(4, [], [])


def test_only_some_kinds(clips, tmp_path, stand):
    stand()
    study = Study(tiny_grid(clips, **FULL), tmp_path)
    outcome = study.run(only="score", progress=False)
    assert outcome.done == 6 and len(outcome.waiting) == 4  # untrained and log-mel ones need no run
    assert study.run(only="run,cost", progress=False).done == 6
    with pytest.raises(EsslError, match="no kind of cell called 'runs'"):
        study.run(only="runs")


def test_weights_that_are_gone_are_made_again_where_wanted(clips, tmp_path, stand):
    stand()
    Study(tiny_grid(clips), tmp_path).run(only="run", progress=False)
    shutil.rmtree(tmp_path / "runs")
    study = Study(tiny_grid(clips), tmp_path)
    assert [c.kind for c in study.todo()] == ["run", "run", "score", "score"]
    assert study.run(progress=False).done == 4 and len(load_results(tmp_path)) == 4


def test_a_row_from_before_a_new_setting_still_answers(clips, tmp_path, stand):
    stand()
    study = Study(tiny_grid(clips), tmp_path)
    study.run(progress=False)
    rows, _ = read_lines(study.rows_file)
    study.rows_file.unlink()
    for row in rows:  # as if `accumulate` had been added to the package after these rows were written
        row["key"] = f"old{row['key']}"
        if "run" in row["what"]:
            row["what"]["run"] = f"old{row['what']['run']}"
        row["what"].get("pretrain", {}).pop("accumulate", None)
        append_line(study.rows_file, row)
    assert study.todo() == []
    assert [c.kind for c in Study(tiny_grid(clips, pretrain={"steps": 20, "batch_seconds": 8, "accumulate": 2}), tmp_path).todo()] == ["run", "run", "score", "score"]


def test_rows_about_other_data_are_not_mixed_in(clips, tmp_path, stand):
    stand()
    study = Study(tiny_grid(clips), tmp_path)
    study.run(only="run", progress=False)
    rows, _ = read_lines(study.rows_file)
    study.rows_file.unlink()
    for row in rows:
        append_line(study.rows_file, {**row, "made": {**row["made"], "data_hash": "other"}})
    with pytest.raises(EsslError, match="about data other"):
        study.run(progress=False)


def test_the_second_study_on_a_folder_is_told_who_is_there(clips, tmp_path):
    with locked_folder(tmp_path), pytest.raises(EsslError, match=f"process {os.getpid()}"):
        Study(tiny_grid(clips), tmp_path).run(progress=False)


def test_dry_lists_and_writes_nothing(clips, tmp_path, capsys):
    (tmp_path / "grid.json").write_text(json.dumps(tiny_grid(clips, **FULL)))
    essl_study(str(tmp_path / "grid.json"), dry=True)
    out = capsys.readouterr().out
    assert f"pre-train {FIRST} ({OBJECTIVE}, seed 1)" in out and "0 of 16 facts are known" in out
    assert [p.name for p in tmp_path.iterdir()] == ["grid.json"]


def test_a_corpus_without_the_labels_is_refused_before_any_work(clips, tmp_path, stand):
    double = stand()
    bare = tmp_path / "bare"
    shutil.copytree(clips, bare)
    (bare / "phones.csv").unlink()
    with pytest.raises(EsslError, match="no labels for the probe 'phones'"):
        Study(tiny_grid(str(bare)), tmp_path / "out").run(progress=False)
    assert not double.order


ENCODER = {"name": "a", "config": {"mixer": FIRST, "dim": 16, "depth": 1}}
WRONG = {
    "mixer": ({"encoders": [{"name": "a", "config": {"mixer": FIRST + "x"}}]}, "did you mean"),
    "mixer option": ({"encoders": [{"name": "a", "config": {"mixer": FIRST, "mixer_kw": {"colour": 1}}}]}, "colour"),
    "encoder field": ({"encoders": [{"name": "a", "config": {"mixer": FIRST, "dimm": 16}}]}, "did you mean 'dim'"),
    "no encoders": ({"encoders": []}, "encoders are empty"),
    "encoder name twice": ({"encoders": [ENCODER, ENCODER]}, "2 times"),
    "same encoder, two names": ({"encoders": [ENCODER, {**ENCODER, "name": "b"}]}, "same cell twice"),
    "objective": ({"objectives": [{"name": "guessing"}]}, "no objective called 'guessing'"),
    "objective option": ({"objectives": [{"name": OBJECTIVE, "kw": {"colour": 1}}]}, "colour"),
    "training setting": ({"pretrain": {"stepz": 1}}, "did you mean 'steps'"),
    "training value": ({"pretrain": {"steps": 0}}, "above 0"),
    "training setting of the grid's own": ({"pretrain": {"seed": 3}}, "seed"),
    "override for nobody": ({"pretrain_for": {"nobody": {}}}, "nobody"),
    "no seeds": ({"seeds": []}, "seeds are empty"),
    "seed twice": ({"seeds": [1, 1]}, "2 times"),
    "seed in words": ({"seeds": ["one"]}, "whole number"),
    "probe": ({"probes": [{"name": "fones"}]}, "did you mean 'phones'"),
    "probe option": ({"probes": [{"name": "phones", "kw": {"colour": 1}}]}, "colour"),
    "probe head": ({"probes": [{"name": "phones", "kw": {"head": "forest"}}]}, "forest"),
    "probe seed": ({"probes": [{"name": "phones", "seeds": [5]}]}, "not among"),
    "probe of nobody": ({"probes": [{"name": "phones", "encoders": ["nobody"]}]}, "nobody"),
    "probe twice": ({"probes": [{"name": "phones"}, {"name": "phones"}]}, "2 times"),
    "baseline": ({"baselines": [-1]}, "baselines"),
    "card": ({"costs": [{"card": "parking"}]}, "parking"),
    "card option": ({"costs": [{"card": "training", "kw": {"colour": 1}}]}, "colour"),
    "field": ({"sedes": [0]}, "did you mean 'seeds'"),
    "no list": ({"probes": {"name": "phones"}}, "a list of objects"),
}


@pytest.mark.parametrize("what", WRONG)
def test_illegal_grids_are_refused_in_one_sentence(what, tmp_path):
    change, word = WRONG[what]
    with pytest.raises(EsslError) as e:
        Study(tiny_grid(**change), tmp_path)
    assert word in str(e.value) and "grid" in str(e.value) and "\n" not in str(e.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text, word", [("{", "not JSON"), ("[]", "must hold an object"), (None, "no grid file")])
def test_grid_files_that_are_none(text, word, tmp_path):
    path = tmp_path / "grid.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(EsslError, match=word):
        essl_study(str(path))


@pytest.fixture
def filled(clips, tmp_path, stand):
    stand()
    Study(tiny_grid(clips, **FULL), tmp_path).run(progress=False)
    return tmp_path


def test_long_table_has_a_row_for_each_fact(filled):
    frame = load_results(filled)
    assert frame.kind.value_counts().to_dict() == {"run": 4, "score": 10, "cost": 2}
    assert set(frame[frame.kind == "score"].state) == {"pretrained", "untrained", "baseline"}
    assert set(frame[frame.kind == "score"].span_ms) == {200}
    assert frame[frame.kind == "cost"].rtf.notna().all() and (frame[frame.kind == "run"].train_seconds == 1.0).all()


def test_a_torn_last_line_warns_and_loses_nothing_else(filled):
    whole = len(load_results(filled))
    with open(filled / "rows.jsonl", "ab") as f:
        f.write(b'{"key": "ab')
    with pytest.warns(UserWarning, match="torn"):
        assert len(load_results(filled)) == whole
    append_line(filled / "rows.jsonl", {**read_lines(filled / "rows.jsonl")[0][0], "key": "new"})
    assert len(load_results(filled)) == whole + 1  # mended by the next line


def test_score_table_pools_seeds(filled):
    frame, table = load_results(filled), score_table(filled)
    mine = table[(table.encoder == FIRST) & (table.state == "pretrained")].iloc[0]
    single = frame[(frame.kind == "score") & (frame.encoder == FIRST) & (frame.state == "pretrained")].value
    assert mine.seeds == 2 and mine.value == pytest.approx(single.mean()) and mine.low < mine.value < mine.high
    assert (mine.seed_low, mine.seed_high) == (single.min(), single.max())
    with pytest.raises(EsslError, match="did you mean 'phones'"):
        score_table(filled, "fones")


def test_paired_table_against_encoder_untrained_and_log_mel(filled):
    table = paired_table(filled, against=[SECOND, "untrained", "log-mel ±100 ms"]).set_index(["encoder", "against"])
    for name, truth in ((SECOND, 0.1), ("untrained", 0.2), ("log-mel ±100 ms", 0.2)):
        row = table.loc[(FIRST, name)]
        assert row.low < truth + 0.02 and row.high > truth - 0.02 and len(row.by_seed) == 2
        assert row.clear == (name != SECOND), "two seeds whose differences are three points apart cannot show ten"
    assert set(paired_table(filled).against) >= {"untrained", "log-mel ±100 ms"}
    with pytest.raises(EsslError, match="no encoder or baseline"):
        paired_table(filled, against="nobody")


def test_scores_of_different_utterances_are_not_pooled(filled):
    row = next(r for r in read_lines(filled / "rows.jsonl")[0] if r["kind"] == "score" and r["what"]["state"] == "pretrained")
    append_line(filled / "rows.jsonl", {**row, "value": {**row["value"], "unit_ids_hash": "others"}})
    with pytest.raises(EsslError, match="different utterances"):
        score_table(filled)


def test_cost_and_pareto_tables(filled):
    costs = cost_table(filled).set_index("encoder")
    assert costs.deployment_rtf.to_dict() == {FIRST: 0.01, SECOND: 0.02} and (costs.parameters == 7).all()
    table = pareto_table(filled, "phones")
    assert set(pareto_front(table, "deployment_rtf", "value").encoder) == {FIRST}  # cheaper and better


def test_results_that_are_not_there(tmp_path):
    with pytest.raises(EsslError, match="no results"):
        load_results(tmp_path)
    assert known_rows(tmp_path / "rows.jsonl") == {}


def test_an_option_that_says_what_holds_anyway_is_no_other_fact():
    key = lambda **kw: key_of("cost", dict(config={}, card="deployment", kw=kw))
    assert key() == key(device="cpu") == key(seconds=[1.0, 5.0, 10.0, 20.0, 40.0, 80.0], threads=1)
    assert len({key(), key(device="cuda"), key(threads=2), key(quick=True), key(seconds=[1.0])}) == 5
