"""The tools that keep the repository honest: notebooks from and to Markdown, README from index.ipynb, the environment."""
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))
import check
import nb
import pins
import readme

PAGE = """# Title

> subtitle

```python
a = 1
```

First.

<!-- cell -->

Second.

```python
print("x")
a
```
"""


def stored(path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture
def book(tmp_path) -> Path:
    (tmp_path / "page.md").write_text(PAGE, encoding="utf-8")
    nb.write(tmp_path / "page.md", tmp_path / "a.ipynb")
    return tmp_path / "a.ipynb"


def test_markdown_becomes_a_notebook_and_comes_back(book, capsys):
    kinds = [c["cell_type"] for c in stored(book)["cells"]]
    assert kinds == ["markdown", "code", "markdown", "markdown", "code"]
    nb.read(book)
    assert capsys.readouterr().out.strip() == PAGE.strip()


def test_writing_twice_changes_nothing_and_ids_follow_their_cells(book, tmp_path):
    before = book.read_bytes()
    nb.write(tmp_path / "page.md", book)
    assert book.read_bytes() == before
    old = [c["id"] for c in stored(book)["cells"]]
    (tmp_path / "page.md").write_text(PAGE.replace("First.", "First.\n\n<!-- cell -->\n\nBetween."), encoding="utf-8")
    nb.write(tmp_path / "page.md", book)
    new = [c["id"] for c in stored(book)["cells"]]
    assert len(set(new)) == 6 and [i for i in new if i in old] == old


def test_outputs_stay_with_code_that_did_not_change(book, tmp_path):
    data = stored(book)
    for c in data["cells"]:
        if c["cell_type"] == "code":
            c["outputs"] = [{"name": "stdout", "output_type": "stream", "text": ["kept\n"]}]
    book.write_text(json.dumps(data), encoding="utf-8")
    (tmp_path / "page.md").write_text(PAGE.replace("a = 1", "a = 2"), encoding="utf-8")
    nb.write(tmp_path / "page.md", book)
    code = [c for c in stored(book)["cells"] if c["cell_type"] == "code"]
    assert [len(c["outputs"]) for c in code] == [0, 1]


def test_a_link_stays_a_link(book, tmp_path):
    link = tmp_path / "link.ipynb"
    link.symlink_to("a.ipynb")
    nb.write(tmp_path / "page.md", link)
    assert link.is_symlink() and stored(link)["cells"]


def test_outputs_lose_the_paths_of_this_machine():
    assert nb.anywhere({"text": [f"{ROOT}/corpus/x and {ROOT}"]}) == {"text": ["corpus/x and ."]}


def output(kind, **data):
    return {"output_type": kind, "metadata": {}, **data}


def test_readme_shows_what_it_should(tmp_path):
    figure = {"data": [], "layout": {"title": {"text": "A <b>finding</b>"}}}
    cells = [
        ("markdown", "# Title", []),
        ("code", "#| hide\nsecret = 1", []),
        ("code", "#| hide_input\nsecret", [output("stream", name="stdout", text="said\n")]),
        ("code", "#| eval: false\nshown = 1", []),
        ("code", "figure", [output("display_data", data={readme.PLOTLY: figure, "text/plain": "Figure()"})]),
    ]
    made = [{"cell_type": k, "id": f"cell{i}", "metadata": {}, "source": s, **({"outputs": o, "execution_count": None} if k == "code" else {})} for i, (k, s, o) in enumerate(cells)]
    (tmp_path / "index.ipynb").write_text(json.dumps({"cells": made, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}), encoding="utf-8")
    text, figures = readme.page(tmp_path)
    assert "secret" not in text and "#|" not in text
    assert "```text\nsaid\n```" in text and "```python\nshown = 1\n```" in text
    assert "![A finding](docs/figures/cell4.svg)" in text and list(figures) == ["cell4.svg"]
    assert len(readme.differences(tmp_path)) == 2
    (tmp_path / "README.md").write_text(text, encoding="utf-8")
    (tmp_path / "docs/figures").mkdir(parents=True)
    (tmp_path / "docs/figures/cell4.svg").write_text(f"<svg/>\n<!-- figure {readme.figure_hash(figure)} -->\n")
    assert readme.differences(tmp_path) == []


def test_pages_of_results_are_written_and_compared_as_readme_is(tmp_path):
    figure = {"data": [], "layout": {"title": {"text": "A finding"}}}
    cell = dict(cell_type="code", id="cell", metadata={}, source="figure", execution_count=None, outputs=[output("display_data", data={readme.PLOTLY: figure})])
    (tmp_path / readme.FIGURES).mkdir(parents=True)
    for notebook in ("index.ipynb", "docs/results.ipynb"):
        shown = [cell] if notebook.startswith("docs") else []
        (tmp_path / notebook).write_text(json.dumps({"cells": shown, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}), encoding="utf-8")
    drawn = tmp_path / readme.FIGURES / "cell.svg"
    drawn.write_text(f"<svg/>\n<!-- figure {readme.figure_hash(figure)} -->\n")
    assert "![A finding](figures/cell.svg)" in readme.page(tmp_path, "docs/results.md")[0], "a link from the page, not from the root"
    readme.write(tmp_path)
    assert readme.differences(tmp_path) == [] and drawn.exists()
    (tmp_path / "docs/results.md").write_text("old")
    assert readme.differences(tmp_path) == ["docs/results.md is not what docs/results.ipynb makes"]


def test_a_figure_that_no_page_shows_is_told_of_and_removed_unless_somebody_drew_it(tmp_path):
    (tmp_path / "index.ipynb").write_text(json.dumps({"cells": [], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}), encoding="utf-8")
    (tmp_path / readme.FIGURES).mkdir(parents=True)
    made, own = tmp_path / readme.FIGURES / "made.svg", tmp_path / readme.FIGURES / "own.svg"
    made.write_text(f"<svg/>\n<!-- figure {'0' * 12} -->\n")
    own.write_text("<svg/>\n")
    assert "docs/figures/made.svg is on no page any more" in readme.differences(tmp_path)
    readme.write(tmp_path)
    assert own.exists() and not made.exists() and readme.differences(tmp_path) == []


def test_check_finds_what_is_out_of_step(tmp_path):
    for folder, name in (("nbs/core", "01_registry.ipynb"), ("essl_nb/core", "__init__.py"), ("essl_nb/core", "registry.py")):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / folder / name).write_bytes((ROOT / folder / name).read_bytes())
    for name in ("index.ipynb", "pyproject.toml", "settings.ini", "README.md", "essl_nb/__init__.py"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    for figure in (ROOT / readme.FIGURES).glob("*.svg"):
        (tmp_path / readme.FIGURES).mkdir(parents=True, exist_ok=True)
        (tmp_path / readme.FIGURES / figure.name).write_bytes(figure.read_bytes())
    module = tmp_path / "essl_nb/core/registry.py"
    module.write_text(module.read_text() + "# edited by hand\n")
    (tmp_path / "essl_nb/core/stray.py").write_text("")
    (tmp_path / "README.md").write_text("old")
    notebook = tmp_path / "nbs/core/01_registry.ipynb"
    notebook.write_text(notebook.read_text().replace('"execution_count": null', '"execution_count": 7', 1))
    found = "\n".join(check.differences(tmp_path))
    for part in ("01_registry.ipynb is not as nbdev-clean", "registry.py is not what its notebook exports", "stray.py comes from no notebook", "README.md is not what"):
        assert part in found


def test_pins_follow_what_is_asked_for():
    found = pins.closure(["pytest>=8"])
    assert {"pytest", "pluggy"} <= set(found) and "torch" not in found


def test_environment_script_says_what_it_knows():
    done = subprocess.run(["sh", "tools/env.sh", "nonsense"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "knows run, dev, docs and browser" in done.stderr


def test_environment_script_asks_for_a_python(tmp_path):
    (tmp_path / "tools").mkdir()
    for name in ("settings.ini", "setup.py", "constraints.txt", "tools/env.sh"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    old = tmp_path / "old-python"
    old.write_text("#!/bin/sh\n[ \"$1\" = --version ] && echo Python 3.8.1\nexit 1\n")
    old.chmod(0o755)
    done = subprocess.run(["sh", "tools/env.sh", "run"], cwd=tmp_path, capture_output=True, text=True, env={"PATH": "/usr/bin:/bin", "PYTHON": str(old)})
    assert done.returncode == 1 and "Python 3.10 or later is needed" in done.stderr and not (tmp_path / ".venv").exists()
