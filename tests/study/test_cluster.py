"""Jobs on a cluster: what SLURM is asked for, and jobs that go on after a pre-emption and after a kill. No SLURM is needed: submitit runs the same jobs here."""
import json
import os
import shutil
import signal
import stat
import threading
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import submitit

from essl_nb.core import command
from essl_nb.core.config import from_json, to_json
from essl_nb.core.files import read_json, read_lines
from essl_nb.core.registry import EsslError
from essl_nb.mixers.base import list_mixers, mixers
from essl_nb.models.config import EncoderConfig
from essl_nb.objectives.objective import objectives
from essl_nb.study.cluster import PRESETS, PretrainJob, jobs_of, run_local, study_jobs
from essl_nb.study.grid import example_grid
from essl_nb.study.results import known_rows
from essl_nb.study.study import Study, locked_folder
from essl_nb.train.config import PretrainConfig
from essl_nb.train.loop import pretrain

NAME = list_mixers(family="pooling")[0]
BIG = ["--nodes", 2, "--gpus", 4, "--preset", "a100", "--partition", "gpu", "--account", "abc", "--constraint", "a100_80g", "--qos", "long", "--setup", "module load cuda",
       "--sbatch", "hint=nomultithread,exclusive"]


def submit(*argv) -> int:
    return command.essl_submit(list(map(str, argv)))


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    "Stand-ins for sbatch and srun: sbatch keeps the script, and answers as SLURM does or as the file `answer` says."
    there = tmp_path / "bin"
    there.mkdir()
    for name, text in dict(srun="exit 0", sbatch=f'cp "$1" {tmp_path}/script; [ -f {tmp_path}/answer ] && cat {tmp_path}/answer >&2 && exit 1; echo Submitted batch job 4711').items():
        (there / name).write_text(f"#!/bin/sh\n{text}\n")
        (there / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{there}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_script_of_two_nodes_of_four_gpus(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert submit("pretrain", NAME, *BIG, "--dry_run") == 0
    script = capsys.readouterr().out
    lines = script.splitlines()
    for line in ("--nodes=2", "--gpus-per-node=4", "--ntasks-per-node=4", "--cpus-per-task=8", "--mem=240GB", "--time=1200", "--partition=gpu", "--account=abc",
                 "--constraint=a100_80g", "--qos=long", "--signal=USR2@120", "--requeue", "--open-mode=append", "--hint=nomultithread", "--exclusive"):
        assert f"#SBATCH {line}" in lines
    assert lines.index("module load cuda") < next(n for n, line in enumerate(lines) if line.startswith("srun"))
    assert "--kill-on-bad-exit=1 --cpus-per-task=8" in script and list(tmp_path.iterdir()) == []


def test_what_is_submitted_is_what_the_dry_run_prints(slurm, capsys):
    submit("pretrain", NAME, *BIG, "--dry_run")
    script = capsys.readouterr().out
    assert submit("pretrain", NAME, *BIG) == 0
    assert (slurm / "script").read_text().strip() == script.strip()
    assert "Submitted job 4711" in capsys.readouterr().out


def test_a_study_is_an_array(slurm, capsys):
    Path("grid.json").write_text(json.dumps(example_grid()))
    submit("study", "grid.json", "--gpus", 1, "--at_once", 3, "--dry_run")
    script = capsys.readouterr().out
    assert submit("study", "grid.json", "--gpus", 1, "--at_once", 3) == 0
    assert (slurm / "script").read_text().strip() == script.strip() and "#SBATCH --array=0-5%3" in script
    kept = [submitit.core.utils.DelayedSubmission.load(p).function for p in sorted(slurm.glob("jobs/*submitted.pkl"))]
    assert sorted(k for job in kept for k in job.keys) == sorted(c.key for c in Study("grid.json").cells())


def test_what_slurm_refuses_is_one_sentence(slurm, capsys):
    (slurm / "answer").write_text("sbatch: error: invalid partition specified: gpux\n")
    assert submit("pretrain", NAME, "--partition", "gpux") == 2
    assert "invalid partition specified: gpux" in capsys.readouterr().err


BAD = [
    (["pretrian", NAME], "did you mean 'pretrain'"),
    (["pretrain", NAME, "--nodes", 0], "--nodes 0 was given"),
    (["pretrain", NAME, "--sbatch", "=x"], "NAME=VALUE"),
    (["study", "grid.json", "--steps", 3], "stand in its grid"),
    (["study", "grid.json", "--nodes", 2], "one node"),
    (["pretrain", NAME], "no srun"),
]


@pytest.mark.parametrize("argv, why", BAD, ids=lambda v: "-".join(map(str, v)) if isinstance(v, list) else "")
def test_bad_input_is_one_sentence(argv, why, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert submit(*argv) == 2
    err = capsys.readouterr().err
    assert why in err and err.count("\n") == 1


def test_a_preset_gives_what_is_not_given(monkeypatch, slurm):
    monkeypatch.setattr("essl_nb.study.cluster.submit_slurm", lambda jobs, *a: kept.append(jobs[0]) or "1")
    kept = []
    submit("pretrain", NAME, *BIG)
    submit("pretrain", NAME, *BIG, "--batch_seconds", 50, "--precision", "fp32", "--compile", "off", "--workers", 0, "--accumulate", 12)
    plain, own = (from_json(PretrainConfig, job.config) for job in kept)
    assert (plain.precision, plain.batch_seconds, plain.accumulate) == ("bf16", PRESETS["a100"].batch_seconds, 8)
    assert (own.precision, own.batch_seconds, own.accumulate) == ("fp32", 50, 16)  # as many batches on each of 8 GPUs
    assert [(job.options["compile"], job.options["workers"]) for job in kept] == [(True, PRESETS["a100"].workers), (False, 0)]


def test_a_study_that_runs_is_not_submitted(tmp_path):
    (tmp_path / "grid.json").write_text(json.dumps(example_grid()))
    with locked_folder(tmp_path), pytest.raises(EsslError, match="Another study"):
        study_jobs(str(tmp_path / "grid.json"), "")


@pytest.fixture
def config(tmp_path, root):
    clips = tmp_path / "clips"
    clips.mkdir()
    for clip in sorted((root / "corpus" / "prompts").glob("*/*/*.opus"))[::150]:
        shutil.copy(clip, clips)
    encoder = EncoderConfig(NAME, dim=16, depth=1, mixer_kw=mixers.get(NAME).meta.get("tiny", {}))
    return PretrainConfig(encoder, objective="best_rq", objective_kw=objectives.get("best_rq").meta["tiny"], corpus=str(clips), steps=120, batch_seconds=4.0, precision="fp32")


def tasks_of(logs: Path) -> list: # processes that submitit started for a job, and theirs
    return [p for p in psutil.process_iter(["cmdline"]) if str(logs) in (p.info["cmdline"] or []) and "submitit.core._submit" in p.info["cmdline"]]


def once(there, fn, seconds=60):
    "Call `fn` as soon as the file `there` has some lines."
    end = time.monotonic() + seconds
    while time.monotonic() < end and not (there.exists() and there.read_bytes().count(b"\n") > 2):
        time.sleep(0.02)
    fn()


def rows_of(folder) -> list: # of the log, without what is measured in time
    return [{k: v for k, v in row.items() if k != "waiting"} for row in read_lines(folder / "metrics.jsonl")[0]]


@pytest.mark.parametrize("tasks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_preempted_job_is_requeued_and_goes_on(config, tmp_path, tasks):
    "SIGUSR2, as SLURM sends it, to the tasks of a job of submitit's local executor; two tasks are a sharded run."
    logs, folder, config = tmp_path / "run" / "jobs", tmp_path / "run", replace(config, accumulate=tasks)
    notice = lambda: [p.send_signal(signal.SIGUSR2) for p in tasks_of(logs)]
    threading.Thread(target=once, args=(folder / "metrics.jsonl", notice)).start()
    ended = run_local([PretrainJob(to_json(config), str(folder), dict(log_every=1, parallel="fsdp2"))], logs, tasks=tasks, gpus=0, hours=1, at_once=1)
    assert ended == [(str(folder), None)]
    log = "".join(p.read_text() for p in logs.glob("*_log.*"))
    assert "Requeued job" in log and "stopped at step" in log and log.count("Loading pickle") == 2 * tasks
    pretrain(config, tmp_path / "straight", progress=False, log_every=1)
    a, b = (rows_of(tmp_path / f) for f in ("straight", "run"))
    assert [r["step"] for r in a] == [r["step"] for r in b] and read_json(folder / "run.json")["made"]["processes"] == tasks
    assert a == b if tasks == 1 else all(x["loss"] == pytest.approx(y["loss"], rel=1e-5) for x, y in zip(a, b))


def small_grid(config) -> dict:
    settings = {k: v for k, v in to_json(config).items() if k in ("steps", "batch_seconds", "precision")}
    encoders = [{"name": n, "config": to_json(config)["encoder"] | {"dim": dim}} for n, dim in (("thin", 16), ("wide", 24))]
    return {"name": "small", "corpus": config.corpus, "encoders": encoders, "objectives": [{"name": "best_rq", "kw": config.objective_kw}], "pretrain": settings, "seeds": [0],
            "costs": [{"card": "deployment", "kw": {"quick": True}, "encoders": ["thin"]}]}


def test_the_jobs_of_a_study_hold_each_open_cell_once(tmp_path):
    study = Study(example_grid(), tmp_path)
    jobs = jobs_of(study)
    assert sorted(c.key for cells in jobs for c in cells) == sorted(c.key for c in study.cells())
    for cells in jobs:
        assert all(c.needs == cells[0].key for c in cells[1:]) and (cells[0].needs is None or len(cells) == 1)


@pytest.mark.slow
def test_a_study_whose_job_is_killed_goes_on_with_the_same_command(config, tmp_path):
    "kill -9 of a job and of the process that trains; one command, three jobs, and in the end the rows of a study that ran through."
    for name in ("straight", "killed"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "grid.json").write_text(json.dumps(small_grid(config)))
    assert submit("study", tmp_path / "straight" / "grid.json", "--local") == 0
    logs, study = tmp_path / "killed" / "jobs", Study(tmp_path / "killed" / "grid.json")
    first = study.folder / "runs" / study.cells("run")[0].key

    def kill():
        for task in tasks_of(logs):
            for p in [task, *task.children(recursive=True)]:
                p.kill()

    threading.Thread(target=once, args=(first / "metrics.jsonl", kill)).start()
    assert submit("study", tmp_path / "killed" / "grid.json", "--local") == 1
    known = known_rows(study.rows_file)
    assert study.cells("run")[0].key not in known and len(known) == 2  # the other jobs went on
    assert submit("study", tmp_path / "killed" / "grid.json", "--local") == 0
    rows = [known_rows(tmp_path / name / "rows.jsonl") for name in ("straight", "killed")]
    assert rows[0].keys() == rows[1].keys() and len(rows[0]) == 3
    for c in study.cells("run"):
        a, b = (r[c.key]["value"] for r in rows)
        assert a["weights"] == b["weights"] and a["last"]["loss"] == b["last"]["loss"]
