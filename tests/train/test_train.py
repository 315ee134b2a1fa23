"""Pre-training: it learns, it stops when it should, and a run that was killed ends as one that was not."""
import errno
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from madeup import steps_of

from essl_nb.core.config import from_json, to_json
from essl_nb.core.files import read_lines, save_tensors
from essl_nb.core.registry import EsslError
from essl_nb.mixers.base import list_mixers, mixers
from essl_nb.models.config import EncoderConfig
from essl_nb.objectives.objective import list_objectives, objectives
from essl_nb.train import folder as folder_module
from essl_nb.train import loop
from essl_nb.train.config import PretrainConfig
from essl_nb.train.loop import pretrain
from essl_nb.train.feed import BATCHING

NAMES = list_mixers()


def settings(mixer, corpus, **kw):
    encoder = EncoderConfig(mixer, dim=16, depth=1, mixer_kw=mixers.get(mixer).meta.get("tiny", {}))
    own = dict(objective="clusters", steps=40, batch_seconds=8.0, lr=5e-3)
    own.update(kw)
    own.setdefault("objective_kw", objectives.get(own["objective"]).meta.get("tiny", {}))
    return PretrainConfig(encoder, corpus=str(corpus), **own)


def quiet(config, folder, **kw):
    return pretrain(config, folder, progress=False, **{**dict(log_every=5, watch_every=20, save_every=5), **kw})


@pytest.mark.parametrize("name", NAMES)
def test_every_mixer_learns(name, folder_of_clips, tmp_path):
    rows, _ = read_lines(quiet(settings(name, folder_of_clips), tmp_path / "run") / "metrics.jsonl")
    assert rows[-1]["loss"] < 0.9 * rows[0]["loss"]
    assert 0.25 < sum(r["masked_share"] for r in rows) / len(rows) < 0.55


@pytest.mark.parametrize("objective", list_objectives())
@pytest.mark.parametrize("batching", BATCHING)
def test_every_objective_learns_from_packed_and_from_padded_speech(objective, batching, folder_of_clips, tmp_path):
    rows, _ = read_lines(quiet(settings(NAMES[0], folder_of_clips, objective=objective, batching=batching), tmp_path / "run") / "metrics.jsonl")
    assert rows[-1]["masked_loss"] < rows[0]["masked_loss"]


SCRIPT = """
import json, sys, time
import torch
torch.set_num_threads(1)
from essl_nb.core.config import from_json
from essl_nb.train import folder as folder_module
from essl_nb.train import loop
step = loop.train_step
def slowly(run):
    time.sleep(0.02)
    return step(run)
loop.train_step = slowly
loop.pretrain(from_json(loop.PretrainConfig, json.loads(sys.argv[1])), sys.argv[2], progress=False, log_every=5, watch_every=20, save_every=5)
"""


def test_a_run_killed_outright_ends_as_one_that_was_not(folder_of_clips, tmp_path):
    config = settings(NAMES[0], folder_of_clips, steps=80)
    quiet(config, tmp_path / "straight")
    command = [sys.executable, "-c", SCRIPT, json.dumps(to_json(config)), str(tmp_path / "killed")]
    for _ in range(2):
        child = subprocess.Popen(command)
        saved, before = tmp_path / "killed" / "last.safetensors", None
        before = saved.stat().st_mtime_ns if saved.exists() else 0
        end = time.time() + 120
        while not (saved.exists() and saved.stat().st_mtime_ns > before) and time.time() < end and child.poll() is None:
            time.sleep(0.01)
        time.sleep(0.05)
        os.kill(child.pid, signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL, "the run ended before it could be killed"
    assert not (tmp_path / "killed" / "result.json").exists()
    quiet(config, tmp_path / "killed")
    a, b = (json.loads((tmp_path / f / "result.json").read_text())["value"] for f in ("straight", "killed"))
    assert a == b
    assert steps_of(tmp_path / "straight") == steps_of(tmp_path / "killed")


def test_a_full_disk_leaves_the_last_checkpoint_whole(folder_of_clips, tmp_path, monkeypatch):
    config = settings(NAMES[0], folder_of_clips)

    def no_room(path, tensors, metadata=None):
        from essl_nb.core.files import atomic_write

        if int(tensors["step"]) < 20:
            return save_tensors(path, tensors, metadata)
        with atomic_write(path) as part:
            part.write_bytes(b"half of it")
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(folder_module, "save_tensors", no_room)
    with pytest.raises(EsslError, match="disk is full"):
        quiet(config, tmp_path / "run")
    monkeypatch.undo()
    assert not list((tmp_path / "run").glob(".*.part"))
    quiet(config, tmp_path / "run")
    quiet(config, tmp_path / "straight")
    a, b = (json.loads((tmp_path / f / "result.json").read_text())["value"] for f in ("run", "straight"))
    assert a == b


def test_a_collapsed_run_is_stopped_and_says_why(folder_of_clips, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(loop, "collapsed", lambda health, step, **kw: "the frames span 1.0 dimension")
    folder = quiet(settings(NAMES[0], folder_of_clips), tmp_path / "run")
    result = json.loads((folder / "result.json").read_text())["value"]
    assert result["steps"] == 20 and "1.0 dimension" in result["stopped"] and "1.0 dimension" in capsys.readouterr().out


def test_the_folder_of_another_run_is_left_alone(folder_of_clips, tmp_path):
    quiet(settings(NAMES[0], folder_of_clips, steps=5), tmp_path / "run")
    with pytest.raises(EsslError, match="differs in lr"):
        quiet(settings(NAMES[0], folder_of_clips, steps=5, lr=1e-3), tmp_path / "run")


def test_a_finished_run_is_not_run_again(folder_of_clips, tmp_path):
    config = settings(NAMES[0], folder_of_clips, steps=5)
    folder = quiet(config, tmp_path / "run")
    before = (folder / "result.json").stat().st_mtime_ns
    assert quiet(config, folder) == folder and (folder / "result.json").stat().st_mtime_ns == before


def test_dropout_resumes_exactly_and_leaves_the_global_state_alone(folder_of_clips, tmp_path):
    config = settings(NAMES[0], folder_of_clips, steps=20)
    config = PretrainConfig(EncoderConfig(**{**vars(config.encoder), "dropout": 0.2}), **{k: v for k, v in vars(config).items() if k != "encoder"})
    torch.manual_seed(0)
    want = torch.rand(3)
    torch.manual_seed(0)
    a = quiet(config, tmp_path / "a")
    assert torch.equal(torch.rand(3), want)
    torch.manual_seed(99)
    b = quiet(config, tmp_path / "b")
    assert json.loads((a / "result.json").read_text())["value"] == json.loads((b / "result.json").read_text())["value"]


def test_tensorboard_gets_the_same_numbers(folder_of_clips, tmp_path):
    folder = quiet(settings(NAMES[0], folder_of_clips, steps=5), tmp_path / "run", tensorboard=True)
    assert list((folder / "tensorboard").glob("events*"))


@pytest.mark.parametrize(
    "kw, complaint",
    [
        (dict(objective="no-such-objective"), "There is no objective"),
        (dict(batching="bagged"), "packed, padded"),
        (dict(steps=0), "must be above 0"),
        (dict(span_share=1.5), "between 0 and 1"),
        (dict(precision="int4"), "auto, fp32, bf16"),
    ],
)
def test_impossible_settings_are_refused(kw, complaint):
    with pytest.raises(EsslError, match=complaint):
        PretrainConfig(EncoderConfig(NAMES[0]), **kw)


def test_settings_survive_json(folder_of_clips):
    config = settings(NAMES[0], folder_of_clips)
    assert from_json(PretrainConfig, json.loads(json.dumps(to_json(config)))) == config


def test_the_command_answers_a_misspelt_mixer_in_one_sentence(tmp_path):
    command = [sys.executable, "-c", "import sys; from essl_nb.core.command import essl_pretrain; sys.exit(essl_pretrain())", NAMES[0] + "x", "--folder", tmp_path / "run"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and f"did you mean {NAMES[0]!r}" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()
