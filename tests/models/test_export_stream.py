"""Streams as ONNX files: the same frames as the encoder's own stream, flat graphs, few states, clear refusals."""
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from essl_nb.core.registry import EsslError
from essl_nb.mixers.base import baseline_mixer, list_mixers, mixers
from essl_nb.models.config import EncoderConfig
from essl_nb.models.encoder import build_encoder
from essl_nb.models.export import export_onnx
from essl_nb.models.export_stream import export_stream
from essl_nb.models.few_bits import quantise_file

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
ROOT = Path(__file__).resolve().parents[2]
FORMS = {"causal": dict(causal=True), "chunks": dict(chunk_frames=8)}
CHUNKED = next(n for n in list_mixers() if mixers.get(n).obj.can_be_chunked and mixers.get(n).meta["family"] == "convolution")


def able(mixer, form):
    kind = mixers.get(mixer).obj
    return kind.streams and (kind.can_be_causal if form == "causal" else kind.can_be_chunked)


def encoder(mixer=CHUNKED, dim=16, **options):
    return build_encoder(EncoderConfig(mixer, dim=dim, depth=2, mixer_kw=mixers.get(mixer).meta.get("tiny", {}), **options), seed=0).eval()


def check(model, path, chunks):
    told = export_stream(model, path, check=chunks)
    graph = onnx.load(path).graph
    kinds = {node.op_type for node in graph.node}
    assert told["parity"] <= 1e-4 and not kinds & {"Scan", "Loop", "If"}
    assert len(graph.input) <= 5 and len(graph.output) <= 5  # the sound and at most four states
    about = {p.key: p.value for p in onnx.load(path).metadata_props}
    assert json.loads(about["states"]) == told["states"] and about["weights_hash"] and about["precision"] == "float32"
    return told


@pytest.mark.parametrize("mixer, form", [pytest.param(baseline_mixer(), "causal", marks=pytest.mark.slow), (CHUNKED, "chunks")])
def test_a_file_gives_what_the_stream_gives(mixer, form, tmp_path):
    told = check(encoder(mixer, **FORMS[form]), tmp_path / "stream.onnx", 6)
    assert told["algorithmic_latency_ms"] == (140 if form == "causal" else 152.5)


@pytest.mark.slow
@pytest.mark.parametrize("mixer, form", [(m, f) for m in list_mixers() for f in FORMS if able(m, f)])
def test_every_mixer_that_streams_does_so_as_a_file(mixer, form, tmp_path):
    check(encoder(mixer, **FORMS[form]), tmp_path / "stream.onnx", 200)


@pytest.mark.slow
@pytest.mark.parametrize("front", ["wav2vec2", "sincnet"])
@pytest.mark.parametrize("block", ["hybrid", "conformer", "branchformer", "postnorm"])
def test_blocks_and_front_ends_over_the_waveform_too(block, front, tmp_path):
    check(encoder(dim=32, block=block, frontend=front, chunk_frames=4), tmp_path / "stream.onnx", 20)


def test_what_cannot_be_exported_is_refused_and_no_file_is_left(tmp_path):
    path = tmp_path / "stream.onnx"
    whole = next(n for n in list_mixers() if not mixers.get(n).obj.streams)
    for model, why, options in [
        (encoder(whole), "cannot stream|looks ahead", {}), (encoder(chunk_frames=8), "one chunk", dict(frames=4)), (encoder(chunk_frames=8).double(), "float32 on the CPU", {}),
        (encoder(frontend="efficientnet2d", chunk_frames=8), "pads in each of its layers", {}), (encoder(chunk_frames=8), "opset 11 was asked for; allowed here: 18 to", dict(opset=11)),
        (encoder(chunk_frames=8), "opset 1000", dict(opset=1000)), (torch.nn.Linear(3, 3), "encoder", {}),
    ]:
        with pytest.raises(EsslError, match=why):
            export_stream(model, path, **options)
    assert not list(tmp_path.iterdir())
    path.write_text("mine")
    with pytest.raises(EsslError, match="is there already"):
        export_stream(encoder(chunk_frames=8), path)
    assert path.read_text() == "mine"


@pytest.mark.parametrize("opset", [18, pytest.param(23, marks=pytest.mark.slow)])
def test_an_older_and_a_newer_set_of_operators(opset, tmp_path):
    model = encoder(chunk_frames=8)
    for write, name in ((export_stream, "stream.onnx"), (export_onnx, "whole.onnx")):
        told = write(model, tmp_path / name, opset=opset)
        assert told["opset"] == opset == onnx.load(tmp_path / name).opset_import[0].version and told["parity"] < 1e-4
    small = quantise_file(tmp_path / "whole.onnx", tmp_path / "small.onnx", "int4")
    assert 0 < float(small["difference"]) < 0.2


def test_the_consumer_in_docs_runs_it_without_torch(tmp_path):
    soundfile = pytest.importorskip("soundfile")
    model = encoder(chunk_frames=8)
    export_stream(model, tmp_path / "stream.onnx", check=0)
    wav = 0.1 * np.random.default_rng(0).standard_normal(20000)
    soundfile.write(tmp_path / "a.wav", wav, 16000)
    block = "import sys; sys.modules.update(torch=None, essl_nb=None); import runpy; sys.argv[0] = 'consumer.py'; runpy.run_path(sys.argv.pop(1), run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", block, str(ROOT / "docs/consumer.py"), str(tmp_path / "stream.onnx"), str(tmp_path / "a.wav")], capture_output=True, text=True)
    assert done.returncode == 0 and "64 frames of 16" in done.stderr, done.stderr
    other = subprocess.run([sys.executable, str(ROOT / "docs/consumer.py")], capture_output=True, text=True)
    assert other.returncode == 1 and "python consumer.py" in other.stderr
