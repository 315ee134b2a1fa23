"""What users of PyTorch do with any module, done with encoders of every mixer: compile, export, eight bits, copies, replicas."""
import copy
import os
import pickle
import socket

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from essl_nb.core.registry import EsslError
from essl_nb.mixers.base import list_mixers, mixers
from essl_nb.mixers.linformer_attention import Linformer
from essl_nb.mixers.window import Window
from essl_nb.models.config import EncoderConfig
from essl_nb.models.encoder import build_encoder
from essl_nb.models.export import TensorEncoder, example, export_onnx
from essl_nb.models.frontend import frontends

NAMES = list_mixers()
BASELINE = next(e.name for e in mixers if e.meta.get("baseline"))
QUICK = [BASELINE, *(n for n in NAMES if mixers.get(n).obj.passes_state), *(e.name for e in mixers if e.meta.get("control"))]
WAV, LENGTHS = 0.1 * torch.randn(2, 4000, generator=torch.Generator().manual_seed(0)), torch.tensor([4000, 2500])
some_then_all = pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in NAMES])


def tiny(name, **kw):
    return build_encoder(EncoderConfig(name, dim=16, depth=2, mixer_kw=mixers.get(name).meta.get("tiny", {}), **kw), seed=0).eval()


@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["all real", "padded"])
@some_then_all
def test_compiled_as_one_graph_it_gives_the_same(name, lengths):
    torch._dynamo.reset()
    encoder = tiny(name)
    cells = any(isinstance(m, torch.nn.RNNBase) for m in encoder.modules())
    with torch._dynamo.config.patch(allow_rnn=cells):  # torch's compiler enters its own GRU and LSTM only where this is set
        got = torch.compile(encoder, fullgraph=True, backend="aot_eager")(WAV, lengths)
    want = encoder(WAV, lengths)
    torch.testing.assert_close(got.frames, want.frames, atol=1e-4, rtol=1e-3)
    assert got.lengths.tolist() == want.lengths.tolist()


@some_then_all
def test_exported_it_gives_the_same_and_leaves_no_trace(name):
    encoder = tiny(name)
    program = torch.export.export(TensorEncoder(encoder), (WAV, LENGTHS), strict=False)
    want = encoder(WAV, LENGTHS)
    frames, lengths = program.module()(WAV, LENGTHS)
    torch.testing.assert_close(frames, want.frames, atol=1e-4, rtol=1e-3)
    assert lengths.tolist() == want.lengths.tolist() and type(want.frames) is torch.Tensor and want.frames.isfinite().all()


FIXED = (Linformer, Window)  # a table for so many frames; chunks of one size, which torch's guards fix


@some_then_all
def test_one_exported_program_serves_any_number_of_frames(name):
    encoder, size = tiny(name), torch.export.Dim
    clips, samples = size("clips", min=1, max=4096), size("samples", min=4 * encoder.frontend.least_samples, max=2**26)
    export = lambda: torch.export.export(TensorEncoder(encoder), example(encoder), dynamic_shapes={"wav": {0: clips, 1: samples}, "lengths": {0: clips}}, strict=False,
                                         prefer_deferred_runtime_asserts_over_guards=True)
    with torch.no_grad():
        if mixers.get(name).obj in FIXED:
            with pytest.raises(torch._dynamo.exc.UserError, match="samples"):
                export()
            return
        wav, lengths = 0.1 * torch.randn(3, 9345, generator=torch.Generator().manual_seed(1)), torch.tensor([9345, 5000, 1600])
        frames, frame_lengths = export().module()(wav, lengths)
        want = encoder(wav, lengths)
    torch.testing.assert_close(frames, want.frames, atol=1e-4, rtol=1e-3)
    assert frame_lengths.tolist() == want.lengths.tolist()


def test_a_failed_export_leaves_the_encoder_as_it_was():
    encoder = tiny(BASELINE)
    with pytest.raises(Exception):
        torch.export.export(TensorEncoder(encoder), (WAV, LENGTHS[:1]), strict=False)
    assert float(encoder(WAV).frames.detach().abs().max()) > 0


@pytest.mark.parametrize("causal", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["both ways", "causal"])
@some_then_all
def test_a_file_for_other_runtimes_gives_the_same(name, causal, tmp_path):
    pytest.importorskip("onnxscript")
    if causal and not mixers.get(name).obj.can_be_causal:
        pytest.skip("it looks ahead")
    said = export_onnx(tiny(name, causal=causal), tmp_path / "encoder.onnx")
    assert said["dynamic"] and said["parity"] < 1e-4 and said["mixer"] == name and (tmp_path / "encoder.onnx").stat().st_size > 0


def test_what_exporting_needs_is_named(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(EsslError, match="essl_nb\\[export\\]"):
        export_onnx(tiny(BASELINE), tmp_path / "encoder.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", NAMES)
def test_eight_bits_are_near(name):
    encoder = tiny(name)
    small = torch.ao.quantization.quantize_dynamic(encoder, {torch.nn.Linear, torch.nn.GRU, torch.nn.LSTM}, torch.qint8)
    want, got = encoder(WAV, LENGTHS).frames, small(WAV, LENGTHS).frames
    assert (got - want).norm() < 0.1 * want.norm()


@pytest.mark.parametrize("name", NAMES)
def test_copies_and_second_lives(name):
    encoder = tiny(name)
    want = encoder(WAV, LENGTHS).frames
    for other in (copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder))):
        assert torch.equal(other(WAV, LENGTHS).frames, want)
    assert torch.equal(torch.func.functional_call(encoder, dict(encoder.named_parameters()), (WAV, LENGTHS)).frames, want)
    with torch.inference_mode():  # torch's cells may take another library here
        torch.testing.assert_close(encoder(WAV, LENGTHS).frames, want, atol=1e-5, rtol=1e-5)
    encoder.train()(WAV, LENGTHS).frames.sum().backward()
    assert all(p.grad is not None for p in encoder.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_blocks_can_be_computed_again_in_the_backward_pass(name):
    plain, again = tiny(name).train(), tiny(name).train()
    for block in again.blocks:
        block.forward = lambda *given, f=block.forward: checkpoint(f, *given, use_reentrant=False)
    for encoder in (plain, again):
        encoder(WAV, LENGTHS).frames.square().sum().backward()
    for p, q in zip(plain.parameters(), again.parameters()):
        torch.testing.assert_close(p.grad, q.grad, atol=1e-5, rtol=1e-4)


def replica(rank: int, port: int, cases: list, out):
    "Three steps of a replica; what differs between the two is written down."
    from torch import distributed as dist

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    for name, front in cases:
        model = torch.nn.parallel.DistributedDataParallel(tiny(name, frontend=front).train())
        optimiser = torch.optim.SGD(model.parameters(), 0.01)
        for step in range(3):
            wav = 0.1 * torch.randn(2, 4000, generator=torch.Generator().manual_seed(10 * step + rank))
            given = (wav, LENGTHS) if step else model.module.frontend.features(wav, LENGTHS)
            model(*given, features=not step).frames.square().mean().backward()
            optimiser.step()
            optimiser.zero_grad()
        mine = torch.cat([p.detach().flatten() for p in model.parameters()])
        both = [torch.empty_like(mine) for _ in range(2)]
        dist.all_gather(both, mine)
        if not torch.equal(*both):
            (out / f"{name}-{front}").touch()
    dist.barrier()
    (out / f"done{rank}").touch()
    dist.destroy_process_group()


def shard(rank: int, port: int, names: list, out):
    "What sharded encoders give beside whole ones, and what is left after a step."
    from torch import distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    for name in names:
        whole, parts = tiny(name).train(), tiny(name).train()
        for part in (*parts.blocks, parts):
            fully_shard(part, mesh=mesh)
        for encoder in (whole, parts):
            optimiser = torch.optim.SGD(encoder.parameters(), 0.01)
            for _ in range(2):
                encoder(WAV, LENGTHS).frames.square().mean().backward()
                optimiser.step()
                optimiser.zero_grad()
        with torch.no_grad():
            torch.testing.assert_close(parts(WAV, LENGTHS).frames, whole(WAV, LENGTHS).frames, atol=1e-4, rtol=1e-3)
    dist.barrier()
    (out / f"done{rank}").touch()
    dist.destroy_process_group()


@pytest.mark.parametrize("names", [QUICK, pytest.param(NAMES, marks=pytest.mark.slow)], ids=["some", "all"])
def test_sharded_encoders_learn_what_whole_ones_learn(names, tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    torch.multiprocessing.spawn(shard, (port, names, tmp_path), 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["done0", "done1"]


@pytest.mark.parametrize("cases", [[(BASELINE, f) for f in frontends.names()], pytest.param([(n, frontends.names()[0]) for n in NAMES], marks=pytest.mark.slow)], ids=["front ends", "mixers"])
def test_replicas_stay_equal_whatever_is_given(cases, tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    torch.multiprocessing.spawn(replica, (port, cases, tmp_path), 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["done0", "done1"]
