"""The Light GRU's operator and layers. The kernels and what other toolkits make of the layers have tests of their own."""
import copy

import pytest
import torch
from torch import nn

import essl_nb.ligru.custom_op as operator
from essl_nb.core.registry import EsslError
from essl_nb.core.shapes import reverse_frames, reversal
from essl_nb.ligru.cell import ACTIVATIONS, CELLS, BatchNorm, Kept, Norm, drop_mask, recurrence
from essl_nb.ligru.custom_op import explain_backend, light_operator, light_recurrence
from essl_nb.ligru.layer import LiGRU, SLiGRU

KINDS = (LiGRU, SLiGRU)
both_kinds = pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.__name__)
names = lambda k: ", ".join(f"{a}={b}" for a, b in k.items()) if isinstance(k, dict) else str(k)


@pytest.fixture(autouse=True)
def seeded():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def operands(T=11, B=3, H=5, cell="ligru", dtype=torch.float64):
    "wx, u, h0, drop, lengths, gain, bias, with an utterance that ends early and one without frames."
    draw = lambda *shape: torch.randn(*shape, dtype=dtype).div(2).requires_grad_()
    wx, u, h0 = draw(T, B, 2 * H), draw(2 * H, H), draw(B, H)
    lengths = torch.tensor([T, T // 2, 0] + [1] * B)[:B]
    affine = (draw(2 * H), draw(2 * H)) if cell == "sligru" else (None, None)
    return wx, u, h0, drop_mask(B, H, 0.3, like=h0), lengths, *affine


def norm_for(wx, own, lengths=None):
    "A batch norm of wx (T,B,2H): of its own real frames, or with statistics that are fixed; and the module it is from."
    module = BatchNorm(wx.shape[-1]).to(wx).train(own)
    with torch.no_grad():
        for t in (module.weight, module.bias, module.running_mean):
            t.normal_()
        module.running_var.uniform_(0.5, 2)
    frames = wx.detach().flatten(0, 1) if lengths is None else wx.detach()[torch.arange(len(wx))[:, None] < lengths]
    return module.vectors(frames), module


def near(a, b, tolerance=1e-12):
    return (a - b).abs().max() <= tolerance * (1 + b.abs().max()) if a.numel() else a.shape == b.shape


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "remade"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("cell", CELLS)
def test_operator_and_all_gradients_are_the_plain_loops(cell, activation, recompute, backend):
    args = operands(cell=cell)
    leaves = [a for a in args if a is not None and a.requires_grad]
    kw = dict(cell=cell, activation=activation)
    true, mine = recurrence(*args, **kw), light_recurrence(*args, **kw, recompute=recompute, backend=backend)
    grad = torch.randn_like(true)
    assert near(mine, true)
    for a, b in zip(torch.autograd.grad(mine, leaves, grad), torch.autograd.grad(true, leaves, grad), strict=True):
        assert near(a, b)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "remade"])
@pytest.mark.parametrize("own", [False, True], ids=["fixed", "own"])
@pytest.mark.parametrize("T, threads", [(5, 1), (11, 1), (12, 2)], ids=["short", "one thread", "two threads"])
@pytest.mark.parametrize("cell", CELLS)
def test_norm_in_the_loop_is_torchs_before_it(cell, T, threads, own, recompute, backend):
    wx, *rest = operands(T, H=64 * threads, cell=cell)
    norm, module = norm_for(wx, own, rest[3])
    real = torch.arange(T)[:, None] < rest[3]
    dirty = wx.detach().masked_fill(~real[..., None], float("nan")).requires_grad_()
    leaves = [t for t in rest if t is not None and t.requires_grad] + [module.weight, module.bias]
    mine = light_recurrence(dirty, *rest, norm=norm, cell=cell, recompute=recompute, backend=backend, threads=threads)
    flat = torch.nn.functional.batch_norm(wx[real], module.running_mean.clone(), module.running_var.clone(), module.weight, module.bias, own, 0.0, module.eps)
    true = recurrence(torch.zeros_like(wx).index_put((real,), flat), *rest, cell=cell)
    assert near(mine, true, 1e-10)
    grad = torch.randn_like(true)
    for a, b in zip(torch.autograd.grad(mine, [dirty, *leaves], grad), torch.autograd.grad(true, [wx, *leaves], grad), strict=True):
        assert near(a, b, 1e-10)


@pytest.mark.parametrize("cell", CELLS)
def test_gradcheck_through_a_norms_own_moments(cell):
    wx, u, h0, drop, lengths, gain, bias = operands(9, 2, 3, cell)
    weight, shift = torch.randn(6, dtype=torch.double, requires_grad=True), torch.randn(6, dtype=torch.double, requires_grad=True)
    real = torch.arange(9)[:, None] < lengths

    def call(wx, weight, shift):
        w = wx.detach()[real]
        norm = Norm(w.mean(0), (w.var(0, unbiased=False) + 1e-5).rsqrt(), weight, shift, True)
        return light_recurrence(wx, u.detach(), h0.detach(), drop, lengths, gain, bias, norm=norm, cell=cell, activation="tanh")
    assert torch.autograd.gradcheck(call, (wx, weight, shift))


@pytest.mark.parametrize("cell", CELLS)
def test_gradcheck(cell):
    args = operands(9, 2, 3, cell)
    leaves = [a for a in args if a is not None and a.requires_grad]
    call = lambda wx, u, h0, gain=None, bias=None: light_recurrence(wx, u, h0, *args[3:5], gain, bias, cell=cell, activation="tanh")
    assert torch.autograd.gradcheck(call, leaves)


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "remade"])
@pytest.mark.parametrize("cell", CELLS)
def test_opcheck(cell, recompute):
    for backend in ("reference", "cpu"):
        args = list(operands(10, 2, 3, cell))
        args[4] = args[4] if backend == "reference" else None  # what the CPU's loop keeps of an utterance that has ended is never read, and not written
        torch.library.opcheck(light_operator, (*args, None, None, None, None, False, cell, "relu", 1e-5, recompute, backend, None, None))
        norm, _ = norm_for(args[0], own=recompute)
        torch.library.opcheck(light_operator, (*args[:3], None, None, None, None, *norm, cell, "relu", 1e-5, recompute, backend, 1, None))


@pytest.mark.parametrize("T, B", [(0, 3), (1, 3), (9, 1), (9, 0), (0, 0)])
@pytest.mark.parametrize("cell", CELLS)
def test_operator_takes_few_frames_and_few_utterances(cell, T, B):
    args = operands(max(T, 1), B, cell=cell)
    args = (args[0][:T], *args[1:4], torch.full((B,), T), *args[5:])
    mine, true = light_recurrence(*args, cell=cell), recurrence(*args, cell=cell)
    assert mine.shape == (T, B, 5) and near(mine, true)
    mine.sum().backward()
    assert args[1].grad.shape == args[1].shape


def test_operator_takes_what_is_not_contiguous():
    wx, u, h0, *_ = operands()
    odd = wx.detach().permute(2, 1, 0).contiguous().permute(2, 1, 0).requires_grad_()
    wide, row = u.detach().T.contiguous().T.requires_grad_(), h0.detach()[:1].expand(3, -1).requires_grad_()
    same = [t.detach().contiguous().requires_grad_() for t in (odd, wide, row)]
    for grad in (torch.randn(3, 5, dtype=torch.double).expand(11, 3, 5), torch.randn(5, 3, 11, dtype=torch.double).permute(2, 1, 0)):
        a = torch.autograd.grad(light_recurrence(odd, wide, row), (odd, wide, row), grad)
        b = torch.autograd.grad(recurrence(*same), same, grad)
        assert all(near(x, y) for x, y in zip(a, b))


@pytest.mark.parametrize("dtype, T", [(torch.float32, 400), (torch.float64, 2400)], ids=["float32", "float64"])
@pytest.mark.parametrize("cell", CELLS)
def test_what_fades_becomes_zero_and_never_subnormal(cell, dtype, T):
    wx, u = torch.zeros(T, 2, 32, dtype=dtype), torch.zeros(32, 16, dtype=dtype)
    wx[..., :16] = -1  # no candidate, and gates of one half: the state is halved from frame to frame
    wx.requires_grad_()
    h0 = torch.ones(2, 16, dtype=dtype, requires_grad=True)
    hs = light_recurrence(wx, u, h0, cell=cell, backend="cpu")
    grads = torch.autograd.grad(hs[-1].sum(), (wx, h0))
    assert near(hs, recurrence(wx, u, h0, cell=cell)) and hs[-1].eq(0).all()
    for t in (hs, *grads):
        assert not ((t != 0) & (t.abs() < torch.finfo(dtype).tiny)).any()


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("cell", CELLS)
def test_nothing_is_kept_where_no_gradient_is_asked_for(cell, backend, monkeypatch):
    args, kept, module = operands(cell=cell), [], operator.backend_of(backend, torch.zeros(1), torch.zeros(2, 1), None, None)[0]
    forward = module.forward
    monkeypatch.setattr(module, "forward", lambda *a, **kw: (found := forward(*a, **kw), kept.append(found[1]))[0])
    true = light_recurrence(*args, cell=cell, backend=backend)
    with torch.no_grad():
        assert torch.equal(light_recurrence(*args, cell=cell, backend=backend), true)
    plain = [a if a is None else a.detach() for a in args]
    assert torch.equal(light_recurrence(*plain, cell=cell, backend=backend), true)
    assert kept[0].gates is not None and kept[1:] == [Kept(), Kept()]


def test_a_second_derivative_is_refused():
    wx, u, h0, *_ = operands()
    g, = torch.autograd.grad(light_recurrence(wx, u, h0).square().sum(), u, create_graph=True)
    with pytest.raises(EsslError, match="first derivatives only"):
        torch.autograd.grad(g.sum(), u)


def test_backend_says_what_it_takes_and_refuses_by_name(monkeypatch):
    assert explain_backend("auto", "cpu").name == "cpu" and explain_backend("reference", "cpu", torch.float16).name == "reference"
    for args, said in ((("cuda", "cpu"), "tensors are on cpu"), (("cpu", "cpu", torch.float16), "float32 and float64, not float16"), (("gpu",), "'gpu'")):
        with pytest.raises(EsslError, match=said):
            explain_backend(*args)
    assert explain_backend("auto", "cpu", torch.bfloat16).why.endswith("not bfloat16")
    monkeypatch.setattr(operator, "load_backend", lambda name: (None, "it is Sunday"))
    assert explain_backend("auto", "cpu") == ("reference", "the compiled loop for cpu cannot run: it is Sunday")
    with pytest.raises(EsslError, match="it is Sunday"):
        light_recurrence(*operands()[:3], backend="cpu")
    assert LiGRU(3, 4).backend_used.name == "reference"


@pytest.mark.parametrize("change, said", [
    (dict(u=torch.zeros(10, 4).double()), r"u of shape \(10, 4\)"), (dict(h0=torch.zeros(2, 5).double()), "h0"), (dict(drop=torch.zeros(3).double()), "drop"),
    (dict(lengths=torch.tensor([1, 2])), "lengths"), (dict(lengths=torch.tensor([1, 2, 3]).int()), "int64"), (dict(u=torch.zeros(10, 5)), "one type"),
    (dict(wx=torch.zeros(3, 9).double()), r"\(T,B,2H\)"), (dict(gain=torch.ones(10).double()), "recurrent layer norm"), (dict(cell="gated"), "'gated'"),
    (dict(activation="gelu"), "'gelu'")], ids=names)
def test_operator_refuses(change, said):
    wx, u, h0, *_ = operands()
    kw = dict(wx=wx, u=u, h0=h0) | change
    with pytest.raises(EsslError, match=said):
        light_recurrence(**kw)


SHAPES = [dict(), dict(num_layers=3), dict(bidirectional=True), dict(num_layers=2, bidirectional=True), dict(num_layers=2, bidirectional=True, shared_directions=True)]


def by_hand(layer, x, h0, lengths):
    "The layers one utterance, one direction at a time, by the plain loop: y (B,T,R·H), h_n."
    B, T = x.shape[:2]
    ys, hs = [], []
    for b in range(B):
        n, last = int(lengths[b]), []
        y = x[b : b + 1, :n].transpose(0, 1)  # (n,1,D)
        for i, directions in enumerate(layer.layers):
            outs = []
            for r in range(layer.num_directions):
                direction, start = directions[min(r, len(directions) - 1)], h0[i * layer.num_directions + r, b : b + 1]
                w = direction.norm(direction.w(y.flip(0) if r else y)) if n else y.new_zeros(0, 1, 2 * layer.hidden_size)
                h = recurrence(w, direction.u, start, None, None, direction.gain, direction.bias, cell=layer.cell, activation=layer.activation)
                last.append(h[-1] if n else start)
                outs.append(h.flip(0) if r else h)
            y = torch.cat(outs, -1)
        ys.append(torch.cat([y[:, 0], y.new_zeros(T - n, y.shape[-1])]))
        hs.append(torch.cat(last))
    return torch.stack(ys), torch.stack(hs, 1)


@pytest.mark.parametrize("shape", SHAPES, ids=names)
@pytest.mark.parametrize("normalization", ["batch", "layer", "none"])
@both_kinds
def test_layers_with_padding_are_each_utterance_by_hand(kind, normalization, shape):
    extra = dict(recurrent_affine=True) if kind is SLiGRU else {}
    layer = kind(4, 5, normalization=normalization, **shape, **extra).double().eval()
    for p in layer.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    for way in layer.directions():
        if normalization == "batch":
            way.norm.running_mean.normal_(), way.norm.running_var.uniform_(0.5, 2)
    lengths, x = torch.tensor([12, 7, 1, 0]), torch.randn(4, 12, 4, dtype=torch.double)
    x[torch.arange(12) >= lengths[:, None]] = torch.nan
    found = []
    for run in (lambda x, h: layer(x, h, lengths), lambda x, h: by_hand(layer, x, h, lengths)):
        given = x.clone().requires_grad_(), torch.linspace(-1, 1, layer.num_layers * layer.num_directions * 20, dtype=torch.double).view(-1, 4, 5).requires_grad_()
        y, h_n = run(*given)
        total = (y * torch.arange(y.numel()).view_as(y).sin()).sum() + (h_n * torch.arange(h_n.numel()).view_as(h_n).cos()).sum()
        grads = torch.autograd.grad(total, [*given, *layer.parameters()])
        found.append([y, h_n, *grads])
    assert y[1, 7:].eq(0).all() and grads[0][1, 7:].eq(0).all()
    for mine, true in zip(*found, strict=True):
        assert near(mine, true, 1e-11)


@both_kinds
@pytest.mark.parametrize("shape", SHAPES, ids=names)
def test_shapes_are_those_of_torchs_gru(kind, shape):
    for first in (True, False):
        ours, theirs = kind(4, 5, batch_first=first, **shape), nn.GRU(4, 5, batch_first=first, **{k: v for k, v in shape.items() if k != "shared_directions"})
        for B, T in ((3, 8), (1, 9), (3, 1)):
            x = torch.randn(*((B, T) if first else (T, B)), 4)
            h0 = torch.randn(shape.get("num_layers", 1) * (2 if shape.get("bidirectional") else 1), B, 5)
            for args in ((x,), (x, h0)):
                assert [t.shape for t in ours(*args)] == [t.shape for t in theirs(*args)]
        x = torch.randn(2, 9, 4)
        whole = copy.deepcopy(ours).eval()
        whole.batch_first = True
        assert torch.equal(whole(x)[0], ours.eval()(x if first else x.transpose(0, 1))[0].transpose(0, 0 if first else 1))


@both_kinds
@pytest.mark.parametrize("training", [True, False])
def test_nan_in_padding_moves_nothing(kind, training):
    layer = kind(4, 5, 2, bidirectional=True).train(training)
    lengths, found = torch.tensor([12, 5, 0]), []
    x = torch.randn(3, 12, 4)
    for pads in (0.0, 1e3, torch.nan, torch.inf):
        one = copy.deepcopy(layer)
        given = torch.where((torch.arange(12) < lengths[:, None])[..., None], x, pads).requires_grad_()
        y, h_n = one(given, lengths=lengths)
        (y.sum() + h_n.square().sum()).backward()
        found.append([y, h_n, given.grad, *(p.grad for p in one.parameters()), *one.buffers()])
    for other in found[1:]:
        assert all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(found[0], other, strict=True))


@both_kinds
def test_nan_in_a_real_frame_stays_in_its_utterance(kind):
    layer, x = kind(4, 5, bidirectional=True).eval(), torch.randn(3, 12, 4)
    y = layer(x)[0]
    for bad in (torch.nan, torch.inf):
        spoilt = x.clone()
        spoilt[1, 6] = bad
        found = layer(spoilt)[0]
        assert torch.equal(found[[0, 2]], y[[0, 2]]) and found[1].isnan().any() and torch.equal(found[1, :6, :5], y[1, :6, :5])


@both_kinds
@pytest.mark.parametrize("normalization", ["batch", "layer", "none"])
def test_a_stream_is_the_whole(kind, normalization):
    layer, x = kind(4, 5, 3, normalization=normalization).double().eval(), torch.randn(2, 21, 4, dtype=torch.double)
    whole, h_n = layer(x)
    for C in (1, 4, 21):
        state, pieces = layer.init_state(2), []
        kept = state["h"].clone()
        for chunk in x.split(C, 1):
            y, state = layer.step(chunk, state)
            pieces.append(y)
        assert near(torch.cat(pieces, 1), whole) and near(state["h"], h_n)


def test_dropout_is_one_mask_for_all_frames():
    layer = LiGRU(4, 64, dropout=0.5, normalization="layer")
    y = layer(torch.randn(2, 30, 4))[0]
    silent = (y == 0).all(1)  # a silenced unit starts from 0 and stays there
    assert 0.3 < silent.float().mean() < 0.7 and not torch.equal(silent[0], silent[1])
    assert not (layer.eval()(torch.randn(2, 30, 4))[0] == 0).all(1).any()


@both_kinds
@pytest.mark.parametrize("shape", SHAPES, ids=names)
def test_recomputing_changes_nothing(kind, shape):
    found = []
    for recompute in (False, True):
        torch.manual_seed(0)
        layer, x = kind(4, 5, dropout=0.3, recompute=recompute, **shape).double(), torch.randn(3, 10, 4, dtype=torch.double).requires_grad_()
        y, h_n = layer(x, None, torch.tensor([10, 4, 1]))
        (y.square().sum() + h_n.sum()).backward()
        found.append([y, x.grad, *(p.grad for p in layer.parameters()), *layer.buffers()])
    assert all(near(a, b) for a, b in zip(*found, strict=True))


@both_kinds
def test_compiles_without_a_break(kind):
    x, lengths = torch.randn(2, 9, 4), torch.tensor([9, 4])
    for layer, args in ((kind(4, 5, 2, bidirectional=True), (x,)), (kind(4, 5, normalization="layer"), (x, None, lengths)), (kind(4, 5).eval(), (x, None, lengths))):
        torch._dynamo.reset()
        twin = copy.deepcopy(layer)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        for a, b in zip(compiled(*args), twin(*args)):
            assert near(a, b, 1e-6)
        compiled(*args)[0].sum().backward()
        twin(*args)[0].sum().backward()
        assert all(near(p.grad, q.grad, 1e-5) for p, q in zip(layer.parameters(), twin.parameters()))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("kind", [LiGRU, SLiGRU])
def test_a_backward_pass_within_autocast_is_that_without(kind, backend, recompute):
    layer, x, found = kind(6, 5, bidirectional=True, backend=backend, recompute=recompute), torch.randn(2, 7, 6), []
    for inside in (False, True):
        layer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = layer(x)[0].float().square().sum()
            if inside:
                y.backward()
        if not inside:
            y.backward()
        found.append([each.u.grad.clone() for each in layer.directions()])
    for a, b in zip(*found):
        assert (a - b).norm() <= 1e-6 * b.norm()


@both_kinds
def test_autocast_keeps_the_states_in_float32(kind):
    layer, x = kind(4, 16, 2, bidirectional=True), torch.randn(2, 20, 4)
    y = layer(x)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half, h_n = layer(x.bfloat16())
        half.sum().backward()
    assert half.dtype == h_n.dtype == torch.float32 and (half - y).norm() < 0.05 * y.norm()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


@both_kinds
def test_meta_device_and_state_dict(kind):
    layer = kind(4, 5, 2, bidirectional=True)
    y, h_n = copy.deepcopy(layer).to("meta")(torch.empty(3, 70, 4, device="meta"))
    assert y.shape == (3, 70, 10) and h_n.shape == (4, 3, 5) and y.is_meta
    twin = kind(4, 5, 2, bidirectional=True)
    twin.load_state_dict(layer.state_dict())
    x = torch.randn(1, 9, 4)
    assert torch.equal(twin.eval()(x)[0], layer.eval()(x)[0])


def test_turning_twice_is_not_turning():
    lengths, x = torch.tensor([0, 1, 4, 9]), torch.randn(4, 9, 3)
    rows = reversal(lengths, 9)
    y = reverse_frames(x, rows)
    assert torch.equal(reverse_frames(y, rows), x) and torch.equal(y[2, :4], x[2, :4].flip(0)) and torch.equal(y[2, 4:], x[2, 4:])
    assert torch.equal(reverse_frames(x, reversal(torch.full((4,), 9), 9)), reverse_frames(x, reversal(None, 9)))


@pytest.mark.parametrize("kw, said", [
    (dict(input_size=0), "input_size=0"), (dict(hidden_size=-1), "hidden_size"), (dict(num_layers=1.5), "num_layers"), (dict(threads=0), "threads"),
    (dict(normalization="group"), "'batch', 'layer', 'none'"), (dict(activation="gelu"), "'relu'"), (dict(backend="tpu"), "'auto'"),
    (dict(dropout=1.0), "below 1"), (dict(shared_directions=True), "bidirectional=True"), (dict(recurrent_affine=True), "Take SLiGRU")], ids=names)
def test_constructor_refuses(kw, said):
    with pytest.raises(EsslError, match=said):
        LiGRU(**{**dict(input_size=4, hidden_size=5), **kw})


X = torch.zeros(3, 9, 4)


@pytest.mark.parametrize("args, said", [
    ((X[0],), r"x\[None\]"), ((X[..., :3],), "D=4"), ((X[None],), "D=4"), (([1.0],), "list"), ((X.double(),), "float64"), ((X.long(),), "int64"), ((X.half(),), "float16"),
    ((X, torch.zeros(1, 2, 5)), r"\(1, 3, 5\)"), ((X, torch.zeros(3, 5)), "h0"), ((X, torch.zeros(1, 3, 5).double()), "h0"),
    ((X, None, torch.tensor([9, 9, 10])), "9 to 10"), ((X, None, torch.tensor([-1, 9, 9])), "-1 to 9"), ((X, None, torch.tensor([9, 9])), r"\(3,\)"),
    ((X, None, torch.tensor([9.0, 1, 1])), "integers"), ((X, None, torch.ones(3).bool()), "integers")], ids=lambda a: a if isinstance(a, str) else "")
def test_layer_refuses(args, said):
    with pytest.raises(EsslError, match=said):
        LiGRU(4, 5)(*args)


@both_kinds
def test_layer_refuses_half_on_the_cpu_and_streams_that_cannot_be(kind):
    for dtype in (torch.float16, torch.bfloat16):
        with pytest.raises(EsslError, match="autocast"):
            kind(4, 5).to(dtype)(X.to(dtype))
    with pytest.raises(EsslError, match="bidirectional"):
        kind(4, 5, bidirectional=True).init_state(1)
    training = kind(4, 5)
    with pytest.raises(EsslError, match="eval"):
        training.step(X, training.init_state(3))
    with pytest.raises(EsslError, match="2 or more"):
        training(X[:1, :1])


@both_kinds
@pytest.mark.parametrize("training", [True, False])
def test_nothing_in_nothing_out(kind, training):
    layer = kind(4, 5, 2, bidirectional=True).train(training)
    h0 = torch.randn(4, 3, 5, requires_grad=True)
    y, h_n = layer(torch.zeros(3, 0, 4), h0, torch.zeros(3, dtype=torch.int64))
    assert y.shape == (3, 0, 10) and torch.equal(h_n, h0)
    y, h_n = layer(torch.zeros(0, 9, 4), lengths=torch.zeros(0, dtype=torch.int64))
    assert y.shape == (0, 9, 10) and h_n.shape == (4, 0, 5)
    y, h_n = layer.eval()(torch.randn(3, 9, 4), lengths=[0, 0, 0])
    assert y.eq(0).all() and h_n.eq(0).all()


def test_expanded_and_strided_frames():
    layer, base = LiGRU(4, 5, bidirectional=True).eval(), torch.randn(1, 12, 8)
    for x in (base[..., ::2].expand(3, -1, -1), base[:, ::2, 4:], torch.randn(4, 12, 3).permute(2, 1, 0)):
        assert near(layer(x)[0], layer(x.contiguous())[0], 1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@both_kinds
def test_layers_are_drawn_in_half_precision_too(kind, dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        layer = kind(6, 8)
    finally:
        torch.set_default_dtype(before)
    u = layer.layers[0][0].u.double()
    assert layer.layers[0][0].u.dtype == dtype and (u.T @ u - torch.eye(8, dtype=torch.double)).abs().max() < 0.02
