"""The objectives, their targets and the health of a run: spans, quantisers, losses under padding."""
import math

import pytest
import torch

from essl_nb.core.registry import EsslError, UnknownName
from essl_nb.costs.quantiser import quantiser_memory
from essl_nb.mixers.base import baseline_mixer
from essl_nb.models.config import EncoderConfig
from essl_nb.models.encoder import build_encoder
from essl_nb.objectives.bestrq import quantise, quantise_naive, random_quantiser
from essl_nb.objectives.clusters import Clusters, normalise_utterance
from essl_nb.objectives.health import agreement, code_usage, collapsed, effective_rank, health_of, is_collapsed, rankme
from essl_nb.objectives.objective import (Objective, accuracy, build_objective, centres, draw_share, list_objectives, mean_cross_entropy,
                                   mean_squared_error, objectives, one_thread, sample_frames, stack_context)
from essl_nb.objectives.spans import SpanConfig, draw_spans, realised_share, start_prob_for

DIM = 24


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


class Store(dict):
    "Raw log-mel in memory, as an objective reads it."
    mean, std = torch.full((80,), -6.0), torch.full((80,), 3.0)


@pytest.fixture(scope="module")
def features():
    draw = seeded(7)
    smooth = lambda T: torch.nn.functional.avg_pool1d(torch.randn(1, 80, T + 4, generator=draw), 5, 1)[0].T
    return Store({f"u{n}": smooth(61 + 13 * n) * 6 - 6 for n in range(10)})


@pytest.fixture(scope="module")
def encoder():
    return build_encoder(EncoderConfig(baseline_mixer(), dim=DIM, depth=2), seed=0)


def fitted(name, features, seed=0, encoder=None, **options):
    tiny = {**objectives.get(name).meta["tiny"], **options}
    task = build_objective(name, DIM, **tiny).fit(features, list(features), generator=seeded(seed))
    if encoder is not None:
        task.begin(encoder)
    return task


def batch(objective, features, ids, T=None, encoder=None):
    "Padded targets and mask of a few utterances, stored ones and those made of the batch."
    lengths = torch.tensor([(len(features[i]) - 1) // objective.stride + 1 for i in ids])
    T = T or int(lengths.max())
    mask = torch.arange(T) < lengths[:, None]
    made = [objective.label(features[i]) for i in ids]
    targets = {k: torch.stack([torch.nn.functional.pad(m[k], [0, 0] * (m[k].ndim - 1) + [0, T - len(m[k])]) for m in made]) for k in made[0]}
    if objective.online:
        raw = torch.nn.utils.rnn.pad_sequence([features[i] for i in ids], batch_first=True)
        online = objective.online_targets(encoder, raw, torch.tensor([len(features[i]) for i in ids]), mask)
        targets |= {k: v.detach() for k, v in online.items()}
    return targets, mask


# spans

@pytest.mark.parametrize("share, span", [(0.4, 10), (0.65, 5), (0.2, 20), (0.5, 1)])
def test_share_follows_the_formula(share, span):
    p = start_prob_for(share, span)
    assert math.isclose(1 - (1 - p) ** span, share)
    lengths = torch.full((300,), 400)
    hidden = draw_spans(lengths, span=span, start_prob=p, generator=seeded(span), min_spans=0)
    assert abs(realised_share(hidden, lengths) - share) < 0.015


def test_every_place_is_hidden_alike():
    hidden = draw_spans(torch.full((6000,), 40), span=10, start_prob=start_prob_for(0.4, 10), generator=seeded(), min_spans=0)
    assert (hidden.float().mean(0) - 0.4).abs().max() < 0.035


@pytest.mark.parametrize("lengths", [[1], [3, 50, 12], [7, 7], [0, 5]], ids=str)
@pytest.mark.parametrize("floor", [0, 1, 3])
def test_spans_stay_inside(lengths, floor):
    n = torch.tensor(lengths)
    hidden = draw_spans(n, span=10, start_prob=0.001, generator=seeded(), min_spans=floor, T=64)
    assert hidden.shape == (len(lengths), 64) and hidden.dtype == torch.bool
    assert not hidden[torch.arange(64) >= n[:, None]].any()
    if floor:
        assert (hidden.sum(1) >= n.clamp(max=10)).all()


def test_spans_do_not_depend_on_neighbours_or_padding():
    a = draw_spans(torch.tensor([30, 80]), span=5, start_prob=0.1, generator=seeded(3))
    b = draw_spans(torch.tensor([30]), span=5, start_prob=0.1, generator=seeded(3), T=99)
    assert torch.equal(a[0, :30], b[0, :30])


def test_spans_are_whole_unless_cut_by_an_end():
    row = draw_spans(torch.tensor([4000]), span=7, start_prob=0.02, generator=seeded())[0]
    edges = torch.nn.functional.pad(row.int(), (1, 1)).diff()
    runs = (edges == -1).nonzero() - (edges == 1).nonzero()
    assert (runs[1:-1] >= 7).all() and len(runs) > 20


def test_span_configuration():
    config = SpanConfig()
    assert config.frames(0.02) == 10 and config.frames(0.04) == 5 and config.frames(1.0) == 1
    hidden = config.draw(torch.full((200,), 300), generator=seeded())
    assert abs(realised_share(hidden) - 0.4) < 0.02


@pytest.mark.parametrize("wrong", [dict(span=0), dict(start_prob=1.5), dict(min_spans=-1), dict(T=3)], ids=str)
def test_spans_refuse(wrong):
    with pytest.raises(EsslError):
        draw_spans(torch.tensor([5]), generator=seeded(), **{**dict(span=2, start_prob=0.1), **wrong})
    with pytest.raises(EsslError):
        start_prob_for(1.0, 10)


# shared parts

def test_context_rows_replicate_the_edges():
    x = torch.arange(6.0)[:, None]
    assert stack_context(x, [-1, 0, 1], torch.arange(6))[[0, 5]].tolist() == [[0, 0, 1], [4, 5, 5]]
    assert [len(centres(T, 2)) for T in (1, 2, 3, 4)] == [(T - 1) // 2 + 1 for T in (1, 2, 3, 4)]


def test_sample_is_of_all_frames_and_without_repeats():
    lengths = [5, 0, 50, 1, 200]
    picks = sample_frames(lengths, 100, generator=seeded())
    assert [len(p) == len(p.unique()) for p in picks] == [True] * 5 and sum(map(len, picks)) == 100
    assert all((p < n).all() for p, n in zip(picks, lengths))
    assert [len(p) for p in sample_frames(lengths, 10**6, generator=seeded())] == lengths


def test_losses_are_float32_and_finite_when_empty():
    with torch.autocast("cpu", torch.bfloat16):
        head = torch.nn.Linear(4, 5)
        logits = head(torch.randn(3, 4))
        assert logits.dtype == torch.bfloat16
        loss = mean_cross_entropy(logits, torch.tensor([0, 1, 2], dtype=torch.int16))
        error = mean_squared_error(logits, torch.zeros(3, 5, dtype=torch.float16))
    assert loss.dtype == error.dtype == torch.float32
    nothing = torch.zeros(0, 5, requires_grad=True)
    (mean_cross_entropy(nothing, torch.zeros(0)) + mean_squared_error(nothing, nothing)).backward()
    assert accuracy(nothing, torch.zeros(0)) == 0


def test_mean_losses_equal_torch():
    logits, codes = torch.randn(9, 5), torch.randint(5, (9,))
    assert torch.allclose(mean_cross_entropy(logits, codes), torch.nn.functional.cross_entropy(logits, codes))
    assert torch.allclose(mean_squared_error(logits, logits + 2), torch.tensor(4.0))


def test_drawn_share():
    keep = torch.rand(50, 200, generator=seeded()) < 0.5
    some = draw_share(keep, 0.4, generator=seeded(1))
    assert not (some & ~keep).any() and abs(some.sum() / keep.sum() - 0.4) < 0.02
    assert torch.equal(draw_share(keep, 1.0, generator=seeded()), keep) and not draw_share(keep, 0.0, generator=seeded()).any()


def test_one_thread_restores():
    before = torch.get_num_threads()
    with pytest.raises(KeyError), one_thread():
        assert torch.get_num_threads() == 1
        raise KeyError
    assert torch.get_num_threads() == before


# every registered objective

def test_names_and_options():
    assert {"best_rq", "clusters", "hubert", "wav2vec2", "data2vec"} <= set(list_objectives())
    with pytest.raises(UnknownName, match="clusters"):
        build_objective("cluster", DIM)
    with pytest.raises(EsslError, match="unmasked_weight"):
        build_objective("clusters", DIM, unmasked_weights=1)


def test_every_objective_takes_what_a_run_gives(encoder):
    for name in list_objectives():
        task = build_objective(name, DIM, stride=2, first=1, **objectives.get(name).meta["tiny"])
        assert task.stored != task.online and task.copies == 1 and task.identity() == {}
        state = {k: v.clone() for k, v in task.state_dict().items()}
        task.at_step(3, 10)  # no state: nothing to save
        assert all(torch.equal(v, state[k]) for k, v in task.state_dict().items())


def test_objectives_without_hooks_keep_their_form(encoder):
    @objectives.register("plain_guest", tiny={})
    class PlainGuest(Objective):
        def __init__(self, dim, *, stride=2, n_mels=80):
            super().__init__(dim, stride=stride, n_mels=n_mels)

    try:
        task = build_objective("plain_guest", DIM, first=0)
        assert (task.first, task.stored, task.online, task.copies) == (0, True, False, 1)
        assert task.begin(encoder) is task.at_step(0, 1) is task.after_step(encoder) is None
        assert task.online_targets(encoder, None, None, None) == {} == task.identity()
        with pytest.raises(EsslError, match="log-mel"):
            build_objective("plain_guest", DIM, first=1)
    finally:
        objectives.remove("plain_guest")


@pytest.mark.parametrize("name", [n for n in list_objectives() if objectives.get(n).obj.stored])
def test_targets_of_a_front_end_over_the_waveform_begin_later(name, features):
    tasks = [fitted(name, features, stride=1, first=first) for first in (0, 1)]
    tasks[1].load_state_dict(tasks[0].state_dict())
    at, later = (task.label(features["u4"])["codes"] for task in tasks)
    assert len(at) == len(later) and torch.equal(at[1:], later[:-1]) and later[-1] == at[-1]
    assert centres(7, 2, 3).tolist() == [3, 5, 6, 6]


@pytest.mark.parametrize("name", [n for n in list_objectives() if objectives.get(n).obj.online])
@pytest.mark.parametrize("frontend", ["logmel", "wav2vec2"])
def test_online_targets_of_any_front_end(name, frontend, features):
    kw = dict(channels=8) if frontend == "wav2vec2" else {}
    encoder = build_encoder(EncoderConfig(baseline_mixer(), dim=DIM, depth=2, frontend=frontend, frontend_kw=kw), seed=0)
    task = fitted(name, features, encoder=encoder)
    raw, lengths = encoder.frontend.features(torch.randn(2, 9600, generator=seeded()), torch.tensor([9600, 5000]))
    sizes = encoder.frontend.out_lengths(lengths)
    mask = torch.arange(int(sizes.max())) < sizes[:, None]
    span = torch.rand(mask.shape, generator=seeded()) < 0.5
    losses = []
    for fill in (0.0, float("nan")):
        raw = raw.masked_fill((torch.arange(raw.shape[1]) >= lengths[:, None])[..., None], fill)
        targets = task.online_targets(encoder, raw, lengths, mask)
        assert all(v.shape[:2] == mask.shape for v in targets.values())
        task.zero_grad(), encoder.zero_grad()
        frames = encoder.from_features(raw, lengths, span=span, generator=seeded()).frames
        loss = task(frames, targets, span, mask, generator=seeded())
        loss.total.backward()
        losses.append([loss.total, *loss.parts.values(), *(p.grad for p in encoder.parameters() if p.grad is not None)])
    assert all(torch.equal(a, b) for a, b in zip(*losses))


@pytest.mark.parametrize("name", [n for n in list_objectives() if objectives.get(n).obj.online])
def test_several_maskings_share_targets(name, features, encoder):
    task = fitted(name, features, encoder=encoder).eval()
    targets, mask = batch(task, features, ["u0", "u4"], encoder=encoder)
    several = {k: v.repeat_interleave(3, 0) for k, v in targets.items()}
    mask, span = mask.repeat_interleave(3, 0), torch.rand(6, mask.shape[1], generator=seeded()) < 0.4
    x = torch.randn(*span.shape, DIM, generator=seeded())
    together = task(x, several, span, mask, generator=seeded()).parts["masked_loss"]
    if name == "data2vec":  # nothing is sampled: the mean over copies, weighted by hidden frames
        hidden = (span & mask).view(2, 3, -1)
        each = [task(x.view(2, 3, -1, DIM)[:, i], targets, span.view(2, 3, -1)[:, i], mask[::3], generator=seeded()).parts["masked_loss"] for i in range(3)]
        sizes = hidden.sum((0, 2)).float()
        assert torch.allclose(together, (torch.stack(each) * sizes).sum() / sizes.sum())
    assert torch.isfinite(together)


@pytest.mark.parametrize("name", list_objectives())
def test_labels_fit_the_encoder(name, features):
    for stride in (1, 2, 4):
        task = fitted(name, features, stride=stride)
        for T in (1, 2, 7, 60, 61):
            made = task.label(features["u9"][:T])
            assert bool(made) == task.stored
            assert all(len(v) == (T - 1) // stride + 1 for v in made.values())
            assert all(torch.isfinite(v).all() for v in made.values())


@pytest.mark.parametrize("name", list_objectives())
def test_fit_is_deterministic_and_heeds_its_generator(name, features):
    same, again, other = fitted(name, features), fitted(name, features), fitted(name, features, seed=1)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        threaded = fitted(name, features)
    finally:
        torch.set_num_threads(threads)
    for k, v in same.state_dict().items():
        assert torch.equal(v, again.state_dict()[k]) and torch.equal(v, threaded.state_dict()[k]), k
    assert any(not torch.equal(v, other.state_dict()[k]) for k, v in same.state_dict().items())


@pytest.mark.parametrize("name", list_objectives())
def test_state_dict_keeps_the_task(name, features, encoder):
    task = fitted(name, features, encoder=encoder)
    fresh = build_objective(name, DIM, **objectives.get(name).meta["tiny"])
    fresh.begin(build_encoder(encoder.config, seed=5))
    with pytest.raises(EsslError, match="fit"):
        fresh.label(features["u0"])
    fresh.load_state_dict(task.state_dict())
    (made, mask), (again, _) = (batch(t, features, ["u3"], encoder=encoder) for t in (task, fresh))
    assert made and all(torch.equal(v, again[k]) for k, v in made.items())


@pytest.mark.parametrize("name", list_objectives())
def test_pads_cannot_leak(name, features, encoder):
    task, ids = fitted(name, features, encoder=encoder), ["u0", "u4"]
    targets, mask = batch(task, features, ids, encoder=encoder)
    frames = torch.randn(*mask.shape, DIM, generator=seeded())
    span = torch.rand(mask.shape, generator=seeded()) < 0.4
    results = []
    for fill, hidden in ((0.0, span & mask), (float("nan"), span | ~mask)):
        x = frames.masked_fill(~mask[..., None], fill).requires_grad_()
        task.zero_grad()
        poisoned = {k: v.masked_fill(~mask.reshape(*mask.shape, *[1] * (v.ndim - 2)), fill) if v.dtype == torch.float32 else v for k, v in targets.items()}
        total, parts = task(x, poisoned, hidden, mask, generator=seeded())
        total.backward()
        results.append((total.detach(), parts, x.grad, [p.grad.clone() for p in task.parameters() if p.requires_grad]))
    (a, pa, ga, wa), (b, pb, gb, wb) = results
    assert torch.equal(a, b) and all(torch.equal(pa[k], pb[k]) for k in pa)
    assert torch.equal(ga, gb) and (ga[~mask] == 0).all() and all(map(torch.equal, wa, wb))


@pytest.mark.parametrize("name", list_objectives())
@pytest.mark.parametrize("case", ["none hidden", "all hidden", "no real frame"])
def test_losses_stay_finite(name, case, features, encoder):
    task = fitted(name, features, encoder=encoder)
    targets, mask = batch(task, features, ["u1", "u2"], encoder=encoder)
    span = torch.full(mask.shape, case == "all hidden")
    mask = torch.zeros_like(mask) if case == "no real frame" else mask
    nothing = not (span & mask).any()
    x = torch.randn(*mask.shape, DIM, requires_grad=True)
    total, parts = task(x, targets, span, mask, generator=seeded())
    total.backward()
    assert not nothing or parts["masked_loss"] == 0
    assert torch.isfinite(total) and torch.isfinite(x.grad).all() and all(torch.isfinite(v) for v in parts.values())
    assert {"masked_accuracy", "explained"} & set(parts) and parts["masked_loss"] >= 0 and not any(v.requires_grad for v in parts.values())


@pytest.mark.parametrize("name", list_objectives())
def test_loss_under_autocast_is_near_and_float32(name, features, encoder):
    task = fitted(name, features, encoder=encoder)
    targets, mask = batch(task, features, ["u1", "u2"], encoder=encoder)
    x, span = torch.randn(*mask.shape, DIM, generator=seeded()), torch.rand(mask.shape, generator=seeded()) < 0.4
    full = task(x, targets, span, mask, generator=seeded()).total
    with torch.autocast("cpu", torch.bfloat16):
        half = task(x, targets, span, mask, generator=seeded()).total
    assert half.dtype == torch.float32 and abs(half - full) < 0.03 * full


@pytest.mark.parametrize("name", list_objectives())
def test_an_objective_can_be_learnt(name, features, encoder):
    "Free frames, one vector each: the loss must fall and the hidden codes be found."
    task = fitted(name, features, encoder=encoder).eval()  # wav2vec 2.0's codes are the same at every step
    targets, mask = batch(task, features, ["u0", "u1"], encoder=encoder)
    frames = torch.nn.Parameter(0.1 * torch.randn(*mask.shape, DIM, generator=seeded()))
    span = torch.rand(mask.shape, generator=seeded()) < 0.4
    optimiser = torch.optim.Adam([frames, *(p for p in task.parameters() if p.requires_grad)], lr=0.05)
    for step in range(120):
        total, parts = task(frames, targets, span, mask, generator=seeded(step))
        first = parts["masked_loss"].item() if step == 0 else first
        optimiser.zero_grad()
        total.backward()
        optimiser.step()
    assert parts["masked_loss"].item() < 0.3 * first and parts.get("masked_accuracy", parts.get("explained")) > 0.95


def test_label_refuses_what_does_not_fit(features):
    task = fitted("clusters", features)
    for wrong in (torch.zeros(0, 80), torch.zeros(5, 40), torch.zeros(1, 5, 80)):
        with pytest.raises(EsslError):
            task.label(wrong)
    with pytest.raises(EsslError):
        build_objective("clusters", DIM).fit(features, [], generator=seeded())


# BEST-RQ

@pytest.mark.parametrize("shape", [(1, 1), (3, 17), (2, 200)], ids=str)
@pytest.mark.parametrize("entries", [64, 5000, 2**20])
def test_quantiser_equals_the_equation(shape, entries):
    projection, codebook = random_quantiser(160, 16, 256, generator=seeded())
    x = torch.randn(*shape, 160, generator=seeded(1))
    truth = quantise_naive(x.double(), projection.double(), codebook.double())
    assert torch.equal(quantise(x, projection, codebook, entries=entries), truth)


def test_codes_do_not_depend_on_padding():
    projection, codebook = random_quantiser(160, 16, 256, generator=seeded())
    x = torch.randn(1, 40, 160, generator=seeded(1))
    padded = torch.nn.functional.pad(x, (0, 0, 0, 30))
    assert torch.equal(quantise(padded, projection, codebook)[:, :40], quantise(x, projection, codebook))


def test_random_quantiser_has_the_papers_shapes():
    projection, codebook = random_quantiser(320, 16, 8192, generator=seeded())
    assert torch.allclose(codebook.norm(dim=1), torch.ones(8192), atol=1e-5)
    bound = (6 / 336) ** 0.5
    assert projection.abs().max() <= bound and abs(projection.std() - bound / 3**0.5) < 1e-3


def test_stacked_frame_is_centred():
    assert build_objective("best_rq", DIM).offsets == [0, 1]
    assert build_objective("best_rq", DIM, stride=4).offsets == [0, 1, 2, 3]
    assert build_objective("best_rq", DIM, stack=4).offsets == [-1, 0, 1, 2]


def test_best_rq_counts_hidden_frames_alone(features):
    task = fitted("best_rq", features)
    targets, mask = batch(task, features, ["u0"])
    span = torch.zeros_like(mask)
    span[0, 3:9] = True
    x = torch.randn(*mask.shape, DIM)
    truth = torch.nn.functional.cross_entropy(task.head(x[0, 3:9]), targets["codes"][0, 3:9].long())
    assert torch.allclose(task(x, targets, span, generator=seeded()).total, truth)


def test_quantiser_memory_in_small():
    rows = quantiser_memory(20, codebook=4096)["rows"]
    assert rows[0]["mib"] < 40 < 100 < rows[1]["mib"] and rows[0]["codes_sha"] == rows[1]["codes_sha"]


@pytest.mark.slow
def test_quantiser_memory_at_full_size():
    ours, naive = quantiser_memory(400)["rows"]
    assert naive["mib"] > 4900 and ours["mib"] < 100 and ours["codes_sha"] == naive["codes_sha"]


# cluster targets

def test_context_is_whitened_and_read_at_the_centres(features):
    task = fitted("clusters", features, stride=1)
    every = task.label(features["u5"])
    halved = fitted("clusters", features, stride=2).label(features["u5"])
    assert torch.equal(every["codes"][::2], halved["codes"]) and torch.allclose(every["context"][::2], halved["context"], atol=2e-3)
    context = torch.cat([task.label(features[i])["context"].float() for i in features])
    assert context.mean(0).abs().max() < 0.3 and (context.var(0) - 1).abs().max() < 0.5


def test_codes_hear_neither_channel_nor_a_filter(features):
    task, mel = fitted("clusters", features), features["u6"]
    assert torch.equal(task.label(mel)["codes"], task.label(mel + torch.linspace(-2, 2, 80))["codes"])
    assert torch.isfinite(normalise_utterance(torch.full((1, 80), -18.4))).all()


def test_recipe_shapes():
    task = build_objective("clusters", 192)
    assert task.near.axes.shape == (91, 40) and task.wide.axes.shape == (720, 64) and task.centroids.shape == (500, 40)
    assert task.near.offsets == [-6, -4, -2, 0, 2, 4, 6] and task.wide.offsets == list(range(-8, 9, 2))


def test_the_loss_is_the_formula(features):
    task = fitted("clusters", features, unmasked_share=1.0)
    targets, mask = batch(task, features, ["u0", "u3"])
    x, span = torch.randn(*mask.shape, DIM, generator=seeded()), torch.rand(mask.shape, generator=seeded()) < 0.4
    loss = task(x, targets, span, mask, generator=seeded())
    hidden, seen = mask & span, mask & ~span
    ce = lambda k: torch.nn.functional.cross_entropy(task.code_head(x[k]), targets["codes"][k].long())
    mse = lambda k: torch.nn.functional.mse_loss(task.context_head(x[k]), targets["context"][k].float())
    truth = ce(hidden) + 1.0 * ce(seen) + 3.0 * 0.5 * (mse(hidden) + mse(seen))
    assert torch.allclose(loss.total, truth, rtol=1e-5)
    assert torch.allclose(loss.parts["hidden_share"], hidden.sum() / mask.sum())


@pytest.mark.parametrize("weight, part", [("masked_weight", "masked_loss"), ("unmasked_weight", "unmasked_loss")])
def test_each_weight_weighs(weight, part, features):
    one, five = fitted("clusters", features), fitted("clusters", features, **{weight: 5.0})
    targets, mask = batch(one, features, ["u0"])
    x, span = torch.randn(*mask.shape, DIM, generator=seeded()), torch.rand(mask.shape, generator=seeded()) < 0.4
    a, b = (task(x, targets, span, mask, generator=seeded()) for task in (one, five))
    assert torch.allclose(b.total - a.total, 4 * a.parts[part], rtol=1e-4)


@pytest.mark.parametrize("name", ["clusters", "hubert"])
def test_soft_targets_keep_the_codes_and_soften_the_loss(name, features):
    hard, soft = fitted(name, features), fitted(name, features, soft=0.3)
    (made, mask), (softly, _) = (batch(task, features, ["u0", "u3"]) for task in (hard, soft))
    real = mask[..., None].expand(-1, -1, 8)
    assert torch.equal(made["codes"], softly["codes"]) and softly["posterior"].dtype == torch.float16
    assert torch.allclose(softly["posterior"].float().sum(-1)[mask], torch.ones(()), atol=2e-3) and (softly["posterior"][real] >= 0).all()
    x, span = torch.randn(*mask.shape, DIM, generator=seeded()), torch.rand(mask.shape, generator=seeded()) < 0.4
    a, b = (task(x, t, span, mask, generator=seeded()).parts for task, t in ((hard, made), (soft, softly)))
    assert a["masked_loss"] != b["masked_loss"] and torch.equal(a["masked_accuracy"], b["masked_accuracy"])
    assert "spread" not in fitted("clusters", features).state_dict()  # hard clusters are stored as before
    with pytest.raises(EsslError, match="soft"):
        build_objective(name, DIM, soft=-1.0)


@pytest.mark.parametrize("wrong", [dict(clusters=1), dict(clusters=40_000), dict(unmasked_share=1.2)], ids=str)
def test_clusters_refuse(wrong):
    with pytest.raises(EsslError):
        Clusters(DIM, **wrong)


# health

def test_ranks_at_their_limits():
    noise = torch.randn(20_000, 16, generator=seeded())
    assert abs(effective_rank(noise) - 16) < 0.1 and abs(rankme(noise) - 16) < 0.1
    assert abs(effective_rank(noise[:, :1] * torch.ones(16)) - 1) < 1e-6
    assert effective_rank(torch.ones(10, 16)) == 0 and math.isclose(rankme(torch.ones(10, 16)), 1, rel_tol=1e-6)
    values = torch.tensor([4.0, 2.0, 1.0])
    spread = noise[:, :3] @ torch.diag(values.sqrt())
    eigen = torch.linalg.eigvalsh(spread.double().T.cov())
    assert math.isclose(effective_rank(spread), float(eigen.sum() ** 2 / eigen.square().sum()), rel_tol=1e-6)


def test_code_usage():
    assert code_usage(torch.arange(32).repeat(3), 32) == pytest.approx(dict(perplexity=32, used=1, largest=1 / 32))
    assert code_usage(torch.full((9,), 4, dtype=torch.int16), 8) == pytest.approx(dict(perplexity=1, used=1 / 8, largest=1))
    with pytest.raises(EsslError):
        code_usage(torch.tensor([0, 8]), 8)


def test_agreement_at_its_limits():
    draw = seeded()
    a, b = torch.randint(12, (9000,), generator=draw), torch.randint(5, (9000,), generator=draw)
    assert agreement(b, b) == pytest.approx(dict(purity=1, pnmi=1)) and agreement(a, b)["pnmi"] < 0.01
    score = pytest.importorskip("sklearn.metrics").mutual_info_score(b.numpy(), (a % 5 + b).numpy())
    share = torch.bincount(b).double() / len(b)
    assert agreement(a % 5 + b, b)["pnmi"] == pytest.approx(score / float(torch.special.entr(share).sum()))


def test_health_and_verdicts():
    frames = torch.randn(900, 64, generator=seeded())
    codes = frames.argmax(-1)
    well = health_of(frames, logits=frames, codes=codes, hidden=torch.arange(900) < 400)
    assert well["masked_accuracy"] == 1 and well["effective_rank"] > 50 and collapsed(well, 10**6) is None
    flat = health_of(frames[:, :1] * torch.ones(64) + 0.01 * frames)
    assert not is_collapsed(flat, 100) and "effective" in collapsed(flat, 600) and not is_collapsed(flat, 600, settle_steps=900)
    stuck = health_of(frames, logits=torch.eye(64)[[5]].expand(900, -1), codes=codes)
    assert "one code" in collapsed(stuck, 600)
    sick = health_of(frames.masked_fill(frames > 3, float("nan")))
    assert "NaN" in collapsed(sick, 1)


def test_narrow_encoders_are_not_called_dead():
    assert not is_collapsed(health_of(torch.randn(500, 8, generator=seeded())), 1000)
