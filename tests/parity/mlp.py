"""MLPs over time: MLP-Mixer at a fixed length, and the forms without one."""
import copy
import math

import torch
import torch.nn.functional as F

from essl_nb.core.shapes import lengths_to_mask
from essl_nb.mixers.mlp_asr import CMLP, FMLP, TSMLP
from essl_nb.mixers.mlp_mixer import MLPMixer

from . import case, compare

D, T, LENGTHS = 12, 21, (21, 13, 2)


def frames(T=T):
    return torch.randn(3, T, D, dtype=torch.float64)


def rough(module):
    "In double precision, with every parameter off its initial value, zeros and ones included."
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return module.double()


def against_equations(mixer, equations):
    "Outputs and all gradients with padding, against `equations(mixer, x)` of one utterance (n,D) → (n,D), which get a twin of the mixer."
    mixer, mask = rough(mixer), lengths_to_mask(torch.tensor(LENGTHS), T)
    twin = copy.deepcopy(mixer)
    theirs = lambda x: torch.stack([F.pad(equations(twin, one[:n]), (0, 0, 0, T - n)) for one, n in zip(x, LENGTHS)])
    named = {name: (p, dict(twin.named_parameters())[name]) for name, p in mixer.named_parameters()}
    return compare(lambda x: mixer(x, mask), theirs, frames(), named)


def linear(layer, x):
    return x @ layer.weight.T + layer.bias


def gelu(x):
    return x * (1 + torch.erf(x / 2**0.5)) / 2


@case(MLPMixer, package="timm", what="MixerBlock.mlp_tokens, whole utterance in one crop", tolerance=1e-10)
def mlp_mixer():
    from timm.models.mlp_mixer import MixerBlock

    ours, theirs = rough(MLPMixer(D, crop=T, expand=2)), rough(MixerBlock(D, T, mlp_ratio=(2 * T / D, 1.0)).mlp_tokens)
    named = {f"{name} {kind}": (getattr(getattr(ours, name), kind), getattr(layer, kind)) for name, layer in (("inner", theirs.fc1), ("outer", theirs.fc2)) for kind in ("weight", "bias")}
    with torch.no_grad():
        for mine, other in named.values():
            mine.copy_(other)
    return compare(ours, lambda x: theirs(x.mT).mT, frames(), named)


def mixer_equations(m, x):
    "Crop after crop, feature after feature; the last crop ends in silence."
    out = []
    for start in range(0, len(x), m.crop):
        crop = x[start : start + m.crop]
        silent = torch.cat([crop, torch.zeros(m.crop - len(crop), D, dtype=x.dtype)])
        mixed = torch.stack([linear(m.outer, gelu(linear(m.inner, feature))) for feature in silent.T], 1)
        out.append(mixed[: len(crop)])
    return torch.cat(out)


@case(MLPMixer, package="", what="2105.01601 eq. 1, token mixing, in float64, crops of 8 in a padded batch", tolerance=1e-10)
def mlp_mixer_equations():
    return against_equations(MLPMixer(D, crop=8), mixer_equations)


def layer_norm(norm, x):
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt() * norm.weight + norm.bias


def gated(m, x, gate):
    "Both halves of the hidden features, one of them gated (2105.08050, section 2.1) by `gate(v, t)`."
    h = gelu(linear(m.inner, x))
    u, v = h[:, : m.half], layer_norm(m.norm, h[:, m.half :])
    return linear(m.outer, torch.stack([u[t] * gate(v, t) for t in range(len(x))]))


def convolved(m, x):
    w = m.depthwise.weight[:, 0, :, 0]
    taps = lambda v, t: [w[:, j] * v[t + j - m.past] for j in range(w.shape[1]) if 0 <= t + j - m.past < len(v)]
    return gated(m, x, lambda v, t: sum(taps(v, t)) + m.depthwise.bias)


@case(CMLP, package="", what="convolutional gate (after 2202.08456 and 2105.08050 section 2.1) in float64, padded batch", tolerance=1e-10)
def c_mlp():
    return against_equations(CMLP(D, kernel=7, expand=2), convolved)


@case(CMLP, package="", what="convolutional gate (after 2202.08456 and 2105.08050 section 2.1) in float64, causal, padded batch", tolerance=1e-10)
def c_mlp_causal():
    return against_equations(CMLP(D, kernel=6, causal=True), convolved)


def shifted(m, x):
    first, second = m.half // 2, m.half - m.half // 2
    offsets = [-2 * m.shift] * first + [-m.shift] * second if m.causal else [-m.shift] * first + [m.shift] * second
    silence = torch.zeros((), dtype=x.dtype)
    at = lambda v, t, d: v[t, d] if 0 <= t < len(v) else silence
    return gated(m, x, lambda v, t: torch.stack([at(v, t + o, d) for d, o in enumerate(offsets)]) + m.bias)


@case(TSMLP, package="", what="temporal shift gate (after 2202.08456) in float64, padded batch", tolerance=1e-10)
def ts_mlp():
    return against_equations(TSMLP(D, shift=3), shifted)


@case(TSMLP, package="", what="temporal shift gate (after 2202.08456) in float64, causal, padded batch", tolerance=1e-10)
def ts_mlp_causal():
    return against_equations(TSMLP(D, shift=3, causal=True), shifted)


def ring(m, x):
    "Each tap weighs the frame that many steps back on the ring."
    h, n, k = gelu(linear(m.inner, x)), len(x), len(m.filters)
    y = torch.stack([sum(m.filters[j] * h[(t - (j - k // 2)) % n] for j in range(k)) for t in range(n)])
    return linear(m.outer, y)


@case(FMLP, package="", what="circular convolution (2202.08456) as a sum over a ring in float64, padded batch", tolerance=1e-10)
def f_mlp():
    return against_equations(FMLP(D, taps=9), ring)


@case(FMLP, package="", what="the same with a filter longer than the utterances", tolerance=1e-10)
def f_mlp_long():
    return against_equations(FMLP(D, taps=2 * T + 3), ring)


def transformed(m, x):
    "The same by the sums that define the Fourier transform."
    h, n, k = gelu(linear(m.inner, x)), len(x), len(m.filters)
    t, f = torch.arange(n, dtype=x.dtype), torch.arange(n, dtype=x.dtype)[:, None]
    wave = lambda times: torch.polar(torch.ones_like(f * times), -2 * math.pi * f * times / n)  # (n,times)
    response = wave(torch.arange(k, dtype=x.dtype) - k // 2) @ m.filters.to(torch.complex128)
    spectrum = (wave(t) @ h.to(torch.complex128)) * response
    return linear(m.outer, (wave(-t).mT @ spectrum).real / n)


@case(FMLP, package="", what="circular convolution (2202.08456) by the Fourier sums in float64, padded batch", tolerance=1e-10)
def f_mlp_fourier():
    return against_equations(FMLP(D, taps=9), transformed)
