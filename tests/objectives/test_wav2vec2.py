"""wav2vec 2.0's loss and quantiser against transformers, on copied weights; negatives; the collapsed quantiser."""
import pytest
import torch

from essl_nb.core.registry import EsslError
from essl_nb.mixers.base import baseline_mixer
from essl_nb.models.config import EncoderConfig
from essl_nb.models.encoder import build_encoder
from essl_nb.objectives.objective import build_objective
from essl_nb.objectives.wav2vec2 import GumbelQuantiser, Wav2Vec2, gumbel_noise, negative_indices, perplexity

GROUPS, ENTRIES, CODE_DIM, FRAMES_DIM = 2, 12, 16, 32


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def near(ours, theirs, bound=1e-5):
    "Relative difference in norm."
    assert (ours - theirs).norm() <= bound * theirs.norm(), float((ours - theirs).norm() / theirs.norm())


@pytest.fixture(scope="module")
def published():
    transformers = pytest.importorskip("transformers")
    config = transformers.Wav2Vec2Config(
        hidden_size=FRAMES_DIM, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, conv_dim=(24, 24), conv_stride=(5, 4), conv_kernel=(10, 8),
        num_feat_extract_layers=2, num_codevector_groups=GROUPS, num_codevectors_per_group=ENTRIES, codevector_dim=CODE_DIM, proj_codevector_dim=CODE_DIM,
        num_negatives=10, num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2, hidden_dropout=0.0, attention_dropout=0.0, activation_dropout=0.0,
        feat_proj_dropout=0.0, feat_quantizer_dropout=0.0, layerdrop=0.0, mask_time_prob=0.5, do_stable_layer_norm=True, feat_extract_norm="layer")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.Wav2Vec2ForPreTraining(config)
        torch.nn.init.uniform_(model.quantizer.codevectors)
        torch.nn.init.normal_(model.quantizer.weight_proj.weight)
    return model


def copied(model) -> Wav2Vec2:
    "Ours with the weights of theirs; its quantiser reads what theirs reads."
    ours = Wav2Vec2(FRAMES_DIM, groups=GROUPS, entries=ENTRIES, code_dim=CODE_DIM, negatives=10)
    ours.quantiser = GumbelQuantiser(24, groups=GROUPS, entries=ENTRIES, dim=CODE_DIM)
    ours.quantiser.score.load_state_dict(model.quantizer.weight_proj.state_dict())
    ours.quantiser.codebook.data.copy_(model.quantizer.codevectors.view(GROUPS, ENTRIES, -1))
    ours.project_codes.load_state_dict(model.project_q.state_dict())
    ours.project_frames.load_state_dict(model.project_hid.state_dict())
    return ours


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("temperature", [2.0, 0.5])
def test_quantiser_equals_transformers(published, training, temperature):
    theirs, ours = published.quantizer.train(training), copied(published).quantiser.train(training)
    theirs.temperature = temperature
    x = torch.randn(2, 40, 24, generator=seeded())
    mask = torch.rand(2, 40, generator=seeded(1)) < 0.6
    torch.manual_seed(3)  # theirs draws from the global generator
    vectors, used = theirs(x, mask_time_indices=mask)
    noise = gumbel_noise((2, 40, GROUPS, ENTRIES), seeded(3))[mask] if training else None
    found = ours(x[mask], temperature, noise)
    near(found.vectors, vectors[mask])
    near(perplexity(found.probabilities), used)
    weight = torch.randn(vectors.shape, generator=seeded(2))
    theirs.zero_grad(), ours.zero_grad()
    (vectors * weight)[mask].sum().backward()
    (found.vectors * weight[mask]).sum().backward()
    near(ours.codebook.grad.flatten(), theirs.codevectors.grad.flatten())
    if training:
        near(ours.score.weight.grad, theirs.weight_proj.weight.grad)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_loss_equals_transformers(published, training):
    from transformers.models.wav2vec2.modeling_wav2vec2 import _sample_negative_indices

    model, ours = published.train(training), copied(published).train(training)
    wav = torch.randn(2, 1200, generator=seeded())
    T = int(model._get_feat_extract_output_lengths(1200))
    hidden = torch.rand(2, T, generator=seeded(1)) < 0.5
    negatives = torch.tensor(_sample_negative_indices((2, T), 10, hidden.numpy()))
    model.quantizer.temperature = ours.temperature = 1.3
    hook = model.quantizer.register_forward_pre_hook(lambda *_: torch.manual_seed(7) and None)
    try:
        theirs = model(wav, mask_time_indices=hidden, sampled_negative_indices=negatives)
        inside = model.wav2vec2(wav, mask_time_indices=hidden)
    finally:
        hook.remove()
    noise = gumbel_noise((2, T, GROUPS, ENTRIES), seeded(7))[hidden] if training else None
    number = hidden.flatten().cumsum(0) - 1  # place in the padded batch → number among the hidden frames
    found = ours.quantiser(inside.extract_features[hidden], 1.3, noise)
    loss = ours.compare(inside.last_hidden_state[hidden], found, number[negatives[hidden].long()], torch.zeros(1))
    n = hidden.sum()
    near(loss.parts["masked_loss"] * n, theirs.contrastive_loss.detach())
    near(loss.parts["diversity_loss"] * n, theirs.diversity_loss.detach())
    near((loss.total * n).detach(), theirs.loss.detach())
    assert negatives[hidden].shape == (n, 10) and (found.codes[:, None] == found.codes[number[negatives[hidden].long()]]).all(-1).any()


def test_negatives_are_other_hidden_frames_of_the_utterance():
    hidden = torch.rand(5, 60, generator=seeded()) < 0.3
    hidden[3] = False
    hidden[4] = torch.arange(60) == 9
    picks = negative_indices(hidden, 50, generator=seeded())
    who = hidden.nonzero()[:, 0]
    assert picks.shape == (int(hidden.sum()), 50) and torch.equal(who[picks], who[:, None].expand(-1, 50))
    own = picks == torch.arange(len(picks))[:, None]
    assert not own[:-1].any() and own[-1].all()  # the last utterance has one hidden frame
    assert torch.equal(picks, negative_indices(hidden, 50, generator=seeded()))


def test_negatives_are_uniform():
    hidden = torch.ones(1, 6, dtype=torch.bool)
    picks = negative_indices(hidden, 6000, generator=seeded())
    for own, row in enumerate(picks):
        share = torch.bincount(row, minlength=6) / 6000
        assert share[own] == 0 and (share[torch.arange(6) != own] - 0.2).abs().max() < 0.03


def test_lonely_hidden_frames_cost_nothing():
    task = Wav2Vec2(8, entries=4, code_dim=4, negatives=3, diversity_weight=0, penalty_weight=0)
    task.draw_heads(seeded())
    span = torch.eye(4, dtype=torch.bool)  # one hidden frame in each utterance
    x = torch.randn(4, 4, 8, generator=seeded(), requires_grad=True)
    total, parts = task(x, {"local": torch.randn(4, 4, 8), "energy": torch.ones(4, 4)}, span, generator=seeded())
    total.backward()
    assert total == 0 and parts["masked_accuracy"] == 0 and (x.grad == 0).all()


def test_temperature_is_a_function_of_the_step():
    task = Wav2Vec2(8, temperature_decay=0.9)
    seen = []
    for step in (0, 1, 3, 99):
        task.at_step(step, 100)
        seen.append(task.temperature)
    assert seen == pytest.approx([2.0, 1.8, 2 * 0.9**3, 0.5])
    task = Wav2Vec2(8)
    task.at_step(69, 100)
    assert task.temperature == pytest.approx(0.5)


@pytest.mark.parametrize("frontend, weight", [("logmel", 0.0), ("wav2vec2", 10.0)])
def test_penalty_by_front_end(frontend, weight):
    encoder = build_encoder(EncoderConfig(baseline_mixer(), dim=8, depth=1, frontend=frontend, frontend_kw=dict(channels=8) if weight else {}), seed=0)
    for given, expected in ((None, weight), (3.0, 3.0)):
        task = Wav2Vec2(8, entries=4, code_dim=4, negatives=3, penalty_weight=given)
        task.begin(encoder)
        assert task.penalty_weight == expected
    wav = torch.randn(1, 4000, generator=seeded())
    raw, lengths = encoder.frontend.features(wav)
    held = []
    norm = encoder.frontend.last_norm if weight else encoder.frontend.norm
    norm.register_forward_hook(lambda m, a, out: held.append(a[0]))
    energy = task.online_targets(encoder, raw, None, None)["energy"]
    assert torch.allclose(energy, held[0].square().mean(-1)) and energy.requires_grad


@pytest.mark.parametrize("wrong", [dict(code_dim=7), dict(entries=1), dict(negatives=0), dict(temperature_end=3.0), dict(temperature_decay=1.5)], ids=str)
def test_wav2vec2_refuses(wrong):
    with pytest.raises(EsslError):
        build_objective("wav2vec2", 8, **wrong)


def test_a_frozen_front_end_stays_what_it_was_while_codes_and_encoder_learn():
    encoder = build_encoder(EncoderConfig(baseline_mixer(), dim=16, depth=1), seed=0)
    task = build_objective("wav2vec2", 16, groups=GROUPS, entries=ENTRIES, code_dim=CODE_DIM, negatives=4, frozen_frontend=True)
    task.begin(encoder)
    raw, mask = torch.randn(2, 80, 80, generator=seeded()), torch.ones(2, 40, dtype=torch.bool)
    span = torch.rand(2, 40, generator=seeded(1)) < 0.5
    targets = task.online_targets(encoder, raw, None, mask)
    task(encoder.from_features(raw, span=span, generator=seeded()).frames, targets, span, mask, generator=seeded()).total.backward()
    assert all(p.grad is None for p in encoder.frontend.parameters())
    assert task.quantiser.score.weight.grad.norm() > 0 and all(p.grad is not None for p in encoder.blocks.parameters())
