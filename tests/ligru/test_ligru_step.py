"""The packed step of the Light GRU against float64, at widths that fit no vector, for every kind of weights."""
import copy
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from essl_nb.core.registry import EsslError
from essl_nb.ligru.cpu import panels, step
from essl_nb.ligru.cpu.panels import WEIGHTS, pack_few_bits, round_weights
from essl_nb.ligru.cpu.step import PackedStep, StepLiGRU, fold_norms, pack_step, slow_frames
from essl_nb.ligru.layer import LiGRU, SLiGRU
from essl_nb.mixers.ligru import LightMixer

CELLS = {"LiGRU": LiGRU, "SLiGRU": SLiGRU}
SAME = {"float32": 3e-6, "bfloat16": 3e-6, "int8": 3e-4}  # from float64 with the same rounded weights
LAYER = {"float32": 3e-6, "bfloat16": 1e-2, "int8": 3e-2}  # from the layer itself


def a_layer(cell="LiGRU", dim=80, hidden=203, seed=0, **kw):
    "A layer in evaluation, whose norms and biases are not those of the beginning."
    torch.manual_seed(seed)
    layer = CELLS[cell](dim, hidden, **kw).eval()
    with torch.no_grad():
        for name, v in [*layer.named_parameters(), *layer.named_buffers()]:
            if v.ndim == 1:
                v.copy_(torch.rand_like(v) / 4 + (1 if name.endswith(("weight", "running_var", "gain")) else 0))
    return layer


def furthest(y, truth):
    return ((y.double() - truth).abs().max() / truth.abs().max()).item()


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("cell,kw", [("LiGRU", {}), ("LiGRU", dict(normalization="layer")), ("SLiGRU", dict(normalization="none")),
                                     ("SLiGRU", dict(recurrent_affine=True)), ("SLiGRU", dict(normalization="layer", recurrent_affine=True))])
def test_equals_float64_with_the_same_weights_and_the_layer_to_their_precision(cell, kw, weights):
    layer = a_layer(cell, **kw)
    folded = fold_norms(layer.layers[0][0], layer)
    x, h = torch.randn(3, 20, 80), torch.randn(3, 203)
    y, last = PackedStep(folded, weights).step(x, h)
    assert furthest(y, slow_frames(folded, weights, x, h)) < SAME[weights]
    with torch.no_grad():
        whole, h_n = layer(x, h[None])
    assert furthest(y, whole.double()) < LAYER[weights] and furthest(last, h_n[0].double()) < LAYER[weights]
    assert torch.equal(last, y[:, -1])


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("dim,hidden,batch", [(1, 1, 1), (3, 5, 2), (31, 64, 1), (64, 33, 9), (130, 16, 4)])
def test_any_width_and_number_of_streams(dim, hidden, batch, weights):
    layer = a_layer(dim=dim, hidden=hidden)
    folded = fold_norms(layer.layers[0][0], layer)
    x, h = torch.randn(batch, 3, dim), torch.randn(batch, hidden)
    y, _ = PackedStep(folded, weights).step(x, h)
    assert furthest(y, slow_frames(folded, weights, x, h)) < SAME[weights]


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "tanh", "sine"])
def test_every_activation(activation, weights):
    layer = a_layer(activation=activation)
    folded = fold_norms(layer.layers[0][0], layer)
    x, h = torch.randn(1, 4, 80), torch.randn(1, 203)
    assert furthest(PackedStep(folded, weights).step(x, h)[0], slow_frames(folded, weights, x, h)) < SAME[weights]


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("batch_first", [True, False])
def test_changing_chunks_give_what_one_call_gives(weights, batch_first):
    stream = pack_step(a_layer("SLiGRU", num_layers=2, batch_first=batch_first), weights)
    x = torch.randn(2, 40, 80)
    order = (lambda t: t) if batch_first else (lambda t: t.transpose(0, 1))
    whole, h_n = stream(order(x))
    state, chunks = stream.init_state(2), []
    for chunk in x.split([1, 5, 0, 2, 17, 1, 8, 6], 1):
        y, state = stream.step(order(chunk), state)
        chunks.append(order(y))
    assert furthest(torch.cat(chunks, 1), order(whole).double()) < 2e-6 and furthest(state["h"], h_n.double()) < 2e-6


@pytest.mark.parametrize("weights", WEIGHTS)
def test_a_stream_that_is_not_finite_stays_alone(weights):
    stream, x = pack_step(a_layer(), weights), torch.randn(4, 6, 80)
    clean, _ = stream(x)
    for wrong in (float("nan"), float("inf")):
        bad = x.clone()
        bad[2, 3, 7] = wrong
        y, _ = stream(bad)
        others = [0, 1, 3]
        assert torch.equal(y[others], clean[others]) and torch.equal(y[2, :3], clean[2, :3])
        assert not y[2, 3:].isfinite().all()
        if wrong != wrong:
            assert y[2, 3:].isnan().all()


@pytest.mark.parametrize("scale", [1e-35, 1e-20, 1.0, 1e15])
def test_int8_rounds_states_of_any_size(scale):
    w = torch.randn(70, 65)
    values, scales = round_weights(w, "int8")
    packed, x = pack_few_bits(values), torch.randn(2, 65) * scale
    x[1] = 0
    out = np.empty((2, packed.shape[0] * panels.COLUMNS), np.float32)
    channel = torch.nn.functional.pad(scales, (0, out.shape[1] - 70)).numpy()
    panels.multiply_few_bits(out, x.numpy(), packed, channel, 1)
    truth = x.double() @ (values.double() * scales.double()[:, None]).T
    limit = 1e-29 if scale < 1e-30 else 1e-3 * scale
    assert np.abs(out[:, :70] - truth.numpy()).max() <= limit and (out[1, :70] == 0).all()


def test_whole_numbers_do_not_overflow():
    K = 4096
    values, scales = round_weights(torch.ones(1, K), "int8")
    packed, out = pack_few_bits(values), np.empty((1, panels.COLUMNS), np.float32)
    panels.multiply_few_bits(out, np.ones((1, K), np.float32), packed, np.full(panels.COLUMNS, scales[0]), 0)
    assert abs(out[0, 0] / K - 1) < 1e-4


def test_plain_operations_give_what_the_instruction_gives():
    code = """
import numpy as np, torch
from essl_nb.ligru.cpu import panels
panels.PAIR_SUM = None
panels.multiply_few_bits._cache.disable() if hasattr(panels.multiply_few_bits, '_cache') else None
values, scales = panels.round_weights(torch.randn(20, 9), 'int8')
packed, x = panels.pack_few_bits(values), torch.randn(3, 9)
out = np.empty((3, packed.shape[0] * panels.COLUMNS), np.float32)
panels.multiply_few_bits(out, x.numpy(), packed, np.pad(scales.numpy(), (0, out.shape[1] - 20)), 0)
print(np.abs(out[:, :20] - (x @ (values * scales[:, None]).T).numpy()).max() < 2e-3)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=180)
    assert done.stdout.strip() == "True", done.stderr[-2000:]


def test_bytes_halve_and_quarter():
    layer = LiGRU(512, 512).eval()
    size = {weights: pack_step(layer, weights).bytes for weights in WEIGHTS}
    assert size["float32"] < 4.1 * 2**20 and size["bfloat16"] < 0.51 * size["float32"] and size["int8"] < 0.26 * size["float32"]


def test_rounding_uses_the_whole_range_of_each_channel():
    w = torch.randn(6, 40) * torch.logspace(-3, 3, 6)[:, None]
    w[3] = 0
    values, scales = round_weights(w, "int8")
    assert values.abs().amax(1).tolist() == [127, 127, 127, 0, 127, 127]
    assert ((values * scales[:, None] - w).abs().amax(1) <= w.abs().amax(1) / 253).all()


def test_what_was_given_is_left_as_it_is_and_results_are_not_shared():
    layer = a_layer()
    stream, x, before = pack_step(layer, "int8"), torch.randn(2, 3, 80), copy.deepcopy(layer.state_dict())
    state = stream.init_state(2)
    kept = x.clone(), state["h"].clone()
    y, after = stream.step(x, state)
    assert torch.equal(x, kept[0]) and torch.equal(state["h"], kept[1])
    y.zero_()
    assert after["h"].abs().max() > 0
    assert all(torch.equal(v, before[name]) for name, v in layer.state_dict().items())
    again, _ = copy.deepcopy(stream).step(x, state)
    assert torch.equal(again, stream.step(x, state)[0])


def test_frames_in_any_order_of_memory():
    stream, x = pack_step(a_layer(), "bfloat16"), torch.randn(80, 6, 2)
    y, _ = stream(x.permute(2, 1, 0))
    assert torch.equal(y, stream(x.permute(2, 1, 0).contiguous())[0])


def test_in_the_place_of_a_mixers_cell():
    torch.manual_seed(0)
    mixer = LightMixer(40, causal=True, hidden=33).eval()
    x = torch.randn(2, 12, 40)
    with torch.no_grad():
        whole = mixer(x)
        mixer.ahead = pack_step(mixer.ahead, "int8")
        state, chunks = mixer.init_state(2), []
        for chunk in x.split([1, 4, 7], 1):
            y, state = mixer.step(chunk, state)
            chunks.append(y)
    assert furthest(torch.cat(chunks, 1), whole.double()) < 3e-2


STREAM = a_layer()
WRONG = {
    "kind of weights": (lambda: pack_step(STREAM, "int4"), "int4.*'float32', 'bfloat16', 'int8'"),
    "not a layer": (lambda: pack_step(torch.nn.GRU(8, 8)), "GRU was given"),
    "both directions": (lambda: pack_step(LiGRU(8, 8, bidirectional=True)), "looks ahead"),
    "float64": (lambda: pack_step(LiGRU(8, 8).double()), "float64.*Convert"),
    "weights that are no numbers": (lambda: pack_step(broken_layer()), "finite"),
    "another width": (lambda: pack_step(STREAM)(torch.zeros(1, 1, 81)), "D=80"),
    "no batch": (lambda: pack_step(STREAM).steps[0].step(torch.zeros(1, 80), torch.zeros(1, 203)), r"x\[None\]"),
    "frames of float64": (lambda: pack_step(STREAM)(torch.zeros(1, 1, 80).double()), "float32 tensors"),
    "no tensor": (lambda: pack_step(STREAM).steps[0].step([0.0], torch.zeros(1, 203)), "list"),
    "a state of another batch": (lambda: pack_step(STREAM)(torch.zeros(2, 1, 80), torch.zeros(1, 1, 203)), r"\(2, 203\)"),
    "a state of more layers": (lambda: pack_step(STREAM)(torch.zeros(1, 1, 80), torch.zeros(2, 1, 203)), "L=1"),
}


def broken_layer():
    layer = LiGRU(8, 8)
    layer.layers[0][0].u.data[3, 3] = float("nan")
    return layer


@pytest.mark.parametrize("what", WRONG)
def test_bad_input_is_answered(what):
    call, told = WRONG[what]
    with pytest.raises(EsslError, match=told):
        call()


def test_without_a_compiler_it_says_what_to_use():
    code = "from essl_nb.ligru.cpu.step import pack_step\nfrom essl_nb.ligru.layer import LiGRU\npack_step(LiGRU(8, 8).eval())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "NUMBA_DISABLE_JIT": "1"}, timeout=120)
    assert "EsslError" in done.stderr and "the layer's own step" in done.stderr


def test_no_frame_and_no_stream():
    stream = StepLiGRU(STREAM, "int8")
    y, h = stream(torch.zeros(1, 0, 80), torch.ones(1, 1, 203))
    assert y.shape == (1, 0, 203) and torch.equal(h, torch.ones(1, 1, 203))
    assert stream(torch.zeros(0, 3, 80))[0].shape == (0, 3, 203)
