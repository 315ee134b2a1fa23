"""Compile the GPU kernels of the Light GRU without a GPU and write what the assembler makes of them to results/ligru_ptx.json.

    python tools/ptx.py            # needs numba-cuda and ptxas (pip install 'essl_nb[cuda]' nvidia-cuda-nvcc); about two minutes

One row for each kernel that a plan for an A100 or an H100 asks for; `estimate_us` is the plan's estimate of a frame, not a measurement.
"""
import json
import subprocess
from importlib.metadata import version
from itertools import product
from pathlib import Path

from essl_nb.ligru.gpu.graph import backward_frame, forward_frame
from essl_nb.ligru.gpu.launch_plan import A100, H100, plan_kernel, shared_bytes
from essl_nb.ligru.gpu.persistent import KERNELS, assembler_report
from essl_nb.ligru.gpu.ptx import find_ptxas
from essl_nb.ligru.gpu.tile import KernelShape

ROOT = Path(__file__).resolve().parents[1]


def rows():
    "Plan, compile, assemble."
    seen = set()
    sizes = product((256, 512, 768, 1024), (8, 16, 64))
    kinds = product(("bf16", "fp32"), ("ligru", "sligru"), (False, True))
    for limits, (hidden, batch), (precision, cell, backward) in product((A100, H100), sizes, kinds):
        p = plan_kernel(hidden, batch, precision, limits, cell=cell, backward=backward)
        if p.kind == "persistent" and (p.shape, limits) not in seen:
            seen.add((p.shape, limits))
            (row,) = assembler_report(KERNELS["backward" if backward else "forward"], p.shape, (limits.capability,))
            yield row | dict(gpu=limits.name, batch=batch, estimate_us=round(p.frame_us, 2), shared_planned=shared_bytes(p.shape))
    for maker, cell in product((forward_frame, backward_frame), ("ligru", "sligru")):
        yield from assembler_report(maker, KernelShape(2048, precision="fp32", cell=cell))


if __name__ == "__main__":
    found = list(rows())
    ptxas = subprocess.run([find_ptxas(), "--version"], capture_output=True, text=True).stdout.strip().split("\n")[-1]
    made = dict(numba_cuda=version("numba-cuda"), ptxas=ptxas, nvvm=version("nvidia-nvvm"))
    head = json.dumps({"made_by": "tools/ptx.py", **made})[:-1]
    path = ROOT / "results/ligru_ptx.json"
    path.write_text(head + ', "kernels": [\n' + ",\n".join(json.dumps(row) for row in found) + "\n]}\n")
    print(f"{len(found)} kernels, {sum(row['spills'] > 0 for row in found)} of them spill; wrote {path.relative_to(ROOT)}")
