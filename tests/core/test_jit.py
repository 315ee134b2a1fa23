"""Compiled functions: right after every edit, on every disk, with and without a compiler."""
import importlib
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import essl_nb.core.jit as jit

ROOT = Path(__file__).resolve().parents[2]
MODULES = {
    "__init__.py": "",
    "constants.py": "STEP = 2.0\n",
    "formulas.py": "from .constants import STEP\nfrom essl_nb.core.jit import inlined\n\n\n@inlined()\ndef next_value(x):\n    return x + STEP\n",
    "loops.py": "from essl_nb.core.jit import compiled\nfrom . import formulas\nfrom .formulas import next_value\n\n\n@compiled\ndef walk(x, n):\n    for _ in range(n):\n        x = next_value(x)\n    return x\n",
    "apart.py": "OTHER = 1\n",
}
SAY = "from loopy.loops import walk; print(walk(0.0, 3)); print(sum(walk.stats.cache_hits.values()))"


@pytest.fixture
def package(tmp_path, monkeypatch):
    "A package with a compiled function in one module and what it is made of in two others; it is compiled into a folder of its own."
    for name, text in MODULES.items():
        (tmp_path / "loopy").mkdir(exist_ok=True)
        (tmp_path / "loopy" / name).write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "kept"))
    monkeypatch.setenv("ESSL_CACHE", str(tmp_path / "elsewhere"))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield tmp_path
    forget()


def forget():
    "As a new process begins: nothing of the package is imported, and nothing known of the disk."
    for name in [n for n in sys.modules if n.split(".")[0] == "loopy"]:
        del sys.modules[name]
    importlib.invalidate_caches()
    for function in (jit.cache_key, jit.folder_for, jit.warn_once):
        function.cache_clear()


def run(monkeypatch) -> tuple: # the value; how many functions came from the disk
    "Import the package as a new process does, and call its compiled function."
    forget()
    monkeypatch.setattr(jit, "STARTED", time.time() + 1)
    walk = importlib.import_module("loopy.loops").walk
    return walk(0.0, 3), sum(walk.stats.cache_hits.values())


def start(folder, code=SAY, before=None, **env):
    "A process with a package on its path."
    kept = {k: v for k, v in os.environ.items() if not k.startswith("NUMBA_")}
    places = dict(PYTHONPATH=f"{folder}{os.pathsep}{ROOT}", PYTHONDONTWRITEBYTECODE="1", NUMBA_CACHE_DIR=str(folder / "kept"), PYTHONWARNINGS="always::RuntimeWarning")
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder, env=kept | places | env, preexec_fn=before)


def said(process) -> tuple: # lines of the output; what was written to stderr
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    return out.split("\n")[:-1], err


def kept(folder, pattern="*"):
    return sorted(p for p in (folder / "kept").rglob(pattern) if p.is_file())


def test_a_second_process_loads_what_the_first_compiled(package, monkeypatch):
    assert run(monkeypatch) == (6, 0) and run(monkeypatch) == (6, 1)


@pytest.mark.parametrize("file, old, new, value, hits", [
    ("constants.py", "2.0", "5.0", 15, 0),
    ("formulas.py", "x + STEP", "x - STEP", -6, 0),
    ("apart.py", "OTHER = 1", "OTHER = 2", 6, 1),
])
def test_an_edit_of_a_module_reaches_the_functions_that_it_went_into_and_no_others(package, monkeypatch, file, old, new, value, hits):
    run(monkeypatch)
    path = package / "loopy" / file
    path.write_text(path.read_text().replace(old, new))
    assert run(monkeypatch) == (value, hits)


@pytest.mark.parametrize("damage", ["empty", "half", "zeros"])
@pytest.mark.parametrize("which", ["*.nbi", "*.nbc"])
def test_a_torn_file_costs_one_compilation(package, monkeypatch, which, damage):
    run(monkeypatch)
    path, = kept(package, which)
    size = path.stat().st_size
    path.write_bytes({"empty": b"", "half": path.read_bytes()[:size // 2], "zeros": bytes(size)}[damage])
    assert run(monkeypatch) == (6, 0) and run(monkeypatch) == (6, 1)


def test_without_a_place_to_write_to_it_is_compiled_in_memory_and_said_once(package, monkeypatch):
    for name in ("NUMBA_CACHE_DIR", "ESSL_CACHE"):
        monkeypatch.setenv(name, "/dev/null/x")
    with pytest.warns(RuntimeWarning, match="cannot be kept on disk.*NUMBA_CACHE_DIR") as said:
        assert run(monkeypatch) == (6, 0)
        assert sys.modules["loopy.loops"].walk(0, 3) == 6  # integers: compiled too, and nothing more is said
    assert len(said) == 1


def test_an_unwritable_folder_gives_way_to_the_projects_cache(package, monkeypatch, recwarn):
    monkeypatch.setenv("NUMBA_CACHE_DIR", "/dev/null/x")
    assert run(monkeypatch) == (6, 0) and run(monkeypatch) == (6, 1) and not len(recwarn)


def test_a_folder_that_was_filled_and_cannot_be_written_is_read(package, monkeypatch, recwarn):
    run(monkeypatch)

    def refuse(**kw):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(jit.tempfile, "TemporaryFile", refuse)
    assert run(monkeypatch) == (6, 1) and not len(recwarn)


@pytest.mark.skipif(sys.platform == "win32", reason="file sizes cannot be limited there")
def test_on_a_full_disk_it_is_compiled_and_said_once(package, monkeypatch):
    import resource

    out, err = said(start(package, before=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64))))
    assert out == ["6.0", "0"] and err.count("RuntimeWarning: What was compiled could not be kept") == 1
    assert not kept(package, "*.tmp.*") and run(monkeypatch) == (6, 0)


def test_two_processes_that_compile_at_once_leave_a_whole_cache(package):
    both = [start(package) for _ in range(2)]
    assert all(said(process)[0][0] == "6.0" for process in both)
    assert said(start(package))[0] == ["6.0", "1"]


def test_each_kind_of_processor_has_a_folder_of_its_own(package, monkeypatch):
    run(monkeypatch)
    assert said(start(package, NUMBA_CPU_NAME="generic", NUMBA_CPU_FEATURES=""))[0] == ["6.0", "0"]
    assert len({p.parent for p in kept(package)}) == 2 and run(monkeypatch) == (6, 1)


def test_sources_that_are_younger_than_the_process_are_not_trusted(package, monkeypatch):
    forget()
    monkeypatch.setattr(jit, "STARTED", time.time() - 60)
    assert importlib.import_module("loopy.loops").walk(0.0, 3) == 6 and not kept(package)


def test_folders_of_sources_long_gone_are_swept(tmp_path):
    for name, days in (("essl_nb-old", jit.SWEPT + 1), ("essl_nb-new", 1), ("others", jit.SWEPT + 1)):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (then := time.time() - days * 86400, then))
    jit.sweep(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["essl_nb-new", "others"]


def test_imports_are_followed_by_every_spelling(package):
    (package / "loopy" / "every.py").write_text("import loopy.apart\nfrom loopy.constants import STEP as s\nfrom . import formulas\nimport os.path\n")
    assert set(jit.own_sources("loopy.every")) == {"loopy", "loopy.every", "loopy.apart", "loopy.constants", "loopy.formulas"}


@pytest.mark.parametrize("prepare, env, reason", [
    ("", {"NUMBA_DISABLE_JIT": "1"}, "NUMBA_DISABLE_JIT"),
    pytest.param("import sys; sys.modules['numba'] = None", {}, "cannot be imported", marks=pytest.mark.slow),
    pytest.param("import numba; numba.__version__ = '0.50.1'", {}, "Numba 0.50.1", marks=pytest.mark.slow),
    pytest.param("import sys; sys.modules['llvmlite'] = None", {}, "cannot be imported", marks=pytest.mark.slow),
], ids=["switched off", "no Numba", "an old Numba", "no llvmlite"])
def test_without_a_compiler_everything_runs_and_says_on_what(tmp_path, prepare, env, reason):
    code = f"""{prepare}
import torch
from essl_nb import LiGRU, list_mixers, build_mixer
from essl_nb.core.registry import EsslError
from essl_nb.ops.scan import scan_form, selective_scan, selective_scan_reference
layer, x = LiGRU(8, 8), torch.randn(2, 20, 8)
layer(x)[0].sum().backward()
print(layer.backend_used.name, layer.backend_used.why)
try:
    LiGRU(8, 8, backend="cpu")(x)
except EsslError as e:
    print(e)
given = torch.randn(1, 30, 4), torch.rand(1, 30, 4), -torch.rand(3, 4), torch.randn(1, 30, 3), torch.randn(1, 30, 3)
print(scan_form(x), torch.allclose(selective_scan(*given)[0], selective_scan_reference(*given)[0], atol=1e-5))
print(all(build_mixer(name, 16) is not None for name in list_mixers()))
"""
    (used, refused, scan, all_built), _ = said(start(tmp_path, code, **env))
    assert used.startswith("reference") and reason in used and "backend='cpu' cannot run here" in refused and reason in refused
    assert scan == "chunks True" and all_built == "True"
