"""A run is never lost and never mixed: killed, stopped, cut off, prolonged, met by another process, other data or other numbers."""
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import replace

import pytest
import torch
from madeup import steps_of, whole

from essl_nb.core import files
from essl_nb.core.config import to_json
from essl_nb.core.files import Busy, append_line, keep_lines, load_tensors, read_json, read_lines
from essl_nb.core.registry import EsslError
from essl_nb.core.stop import noticing_stops
from essl_nb.mixers.base import list_mixers, mixers
from essl_nb.models.config import EncoderConfig
from essl_nb.models.encoder import load_encoder
from essl_nb.objectives.health import collapsed
from essl_nb.objectives.objective import objectives
from essl_nb.train import feed
from essl_nb.train import folder as folder_module
from essl_nb.train import loop
from essl_nb.train import targets as targets_module
from essl_nb.train.config import PretrainConfig
from essl_nb.train.loop import PATIENCE, pretrain
from essl_nb.train.optim import learning_rate

OFTEN = dict(progress=False, log_every=1, watch_every=10, save_every=4)


def settings(clips, **kw):
    mixer = list_mixers(family="pooling")[0]
    encoder = EncoderConfig(mixer, dim=16, depth=1, mixer_kw=mixers.get(mixer).meta.get("tiny", {}))
    own = dict(objective="best_rq", steps=12, batch_seconds=8.0, lr=5e-3, precision="fp32")
    own.update(kw)
    own.setdefault("objective_kw", objectives.get(own["objective"]).meta.get("tiny", {}))
    return PretrainConfig(encoder, corpus=str(clips), **own)


def value(folder):
    return read_json(folder / "result.json")["value"]


def same(a, b):
    "Whether two finished runs are equal, to the last bit and line."
    model = [(f / "encoder" / "model.safetensors").read_bytes() for f in (a, b)]
    return value(a) == value(b) and model[0] == model[1] and steps_of(a) == steps_of(b)


class PowerCut(BaseException):
    "Ends a run as nothing that is caught would."


@pytest.fixture
def at_step(monkeypatch):
    "Do something before the step with this number."
    step = loop.train_step

    def put(number, do):
        monkeypatch.setattr(loop, "train_step", lambda run: (do() if run.step == number else None, step(run))[1])

    yield put
    monkeypatch.setattr(loop, "train_step", step)


def cut():
    raise PowerCut


LIVES = """
import json, os, random, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from essl_nb.core.config import from_json
from essl_nb.core.files import read_lines
from essl_nb.train import loop
from essl_nb.train.loop import PretrainConfig, pretrain
config, folder, draw = from_json(PretrainConfig, json.loads(sys.argv[1])), Path(sys.argv[2]), random.Random(int(sys.argv[4]))
often = dict(progress=False, log_every=1, watch_every=10, save_every=4)
pretrain(config, folder.with_name("straight"), **often)
often["workers"] = int(sys.argv[5])
signals = [signal.SIGKILL, signal.SIGTERM] * int(sys.argv[3])
draw.shuffle(signals)
log, came = folder / "metrics.jsonl", {}

def lines():
    return log.read_bytes().count(b"\\n") if log.exists() else 0

def life(number):  # of the signal; 0: to the end
    until = lines() + draw.randint(1, 7)
    child = os.fork()
    if child == 0:
        step = loop.train_step
        loop.train_step = lambda run: (time.sleep(0.01), step(run))[1]
        status = 1
        try:
            pretrain(config, folder, **often)
            status = 0
        except SystemExit as e:
            status = e.code
        finally:
            os._exit(status)
    if number:
        end = time.monotonic() + (draw.uniform(0, 0.6) if draw.random() < 0.3 else 120)  # some while they start
        while lines() < until and time.monotonic() < end and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.03))
        os.kill(child, number)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

for number in signals:
    status = life(number)
    came[f"{number.name} {status}"] = came.get(f"{number.name} {status}", 0) + 1
    assert not (folder / "result.json").exists(), (came, "the run was over before all signals were sent")
    read_lines(log)
assert life(0) == 0
print(json.dumps(came))
"""


@pytest.mark.parametrize("times, reading, workers", [
    (3, "stored", 0), pytest.param(20, "stored", 0, marks=pytest.mark.slow), pytest.param(20, "streamed", 2, marks=pytest.mark.slow)])
def test_a_run_killed_and_stopped_at_random_moments_ends_as_one_that_was_not(times, reading, workers, clips, tmp_path):
    config = settings(clips, steps=12 + 26 * times, reading=reading)
    command = [sys.executable, "-c", LIVES, json.dumps(to_json(config)), str(tmp_path / "run"), str(times), "7", str(workers)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    came = json.loads(done.stdout.splitlines()[-1])
    print(came)
    assert sum(n for k, n in came.items() if k.startswith("SIGKILL")) == times == came["SIGKILL -9"]
    assert set(came) <= {"SIGKILL -9", "SIGTERM 143", "SIGTERM -15"}  # saved between two steps, or still starting
    steps = [r["step"] for r in read_lines(tmp_path / "run" / "metrics.jsonl")[0]]
    assert steps == list(range(1, config.steps + 1))
    assert same(tmp_path / "straight", tmp_path / "run") and whole(tmp_path / "run")


@pytest.fixture(scope="module")
def straight(clips, tmp_path_factory):
    return pretrain(settings(clips), tmp_path_factory.mktemp("straight") / "run", **OFTEN)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_cut_at_every_rename_leaves_a_run_that_ends_the_same(after, straight, clips, tmp_path, monkeypatch):
    replace_file, count = os.replace, [0]

    def counted(a, b):
        count[0] += "run" in str(b)
        if "run" in str(b) and count[0] == count[1] and not after:
            raise PowerCut
        replace_file(a, b)
        if "run" in str(b) and count[0] == count[1] and after:
            raise PowerCut

    monkeypatch.setattr(os, "replace", counted)
    for number in range(1, 100):
        count[:] = [0, number]
        folder = tmp_path / f"{number}" / "run"
        try:
            pretrain(settings(clips), folder, **OFTEN)
            break
        except PowerCut:
            count[:] = [0, 0]
            if (folder / "encoder").exists():
                load_encoder(folder / "encoder")  # whole or absent
            pretrain(settings(clips), folder, **OFTEN)
            assert same(straight, folder) and whole(folder), number
    assert number > 8


def test_resumed_twice_and_from_before_the_first_saved_state(straight, clips, tmp_path, at_step):
    for step in (2, 3, 7, 11):
        at_step(step, cut)
        with pytest.raises(PowerCut):
            pretrain(settings(clips), tmp_path / "run", **OFTEN)
    at_step(-1, cut)
    pretrain(settings(clips), tmp_path / "run", **OFTEN)
    assert same(straight, tmp_path / "run")


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode, lambda: torch.device("meta"), lambda: torch.autocast("cpu", torch.bfloat16)], ids=["no gradient", "inference", "another device", "autocast"])
def test_what_a_program_has_set_in_torch_changes_no_run(around, straight, clips, tmp_path):
    with around():
        pretrain(settings(clips), tmp_path / "run", **OFTEN)
    assert same(straight, tmp_path / "run")


def test_another_default_type_changes_no_run(straight, clips, tmp_path):
    torch.set_default_dtype(torch.float64)
    try:
        pretrain(settings(clips), tmp_path / "run", **OFTEN)
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert same(straight, tmp_path / "run")


@pytest.fixture
def usual():
    "What a signal does by default, also where this process was started with the signal ignored, as nohup and background jobs are."
    before = {}

    def put(number):
        handler = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        before[number] = signal.signal(number, handler)
        return handler

    yield put
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP"])
def test_a_signal_stops_between_two_steps_with_the_state_saved(name, straight, clips, tmp_path, at_step, usual):
    before = usual(getattr(signal, name))
    at_step(6, lambda: os.kill(os.getpid(), getattr(signal, name)))
    with pytest.raises(KeyboardInterrupt if name == "SIGINT" else SystemExit) as stop:
        pretrain(settings(clips), tmp_path / "run", **{**OFTEN, "save_every": 1000})
    assert "step 7 of 12" in str(stop.value) and getattr(stop.value, "code", None) in (None, 128 + getattr(signal, name))
    assert int(load_tensors(tmp_path / "run" / "last.safetensors")["step"]) == 7
    assert signal.getsignal(getattr(signal, name)) is before
    at_step(-1, cut)
    pretrain(settings(clips), tmp_path / "run", **OFTEN)
    assert same(straight, tmp_path / "run")


def test_a_signal_that_is_to_be_ignored_is_ignored(usual):
    usual(signal.SIGHUP)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup leaves it
    with noticing_stops() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
    assert not stop and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def test_a_second_ctrl_c_does_not_wait(usual):
    usual(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), noticing_stops() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.name == "Ctrl-C"
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(1000):
            pass


def test_a_signal_that_the_program_handles_itself_stays_the_programs():
    heard, before = [], signal.signal(signal.SIGUSR1, lambda *a: heard.append(1))
    try:
        with noticing_stops() as stop:
            os.kill(os.getpid(), signal.SIGUSR1)
        assert heard and not stop
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_run_in_a_thread_is_a_run(straight, clips, tmp_path):
    thread = threading.Thread(target=pretrain, args=(settings(clips), tmp_path / "run"), kwargs=OFTEN)
    thread.start()
    thread.join()
    assert same(straight, tmp_path / "run")


def test_the_state_is_saved_after_minutes_too(clips, tmp_path, at_step):
    at_step(9, cut)
    with pytest.raises(PowerCut):
        pretrain(settings(clips), tmp_path / "run", **{**OFTEN, "save_every": 1000}, save_minutes=0)
    assert int(load_tensors(tmp_path / "run" / "last.safetensors")["step"]) == 9


def test_a_second_process_on_a_run_is_told_who_is_there(clips, tmp_path):
    with folder_module.sole_run(tmp_path / "run"), pytest.raises(Busy, match=f"process {os.getpid()}"):
        pretrain(settings(clips), tmp_path / "run", **OFTEN)
    assert not (tmp_path / "run" / "config.json").exists()


def test_what_killed_processes_left_is_cleared_away(clips, tmp_path):
    (tmp_path / "run" / ".encoder.new.part").mkdir(parents=True)
    (tmp_path / "run" / ".last.safetensors.abc.part").write_bytes(b"half")
    pretrain(settings(clips, steps=2), tmp_path / "run", **OFTEN)
    assert whole(tmp_path / "run")


@pytest.fixture
def begun(clips, tmp_path, at_step):
    "A run that stands at step 8 of 12, on a copy of the clips."
    shutil.copytree(clips, tmp_path / "clips")
    at_step(9, cut)
    with pytest.raises(PowerCut):
        pretrain(settings(tmp_path / "clips"), tmp_path / "run", **OFTEN)
    at_step(-1, cut)
    return tmp_path / "run", settings(tmp_path / "clips")


def test_added_removed_and_changed_clips_are_refused(begun, tmp_path):
    folder, config = begun
    clips = sorted((tmp_path / "clips").glob("*.opus"))
    state = (folder / "last.safetensors").read_bytes()

    def refused():
        with pytest.raises(EsslError, match="begun on other data"):
            pretrain(config, folder, **OFTEN)

    shutil.copy(clips[0], tmp_path / "clips" / "new.opus")
    refused()
    (tmp_path / "clips" / "new.opus").unlink()
    kept = clips[0].read_bytes()
    shutil.copy(clips[1], clips[0])
    refused()
    clips[0].unlink()
    refused()
    clips[0].write_bytes(kept)
    assert (folder / "last.safetensors").read_bytes() == state
    pretrain(config, folder, **OFTEN)


def test_targets_that_come_out_differently_are_refused(begun, monkeypatch):
    folder, config = begun
    monkeypatch.setattr(feed, "targets_hash", lambda objective, items: "other")
    with pytest.raises(EsslError, match="targets .* come out differently"):
        pretrain(config, folder, **OFTEN)


def test_the_name_of_targets_depends_on_every_function_that_makes_them(monkeypatch):
    from essl_nb.objectives import bestrq, clusters

    for module, name, cls in ((clusters, "kmeans", clusters.Clusters), (clusters, "dct_basis", clusters.Clusters), (bestrq, "random_quantiser", bestrq.BestRQ), (clusters, "sample_frames", clusters.Clusters)):
        before = targets_module.code_of(cls)
        other = lambda *a, **kw: None
        other.__module__ = module.__name__
        monkeypatch.setattr(module, name, other)
        assert targets_module.code_of(cls) != before, name
        monkeypatch.undo()
        assert targets_module.code_of(cls) == before


def test_a_torn_cache_of_targets_is_made_again(clips, straight, tmp_path, monkeypatch):
    monkeypatch.setenv("ESSL_CACHE", str(tmp_path / "cache"))
    pretrain(settings(clips), tmp_path / "a" / "run", **OFTEN)
    (kept,) = (tmp_path / "cache" / "targets").glob("*.safetensors")
    kept.write_bytes(kept.read_bytes()[:100])
    (kept.parent / f".{kept.name}.xyz.part").write_bytes(b"half")
    pretrain(settings(clips), tmp_path / "b" / "run", **OFTEN)
    assert same(tmp_path / "a" / "run", tmp_path / "b" / "run") and not list(kept.parent.glob("*.part")) + list(kept.parent.glob(".*.part"))


def test_other_threads_are_said(begun, capsys):
    folder, config = begun
    record = read_json(folder / "run.json")
    record["made"]["threads"] += 3
    files.write_json(folder / "run.json", record)
    pretrain(config, folder, **OFTEN)
    assert "no longer bit for bit" in capsys.readouterr().out


def test_the_precision_that_auto_took_stays_the_runs(clips, tmp_path, at_step, monkeypatch, capsys):
    from essl_nb.core import precision

    config = settings(clips, precision="auto")
    monkeypatch.setattr(precision, "bf16_over_fp32", lambda: 2.0)
    at_step(9, cut)
    with pytest.raises(PowerCut):
        pretrain(config, tmp_path / "run", **OFTEN)
    at_step(-1, cut)
    monkeypatch.setattr(precision, "bf16_over_fp32", lambda: 0.5)
    pretrain(config, tmp_path / "run", **OFTEN)
    assert "begun in fp32 and stays in it" in capsys.readouterr().out
    assert read_json(tmp_path / "run" / "result.json")["made"]["precision"] == "fp32"


@pytest.fixture
def sick(monkeypatch):
    "Steps whose loss is not a number."
    forward = loop.Run.forward

    def put(steps):
        def spoilt(self, batch, generator):
            encoded, loss, span, mask = forward(self, batch, generator)
            bad = self.step in steps and self.encoder.training
            return encoded, loss._replace(total=loss.total * float("nan")) if bad else loss, span, mask

        monkeypatch.setattr(loop.Run, "forward", spoilt)

    return put


def test_a_step_that_is_not_finite_is_skipped_and_counted(clips, tmp_path, sick, at_step):
    sick([5])
    folder = pretrain(settings(clips), tmp_path / "a" / "run", **OFTEN)
    assert (value(folder)["steps"], value(folder)["skipped"], value(folder)["stopped"]) == (12, 1, None)
    rows = read_lines(folder / "metrics.jsonl")[0]
    assert rows[5]["loss"] is None and [r["skipped"] for r in rows] == [0] * 5 + [1] * 7
    for step in (6, 7):  # cut right after it, too
        at_step(step, cut)
        with pytest.raises(PowerCut):
            pretrain(settings(clips), tmp_path / "b" / "run", **{**OFTEN, "save_every": 1})
    at_step(-1, cut)
    pretrain(settings(clips), tmp_path / "b" / "run", **OFTEN)
    assert same(folder, tmp_path / "b" / "run")


def test_many_steps_that_are_not_finite_stop_the_run_and_it_can_go_on_from_the_last_good_one(clips, tmp_path, sick, capsys):
    config = settings(clips, steps=24)
    sick(range(6, 24))
    folder = pretrain(config, tmp_path / "run", **OFTEN)
    assert value(folder)["steps"] == 6 + PATIENCE and "step 6 is kept" in value(folder)["stopped"] and "step 6 is kept" in capsys.readouterr().out
    assert int(load_tensors(folder / "last.safetensors")["step"]) == 6
    json.loads((folder / "result.json").read_text(), parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    sick([])
    pretrain(config, folder, **OFTEN)
    assert same(pretrain(config, tmp_path / "straight" / "run", **OFTEN), folder)


def test_weights_that_are_not_finite_are_never_saved(clips, tmp_path, monkeypatch):
    step = loop.train_step

    def spoil(run):
        row = step(run)
        if run.step == 7:
            with torch.no_grad():
                next(run.encoder.parameters()).fill_(float("nan"))
        return row

    monkeypatch.setattr(loop, "train_step", spoil)
    folder = pretrain(settings(clips), tmp_path / "run", **OFTEN)
    assert value(folder)["stopped"] and value(folder)["steps"] == 8
    assert all(bool(v.isfinite().all()) for v in load_tensors(folder / "last.safetensors").values())
    monkeypatch.undo()
    pretrain(settings(clips), folder, **OFTEN)
    assert value(folder)["steps"] == 12 and value(folder)["stopped"] is None


def test_few_frames_to_watch_do_not_count_as_a_collapse():
    few = dict(finite=True, dim=192, effective_rank=3.0, frames=8)
    assert collapsed(few, 1000) is None and collapsed({**few, "frames": 4000}, 1000)


def test_a_finished_run_is_prolonged_with_a_schedule_of_its_own(straight, clips, tmp_path, at_step, capsys):
    folder, config = tmp_path / "run", settings(clips)
    shutil.copytree(straight, folder)
    longer = replace(config, steps=20)
    pretrain(longer, folder, **OFTEN)
    assert "not the run of 20 steps at once" in capsys.readouterr().out
    rows, first = steps_of(folder), steps_of(straight)
    assert rows[:12] == first and value(folder)["stages"] == [12, 20] and read_json(folder / "config.json")["steps"] == 20
    assert [r["lr"] for r in rows[12:]] == [learning_rate(k, steps=8, peak=config.lr, warmup=config.warmup, floor=config.floor) for k in range(8)]
    with pytest.raises(EsslError, match="differs in steps"):
        pretrain(config, folder, **OFTEN)
    again = tmp_path / "again" / "run"  # and cut off while it was prolonged
    shutil.copytree(straight, again)
    at_step(17, cut)
    with pytest.raises(PowerCut):
        pretrain(longer, again, **OFTEN)
    at_step(-1, cut)
    pretrain(longer, again, **OFTEN)
    assert same(folder, again)


@pytest.mark.parametrize("number", range(1, 4))
def test_a_cut_while_a_run_is_being_prolonged_changes_nothing(number, straight, clips, tmp_path, monkeypatch):
    longer, whole_replace, count = replace(settings(clips), steps=16), os.replace, [0]

    def counted(a, b):
        count[0] += 1
        if count[0] == number:
            raise PowerCut
        whole_replace(a, b)

    for name in ("a", "b"):
        shutil.copytree(straight, tmp_path / name / "run")
    monkeypatch.setattr(os, "replace", counted)
    with pytest.raises(PowerCut):
        pretrain(longer, tmp_path / "a" / "run", **OFTEN)
    monkeypatch.undo()
    for name in ("a", "b"):
        pretrain(longer, tmp_path / name / "run", **OFTEN)
    assert same(tmp_path / "a" / "run", tmp_path / "b" / "run") and value(tmp_path / "a" / "run")["stages"] == [12, 16]


def test_an_unfinished_run_and_one_without_its_state_are_not_prolonged(begun, clips, tmp_path):
    folder, config = begun
    with pytest.raises(EsslError, match="once it is finished"):
        pretrain(replace(config, steps=99), folder, **OFTEN)
    pretrain(config, folder, keep_state=False, **OFTEN)
    with pytest.raises(EsslError, match="state of its last step"):
        pretrain(replace(config, steps=99), folder, **OFTEN)


FOREIGN = {
    "config torn": ("config.json", b'{"encoder"', "can be read"),
    "config of another program": ("config.json", b"[1]", "can be read"),
    "state torn": ("last.safetensors", b"half a fi", "not a state of this run"),
    "record torn": ("run.json", b"{", "not JSON"),
    "record of another program": ("run.json", b"{}", "record of a pre-training run"),
    "log of another program": ("metrics.jsonl", b'{"a": 1}\n{"b": 2}\n', "not of a training log"),
    "log broken": ("metrics.jsonl", b"what\n{}\n", "Line 1"),
    "result torn": ("result.json", b"{", "not the result"),
}


@pytest.mark.parametrize("what", FOREIGN)
def test_a_folder_that_cannot_be_read_is_answered_in_a_sentence(what, begun):
    folder, config = begun
    name, content, word = FOREIGN[what]
    if name == "result.json":
        (folder / "encoder").mkdir()
        (folder / "encoder" / "config.json").write_text("{}")
    (folder / name).write_bytes(content)
    with pytest.raises(EsslError, match=word):
        pretrain(config, folder, **OFTEN)
    assert (folder / name).read_bytes() == content


def test_a_state_of_another_network_and_a_folder_without_its_configuration_are_refused(begun, clips, tmp_path):
    folder, config = begun
    files.save_tensors(folder / "last.safetensors", {"encoder/x": torch.zeros(2), "step": torch.tensor(3)})
    with pytest.raises(EsslError, match="not a state of this run"):
        pretrain(config, folder, **OFTEN)
    (folder / "config.json").unlink()
    with pytest.raises(EsslError, match="no config.json"):
        pretrain(config, folder, **OFTEN)
    (tmp_path / "file").write_text("")
    with pytest.raises(EsslError, match="a file stands where a folder should be"):
        pretrain(config, tmp_path / "file", **OFTEN)


def test_a_disk_that_is_full_at_any_write_costs_nothing(straight, clips, tmp_path, monkeypatch):
    write, sync, count = os.replace, os.fsync, [0, 0]

    def full(handle):
        count[0] += 1
        if count[0] == count[1]:
            raise OSError(errno.ENOSPC, "No space left on device")
        return sync(handle)

    monkeypatch.setattr(os, "fsync", full)
    for number in range(1, 60, 3):
        count[:] = [0, number]
        folder = tmp_path / str(number) / "run"
        try:
            pretrain(settings(clips), folder, **OFTEN)
            break
        except EsslError as e:
            assert "disk is full" in str(e)
            count[:] = [0, 0]
            pretrain(settings(clips), folder, **OFTEN)
            assert same(straight, folder) and whole(folder), number
    assert number > 10


def test_log_lines_say_audio_and_epochs(straight):
    rows = read_lines(straight / "metrics.jsonl")[0]
    assert [r["hours"] for r in rows] == pytest.approx([8 * (i + 1) / 3600 for i in range(12)])
    assert all(a["epochs"] < b["epochs"] for a, b in zip(rows, rows[1:]))
    assert value(straight)["hours"] == rows[-1]["hours"]


def test_tensorboard_holds_every_step_once(clips, tmp_path, at_step):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for step in (3, 7, 10):
        at_step(step, cut)
        with pytest.raises(PowerCut):
            pretrain(settings(clips), tmp_path / "run", tensorboard=True, **OFTEN)
    at_step(-1, cut)
    pretrain(settings(clips), tmp_path / "run", tensorboard=True, **OFTEN)
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    board.Reload()
    assert [e.step for e in board.Scalars("loss")] == list(range(1, 13))


@pytest.mark.parametrize("end, kept", [(b'{"n": 2', 1), (b'{"n": 2}', 2), (b'{"n": "' + b"x" * 20000, 1), (b"", 1), (b"\x00" * 5000, 1)])
def test_a_line_is_appended_after_whatever_the_last_one_is(end, kept, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"n": 1}\n' + end)
    append_line(path, {"n": 3})
    rows, torn = read_lines(path)
    assert torn is None and len(rows) == kept + 1 and rows[-1] == {"n": 3}


def test_appending_reads_the_end_of_a_log_only(tmp_path, monkeypatch):
    path, read = tmp_path / "rows.jsonl", []
    path.write_bytes(b'{"n": 1}\n' * 200_000)

    class Counted:
        def __init__(self, f):
            self.f = f

        def __getattr__(self, name):
            return getattr(self.f, name)

        def read(self, size=-1):
            got = self.f.read(size)
            read.append(len(got))
            return got

    with open(path, "a+b") as f:
        assert files.mend(Counted(f)) is None
    assert sum(read) < 10_000


def test_rows_taken_back_leave_the_bytes_of_the_others(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"n":1.0}\n{"n": 2}\n{"n": 3e0}')
    assert keep_lines(path, lambda r: r["n"] != 2) == 1 and path.read_bytes() == b'{"n":1.0}\n{"n": 3e0}\n'
    assert keep_lines(tmp_path / "none.jsonl", lambda r: False) == 0 and not (tmp_path / "none.jsonl").exists()


def test_one_clip_and_a_corpus_without_a_valid_split(clips, tmp_path, capsys):
    (tmp_path / "one").mkdir()
    clip = max(clips.glob("*.opus"), key=lambda p: p.stat().st_size)
    shutil.copy(clip, tmp_path / "one" / "a.opus")
    table = tmp_path / "one" / "manifest.csv"
    table.write_text("id,path,split\na,a.opus,train\n")
    for batching in ("packed", "padded"):
        folder = pretrain(settings(tmp_path / "one", batch_seconds=2.0, batching=batching), tmp_path / batching / "run", **OFTEN)
        assert value(folder)["steps"] == 12 and "no utterance in its valid split" in capsys.readouterr().out
    table.write_text("id,path,split\na,a.opus,test\n")
    with pytest.raises(EsslError, match=r"train split \(test 1\)"):
        pretrain(settings(tmp_path / "one"), tmp_path / "none" / "run", **OFTEN)
