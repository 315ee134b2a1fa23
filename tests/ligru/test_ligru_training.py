"""The Light GRU's layers as SpeechBrain, PyTorch-Kaldi and ONNX Runtime have them."""
import copy
import functools
import itertools
import sys
from typing import Optional

import pytest
import torch
from test_ligru import both_kinds, names, near, seeded  # noqa: F401 (the fixture seeds every test here as well)
from torch import nn

from essl_nb.core.registry import EsslError
from essl_nb.ligru.cell import drop_mask
from essl_nb.ligru.layer import LiGRU, SLiGRU


def theirs_of(kind, norm="batchnorm", both=True, layers=2, dtype=torch.float64, **kw):
    rnn = pytest.importorskip("speechbrain.nnet.RNN")
    word = {"normalization" if kind is LiGRU else "ff_normalization": norm}
    return getattr(rnn, kind.__name__)(hidden_size=24, input_shape=(3, 20, 8), num_layers=layers, bidirectional=both, **word, **kw).to(dtype)


def results(layer, x, hx=None):
    "Outputs, all gradients and all buffers after a pass, with the same random numbers."
    torch.manual_seed(1)
    layer.zero_grad()
    x = x.clone().requires_grad_()
    output, hh = layer(x, hx)
    (output.square().sum() + (hh * torch.arange(hh.numel()).view_as(hh).sin()).sum()).backward()
    return {"output": output, "hh": hh, "x": x.grad, **{n: p.grad for n, p in layer.named_parameters() if p.requires_grad}, **dict(layer.named_buffers())}


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=["float64", "float32"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("both", [True, False], ids=["two ways", "one way"])
@pytest.mark.parametrize("norm", ["batchnorm", "layernorm"])
@both_kinds
def test_a_swapped_layer_is_speechbrains(kind, norm, both, training, dtype, tolerance):
    from essl_nb.ligru.speechbrain_swap import swap_ligru

    before = theirs_of(kind, norm, both, dtype=dtype, dropout=0.2).train(training)
    after = swap_ligru(copy.deepcopy(before))
    assert list(before.state_dict()) == list(after.state_dict())
    for B, zeros in ((3, False), (2, False), (2, True)):  # other batch sizes, and masks that go on from where they were
        before.batch_size = after.batch_size = B  # SpeechBrain reshapes hx by it
        x, hx = torch.randn(B, 12, 8, dtype=dtype), torch.randn((2 if both else 1) * 2, B, 24, dtype=dtype)
        true, mine = results(before, x, None if zeros else hx), results(after, x, None if zeros else hx)
        assert true.keys() == mine.keys()
        rough = 30 if kind is SLiGRU and zeros else 1  # the layer norm of a state near 0 enlarges every rounding
        for name in true:
            assert near(mine[name], true[name], rough * tolerance), name


@pytest.mark.parametrize("word, affine, bias", [("tanh", True, True), ("sin", False, True), ("leaky_relu", True, False), ("relu", True, True)])
@both_kinds
def test_swapped_layers_take_every_option(kind, word, affine, bias):
    from essl_nb.ligru.speechbrain_swap import swap_ligru

    kw = dict(recurrent_elementwise_affine=affine) if kind is SLiGRU else {}
    before = theirs_of(kind, nonlinearity=word, bias=bias, **kw)
    after = swap_ligru(copy.deepcopy(before), backend="reference" if word == "sin" else "auto", recompute=affine)
    x, hx = torch.randn(3, 20, 8, dtype=torch.double), torch.randn(4, 3, 24, dtype=torch.double)
    true, mine = results(before, x, hx), results(after, x, hx)
    assert all(near(mine[n], true[n]) for n in true) and after.rnn[0].backend_used.name == ("reference" if word == "sin" else "cpu")


@both_kinds
def test_swapping_inside_a_model_changes_no_object(kind):
    from essl_nb.ligru.speechbrain_swap import SwappedLiGRU, from_speechbrain, swap_ligru

    class Mine(type(theirs_of(kind))):
        "A recipe's own, which looks at what comes in."

        def forward(self, x, hx=None):
            return super().forward(2 * x, hx)

    inner, own, heard = theirs_of(kind, layers=1), theirs_of(kind, both=False), []
    own.__class__ = Mine
    model = nn.ModuleDict({"a": nn.Sequential(nn.Identity(), inner), "b": inner, "c": own})
    model.aside = [inner.rnn[0]]  # known, but no child
    objects = {n: id(m) for n, m in model.named_modules(remove_duplicate=False)} | {n: id(p) for n, p in model.named_parameters(remove_duplicate=False)}
    for module in (inner, inner.rnn[0], own.rnn[1].norm):
        module.register_forward_hook(lambda *given: heard.append(1))
        module.register_full_backward_hook(lambda *given: heard.append(2))
    x = torch.randn(3, 12, 8, dtype=torch.double)
    ask = lambda: [model[k](x)[0] for k in "bc"]
    before = [y.detach() for y in ask()]
    assert swap_ligru(model, exact_masks=False) is model
    assert {n: id(m) for n, m in model.named_modules(remove_duplicate=False)} | {n: id(p) for n, p in model.named_parameters(remove_duplicate=False)} == objects
    assert all(isinstance(m, SwappedLiGRU) for m in (*inner.rnn, *own.rnn, *model.aside)) and isinstance(own, Mine)
    heard.clear()
    after = ask()
    assert all(near(a, b) for a, b in zip(after, before)) and heard == [1, 1, 1]
    sum(y.sum() for y in after).backward()
    assert heard[3:] == [2, 2, 2]
    assert swap_ligru(model, backend="reference")["a"][1].rnn[0].backend_used.name == "reference"  # again, with other settings
    with pytest.raises(EsslError, match="holds 3 Light GRUs"):
        from_speechbrain(model.state_dict())
    assert from_speechbrain(model["c"]).num_layers == 2
    with pytest.raises(EsslError, match="no LiGRU or SLiGRU"):
        swap_ligru(nn.Linear(2, 2))


@both_kinds
def test_a_swapped_layer_can_be_scripted_copied_and_pickled(kind):
    import pickle

    from essl_nb.ligru.speechbrain_swap import swap_ligru

    before = theirs_of(kind, dropout=0.2)
    after = swap_ligru(copy.deepcopy(before))
    x = torch.randn(3, 12, 8, dtype=torch.double)
    for make in (lambda m: m, lambda m: pickle.loads(pickle.dumps(m)), torch.jit.script):
        layer, theirs = make(copy.deepcopy(after)), copy.deepcopy(before)
        true, mine = results(theirs, x), results(layer, x)
        assert all(near(mine[n], true[n], 1e-10) for n in true)
        assert near(layer.eval()(x)[0], theirs.eval()(x)[0], 1e-10)
        assert make is torch.jit.script or layer.rnn[0].backend_used.name == "cpu"
    with pytest.raises(EsslError, match="swap before torch.jit.script"):
        swap_ligru(nn.Sequential(torch.jit.script(before)))


def scriptable(module, given: tuple[torch.Tensor, Optional[torch.Tensor]], output: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    "A hook with the types that TorchScript asks for."
    return output[0] + 1, output[1]


@both_kinds
def test_hooks_are_scripted_as_on_speechbrains_own_layer(kind):
    from essl_nb.ligru.speechbrain_swap import swap_ligru

    before, x = theirs_of(kind).eval(), torch.randn(3, 12, 8, dtype=torch.double)
    before.register_forward_hook(scriptable)
    after = swap_ligru(copy.deepcopy(before))
    true = before(x, None)[0]
    assert all(near(torch.jit.script(layer)(x, None)[0], true) for layer in (before, after))


class Around(nn.Module):
    "A model with a stack in it."

    def __init__(self, rnn):
        super().__init__()
        self.rnn = rnn

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.rnn(x, None)[0]


class Counts:
    "A hook that is an object."
    calls = 0

    def __call__(self, *given):
        self.calls += 1


@pytest.mark.parametrize("part", ["stack", "layer"])
@pytest.mark.parametrize("hook", ["lambda", "partial", "object"])
@both_kinds
def test_hooks_that_torchscript_has_no_form_for_stay_on_the_layer_alone(kind, hook, part):
    from essl_nb.ligru.speechbrain_swap import swap_ligru

    before, x, heard = theirs_of(kind).eval(), torch.randn(3, 12, 8, dtype=torch.double), Counts()
    true = before(x, None)[0]
    after = swap_ligru(copy.deepcopy(before))
    for layer in (before, after):
        module = layer if part == "stack" else layer.rnn[0]
        handle = module.register_forward_hook({"lambda": lambda *given: heard(), "partial": functools.partial(Counts.__call__, heard), "object": heard}[hook])
    with pytest.raises((RuntimeError, AttributeError)):
        torch.jit.script(before)  # SpeechBrain's own is refused
    with pytest.warns(UserWarning, match="without them"):
        scripted = torch.jit.script(Around(after))
    assert near(scripted(x), true) and heard.calls == 0
    model = Around(after)
    parts = [id(m) for m in model.modules()]
    torch.jit.script(model)
    assert [id(m) for m in model.modules()] == parts  # the model that was scripted is what it was, with its hooks
    model(x)
    copy.deepcopy(model)(x)
    assert heard.calls == 1 + (hook == "lambda")  # a copied object counts for itself, a lambda for the one it knows
    handle.remove()
    module.register_forward_hook(lambda *given: heard(), prepend=True)
    model(x)
    assert heard.calls == 2 + (hook == "lambda")


@pytest.mark.parametrize("what", ["hook", "old weight norm", "adapter", "activation"])
def test_what_the_fast_loop_would_not_hear_stays_in_speechbrains_loop(what):
    from essl_nb.ligru.speechbrain_swap import swap_ligru

    def change(model):
        layer = model.rnn[0]
        if what == "hook":
            layer.u.register_forward_hook(lambda module, given, out: 0.5 * out)
        elif what == "old weight norm":
            nn.utils.weight_norm(layer.u)
        elif what == "adapter":
            layer.u = nn.Sequential(layer.u, nn.Linear(48, 48).double())
        else:
            layer.act = nn.SiLU()
        return model

    torch.manual_seed(0)
    before, after = change(theirs_of(LiGRU, layers=1)), change(swap_ligru(theirs_of(LiGRU, layers=1)))  # after the swap
    after.load_state_dict(before.state_dict())
    x = torch.randn(3, 12, 8, dtype=torch.double)
    true = results(before, x)
    with pytest.warns(UserWarning, match="SpeechBrain's own loop"):
        mine = results(after, x)
    assert all(near(mine[n], true[n]) for n in true)


def test_a_loop_of_ones_own_is_not_swapped_away():
    from essl_nb.ligru.speechbrain_swap import swap_ligru

    model = theirs_of(LiGRU, layers=1)
    model.rnn[0]._ligru_cell = lambda w, h: w[..., :24]
    with pytest.raises(EsslError, match=r"rnn\.0 .*loop of its own"):
        swap_ligru(model)


def test_weights_that_are_made_of_others_reach_the_fast_loop():
    from essl_nb.ligru.speechbrain_swap import swap_ligru

    before = theirs_of(LiGRU, layers=1)
    nn.utils.parametrizations.weight_norm(before.rnn[0].u)
    after, x = swap_ligru(copy.deepcopy(before)), torch.randn(3, 12, 8, dtype=torch.double)
    true, mine = results(before, x), results(after, x)
    assert all(near(mine[n], true[n]) for n in true)


@pytest.mark.parametrize("both, norm", itertools.product([True, False], ["batchnorm", "layernorm"]))
@both_kinds
def test_weights_go_to_speechbrain_and_back(kind, both, norm):
    from essl_nb.ligru.speechbrain_swap import from_speechbrain, to_speechbrain

    kw = dict(recurrent_elementwise_affine=True) if kind is SLiGRU else {}
    there = theirs_of(kind, norm, both, dropout=0.1, **kw)
    for p in there.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    x = torch.randn(3, 20, 8, dtype=torch.double)
    there(x)  # moves the running statistics
    here = from_speechbrain(there.eval())
    assert type(here) is kind and here.dropout == 0.1 and near(here(x)[0], there(x)[0])
    whole = {f"model.{k}": v for k, v in there.state_dict().items()} | {"other.weight": torch.zeros(1)}
    from_file = from_speechbrain(whole, cell=here.cell).eval()
    assert torch.equal(from_file(x)[0], here(x)[0])
    again = theirs_of(kind, norm, both, **kw)
    again.load_state_dict(to_speechbrain(from_file))
    assert torch.equal(again.eval()(x)[0], there(x)[0])


def test_what_does_not_fit_speechbrain_is_refused():
    from essl_nb.ligru.speechbrain_swap import from_speechbrain, to_speechbrain

    with pytest.raises(EsslError, match="share"):
        to_speechbrain(LiGRU(4, 5, bidirectional=True))
    with pytest.raises(EsslError, match="none"):
        to_speechbrain(LiGRU(4, 5, normalization="none"))
    one = to_speechbrain(LiGRU(4, 5))
    with pytest.raises(EsslError, match="bidirectional=True or False"):
        from_speechbrain(one)
    with pytest.raises(EsslError, match="h_init is not zero"):
        from_speechbrain(one | {"rnn.0.h_init": torch.ones(1, 5)}, bidirectional=False)
    with pytest.raises(EsslError, match="cell='ligru' or 'sligru'"):
        from_speechbrain(to_speechbrain(SLiGRU(4, 5)), bidirectional=False)
    with pytest.raises(EsslError, match="0 Light GRUs"):
        from_speechbrain({"weight": torch.zeros(1)})


def kaldi_ligru(x, wh, wz, uh, uz, drop):
    """The bidirectional liGRU layer of 1803.10225 as PyTorch-Kaldi has it: weights by gate, a batch norm for each gate over the
    frames of both directions, which share their weights; written from the paper. x (T,B,D)."""
    T, B = x.shape[:2]
    x = torch.cat([x, x.flip(0)], 1)  # (T,2B,D)
    norm = lambda w: (w - w.mean((0, 1))) / (w.var((0, 1), unbiased=False) + 1e-5).sqrt()
    a, b = norm(x @ wh.T), norm(x @ wz.T)
    h, hs = x.new_zeros(2 * B, len(wh)), []
    for t in range(T):
        z = torch.sigmoid(b[t] + h @ uz.T)
        candidate = torch.relu(a[t] + h @ uh.T) * drop
        h = z * h + (1 - z) * candidate
        hs.append(h)
    h = torch.stack(hs)
    return torch.cat([h[:, :B], h[:, B:].flip(0)], 2)


def test_pytorch_kaldis_equations_give_the_same(monkeypatch):
    layer = LiGRU(4, 5, bidirectional=True, shared_directions=True, dropout=0.4).double()
    x, way = torch.randn(3, 15, 4, dtype=torch.double), layer.layers[0][0]
    torch.manual_seed(3)
    drop = drop_mask(6, 5, 0.4, like=x)
    weights = [w.detach().clone().requires_grad_() for w in (*way.w.weight.chunk(2), *way.u.chunk(2))]
    true = kaldi_ligru(x.transpose(0, 1), *weights, drop).transpose(0, 1)
    torch.manual_seed(3)
    mine = layer(x)[0]
    assert near(mine, true)
    true.square().sum().backward()
    mine.square().sum().backward()
    assert near(way.w.weight.grad, torch.cat([w.grad for w in weights[:2]])) and near(way.u.grad, torch.cat([w.grad for w in weights[2:]]))


ONNX = [dict(), dict(num_layers=2, bidirectional=True), dict(bidirectional=True, shared_directions=True, batch_first=False), dict(normalization="none", activation="tanh"),
        dict(normalization="layer", activation="sine", num_layers=2), dict(activation="leaky_relu")]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-7)], ids=["float32", "float64"])  # attributes such as epsilon are float32 by the standard
@pytest.mark.parametrize("options", ONNX, ids=names)
@both_kinds
def test_onnx_runtime_gives_the_same(kind, options, dtype, tolerance, tmp_path):
    from essl_nb.ligru.onnx_export import export_onnx

    runtime = pytest.importorskip("onnxruntime")
    layer = kind(7, 6, **options, **(dict(recurrent_affine=True) if kind is SLiGRU else {})).to(dtype)
    for p in layer.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    layer(torch.randn(20, 20, 7, dtype=dtype))
    layer.eval()
    there = runtime.InferenceSession(export_onnx(layer, tmp_path / "layer.onnx"), providers=["CPUExecutionProvider"])
    for lengths in ([12, 5, 1], [12], [12, 0]):
        B, lengths = len(lengths), torch.tensor(lengths)
        x, h0 = torch.randn(B, 12, 7, dtype=dtype), torch.randn(layer.num_layers * layer.num_directions, B, 6, dtype=dtype)
        x[torch.arange(12) >= lengths[:, None]] = torch.nan
        x = x if layer.batch_first else x.transpose(0, 1).contiguous()
        found = there.run(None, {"x": x.numpy(), "h0": h0.numpy(), "lengths": lengths.numpy()})
        assert all(near(torch.from_numpy(a), b.detach(), tolerance) for a, b in zip(found, layer(x, h0, lengths)))


def test_exporting_says_what_is_missing(monkeypatch, tmp_path):
    from essl_nb.ligru.onnx_export import export_onnx

    if pytest.importorskip("onnx"):
        with pytest.raises(EsslError, match="float32 or float64"):
            export_onnx(LiGRU(3, 4).half(), tmp_path / "a.onnx")
        with pytest.raises(EsslError, match="GRU of torch.float32"):
            export_onnx(nn.GRU(3, 4), tmp_path / "a.onnx")
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(EsslError, match=r"essl_nb\[export\]"):
        export_onnx(LiGRU(3, 4), tmp_path / "a.onnx")


def test_a_stack_with_a_hook_of_python_is_scripted_without_it_and_says_so():
    from speechbrain.nnet.RNN import LiGRU as Theirs

    from essl_nb.ligru.speechbrain_swap import swap_ligru

    calls, stack = [], Theirs(input_shape=[3, 12, 8], hidden_size=16)
    stack.register_forward_hook(lambda *given: calls.append(1))
    swap_ligru(stack)
    with pytest.warns(UserWarning, match="scripted copy is without them"):
        scripted = torch.jit.script(stack)
    x = torch.randn(3, 12, 8)
    assert near(scripted.eval()(x)[0], stack.eval()(x)[0], 1e-5) and calls == [1]
