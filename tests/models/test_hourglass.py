"""Blocks at lower frame rates, blocks that are used again, weights of few values: around every mixer."""
import pytest
import torch

from essl_nb.core.config import derive_seed, from_json, to_json
from essl_nb.core.registry import EsslError
from essl_nb.core.shapes import lengths_to_mask
from essl_nb.costs.macs import encoder_macs
from essl_nb.mixers.base import baseline_mixer, influence, list_mixers, mixers
from essl_nb.models.config import EncoderConfig
from essl_nb.models.encoder import build_encoder, form_of, form_set, load_encoder
from essl_nb.models.hourglass import HourglassBlock, usual_rates
from essl_nb.models.low_bits import RoundedLinear, rounded, row_levels, row_scales
from essl_nb.train.config import PretrainConfig

CONTROL = next(e.name for e in mixers if e.meta.get("control"))
FORMS = [(name, causal) for name in list_mixers() for causal in (False, True) if not causal or mixers.get(name).obj.can_be_causal]
D, LENGTHS = 16, (21, 13, 5, 2, 1)
BASELINE = baseline_mixer()
tiny = lambda name: mixers.get(name).meta.get("tiny", {})

of_forms = pytest.mark.parametrize("name, causal", FORMS, ids=lambda v: v if isinstance(v, str) else "causal" if v else "both-ways")


def noisy(module):
    "Weights that hide nothing."
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return module.double().eval()


def small(name, causal=False, rate=2, **kw):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed("hourglass", name))
        return noisy(HourglassBlock(D, mixer=name, mixer_kw=tiny(name), causal=causal, rate=rate, kernel=3, **kw))


def frames(pads=0.0, lengths=LENGTHS):
    mask = lengths_to_mask(torch.tensor(lengths))
    x = torch.randn(*mask.shape, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return torch.where(mask[..., None], x, pads), mask


def outcome(block, x, mask):
    "Frames, and gradients of the input and of every parameter."
    x = x.clone().requires_grad_()
    y, _ = block(x, mask)
    named = {"x": x, **dict(block.named_parameters())}
    grads = torch.autograd.grad(y.square().sum(), list(named.values()), allow_unused=True, materialize_grads=True)
    return {"frames": y, **{f"gradient of {n}": g for n, g in zip(named, grads)}}


@of_forms
def test_nan_in_the_pads_reaches_nothing_and_a_batch_equals_each_alone(name, causal):
    block, mask = small(name, causal, ff_rate=6), frames()[1]
    clean, dirty = (outcome(block, *frames(pads)) for pads in (0.0, torch.nan))
    for what in clean:
        torch.testing.assert_close(dirty[what], clean[what], rtol=1e-9, atol=1e-9, msg=lambda m: f"{what}: {m}")
    assert dirty["frames"][~mask].abs().max() == 0 and dirty["gradient of x"][~mask].abs().max() == 0
    for b, n in enumerate(LENGTHS):
        torch.testing.assert_close(dirty["frames"][b, :n], block(frames()[0][b : b + 1, :n])[0][0], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("rate, ff_rate", [(2, 4), (1, 3), (4, 4)])
@pytest.mark.parametrize("name", [n for n, causal in FORMS if causal and mixers.get(n).obj.streams])
def test_a_causal_stream_in_any_pieces_is_the_whole_utterance(name, rate, ff_rate):
    block, x = small(name, True, rate, ff_rate=ff_rate), frames(lengths=(21, 21))[0]
    for pieces in ((1,) * 21, (3, 7, 1, 2, 8), (5, 16)):
        state, made = block.init_state(2, dtype=torch.float64), []
        for part in x.split(pieces, 1):
            y, state = block.step(part, state)
            made.append(y)
        torch.testing.assert_close(torch.cat(made, 1), block(x)[0], rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("name", [n for n in list_mixers() if mixers.get(n).obj.can_be_chunked])
def test_a_stream_of_chunks_is_the_whole_utterance(name):
    block, x = small(name, ff_rate=4), frames(lengths=(21, 21))[0]
    block.set_chunk(8)
    state, made = block.init_state(2, dtype=torch.float64), []
    for part in x.split(8, 1):  # the last one is cut short
        y, state = block.step(part, state)
        made.append(y)
    torch.testing.assert_close(torch.cat(made, 1), block(x)[0], rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("causal", [False, True])
def test_groups_reach_as_far_as_they_must_and_no_further(causal):
    block = small(CONTROL, causal, rate=4)
    block.local = None
    seen = [influence(lambda x: block(x)[0], frames(lengths=(21,))[0], queries=[t], probes=None)[0, 0].nonzero().flatten().tolist() for t in (8, 9, 11)]
    assert seen == ([[5, 6, 7, 8], [5, 6, 7, 8, 9], [5, 6, 7, 8, 11]] if causal else 3 * [[8, 9, 10, 11]])


def test_gradients_by_differences():
    block, x = small(CONTROL, ff_rate=4), frames(lengths=(5,))[0].requires_grad_()
    names = [name for name, _ in block.named_parameters() if "grouping" in name]
    given = [block.get_parameter(name).detach().requires_grad_() for name in names]
    assert len(names) == 4 and torch.autograd.gradcheck(lambda x, *given: torch.func.functional_call(block, dict(zip(names, given)), (x,))[0], (x, *given))


def test_the_usual_rates_go_down_and_come_back():
    assert [usual_rates(d) for d in (1, 2, 3, 4, 6)] == [(1,), (1, 2), (1, 2, 1), (1, 2, 4, 1), (1, 2, 2, 4, 4, 1)]


def test_lower_rates_are_less_arithmetic():
    of = lambda *rates: encoder_macs(EncoderConfig(CONTROL, block="hourglass", block_kw=dict(rates=list(rates))), 10)["total"]
    assert of(1, 1, 1, 1) > of(1, 2, 2, 1) > of(1, 2, 4, 1) > of(4, 4, 4, 4)
    apart = lambda ff: encoder_macs(EncoderConfig(CONTROL, block="hourglass", block_kw=dict(rates=[1] * 4, ff_rates=[ff] * 4)), 10)
    whole, half, quarter = (apart(ff)["total"] for ff in (1, 2, 4))
    assert whole - half == pytest.approx(2 * (half - quarter)) and apart(4)["mixer"] == apart(1)["mixer"]


def config(**kw):
    return EncoderConfig(**{**dict(mixer=CONTROL, dim=D, depth=4), **kw})


@pytest.mark.parametrize("block, options, words", [
    ("hourglass", dict(rates=[1, 2]), "one whole number for each block"),
    ("hourglass", dict(rates=[1, 0, 2, 1]), "one whole number for each block"),
    ("hourglass", dict(rate=2), "takes no option 'rate'.*rates"),
    ("hourglass", dict(rates=[1, 2, 2, 1], ff_rates=[1, 3, 2, 1]), "a multiple of the block's own rate"),
    ("hourglass", dict(rates=[1, 2, 2, 1], ff_rates=[2, 2]), "one whole number for each block"),
    ("looped", dict(sharing=[0, 1, 1]), "one whole number for each block"),
    ("looped", dict(sharing=[0, 0, 1, 0]), "block 2 the same as block 1, and they differ in rate"),
    ("looped", dict(exit=0), "it can be 1 to 2"),
    ("looped", dict(exit=3), "it can be 1 to 2"),
    ("looped", dict(rank=-1), "rank=-1 was given"),
])
def test_what_cannot_be_is_refused_in_one_sentence(block, options, words):
    with pytest.raises(EsslError, match=words):
        build_encoder(config(block=block, block_kw=options))


def test_chunks_that_a_rate_does_not_divide_are_refused():
    encoder = build_encoder(config(mixer=BASELINE, block="hourglass"), seed=0)
    with pytest.raises(EsslError, match="chunk of 6 frames.*multiple of 4"):
        encoder.set_chunk(6)
    encoder.set_chunk(8)
    assert [b.mixer.chunk_frames for b in encoder.blocks] == [8, 4, 2, 8]


@of_forms
def test_looped_encoders_are_saved_once_and_read_back(name, causal, tmp_path):
    encoder = build_encoder(config(mixer=name, mixer_kw=tiny(name), causal=causal, block="looped", block_kw=dict(kernel=3, rank=2)), seed=0)
    noisy(encoder).float()
    wav = 0.1 * torch.randn(2, 8000, generator=torch.Generator().manual_seed(0))
    again = load_encoder(encoder.save(tmp_path))
    assert torch.equal(again(wav).frames, encoder(wav).frames) and again.config == encoder.config
    apart = build_encoder(config(mixer=name, mixer_kw=tiny(name), causal=causal, block="hourglass", block_kw=dict(kernel=3, rates=[1, 2, 2, 1])), seed=0)
    stored = lambda e: sum(t.numel() for t in e.state_dict().values())
    assert again.parameter_count() < 0.8 * apart.parameter_count() and stored(again) < 0.8 * stored(apart)


def test_exits_are_prefixes_of_the_loop_and_keep_the_number_of_layers():
    encoder = noisy(build_encoder(config(depth=5, block="looped"), seed=0)).float()
    wav = 0.1 * torch.randn(1, 8000, generator=torch.Generator().manual_seed(0))
    whole = encoder(wav)
    with form_set(encoder, exit=2):
        early = encoder(wav)
        assert form_of(encoder.config)["exit"] == 2 and encoder_macs(encoder.config, 4)["total"] < encoder_macs(config(depth=5, block="looped"), 4)["total"]
    assert len(early.layers) == len(whole.layers) == 6
    assert all(torch.equal(a, b) for a, b in zip(early.layers[:4], whole.layers[:4])) and torch.equal(early.layers[4], early.layers[3])
    assert torch.equal(encoder(wav).frames, whole.frames) and encoder.config == config(depth=5, block="looped")


@pytest.mark.parametrize("kind, most", [("int4", 7), ("ternary", 1)])
def test_rows_are_multiples_of_their_scale(kind, most):
    w = torch.randn(5, 40, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 5)[:, None]
    levels = row_levels(w, row_scales(w, kind), kind)
    assert levels.abs().max() == most and torch.equal(levels, levels.round())
    torch.testing.assert_close(rounded(w, kind), levels * row_scales(w, kind))
    assert rounded(torch.zeros(2, 3), kind).abs().max() == 0


@pytest.mark.parametrize("block", ["hourglass", "looped"])
def test_rounding_is_in_the_weights_used_and_nowhere_else(block, tmp_path):
    encoder = build_encoder(config(mixer=BASELINE, block=block, rounding="ternary"), seed=0).eval()
    layers = [m for m in encoder.blocks.modules() if isinstance(m, torch.nn.Linear)]
    assert layers and all(isinstance(m, RoundedLinear) and m.kind == "ternary" for m in layers)
    assert all(rounded(m.whole(), m.kind).unique(dim=1).shape for m in layers) and not any(isinstance(m, RoundedLinear) for m in encoder.frontend.modules())
    wav = 0.1 * torch.randn(1, 8000, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        few, again = encoder(wav).frames, load_encoder(encoder.save(tmp_path))(wav).frames
        with form_set(encoder, rounding=None):
            whole = encoder(wav).frames
    assert torch.equal(few, again) and not torch.allclose(few, whole)
    encoder(wav).frames.square().sum().backward()
    assert all(m.weight.grad.abs().max() > 0 for m in layers)


def test_a_training_draws_one_form_at_each_step_and_keeps_old_names():
    plain = PretrainConfig(encoder=config(block="looped", depth=5))
    several = PretrainConfig(encoder=config(block="looped", depth=5), exits=(1, 2, None), roundings=(None, "ternary"))
    assert from_json(PretrainConfig, to_json(several)) == several and plain.forms() == {"chunk": (), "exit": (), "rounding": ()}
    assert "rounding" not in repr(plain.encoder)


@pytest.mark.parametrize("kind, per_weight", [("int4", 0.5), ("ternary", 0.2)])
def test_files_of_few_bits_hold_what_is_computed_with(kind, per_weight, tmp_path):
    encoder = build_encoder(config(mixer=BASELINE, dim=64, depth=2, rounding=kind), seed=0).eval()
    wav = 0.1 * torch.randn(1, 8000, generator=torch.Generator().manual_seed(0))
    again = load_encoder(encoder.save(tmp_path / "few", dtype=kind))
    assert kind in again.stored_as and again.config.rounding is None
    for (name, a), (_, b) in zip(encoder.blocks.named_modules(), again.blocks.named_modules(), strict=True):
        if isinstance(a, torch.nn.Linear):
            torch.testing.assert_close(b.weight, rounded(a.weight, kind), rtol=1e-3, atol=1e-6, msg=lambda m: f"{name}: {m}")
    torch.testing.assert_close(again(wav).frames, encoder(wav).frames, rtol=0.05, atol=0.05)
    linear = sum(m.weight.numel() for m in encoder.blocks.modules() if isinstance(m, torch.nn.Linear))
    size = lambda folder: (folder / "model.safetensors").stat().st_size
    assert size(encoder.save(tmp_path / "eight", dtype=torch.int8)) - size(tmp_path / "few") > (0.9 - per_weight) * linear


def test_files_of_few_bits_that_would_be_another_encoder_are_refused(tmp_path):
    with pytest.raises(EsslError, match="set_rounding.'ternary'. first"):
        build_encoder(config(), seed=0).save(tmp_path / "a", dtype="ternary")
    with pytest.raises(EsslError, match="share weights"):
        build_encoder(config(block="looped"), seed=0).save(tmp_path / "a", dtype="int4")
    with pytest.raises(EsslError, match="dtype=int3"):
        build_encoder(config(), seed=0).save(tmp_path / "a", dtype="int3")
    assert not (tmp_path / "a").exists()
