"""Every notebook runs from top to bottom, each in a process of its own.

One server process imports the heavy libraries once and forks for each notebook, so that a notebook starts in
milliseconds and nothing that it registers or patches is seen by another.
"""
import multiprocessing
import os
import sys
import traceback
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))
import check

HEAVY = ["torch", "numpy", "pandas", "plotly.graph_objects", "nbdev.test", "execnb.shell"]
SECONDS = 900  # for one notebook on a busy machine; alone, about 20 are the rule


def notebooks() -> list[Path]:
    "All notebooks with code to run, reading order, index.ipynb first."
    folders = ["tutorials", *check.folders(ROOT)]
    found = [ROOT / p for p in check.notebooks(ROOT) if p.parts[0] == "nbs"]
    pages = [ROOT / p for p in check.notebooks(ROOT) if p.parts[0] != "nbs"]
    return [*pages, *sorted(found, key=lambda p: (folders.index(p.parent.relative_to(ROOT / "nbs").as_posix()), p.name))]


def run_notebook(path: str, force: list, log: str, answer):
    "In the child: run one notebook with nbdev, everything that it prints into `log`."
    with open(log, "w") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    sys.stdout = sys.__stdout__ = open(1, "w", closefd=False)
    sys.stderr = sys.__stderr__ = open(2, "w", closefd=False)
    try:
        from nbdev.config import get_config
        from nbdev.test import test_nb as run_nb  # under another name, or pytest would take it for a test

        flags = get_config(Path(path).parent).tst_flags.split()
        passed, _ = run_nb(path, skip_flags=flags, force_flags=force, basepath=str(ROOT), cell_timeout=SECONDS)
    except BaseException:
        traceback.print_exc()
        passed = False
    sys.stderr.flush()
    answer.send(bool(passed))


@pytest.fixture(scope="module")
def server():
    "A process with the heavy libraries in it, that forks."
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(HEAVY)
    return context


@pytest.mark.parametrize("path", notebooks(), ids=lambda p: p.relative_to(ROOT).with_suffix("").as_posix())
def test_notebook(path, server, tmp_path, request):
    if not path.exists():
        pytest.fail(f"{path.relative_to(ROOT)} is missing")
    force = ["slow"] if request.config.getoption("--slow") else []
    log, (mine, yours) = tmp_path / "log.txt", server.Pipe(duplex=False)
    child = server.Process(target=run_notebook, args=(str(path), force, str(log), yours), daemon=False)
    child.start()
    yours.close()
    try:
        passed = mine.recv() if mine.poll(SECONDS) else "late"
    except EOFError:
        passed = "died"
    finally:
        child.join(5)
        if child.is_alive():
            child.kill()
            child.join()
    said = log.read_text(errors="replace")[-6000:] if log.exists() else ""
    if passed is not True:
        why = {"late": f"took more than {SECONDS} s", "died": f"ended its process (exit code {child.exitcode})"}.get(passed, "failed")
        pytest.fail(f"{path.relative_to(ROOT)} {why}\n{said}", pytrace=False)
