"""Distillation: the loss as the paper writes it, the teacher's layers as the peer library computes them, and a teacher that is neither trained nor stored."""
import pytest
import torch

from essl_nb import build_encoder, list_mixers
from essl_nb.core.registry import EsslError
from essl_nb.core.shapes import lengths_to_mask
from essl_nb.mixers.base import baseline_mixer
from essl_nb.models.checkpoint import weights_hash
from essl_nb.models.config import named_config
from essl_nb.models.published import from_published
from essl_nb.objectives.distil import Distil, distillation_loss, nearest_is_own, spread_layers
from essl_nb.objectives.objective import build_objective

LENGTHS = torch.tensor([60, 41])


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def teacher():
    return build_encoder(named_config("tiny", baseline_mixer(), depth=3), seed=1).eval()


@pytest.fixture(scope="module")
def folder(teacher, tmp_path_factory):
    return str(teacher.save(tmp_path_factory.mktemp("teacher")))


def student(**changes):
    return build_encoder(named_config("tiny", list_mixers()[-1], **changes), seed=2)


def batch(encoder):
    raw = torch.randn(2, 60, 80, generator=seeded())
    mask = lengths_to_mask(encoder.frontend.out_lengths(LENGTHS), 30)
    return raw, mask, torch.rand(2, 30, generator=seeded(1)) < 0.4


@pytest.mark.parametrize("weight", [0.0, 1.0, 2.5])
def test_the_loss_is_the_papers_equation(weight):
    guess, truth = torch.randn(2, 7, 5, dtype=torch.float64, generator=seeded()).unbind()
    total = 0.0
    for a, b in zip(guess, truth):
        cosine = (a @ b) / (a @ a).sqrt() / (b @ b).sqrt()
        total += sum(abs(x - y) for x, y in zip(a, b)) / 5 - weight * torch.log(1 / (1 + torch.exp(-cosine)))
    torch.testing.assert_close(distillation_loss(guess, truth, cosine_weight=weight)[0].double(), total / 7, atol=1e-6, rtol=1e-6)


def test_the_pairs_are_the_papers_where_the_depth_is():
    assert spread_layers(12) == [[-1, 4], [-1, 8], [-1, 12]] and spread_layers(2) == [[-1, 1], [-1, 2]] and spread_layers(1) == [[-1, 1]]


def test_pairs_are_summed_over_real_frames(folder, teacher):
    encoder = student()
    task = Distil(64, teacher=folder, pairs=[[1, 2], [-1, 3]], cosine_weight=2.0)
    task.begin(encoder)
    raw, mask, span = batch(encoder)
    layers = encoder.from_features(raw, LENGTHS, span=span, generator=seeded()).layers
    targets = task.online_targets(encoder, raw, LENGTHS, mask)
    theirs = teacher.from_features(raw, LENGTHS).layers
    assert torch.equal(targets["teacher0"], theirs[2]) and torch.equal(targets["teacher1"], theirs[3]) and not targets["teacher0"].requires_grad
    loss = task(layers, targets, span, mask, generator=seeded())
    by_hand = sum(distillation_loss(head(layers[s][mask]), theirs[t][mask], cosine_weight=2.0)[0] for head, (s, t) in zip(task.heads, task.pairs))
    torch.testing.assert_close(loss.total, by_hand)
    on_hidden = sum(distillation_loss(head(layers[s][mask & span]), theirs[t][mask & span], cosine_weight=2.0)[0] for head, (s, t) in zip(task.heads, task.pairs))
    torch.testing.assert_close(loss.parts["masked_loss"], on_hidden.detach())
    assert set(loss.parts) == {"masked_loss", "cosine", "masked_cosine", "masked_accuracy"} and not any(v.requires_grad for v in loss.parts.values())
    hidden = Distil(64, teacher=folder, pairs=[[-1, 3]], frames="hidden")
    hidden.begin(encoder)
    frames = layers[-1].detach().requires_grad_()
    hidden(frames, {"teacher0": theirs[3]}, span, mask, generator=seeded()).total.backward()
    assert torch.equal(frames.grad.any(-1), span & mask)


def test_the_teacher_is_neither_trained_nor_stored(folder, teacher):
    task = build_objective("distil", 64, teacher=folder)
    task.begin(student())
    assert len(task.heads) == 3 and {name.split(".")[0] for name in task.state_dict()} == {"heads", "mel_mean", "mel_std", "fitted"}
    assert {name.split(".")[0] for name, _ in task.named_parameters()} == {"heads"}
    assert task.identity() == {"teacher": weights_hash(teacher)}
    assert not any(p.requires_grad for p in task.teacher.parameters()) and not task.train().teacher.training


def test_without_a_name_the_teacher_is_the_encoder_at_the_start():
    encoder = student()
    task = Distil(64)
    raw, mask, span = batch(encoder)
    with pytest.raises(EsslError, match="name a teacher"):
        task.online_targets(encoder, raw, LENGTHS, mask)
    task.begin(encoder)
    before = task.online_targets(encoder, raw, LENGTHS, mask)["teacher0"]
    assert torch.equal(before, encoder.eval().from_features(raw, LENGTHS).layers[-1].detach())
    with torch.no_grad():
        encoder.norm.weight.mul_(2), encoder.blocks[0].ff[0].weight.mul_(2)
    assert torch.equal(task.online_targets(encoder, raw, LENGTHS, mask)["teacher0"], before)
    again = Distil(64)
    again.begin(encoder)
    again.load_state_dict(task.state_dict())  # a resumed run: the copy is in its state
    assert torch.equal(again.online_targets(encoder, raw, LENGTHS, mask)["teacher0"], before)
    assert not task.train().teacher.training and {n.split(".")[0] for n, p in task.named_parameters() if p.requires_grad} == {"heads"} and task.identity() == {}


def test_padding_changes_nothing(folder):
    encoder = student()
    task = Distil(64, teacher=folder)
    raw, mask, span = batch(encoder)
    results = []
    for fill in (0.0, float("nan")):
        layers = [torch.randn(2, 30, 64, generator=seeded()).masked_fill(~mask[..., None], fill).requires_grad_() for _ in range(3)]
        targets = {f"teacher{i}": torch.randn(2, 30, 64, generator=seeded(i)).masked_fill(~mask[..., None], fill) for i in range(3)}
        loss = task(layers, targets, span, mask, generator=seeded())
        task.zero_grad()
        loss.total.backward()
        results.append([loss.total.detach(), layers[-1].grad, *loss.parts.values(), *(p.grad.clone() for p in task.parameters())])
    assert all(map(torch.equal, *results)) and not results[0][1][~mask].any()


@pytest.mark.parametrize("share", ["none", "all", "no real frame"])
def test_the_loss_stays_finite(folder, share):
    task, x = Distil(64, teacher=folder, frames="hidden"), torch.randn(2, 30, 64, requires_grad=True)
    mask = torch.full((2, 30), share != "no real frame")
    loss = task([x, x, x], {f"teacher{i}": torch.randn(2, 30, 64) for i in range(3)}, torch.full((2, 30), share == "all"), mask, generator=seeded())
    loss.total.backward()
    assert loss.total.isfinite() and x.grad.isfinite().all() and all(v.isfinite() for v in loss.parts.values())


def test_accuracy_counts_frames_that_find_their_own():
    truth, real = torch.randn(1, 6, 8, generator=seeded()), torch.tensor([[True] * 5 + [False]])
    hidden = torch.tensor([[True, True, False, False, True, False]])
    assert nearest_is_own(3 * truth, truth, hidden, real) == 1
    other = truth.clone()
    other[0, 4] = truth[0, 0]
    torch.testing.assert_close(nearest_is_own(other, truth, hidden, real), torch.tensor(2 / 3))


def test_published_weights_teach_an_encoder_with_another_mixer(tmp_path):
    from transformers import HubertConfig, HubertModel

    torch.manual_seed(0)
    model = HubertModel(HubertConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, conv_dim=(32,) * 7)).eval()
    model.save_pretrained(tmp_path)
    found = from_published(tmp_path, list_mixers("recurrent")[0]).encoder
    task = Distil(64, teacher=str(tmp_path), pairs=[[0, 0], [1, 1], [2, 2]])
    task.begin(found)
    wav = torch.randn(1, 4000, generator=seeded()) * 0.1
    with torch.no_grad():
        theirs = model(wav, output_hidden_states=True).hidden_states
    targets = task.online_targets(found, wav[..., None], None, None)
    for i, hidden_state in enumerate(theirs):
        torch.testing.assert_close(targets[f"teacher{i}"], hidden_state, atol=1e-5, rtol=1e-4)
    with pytest.raises(EsslError, match="log-mel, the encoder every|from waveforms, the encoder"):
        Distil(64, teacher=str(tmp_path)).begin(student())


@pytest.mark.parametrize("wrong", [dict(pairs=[]), dict(pairs=[[1, 2, 3]]), dict(pairs=[[True, 1]]), dict(frames="seen"), dict(cosine_weight=-1.0), dict(teacher="there/is.safetensors")], ids=str)
def test_what_it_cannot_be_is_refused(wrong):
    with pytest.raises(EsslError):
        Distil(64, **wrong)


def test_layers_that_are_not_there_are_named(folder):
    for pairs, place in (([[4, 1]], "layer 4 of the student"), ([[-1, 9]], "layer 9 of the teacher"), ([[-4, 1]], "layer -4 of the student")):
        with pytest.raises(EsslError, match=place):
            Distil(64, teacher=folder, pairs=pairs).begin(student())
