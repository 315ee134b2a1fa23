"""Parity: our modules with another implementation's weights give its outputs and its gradients.

Each file of this folder holds cases. `tests/test_parity.py` runs them as tests, `tools/parity.py` writes their table to
results/parity.json. A case is a function that returns pairs of tensors, ours and theirs:

    @case(FNet, package="transformers", what="FNetBasicFourierTransform", tolerance=1e-5)
    def fnet():
        ...
        return compare(ours, theirs, x)
"""
import importlib
import pkgutil
from dataclasses import dataclass
from typing import Callable

import torch

CASES = []


@dataclass(frozen=True)
class Case:
    "One thing of ours against one of another's."
    ours: type  # our class
    package: str  # whose implementation; "" for the paper's equations, written out in float64 in the case itself
    what: str  # its class or function there, or the paper and equation numbers
    tolerance: float  # greatest relative difference allowed
    run: Callable  # → {quantity: (ours, theirs)}

    def __str__(self):
        return f"{self.ours.__name__}-{self.package or 'equations'}-{self.run.__name__}"


def case(ours: type, *, package: str, what: str, tolerance: float = 1e-5):
    "A decorator that enters a case."

    def enter(run):
        CASES.append(Case(ours, package, what, tolerance, run))
        return run

    return enter


def compare(ours, theirs, x: torch.Tensor, parameters: dict | None = None) -> dict:
    """Outputs, input gradients and parameter gradients of two functions of one tensor.

    `parameters` maps a name to (our parameter, their parameter or a list of theirs that ours is the concatenation of).
    """
    pairs, inputs, outs = {}, [], []
    for function in (ours, theirs):
        inputs.append(x.detach().clone().requires_grad_())
        outs.append(function(inputs[-1]))
    weights = torch.randn(outs[1].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(outs[1].dtype)
    for out in outs:
        (out * weights).sum().backward()
    pairs["output"] = tuple(o.detach() for o in outs)
    pairs["gradient of the input"] = tuple(i.grad for i in inputs)
    for name, (mine, other) in (parameters or {}).items():
        grads = [p.grad for p in (other if isinstance(other, (list, tuple)) else [other])]
        pairs[f"gradient of {name}"] = (mine.grad, torch.cat([g.reshape(-1, *mine.shape[1:]) for g in grads]).reshape(mine.shape))
    return pairs


def away(mine: torch.Tensor, other: torch.Tensor) -> float:
    "Greatest difference over the greatest value."
    assert mine.shape == other.shape, f"shapes {tuple(mine.shape)} and {tuple(other.shape)}"
    return ((mine - other).abs().max() / other.abs().max().clamp(min=torch.finfo(other.dtype).tiny)).item()


def all_cases() -> list:
    "Every case of the folder."
    for module in sorted(m.name for m in pkgutil.iter_modules(__path__)):
        importlib.import_module(f"{__name__}.{module}")
    return CASES
