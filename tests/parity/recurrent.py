"""Recurrent mixers: GRU, LSTM, Mamba."""
import copy
import math

import torch
import torch.nn.functional as F
from torch import nn

from essl_nb.core.shapes import lengths_to_mask, zero_pads
from essl_nb.mixers.mamba import Mamba
from essl_nb.mixers.recurrent import GRU, LSTM

from . import case, compare

D, T, LENGTHS = 24, 21, (21, 13, 2)


def frames():
    return torch.randn(3, T, D, dtype=torch.float64)


def real():
    return lengths_to_mask(torch.tensor(LENGTHS), T)


def rough(mixer):
    "In double precision, with every parameter off its initial value."
    with torch.no_grad():
        for p in mixer.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return mixer.double()


def packed(ours, theirs):
    "Against one network of torch over packed sequences, in one direction or both, and a linear layer of its own."
    theirs, out = theirs.double(), copy.deepcopy(rough(ours).out)
    paired = {"out": (ours.out.weight, out.weight), "out bias": (ours.out.bias, out.bias)}
    for part, end in ((ours.ahead, ""), (ours.back, "_reverse")):
        for name, p in part.named_parameters() if part is not None else ():
            other = getattr(theirs, name + end)
            other.data.copy_(p.data)
            paired[name + end] = (p, other)

    def run(x):
        sequence = nn.utils.rnn.pack_padded_sequence(x, torch.tensor(LENGTHS), batch_first=True, enforce_sorted=False)
        y, _ = nn.utils.rnn.pad_packed_sequence(theirs(sequence)[0], batch_first=True, total_length=T)
        return zero_pads(out(y), real())

    return compare(lambda x: ours(x, real()), run, frames(), paired)


@case(GRU, package="torch", what="nn.GRU(bidirectional=True) over packed sequences, with padding", tolerance=1e-12)
def gru():
    return packed(GRU(D, hidden=10), nn.GRU(D, 10, batch_first=True, bidirectional=True))


@case(GRU, package="torch", what="nn.GRU over packed sequences, causal, with padding", tolerance=1e-12)
def gru_causal():
    return packed(GRU(D, hidden=10, causal=True), nn.GRU(D, 10, batch_first=True))


@case(LSTM, package="torch", what="nn.LSTM(bidirectional=True) over packed sequences, with padding", tolerance=1e-12)
def lstm():
    return packed(LSTM(D, hidden=10), nn.LSTM(D, 10, batch_first=True, bidirectional=True))


@case(LSTM, package="torch", what="nn.LSTM over packed sequences, causal, with padding", tolerance=1e-12)
def lstm_causal():
    return packed(LSTM(D, hidden=10, causal=True), nn.LSTM(D, 10, batch_first=True))


@case(Mamba, package="transformers", what="MambaMixer, torch path, causal, with padding; it computes exp(A_log) in float32", tolerance=1e-6)
def mamba_causal():
    from transformers import MambaConfig
    from transformers.models.mamba.modeling_mamba import MambaMixer

    config = MambaConfig(hidden_size=D, state_size=5, conv_kernel=4, expand=2, time_step_rank=2, num_hidden_layers=1)
    ours, theirs = rough(Mamba(D, d_state=5, causal=True)), MambaMixer(config, 0).double().eval()
    way, mask = ours.ahead, real()
    pairs = {"in_proj": (ours.in_proj.weight, theirs.in_proj.weight), "conv": (way.conv.weight, theirs.conv1d.weight), "conv bias": (way.conv.bias, theirs.conv1d.bias),
             "x_proj": (way.x_proj.weight, theirs.x_proj.weight), "dt_proj": (way.dt_proj.weight, theirs.dt_proj.weight), "dt_bias": (way.dt_bias, theirs.dt_proj.bias),
             "D": (way.D, theirs.D), "out_proj": (ours.out_proj.weight, theirs.out_proj.weight)}
    with torch.no_grad():
        for mine, other in pairs.values():
            other.copy_(mine.view(other.shape))
        theirs.A_log.copy_(way.A_log.view(5, -1).T)
    found = compare(lambda x: ours(x, mask), lambda x: zero_pads(theirs(x, attention_mask=mask.long()), mask), frames(), pairs)
    found["gradient of A_log"] = (way.A_log.grad.view(5, -1).T, theirs.A_log.grad)
    return found


def one_way(ssm, x):
    "One utterance (n,E) through one direction, feature by feature and state by state (2312.00752, algorithm 2)."
    (n, E), K, N = x.shape, ssm.d_conv, ssm.d_state
    w, A = ssm.conv.weight[:, 0, :, 0], -torch.exp(ssm.A_log).view(N, E)
    u = torch.stack([sum(w[:, j] * x[t + j - K + 1] for j in range(K) if t + j - K + 1 >= 0) + ssm.conv.bias for t in range(n)])
    u = u * torch.sigmoid(u)
    y, h = [], [[x.new_zeros(()) for _ in range(N)] for _ in range(E)]
    for t in range(n):
        projected = ssm.x_proj.weight @ u[t]
        step, B, C = projected[: ssm.dt_rank], projected[ssm.dt_rank : ssm.dt_rank + N], projected[ssm.dt_rank + N :]
        delta = torch.log(1 + torch.exp(ssm.dt_proj.weight @ step + ssm.dt_bias))
        h = [[torch.exp(delta[e] * A[i, e]) * h[e][i] + delta[e] * B[i] * u[t, e] for i in range(N)] for e in range(E)]
        y.append(torch.stack([sum(C[i] * h[e][i] for i in range(N)) for e in range(E)]) + ssm.D * u[t])
    return torch.stack(y)


def written_out(causal):
    "Outputs and all gradients with padding, each utterance flipped alone. The equations get a twin, so that their gradients are their own."
    mixer, mask = rough(Mamba(D, d_state=3, expand=0.5, causal=causal)), real()
    twin = copy.deepcopy(mixer)

    def alone(x):  # (n,D)
        xz = x @ twin.in_proj.weight.T
        x, z = xz[:, : twin.inner], xz[:, twin.inner :]
        y = one_way(twin.ahead, x)
        if not causal:
            y = y + one_way(twin.back, x.flip(0)).flip(0)
        return (y * z * torch.sigmoid(z)) @ twin.out_proj.weight.T

    theirs = lambda x: torch.stack([F.pad(alone(one[:n]), (0, 0, 0, T - n)) for one, n in zip(x, LENGTHS)])
    assert twin.ahead.dt_rank == math.ceil(D / 16)
    return compare(lambda x: mixer(x, mask), theirs, frames(), {name: (p, dict(twin.named_parameters())[name]) for name, p in mixer.named_parameters()})


@case(Mamba, package="", what="2312.00752, algorithm 2; two directions as in 2401.09417, algorithm 1, with padding", tolerance=1e-11)
def mamba_equations():
    return written_out(causal=False)


@case(Mamba, package="", what="2312.00752, algorithm 2, causal, with padding", tolerance=1e-11)
def mamba_equations_causal():
    return written_out(causal=True)
