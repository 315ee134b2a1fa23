"""Every module can be imported on every system."""
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import essl_nb

MODULES = sorted(m.name for m in pkgutil.walk_packages(essl_nb.__path__, "essl_nb."))
UNIX_ONLY = ("fcntl", "grp", "pwd", "resource", "termios", "tty", "pty", "syslog", "posix_ipc")


@pytest.mark.parametrize("missing", [UNIX_ONLY, ("numba", "llvmlite"), ("numba_cuda", "onnx", "onnxruntime", "speechbrain", "transformers", "datasets", "huggingface_hub", "submitit")], ids=["what Unix alone has", "a compiler", "extras"])
def test_every_module_imports_without(missing):
    needs_one = {"essl_nb.ligru.cpu.product", "essl_nb.ligru.cpu.threads", "essl_nb.ligru.cpu.loop", "essl_nb.ligru.cpu.backend",
                 "essl_nb.ligru.cpu.panels", "essl_nb.ligru.cpu.step", "essl_nb.costs.step_bench"} if "numba" in missing else set()
    code = f"""
import importlib, sys
import torch # which looks for some of them and goes on without
for name in {missing!r}:
    sys.modules[name] = None
failed = []
for name in {[m for m in MODULES if m not in needs_one]!r}:
    try:
        importlib.import_module(name)
    except Exception as e:
        failed.append(f"{{name}}: {{type(e).__name__}}: {{e}}")
print("\\n".join(failed))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(essl_nb.__file__).parents[1])
    assert done.returncode == 0 and not done.stdout.strip(), done.stdout + done.stderr
