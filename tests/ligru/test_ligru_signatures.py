"""Every backend of the Light GRU is called like the reference and gives the same records."""
import inspect

import cudasim
import pytest
import torch

from essl_nb.ligru import cell as reference
from essl_nb.ligru.cell import ForwardResult, Gradients, Kept, Norm, recurrence
from essl_nb.ligru.cpu import backend as cpu
from essl_nb.ligru.custom_op import light_recurrence
from essl_nb.ligru.gpu import backend as gpu
from essl_nb.ligru.gpu.launch_plan import H100

OWN = {cpu: {"forward": ["threads"], "remake": [], "backward": ["threads"]},
       gpu: {"forward": ["precision", "engine"], "remake": ["precision"], "backward": ["precision", "engine"]}}  # its own options, last
BACKENDS = pytest.mark.parametrize("backend", OWN, ids=lambda b: b.__name__.split(".")[-2])
GIVES = {"forward": ForwardResult, "remake": Kept, "backward": Gradients}


@BACKENDS
@pytest.mark.parametrize("name", GIVES)
def test_signatures_are_the_references(backend, name):
    truth, mine = (inspect.signature(getattr(module, name)) for module in (reference, backend))
    shared = list(mine.parameters.values())[: len(truth.parameters)]
    form = lambda p: (p.name, p.kind, p.default, p.annotation)
    assert [form(p) for p in shared] == [form(p) for p in truth.parameters.values()]
    extra = list(mine.parameters.values())[len(shared) :]
    assert [p.name for p in extra] == OWN[backend][name] and all(p.kind is p.KEYWORD_ONLY and p.default is None for p in extra)
    assert mine.return_annotation is truth.return_annotation is GIVES[name]


def run(module, T, cell, affine, norm, **own):
    "States, what was kept and all gradients of a backend, by name; `affine` and `norm` say which vectors there are."
    g = torch.Generator().manual_seed(0)
    B, H = 3, 8
    new = lambda *shape: torch.randn(*shape, generator=g)
    vectors = {name: new(2 * H) for name in ("gain", "bias", "weight", "shift")}
    gain, bias = (vectors[name] if name in affine else None for name in ("gain", "bias"))
    weight, shift = (vectors[name] if name in (norm or ()) else None for name in ("weight", "shift"))
    given = new(T, B, 2 * H), new(2 * H, H) / 3, new(B, H), None, torch.tensor([T, T // 2, 1]), gain, bias
    mean, rstd, grad = new(2 * H), new(2 * H).exp(), new(T, B, H)
    how = dict(norm=None if norm is None else Norm(mean, rstd, weight, shift, True), cell=cell, activation="tanh")
    hs, kept = module.forward(*given, **how, **own)
    assert type(kept) is Kept
    again = module.forward(*given, **how, recompute=True, **own)
    assert torch.equal(again.states, hs) and again.kept == Kept()
    grads = module.backward(grad, *given[1:], hs, kept, wx=given[0], **how, **own)
    assert type(grads) is Gradients
    return {"states": hs, **kept._asdict(), **{f"d {k}": v for k, v in grads._asdict().items()}}, given[4]


@pytest.mark.parametrize("norm", [None, (), ("weight",), ("weight", "shift")], ids=str)
@pytest.mark.parametrize("cell, affine", [("ligru", ()), ("sligru", ()), ("sligru", ("gain",)), ("sligru", ("bias",)), ("sligru", ("gain", "bias"))], ids=str)
@pytest.mark.parametrize("T", [3, 9], ids=lambda T: f"T{T}")
def test_every_backend_gives_the_same_records(T, cell, affine, norm):
    truth, lengths = run(reference, T, cell, affine, norm)
    real = torch.arange(T)[:, None] < lengths
    others = [run(cpu, T, cell, affine, norm)[0]]
    if T == 3:
        others.append(run(gpu, T, cell, affine, norm, precision="fp32", engine=cudasim.Simulator(H100))[0])
    wanted = {"d wx", "d u", "d h0"} | {f"d {name}" for name in affine}
    wanted |= {{"weight": "d norm_weight", "shift": "d norm_bias"}[name] for name in norm or ()}
    assert {name for name, t in truth.items() if name.startswith("d ") and t is not None} == wanted
    for mine in others:
        assert mine.keys() == truth.keys()
        for name, true in truth.items():
            assert (mine[name] is None) == (true is None), name
            if true is not None:
                at = real if name in Kept._fields else slice(None)  # what is kept of a frame of padding is never read
                assert (mine[name][at] - true[at]).abs().max() < 1e-4 * (1 + true[at].abs().max()), name


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("which", ["gain", "bias"])
def test_a_gain_without_a_bias_and_a_bias_without_a_gain_have_gradients(which, backend):
    torch.manual_seed(0)
    new = lambda *shape: torch.randn(*shape, dtype=torch.double, requires_grad=True)
    operands = new(12, 2, 16), new(16, 8), new(2, 8)
    vector = new(16)
    slope = lambda loop, **kw: torch.autograd.grad(loop(*operands, **{which: vector}, cell="sligru", **kw).square().sum(), vector)[0]
    assert torch.allclose(slope(light_recurrence, backend=backend), slope(recurrence), rtol=1e-10)
