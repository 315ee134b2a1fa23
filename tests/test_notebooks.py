"""Every notebook runs from top to bottom, each in a process of its own, and what it stores is what it gives.

Stored outputs are compared word by word with those of the run, numbers left out: a list of names, a sentence, a table's
columns, a figure's title must be today's. A cell whose words depend on the machine says `#| varies`.

One server process imports the heavy libraries once and forks for each notebook, so that a notebook starts in
milliseconds and nothing that it registers or patches is seen by another.
"""
import json
import multiprocessing
import os
import re
import sys
import traceback
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))
import check

HEAVY = ["torch", "torch.utils.flop_counter", "torch._dynamo", "torch._inductor", "torch.distributed", "torch.export", "sympy", "networkx", "scipy.linalg", "numpy", "numba", "pandas", "plotly.graph_objects", "plotly.subplots", "huggingface_hub.hf_api", "nbformat.v4", "nbdev.test", "execnb.shell", "pytest"]
SECONDS = 900  # for one notebook on a busy machine; alone, about 20 are the rule


def notebooks() -> list[Path]:
    "All notebooks with code to run, reading order, index.ipynb first."
    folders = ["tutorials", *check.folders(ROOT)]
    found = [ROOT / p for p in check.notebooks(ROOT) if p.parts[0] == "nbs"]
    pages = [ROOT / p for p in check.notebooks(ROOT) if p.parts[0] != "nbs"]
    return [*pages, *sorted(found, key=lambda p: (folders.index(p.parent.relative_to(ROOT / "nbs").as_posix()), p.name))]


FIGURES = ("application/vnd.plotly.v1+json", "image/png", "image/svg+xml")


def words(cell) -> Counter:
    "The words that a cell's outputs show, and how many figures: no numbers, no order, no line breaks."
    found = Counter()
    for o in cell.get("outputs", ()):
        if o["output_type"] == "stream" and o["name"] == "stderr":
            continue
        data = o.get("data", {})
        figure = next((data[kind] for kind in FIGURES if kind in data), None)
        shown = data.get("text/html", data.get("text/plain", ""))  # a table as text breaks where its numbers are long, and says its index twice
        text = o.get("text", "") if o["output_type"] == "stream" else "" if figure is not None else shown
        if figure is not None:
            found["(a figure)"] += 1
            text = str(((figure.get("layout") or {}).get("title") or {}).get("text", "")) if isinstance(figure, dict) else ""
        text = re.sub(r"<style.*?</style>|<[^<>]*>|\x1b\[[0-9;]*m", " ", "".join(text), flags=re.S)
        text = re.sub(r"0x[0-9a-f]+|\S*/\S*", " ", text)  # addresses, paths
        found.update(re.findall(r"[A-Za-zÀ-ž_]{3,}", text))
    return found


def stale(run, stored) -> list[str]:
    "A line for each cell whose stored outputs have other words than those of the run."
    found, before = [], {c["id"]: c for c in stored["cells"]}
    for cell in run.cells:
        source = "".join(cell.source)
        if cell.cell_type != "code" or source.lstrip().startswith("#| varies") or "outputs" not in cell:
            continue
        now, then = words(cell), words(before[cell["id"]])
        if now != then:
            head = next((line for line in source.splitlines() if line.strip() and not line.startswith("#|")), "")
            found.append(f"the cell {head[:60]!r} stores {sorted((then - now).elements())[:8]} and gives {sorted((now - then).elements())[:8]}")
    return found


def run_notebook(path: str, force: list, log: str, answer):
    "In the child: run one notebook with nbdev, everything that it prints into `log`; answer whether it passed and what it stores that it does not give."
    with open(log, "w") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    sys.stdout = sys.__stdout__ = open(1, "w", closefd=False)
    sys.stderr = sys.__stderr__ = open(2, "w", closefd=False)
    os.environ["PLOTLY_RENDERER"] = "plotly_mimetype"
    found, stored = [], json.loads(Path(path).read_text(encoding="utf-8"))
    try:
        import nbdev.test
        import pandas as pd
        from nbdev.config import get_config

        pd.set_option("display.max_columns", 20)  # as in a notebook: a terminal's width does not count

        nbdev.test.write_nb = lambda run, _: found.extend(stale(run, stored))  # what `save` hands over is looked at instead
        flags = get_config(Path(path).parent).tst_flags.split()
        passed, _ = nbdev.test.test_nb(path, skip_flags=flags, force_flags=force, basepath=str(ROOT), cell_timeout=SECONDS, save=True)
    except BaseException:
        traceback.print_exc()
        passed = False
    sys.stderr.flush()
    answer.send((bool(passed), found))


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
        passed, found = mine.recv() if mine.poll(SECONDS) else ("late", [])
    except EOFError:
        passed, found = "died", []
    finally:
        child.join(5)
        if child.is_alive():
            child.kill()
            child.join()
    said = log.read_text(errors="replace")[-6000:] if log.exists() else ""
    if passed is not True:
        why = {"late": f"took more than {SECONDS} s", "died": f"ended its process (exit code {child.exitcode})"}.get(passed, "failed")
        pytest.fail(f"{path.relative_to(ROOT)} {why}\n{said}", pytrace=False)
    assert not found, f"{path.relative_to(ROOT)} shows what is no longer so; run it again with `python tools/nb.py run {path.relative_to(ROOT)}`:\n" + "\n".join(found)


def test_the_comparison_sees_names_titles_and_missing_figures():
    from types import SimpleNamespace

    def cell(*outputs, source="show()"):
        held = dict(id="a", cell_type="code", source=source, outputs=list(outputs))
        return type("Cell", (dict,), {"__getattr__": dict.__getitem__})(held)

    def told(now, then):
        return stale(SimpleNamespace(cells=[now]), dict(cells=[then]))

    text = lambda t: dict(output_type="stream", name="stdout", text=t)
    figure = lambda title: dict(output_type="display_data", data={FIGURES[0]: dict(layout=dict(title=dict(text=title)))})
    table = lambda plain: dict(output_type="execute_result", data={"text/plain": plain, "text/html": "<td>GRU</td><td>0.9</td>"})
    assert not told(cell(table("shape GRU\\\nshape 0.9")), cell(table("shape GRU 0.9")))
    assert not told(cell(text("attention 3.1 ms\nfnet 2.9 ms")), cell(text("attention 4 ms"), text("fnet 12.25 ms\n")))
    assert told(cell(text("attention, fnet, mamba")), cell(text("attention, fnet")))
    assert told(cell(text("attention")), cell()) and told(cell(figure("all is linear")), cell(figure("nothing is linear")))
    assert told(cell(), cell(figure(""))) and not told(cell(text("Xeon"), source="#| varies\nshow()"), cell(text("EPYC")))
