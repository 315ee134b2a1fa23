"""Plans for the GPU kernels of the Light GRU, and what the assembler makes of the kernels: no GPU is needed."""
import json
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import cudasim
import pytest
import torch

from essl_nb.core.registry import EsslError
from essl_nb.ligru.gpu import backend as cuda
from essl_nb.ligru.gpu.graph import backward_frame, forward_frame
from essl_nb.ligru.gpu.launch_plan import A100, H100, T4, capacity, plan_kernel, registers, resident, shared_bytes
from essl_nb.ligru.gpu.persistent import KERNELS, assembler_report
from essl_nb.ligru.gpu.ptx import find_ptxas
from essl_nb.ligru.gpu.tile import KernelShape

ROOT = Path(__file__).resolve().parents[2]
CARDS = json.loads((ROOT / "results/ligru_ptx.json").read_text())["kernels"]
compiles = pytest.mark.skipif(find_spec("numba_cuda") is None or find_ptxas() is None, reason="needs numba-cuda and ptxas: pip install 'essl_nb[cuda]' nvidia-cuda-nvcc")


@pytest.fixture(autouse=True)
def fresh_plans():
    yield
    cuda.plan_on.cache_clear()


@pytest.mark.parametrize("limits", [A100, H100], ids=lambda l: l.name)
def test_blocks_of_a_plan_fit_at_once(limits):
    for H in (8, 100, 256, 512, 768, 1024, 2048):
        for B in (1, 8, 33, 300):
            for precision in ("bf16", "fp32"):
                for backward in (False, True):
                    p = plan_kernel(H, B, precision, limits, directions=2, cell="sligru", backward=backward)
                    if p.kind == "persistent":
                        blocks, tiles, directions = p.grid
                        assert blocks * tiles * directions <= capacity(p.shape, limits) == p.fits and blocks * p.shape.units >= H
                        assert tiles * p.launches * p.shape.rows >= B > (tiles * p.launches - p.launches) * p.shape.rows - p.shape.rows * p.launches
                        assert p.shape.threads * registers(p.shape) <= 65536 and p.reason
                    else:
                        assert p.reason


@pytest.mark.parametrize("limits", [A100, H100], ids=lambda l: l.name)
def test_what_the_notes_of_the_design_ask_for_is_persistent(limits):
    for H in (256, 512, 1024):
        for backward in (False, True):
            p = plan_kernel(H, 16, "bf16", limits, backward=backward)
            assert p.kind == "persistent" and p.launches == 1 and p.frame_us < 4
    assert plan_kernel(512, 16, "fp32", limits).kind == plan_kernel(512, 16, "bf16", limits, directions=2, backward=True).kind == "persistent"
    far = plan_kernel(4096, 16, "bf16", limits)
    assert far.kind == "frames" and "512 blocks" in far.reason and limits.name in far.reason
    assert plan_kernel(512, 4096, "fp32", limits).kind == "frames"  # too many launches one after the other


def test_what_cannot_be_is_said():
    with pytest.raises(EsslError, match="8.0 or more.*precision='fp32'"):
        plan_kernel(512, 8, "bf16", T4)
    assert plan_kernel(512, 8, "fp32", T4).shape.precision == "fp32"
    with pytest.raises(EsslError, match="7.5 or more"):
        plan_kernel(512, 8, "fp32", replace(T4, name="V100", capability=(7, 0)))
    with pytest.raises(EsslError, match="'fp16' was given; allowed: 'bf16'"):
        plan_kernel(512, 8, "fp16", A100)
    with pytest.raises(EsslError, match="allowed: 'ligru', 'sligru'"):
        plan_kernel(512, 8, "bf16", A100, cell="light")
    with pytest.raises(EsslError, match="at least 4 warps"):
        KernelShape(64, 2, 2)


def test_the_drivers_word_is_the_last():
    engine = cudasim.Simulator(H100)
    engine.fits = lambda *a: 3
    p = cuda.plan_on(torch.device("cpu"), engine, 512, 16, "bf16")
    assert p.kind == "frames" and "the driver holds 3" in p.reason


def test_the_module_is_light_and_says_what_is_missing():
    code = """
import sys
sys.modules["numba_cuda"] = None  # as if it were not installed
import essl_nb.ligru.gpu.backend as cuda, essl_nb.ligru.gpu.ptx as ptx
assert not [m for m in sys.modules if m.split(".")[0] in ("numba", "llvmlite")]
import importlib.util
ptx.find_spec = lambda name: None
try: ptx.device_words()
except ValueError as e: print(e)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "pip install 'essl_nb[cuda]'" in done.stdout, done.stderr


CLEAN = dict(spills=0, stack=0, float64=0, calls=0)


@compiles
@pytest.mark.parametrize("maker,shape", [
    (KERNELS["forward"], KernelShape(512, 8, 2)), (KERNELS["backward"], KernelShape(512, 8, 2, cell="sligru", activation="tanh", backward=True)),
    (KERNELS["forward"], KernelShape(512, 8, 1, "fp32", cell="sligru", activation="tanh")), (KERNELS["backward"], KernelShape(512, 8, 1, "fp32", backward=True)),
    (forward_frame, KernelShape(2048, 8, 1, "fp32", "sligru")), (backward_frame, KernelShape(2048, 8, 1, "fp32", "sligru")),
], ids=lambda v: v.__name__ if callable(v) else f"{v.cell}-{v.precision}")
def test_a_kernel_of_each_kind_compiles_and_spills_nothing(maker, shape):
    for row in assembler_report(maker, shape, ((9, 0),)):
        assert {k: row[k] for k in CLEAN} == CLEAN
        assert (row["tensor_core"] > 0) == (shape.precision == "bf16")
        assert maker not in KERNELS.values() or row["shared"] <= shared_bytes(shape)


def test_kernels_on_record_spill_nothing_and_as_many_fit_as_plans_rely_on():
    assert len(CARDS) > 40
    for row in CARDS:
        assert {k: row[k] for k in CLEAN} == CLEAN, row
        if "gpu" in row:
            shape, limits = KernelShape(**{k: row[k] for k in KernelShape.__dataclass_fields__}), {"A100": A100, "H100": H100}[row["gpu"]]
            assert resident(shape, limits, row["registers"]) >= resident(shape, limits, registers(shape)) > 0 and row["shared"] <= row["shared_planned"], row
