"""Ours against other implementations and against the papers' equations, case by case; see tests/parity."""
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import parity


@pytest.mark.parametrize("case", parity.all_cases(), ids=str)
def test_parity(case):
    if case.package:
        pytest.importorskip(case.package)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pairs = case.run()
    assert pairs, "the case compares nothing"
    for quantity, (mine, other) in pairs.items():
        assert other.abs().max() > 0, f"{quantity}: theirs is 0 everywhere, which compares nothing"
        found = parity.away(mine, other)
        assert found <= case.tolerance, f"{quantity}: {found:.2g} apart, {case.tolerance:.2g} allowed"
