"""A run that several processes share: equal weights in all of them, and what one process with as many batches a step gives."""
import json
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from madeup import steps_of

from essl_nb.core.config import to_json
from essl_nb.core.files import load_tensors, read_json
from essl_nb.core.registry import EsslError
from essl_nb.mixers.base import list_mixers, mixers
from essl_nb.models.block import blocks
from essl_nb.models.config import EncoderConfig
from essl_nb.models.encoder import build_encoder
from essl_nb.models.frontend import frontends
from essl_nb.objectives.objective import build_objective, objectives
from essl_nb.objectives.spans import draw_spans
from essl_nb.train.config import PretrainConfig
from essl_nb.train.loop import pretrain
from essl_nb.train.step import Pretraining

SCRIPT = """
import json, os, sys
from pathlib import Path
import torch
import torch.distributed as dist
torch.set_num_threads(1)
from essl_nb.core.config import from_json
from essl_nb.core.files import save_tensors
from essl_nb.core.registry import EsslError
from essl_nb.train import loop
said = json.loads(sys.argv[1])
if said["file"]:
    dist.init_process_group("gloo", init_method="file://" + said["file"], rank=int(os.environ["RANK"]), world_size=int(os.environ["WORLD_SIZE"]))
kept, prepare, forward, rank = [], loop.prepare, loop.Run.forward, int(os.environ["RANK"])
loop.prepare = lambda *a, **kw: kept.append(prepare(*a, **kw)) or kept[-1]
def sick(self, batch, generator):
    encoded, loss, span, mask = forward(self, batch, generator)
    bad = self.encoder.training and self.step == said["sick"] and rank == 1
    return encoded, loss._replace(total=loss.total * float("nan")) if bad else loss, span, mask
loop.Run.forward = sick
step = loop.train_step
def asked(run):
    if run.step == said["asked"] and rank == 1:
        import signal
        os.kill(os.getpid(), signal.SIGTERM)
    return step(run)
loop.train_step = asked
status = 0
try:
    loop.pretrain(from_json(loop.PretrainConfig, said["config"]), said["folder"], progress=False, log_every=1, watch_every=4, save_every=3)
except SystemExit as e:
    status = e.code
except EsslError as e:
    print(e, file=sys.stderr)
    sys.exit(3)
tensors = {**kept[0].encoder.state_dict(), **{"objective." + k: v for k, v in kept[0].objective.state_dict().items()}}
save_tensors(f"{said['folder']}-weights-{rank}.safetensors", tensors)
sys.exit(status)
"""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def together(config, folder, world=2, *, file="", sick=-1, asked=-1):
    "Run the script in `world` processes: their exit statuses and what they said."
    said = json.dumps(dict(config=to_json(config), folder=str(folder), file=str(file), sick=sick, asked=asked))
    env = dict(os.environ, WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    started = [subprocess.Popen([sys.executable, "-c", SCRIPT, said], env=dict(env, RANK=str(r), LOCAL_RANK=str(r)), stderr=subprocess.PIPE, text=True) for r in range(world)]
    try:
        errors = [p.communicate(timeout=150)[1] for p in started]
    finally:
        for p in started:
            p.kill()
    return [p.returncode for p in started], errors


def settings(clips, **kw):
    mixer = kw.pop("mixer", list_mixers(family="pooling")[0])
    encoder = EncoderConfig(mixer, dim=16, depth=1, mixer_kw=mixers.get(mixer).meta.get("tiny", {}), **kw.pop("encoder", {}))
    own = dict(objective="best_rq", steps=6, batch_seconds=8.0, lr=5e-3, precision="fp32")
    own.update(kw)
    own.setdefault("objective_kw", objectives.get(own["objective"]).meta.get("tiny", {}))
    return PretrainConfig(encoder, corpus=str(clips), **own)


def weights(folder, rank):
    return load_tensors(f"{folder}-weights-{rank}.safetensors")


def near(a, b):
    return all(torch.allclose(a[k].double(), b[k].double(), rtol=1e-3, atol=1e-5) for k in a)


@pytest.fixture(scope="module")
def shared(clips, tmp_path_factory):
    "A run of two processes with one batch each a step, and one of one process with two; dropout included."
    here = tmp_path_factory.mktemp("shared")
    config = settings(clips, objective="clusters", encoder=dict(dropout=0.1))
    status, errors = together(config, here / "two", file=here / "meeting")
    assert status == [0, 0], errors
    pretrain(replace(config, accumulate=2), here / "one", progress=False, log_every=1, watch_every=4, save_every=3)
    return here


def test_all_processes_hold_the_same_weights(shared):
    a, b = (weights(shared / "two", r) for r in range(2))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_two_processes_give_what_one_gives_with_two_batches_a_step(shared):
    one = load_tensors(shared / "one" / "encoder" / "model.safetensors")
    assert near(one, weights(shared / "two", 0))
    rows = [steps_of(shared / f) for f in ("one", "two")]
    assert [r["step"] for r in rows[0]] == [r["step"] for r in rows[1]] == [1, 2, 3, 4, 5, 6]
    for a, b in zip(*rows):
        assert a.keys() == b.keys() and all(a[k] == pytest.approx(b[k], rel=1e-3, abs=1e-4) for k in a)


def test_the_folder_of_a_shared_run_says_how_many_batches_a_step_takes(shared):
    records = [read_json(shared / f / "run.json") for f in ("one", "two")]
    assert [r["batches_per_step"] for r in records] == [2, 2] and [r["made"]["processes"] for r in records] == [1, 2]


def test_another_number_of_processes_is_refused_in_all_of_them(shared, clips):
    with pytest.raises(EsslError, match="2 batches a step"):  # prolonged by one process that would take one
        folder = shared / "copy"
        shutil.copytree(shared / "two", folder)
        pretrain(replace(settings(clips, objective="clusters", encoder=dict(dropout=0.1)), steps=8), folder, progress=False)


def test_a_stop_of_one_process_stops_all_and_the_run_goes_on_exactly(clips, tmp_path):
    config = settings(clips)
    assert together(config, tmp_path / "straight")[0] == [0, 0]
    status, errors = together(config, tmp_path / "asked", asked=4)
    assert status == [143, 143], errors
    assert not (tmp_path / "asked" / "result.json").exists()
    assert together(config, tmp_path / "asked")[0] == [0, 0]
    a, b = (read_json(tmp_path / f / "result.json")["value"] for f in ("straight", "asked"))
    assert a == b and steps_of(tmp_path / "straight") == steps_of(tmp_path / "asked")


def test_a_loss_that_is_not_finite_in_one_process_is_skipped_by_all(clips, tmp_path):
    status, errors = together(settings(clips), tmp_path / "run", sick=2)
    assert status == [0, 0], errors
    a, b = (weights(tmp_path / "run", r) for r in range(2))
    assert all(torch.equal(a[k], b[k]) and bool(a[k].isfinite().all()) for k in a)
    assert read_json(tmp_path / "run" / "result.json")["value"]["skipped"] == 1


def test_an_error_of_the_first_process_is_told_by_all(clips, tmp_path):
    config = settings(clips)
    pretrain(config, tmp_path / "run", progress=False)
    status, errors = together(replace(config, lr=1e-3), tmp_path / "run")
    assert status == [3, 3] and all("differs in lr" in e for e in errors)


def network_and_batch(**kw):
    "A tiny network and a batch for it."
    encoder = build_encoder(EncoderConfig(dim=16, depth=2, **kw), seed=0)
    torch.manual_seed(0)
    net = Pretraining(encoder, build_objective("clusters", 16, stride=encoder.stride, **objectives.get("clusters").meta["tiny"]))

    def batch(seed):
        draw = torch.Generator().manual_seed(seed)
        mel, lengths = torch.randn(2, 160, 80, generator=draw), torch.tensor([160, 120])
        span = draw_spans(encoder.frontend.out_lengths(lengths), span=3, start_prob=0.1, generator=draw)
        codes = torch.randint(0, 12, span.shape, generator=draw).to(torch.int16)
        return (mel, lengths, span, dict(codes=codes, context=torch.randn(*span.shape, 6, generator=draw).half())), dict(generator=draw)

    return net, batch


WRAPPED = [
    *(dict(mixer=m, mixer_kw=mixers.get(m).meta.get("tiny", {})) for m in list_mixers()),
    *(dict(mixer=list_mixers()[0], frontend=f) for f in frontends.names() if frontends.get(f).obj.stored),
    *(dict(mixer=list_mixers()[0], block=b) for b in blocks.names()),
    *(dict(mixer=list_mixers()[0], position=p) for p in ("sinusoidal", "convolutional")),
]


@pytest.mark.parametrize("kw", WRAPPED, ids=lambda kw: "-".join(str(v) for v in kw.values() if isinstance(v, str)))
def test_every_parameter_takes_part_in_the_loss(kw):
    "So DistributedDataParallel needs no search for unused ones."
    try:
        net, batch = network_and_batch(**kw)
    except EsslError:
        pytest.skip("this block takes no such mixer")
    given, how = batch(0)
    net(*given, **how)[1].total.backward()
    assert [n for n, p in net.named_parameters() if p.grad is None] == []


SHARDED = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
import torch.distributed as dist
torch.set_num_threads(1)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from test_shared_runs import list_mixers, network_and_batch
dist.init_process_group("gloo")
(alone, batch), (net, _) = (network_and_batch(mixer=list_mixers()[0]) for _ in range(2))
for part in (*net.encoder.blocks, net):
    fully_shard(part, mesh=init_device_mesh("cpu", (2,)))
one, many = (torch.optim.SGD(n.parameters(), lr=0.1) for n in (alone, net))
for step in range(3):
    one.zero_grad(), many.zero_grad()
    for rank in range(2):
        given, how = batch(2 * step + rank)
        (alone(*given, **how)[1].total / 2).backward()
    given, how = batch(2 * step + dist.get_rank())
    net(*given, **how)[1].total.backward()
    one.step(), many.step()
for p, q in zip(alone.parameters(), net.parameters()):
    torch.testing.assert_close(p, q.full_tensor())
dist.destroy_process_group()
"""


def test_the_network_trains_sharded_as_it_does_alone():
    env = dict(os.environ, WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    here = os.path.dirname(__file__)
    command = [sys.executable, "-c", SHARDED, here]
    env["PYTHONPATH"] = os.pathsep.join([os.path.dirname(here), *filter(None, [env.get("PYTHONPATH")])])
    started = [subprocess.Popen(command, env=dict(env, RANK=str(r), LOCAL_RANK=str(r)), stderr=subprocess.PIPE, text=True) for r in range(2)]
    errors = [p.communicate(timeout=150)[1] for p in started]
    assert [p.returncode for p in started] == [0, 0], errors
