"""The mixers: the battery over all that is registered, and parity with other libraries and with the equations."""
import math
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from essl_nb.core.count import count_macs
from essl_nb.core.registry import EsslError, UnknownName
from essl_nb.core.shapes import lengths_to_mask, masked_mean, zero_pads
from essl_nb.mixers.attention import Attention, rotate
from essl_nb.mixers.base import Mixer, build_mixer, influence, list_mixers, mixers
from essl_nb.mixers.checks import MIXER_CHECKS, BrokenContract, LargestTensor, check_mixer, small_batch, small_mixer
from essl_nb.mixers.convnext import ConvNeXt
from essl_nb.mixers.fnet import FNet
from essl_nb.mixers.none import NoMixing
from essl_nb.mixers.summary import Summary
from essl_nb.ops.temporal import depthwise


@pytest.fixture
def draw():
    return torch.Generator().manual_seed(0)


@pytest.fixture(autouse=True)
def seeded():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.fixture
def registering():
    "A decorator like `mixers.register` whose mixers are forgotten after the test."
    added = []

    def register(name, **meta):
        added.append(name)
        return mixers.register(name, **meta)

    yield register
    for name in added:
        mixers.remove(name)


@pytest.mark.parametrize("check", MIXER_CHECKS)
@pytest.mark.parametrize("name", list_mixers())
def test_battery(name, check):
    MIXER_CHECKS[check](mixers.get(name))


def test_every_module_of_the_folder_is_imported():
    import pkgutil

    import essl_nb.mixers as folder

    assert all(f"essl_nb.mixers.{m.name}" in sys.modules for m in pkgutil.iter_modules(folder.__path__))
    assert {e.obj.__module__ for e in mixers} <= {f"essl_nb.mixers.{m.name}" for m in pkgutil.iter_modules(folder.__path__)}


def test_one_decorator_is_all_the_registration(registering):
    @registering("running average", family="pooling", complexity="T", paper="")
    class Average(Mixer):
        streams = False
        can_be_causal = False

        def forward(self, x, mask=None):
            return zero_pads(masked_mean(x, mask)[:, None].expand_as(x), mask)

    assert "running average" in list_mixers() and "running average" in list_mixers("pooling")
    assert "all" in check_mixer("running average")
    mixer = build_mixer("running average", 8)
    x = torch.randn(2, 5, 8)
    assert torch.allclose(mixer.influence(x, probes=None), torch.full((2, 5, 5), 8**0.5 / 5))
    assert mixer.macs(10) == 0 and mixer.state_bytes(10) is None


class Broken(Mixer):
    "A correct causal average of two frames, to be broken one property at a time."

    def __init__(self, dim, *, causal=False):
        super().__init__(dim, causal=True)
        self.gain = nn.Parameter(torch.ones(dim))

    def blend(self, x):
        return (x + F.pad(x, (0, 0, 1, 0))[:, :-1]) * self.gain

    def forward(self, x, mask=None):
        return zero_pads(self.blend(zero_pads(x, mask)), mask)

    def init_state(self, batch, *, device=None, dtype=None):
        return {"last": torch.zeros(batch, 1, self.dim, **self.state_options(device, dtype))}

    def step(self, x, state):
        return self.blend(torch.cat([state["last"], x], 1))[:, 1:], {"last": x[:, -1:].clone()}


def test_the_unbroken_one_passes(registering):
    registering("whole", family="convolution", complexity="T", paper="")(Broken)
    check_mixer("whole")


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, g):
        return 2.1 * g


BREAKS = {
    "shape": dict(forward=lambda self, x, mask=None: Broken.forward(self, x, mask)[..., :-1]),
    "padding": dict(forward=lambda self, x, mask=None: zero_pads(self.blend(x.flip(1)).flip(1), mask)),
    "padding gradient": dict(forward=lambda self, x, mask=None: zero_pads(x.nan_to_num() * self.gain, mask) if mask is None else torch.where(mask[..., None], x * self.gain, 0.0 * self.gain)),
    "batch": dict(forward=lambda self, x, mask=None: Broken.forward(self, x, mask) * x.shape[1]),
    "empty row": dict(forward=lambda self, x, mask=None: Broken.forward(self, x, mask) / (1 if mask is None else (mask.sum(1) / mask.sum(1))[:, None, None])),
    "causality": dict(forward=lambda self, x, mask=None: Broken.forward(self, x, mask) + zero_pads(masked_mean(x, mask)[:, None].expand_as(x), mask)),
    "streaming": dict(step=lambda self, x, state: (self.blend(torch.cat([state["last"], x], 1))[:, 1:], {"last": x[:, :1]})),
    "gradient": dict(forward=lambda self, x, mask=None: Doubled.apply(Broken.forward(self, x, mask))),
    "state": dict(blend=lambda self, x: Broken.blend(self, x) * self.secret, __init__=lambda self, dim, *, causal=False: (Broken.__init__(self, dim), setattr(self, "secret", torch.rand(()).item()))[0]),
    "meta": dict(forward=lambda self, x, mask=None: Broken.forward(self, x, mask) * (1 if x.sum().item() else 2)),
    "macs": dict(forward=lambda self, x, mask=None: Broken.forward(self, x, mask) + 0 * (zero_pads(x, mask) @ zero_pads(x, mask).mT @ zero_pads(x, mask))),
    "layer state": dict(passes_state=True, forward=lambda self, x, mask=None, layer_state=None, *, return_state=False: (Broken.forward(self, x, mask), {"mean": x.mean(1)}) if return_state else Broken.forward(self, x, mask)),
    "half": dict(forward=lambda self, x, mask=None: Broken.forward(self, x.float() if x.dtype == torch.bfloat16 else x, mask)),
    "every weight": dict(__init__=lambda self, dim, *, causal=False: (Broken.__init__(self, dim), setattr(self, "unheard", torch.nn.Parameter(torch.zeros(1))))[0]),
    "memory": dict(forward=lambda self, x, mask=None: Broken.forward(self, x, mask) + 0 * zero_pads(x[:, :1].repeat(1, x.shape[1] ** 2 // 64 + 1, 1)[:, : x.shape[1]], mask)),
    "refusal": dict(can_be_causal=False),
}


@pytest.mark.parametrize("check", BREAKS)
def test_the_battery_finds(check, registering):
    broken = type("Broken" + check.title().replace(" ", ""), (Broken,), BREAKS[check])
    broken.__module__ = __name__
    registering("broken", family="convolution", complexity="T", paper="")(broken)
    with pytest.raises(BrokenContract, match=f"'broken' fails the check '{check}'"):
        MIXER_CHECKS[check](mixers.get("broken"))


@pytest.mark.parametrize("meta", [dict(family="magic"), dict(complexity="T^9"), dict(tiny=dict(heads=3))], ids=str)
def test_the_battery_reads_the_declaration(meta, registering):
    registering("broken", **{**dict(family="convolution", complexity="T", paper=""), **meta})(type("Declared", (Broken,), {}))
    with pytest.raises(BrokenContract, match="'broken' fails the check 'declaration'"):
        check_mixer("broken")


def test_a_quadratic_claim_needs_a_quadratic_term(registering):
    registering("broken", family="convolution", complexity="T^2", paper="")(type("Modest", (Broken,), {}))
    with pytest.raises(BrokenContract, match="'macs'"):
        check_mixer("broken")


def test_names_and_arguments_are_answered():
    name = Attention.registered_name
    with pytest.raises(UnknownName, match=f"did you mean '{name}'"):
        build_mixer(name[:-1], 16)
    with pytest.raises(EsslError, match="did you mean 'num_heads'"):
        build_mixer(name, 16, numheads=2)
    with pytest.raises(EsslError, match="num_heads=3 does not fit dim=16"):
        build_mixer(name, 16, num_heads=3)
    with pytest.raises(EsslError, match="even number"):
        Attention(12, num_heads=4)
    Attention(12, num_heads=4, rotary=False)
    with pytest.raises(EsslError, match="There is no family"):
        list_mixers("attentive")
    with pytest.raises(EsslError, match="odd number"):
        ConvNeXt(8, kernel=4)
    with pytest.raises(EsslError, match="its future too"):
        FNet(8, causal=True)


def test_no_heads_at_all_are_refused_in_words():
    for entry in mixers:
        if "num_heads" in entry.meta.get("tiny", {}):
            with pytest.raises(EsslError, match="num_heads=0"):
                entry.obj(16, num_heads=0)


def by_hand(attention, x, mask=None):
    "Softmax attention with rotary positions, one query at a time, in complex numbers."
    B, T, D = x.shape
    H, K = attention.num_heads, D // attention.num_heads
    q, k, v = attention.qkv(x).view(B, T, 3, H, K).unbind(2)
    if attention.rotary:
        turn = torch.polar(torch.ones(T, K // 2, dtype=x.dtype), torch.arange(T)[:, None] * 1e4 ** (-torch.arange(K // 2, dtype=x.dtype) * 2 / K))
        turned = [torch.complex(z[..., : K // 2], z[..., K // 2 :]) * turn[:, None] for z in (q, k)]
        q, k = (torch.cat([z.real, z.imag], -1) for z in turned)
    y = torch.zeros_like(v)
    for b in range(B):
        n = T if mask is None else int(mask[b].sum())
        for t in range(n):
            end = t + 1 if attention.causal else n
            for h in range(H):
                scores = k[b, :end, h] @ q[b, t, h] / math.sqrt(K)
                y[b, t, h] = scores.exp() @ v[b, :end, h] / scores.exp().sum()
    return zero_pads(attention.out(y.flatten(2)), mask)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("rotary", [False, True])
def test_attention_is_the_equation(causal, rotary):
    attention = Attention(16, num_heads=2, causal=causal, rotary=rotary).double()
    x, mask = small_batch()
    assert torch.allclose(attention(x, mask), by_hand(attention, x, mask), atol=1e-12)
    weights = attention.maps(x, mask)["weights"].values
    opened = zero_pads(attention.join(weights @ attention.heads(zero_pads(x, mask))[2]), mask)
    assert torch.allclose(attention(x, mask), opened, atol=1e-12)
    assert torch.allclose(weights.sum(-1), mask[:, None].double().expand(-1, 2, -1))


@pytest.mark.parametrize("causal", [False, True])
def test_attention_is_torchs_multihead_attention(causal):
    ours, theirs = Attention(16, causal=causal, rotary=False), nn.MultiheadAttention(16, 4, batch_first=True)
    theirs.load_state_dict({"in_proj_weight": ours.qkv.weight, "in_proj_bias": ours.qkv.bias, "out_proj.weight": ours.out.weight, "out_proj.bias": ours.out.bias})
    x, mask = small_batch(dtype=torch.float32)
    future = nn.Transformer.generate_square_subsequent_mask(x.shape[1]).isinf() if causal else None
    y, weights = theirs(x, x, x, key_padding_mask=~mask, attn_mask=future, average_attn_weights=False)
    assert torch.allclose(ours(x, mask), zero_pads(y, mask), atol=1e-6)
    assert torch.allclose(ours.maps(x, mask)["weights"].values, weights * mask[:, None, :, None], atol=1e-6)


def test_rotary_and_attention_are_those_of_llama():
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    from transformers import LlamaConfig

    config = LlamaConfig(hidden_size=32, num_attention_heads=4, num_key_value_heads=4, attention_bias=True, max_position_embeddings=64, attn_implementation="eager")
    x, ours = torch.randn(2, 50, 32), Attention(32, causal=True)
    cos, sin = llama.LlamaRotaryEmbedding(config)(x, torch.arange(50)[None])
    q, k = torch.randn(2, 2, 4, 50, 8)
    for mine, theirs in zip((rotate(q), rotate(k)), llama.apply_rotary_pos_emb(q, k, cos, sin)):
        assert torch.allclose(mine, theirs, atol=1e-5)
    theirs = llama.LlamaAttention(config, layer_idx=0).eval()
    wq, wk, wv = ours.qkv.weight.chunk(3)
    bq, bk, bv = ours.qkv.bias.chunk(3)
    parts = dict(q_proj=(wq, bq), k_proj=(wk, bk), v_proj=(wv, bv), o_proj=(ours.out.weight, ours.out.bias))
    theirs.load_state_dict({f"{name}.{kind}": p for name, pair in parts.items() for kind, p in zip(("weight", "bias"), pair)})
    future = torch.full((50, 50), -torch.inf).triu(1)[None, None]
    assert torch.allclose(ours(x), theirs(x, position_embeddings=(cos, sin), attention_mask=future)[0], atol=1e-5)


def test_rotary_holds_at_long_positions_and_in_half_precision(draw):
    q = torch.randn(1, 1, 4, 16, dtype=torch.float64, generator=draw)
    exact = rotate(q, start=30_000)
    assert torch.allclose(rotate(q.float(), start=torch.tensor(30_000)).double(), exact, atol=2e-2)
    assert torch.allclose(rotate(q.bfloat16(), start=3_000).double(), rotate(q, start=3_000), atol=6e-2)


@pytest.mark.parametrize("case", ["whole", "padded", "causal", "causal padded"])
def test_attention_stores_nothing_quadratic(case):
    T = 1024
    attention, x = Attention(8, num_heads=2, causal="causal" in case), torch.randn(2, T, 8, requires_grad=True)
    mask = lengths_to_mask(torch.tensor([T, 300])) if "padded" in case else None
    with LargestTensor() as seen:
        attention(x, mask).sum().backward()
    assert seen.numel <= 2 * T * 3 * 8, f"a tensor of {seen.numel} numbers for {T} frames"


def test_fnet_is_the_double_sum():
    x, (T, D) = torch.randn(1, 7, 6, dtype=torch.float64), (7, 6)
    t, d = torch.arange(T, dtype=torch.float64), torch.arange(D, dtype=torch.float64)
    angle = 2 * math.pi * ((t[:, None, None, None] * t[None, None, :, None] / T) + (d[None, :, None, None] * d[None, None, None, :] / D))
    assert torch.allclose(FNet(D)(x)[0], (angle.cos() * x[0]).sum((2, 3)) / math.sqrt(T * D))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_depthwise_is_conv1d_in_outputs_and_gradients(dtype, draw):
    shapes = [(2, 50, 12), (12, 1, 31), (12,)]
    x, w, b = (torch.randn(*s, generator=draw, dtype=dtype, requires_grad=True) for s in shapes)
    ours, theirs = depthwise(x, w[..., None], b), F.conv1d(x.mT, w, b, groups=12).mT
    assert torch.allclose(ours, theirs, atol=1e-5)
    g = torch.randn(ours.shape, generator=draw, dtype=dtype)
    for mine, other in zip(torch.autograd.grad(ours, (x, w, b), g), torch.autograd.grad(theirs, (x, w, b), g)):
        assert torch.allclose(mine, other, atol=1e-4)


def test_depthwise_does_not_copy_its_input():
    x = torch.randn(2, 40, 8)
    assert x.transpose(1, 2).unsqueeze(-1).contiguous(memory_format=torch.channels_last).data_ptr() == x.data_ptr()


def test_depthwise_is_the_one_of_timms_convnext_block():
    timm = pytest.importorskip("timm.models.convnext")
    theirs = timm.ConvNeXtBlock(12, kernel_size=7).conv_dw
    ours = ConvNeXt(12, kernel=7)
    ours.depthwise.load_state_dict({"weight": theirs.weight[..., 3:4], "bias": theirs.bias})
    x = torch.randn(2, 20, 12)
    image = x.transpose(1, 2).unsqueeze(-1)  # an image one pixel wide
    padded = F.pad(x, (0, 0, 3, 3))
    assert torch.allclose(depthwise(padded, ours.depthwise.weight, ours.depthwise.bias), theirs(image).squeeze(-1).mT, atol=1e-6)


def test_convnext_is_the_equation(draw):
    mixer, x = ConvNeXt(6, kernel=5).double(), torch.randn(1, 9, 6, generator=draw, dtype=torch.float64)
    z, w = mixer.inner(x), mixer.depthwise.weight[:, 0, :, 0]
    y = torch.stack([sum(w[:, j] * z[0, t + j - 2] for j in range(5) if 0 <= t + j - 2 < 9) + mixer.depthwise.bias for t in range(9)])
    assert torch.allclose(mixer(x)[0], mixer.outer(F.gelu(y)))


@pytest.mark.parametrize("causal", [False, True])
def test_summary_is_the_equation(causal):
    mixer = Summary(16, causal=causal).double()
    x, mask = small_batch()
    y = mixer(x, mask)
    for b, n in enumerate(mask.sum(1).tolist()):
        for t in range(n):
            mean = sum(F.gelu(mixer.summary(x[b, i])) for i in range(t + 1 if causal else n)) / (t + 1 if causal else n)
            assert torch.allclose(y[b, t], mixer.combine(torch.cat([F.gelu(mixer.local(x[b, t])), mean])))


def test_a_long_running_mean_keeps_its_digits_in_half_precision():
    mixer, x = Summary(8, causal=True), torch.ones(1, 6000, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = mixer(x)
    assert torch.allclose(y[:, -1], y[:, 10], rtol=0.02)


def test_none_moves_nothing(draw):
    moved = NoMixing(8).influence(torch.randn(1, 9, 8, generator=draw), probes=None)[0]
    assert (moved.fill_diagonal_(0) == 0).all()


@pytest.mark.parametrize("name", list_mixers())
def test_influence_is_the_norm_of_the_jacobian(name):
    mixer = small_mixer(mixers.get(name))
    x, mask = small_batch((9, 6))
    exact = mixer.influence(x, mask, probes=None)
    for b in range(2):
        one = lambda z: mixer.mix(torch.cat([x[:b], z[None], x[b + 1 :]]), mask)[0][b]
        jacobian = torch.autograd.functional.jacobian(one, x[b])  # (T,D,T,D)
        assert torch.allclose(exact[b], jacobian.square().sum((1, 3)).sqrt(), atol=1e-9)
    some = mixer.influence(x, mask, queries=[7, 2], probes=None)
    assert torch.allclose(some, exact[:, [7, 2]])
    many = mixer.influence(x, mask, probes=400, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(many, exact, rtol=0.15, atol=1e-9)
    assert not any(p.grad is not None for p in mixer.parameters())


def test_influence_is_repeatable_and_leaves_the_generator_alone():
    mixer, x = Attention(16), torch.randn(1, 12, 16)
    before = torch.random.get_rng_state()
    a, b = (mixer.influence(x, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(a, b) and torch.equal(before, torch.random.get_rng_state())


def test_influence_in_small_pieces_is_the_same(monkeypatch):
    mixer, x = Attention(16), torch.randn(2, 12, 16)
    whole = mixer.influence(x, probes=None)
    monkeypatch.setattr("essl_nb.mixers.base.BUDGET", 1)
    assert torch.allclose(mixer.influence(x, probes=None), whole, atol=1e-6)


def test_influence_of_a_constant_is_zero():
    assert (influence(lambda x: 0 * x, torch.randn(1, 4, 3)) == 0).all()


def hand_counts(T, D):
    fft = 2.5 * T * D * math.log2(T * D)
    return {Attention: 4 * T * D**2 + 2 * T**2 * D, ConvNeXt: 2 * T * D**2 + 31 * T * D, FNet: fft, Summary: 4 * T * D**2, NoMixing: 2 * T * D**2}


@pytest.mark.parametrize("cls", hand_counts(1, 1))
def test_macs_are_those_counted_by_hand_and_on_the_cpu(cls):
    mixer = cls(64)
    assert math.isclose(mixer.macs(300), hand_counts(300, 64)[cls])
    x = torch.randn(1, 300, 64)
    assert math.isclose(count_macs(lambda: mixer(x)), hand_counts(300, 64)[cls])
    assert next(mixer.parameters(), x).device.type == "cpu"


def test_state_bytes_grow_only_where_the_past_is_kept():
    growth = {cls: [cls(64, causal=True).state_bytes(T) for T in (100, 200)] for cls in (Attention, ConvNeXt, Summary, NoMixing)}
    assert growth[Attention] == [4 * 2 * 64 * 100 + 8, 4 * 2 * 64 * 200 + 8]
    assert growth[ConvNeXt] == [4 * 64 * 30] * 2 and growth[Summary] == [4 * 64 + 8] * 2 and growth[NoMixing] == [0, 0]
    assert Attention(64).state_bytes(100) is None and FNet(64).state_bytes(100) is None
