"""Conformer and branchformer.

Without padding where the other layer does not keep it out: SpeechBrain's convolution module silences the padding behind
its filter only, its branchformer and transformers' conformer nowhere.
"""
import copy
import math

import torch
import torch.nn.functional as F

from essl_nb.core.shapes import lengths_to_mask
from essl_nb.mixers.base import mixers
from essl_nb.mixers.relpos import RelPos, encodings
from essl_nb.models.conformer import BranchformerBlock, ConformerBlock, ConvolutionModule, GatedBranch

from . import case, compare

D, T, KERNEL, LENGTHS = 16, 21, 5, (21, 13, 2)
RELPOS = next(e.name for e in mixers if e.obj is RelPos)


def frames(dtype=torch.float64):
    return torch.randn(3, T, D, dtype=dtype)


def rough(module, dtype=torch.float64):
    "With every parameter off its initial value, zeros and ones included."
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn_like(p) / (4 if p.ndim < 2 else p[0].numel() ** 0.5) + (p if p.ndim < 2 else 0))
    return module.to(dtype)


def same(mine, other):
    "Copy their parameters into ours, in one order: modules of one shape but for a dimension of length 1."
    pairs = list(zip(mine.parameters(), other.parameters(), strict=True))
    with torch.no_grad():
        for p, q in pairs:
            p.copy_(q.reshape(p.shape))
    return pairs


def copied(*modules):
    "Gradients to compare, after copying: each of `modules` is (name, ours, theirs)."
    return {f"{name} {i}": (p, [q]) for name, mine, other in modules for i, (p, q) in enumerate(same(mine, other))}


def absent(*parameters):
    "Ours that they do not have: zero."
    with torch.no_grad():
        for p in parameters:
            p.zero_()


def speechbrain_convolution(mine, other):
    return copied(("norm", mine.norm, other.layer_norm), ("inner", mine.inner, other.bottleneck[0]), ("filter", mine.filter, other.conv),
                  ("filter norm", mine.filter_norm, other.after_conv[0]), ("outer", mine.outer, other.after_conv[2]))


def convolution_pair(causal):
    from speechbrain.lobes.models.transformer.Conformer import ConvolutionModule as Theirs

    theirs, ours = rough(Theirs(D, KERNEL, causal=causal)), ConvolutionModule(D, kernel=KERNEL, causal=causal).double()
    return compare(ours, theirs, frames(), speechbrain_convolution(ours, theirs))


@case(ConvolutionModule, package="speechbrain", what="Conformer.ConvolutionModule", tolerance=1e-12)
def convolution():
    return convolution_pair(False)


@case(ConvolutionModule, package="speechbrain", what="Conformer.ConvolutionModule(causal=True)", tolerance=1e-12)
def convolution_causal():
    return convolution_pair(True)


class OverFeatures(torch.nn.LayerNorm):
    "LayerNorm where BatchNorm stood: features come second."

    def forward(self, x):
        return super().forward(x.mT).mT


def transformers_config():
    from transformers import Wav2Vec2ConformerConfig

    return Wav2Vec2ConformerConfig(
        hidden_size=D, intermediate_size=2 * D, num_attention_heads=2, hidden_act="swish", conv_depthwise_kernel_size=KERNEL, position_embeddings_type="relative",
        attention_dropout=0.0, hidden_dropout=0.0, activation_dropout=0.0, conformer_conv_dropout=0.0, attn_implementation="eager")


def transformers_convolution(mine, other):
    "They have no biases here."
    absent(mine.inner.bias, mine.filter.bias, mine.outer.bias)
    pairs = copied(("norm", mine.norm, other.layer_norm), ("filter norm", mine.filter_norm, other.batch_norm))
    for name, p, q in (("inner", mine.inner, other.pointwise_conv1), ("filter", mine.filter, other.depthwise_conv), ("outer", mine.outer, other.pointwise_conv2)):
        with torch.no_grad():
            p.weight.copy_(q.weight.reshape(p.weight.shape))
        pairs[f"{name} weight"] = (p.weight, [q.weight])
    return pairs


@case(ConvolutionModule, package="transformers", what="Wav2Vec2ConformerConvolutionModule, its BatchNorm replaced by a LayerNorm over features", tolerance=1e-12)
def convolution_transformers():
    from transformers.models.wav2vec2_conformer.modeling_wav2vec2_conformer import Wav2Vec2ConformerConvolutionModule as Theirs

    theirs, ours = Theirs(transformers_config()), ConvolutionModule(D, kernel=KERNEL).double()
    theirs.batch_norm = OverFeatures(D)
    return compare(ours, rough(theirs), frames(), transformers_convolution(ours, theirs))


def quiet(branch):
    "Silence beyond the ends, where SpeechBrain's gate sees the utterance mirrored."
    branch.csgu.conv.padding_mode = "constant"
    return branch


@case(GatedBranch, package="speechbrain", what="Branchformer.ConvolutionBranch behind a LayerNorm, padded with zeros instead of a reflection", tolerance=1e-12)
def gated():
    from speechbrain.lobes.models.transformer.Branchformer import ConvolutionBranch

    theirs, norm, ours = quiet(rough(ConvolutionBranch(D, linear_units=4 * D, kernel_size=KERNEL))), rough(torch.nn.LayerNorm(D)), GatedBranch(D, kernel=KERNEL).double()
    return compare(ours, lambda x: theirs(norm(x)), frames(), speechbrain_gated(ours, norm, theirs))


def speechbrain_gated(mine, norm, other):
    return copied(("norm", mine.norm, norm), ("inner", mine.inner, other.pre_channel_proj), ("gate norm", mine.gate_norm, other.csgu.norm),
                  ("gate", mine.gate, other.csgu.conv), ("outer", mine.outer, other.post_channel_proj))


def filtered(conv, z, causal):
    "Each feature's filter, tap by tap."
    n, k = len(z), conv.weight.shape[2]
    past = k - 1 if causal else k // 2
    rows = [sum(conv.weight[:, 0, i, 0] * z[t + i - past] for i in range(k) if 0 <= t + i - past < n) + conv.bias for t in range(n)]
    return torch.stack(rows)


def normal(norm, z):
    "LayerNorm, written out."
    away = z - z.mean(-1, keepdim=True)
    return away / (away.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight + norm.bias


def linear(layer, z):
    return z @ layer.weight.T + layer.bias


def gated_equations(m, x, causal):
    z = linear(m.inner, normal(m.norm, x))
    z = z * (1 + torch.erf(z / math.sqrt(2))) / 2
    half = z.shape[1] // 2
    return linear(m.outer, z[:, :half] * filtered(m.gate, normal(m.gate_norm, z[:, half:]), causal))


def convolution_equations(m, x, causal):
    z = linear(m.inner, normal(m.norm, x))
    z = z[:, :D] / (1 + (-z[:, D:]).exp())
    z = normal(m.filter_norm, filtered(m.filter, z, causal))
    return linear(m.outer, z / (1 + (-z).exp()))


def by_equations(cls, equations, causal):
    ours = rough(cls(D, kernel=KERNEL, causal=causal))
    twin, mask = copy.deepcopy(ours), lengths_to_mask(torch.tensor(LENGTHS), T)
    theirs = lambda x: torch.stack([F.pad(equations(twin, one[:n], causal), (0, 0, 0, T - n)) for one, n in zip(x, LENGTHS)])
    return compare(lambda x: ours(x, mask), theirs, frames(), {n: (p, [q]) for (n, p), q in zip(ours.named_parameters(), twin.parameters())})


@case(GatedBranch, package="", what="2207.02971, cgMLP, each utterance alone", tolerance=1e-10)
def gated_padded():
    return by_equations(GatedBranch, gated_equations, False)


@case(GatedBranch, package="", what="2207.02971, cgMLP, each utterance alone, causal", tolerance=1e-10)
def gated_padded_causal():
    return by_equations(GatedBranch, gated_equations, True)


@case(ConvolutionModule, package="", what="2005.08100 figure 2 with LayerNorm, each utterance alone", tolerance=1e-10)
def convolution_padded():
    return by_equations(ConvolutionModule, convolution_equations, False)


@case(ConvolutionModule, package="", what="2005.08100 figure 2 with LayerNorm, each utterance alone, causal", tolerance=1e-10)
def convolution_padded_causal():
    return by_equations(ConvolutionModule, convolution_equations, True)


def speechbrain_attention(mine, other):
    "Of one head, so that both scale alike; they have no biases in front. Their softmax is in float32, so all is."
    absent(mine.qkv.bias)
    with torch.no_grad():
        mine.u.copy_(other.pos_bias_u.reshape(mine.u.shape))
        mine.v.copy_(other.pos_bias_v.reshape(mine.v.shape))
        mine.qkv.weight.copy_(other.in_proj_weight)
    return {"qkv": (mine.qkv.weight, [other.in_proj_weight]), **copied(("out", mine.out, other.out_proj), ("distance", mine.distance, other.linear_pos))}


def distances(dtype=torch.float64):
    "Sinusoids of T−1 … −(T−1), since SpeechBrain's own give a past and a future distance the same sine."
    return encodings(T - 1, 2 * T - 1, D, dtype=dtype)[None]


def conformer_pair(causal):
    from speechbrain.lobes.models.transformer.Conformer import ConformerEncoderLayer

    theirs = rough(ConformerEncoderLayer(D, 2 * D, 1, kernel_size=KERNEL, causal=causal), torch.float32)
    ours = ConformerBlock(D, mixer=RELPOS, mixer_kw=dict(num_heads=1), ff_mult=2, kernel=KERNEL, causal=causal)
    pairs = speechbrain_attention(ours.mixer, theirs.mha_layer) | speechbrain_convolution(ours.convolution, theirs.convolution_module)
    pairs |= copied(("first", ours.first, theirs.ffn_module1), ("last", ours.last, theirs.ffn_module2), ("mixer norm", ours.mixer_norm, theirs.norm1), ("last norm", ours.norm, theirs.norm2))
    ahead = torch.ones(T, T, dtype=torch.bool).triu(1) if causal else None
    return compare(lambda x: ours(x)[0], lambda x: theirs(x, src_mask=ahead, pos_embs=distances(torch.float32))[0], frames(torch.float32), pairs)


@case(ConformerBlock, package="speechbrain", what="ConformerEncoderLayer around RelPosMHAXL, 1 head, sinusoids of 1901.02860", tolerance=1e-5)
def conformer():
    return conformer_pair(False)


@case(ConformerBlock, package="speechbrain", what="ConformerEncoderLayer(causal=True) around RelPosMHAXL, 1 head, sinusoids of 1901.02860", tolerance=1e-5)
def conformer_causal():
    return conformer_pair(True)


@case(ConformerBlock, package="transformers", what="Wav2Vec2ConformerEncoderLayer, relative positions, 2 heads, its BatchNorm replaced by a LayerNorm over features", tolerance=1e-10)
def conformer_transformers():
    from transformers.models.wav2vec2_conformer.modeling_wav2vec2_conformer import Wav2Vec2ConformerEncoderLayer

    theirs = Wav2Vec2ConformerEncoderLayer(transformers_config())
    theirs.conv_module.batch_norm = OverFeatures(D)
    theirs = rough(theirs)
    ours = ConformerBlock(D, mixer=RELPOS, mixer_kw=dict(num_heads=2), ff_mult=2, kernel=KERNEL).double()
    pairs = transformers_convolution(ours.convolution, theirs.conv_module)
    pairs |= copied(("first norm", ours.first[0], theirs.ffn1_layer_norm), ("first", ours.first[1], theirs.ffn1), ("last norm", ours.last[0], theirs.ffn2_layer_norm), ("last", ours.last[1], theirs.ffn2))
    pairs |= copied(("mixer norm", ours.mixer_norm, theirs.self_attn_layer_norm), ("norm", ours.norm, theirs.final_layer_norm))
    mine, other = ours.mixer, theirs.self_attn
    pairs |= copied(("out", mine.out, other.linear_out), ("distance", mine.distance, other.linear_pos))
    with torch.no_grad():
        for kind in ("weight", "bias"):
            parts = [getattr(p, kind) for p in (other.linear_q, other.linear_k, other.linear_v)]
            getattr(mine.qkv, kind).copy_(torch.cat(parts))
            pairs[f"qkv {kind}"] = (getattr(mine.qkv, kind), parts)
        mine.u.copy_(other.pos_bias_u[:, None])
        mine.v.copy_(other.pos_bias_v[:, None])
    pairs |= {"u": (mine.u, [other.pos_bias_u]), "v": (mine.v, [other.pos_bias_v])}
    return compare(lambda x: ours(x)[0], lambda x: theirs(x, relative_position_embeddings=distances()), frames(), pairs)


@case(BranchformerBlock, package="speechbrain", what="BranchformerEncoderLayer around RelPosMHAXL, 1 head, sinusoids of 1901.02860; zeros instead of a reflection, a LayerNorm put behind it", tolerance=1e-5)
def branchformer():
    from speechbrain.lobes.models.transformer.Branchformer import BranchformerEncoderLayer

    theirs, norm = (rough(m, torch.float32) for m in (BranchformerEncoderLayer(D, 1, kernel_size=KERNEL, csgu_linear_units=4 * D), torch.nn.LayerNorm(D)))
    quiet(theirs.convolution_branch)
    ours = BranchformerBlock(D, mixer=RELPOS, mixer_kw=dict(num_heads=1), kernel=KERNEL)
    pairs = speechbrain_attention(ours.mixer, theirs.mha_layer) | speechbrain_gated(ours.local, theirs.norm_conv, theirs.convolution_branch)
    pairs |= copied(("mixer norm", ours.mixer_norm, theirs.norm_mhsa), ("merge", ours.merge, theirs.merge_proj), ("last norm", ours.norm, norm))
    return compare(lambda x: ours(x)[0], lambda x: norm(theirs(x, pos_embs=distances(torch.float32))[0]), frames(torch.float32), pairs)
