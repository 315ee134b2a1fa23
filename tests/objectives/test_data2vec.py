"""data2vec's targets against transformers' hidden states in float64, its teacher, its loss."""
import copy

import pytest
import torch

from essl_nb.core.registry import EsslError
from essl_nb.mixers.base import baseline_mixer, list_mixers
from essl_nb.models.config import EncoderConfig
from essl_nb.models.encoder import build_encoder
from essl_nb.models.wav2vec2 import from_transformers
from essl_nb.objectives.data2vec import Data2Vec, layer_targets


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def begun(encoder, **options):
    task = Data2Vec(encoder.config.dim, **options)
    task.draw_heads(seeded())
    task.begin(encoder)
    return task.train()


@pytest.fixture
def encoder():
    return build_encoder(EncoderConfig(baseline_mixer(), dim=24, depth=3, dropout=0.2), seed=0)


def test_targets_equal_transformers_hidden_states():
    transformers = pytest.importorskip("transformers")
    config = transformers.Wav2Vec2Config(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64, conv_dim=(16,) * 7, num_conv_pos_embeddings=128,
        num_conv_pos_embedding_groups=16, do_stable_layer_norm=True, feat_extract_norm="layer", conv_bias=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.Wav2Vec2Model(config).double().eval()
    teacher = from_transformers(model, normalise=False).double()
    wav = torch.randn(2, 8000, generator=seeded(), dtype=torch.float64) * 0.1
    task = begun(teacher, top_layers=2).double()
    raw, _ = teacher.frontend.features(wav)
    ours = task.online_targets(teacher, raw, None, None)["target"]
    with torch.no_grad():
        hidden = []
        hooks = [layer.register_forward_hook(lambda m, a, out: hidden.append(out[0] if isinstance(out, tuple) else out)) for layer in model.encoder.layers]
        model(wav)
        [hook.remove() for hook in hooks]
    theirs = sum(torch.nn.functional.instance_norm(h.transpose(1, 2)).transpose(1, 2) for h in hidden[-2:]) / 2
    assert len(hidden) == 3 and ours.dtype == torch.float64 and (ours - theirs).norm() <= 1e-5 * theirs.norm()


def test_targets_are_the_equation_over_real_frames():
    lengths, layers = [40, 17, 1, 0], [torch.randn(4, 40, 6, generator=seeded(i), dtype=torch.float64) * (i + 1) + i for i in range(3)]
    mask = torch.arange(40) < torch.tensor(lengths)[:, None]
    y = layer_targets([x.masked_fill(~mask[..., None], float("nan")) for x in layers], mask)
    for row, n in enumerate(lengths[:3]):
        real = [x[row, :n] for x in layers]
        truth = sum((x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt() for x in real) / 3
        assert torch.allclose(y[row, :n], truth, atol=1e-12) and not y[row, n:].any()
    assert not y[3].any()


def test_teacher_sees_the_whole_and_without_dropout(encoder):
    task, raw = begun(encoder), torch.randn(2, 100, 80, generator=seeded())
    encoder.train()
    a, b = (task.online_targets(encoder, raw, None, None)["target"] for _ in range(2))
    assert torch.equal(a, b) and not a.requires_grad and not task.teacher.training
    assert not torch.equal(encoder.from_features(raw).frames, encoder.from_features(raw).frames)  # dropout in the student


def test_teacher_follows_by_the_rate(encoder):
    task, before = begun(encoder, scale_rates=False), copy.deepcopy(encoder)
    with torch.no_grad():
        for p in encoder.parameters():
            p.add_(torch.randn(p.shape, generator=seeded()))
    encoder.frontend.mean.fill_(5.0)
    task.at_step(50, 1000)
    task.after_step(encoder)
    assert task.rate == pytest.approx(0.999 + 0.0009 * 50 / 75)
    for (name, new), old, now in zip(encoder.named_parameters(), before.parameters(), task.teacher.parameters()):
        shared = name.startswith("frontend.")
        assert torch.allclose(now, new if shared else task.rate * old + (1 - task.rate) * new, atol=1e-6), name
    assert torch.equal(task.teacher.frontend.mean, encoder.frontend.mean)


def test_teacher_is_saved_and_resumed(encoder):
    task = begun(encoder)
    task.after_step(build_encoder(encoder.config, seed=1))
    fresh = begun(encoder)
    fresh.load_state_dict(task.state_dict())
    raw = torch.randn(1, 60, 80, generator=seeded())
    assert torch.equal(fresh.online_targets(encoder, raw, None, None)["target"], task.online_targets(encoder, raw, None, None)["target"])
    assert not any(p.requires_grad for p in fresh.teacher.parameters()) and any("teacher.blocks" in name for name in task.state_dict())


def test_heads_are_drawn_and_the_teacher_left_alone(encoder):
    task = begun(encoder)
    head, teacher = task.head.weight.clone(), copy.deepcopy(task.teacher.state_dict())
    task.draw_heads(seeded(9))
    assert not torch.equal(head, task.head.weight) and all(torch.equal(v, teacher[k]) for k, v in task.teacher.state_dict().items())


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_loss_is_torchs(encoder, beta):
    task, span = begun(encoder, beta=beta), torch.rand(2, 30, generator=seeded()) < 0.5
    frames, target = torch.randn(2, 30, 24, generator=seeded()), torch.randn(2, 30, 24, generator=seeded(1))
    total, parts = task(frames, {"target": target}, span, generator=seeded())
    guess, truth = task.head(frames[span]), target[span]
    F = torch.nn.functional
    assert torch.allclose(total, F.smooth_l1_loss(guess, truth, beta=beta) if beta else F.mse_loss(guess, truth))
    assert torch.allclose(parts["explained"], 1 - F.mse_loss(guess, truth) / truth.var(0, correction=0).mean())
    perfect = task(frames, {"target": torch.zeros_like(target).masked_scatter(span[..., None], guess.detach())}, span, generator=seeded())
    assert perfect.total < 1e-10 and perfect.parts["explained"] > 0.999


def test_rates():
    task = Data2Vec(8)
    rate = lambda step, steps: (task.at_step(step, steps), task.rate)[1]
    assert rate(0, 400_000) == pytest.approx(0.999) and rate(30_000, 400_000) == rate(399_999, 400_000) == pytest.approx(0.9999)
    assert rate(399, 400) == pytest.approx(0.9) and rate(0, 400) == 0.5 and rate(0, 10**7) == pytest.approx(0.999)


@pytest.mark.parametrize("wrong", [dict(rate_start=0.99999), dict(copies=0), dict(beta=-1.0), dict(top_layers=0)], ids=str)
def test_data2vec_refuses(wrong, encoder):
    with pytest.raises(EsslError):
        Data2Vec(24, **wrong)
    with pytest.raises(EsslError, match="begin"):
        Data2Vec(24).online_targets(encoder, torch.zeros(1, 9, 80), None, None)
    with pytest.raises(EsslError, match="top_layers"):
        begun(encoder, top_layers=4)


@pytest.mark.parametrize("mixer", list_mixers())
def test_any_mixer_can_teach(mixer):
    from essl_nb.mixers.base import mixers

    encoder = build_encoder(EncoderConfig(mixer, dim=16, depth=2, mixer_kw=mixers.get(mixer).meta["tiny"]), seed=0).train()
    task = begun(encoder)
    raw, lengths = torch.randn(2, 80, 80, generator=seeded()), torch.tensor([80, 50])
    mask = torch.arange(40) < torch.tensor([[40], [25]])
    target = task.online_targets(encoder, raw, lengths, mask)["target"]
    task.after_step(encoder)
    assert target.shape == (2, 40, 16) and torch.isfinite(target).all() and not target[1, 25:].any()
