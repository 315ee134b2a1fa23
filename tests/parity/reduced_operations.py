"""Mixers that fold, sum or average over time: Linformer, Fastformer, HyperMixing, SummaryMixing-lite, PoM."""
import copy
import math

import torch
import torch.nn.functional as F

from essl_nb.core.shapes import lengths_to_mask, zero_pads
from essl_nb.mixers.fastformer import Fastformer
from essl_nb.mixers.hyper import Hyper
from essl_nb.mixers.linformer_attention import Linformer, LinformerPooled
from essl_nb.mixers.pom import PoM
from essl_nb.mixers.summary import SummaryLite

from . import case, compare

D, T, LENGTHS = 24, 21, (21, 13, 2)


def frames(T=T):
    return torch.randn(3, T, D, dtype=torch.float64)


def real(T=T):
    return lengths_to_mask(torch.tensor(LENGTHS), T)


def rough(mixer):
    "In double precision, with every parameter off its initial value, zeros and ones included."
    with torch.no_grad():
        for p in mixer.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return mixer.double()


def put(*pairs):
    "Copy values into parameters."
    with torch.no_grad():
        for parameter, value in pairs:
            parameter.copy_(value)


def named(mixer, twin):
    "The parameters of two mixers of one class, paired."
    return {name: (p, dict(twin.named_parameters())[name]) for name, p in mixer.named_parameters()}


def against_equations(mixer, equations):
    """Outputs and all gradients with padding, against `equations(mixer, x)` of one utterance (n,D) → (n,D).

    The equations get a twin of the mixer, so that their gradients are their own.
    """
    mixer, mask = rough(mixer), real()
    twin = copy.deepcopy(mixer)

    def theirs(x):
        alone = [F.pad(equations(twin, one[:n]), (0, 0, 0, T - n)) for one, n in zip(x, LENGTHS)]
        return torch.stack(alone)

    return compare(lambda x: mixer(x, mask), theirs, frames(), named(mixer, twin))


def split(x, H):
    "(n,D) → H tensors (n,K)"
    return x.chunk(H, -1)


def linformer_pair(sharing, n_max):
    from linformer import LinformerSelfAttention

    ours = rough(Linformer(D, num_heads=4, rank=5, n_max=n_max, sharing=sharing))
    theirs = LinformerSelfAttention(D, n_max, k=5, heads=4, share_kv=sharing == "kv").double()
    keys = [theirs.to_q, theirs.to_k, theirs.to_k if sharing == "kv" else theirs.to_v]
    put((ours.qkv.weight, torch.cat([linear.weight for linear in keys])), (ours.qkv.bias, 0 * ours.qkv.bias))
    put((ours.out.weight, theirs.to_out.weight), (ours.out.bias, theirs.to_out.bias))
    projections = [theirs.proj_k] if sharing == "kv" else [theirs.proj_k, theirs.proj_v]
    put((ours.project, torch.stack([p.T for p in projections])[:, None]))
    pairs = compare(ours, theirs, frames(), {"out.weight": (ours.out.weight, theirs.to_out.weight), "out.bias": (ours.out.bias, theirs.to_out.bias)})
    q, k, v = ours.qkv.weight.grad.chunk(3)
    pairs["gradient of queries"] = q, theirs.to_q.weight.grad
    if sharing == "kv":
        pairs["gradient of keys and values"] = k + v, theirs.to_k.weight.grad
    else:
        pairs["gradient of keys"], pairs["gradient of values"] = (k, theirs.to_k.weight.grad), (v, theirs.to_v.weight.grad)
    pairs["gradient of the projections"] = ours.project.grad.sum(1), torch.stack([p.grad.T for p in projections])
    return pairs


@case(Linformer, package="linformer.linformer", what="LinformerSelfAttention, sharing='headwise', at full length", tolerance=1e-10)
def headwise():
    return linformer_pair("headwise", T)


@case(Linformer, package="linformer.linformer", what="LinformerSelfAttention, sharing='headwise', shorter than n_max", tolerance=1e-10)
def headwise_short():
    return linformer_pair("headwise", 2 * T)


@case(Linformer, package="linformer.linformer", what="LinformerSelfAttention(share_kv=True), which ties the linear layers too: ours with equal ones", tolerance=1e-10)
def key_value():
    return linformer_pair("kv", T)


@case(Linformer, package="linformer.linformer", what="LinformerSelfAttention, sharing='none' with equal projections; gradients summed over heads", tolerance=1e-10)
def unshared():
    return linformer_pair("none", T)


def attend(q, k, v):
    "One frame after the other: q (n,K), k and v (slots,K) → (n,K)."
    rows = []
    for one in q:
        weights = torch.stack([torch.exp(one @ key / math.sqrt(len(one))) for key in k])
        rows.append(sum(w * value for w, value in zip(weights, v)) / weights.sum())
    return torch.stack(rows)


def linformer_equations(m, x):
    n, H, heads = len(x), m.num_heads, []
    q, k, v = (split(z, H) for z in m.qkv(x).chunk(3, -1))
    for h in range(H):
        E, V = (m.project[p, min(h, m.project.shape[1] - 1)] for p in (0, -1))
        bar = [torch.stack([sum(weights[j, t] * z[h][t] for t in range(n)) for j in range(m.rank)]) for weights, z in ((E, k), (V, v))]
        heads.append(attend(q[h], *bar))
    return m.out(torch.cat(heads, -1))


@case(Linformer, package="", what="2006.04768 eq. 7, each utterance alone, sharing='none'", tolerance=1e-10)
def linformer_none():
    return against_equations(Linformer(D, num_heads=2, rank=5, n_max=40, sharing="none"), linformer_equations)


@case(Linformer, package="", what="2006.04768 eq. 7, each utterance alone, sharing='headwise'", tolerance=1e-10)
def linformer_headwise():
    return against_equations(Linformer(D, num_heads=2, rank=5, n_max=40, sharing="headwise"), linformer_equations)


@case(Linformer, package="", what="2006.04768 eq. 7, each utterance alone, sharing='kv'", tolerance=1e-10)
def linformer_kv():
    return against_equations(Linformer(D, num_heads=2, rank=5, n_max=40, sharing="kv"), linformer_equations)


def pooled_equations(m, x):
    n, H, k_slots = len(x), m.num_heads, m.rank
    q, kv = m.qkv(x).split([D, 2 * D], -1)
    if m.filter is not None:
        w, side = m.filter.weight[:, 0, :, 0], m.filter.kernel_size[0] // 2
        kv = torch.stack([m.filter.bias + sum(w[:, j + side] * kv[t + j] for j in range(-side, side + 1) if 0 <= t + j < n) for t in range(n)])
    slots = torch.stack([kv[math.floor(j * n / k_slots) : math.ceil((j + 1) * n / k_slots)].mean(0) for j in range(k_slots)])
    k, v = slots.chunk(2, -1)
    return m.out(torch.cat([attend(*z) for z in zip(split(q, H), split(k, H), split(v, H))], -1))


@case(LinformerPooled, package="", what="2006.04768 eq. 7 with pooling (section 4), each utterance alone", tolerance=1e-10)
def linformer_pooled():
    return against_equations(LinformerPooled(D, num_heads=2, rank=5), pooled_equations)


@case(LinformerPooled, package="", what="the same with a depthwise convolution before the pooling", tolerance=1e-10)
def linformer_pooled_filtered():
    return against_equations(LinformerPooled(D, num_heads=2, rank=5, kernel=3), pooled_equations)


@case(Fastformer, package="fast_transformer_pytorch", what="FastAttention without rotary positions, its global key multiplied by its global query (eq. 4 of 2108.09084), padded", tolerance=1e-10)
def fastformer():
    from fast_transformer_pytorch.fast_transformer_pytorch import FastAttention

    H, K, mask = 4, D // 4, real()
    ours, theirs = rough(Fastformer(D, num_heads=H)), FastAttention(D, heads=H, dim_head=K, max_seq_len=T).double()
    seen = {}

    def global_query(module, inputs, logits):
        weights = (logits.squeeze(-1) / math.sqrt(K)).masked_fill(~mask[:, None], -torch.inf).softmax(-1)
        seen["q"] = torch.einsum("bhn,bhnd->bhd", weights, inputs[0])[:, :, None]

    theirs.to_q_attn_logits.register_forward_hook(global_query)
    theirs.to_r.register_forward_pre_hook(lambda module, inputs: (inputs[0] * seen["q"],))
    put((ours.qkv.weight, theirs.to_qkv.weight), (ours.qkv.bias, 0 * ours.qkv.bias))
    put((ours.query_logit, theirs.to_q_attn_logits.weight), (ours.key_logit, theirs.to_k_attn_logits.weight))
    put((ours.transform.weight, torch.block_diag(*[theirs.to_r.weight] * H)), (ours.transform.bias, theirs.to_r.bias.repeat(H)))
    put((theirs.to_out.weight, torch.eye(D)), (theirs.to_out.bias, torch.zeros(D)))
    pairs = compare(lambda x: ours(x, mask), lambda x: zero_pads(theirs(x, mask), mask), frames(), {"qkv.weight": (ours.qkv.weight, theirs.to_qkv.weight)})
    for name, mine, other in (("w_q", ours.query_logit, theirs.to_q_attn_logits), ("w_k", ours.key_logit, theirs.to_k_attn_logits)):
        pairs[f"gradient of {name}"] = mine.grad.sum(0), other.weight.grad
    blocks = ours.transform.weight.grad.view(H, K, H, K)
    pairs["gradient of W_r"] = sum(blocks[h, :, h] for h in range(H)), theirs.to_r.weight.grad
    pairs["gradient of its bias"] = ours.transform.bias.grad.view(H, K).sum(0), theirs.to_r.bias.grad
    return pairs


def mean_by_softmax(logits, z):
    weights = torch.stack([a.exp() for a in logits])
    return sum(w * one for w, one in zip(weights, z)) / weights.sum()


def fastformer_equations(m, x):
    n, H, K, u = len(x), m.num_heads, D // m.num_heads, []
    q, k, *v = m.qkv(x).split(D, -1)
    v = q if m.tied else v[0]
    for h, (qh, kh, vh) in enumerate(zip(split(q, H), split(k, H), split(v, H))):
        wq, wk, rows, p = m.query_logit[h, 0], m.key_logit[h, 0], [], []
        for t in range(n):
            upto = t + 1 if m.causal else n
            global_q = mean_by_softmax([wq @ qh[s] / math.sqrt(K) for s in range(upto)], qh)
            p = [*p, global_q * kh[t]] if m.causal else [global_q * kh[s] for s in range(n)]
            global_k = mean_by_softmax([wk @ one / math.sqrt(K) for one in p], p)
            rows.append(global_k * vh[t])
        u.append(torch.stack(rows))
    return m.transform(torch.cat(u, -1)) + q


@case(Fastformer, package="", what="2108.09084 eq. 1 to 5, each utterance alone", tolerance=1e-10)
def fastformer_by_hand():
    return against_equations(Fastformer(D, num_heads=2), fastformer_equations)


@case(Fastformer, package="", what="2108.09084 eq. 1 to 5 with values that are the queries, each utterance alone", tolerance=1e-10)
def fastformer_tied():
    return against_equations(Fastformer(D, num_heads=2, tied=True), fastformer_equations)


@case(Fastformer, package="", what="the running form, each key with the global query of its own time", tolerance=1e-10)
def fastformer_causal():
    return against_equations(Fastformer(D, num_heads=2, causal=True), fastformer_equations)


def hyper_pair(tied, padded):
    from speechbrain.nnet.hypermixing import HyperMixing

    ours, theirs, mask = rough(Hyper(D, num_heads=4, hidden=32, tied=tied)), HyperMixing(D, 32, tied=tied, num_heads=4).double(), real() if padded else None
    nets = [theirs.hyper.w1_gen] if tied else [theirs.hyper.w1_gen, theirs.hyper.w2_gen]
    theirs.positional_encoding.pe = theirs.positional_encoding.pe.double()
    parts = lambda mine, other: ((mine.inner, other.fc1_weights), (mine.outer, other.fc2_weights), (mine.inner_bias, other.fc1_biases), (mine.outer_bias, other.fc2_biases))
    turn = lambda z: z.mT if z.ndim == 3 else z[:, None]
    for mine, other in zip(ours.hypernets, nets):
        put(*((p, turn(o)) for p, o in parts(mine, other)))
    put((theirs.layer_norm.weight, ours.norm.weight), (theirs.layer_norm.bias, ours.norm.bias))
    run = lambda x: zero_pads(theirs(x, x, x, key_padding_mask=None if mask is None else ~mask)[0], mask)
    pairs = compare(lambda x: ours(x, mask), run, frames(), {"norm.weight": (ours.norm.weight, theirs.layer_norm.weight), "norm.bias": (ours.norm.bias, theirs.layer_norm.bias)})
    for i, (mine, other) in enumerate(zip(ours.hypernets, nets), 1):
        for name, (p, o) in zip(("inner", "outer", "inner bias", "outer bias"), parts(mine, other)):
            pairs[f"gradient of hypernetwork {i}, {name}"] = p.grad, turn(o.grad)
    return pairs


@case(Hyper, package="speechbrain", what="HyperMixing, 4 heads (its position table is in single precision)")
def hyper():
    return hyper_pair(tied=False, padded=False)


@case(Hyper, package="speechbrain", what="HyperMixing, 4 heads, padded")
def hyper_padded():
    return hyper_pair(tied=False, padded=True)


@case(Hyper, package="speechbrain", what="HyperMixing(tied=True), 4 heads")
def hyper_tied():
    return hyper_pair(tied=True, padded=False)


@case(Hyper, package="speechbrain", what="HyperMixing(tied=True), 4 heads, padded")
def hyper_tied_padded():
    return hyper_pair(tied=True, padded=True)


def pom_equations(m, x):
    n, products = len(x), []
    factors = m.factors.weight.chunk(m.degree), m.factors.bias.chunk(m.degree)
    for t in range(n):
        z = [F.gelu(W @ x[t] + b) for W, b in zip(*factors)]
        products.append(torch.cat([torch.stack(z[: d + 1]).prod(0) for d in range(m.degree)]))
    rows = []
    for t in range(n):
        upto = t + 1 if m.causal else n
        state = sum(products[:upto]) / upto
        rows.append(m.out.weight @ (torch.sigmoid(m.select.weight @ x[t] + m.select.bias) * state) + m.out.bias)
    return torch.stack(rows)


@case(PoM, package="", what="2411.12663, each utterance alone, degree 3, expansion 2", tolerance=1e-10)
def pom():
    return against_equations(PoM(D), pom_equations)


@case(PoM, package="", what="2411.12663, causal, degree 3, expansion 2", tolerance=1e-10)
def pom_causal():
    return against_equations(PoM(D, causal=True), pom_equations)


def lite_equations(m, x):
    f = [F.gelu(m.shared.weight @ one + m.shared.bias) for one in x]
    ends = [t + 1 if m.causal else len(x) for t in range(len(x))]
    return torch.stack([m.combine.weight @ torch.cat([f[t], sum(f[:e]) / e]) + m.combine.bias for t, e in enumerate(ends)])


@case(SummaryLite, package="", what="2307.07421 eq. 1 and 2 with s = f, each utterance alone", tolerance=1e-10)
def summary_lite():
    return against_equations(SummaryLite(D), lite_equations)


@case(SummaryLite, package="", what="2307.07421 eq. 1 and 2 with s = f, causal", tolerance=1e-10)
def summary_lite_causal():
    return against_equations(SummaryLite(D, causal=True), lite_equations)
