"""Encoders and checkpoints: the padding law end to end, round trips, and files that are not what they should be."""
import json

import pytest
import torch

from essl_nb.core.config import from_json, to_json
from essl_nb.core.registry import EsslError, UnknownName
from essl_nb.core.shapes import lengths_to_mask
from essl_nb.mixers.base import list_mixers, mixers
from essl_nb.models.config import SIZES, EncoderConfig, named_config
from essl_nb.models.encoder import build_encoder, load_encoder

NAMES = list_mixers()


def tiny(name, **kw):
    return EncoderConfig(name, dim=16, depth=2, mixer_kw=mixers.get(name).meta.get("tiny", {}), **kw)


@pytest.mark.parametrize("name", NAMES)
def test_nan_in_the_pads_reaches_neither_outputs_nor_gradients(name):
    encoder = build_encoder(tiny(name), seed=0)
    mel, lengths = torch.randn(3, 40, 80), torch.tensor([40, 27, 10])
    mask = lengths_to_mask(lengths, 40)

    def outcome(padding):
        x = torch.where(mask[..., None], mel, torch.tensor(padding)).requires_grad_()
        out = encoder.from_features(x, lengths)
        encoder.zero_grad()
        out.frames.square().sum().backward()
        return out, x.grad, [p.grad.clone() for p in encoder.parameters() if p.grad is not None]

    (clean, g1, w1), (dirty, g2, w2) = outcome(0.0), outcome(torch.nan)
    for a, b in zip([clean.frames, *clean.layers, g1, *w1], [dirty.frames, *dirty.layers, g2, *w2]):
        assert torch.equal(a, b)
    assert g2[~mask].abs().max() == 0 and dirty.frames[~lengths_to_mask(dirty.lengths)].abs().max() == 0


@pytest.mark.parametrize("name", NAMES)
def test_a_padded_batch_equals_each_utterance_alone(name):
    encoder = build_encoder(tiny(name), seed=0).eval()
    wav, lengths = torch.randn(3, 8000) * 0.1, torch.tensor([8000, 5333, 2001])
    together = encoder(wav, lengths)
    for b, n in enumerate(lengths):
        alone = encoder(wav[b : b + 1, :n])
        for x, y in zip([together.frames, *together.layers], [alone.frames, *alone.layers]):
            torch.testing.assert_close(x[b, : alone.lengths[0]], y[0], atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("name", [n for n in NAMES if mixers.get(n).obj.can_be_causal])
def test_a_causal_encoder_does_not_look_ahead(name):
    encoder = build_encoder(tiny(name, causal=True), seed=0).eval()
    mel, lengths = torch.randn(1, 40, 80), torch.tensor([40])
    other = mel.clone()
    other[:, 30:] += 3
    a, b = (encoder.from_features(m, lengths).frames for m in (mel, other))
    torch.testing.assert_close(a[:, :15], b[:, :15])
    assert not torch.allclose(a[:, 15:], b[:, 15:])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", NAMES)
def test_configurations_survive_json(name, size):
    config = named_config(size, name, mixer_kw=mixers.get(name).meta.get("tiny", {}))
    assert from_json(EncoderConfig, json.loads(json.dumps(to_json(config)))) == config


@pytest.mark.parametrize("name", NAMES)
def test_checkpoints_survive_the_disk(name, tmp_path):
    encoder = build_encoder(tiny(name), seed=5).eval()
    encoder.frontend.set_statistics(torch.randn(80), torch.rand(80) + 1)
    again = load_encoder(encoder.save(tmp_path))
    assert again.config == encoder.config
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in encoder.state_dict().items())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_hidden_frames_leave_no_trace():
    encoder = build_encoder(tiny(NAMES[0]), seed=0).eval()
    mel, lengths, span = torch.randn(1, 40, 80), torch.tensor([40]), torch.zeros(1, 20, dtype=torch.bool)
    span[:, 5:12] = True
    other = mel.clone()
    other[:, 10:24] = 7.0
    draw = lambda m: encoder.from_features(m, lengths, span=span, generator=torch.Generator().manual_seed(1)).frames
    assert torch.equal(draw(mel), draw(other))


def test_building_with_a_seed_leaves_the_global_state_alone():
    torch.manual_seed(0)
    want = torch.rand(3)
    torch.manual_seed(0)
    build_encoder(tiny(NAMES[0]), seed=1)
    assert torch.equal(torch.rand(3), want)


def test_unknown_names_and_impossible_numbers():
    with pytest.raises(UnknownName, match="There is no mixer"):
        EncoderConfig("no-such-mixer")
    with pytest.raises(UnknownName, match="There is no front end|There is no frontend"):
        EncoderConfig(NAMES[0], frontend="logmell")
    with pytest.raises(EsslError, match="dim and depth"):
        EncoderConfig(NAMES[0], depth=0)
    with pytest.raises(EsslError, match="takes no argument"):
        build_encoder(EncoderConfig(NAMES[0], mixer_kw=dict(no_such_option=1)))
    with pytest.raises(EsslError, match="has no field"):
        from_json(EncoderConfig, dict(mixer=NAMES[0], dept=3))


def test_broken_checkpoints_are_named(tmp_path):
    with pytest.raises(EsslError, match="holds no encoder"):
        load_encoder(tmp_path)
    folder = build_encoder(tiny(NAMES[0]), seed=0).save(tmp_path / "a")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(EsslError, match="not a whole safetensors file"):
        load_encoder(folder)
    build_encoder(EncoderConfig(NAMES[0], dim=32, depth=1), seed=0).save(tmp_path / "b")
    (tmp_path / "b" / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(EsslError, match="do not fit"):
        load_encoder(tmp_path / "b")
