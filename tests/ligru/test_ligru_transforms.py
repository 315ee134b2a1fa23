"""Derivatives of every kind, through the Light GRU's layers and the selective scan."""
import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

from essl_nb.core.registry import EsslError
from essl_nb.ligru.custom_op import explain_backend
from essl_nb.ligru.layer import LiGRU, SLiGRU
from essl_nb.ops.scan import selective_scan

T, D = 12, 3


def layer_of(kind, **kw):
    torch.manual_seed(0)
    layer = kind(D, 4, **kw).double().eval()
    return lambda x: layer(x, lengths=torch.tensor([T, 5]))[0]


def scan_of():
    draw = torch.Generator().manual_seed(0)
    delta, A, B, C = (torch.randn(*shape, generator=draw, dtype=torch.double) for shape in ((2, T, D), (2, D), (2, T, 2), (2, T, 2)))
    return lambda x: selective_scan(x, delta.abs() + x**2, -A.abs(), B, C)[0]


CASES = {
    "batch norm": lambda: layer_of(LiGRU), "two ways": lambda: layer_of(LiGRU, bidirectional=True, normalization="layer"),
    "stable": lambda: layer_of(SLiGRU, recurrent_affine=True, activation="tanh", num_layers=2), "remade": lambda: layer_of(LiGRU, recompute=True, normalization="none"), "scan": scan_of,
}


@pytest.fixture(params=CASES)
def function(request):
    return CASES[request.param]()


@pytest.fixture
def x():
    return torch.randn(2, T, D, dtype=torch.double, generator=torch.Generator().manual_seed(1))


def test_forward_mode_is_the_difference_quotient(function, x):
    along, step = torch.randn_like(x), 1e-6
    with torch.no_grad():
        quotient = (function(x + step * along) - function(x - step * along)) / (2 * step)
    assert quotient.abs().max() > 0.01 and torch.allclose(jvp(function, (x,), (along,))[1], quotient, atol=1e-6)
    with forward_ad.dual_level():
        assert torch.allclose(forward_ad.unpack_dual(function(forward_ad.make_dual(x, along))).tangent, quotient, atol=1e-6)


def test_reverse_mode_is_the_everyday_gradient(function, x):
    loss, leaf = lambda x: function(x).square().sum(), x.clone().requires_grad_()
    loss(leaf).backward()
    assert torch.allclose(grad(loss)(x), leaf.grad)
    assert torch.allclose(jacrev(loss)(x), leaf.grad) and torch.allclose(jacfwd(loss)(x), leaf.grad)


def test_second_derivatives_are_the_quotients_of_the_first(function, x):
    loss, step, along = lambda x: function(x).square().sum(), 1e-6, torch.randn_like(x)
    quotient = (grad(loss)(x + step * along) - grad(loss)(x - step * along)) / (2 * step)
    assert torch.allclose(jvp(grad(loss), (x,), (along,))[1], quotient, atol=1e-4)
    small = x[:1, :2].contiguous()
    pad = lambda v: torch.cat([torch.cat([v, x[:1, 2:]], 1), x[1:]])
    whole = hessian(lambda v: loss(pad(v)))(small)
    assert torch.allclose(whole.flatten(3).flatten(0, 2), whole.flatten(3).flatten(0, 2).T, atol=1e-8) and whole.abs().max() > 0.01


@pytest.mark.parametrize("kind", [LiGRU, SLiGRU])
def test_gradients_of_each_utterance_are_those_of_it_alone(kind, x):
    layer = kind(D, 4, normalization="layer").double()
    loss = lambda p, one: functional_call(layer, p, (one[None],))[0].square().sum()
    parameters = {n: p.detach() for n, p in layer.named_parameters()}
    each = vmap(grad(loss), (None, 0))(parameters, x)
    for i, one in enumerate(x):
        layer.zero_grad()
        layer(one[None])[0].square().sum().backward()
        assert all(torch.allclose(each[n][i], p.grad) for n, p in layer.named_parameters())


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("normalization", ["batch", "layer", "none"])
def test_the_plain_backend_is_the_others_and_has_second_derivatives(normalization, training, x):
    torch.manual_seed(0)
    plain, fast = (LiGRU(D, 4, normalization=normalization, backend=b, bidirectional=True, activation="tanh").double().train(training) for b in ("plain", "auto"))
    plain.load_state_dict(fast.state_dict())
    lengths, leaf = torch.tensor([T, 5]), x.clone().requires_grad_()
    run = lambda layer: layer(leaf, lengths=lengths)[0]
    y, z = run(plain), run(fast)
    assert plain.backend_used == ("plain", "it was asked for") and torch.allclose(y, z)
    assert all(torch.allclose(a, b) for (_, a), (_, b) in zip(plain.named_buffers(), fast.named_buffers()))
    first, = torch.autograd.grad(y.square().sum(), leaf, create_graph=True)
    assert torch.allclose(first, torch.autograd.grad(z.square().sum(), leaf)[0])
    second, = torch.autograd.grad(first.square().sum(), leaf)
    assert second.isfinite().all() and second.abs().max() > 0


def test_what_a_transform_runs_on_is_said_and_a_fast_loop_by_name_is_refused(x):
    told = []

    def ask(x):
        told.append(explain_backend("auto", "cpu", torch.float64))
        return x.sum()

    grad(ask)(x)
    assert told[0].name == "plain" and "transform" in told[0].why and explain_backend("auto", "cpu", torch.float64).name != "plain"
    for backend in ("cpu", "reference"):
        layer = LiGRU(D, 4, backend=backend).double().eval()
        with pytest.raises(EsslError, match="only 'plain' has them"):
            jvp(lambda x: layer(x)[0], (x,), (x,))


def test_under_autocast_the_plain_loop_stays_in_float32(x):
    layer = LiGRU(D, 4, backend="plain")
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x.float())[0].dtype == torch.float32
