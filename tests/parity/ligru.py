"""The Light GRUs: SpeechBrain's layers, torch's autograd through the papers' equations."""
import torch

from essl_nb.core.shapes import lengths_to_mask, zero_pads
from essl_nb.ligru.layer import LiGRU, SLiGRU
from essl_nb.ligru.speechbrain_swap import from_speechbrain, swap_ligru
from essl_nb.mixers.ligru import LightMixer, StableLightMixer

from . import case, compare
from .recurrent import D, LENGTHS, T, frames, real, rough


def theirs(kind, norm="batchnorm"):
    "SpeechBrain's, two bidirectional layers in training, weights off their initial values."
    from speechbrain.nnet import RNN

    extra = dict(recurrent_elementwise_affine=True, ff_normalization=norm) if kind is SLiGRU else dict(normalization=norm)
    layer = getattr(RNN, kind.__name__)(hidden_size=16, input_shape=(3, T, D), num_layers=2, bidirectional=True, **extra)
    return rough(layer)


def ours_and_theirs(kind, norm="batchnorm"):
    "Our layer with SpeechBrain's weights, over frames without padding."
    there = theirs(kind, norm)
    here = from_speechbrain(there)
    pairs = {}
    for i, (way, old) in enumerate(zip(here.directions(), there.rnn)):
        pairs |= {f"{i} w": (way.w.weight, old.w.weight), f"{i} u": (way.u, old.u.weight), f"{i} norm": (way.norm.weight, old.norm.weight), f"{i} norm bias": (way.norm.bias, old.norm.bias)}
        if kind is SLiGRU:
            pairs |= {f"{i} gain": (way.gain, old.layer_norm.weight), f"{i} bias": (way.bias, old.layer_norm.bias)}
    return compare(lambda x: here(x)[0], lambda x: there(x)[0], frames(), pairs)


@case(LiGRU, package="speechbrain", what="nnet.RNN.LiGRU, 2 bidirectional layers, batch norm, in training", tolerance=1e-11)
def ligru():
    return ours_and_theirs(LiGRU)


@case(LiGRU, package="speechbrain", what="nnet.RNN.LiGRU, 2 bidirectional layers, layer norm", tolerance=1e-11)
def ligru_layer_norm():
    return ours_and_theirs(LiGRU, "layernorm")


@case(SLiGRU, package="speechbrain", what="nnet.RNN.SLiGRU, 2 bidirectional layers, affine recurrent norm, batch norm, in training", tolerance=1e-11)
def sligru():
    return ours_and_theirs(SLiGRU)


@case(swap_ligru, package="speechbrain", what="nnet.RNN.LiGRU swapped in place: output and hh together", tolerance=1e-11)
def swapped():
    import copy

    there = theirs(LiGRU)
    here = swap_ligru(copy.deepcopy(there))
    both = lambda layer: lambda x: torch.cat([part.flatten() for part in layer(x)])
    return compare(both(here), both(there), frames(), {n: (p, dict(there.named_parameters())[n]) for n, p in here.named_parameters()})


def norm(x, weight, bias, eps=1e-5):
    away = x - x.mean(-1, keepdim=True)
    return away / (away.square().mean(-1, keepdim=True) + eps).sqrt() * weight + bias


def direction(layer, x):
    "One utterance (n,D) forwards (1803.10225; 2302.10144 puts a layer norm on U h)."
    (way,), H = layer.layers[0], layer.hidden_size
    w, h, hs = norm(x @ way.w.weight.T, way.norm.weight, way.norm.bias), x.new_zeros(layer.hidden_size), []
    for w_t in w:
        p = way.u @ h
        g = w_t + (p if layer.cell == "ligru" else norm(p, 1, 0))
        z = 1 / (1 + torch.exp(-g[H:]))
        h = z * h + (1 - z) * g[:H].clamp(min=0)
        hs.append(h)
    return torch.stack(hs)


def written_out(kind):
    "The mixer in both directions, each utterance alone; the equations get a twin's weights."
    import copy

    mixer = rough(kind(D, hidden=10))
    twin = copy.deepcopy(mixer)

    def run(x):
        y = x.new_zeros(len(x), T, D)
        rows = []
        for b, n in enumerate(LENGTHS):
            one = x[b, :n]
            both = torch.cat([direction(twin.ahead, one), direction(twin.back, one.flip(0)).flip(0)], -1)
            rows.append(torch.cat([twin.out(both), y[b, n:]]))
        return torch.stack(rows)

    return compare(lambda x: mixer(x, real()), run, zero_pads(frames(), lengths_to_mask(torch.tensor(LENGTHS), T)), {n: (p, dict(twin.named_parameters())[n]) for n, p in mixer.named_parameters()})


@case(LightMixer, package="", what="1803.10225 with a layer norm, both directions, with padding", tolerance=1e-12)
def ligru_equations():
    return written_out(LightMixer)


@case(StableLightMixer, package="", what="2302.10144: a layer norm on U h, both directions, with padding", tolerance=1e-12)
def sligru_equations():
    return written_out(StableLightMixer)
