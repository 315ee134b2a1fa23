"""Several processes: sharded or whole they give what one gives, a dead rank ends all, and one process goes on where several stopped."""
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import nn

from essl_nb.core.config import to_json
from essl_nb.core.files import load_tensors, read_json, read_lines
from essl_nb.core.precision import autocast
from essl_nb.core.registry import EsslError
from essl_nb.mixers.base import list_mixers, mixers
from essl_nb.models.config import EncoderConfig
from essl_nb.models.encoder import build_encoder
from essl_nb.objectives.objective import objectives
from essl_nb.train.config import PretrainConfig
from essl_nb.train.distributed import (PARALLEL, Ranks, accumulating, activation_checkpointing, begin_step, clip_gradients, compiled, gathered,
                                       is_sharded, parallelise, shard)
from essl_nb.train.loop import pretrain
from essl_nb.train.optim import adamw, optimiser_tensors

RUNS = """
import json, os, signal, sys
import torch
import torch.distributed as dist
torch.set_num_threads(1)
from essl_nb.core.config import from_json
from essl_nb.train import loop
task = json.loads(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + task["file"], rank=int(os.environ["RANK"]), world_size=int(os.environ["WORLD_SIZE"]))
step = loop.train_step
def killed(run):
    if run.step == 12 and run.ranks.began and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return step(run)
loop.train_step = killed
for name, kw in task["runs"].items():
    if name == "killed":  # this one makes its own group
        dist.destroy_process_group()
    loop.pretrain(from_json(loop.PretrainConfig, task["config"]), task["here"] + "/" + name, progress=False, log_every=1, watch_every=10, save_every=5, **kw)
"""
FAILING = """
import sys, time
import torch
from essl_nb.core.registry import EsslError
from essl_nb.train.distributed import Ranks
ranks = Ranks("cpu")
with ranks.together():
    ranks.reduce([1.0])
    if ranks.rank == 1:
        raise ValueError("the cause")
    time.sleep(100)  # stands for a process that is blocked in a reduction on a GPU
"""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def together(script, argument, world=2):
    "Run a script in `world` processes, their output in one file: exit statuses, output, seconds."
    env = dict(os.environ, WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    read, write = os.pipe()
    begin = time.monotonic()
    started = [subprocess.Popen([sys.executable, "-c", script, argument], env=dict(env, RANK=str(r), LOCAL_RANK=str(r)), stdout=write, stderr=write) for r in range(world)]
    os.close(write)
    try:
        with open(read, encoding="utf-8", errors="replace") as output:
            text = output.read()
        return [p.wait(60) for p in started], text, time.monotonic() - begin
    finally:
        for p in started:
            p.kill()


@pytest.fixture(scope="module")
def config(tmp_path_factory, root):
    folder = tmp_path_factory.mktemp("clips")
    for clip in sorted((root / "corpus" / "prompts").glob("*/*/*.opus"))[::150]:
        shutil.copy(clip, folder)
    mixer = list_mixers(family="pooling")[0]
    encoder = EncoderConfig(mixer, dim=16, depth=2, dropout=0.1, mixer_kw=mixers.get(mixer).meta.get("tiny", {}))
    return PretrainConfig(encoder, objective="clusters", objective_kw=objectives.get("clusters").meta["tiny"], corpus=str(folder), steps=20,
                          accumulate=4, batch_seconds=4.0, lr=2e-3, precision="fp32")


@pytest.fixture(scope="module")
def runs(config, tmp_path_factory):
    "The same 20 steps of four batches: by one process, by two in either way, and by two of which one is killed at step 12."
    here = tmp_path_factory.mktemp("runs")
    pretrain(config, here / "one", progress=False, log_every=1, watch_every=10, save_every=5)
    asked = {"ddp": dict(parallel="ddp"), "fsdp2": dict(parallel="fsdp2", recompute=True), "killed": dict(parallel="fsdp2")}
    status, text, _ = together(RUNS, json.dumps(dict(config=to_json(config), file=str(here / "meeting"), here=str(here), runs=asked)))
    assert status == [1, -signal.SIGKILL], text
    return here, text


def difference(folder, other) -> float:
    "The largest relative difference between the numbers of two logs, and of the norms of two sets of weights."
    found = []
    for a, b in zip(*(read_lines(f / "metrics.jsonl")[0] for f in (folder, other)), strict=True):
        assert a.keys() == b.keys()
        found += [abs(a[k] - b[k]) / max(abs(a[k]), 1e-3) for k in ("loss", "valid_loss", "hours") if k in a]
    a, b = (load_tensors(f / "encoder" / "model.safetensors") for f in (folder, other))
    found += [float((a[k].double() - b[k].double()).norm() / a[k].double().norm().clamp(min=1e-3)) for k in a]
    return max(found)


@pytest.mark.parametrize("parallel", PARALLEL)
def test_two_processes_give_what_one_gives(runs, parallel):
    here, _ = runs
    assert difference(here / "one", here / parallel) < 1e-5
    assert read_json(here / parallel / "run.json")["made"]["processes"] == 2


def test_a_killed_process_ends_the_others_and_one_process_goes_on_from_the_saved_state(runs, config):
    here, text = runs
    assert "Rank 0 of 2 stopped: the connection to another process was lost" in text and "the same command resumes it" in text
    state = load_tensors(here / "killed" / "last.safetensors")
    assert int(state["step"]) == 10 and not list((here / "killed").glob(".*.part"))
    pretrain(config, here / "killed", progress=False, log_every=1, watch_every=10, save_every=5)
    assert difference(here / "one", here / "killed") < 1e-5


def test_a_process_that_fails_says_why_first_and_a_blocked_one_ends_too():
    status, text, seconds = together(FAILING, "")
    assert status == [1, 1] and seconds < 60, text
    assert text.index("Rank 1 of 2 failed:") < text.index("ValueError: the cause") < text.index("Rank 0 of 2 ends: rank 1 failed: ValueError: the cause"), text


def test_an_unknown_way_is_refused():
    with pytest.raises(EsslError, match="ddp or fsdp2"):
        parallelise(nn.Linear(2, 2), "horovod", Ranks("cpu"))


def test_one_process_is_left_alone():
    net = nn.Linear(2, 2)
    assert all(parallelise(net, how, Ranks("cpu")) is net for how in PARALLEL)


EACH_FAMILY = sorted({mixers.get(n).meta.get("family"): n for n in list_mixers()}.values())


@pytest.mark.parametrize("name", EACH_FAMILY)
def test_blocks_that_are_computed_again_give_the_same_gradients(name):
    "Dropout and running statistics included."
    config = EncoderConfig(name, dim=16, depth=2, dropout=0.2, mixer_kw=mixers.get(name).meta.get("tiny", {}))
    found = []
    for again in (False, True):
        encoder = build_encoder(config, seed=0).train()
        activation_checkpointing(encoder.blocks if again else ())
        mel, lengths = torch.randn(2, 64, 80, generator=torch.Generator().manual_seed(0)), torch.tensor([64, 40])
        with torch.random.fork_rng():
            torch.manual_seed(1)
            encoder.from_features(mel, lengths).frames.square().mean().backward()
        found.append({n: p.grad for n, p in encoder.named_parameters() if p.grad is not None} | dict(encoder.named_buffers()))
    plain, recomputed = found
    assert plain.keys() == recomputed.keys()
    assert all(torch.equal(plain[k], recomputed[k]) for k in plain)


def test_compiled_blocks_keep_their_names_and_values():
    encoder = build_encoder(EncoderConfig(list_mixers(family="pooling")[0], dim=16, depth=2), seed=0).eval()
    names, mel = list(encoder.state_dict()), torch.randn(1, 64, 80, generator=torch.Generator().manual_seed(0))
    before = encoder.from_features(mel).frames
    assert compiled(encoder.blocks, backend="eager") == ""
    assert list(encoder.state_dict()) == names and torch.allclose(encoder.from_features(mel).frames, before, atol=1e-6)
    why = compiled(encoder.blocks, backend="none such")
    assert "torch.compile cannot be used here" in why and "goes on without it" in why


@pytest.fixture
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("name", EACH_FAMILY)
def test_a_sharded_run_rounds_as_a_whole_one_does(name, group):
    "Accumulated, clipped and in bf16; its moments, made before, are sharded with it."
    config = EncoderConfig(name, dim=16, depth=2, mixer_kw=mixers.get(name).meta.get("tiny", {}))
    found = []
    for sharded in (False, True):
        encoder = build_encoder(config, seed=0).train()
        optimiser = adamw([encoder], lr=1e-2)
        for step in range(3):
            if sharded and step == 1:
                shard(encoder, encoder.blocks, optimiser=optimiser)
            begin_step(encoder)
            for last in (False, True):
                mel = torch.randn(2, 64, 80, generator=torch.Generator().manual_seed(2 * step + last))
                with accumulating(encoder, last), autocast("bf16"):
                    (encoder(mel, torch.tensor([64, 40]), features=True).frames.float() - 1).square().mean().backward()
            norm = clip_gradients(encoder.parameters(), 0.1)
            optimiser.step()
            optimiser.zero_grad()
        found.append((norm, gathered(encoder.state_dict() | optimiser_tensors(optimiser), Ranks("cpu"))))
    (a, whole), (b, parts) = found
    assert is_sharded(encoder) and a == pytest.approx(b, rel=1e-5) and whole.keys() == parts.keys()
    for k in whole:
        torch.testing.assert_close(parts[k], whole[k], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_every_objective_trains_sharded(config, tmp_path):
    "Teachers, code books and temperatures included."
    script = RUNS.replace('from_json(loop.PretrainConfig, task["config"])', 'from_json(loop.PretrainConfig, task["config"] | kw.pop("own"))')
    runs = {}
    for entry in objectives:
        own = dict(objective=entry.name, objective_kw=entry.meta.get("tiny", {}), steps=5)
        pretrain(replace(config, **own), tmp_path / f"{entry.name}-one", progress=False, log_every=1, watch_every=10, save_every=5)
        runs[entry.name] = dict(own=own, parallel="fsdp2")
    status, text, _ = together(script, json.dumps(dict(config=to_json(config), file=str(tmp_path / "meeting"), here=str(tmp_path), runs=runs)))
    assert status == [0, 0], text
    for name in runs:
        assert difference(tmp_path / f"{name}-one", tmp_path / name) < 1e-5, name
