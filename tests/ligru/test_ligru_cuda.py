"""The GPU kernels of the Light GRU: in a simulator and, where there is one, on a GPU."""
import ctypes
import re
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import cudasim
import pytest
import torch

from essl_nb.core.registry import EsslError
from essl_nb.ligru import cell, custom_op as operator, layer as layers
from essl_nb.ligru.gpu import backend as cuda, persistent, ptx
from essl_nb.ligru.gpu.launch_plan import A100, H100, Plan
from essl_nb.ligru.gpu.tile import KernelShape, pack_weights
from essl_nb.ligru.layer import LiGRU, SLiGRU

NONE = replace(A100, name="a GPU without registers", registers=0)
PLANS = cuda.plan_on


@pytest.fixture(autouse=True)
def seeded():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
    PLANS.cache_clear()


def problem(H, B, T, R=1, name="ligru", activation="relu", device="cpu", lengths=True, drop=True):
    "Random inputs, utterances of all lengths from 0 to T, NaN in what is padding."
    x = SimpleNamespace(H=H, B=B, T=T, R=R, name=name, activation=activation, gain=None, bias=None, drop=None, lengths=None)
    x.wx, x.u, x.h0, x.grad = torch.randn(T, R * B, 2 * H), torch.randn(R, 2 * H, H) / H**0.5, torch.randn(R * B, H), torch.randn(T, R * B, H)
    if drop:
        x.drop = (torch.rand(R * B, H) > 0.3).float() / 0.7
    if lengths:
        x.lengths = torch.randint(0, T + 1, (R * B,))
        x.lengths[0], x.lengths[-1] = 0, T
        x.wx[torch.arange(T)[:, None] >= x.lengths] = float("nan")
    if name == "sligru":
        x.gain, x.bias = 1 + 0.2 * torch.randn(R, 2 * H), 0.1 * torch.randn(R, 2 * H)
    for k, v in vars(x).items():
        if isinstance(v, torch.Tensor):
            setattr(x, k, v.to(device))
    return x


JOIN = {"wx": lambda v: torch.cat(v, 1), "u": torch.stack, "h0": torch.cat, "gain": torch.stack, "bias": torch.stack} # of directions


def truth(x):
    "States, and all gradients by name, by autograd through the plain loop in float64."
    hs, found = [], []
    for r in range(x.R):
        q = slice(r * x.B, (r + 1) * x.B)
        own = dict(wx=torch.nan_to_num(x.wx[:, q]), u=x.u[r], h0=x.h0[q])
        own |= {} if x.gain is None else dict(gain=x.gain[r], bias=x.bias[r])
        a = {name: v.double().requires_grad_() for name, v in own.items()}
        drop, lengths = (None if v is None else v[q] for v in (x.drop, x.lengths))
        kw = dict(drop=None if drop is None else drop.double(), lengths=lengths, cell=x.name, activation=x.activation)
        h = cell.recurrence(**a, **kw)
        hs.append(h.detach())
        found.append(dict(zip(a, torch.autograd.grad(h, list(a.values()), x.grad[:, q].double()), strict=True)))
    return torch.cat(hs, 1), {name: JOIN[name]([f[name] for f in found]) for name in found[0]}


def both_ways(x, engine, precision="fp32", recompute=False):
    "States, what was kept, and gradients by the code for the GPU."
    kw = dict(cell=x.name, activation=x.activation, precision=precision, engine=engine)
    hs, kept = cuda.forward(x.wx, x.u, x.h0, x.drop, x.lengths, x.gain, x.bias, recompute=recompute, **kw)
    if recompute:
        assert kept == cell.Kept()
        kept = cuda.remake(x.wx, x.u, x.h0, x.gain, x.bias, hs, cell=x.name, activation=x.activation, precision=precision)
    return hs, kept, cuda.backward(x.grad, x.u, x.h0, x.drop, x.lengths, x.gain, x.bias, hs, kept, **kw)


def named(grads):
    return {name: g for name, g in grads._asdict().items() if g is not None}


def same(a, b):
    "Are these the same gradients, to the last bit?"
    a, b = named(a), named(b)
    return a.keys() == b.keys() and all(torch.equal(g, b[name]) for name, g in a.items())


def error(a, b):
    a, b = a.detach(), b.detach()
    return float((a - b).abs().max() / b.abs().max().clamp(min=1))


def agree(x, found, tolerance):
    hs, _, grads = found
    true, wanted = truth(x)
    assert error(hs, true) < tolerance, "states"
    assert named(grads).keys() == wanted.keys()
    for name, true_one in wanted.items():
        assert error(named(grads)[name], true_one) < tolerance, name
    if x.lengths is not None:
        assert (grads.wx[torch.arange(x.T, device=hs.device)[:, None] >= x.lengths] == 0).all()


@pytest.fixture
def shaped(monkeypatch):
    "Make the plan take these warps and tiles, forwards and backwards (twice as many warps), and so many tiles of utterances at once."
    def shape(warps, tiles, at_once=99):
        def chosen(device, engine, hidden, batch, precision, directions=1, backward=False, keep=True, **kw):
            count = 2 * warps if backward else warps
            shape = KernelShape(hidden, count, tiles, precision, backward=backward, keep=keep or backward, **kw)
            groups = -(-batch // shape.rows)
            launches = -(-groups // min(groups, at_once))
            grid = shape.blocks, -(-groups // launches), directions
            return Plan("persistent", shape, grid, launches, 0, 0, 0, 0, "")

        monkeypatch.setattr(cuda, "plan_on", chosen)

    return shape


def test_the_simulator_rounds_as_bfloat16_does():
    x = torch.cat([torch.randn(200), 1 + torch.arange(64) / 512, torch.tensor([0.0, -0.0, 3e38, 1e-40])]).view(-1, 2)
    words = torch.tensor([int(cudasim.pack_bf16x2(*row)) for row in x.numpy()], dtype=torch.int32)
    assert torch.equal(words.view(torch.bfloat16), x.bfloat16().flatten())


@pytest.mark.parametrize("lost", ["wait", "arrive", "syncthreads"])
def test_the_simulator_would_notice_a_lost_barrier(shaped, lost):
    shaped(2, 1)
    words = SimpleNamespace(**vars(cudasim.WORDS))
    if lost == "wait":
        words.reached = lambda count, i: 1 << 30
    elif lost == "arrive":
        words.arrive = lambda count, i: None
    else:
        words.cuda = type("Cuda", (cudasim.Cuda,), {"syncthreads": lambda self: None})()
    x, wrong = problem(20, 3, 4, activation="tanh"), False
    try:
        wrong = not error(both_ways(x, cudasim.Simulator(H100, 1, words))[0], truth(x)[0]) < 1e-5
    except RuntimeError as e:
        wrong = "deadlock" in str(e) or "meet" in str(e)
    assert wrong


def test_the_order_of_threads_does_not_matter(shaped):
    shaped(2, 1)
    x = problem(20, 3, 3, name="sligru", activation="tanh")
    first, *others = [both_ways(x, cudasim.Simulator(H100, seed)) for seed in (None, 0, 1)]
    for other in others:
        assert torch.equal(first[0], other[0]) and same(first[2], other[2])


SHAPES = { # hidden, batch, frames, directions, warps, tiles, tiles of utterances at once
    "one_block": (8, 2, 3, 1, 2, 1, 99), "ragged": (21, 11, 4, 1, 2, 1, 99), "two_ways": (17, 3, 3, 2, 2, 1, 99),
    "wide_tile": (20, 13, 3, 1, 4, 2, 99), "deep": (72, 2, 2, 1, 2, 1, 99), "in_turns": (12, 19, 2, 2, 2, 1, 2),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("name", cell.CELLS)
def test_float32_is_the_truth_in_every_shape(shaped, name, shape):
    H, B, T, R, *rest = shape
    shaped(*rest)
    x = problem(H, B, T, R, name, "tanh")
    agree(x, both_ways(x, cudasim.Simulator(H100)), 1e-5)


@pytest.mark.parametrize("activation", cell.ACTIVATIONS)
@pytest.mark.parametrize("name", cell.CELLS)
def test_float32_is_the_truth_for_every_activation(shaped, name, activation):
    shaped(2, 1)
    x = problem(20, 4, 4, 1, name, activation)
    engine = cudasim.Simulator(H100)
    found = both_ways(x, engine)
    agree(x, found, 1e-5)
    again = both_ways(x, engine, recompute=True)
    agree(x, again, 1e-5)
    real = slice(None) if x.lengths is None else torch.arange(x.T)[:, None] < x.lengths
    for name, kept in found[1]._asdict().items():
        remade = getattr(again[1], name)
        assert (kept is None) == (remade is None) and (kept is None or error(remade[real], kept[real]) < 1e-5), name


def test_without_mask_lengths_gain_and_a_direction_of_its_own(shaped):
    shaped(2, 1)
    x = problem(9, 2, 3, name="sligru", lengths=False, drop=False)
    x.gain = x.bias = None
    kw = dict(cell="sligru", activation="relu", engine=cudasim.Simulator(H100))
    hs, kept = cuda.forward(x.wx, x.u[0], x.h0, **kw)
    grads = named(cuda.backward(x.grad, x.u[0], x.h0, None, None, None, None, hs, kept, **kw))
    true, kept = cell.forward(x.wx, x.u[0], x.h0, cell="sligru")
    wanted = named(cell.backward(x.grad, x.u[0], x.h0, None, None, None, None, true, kept, cell="sligru"))
    assert error(hs, true) < 1e-5 and grads.keys() == wanted.keys() == {"wx", "u", "h0"}
    assert all(grads[k].shape == b.shape and error(grads[k], b) < 1e-5 for k, b in wanted.items())


def test_bfloat16_in_is_bfloat16_out_and_its_products_are(shaped):
    shaped(2, 1)
    x, engine = problem(20, 3, 4, name="sligru"), cudasim.Simulator(H100)
    for k in ("wx", "u", "h0", "drop", "gain", "bias", "grad"):
        setattr(x, k, getattr(x, k).bfloat16())
    found = both_ways(x, engine, None)
    assert {t.dtype for t in (found[0], *found[1], *found[2]) if t is not None} == {torch.bfloat16}
    assert {shape.precision for _, shape, *_ in engine.launched} == {"bf16"}
    agree(x, found, 0.1)


def test_precision_is_what_pytorch_is_set_to():
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert cuda.usual_precision(torch.float32) == "bf16"
        torch.set_float32_matmul_precision("high")
        assert cuda.usual_precision(torch.float32) == "fp32" and cuda.usual_precision(torch.bfloat16) == "bf16"
    finally:
        torch.set_float32_matmul_precision(before)


def test_directions_may_share_a_gain(shaped):
    shaped(2, 1)
    x = problem(9, 2, 3, 2, name="sligru")
    x.gain = x.bias = None
    one = torch.rand(18) + 0.5
    x.gain, x.bias = one.expand(2, -1), one.expand(2, -1)
    separate = both_ways(x, cudasim.Simulator(H100))[2]
    x.gain = x.bias = one
    shared = both_ways(x, cudasim.Simulator(H100))[2]
    assert separate.gain.shape == separate.bias.shape == (2, 18) and shared.gain.shape == shared.bias.shape == (18,)
    assert error(shared.gain, separate.gain.sum(0)) < 1e-6 and error(shared.bias, separate.bias.sum(0)) < 1e-6


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("name,activation", [("ligru", "sine"), ("sligru", "tanh")])
def test_bfloat16_rounds_the_factors_of_the_product_and_nothing_else(shaped, name, activation, shape):
    """Frame by frame from the kernel's own state before it, so that one number rounded the other way cannot hide or cause anything."""
    H, B, T, R, *rest = shape
    shaped(*rest)
    x, round16 = problem(H, B, T, R, name, activation), lambda v: v.bfloat16().double()
    engine, f, rows = cudasim.Simulator(H100), cell.ACTIVATIONS[activation], lambda v: v.view(T, R, B, -1)
    hs, kept, grads = both_ways(x, engine, "bf16")
    dp = [args["dp" if name == "sligru" else "dwx"] for kernel, _, _, args in engine.launched if kernel == "backward_kernel"][-1]
    before = torch.cat([x.h0[None], hs[:-1]])
    real = torch.arange(T)[:, None, None] < x.lengths[:, None]
    p = (rows(round16(before)) @ round16(x.u).mT).view(T, R * B, 2 * H)
    xhat, rstd = cell.recurrent_norm(p)
    each = lambda v: v.double().repeat_interleave(B, 0)  # (R,2H) → (R*B,2H)
    if name == "sligru":
        p = xhat * each(x.gain) + each(x.bias)
    a, b = (torch.nan_to_num(x.wx).double() + p).chunk(2, -1)
    z, c, slope = torch.sigmoid(b), f.value(a) * x.drop, f.slope(a if f.keeps == "argument" else f.value(a)) * x.drop
    assert error(hs, torch.where(real, z * before + (1 - z) * c, before.double())) < 3e-6
    back = torch.cat([dp[1:], torch.zeros(1, R * B, 2 * H)])
    through = (rows(round16(back)) @ round16(x.u)).view(T, R * B, H)
    D = torch.zeros(T + 1, R * B, H, dtype=torch.float64)
    for t in reversed(range(T)):  # what came through the gate of the frame after it, and the product
        keep = 0 if t == T - 1 else torch.where(real[t + 1], D[t + 1] * z[t + 1], D[t + 1])
        D[t] = x.grad[t] + keep + through[t]
    dG = torch.where(real, torch.cat([D[:-1] * (1 - z) * slope, D[:-1] * (before - c) * z * (1 - z)], -1), 0)
    assert error(grads.wx, dG) < 1e-5
    if name == "sligru":
        y = dG * each(x.gain)
        dP = rstd * (y - y.mean(-1, keepdim=True) - xhat * (y * xhat).mean(-1, keepdim=True))
        assert error(dp, torch.where(real, dP, 0)) < 1e-5 and error(grads.bias, rows(dG).sum((0, 2))) < 1e-5
    assert error(grads.u, torch.einsum("trbg,trbh->rgh", rows(dp.double()), rows(before.double()))) < 1e-5
    agree(x, (hs, kept, grads), 0.05)


@pytest.mark.parametrize("name,activation,recompute", [("ligru", "relu", True), ("ligru", "sine", False), ("sligru", "tanh", False)])
def test_frame_by_frame_is_the_truth(name, activation, recompute):
    x = problem(37, 2, 5, 2, name, activation)  # a graph of 3 frames, then 2 of them
    engine = cudasim.Simulator(NONE)
    agree(x, both_ways(x, engine, recompute=recompute), 1e-5)
    assert {kernel for kernel, *_ in engine.launched} == {"forward_frame", "backward_frame"}


def on_simulator(monkeypatch, precision=None):
    "Operators run the code for the GPU in a simulator; what was launched is in the simulator's list."
    engine = cudasim.Simulator(H100)
    kw = dict(engine=engine) if precision is None else dict(engine=engine, precision=precision)
    module = SimpleNamespace(forward=partial(cuda.forward, **kw), backward=partial(cuda.backward, **kw), remake=cuda.remake)
    options = {} if precision is None else dict(precision=precision)
    monkeypatch.setattr(operator, "backend_of", lambda backend, x, u, threads, precision: (module, "cuda", options))
    return engine


@pytest.mark.parametrize("normalization", ["batch", "layer"])
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "remade"])
@pytest.mark.parametrize("kind,shared,launches", [(LiGRU, False, 8), (LiGRU, "at once", 4), (SLiGRU, "at once", 4), (SLiGRU, True, 4)], ids=str)
def test_layers_run_on_it(monkeypatch, kind, shared, launches, recompute, normalization):
    extra = dict(recurrent_affine=True) if kind is SLiGRU else {}
    layer = kind(6, 12, num_layers=2, bidirectional=True, shared_directions=shared is True, normalization=normalization, activation="tanh", recompute=recompute, **extra)
    x, lengths = torch.randn(3, 4, 6, requires_grad=True), torch.tensor([4, 1, 3])
    weights = [x, *layer.parameters()]

    def run():
        y, last = layer(x, lengths=lengths)
        return [y, last, *torch.autograd.grad((y.sin().sum() + last.square().sum()), weights)]

    true, engine = run(), on_simulator(monkeypatch)
    if shared == "at once":
        monkeypatch.setattr(layers, "both_at_once", lambda layer, directions, x: len(directions) > 1)
    assert all(error(a, b) < 1e-5 for a, b in zip(run(), true)) and len(engine.launched) == launches


def test_what_is_made_again_is_rounded_as_it_was(monkeypatch):
    "With bfloat16 products, the backward pass from what was kept and from what is made again is the same."
    x = problem(12, 3, 5, drop=False, lengths=False, activation="tanh")
    on_simulator(monkeypatch, "bf16")
    leaves, found = [t.requires_grad_() for t in (x.wx, x.u[0], x.h0)], []
    for recompute in (False, True):
        hs = operator.light_recurrence(*leaves, activation="tanh", recompute=recompute)
        found.append(torch.autograd.grad(hs, leaves, x.grad))
    assert all(error(a, b) < 1e-6 for a, b in zip(*found))
    monkeypatch.undo()
    exact = torch.autograd.grad(operator.light_recurrence(*leaves, activation="tanh"), leaves, x.grad)
    assert error(found[0][0], exact[0]) > 1e-5


def test_weights_of_two_directions_are_for_the_gpu():
    x = problem(9, 2, 3, 2)
    with pytest.raises(EsslError, match="each direction"):
        operator.light_recurrence(x.wx, x.u, x.h0, backend="cpu")
    with pytest.raises(EsslError, match="R directions"):
        operator.light_recurrence(x.wx[:, :3], x.u, x.h0[:3])


def test_types_that_the_kernels_do_not_have_go_to_the_plain_loop():
    assert "float32 and bfloat16, not float64" in operator.refusal("cuda", "cuda", torch.float64)
    assert operator.explain_backend("auto", "cuda", torch.float16).name == "reference"


def test_nothing_to_do():
    x = problem(9, 2, 0, 2, "sligru", lengths=False)
    hs, kept, grads = both_ways(x, cudasim.Simulator(H100))
    assert hs.shape == (0, 4, 9) and grads.u.shape == x.u.shape and grads.gain.shape == (2, 18)
    assert named(grads).keys() == {"wx", "u", "h0", "gain", "bias"} and all((g == 0).all() for g in named(grads).values())


def test_every_weight_is_held_once():
    for backward in (False, True):
        for precision in ("bf16", "fp32"):
            shape = KernelShape(21, 4, 1, precision, backward=backward)
            u = (1 + torch.arange(2 * 21 * 21) % 251).float().view(1, 42, 21)  # exact in bfloat16
            held = pack_weights(u, shape)
            assert len(held) == shape.blocks * shape.threads * shape.held
            numbers = held.view(torch.bfloat16) if precision == "bf16" else held
            assert numbers[numbers > 0].float().sort().values.tolist() == u.flatten().sort().values.tolist()


@pytest.mark.parametrize("backward", [False, True])
def test_arguments_are_words_as_the_compiled_kernel_reads_them(backward):
    "Against the parameters that Numba's own compiler declares; the driver is given addresses and no types."
    pytest.importorskip("numba_cuda")
    shape = KernelShape(24, 4, 1, "fp32", "sligru", backward=backward)
    kernel = persistent.KERNELS["backward" if backward else "forward"](ptx.device_words(), shape)
    kinds = persistent.signature(kernel, shape)
    declared = re.findall(r"\.param \.(\w+)", ptx.to_ptx(kernel, kinds, (9, 0), shape.bounds).split(".entry")[1].split(")")[0])
    tensors = [torch.arange(3 + i, dtype=torch.int32 if "int32" in str(kind) else torch.float32) for i, kind in enumerate(kinds)]
    args = [t if "array" in str(kind).lower() else 0.25 if "float" in str(kind) else 7 for t, kind in zip(tensors, kinds)]
    addresses, words = cuda.kernel_arguments(args)
    assert len(declared) == len(words) == len(addresses) == 7 * len(args) - 6 * sum(not isinstance(a, torch.Tensor) for a in args)
    kinds_of = {"b32": ctypes.c_uint32, "u32": ctypes.c_uint32, "f32": ctypes.c_float}
    found = iter(kinds_of.get(kind, ctypes.c_uint64).from_address(at).value for kind, at in zip(declared, addresses))
    for a in args:
        if isinstance(a, torch.Tensor):
            assert [next(found) for _ in range(7)] == [0, 0, a.numel(), 4, a.data_ptr(), a.numel(), 4]
        else:
            assert next(found) == a


def test_no_gpu_and_wrong_input_are_said():
    x = problem(8, 2, 3)
    with pytest.raises(EsslError, match="run on 'cuda' only"):
        cuda.forward(x.wx, x.u, x.h0)
    assert torch.cuda.is_available() or cuda.available() == "PyTorch finds no NVIDIA GPU here"
    engine = cudasim.Simulator(H100)
    with pytest.raises(EsslError, match="float64.*take float32"):
        cuda.forward(x.wx.double(), x.u, x.h0, engine=engine)
    with pytest.raises(EsslError, match="do not fit"):
        cuda.forward(x.wx[..., 1:], x.u, x.h0, engine=engine)
    with pytest.raises(EsslError, match="allowed: 'relu'"):
        cuda.forward(x.wx, x.u, x.h0, activation="gelu", engine=engine)


def distance(a, b):
    return float((a - b).norm() / b.norm())


def agree_on_average(x, found, tolerance):
    """States against the plain loop; gradients against the hand-derived ones in float64 from the same states.

    Among millions of numbers some lie so near 0 that the slope of a relu there depends on the last digit: gradients from other states prove nothing.
    """
    hs, kept, grads = found
    assert distance(hs, truth(x)[0]) < tolerance, "states"
    wanted, double = [], lambda v: None if v is None else v.double()
    for r in range(x.R):
        q = slice(r * x.B, (r + 1) * x.B)
        mask, ends, gain, bias = (None if v is None else v[k] for v, k in ((x.drop, q), (x.lengths, q), (x.gain, r), (x.bias, r)))
        own = cell.Kept(*(None if k is None else torch.nan_to_num(k[:, q]).double() for k in kept))
        operands = x.u[r].double(), x.h0[q].double(), double(mask), ends, double(gain), double(bias)
        found = cell.backward(x.grad[:, q].double(), *operands, hs[:, q].double(), own, cell=x.name, activation=x.activation)
        wanted.append(named(found))
    assert named(grads).keys() == wanted[0].keys()
    for name, g in named(grads).items():
        assert distance(g, JOIN[name]([w[name] for w in wanted])) < tolerance, name


@pytest.mark.cuda
@pytest.mark.parametrize("shape", [(64, 5, 40, 1), (100, 19, 33, 2), (512, 16, 50, 2), (1024, 8, 20, 1)], ids=str)
@pytest.mark.parametrize("precision,tolerance", [("fp32", 1e-5), ("bf16", 0.03), ("frames", 1e-5)])
@pytest.mark.parametrize("name,activation", [("ligru", "relu"), ("ligru", "leaky_relu"), ("sligru", "tanh"), ("sligru", "sine")])
def test_all_kernels_on_a_gpu_are_the_truth(monkeypatch, name, activation, precision, tolerance, shape):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    if precision == "frames":
        monkeypatch.setattr(cuda.Gpu, "limits", lambda self, device: NONE)
    elif cuda.limits_of("cuda").capability < (8, 0) and precision == "bf16":
        pytest.skip("bfloat16 on the tensor core needs compute capability 8.0")
    H, B, T, R = shape
    x, precision = problem(H, B, T, R, name, activation, "cuda"), "fp32" if precision == "frames" else precision
    found = both_ways(x, None, precision)
    agree_on_average(x, found, tolerance)
    agree_on_average(x, both_ways(x, None, precision, recompute=True), tolerance)
    again = both_ways(x, None, precision)
    assert torch.equal(found[0], again[0]) and same(found[2], again[2])


def test_the_comparison_itself_in_the_simulator(shaped):
    shaped(2, 1)
    for name, activation in (("ligru", "relu"), ("sligru", "tanh")):
        x = problem(20, 3, 4, 2, name, activation)
        for precision, tolerance in (("fp32", 1e-5), ("bf16", 0.03)):
            agree_on_average(x, both_ways(x, cudasim.Simulator(H100), precision), tolerance)


@pytest.mark.cuda
def test_autocast_takes_bfloat16_products_and_both_directions_at_once(monkeypatch):
    layer, x = LiGRU(64, 128, bidirectional=True, activation="tanh").eval().cuda(), torch.randn(4, 50, 64, device="cuda")
    launched, launch = [], cuda.Gpu.launch
    monkeypatch.setattr(cuda.Gpu, "launch", lambda self, maker, shape, *args: (launched.append(shape.precision), launch(self, maker, shape, *args)))
    y = layer(x)[0]
    with torch.autocast("cuda", torch.bfloat16):
        half = layer(x)[0]
    assert launched == ["fp32", "bf16"] and half.dtype == torch.float32 and 1e-5 < distance(half, y) < 0.03
