"""Whole convolutional blocks: ConvNeXt, ConvNeXt V2, MBConv, Fused-MBConv.

timm's blocks are for images. A signal over time is an image one pixel wide: of an odd square kernel, only the middle column meets it.
"""
import copy

import torch
import torch.nn.functional as F

from essl_nb.core.shapes import lengths_to_mask
from essl_nb.mixers.convnext_block import ConvNeXtBlock, ConvNeXtV2
from essl_nb.mixers.mbconv import FusedMBConv, MBConv, fold_batchnorm

from . import case, compare

D, T, LENGTHS = 16, 21, (21, 13, 2)


def frames():
    return torch.randn(3, T, D, dtype=torch.float64)


def rough(module):
    "In double precision, with every parameter off its initial value, zeros and ones included."
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return module.double()


def put(*pairs):
    "Copy values into parameters."
    with torch.no_grad():
        for parameter, value in pairs:
            parameter.copy_(value)


def of_image(block):
    "A block for images as a function of frames; what the block adds to its input."
    return lambda x: block(x.mT[..., None])[..., 0].mT - x


def column(weight):
    "The middle column of square kernels."
    k = weight.shape[-1]
    return weight[..., k // 2 : k // 2 + 1]


def columns(pairs: dict, **kernels):
    "Add gradients of kernels, of which theirs count in their middle column."
    for name, (mine, other) in kernels.items():
        pairs[f"gradient of {name}"] = (mine.grad, column(other.grad))
    return pairs


def against_equations(mixer, equations):
    "Outputs and all gradients with padding, against `equations(mixer, x)` of one utterance (n,D) → (n,D), which get a twin of the mixer."
    mixer, mask = rough(mixer), lengths_to_mask(torch.tensor(LENGTHS), T)
    twin = copy.deepcopy(mixer)
    theirs = lambda x: torch.stack([F.pad(equations(twin, one[:n]), (0, 0, 0, T - n)) for one, n in zip(x, LENGTHS)])
    named = {name: (p, dict(twin.named_parameters())[name]) for name, p in mixer.named_parameters()}
    return compare(lambda x: mixer(x, mask), theirs, frames(), named)


def convnext_pair(ours, theirs):
    "Weights of timm's block in ours, and what is compared."
    put((ours.depthwise.weight, column(theirs.conv_dw.weight)), (ours.depthwise.bias, theirs.conv_dw.bias))
    linears = {"norm": theirs.norm, "inner": theirs.mlp.fc1, "outer": theirs.mlp.fc2}
    named = {f"{name} {kind}": (getattr(getattr(ours, name), kind), getattr(module, kind)) for name, module in linears.items() for kind in ("weight", "bias")}
    return {**named, "depthwise bias": (ours.depthwise.bias, theirs.conv_dw.bias)}


def convnext_compared(ours, theirs, named):
    put(*named.values())
    pairs = compare(ours, of_image(theirs), frames(), named)
    return columns(pairs, **{"depthwise weight": (ours.depthwise.weight, theirs.conv_dw.weight)})


@case(ConvNeXtBlock, package="timm", what="ConvNeXtBlock, kernel 7, on an image one pixel wide", tolerance=1e-10)
def convnext_block():
    from timm.models.convnext import ConvNeXtBlock as Theirs

    ours, theirs = rough(ConvNeXtBlock(D, kernel=7)), rough(Theirs(D, ls_init_value=0.1))
    return convnext_compared(ours, theirs, {**convnext_pair(ours, theirs), "scale": (ours.scale, theirs.gamma)})


@case(ConvNeXtV2, package="timm", what="ConvNeXtBlock with use_grn, kernel 7, on an image one pixel wide", tolerance=1e-10)
def convnext_v2():
    from timm.models.convnext import ConvNeXtBlock as Theirs

    ours, theirs = rough(ConvNeXtV2(D, kernel=7)), rough(Theirs(D, use_grn=True, ls_init_value=None))
    grn = {f"response {kind}": (getattr(ours.response, kind), getattr(theirs.mlp.grn, kind)) for kind in ("weight", "bias")}
    return convnext_compared(ours, theirs, {**convnext_pair(ours, theirs), **grn})


def filtered(x, weight, bias, past):
    "Each feature of (n,D) filtered by its row of (D,k), tap by tap; `past` taps lie before the frame's own."
    rows = []
    for t in range(len(x)):
        taps = [weight[:, j] * x[t + j - past] for j in range(weight.shape[1]) if 0 <= t + j - past < len(x)]
        rows.append(sum(taps) + bias)
    return torch.stack(rows)


def convnext_hidden(m, x):
    y = filtered(x, m.depthwise.weight[:, 0, :, 0], m.depthwise.bias, m.past)
    y = (y - y.mean(-1, keepdim=True)) / (y.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt() * m.norm.weight + m.norm.bias
    h = y @ m.inner.weight.T + m.inner.bias
    return h * (1 + torch.erf(h / 2**0.5)) / 2


def convnext_equations(m, x):
    return m.scale * (convnext_hidden(m, x) @ m.outer.weight.T + m.outer.bias)


@case(ConvNeXtBlock, package="", what="2201.03545 fig. 4 in float64, padded batch", tolerance=1e-10)
def convnext_block_equations():
    return against_equations(ConvNeXtBlock(D, kernel=7), convnext_equations)


@case(ConvNeXtBlock, package="", what="2201.03545 fig. 4 in float64, causal, padded batch", tolerance=1e-10)
def convnext_block_causal_equations():
    return against_equations(ConvNeXtBlock(D, kernel=6, causal=True), convnext_equations)


def v2_equations(m, x):
    h, rows = convnext_hidden(m, x), []
    for t in range(len(h)):
        seen = h[: t + 1] if m.causal else h
        strength = torch.stack([sum(v**2 for v in feature) ** 0.5 for feature in seen.T])
        share = strength / (strength.mean() + 1e-6)
        rows.append(m.response.weight * h[t] * share + m.response.bias + h[t])
    return torch.stack(rows) @ m.outer.weight.T + m.outer.bias


@case(ConvNeXtV2, package="", what="2301.00808 eq. 1 to 3 in float64, padded batch", tolerance=1e-10)
def convnext_v2_equations():
    return against_equations(ConvNeXtV2(D, kernel=7), v2_equations)


@case(ConvNeXtV2, package="", what="2301.00808 eq. 1 to 3 in float64, norms up to each frame, padded batch", tolerance=1e-10)
def convnext_v2_causal_equations():
    return against_equations(ConvNeXtV2(D, kernel=6, causal=True), v2_equations)


def lived(module):
    "A block in evaluation whose BatchNorms have seen something."
    module = rough(module)
    for m in module.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            m.running_mean.normal_(), m.running_var.uniform_(0.5, 2)
    return module.eval()


def gates(ours, theirs):
    "The linear layers of the gates against theirs, which are convolutions over one pixel."
    twins = ((ours.reduce, theirs.conv_reduce, "reduce"), (ours.expand, theirs.conv_expand, "expand"))
    return {f"gates' {name} {kind}": (getattr(mine, kind), getattr(other, kind)) for mine, other, name in twins for kind in ("weight", "bias")}


def squeeze():
    from functools import partial

    from timm.models._efficientnet_blocks import SqueezeExcite

    return partial(SqueezeExcite, rd_channels=D // 4)


def folded(ours, theirs, **norms):
    "BatchNorms folded into our affine norms; their biases' gradients are comparable as they are."
    named = {}
    for name, norm in norms.items():
        setattr(ours, name, fold_batchnorm(norm))
        named[f"{name} bias"] = (getattr(ours, name).bias, norm.bias)
    return named


@case(MBConv, package="timm", what="InvertedResidual with SqueezeExcite, kernel 5, BatchNorms folded, on an image one pixel wide", tolerance=1e-10)
def mbconv():
    from timm.models._efficientnet_blocks import InvertedResidual

    theirs = lived(InvertedResidual(D, D, dw_kernel_size=5, exp_ratio=4, act_layer=torch.nn.SiLU, se_layer=squeeze()))
    ours = rough(MBConv(D, kernel=5, norm="affine"))
    linears = {"expand": (ours.expand.weight, theirs.conv_pw.weight), "project": (ours.project.weight, theirs.conv_pwl.weight), **gates(ours.excite, theirs.se)}
    put(*((mine, other.reshape(mine.shape)) for mine, other in linears.values()), (ours.depthwise.weight, column(theirs.conv_dw.weight)))
    named = {**linears, **folded(ours, theirs, first_norm=theirs.bn1, second_norm=theirs.bn2, last_norm=theirs.bn3)}
    pairs = compare(ours, of_image(theirs), frames(), named)
    return columns(pairs, **{"depthwise weight": (ours.depthwise.weight, theirs.conv_dw.weight)})


@case(FusedMBConv, package="timm", what="EdgeResidual with SqueezeExcite, kernel 5, BatchNorms folded, on an image one pixel wide", tolerance=1e-10)
def fused_mbconv():
    from timm.models._efficientnet_blocks import EdgeResidual

    theirs = lived(EdgeResidual(D, D, exp_kernel_size=5, exp_ratio=4, act_layer=torch.nn.SiLU, se_layer=squeeze()))
    ours = rough(FusedMBConv(D, kernel=5, norm="affine"))
    side_by_side = lambda w: column(w)[..., 0].transpose(1, 2).flatten(1)  # (4D,D,k,k) → (4D,k·D)
    linears = {"project": (ours.project.weight, theirs.conv_pwl.weight), **gates(ours.excite, theirs.se)}
    put(*((mine, other.reshape(mine.shape)) for mine, other in linears.values()), (ours.filters.weight, side_by_side(theirs.conv_exp.weight)))
    named = {**linears, **folded(ours, theirs, first_norm=theirs.bn1, last_norm=theirs.bn2)}
    pairs = compare(ours, of_image(theirs), frames(), named)
    pairs["gradient of filters"] = (ours.filters.weight.grad, side_by_side(theirs.conv_exp.weight.grad))
    return pairs


def silu(x):
    return x / (1 + (-x).exp())


def layer_norm(norm, x):
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt() * norm.weight + norm.bias


def gated_and_projected(m, h):
    "Squeeze-and-excitation (1709.01507, eq. 2 to 4) with the mean over the utterance, or up to the frame, and the linear projection."
    rows = []
    for t in range(len(h)):
        z = sum(h[: t + 1] if m.causal else h) / (t + 1 if m.causal else len(h))
        s = silu(z @ m.excite.reduce.weight.T + m.excite.reduce.bias)
        rows.append(h[t] / (1 + (-(s @ m.excite.expand.weight.T + m.excite.expand.bias)).exp()))
    return layer_norm(m.last_norm, torch.stack(rows) @ m.project.weight.T)


def mbconv_equations(m, x):
    h = silu(layer_norm(m.first_norm, x @ m.expand.weight.T))
    h = silu(layer_norm(m.second_norm, filtered(h, m.depthwise.weight[:, 0, :, 0], 0, m.past)))
    return gated_and_projected(m, h)


def fused_equations(m, x):
    w, rows = m.filters.weight.view(-1, m.kernel, D), []
    for t in range(len(x)):
        rows.append(sum(w[:, j] @ x[t + j - m.past] for j in range(m.kernel) if 0 <= t + j - m.past < len(x)))
    return gated_and_projected(m, silu(layer_norm(m.first_norm, torch.stack(rows))))


@case(MBConv, package="", what="2104.00298 fig. 2 with LayerNorm in float64, padded batch", tolerance=1e-10)
def mbconv_with_layer_norm():
    return against_equations(MBConv(D, kernel=5), mbconv_equations)


@case(MBConv, package="", what="2104.00298 fig. 2 with LayerNorm in float64, causal, padded batch", tolerance=1e-10)
def mbconv_causal():
    return against_equations(MBConv(D, kernel=4, causal=True), mbconv_equations)


@case(FusedMBConv, package="", what="2104.00298 fig. 2 with LayerNorm in float64, padded batch", tolerance=1e-10)
def fused_mbconv_with_layer_norm():
    return against_equations(FusedMBConv(D, kernel=5), fused_equations)


@case(FusedMBConv, package="", what="2104.00298 fig. 2 with LayerNorm in float64, causal, padded batch", tolerance=1e-10)
def fused_mbconv_causal():
    return against_equations(FusedMBConv(D, kernel=4, causal=True), fused_equations)
