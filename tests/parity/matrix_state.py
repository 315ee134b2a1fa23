"""Recurrences of 2024-26: gated delta rule, Kimi delta attention, RWKV-7, Mamba-2, mLSTM, minGRU, and the gated short convolution."""
import copy
import os

import torch
import torch.nn.functional as F

from essl_nb.core.shapes import lengths_to_mask
from essl_nb.mixers.gated_delta import GatedDelta
from essl_nb.mixers.mamba2 import Mamba2
from essl_nb.mixers.mingru import MinGRU
from essl_nb.mixers.mlstm import CAP, MLSTM
from essl_nb.mixers.rwkv7 import RWKV7
from essl_nb.mixers.short_conv import ShortConv

from . import case, compare

D, T, LENGTHS = 24, 21, (21, 13, 2)


def frames(dtype=torch.float32):
    return torch.randn(3, T, D, dtype=dtype)


def rough(mixer, dtype=torch.float32):
    "With every parameter off its initial value."
    with torch.no_grad():
        for p in mixer.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return mixer.to(dtype)


def equal(pairs):
    "Give theirs the values of ours."
    with torch.no_grad():
        for mine, other in pairs.values():
            other.copy_(mine.reshape(other.shape))
    return pairs


# Against packages: causal, whole utterances, their own code in float32.


@case(GatedDelta, package="transformers", what="Qwen3NextGatedDeltaNet, torch path, causal")
def gated_delta_qwen():
    from transformers import Qwen3NextConfig
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

    H, K = 4, D // 4
    config = Qwen3NextConfig(hidden_size=D, linear_num_value_heads=H, linear_num_key_heads=H, linear_key_head_dim=K, linear_value_head_dim=K,
                             linear_conv_kernel_dim=4, num_hidden_layers=2, layer_types=["linear_attention"] * 2)
    ours, theirs = rough(GatedDelta(D, causal=True)), Qwen3NextGatedDeltaNet(config, 0)
    pairs = equal({"conv": (ours.conv.weight, theirs.conv1d.weight), "A_log": (ours.A_log, theirs.A_log), "dt_bias": (ours.dt_bias, theirs.dt_bias),
                   "norm": (ours.norm.weight, theirs.norm.weight), "out_proj": (ours.out_proj.weight, theirs.out_proj.weight)})
    with torch.no_grad():  # theirs go head by head: q, k, v, gate; strength, rate
        q, k, v, beta, rate, gate = ours.in_proj.weight.split([D, D, D, H, H, D])
        theirs.in_proj_qkvz.weight.copy_(torch.cat([x.view(H, K, D) for x in (q, k, v, gate)], 1).flatten(0, 1))
        theirs.in_proj_ba.weight.copy_(torch.stack([beta, rate], 1).flatten(0, 1))
    found = compare(ours, theirs, frames(), pairs)
    q, k, v, gate = theirs.in_proj_qkvz.weight.grad.view(H, 4, K, D).unbind(1)
    beta, rate = theirs.in_proj_ba.weight.grad.view(H, 2, D).unbind(1)
    found["gradient of in_proj"] = (ours.in_proj.weight.grad, torch.cat([*(x.flatten(0, 1) for x in (q, k, v)), beta, rate, gate.flatten(0, 1)]))
    return found


@case(GatedDelta, package="transformers", what='kimi_linear.recurrent_kimi_delta_attention on the same q, k, v, decays and strengths; decay="channel", causal')
def kimi_delta():
    from transformers.models.kimi_linear.modeling_kimi_linear import recurrent_kimi_delta_attention

    mixer = rough(GatedDelta(D, decay="channel", causal=True))
    mixer.A_log.data.mul_(0.3)  # no log decay at its lower bound, which theirs does not have

    def theirs(u):
        q, k, v, beta, _ = u.split([D, D, D, mixer.heads, mixer.rates], -1)
        q, k, v = map(mixer.split_heads, (q, k, v))
        y, _ = recurrent_kimi_delta_attention(q, k, v, mixer.recurrence(u)["log_w"], beta.sigmoid(), None, False, use_qk_l2norm_in_kernel=True)
        return y.flatten(2)

    return compare(lambda u: mixer.run(mixer.recurrence(u))[0], theirs, torch.randn(3, T, mixer.entering))


@case(RWKV7, package="rwkv", what="model.RWKV_x070_TMix_seq, first layer; its own code has no gradient")
def rwkv_package():
    flags = {name: os.environ.get(name) for name in ("RWKV_V7_ON", "RWKV_JIT_ON", "RWKV_CUDA_ON")}
    backends = torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    os.environ.update(RWKV_V7_ON="1", RWKV_JIT_ON="0", RWKV_CUDA_ON="0")
    script = torch.jit.script
    torch.jit.script = lambda function: function  # it scripts in spite of the flag, and this torch cannot compile what it scripts
    try:
        from rwkv.model import RWKV_x070_TMix_seq
    finally:  # importing it changes the whole process
        torch.jit.script = script
        torch._C._jit_set_autocast_mode(True)
        torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = backends
        for name, value in flags.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
    m, x, K = rough(RWKV7(D, rank=5, causal=True)), frames(), D // 4
    layers = [m.w0, m.w_in, m.w_out, m.a0, m.a_in, m.a_out, None, None, None, m.g_in, m.g_out, m.k_k, m.k_a, m.r_k, m.r_proj, m.k_proj, m.v_proj, m.out_proj]
    with torch.no_grad():
        r, w, k, v, a, g = m.mu.view(6, D)
        weights = [p.weight.T if isinstance(p, torch.nn.Linear) else p for p in layers]
        theirs = [RWKV_x070_TMix_seq(0, 4, K, one, torch.zeros(D), None, torch.zeros(4, K, K), r, w, k, v, a, g, *weights, m.norm.weight, m.norm.bias)[0] for one in x]
        return {"output": (m(x), torch.stack(theirs))}


@case(Mamba2, package="transformers", what="Mamba2Mixer, torch path, causal")
def mamba2_transformers():
    from transformers import Mamba2Config
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    E, N, H = 2 * D, 6, 4
    config = Mamba2Config(hidden_size=D, num_heads=H, head_dim=E // H, state_size=N, expand=2, n_groups=1, chunk_size=8)
    ours, theirs = rough(Mamba2(D, d_state=N, head_dim=E // H, causal=True)), Mamba2Mixer(config, 0)
    pairs = equal({"conv": (ours.conv.weight, theirs.conv1d.weight), "conv bias": (ours.conv.bias, theirs.conv1d.bias), "A_log": (ours.A_log, theirs.A_log),
                   "dt_bias": (ours.dt_bias, theirs.dt_bias), "D": (ours.D, theirs.D), "norm": (ours.norm.weight, theirs.norm.weight),
                   "out_proj": (ours.out_proj.weight, theirs.out_proj.weight)})
    swap = lambda w, first: torch.cat([w[first:], w[:first]])  # theirs: gate before the rest; ours: after
    with torch.no_grad():
        theirs.in_proj.weight.copy_(swap(ours.in_proj.weight, E + 2 * N + H))
    found = compare(ours, theirs, frames(), pairs)
    found["gradient of in_proj"] = (ours.in_proj.weight.grad, swap(theirs.in_proj.weight.grad, E))
    return found


@case(MLSTM, package="transformers", what="xLSTMLayer, native torch path, causal; it adds 1e-6 to the denominator")
def mlstm_transformers():
    from transformers import xLSTMConfig
    from transformers.models.xlstm.modeling_xlstm import xLSTMLayer

    config = xLSTMConfig(hidden_size=D, num_heads=4, num_hidden_layers=1, qk_dim_factor=0.5, v_dim_factor=1.0, mode="inference", sequence_kernel="native_sequence__native",
                         chunkwise_kernel="chunkwise--native_autograd", step_kernel="native")
    ours, theirs = rough(MLSTM(D, causal=True)), xLSTMLayer(config)
    qkvo = [theirs.q.weight, theirs.k.weight, theirs.v.weight, theirs.ogate_preact.weight]
    gates, biases = [theirs.igate_preact.weight, theirs.fgate_preact.weight], [theirs.igate_preact.bias, theirs.fgate_preact.bias]
    with torch.no_grad():
        for mine, others in ((ours.in_proj.weight, qkvo), (ours.gates.weight, gates), (ours.gate_bias, biases)):
            for other, part in zip(others, mine.split([len(o) for o in others])):
                other.copy_(part)
    pairs = equal({"norm": (ours.norm_weight, theirs.multihead_norm.weight), "out_proj": (ours.out_proj.weight, theirs.out_proj.weight)})
    pairs |= {"in_proj": (ours.in_proj.weight, qkvo), "gates": (ours.gates.weight, gates), "gate biases": (ours.gate_bias, biases)}
    return compare(ours, lambda x: theirs(x)[0], frames(), pairs)


@case(MinGRU, package="minGRU_pytorch", what="minGRU.minGRU with an output layer: scan of logarithms, causal", tolerance=1e-10)
def mingru_package():
    from minGRU_pytorch.minGRU import minGRU

    ours, theirs = rough(MinGRU(D, causal=True), torch.float64), minGRU(D, 1.0, proj_out=True).double()
    both = theirs.to_hidden_and_gate.weight
    with torch.no_grad():
        both.copy_(torch.cat([ours.ahead.candidate.weight, ours.ahead.gate.weight]))
        ours.out.bias.zero_()
    found = compare(ours, theirs, frames(torch.float64), equal({"out": (ours.out.weight, theirs.to_out.weight)}))
    found["gradient of candidate and gate"] = (torch.cat([ours.ahead.candidate.weight.grad, ours.ahead.gate.weight.grad]), both.grad)
    return found


@case(ShortConv, package="transformers", what="Lfm2ShortConv, torch path, causal", tolerance=1e-12)
def short_conv_lfm2():
    from transformers import Lfm2Config
    from transformers.models.lfm2.modeling_lfm2 import Lfm2ShortConv

    config = Lfm2Config(hidden_size=D, conv_L_cache=4, conv_bias=False, num_hidden_layers=2, layer_types=["conv"] * 2)
    ours, theirs = rough(ShortConv(D, causal=True), torch.float64), Lfm2ShortConv(config, 0).double()
    pairs = equal({"in_proj": (ours.in_proj.weight, theirs.in_proj.weight), "conv": (ours.conv.weight, theirs.conv.weight),
                   "out_proj": (ours.out_proj.weight, theirs.out_proj.weight)})
    return compare(ours, theirs, frames(torch.float64), pairs)


# Against the papers' equations in float64, causal and from both sides, with padding: each utterance alone, frame by frame, states (V,K) as the papers write them.


def written_out(mixer, alone):
    "Outputs and all gradients. The equations get a twin, so that their gradients are their own."
    mask, twin = lengths_to_mask(torch.tensor(LENGTHS), T), copy.deepcopy(mixer)
    theirs = lambda x: torch.stack([F.pad(alone(twin, one[:n]), (0, 0, 0, T - n)) for one, n in zip(x, LENGTHS)])
    return compare(lambda x: mixer(x, mask), theirs, frames(torch.float64), {name: (p, dict(twin.named_parameters())[name]) for name, p in mixer.named_parameters()})


def both_sides(n, causal, transition, written, read):
    "Σ of what is read from the left, with the frame's own, and from the right, without: S ← S·transition(t) + written(t), y = S·read(t)."
    y = [0] * n
    for order, from_right in [(range(n), False)] + ([] if causal else [(reversed(range(n)), True)]):
        S = torch.zeros_like(written(0))
        for t in order:
            kept = S @ transition(t)
            S = kept + written(t)
            y[t] = y[t] + (kept if from_right else S) @ read(t)
    return torch.stack(y)


def filtered(x, conv, causal):
    "(n,·) over time, a frame's sum written out."
    (n, width), k = x.shape, conv.weight.shape[2]
    past, w = k - 1 if causal else k // 2, conv.weight[:, 0, :, 0]
    y = torch.stack([sum((w[:, j] * x[t + j - past] for j in range(k) if 0 <= t + j - past < n), torch.zeros(width, dtype=x.dtype)) for t in range(n)])
    return y if conv.bias is None else y + conv.bias


def normalised(x, eps):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def delta_alone(m, x):
    K, H = D // m.heads, m.heads
    u = x @ m.in_proj.weight.T
    qkv, beta, rate, gate = u.split([3 * D, H, m.rank, D], -1)
    qkv = F.silu(filtered(qkv, m.conv, m.causal))
    rate = rate if m.rate_proj is None else rate @ m.rate_proj.weight.T
    rate = torch.log1p(torch.exp(rate + m.dt_bias)).view(len(x), H, -1)
    y = []
    for h in range(H):
        q, k, v = (part[:, h * K : (h + 1) * K] for part in qkv.split(D, -1))
        q, k = (z / (z.square().sum(-1, keepdim=True) + 1e-6).sqrt() for z in (q, k))
        decay = torch.exp(torch.clamp(-m.A_log[h].exp() * rate[:, h], min=-5.0 if m.decay == "channel" else -torch.inf)).expand(-1, K)
        strength = torch.sigmoid(beta[:, h])
        y.append(both_sides(len(x), m.causal, lambda t: torch.diag(decay[t]) @ (torch.eye(K, dtype=x.dtype) - strength[t] * torch.outer(k[t], k[t])),
                            lambda t: strength[t] * torch.outer(v[t], k[t]), lambda t: q[t] / K**0.5))
    y = torch.stack([normalised(z, 1e-6) * m.norm.weight for z in y], 1).flatten(1)
    return (y * F.silu(gate)) @ m.out_proj.weight.T


@case(GatedDelta, package="", what="2412.06464, eq. 10, from both sides, with padding", tolerance=1e-10)
def gated_delta_equations():
    return written_out(rough(GatedDelta(D), torch.float64), delta_alone)


@case(GatedDelta, package="", what="2412.06464, eq. 10, causal, with padding", tolerance=1e-10)
def gated_delta_equations_causal():
    return written_out(rough(GatedDelta(D, causal=True), torch.float64), delta_alone)


@case(GatedDelta, package="", what='2510.26692, eq. 1: decay="channel", from both sides, with padding', tolerance=1e-10)
def kimi_equations():
    return written_out(rough(GatedDelta(D, decay="channel"), torch.float64), delta_alone)


def rwkv_alone(m, x):
    n, H, K = len(x), m.heads, D // m.heads
    before, after = F.pad(x, (0, 0, 1, 0))[:n], F.pad(x, (0, 0, 0, 1))[1:]
    other = before if m.causal else torch.cat([before[:, : D // 2], after[:, D // 2 :]], -1)
    r, w, k, v, a, g = (x + (other - x) * mu for mu in m.mu.view(6, D))
    r, k, v = r @ m.r_proj.weight.T, k @ m.k_proj.weight.T, v @ m.v_proj.weight.T
    w = torch.exp(-torch.exp(torch.tensor(-0.5, dtype=x.dtype)) * torch.sigmoid(m.w0 + torch.tanh(w @ m.w_in.weight.T) @ m.w_out.weight.T))
    a = torch.sigmoid(m.a0 + a @ m.a_in.weight.T @ m.a_out.weight.T)
    g = torch.sigmoid(g @ m.g_in.weight.T) @ m.g_out.weight.T
    removed, replaced, y = k * m.k_k, k * (1 + (a - 1) * m.k_a), []
    for h in range(H):
        s = slice(h * K, (h + 1) * K)
        key = removed[:, s] / removed[:, s].norm(dim=-1, keepdim=True)
        read = both_sides(n, m.causal, lambda t: torch.diag(w[t, s]) - torch.outer(key[t], a[t, s] * key[t]),
                          lambda t: torch.outer(v[t, s], replaced[t, s]), lambda t: r[t, s])
        read = read - read.mean(-1, keepdim=True)
        read = normalised(read, 64e-5) * m.norm.weight[s] + m.norm.bias[s]
        y.append(read + (r[:, s] * replaced[:, s] * m.r_k[s]).sum(-1, keepdim=True) * v[:, s])
    return (torch.cat(y, -1) * g) @ m.out_proj.weight.T


@case(RWKV7, package="", what="2503.14456, section 4.1 without value residual, from both sides, with padding", tolerance=1e-10)
def rwkv_equations():
    return written_out(rough(RWKV7(D, rank=5), torch.float64), rwkv_alone)


@case(RWKV7, package="", what="2503.14456, section 4.1 without value residual, causal, with padding", tolerance=1e-10)
def rwkv_equations_causal():
    return written_out(rough(RWKV7(D, rank=5, causal=True), torch.float64), rwkv_alone)


def mamba2_alone(m, x):
    E, N, H = m.inner, m.d_state, m.heads
    P = E // H
    xbc, step, gate = (x @ m.in_proj.weight.T).split([E + 2 * N, H, E], -1)
    x, B, C = F.silu(filtered(xbc, m.conv, m.causal)).split([E, N, N], -1)
    step = torch.log1p(torch.exp(step + m.dt_bias))
    y = []
    for h in range(H):
        own = x[:, h * P : (h + 1) * P]
        decay = torch.exp(-m.A_log[h].exp() * step[:, h])
        y.append(both_sides(len(x), m.causal, lambda t: decay[t] * torch.eye(N, dtype=x.dtype), lambda t: torch.outer(step[t, h] * own[t], B[t]), lambda t: C[t])
                 + m.D[h] * own)
    return (normalised(torch.cat(y, -1) * F.silu(gate), 1e-5) * m.norm.weight) @ m.out_proj.weight.T


@case(Mamba2, package="", what="2405.21060, sections 5 and 7, from both sides, with padding", tolerance=1e-10)
def mamba2_equations():
    return written_out(rough(Mamba2(D, d_state=5), torch.float64), mamba2_alone)


@case(Mamba2, package="", what="2405.21060, sections 5 and 7, causal, with padding", tolerance=1e-10)
def mamba2_equations_causal():
    return written_out(rough(Mamba2(D, d_state=5, causal=True), torch.float64), mamba2_alone)


def mlstm_alone(m, x):
    "Without a stabiliser: in float64 these gates do not overflow."
    n, H, V = len(x), m.heads, D // m.heads
    K = m.keys // H
    q, k, v, out = (x @ m.in_proj.weight.T).split([m.keys, m.keys, D, D], -1)
    i, f = (CAP * torch.tanh((x @ m.gates.weight.T + m.gate_bias) / CAP)).split(H, -1)
    y = []
    for h in range(H):
        keys, values, enter, keep = k[:, h * K : (h + 1) * K], v[:, h * V : (h + 1) * V], torch.exp(i[:, h]), torch.sigmoid(f[:, h])
        total = 0
        for order, from_right in [(range(n), False)] + ([] if m.causal else [(reversed(range(n)), True)]):
            C, norm, h_t = torch.zeros(V, K, dtype=x.dtype), torch.zeros(K, dtype=x.dtype), [None] * n
            for t in order:
                query, kept = q[t, h * K : (h + 1) * K] / K**0.5, (keep[t] * C, keep[t] * norm)
                C, norm = kept[0] + enter[t] * torch.outer(values[t], keys[t]), kept[1] + enter[t] * keys[t]
                memory, normaliser = kept if from_right else (C, norm)
                h_t[t] = memory @ query / torch.clamp((normaliser @ query).abs(), min=1.0)
            total = total + torch.stack(h_t)
        y.append(normalised(total - total.mean(-1, keepdim=True), 1e-6))
    return (torch.cat(y, -1) * m.norm_weight * torch.sigmoid(out)) @ m.out_proj.weight.T


@case(MLSTM, package="", what="2405.04517, eqs. 19 to 27 without stabiliser, from both sides, with padding", tolerance=1e-10)
def mlstm_equations():
    return written_out(rough(MLSTM(D), torch.float64), mlstm_alone)


@case(MLSTM, package="", what="2405.04517, eqs. 19 to 27 without stabiliser, causal, with padding", tolerance=1e-10)
def mlstm_equations_causal():
    return written_out(rough(MLSTM(D, causal=True), torch.float64), mlstm_alone)


def mingru_alone(m, x):
    def one_way(cell, x):
        h, y = torch.zeros(m.hidden, dtype=x.dtype), []
        for now in x:
            z, c = torch.sigmoid(cell.gate.weight @ now), cell.candidate.weight @ now
            h = (1 - z) * h + z * torch.where(c >= 0, c + 0.5, torch.sigmoid(c))
            y.append(h)
        return torch.stack(y)

    y = [one_way(m.ahead, x)] + ([] if m.causal else [one_way(m.back, x.flip(0)).flip(0)])
    return torch.cat(y, -1) @ m.out.weight.T + m.out.bias


@case(MinGRU, package="", what="2410.01201, appendix B, one network each way, with padding", tolerance=1e-12)
def mingru_equations():
    return written_out(rough(MinGRU(D), torch.float64), mingru_alone)


@case(ShortConv, package="", what="2511.23404: gate, filter, gate; centred, with padding", tolerance=1e-12)
def short_conv_equations():
    def alone(m, x):
        b, c, z = (x @ m.in_proj.weight.T).split(D, -1)
        return (c * filtered(b * z, m.conv, m.causal)) @ m.out_proj.weight.T

    return written_out(rough(ShortConv(D), torch.float64), alone)


@case(ShortConv, package="", what="2511.23404 with the gate before the filter alone; centred, with padding", tolerance=1e-12)
def short_conv_gate_before():
    def alone(m, x):
        b, z = (x @ m.in_proj.weight.T).split(D, -1)
        return filtered(b * z, m.conv, m.causal) @ m.out_proj.weight.T

    return written_out(rough(ShortConv(D, gates="before"), torch.float64), alone)


@case(ShortConv, package="", what="2511.23404 with the gate after the filter alone; centred, with padding", tolerance=1e-12)
def short_conv_gate_after():
    def alone(m, x):
        c, z = (x @ m.in_proj.weight.T).split(D, -1)
        return (c * filtered(z, m.conv, m.causal)) @ m.out_proj.weight.T

    return written_out(rough(ShortConv(D, gates="after"), torch.float64), alone)
