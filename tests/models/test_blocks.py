"""Blocks that mix by themselves, around every mixer: the padding law, causality, gradients, files."""
import pytest
import torch

from essl_nb.core.config import derive_seed
from essl_nb.core.registry import EsslError
from essl_nb.core.shapes import lengths_to_mask
from essl_nb.mixers.base import influence, list_mixers, mixers
from essl_nb.models.block import blocks
from essl_nb.models.config import EncoderConfig
from essl_nb.models.conformer import BranchformerBlock, ConformerBlock, ConvolutionModule, DepthwiseConv, GatedBranch
from essl_nb.models.encoder import build_encoder, load_encoder

BLOCKS = (ConformerBlock, BranchformerBlock)
CONTROL = next(e.name for e in mixers if e.meta.get("control"))
FORMS = [(name, causal) for name in list_mixers() for causal in (False, True) if not causal or mixers.get(name).obj.can_be_causal]
D, LENGTHS = 16, (21, 13, 5)

of_blocks = pytest.mark.parametrize("cls", BLOCKS, ids=lambda c: c.__name__)
of_forms = pytest.mark.parametrize("name, causal", FORMS, ids=lambda v: v if isinstance(v, str) else "causal" if v else "both-ways")


def small(cls, name, causal=False, dtype=torch.float64, **kw):
    "A block with weights that hide nothing: gates begin at one, filters of the gate near zero."
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed("block", name))
        block = cls(D, mixer=name, mixer_kw=mixers.get(name).meta.get("tiny", {}), causal=causal, **{"kernel": 5, **kw})
        with torch.no_grad():
            for p in block.parameters():
                p.add_(0.1 * torch.randn_like(p))
    return block.to(dtype)


def frames(lengths=LENGTHS, pads=0.0, dtype=torch.float64):
    mask = lengths_to_mask(torch.tensor(lengths))
    x = torch.randn(*mask.shape, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(dtype)
    return torch.where(mask[..., None], x, pads), mask


def outcome(block, x, mask):
    "Frames, layer_state, and gradients of the input and of every parameter."
    x = x.clone().requires_grad_()
    y, layer_state = block(x, mask)
    named = {"x": x, **dict(block.named_parameters())}
    grads = torch.autograd.grad(y.square().sum(), list(named.values()), allow_unused=True, materialize_grads=True)
    return {"frames": y, **(layer_state or {}), **{f"gradient of {n}": g for n, g in zip(named, grads)}}


@of_blocks
@of_forms
def test_nan_in_the_pads_reaches_neither_outputs_nor_gradients(cls, name, causal):
    block = small(cls, name, causal)
    clean, dirty = (outcome(block, *frames(pads=pads)) for pads in (0.0, torch.nan))
    assert clean.keys() == dirty.keys()
    for what in clean:
        torch.testing.assert_close(dirty[what], clean[what], rtol=1e-9, atol=1e-9, msg=lambda m: f"{what}: {m}")
    mask = frames()[1]
    assert dirty["frames"][~mask].abs().max() == 0 and dirty["gradient of x"][~mask].abs().max() == 0


@of_blocks
@of_forms
def test_a_padded_batch_equals_each_utterance_alone(cls, name, causal):
    block, (x, mask) = small(cls, name, causal), frames(pads=torch.nan)
    together = block(x, mask)[0]
    for b, n in enumerate(LENGTHS):
        torch.testing.assert_close(together[b, :n], block(x[b : b + 1, :n])[0][0], rtol=1e-9, atol=1e-9)


@of_blocks
@of_forms
def test_gradients_are_finite_and_every_part_has_one(cls, name, causal):
    found = outcome(small(cls, name, causal), *frames(lengths=(21, 13, 0)))
    assert all(v.isfinite().all() for v in found.values()), [k for k, v in found.items() if not v.isfinite().all()]
    silent = [k for k, v in found.items() if k.startswith("gradient") and ".mixer." not in f".{k[12:]}" and v.abs().max() == 0]
    assert not silent, f"these parts take no part: {silent}"


@of_blocks
@of_forms
def test_bfloat16_autocast(cls, name, causal):
    block, (x, mask) = small(cls, name, causal, torch.float32), frames(pads=torch.nan, dtype=torch.float32)
    exact = block(x, mask)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = outcome(block, x, mask)
    assert all(v.isfinite().all() for v in found.values())
    assert (found["frames"] - exact)[mask].norm() < 0.05 * exact[mask].norm()


@of_blocks
@pytest.mark.parametrize("name", [n for n, causal in FORMS if causal])
def test_a_causal_block_does_not_look_ahead(cls, name):
    block, (x, _) = small(cls, name, True), frames((21, 21))
    for t in (1, 8, 20):
        other = torch.cat([x[:, :t], 10 + 2 * x[:, t:]], 1)
        torch.testing.assert_close(block(other)[0][:, :t], block(x)[0][:, :t], rtol=1e-9, atol=1e-9)


@of_blocks
@of_forms
def test_encoders_are_built_saved_and_loaded(cls, name, causal, tmp_path):
    block = next(e.name for e in blocks if e.obj is cls)
    config = EncoderConfig(name, dim=D, depth=2, block=block, causal=causal, mixer_kw=mixers.get(name).meta.get("tiny", {}), block_kw=dict(kernel=7))
    encoder = build_encoder(config, seed=0).eval()
    assert encoder.norm_first
    wav, lengths = 0.1 * torch.randn(2, 8000, generator=torch.Generator().manual_seed(0)), torch.tensor([8000, 5333])
    out = encoder(wav, lengths)
    alone = encoder(wav[1:, :5333]).frames
    torch.testing.assert_close(out.frames[1, : alone.shape[1]], alone[0], atol=2e-4, rtol=1e-4)
    assert len(out.layers) == 3 and out.layers[-1] is out.frames
    again = load_encoder(encoder.save(tmp_path))
    assert again.config == config and torch.equal(again.eval()(wav, lengths).frames, out.frames)


@of_blocks
@pytest.mark.parametrize("kernel, causal, past, ahead", [(5, False, 2, 2), (5, True, 4, 0), (4, True, 3, 0), (1, False, 0, 0)])
def test_the_block_itself_reaches_as_far_as_its_kernel(cls, kernel, causal, past, ahead):
    block = small(cls, CONTROL, causal, kernel=kernel)
    seen = influence(lambda x: block(x)[0], frames((21,))[0], queries=[10], probes=None)[0, 0].nonzero()
    assert (int(seen.min()), int(seen.max())) == (10 - past, 10 + ahead)


@of_blocks
def test_a_mixer_that_is_a_whole_block_brings_its_norm(cls):
    whole = [n for n in list_mixers() if mixers.get(n).obj.whole_block]
    assert whole
    for name in list_mixers():
        assert isinstance(small(cls, name).mixer_norm, torch.nn.Identity) == (name in whole)


@of_blocks
def test_what_the_mixer_hands_on_passes_through(cls):
    handed = {"something": torch.ones(1, 1)}
    assert small(cls, CONTROL)(frames((21,))[0], None, handed)[1] is handed
    for name in list_mixers():
        if mixers.get(name).obj.passes_state:
            block, follower, (x, mask) = small(cls, name), small(cls, name), frames()
            follower.mixer.follow()
            y, layer_state = block(x, mask)
            z = follower(y, mask, layer_state)[0]
            without = follower(y, mask, {k: 0 * v for k, v in layer_state.items()})[0]
            assert (z - without).abs().max() > 0


@pytest.mark.parametrize("cls", [DepthwiseConv, ConvolutionModule, GatedBranch])
def test_a_kernel_without_a_middle_is_refused(cls):
    for kernel in (0, 4):
        with pytest.raises(EsslError, match="has no middle frame"):
            cls(D, kernel=kernel)
    cls(D, kernel=4, causal=True)


@of_blocks
def test_options_reach_the_block_by_the_configuration(cls):
    block = next(e.name for e in blocks if e.obj is cls)
    with pytest.raises(EsslError, match="takes no option 'kernl'.*kernel"):
        EncoderConfig(CONTROL, block=block, block_kw=dict(kernl=15))
    assert build_encoder(EncoderConfig(CONTROL, dim=D, depth=1, block=block, block_kw=dict(kernel=15)), seed=0).blocks[0](torch.randn(1, 9, D))[0].shape == (1, 9, D)


def test_a_fresh_gate_is_open():
    branch, x = GatedBranch(D), torch.randn(2, 40, D)
    a, _ = torch.nn.functional.gelu(branch.inner(branch.norm(x))).chunk(2, -1)
    torch.testing.assert_close(branch(x), branch.outer(a), atol=1e-4, rtol=1e-4)


@of_blocks
def test_dropout_is_for_training_only(cls):
    block, (x, _) = small(cls, CONTROL, dropout=0.5), frames((21,))
    assert not torch.equal(block(x)[0], block(x)[0])
    block.eval()
    assert torch.equal(block(x)[0], block(x)[0])


@of_blocks
@pytest.mark.parametrize("ff_mult", [0.75, 1.5, 4])
def test_any_feed_forward_width(cls, ff_mult):
    x = frames((21,))[0]
    assert small(cls, CONTROL, ff_mult=ff_mult)(x)[0].shape == x.shape


@of_blocks
def test_nothing_is_computed_on_the_meta_device(cls):
    with torch.device("meta"):
        y, _ = cls(D, mixer=CONTROL, mixer_kw={})(torch.empty(2, 30, D))
    assert y.shape == (2, 30, D) and y.device.type == "meta"
