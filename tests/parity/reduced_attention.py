"""Attention by distance, within a window, and through slots: RelPos, Window, Luna."""
import copy
import math

import torch
import torch.nn.functional as F
from torch import nn

from essl_nb.core.shapes import lengths_to_mask, zero_pads
from essl_nb.mixers.luna import Luna
from essl_nb.mixers.relpos import RelPos, encodings
from essl_nb.mixers.window import Window

from . import case, compare

D, H, T, LENGTHS = 24, 2, 21, (21, 13, 2)
K = D // H


def frames():
    return torch.randn(3, T, D, dtype=torch.float64)


def real():
    return lengths_to_mask(torch.tensor(LENGTHS), T)


def rough(module):
    "In double precision, with every parameter off its initial value, zeros and ones included."
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return module.double()


def named(ours, theirs):
    "The parameters of two modules of one class, paired."
    return {name: (p, dict(theirs.named_parameters())[name]) for name, p in ours.named_parameters()}


def each_alone(equations, x):
    "Apply equations of one utterance (n,D) to each without its padding."
    return torch.stack([F.pad(equations(one[:n]), (0, 0, 0, T - n)) for one, n in zip(x, LENGTHS)])


def hidden(causal):
    "(B,1,T,T) bool: what a query must not look at."
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    return (~real()[:, None, None]).expand(-1, -1, T, -1) | (future if causal else False)


def conformer(causal):
    from transformers import Wav2Vec2ConformerConfig
    from transformers.models.wav2vec2_conformer.modeling_wav2vec2_conformer import Wav2Vec2ConformerRelPositionalEmbedding, Wav2Vec2ConformerSelfAttention

    config = Wav2Vec2ConformerConfig(hidden_size=D, num_attention_heads=H, position_embeddings_type="relative", attn_implementation="eager")
    config._attn_implementation = "eager"
    ours, theirs = rough(RelPos(D, num_heads=H, causal=causal)), Wav2Vec2ConformerSelfAttention(config).double().eval()
    q, k, v = theirs.linear_q, theirs.linear_k, theirs.linear_v
    pairs = {"qkv.weight": [m.weight for m in (q, k, v)], "qkv.bias": [m.bias for m in (q, k, v)], "out.weight": theirs.linear_out.weight, "out.bias": theirs.linear_out.bias,
             "distance.weight": theirs.linear_pos.weight, "u": theirs.pos_bias_u, "v": theirs.pos_bias_v}
    parameters = {name: (p, pairs[name]) for name, p in ours.named_parameters()}
    with torch.no_grad():
        for p, other in parameters.values():
            others = other if isinstance(other, list) else [other]
            for o, part in zip(others, p.chunk(len(others))):
                o.copy_(part.reshape(o.shape))
    place = Wav2Vec2ConformerRelPositionalEmbedding(config)(torch.zeros(1, T, D)).double()
    mask = torch.zeros(3, 1, T, T, dtype=torch.float64).masked_fill(hidden(causal), torch.finfo(torch.float64).min)
    theirs_padded = lambda x: zero_pads(theirs(x, attention_mask=mask, relative_position_embeddings=place)[0], real())
    return compare(lambda x: ours(x, real()), theirs_padded, frames(), parameters)


@case(RelPos, package="transformers", what="Wav2Vec2ConformerSelfAttention with relative positions, with padding (sinusoids in float32)")
def relpos_conformer():
    return conformer(causal=False)


@case(RelPos, package="transformers", what="Wav2Vec2ConformerSelfAttention with relative positions under a causal mask (sinusoids in float32)")
def relpos_conformer_causal():
    return conformer(causal=True)


def speechbrain(causal):
    "Their weights as functions of ours: rows of the projection head by head, no biases, scores over √K instead of √D."
    from speechbrain.nnet.attention import RelPosEncXL, RelPosMHAXL

    ours = rough(RelPos(D, num_heads=H, causal=causal)).float()
    nn.init.zeros_(ours.qkv.bias)
    theirs = RelPosMHAXL(D, H, mask_pos_future=causal)
    theirs.scale = 1 / math.sqrt(K)
    copies = {name: p.detach().clone().requires_grad_() for name, p in ours.named_parameters() if name != "qkv.bias"}
    place = RelPosEncXL(D)(torch.zeros(1, T, D)) if causal else encodings(T - 1, 2 * T - 1, D)[None]
    future = torch.ones(T, T, dtype=torch.bool).triu(1) if causal else None

    def call(x):
        weights = {"in_proj_weight": copies["qkv.weight"].view(3, H, K, D).transpose(0, 1).reshape(3 * D, D), "linear_pos.weight": copies["distance.weight"],
                   "out_proj.weight": copies["out.weight"], "out_proj.bias": copies["out.bias"],
                   "pos_bias_u": copies["u"].reshape(K, H), "pos_bias_v": copies["v"].reshape(K, H)}
        y = torch.func.functional_call(theirs, weights, (x, x, x, place), dict(key_padding_mask=~real(), attn_mask=future, return_attn_weights=False))
        return zero_pads(y, real())

    return compare(lambda x: ours(x, real()), call, frames().float(), {name: (dict(ours.named_parameters())[name], p) for name, p in copies.items()})


@case(RelPos, package="speechbrain", what="RelPosMHAXL with padding; scale 1/√K set, distances with their sign (its RelPosEncXL drops it)")
def relpos_speechbrain():
    return speechbrain(causal=False)


@case(RelPos, package="speechbrain", what="RelPosMHAXL and RelPosEncXL, causal, with padding; scale 1/√K set")
def relpos_speechbrain_causal():
    return speechbrain(causal=True)


@case(RelPos, package="", what="1901.02860 section 3.3: the four terms, pair by pair, both signs of distance", tolerance=1e-9)
def relpos_equations():
    ours = rough(RelPos(D, num_heads=H))
    twin = copy.deepcopy(ours)

    def equations(x):
        q, k, v = (z.view(-1, H, K) for z in twin.qkv(x).chunk(3, -1))
        rows = []
        for t in range(len(x)):
            heads = []
            for h in range(H):
                scores = []
                for s in range(len(x)):
                    angle = (t - s) * 1e4 ** (-torch.arange(0, D, 2, dtype=torch.float64) / D)
                    r = twin.distance(torch.stack([angle.sin(), angle.cos()], 1).flatten()).view(H, K)[h]
                    scores.append(q[t, h] @ k[s, h] + q[t, h] @ r + twin.u[h, 0] @ k[s, h] + twin.v[h, 0] @ r)
                heads.append((torch.stack(scores) / math.sqrt(K)).softmax(0) @ v[:, h])
            rows.append(torch.cat(heads))
        return twin.out(torch.stack(rows))

    return compare(lambda x: ours(x, real()), lambda x: each_alone(equations, x), frames(), named(ours, twin))


def window(**arguments):
    ours = rough(Window(D, num_heads=H, **arguments))
    twin = copy.deepcopy(ours)

    def turned(z, t):
        pair = torch.complex(z[: K // 2], z[K // 2 :]) * torch.exp(1j * t * 1e4 ** (-torch.arange(0, K, 2, dtype=torch.float64) / K))
        return torch.cat([pair.real, pair.imag])

    def equations(x):
        q, k, v = (z.view(-1, H, K) for z in twin.qkv(x).chunk(3, -1))
        rows = []
        for t in range(len(x)):
            mine = t // ours.chunk
            seen = [s for s in range(len(x)) if mine - ours.left <= s // ours.chunk <= mine + ours.right and (s <= t or not ours.causal)]
            scores = [torch.stack([turned(q[t, h], t) @ turned(k[s, h], s) for s in seen]) / math.sqrt(K) for h in range(H)]
            rows.append(torch.cat([a.softmax(0) @ v[seen, h] for h, a in enumerate(scores)]))
        return twin.out(torch.stack(rows))

    return compare(lambda x: ours(x, real()), lambda x: each_alone(equations, x), frames(), named(ours, twin))


@case(Window, package="", what="softmax over the frames of chunks c − 1 to c + 1, query by query, with padding", tolerance=1e-9)
def window_equations():
    return window(chunk=4)


@case(Window, package="", what="softmax over the frames from chunk c − 2 to the query itself, query by query, with padding", tolerance=1e-9)
def window_equations_causal():
    return window(chunk=4, causal=True)


@case(Luna, package="", what="2106.01540 section 3: pack, unpack and the packed sequence, over two layers, with padding", tolerance=1e-9)
def luna_equations():
    first, second = (rough(Luna(D, num_heads=H, packed=5)) for _ in range(2))
    second.follow()
    ours = nn.ModuleList([first, second])
    twin = copy.deepcopy(ours)

    def softmax_attention(q, k, v):
        "Head by head: (n,D) queries, (m,D) keys and values."
        parts = [slice(h * K, (h + 1) * K) for h in range(H)]
        return torch.cat([(q[:, h] @ k[:, h].T / math.sqrt(K)).softmax(-1) @ v[:, h] for h in parts], 1)

    def layer(m, x, p):
        "Y and what the norm of the next layer is taken of."
        (w_q, w_c), (b_q, b_c) = m.query_context.weight.chunk(2), m.query_context.bias.chunk(2)
        p = F.layer_norm(p, (D,), m.packed_norm.weight, m.packed_norm.bias)
        c = x @ w_c.T + b_c
        packed = softmax_attention(p @ m.pack_query.weight.T + m.pack_query.bias, c, c)
        k = packed @ m.packed_context.weight.T + m.packed_context.bias
        y = softmax_attention(x @ w_q.T + b_q, k, k)
        return y @ m.out.weight.T + m.out.bias, packed + p

    def equations(x):
        y, p = layer(twin[0], x, twin[0].packed)
        return layer(twin[1], x + y, p)[0]

    def mine(x):
        y, carry = first.mix(x, real())
        return second(x + y, real(), carry)

    return compare(mine, lambda x: each_alone(equations, x), frames(), named(ours, twin))


@case(Luna, package="", what="2106.01540 section 3: causal attention by f(X, Y, Z), frame by frame, with padding", tolerance=1e-9)
def luna_equations_causal():
    ours = rough(Luna(D, num_heads=H, packed=5, causal=True))
    twin = copy.deepcopy(ours)

    def f(X, Y, Z):
        return torch.stack([X[t] @ sum(torch.outer(Y[j], Z[j]) for j in range(t + 1)) / (t + 1) for t in range(len(X))])

    def equations(x):
        q, c = (z.view(-1, H, K) for z in twin.query_context(x).chunk(2, -1))
        p, heads = twin.pack_query(twin.packed).view(-1, H, K), []
        for h in range(H):
            pack = torch.log1p((c[:, h] @ p[:, h].T / math.sqrt(K)).exp())  # softplus, (n,l)
            unpack = f(q[:, h] / math.sqrt(K), c[:, h], pack).softmax(-1)
            heads.append(f(unpack, pack, c[:, h]))
        return twin.out(torch.cat(heads, 1))

    return compare(lambda x: ours(x, real()), lambda x: each_alone(equations, x), frames(), named(ours, twin))
