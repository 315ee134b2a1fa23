"""Few bits: files and encoders stay near, get smaller, keep what they said of themselves, and refuse what cannot be."""
import json

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from essl_nb.core.registry import EsslError
from essl_nb.mixers.base import baseline_mixer, list_mixers, mixers
from essl_nb.models.config import EncoderConfig
from essl_nb.models.encoder import build_encoder
from essl_nb.models.export import export_onnx
from essl_nb.models.export_stream import export_stream
from essl_nb.models.few_bits import SCHEMES, halve_rest, is_quantised, quantise_file, quantised

WAV, LENGTHS = 0.1 * torch.randn(2, 16000, generator=torch.Generator().manual_seed(0)), torch.tensor([16000, 9000])
FAR = {"int8": 0.06, "int8_weights": 0.03, "int4": 0.3, "int8_tensor": 0.1}  # random weights, two layers


def build(name, dim=64, **kw):
    return build_encoder(EncoderConfig(name, dim=dim, depth=2, mixer_kw=mixers.get(name).meta.get("tiny", {}), **kw), seed=0).eval()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    "An encoder's two files."
    folder, encoder = tmp_path_factory.mktemp("files"), build(baseline_mixer(), dim=192)
    export_onnx(encoder, folder / "whole.onnx")
    encoder.set_chunk(8)
    export_stream(encoder, folder / "stream.onnx", check=4)
    return folder


@pytest.mark.parametrize("kind", ["whole", "stream"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_small_file_is_near_and_says_what_it_is(files, tmp_path, kind, scheme):
    before = {p.key: p.value for p in onnx.load(files / f"{kind}.onnx").metadata_props}
    about = quantise_file(files / f"{kind}.onnx", tmp_path / "small.onnx", scheme)
    said = onnxruntime.InferenceSession(tmp_path / "small.onnx", providers=["CPUExecutionProvider"]).get_modelmeta().custom_metadata_map
    assert said == about and said["precision"] == SCHEMES[scheme].words and {k: said[k] for k in before if k != "precision"} == {k: v for k, v in before.items() if k != "precision"}
    assert 0 < float(said["difference"]) < FAR[scheme]
    assert (tmp_path / "small.onnx").stat().st_size < (0.5 if scheme == "int4" else 0.65) * (files / f"{kind}.onnx").stat().st_size
    assert [p.name for p in tmp_path.iterdir()] == ["small.onnx"]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", [n if mixers.get(n).meta.get("baseline") else pytest.param(n, marks=pytest.mark.slow) for n in list_mixers()])
def test_a_quantised_encoder_is_near(name, scheme):
    encoder = build(name)
    weights = {k: v.clone() for k, v in encoder.state_dict().items()}
    small = quantised(encoder, scheme)
    with torch.inference_mode():
        want, got = encoder(WAV, LENGTHS), small(WAV, LENGTHS)
    assert got.lengths.tolist() == want.lengths.tolist() and got.frames.isfinite().all()
    distance = float((got.frames - want.frames).norm() / want.frames.norm())
    assert 0 < distance < 2 * FAR[scheme]
    assert is_quantised(small) and not is_quantised(encoder) and all(torch.equal(v, weights[k]) for k, v in encoder.state_dict().items())


def test_per_channel_is_nearer_where_channels_differ_in_size(tmp_path):
    encoder = build(baseline_mixer())
    with torch.no_grad():
        for block in encoder.blocks:
            for linear in (m for m in block.modules() if isinstance(m, torch.nn.Linear)):
                linear.weight[::7] *= 30
    export_onnx(encoder, tmp_path / "whole.onnx")
    channel, matrix = (float(quantise_file(tmp_path / "whole.onnx", tmp_path / f"{s}.onnx", s)["difference"]) for s in ("int8", "int8_tensor"))
    assert channel < 0.7 * matrix


def test_four_bits_are_sixteen_levels_for_each_group():
    "The nearest of 16 equal steps over the range of 32 weights; the largest one may be a step's half further."
    encoder = build(baseline_mixer())
    small = quantised(encoder, "int4")
    name, layer = next((n, m) for n, m in encoder.named_modules() if isinstance(m, torch.nn.Linear) and n.startswith("blocks"))
    w = layer.weight.detach().double().unflatten(1, (-1, 32))
    got = small.get_submodule(name).weight.dequantize().double().unflatten(1, (-1, 32))
    step = w.abs().amax(-1, keepdim=True) / 7.5
    levels = got / step
    assert (levels - levels.round()).abs().max() < 1e-3 and levels.round().min() >= -8 and levels.round().max() <= 7
    assert ((got - w).abs() <= 0.501 * step).all()


def test_halves_are_stored_and_computed_in_float32(files):
    model = onnx.load(files / "whole.onnx")
    names = {t.name for t in model.graph.initializer}
    assert halve_rest(model) > 4
    kinds = {t.name: t.data_type for t in model.graph.initializer}
    assert kinds["encoder.frontend.conv.weight.half"] == onnx.TensorProto.FLOAT16 and "encoder.frontend.filters" in kinds and len(kinds) == len(names)
    feed = {"wav": WAV.numpy(), "lengths": LENGTHS.numpy()}
    run = lambda m: onnxruntime.InferenceSession(m, providers=["CPUExecutionProvider"]).run(None, feed)[0]
    want, got = run(str(files / "whole.onnx")), run(model.SerializeToString())
    assert 0 < np.abs(got - want).max() < 5e-3 * np.abs(want).max()


def test_what_cannot_be_quantised_is_refused_and_nothing_is_written(files, tmp_path):
    small = tmp_path / "small.onnx"
    quantise_file(files / "whole.onnx", small)
    (tmp_path / "torn.onnx").write_bytes((files / "whole.onnx").read_bytes()[:20000])
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([onnx.helper.make_node("Identity", ["x"], ["y"])], "g",
              [onnx.helper.make_tensor_value_info("x", 1, [1])], [onnx.helper.make_tensor_value_info("y", 1, [1])])), tmp_path / "foreign.onnx")
    old = onnx.load(files / "whole.onnx")
    old.opset_import[0].version = 11
    onnx.save(old, tmp_path / "old.onnx")
    there = sorted(p.name for p in tmp_path.iterdir())
    for source, target, scheme, why in ((small, "new.onnx", "int8", "quantised already"), (tmp_path / "torn.onnx", "new.onnx", "int8", "no whole ONNX file"),
                                        (tmp_path / "foreign.onnx", "new.onnx", "int8", "not exported by essl_nb"), (tmp_path / "none.onnx", "new.onnx", "int8", "is not there"), (tmp_path / "old.onnx", "new.onnx", "int8", "operators of set 11"),
                                        (files / "whole.onnx", "small.onnx", "int8", "there already"), (files / "whole.onnx", "new.onnx", "int3", "no scheme 'int3'")):
        with pytest.raises(EsslError, match=why):
            quantise_file(source, tmp_path / target, scheme)
    with pytest.raises(EsslError, match="quantised already"):
        quantised(quantised(build(baseline_mixer())))
    with pytest.raises(EsslError, match="no scheme"):
        quantised(build(baseline_mixer()), "int3")
    assert sorted(p.name for p in tmp_path.iterdir()) == there


def test_what_quantising_needs_is_named(files, tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(EsslError, match=r"essl_nb\[export\]"):
        quantise_file(files / "whole.onnx", tmp_path / "small.onnx")
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(EsslError, match="torchao"):
        quantised(build(baseline_mixer()))
    assert list(tmp_path.iterdir()) == []


def test_states_of_a_small_stream_are_float32(files, tmp_path):
    about = quantise_file(files / "stream.onnx", tmp_path / "small.onnx", "int4")
    session = onnxruntime.InferenceSession(tmp_path / "small.onnx", providers=["CPUExecutionProvider"])
    kinds = {i.name: i.type for i in session.get_inputs()}
    assert set(json.loads(about["states"])) <= set(kinds) and kinds["state"] == "tensor(float)" and kinds["position"] == "tensor(int64)"
