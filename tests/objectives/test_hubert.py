"""HuBERT's logits and loss against torchaudio, its cepstra, teachers of a second iteration, soft targets."""
import pytest
import torch

from essl_nb.core.registry import EsslError
from essl_nb.mixers.base import baseline_mixer
from essl_nb.models.config import EncoderConfig
from essl_nb.models.encoder import build_encoder
from essl_nb.objectives.clusters import kmeans, label_clusters
from essl_nb.objectives.hubert import Hubert, deltas, mfcc
from essl_nb.objectives.objective import mean_cross_entropy
from essl_nb.objectives.soft import posteriors, soft_cross_entropy

TINY = dict(clusters=12, iterations=3, fit_frames=400, code_dim=8)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


class Store(dict):
    mean, std = torch.full((80,), -6.0), torch.full((80,), 3.0)


@pytest.fixture(scope="module")
def features():
    draw = seeded(7)
    smooth = lambda T: torch.nn.functional.avg_pool1d(torch.randn(1, 80, T + 4, generator=draw), 5, 1)[0].T
    return Store({f"u{n}": smooth(61 + 13 * n) * 6 - 6 for n in range(8)})


def saved(tmp_path, seed=0, **options):
    encoder = build_encoder(EncoderConfig(baseline_mixer(), dim=32, depth=2, **options), seed=seed)
    encoder.save(tmp_path / "encoder")
    return encoder.eval()


# against torchaudio

@pytest.mark.parametrize("unmasked_weight", [0.0, 0.5])
def test_logits_and_loss_equal_torchaudio(unmasked_weight):
    from torchaudio.models import hubert_pretrain_model

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = hubert_pretrain_model(
            "group_norm", [(16, 10, 5), (16, 8, 4)], False, 32, 0.0, 8, 2, 2, 2, 0.0, 48, 0.0, 0.0, False, 0.0, 0.8, "static", 0.0, 4, False, 1,
            0.0, "static", 0.0, 4, False, 1, False, False, 20, 16, None).eval()
        wav, labels = torch.randn(2, 1000), torch.randint(20, (2, 49))
        held = {}
        model.wav2vec2.encoder.transformer.register_forward_hook(lambda m, a, out: held.update(frames=out.detach()))
        model.mask_generator.register_forward_hook(lambda m, a, out: held.update(span=out[1]))
        T = model.wav2vec2.extract_features(wav)[0][0].shape[1]
        masked, unmasked, _ = model(wav, labels[:, :T])
    ours = Hubert(32, clusters=20, code_dim=16, unmasked_weight=unmasked_weight)
    ours.project.load_state_dict(model.logit_generator.final_proj.state_dict())
    ours.embeddings.data.copy_(model.logit_generator.label_embeddings)
    span, codes = held["span"].bool(), labels[:, :T]
    loss = ours(held["frames"], {"codes": codes}, span, generator=seeded())
    ce = lambda logits: torch.nn.functional.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long))  # theirs puts the right code first
    truth = ce(masked) + unmasked_weight * ce(unmasked)
    assert 5 < span.sum() < 2 * T - 5 and abs(loss.total - truth) <= 1e-5 * truth
    right = ours.logits(held["frames"][span]).gather(1, codes[span][:, None])[:, 0]
    assert (right - masked[:, 0]).norm() <= 1e-5 * masked[:, 0].norm()
    total = lambda logits: logits.logsumexp(1)  # the same set of logits, in another order
    assert (total(ours.logits(held["frames"][span])) - total(masked)).norm() <= 1e-5 * total(masked).norm()


def test_deltas_equal_torchaudio():
    from torchaudio.functional import compute_deltas

    x = torch.randn(40, 13, generator=seeded())
    theirs = compute_deltas(x.T[None], win_length=5)[0].T
    assert torch.allclose(deltas(x), theirs, atol=1e-6)
    assert torch.isfinite(mfcc(torch.full((1, 80), -18.4))).all() and mfcc(torch.zeros(1, 80)).shape == (1, 39)


# the second iteration

def test_codes_of_a_layer(tmp_path, features):
    encoder = saved(tmp_path)
    task = Hubert(24, teacher=str(tmp_path), layer=2, **TINY).fit(features, features, generator=seeded())  # a run's folder
    with torch.no_grad():
        frames = encoder.from_features(features["u3"][None]).layers[2][0]
    assert torch.equal(task.described(features["u3"]), frames)
    nearest = torch.cdist(frames.double(), task.centroids.double()).argmin(1)
    assert torch.equal(task.label(features["u3"])["codes"].long(), nearest)
    assert not any("teacher" in name for name, _ in task.named_parameters())


def test_a_slower_encoder_takes_every_second_frame(tmp_path, features):
    encoder = saved(tmp_path)
    task = Hubert(24, teacher=str(tmp_path / "encoder"), stride=4, **TINY)
    with torch.no_grad():
        frames = encoder.from_features(features["u2"][None]).layers[1][0]
    assert torch.equal(task.described(features["u2"]), frames[::2])
    shifted = Hubert(24, teacher=str(tmp_path / "encoder"), stride=4, first=2, **TINY).described(features["u2"])
    assert torch.equal(shifted[:-1], frames[1::2][: len(shifted) - 1])


def test_another_teacher_is_another_identity(tmp_path):
    names = []
    for seed in (0, 1):
        saved(tmp_path, seed)
        names += [Hubert(24, teacher=str(tmp_path), layer=layer, **TINY).identity() for layer in (1, 2)]
    assert len({str(name) for name in names}) == 4 and Hubert(24, **TINY).identity() == {}


def test_teachers_that_do_not_fit(tmp_path):
    saved(tmp_path / "slow", frontend_kw=dict(stride=4))
    saved(tmp_path / "wave", frontend="wav2vec2", frontend_kw=dict(channels=8))
    saved(tmp_path / "fine")
    for folder, options, word in (("slow", {}, "40 ms"), ("wave", {}, "waveforms"), ("fine", dict(layer=3), "layers 0"), ("none", {}, "no encoder"),
                                  ("fine", dict(source="mfcc"), "source"), ("fine", dict(clusters=1), "clusters")):
        with pytest.raises(EsslError, match=word):
            Hubert(24, teacher=str(tmp_path / folder), **{**TINY, **options})
    for options in (dict(source="layer"), dict(layer=1), dict(source="plp"), dict(soft=0.0)):
        with pytest.raises(EsslError):
            Hubert(24, **options)


# soft targets

def test_posteriors_are_the_formula():
    x, centroids = torch.randn(200, 5, generator=seeded()), torch.randn(30, 5, generator=seeded(1))
    codes, p = posteriors(x, centroids, 1.7, chunk=64)
    truth = (-torch.cdist(x.double(), centroids.double()).square() / 1.7).softmax(1)
    top = truth.topk(8)
    assert torch.equal(codes.long(), top.indices)
    assert torch.allclose(p.double(), top.values / top.values.sum(1, keepdim=True), atol=1e-3)
    assert posteriors(x, centroids[:3], 1.7)[0].shape == (200, 3)


def test_soft_loss_is_hard_at_low_temperature_and_higher_at_high():
    x = torch.randn(500, 5, generator=seeded())
    found = kmeans(x, 20, generator=seeded())
    logits = torch.randn(500, 20, generator=seeded(1))
    for soft, same in ((1e-5, True), (1.0, False)):
        made = label_clusters(x, found.centroids, soft, found.inertia[-1])
        loss = soft_cross_entropy(logits, made["near"], made["posterior"])
        assert torch.isclose(loss, mean_cross_entropy(logits, made["codes"])) == same
        assert torch.equal(made["codes"], label_clusters(x, found.centroids)["codes"])


def test_soft_loss_equals_torch():
    logits, p = torch.randn(9, 8, generator=seeded()), torch.rand(9, 8, generator=seeded(1)).softmax(1)
    codes = torch.arange(8).expand(9, 8)
    assert torch.allclose(soft_cross_entropy(logits, codes, p), torch.nn.functional.cross_entropy(logits, p))
    empty = torch.zeros(0, 8, requires_grad=True)
    soft_cross_entropy(empty, codes[:0], p[:0]).backward()
