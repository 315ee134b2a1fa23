"""Write, read, run and export notebooks from the shell, keeping cell ids stable.

    python tools/nb.py write page.md nbs/core/01_registry.ipynb   # Markdown with ```python fences -> notebook
    python tools/nb.py read  nbs/core/01_registry.ipynb           # notebook -> Markdown on stdout
    python tools/nb.py run   nbs/core/01_registry.ipynb           # execute in place, store outputs
    python tools/nb.py export nbs/core/01_registry.ipynb          # export one notebook to essl_nb/
    python tools/nb.py number mixers                              # count the pages of a folder anew, links mended

In the Markdown form a line `<!-- cell -->` parts two prose cells. `write` keeps the ids of cells that stay and the
outputs of code that did not change; `run` stores outputs without this machine's paths, warnings and progress bars.
`number` counts from 01 in the order of today's names, so a page called 03b_page comes to stand after the third.
"""
import argparse
import difflib
import hashlib
import os
import re
import sys
import tempfile
from pathlib import Path

try:
    import nbformat
    from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
except ImportError:
    sys.exit("nbformat is missing: use the project's environment, .venv/bin/python tools/nb.py (make test makes it).")

ROOT = Path(__file__).resolve().parents[1]
FENCE = re.compile(r"^```python\n(.*?)^```$", re.M | re.S)
KERNEL = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}, "language_info": {"name": "python"}}


def cells_of(text):
    "The cells of a Markdown page, in order, without ids."
    cells, at = [], 0

    def prose(part):
        for piece in part.split("<!-- cell -->"):
            if piece.strip():
                cells.append(new_markdown_cell(piece.strip()))

    for m in FENCE.finditer(text):
        prose(text[at : m.start()])
        cells.append(new_code_cell(m[1].rstrip("\n")))
        at = m.end()
    prose(text[at:])
    return cells


def keep_ids(cells, old):
    "Give `cells` the ids and outputs of the cells they continue in `old`; new cells get an id from their content."
    match = difflib.SequenceMatcher(a=[c.source for c in old], b=[c.source for c in cells], autojunk=False)
    for tag, i1, i2, j1, j2 in match.get_opcodes():
        if tag in ("equal", "replace"):
            for a, b in zip(old[i1:i2], cells[j1:j2]):
                if a.cell_type == b.cell_type:
                    b["id"], b["kept"] = a["id"], True
                    if tag == "equal" and a.cell_type == "code":
                        b["outputs"] = a["outputs"]
    taken = {c["id"] for c in cells if c.pop("kept", False)}
    for n, c in enumerate(cells):
        if c["id"] not in taken:
            salt = 0
            while (new := hashlib.sha256(f"{c.source}{salt}".encode()).hexdigest()[:8]) in taken:
                salt += 1
            c["id"] = new
            taken.add(new)
    return cells


def save(nb, path):
    "Write `nb` beside `path` and rename, so that a reader never sees half a notebook."
    path = Path(path).resolve()  # nbs/index.ipynb is a link, and stays one
    nb.metadata = nbformat.from_dict(KERNEL)
    part = path.with_name(f".{path.name}.part")
    part.write_text(nbformat.writes(nb, version=4, indent=1) + "\n", encoding="utf-8")
    os.replace(part, path)
    clean(path)


def clean(path):
    from nbdev.clean import nbdev_clean

    nbdev_clean(str(path))


def write(page, path):
    old = nbformat.read(path, as_version=4).cells if path.exists() else []
    nb = new_notebook(cells=keep_ids(cells_of(Path(page).read_text(encoding="utf-8")), old))
    nb.nbformat_minor = 5
    path.parent.mkdir(parents=True, exist_ok=True)
    save(nb, path)


def read(path):
    out, last = [], None
    for c in nbformat.read(path, as_version=4).cells:
        if c.cell_type == "markdown" and last == "markdown":
            out.append("<!-- cell -->")
        out.append(c.source if c.cell_type == "markdown" else f"```python\n{c.source}\n```")
        last = c.cell_type
    print("\n\n".join(out))


def anywhere(value):
    "An output without the paths of this machine: the repository is `.`, a temporary folder is `tmp`."
    if isinstance(value, str):
        places = re.escape(tempfile.gettempdir()) + r"/tmp\w+"
        return re.sub(places, "tmp", value.replace(f"{ROOT}/", "").replace(str(ROOT), "."))
    if isinstance(value, list):
        return [anywhere(v) for v in value]
    return nbformat.from_dict({k: anywhere(v) for k, v in value.items()}) if isinstance(value, dict) else value


def joined(outputs):
    "Outputs without stderr, neighbouring prints as one (how a kernel parts them is chance)."
    kept = []
    for o in outputs:
        if o.output_type == "stream" and o.name == "stderr":
            continue
        if kept and o.output_type == kept[-1].output_type == "stream":
            kept[-1]["text"] += o["text"]
        else:
            kept.append(o)
    return [anywhere(o) for o in kept]


def run(path):
    from nbclient import NotebookClient

    os.environ |= {"PLOTLY_RENDERER": "plotly_mimetype", "GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1"}
    path = path.resolve()
    nb = nbformat.read(path, as_version=4)
    NotebookClient(nb, timeout=1800, resources={"metadata": {"path": str(path.parent)}}).execute()
    for c in nb.cells:
        if c.cell_type == "code":
            c["outputs"] = joined(c["outputs"])
    save(nb, path)


def export(path):
    from nbdev.export import nb_export

    nb_export(str(path.resolve()), lib_path=str(ROOT / "essl_nb"))


LINK = re.compile(r"\]\(([^)\s#]+\.ipynb)((?:#[^)\s]*)?)\)")


def number(folder):
    pages = sorted((ROOT / "nbs" / folder).glob("*.ipynb"))
    if not pages:
        sys.exit(f"nbs/{folder} has no notebooks; the folders are listed in docs/design.md.")
    names = [re.sub(r"^[0-9]+[a-z]*_", "", p.name) for p in pages]
    moved = {p: p.with_name(f"{n:02d}_{name}") for n, (p, name) in enumerate(zip(pages, names), 1) if p.name != f"{n:02d}_{name}"}
    for p in moved:
        p.rename(p.with_name(f".moving_{p.name}"))
    for p, to in moved.items():
        p.with_name(f".moving_{p.name}").rename(to)
        print(f"{p.name} is now {to.name}")
    for path in [ROOT / "index.ipynb", *(ROOT / "docs").glob("*.ipynb"), *(p for p in (ROOT / "nbs").rglob("*.ipynb") if not p.is_symlink())]:
        was = next((old for old, new in moved.items() if new == path), path)

        def mended(link):
            target = Path(os.path.normpath(was.parent / link[1]))
            return f"]({os.path.relpath(moved.get(target, target), path.parent)}{link[2]})"

        text = path.read_text(encoding="utf-8")
        if (new := LINK.sub(mended, text)) != text:
            path.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("action", choices=["write", "read", "run", "export", "number"])
    ap.add_argument("paths", nargs="+", type=Path)
    args = ap.parse_args()
    if args.action == "write":
        if len(args.paths) != 2:
            sys.exit("tools/nb.py write takes two paths: the Markdown page and the notebook.")
        write(*args.paths)
    else:
        for p in args.paths:
            globals()[args.action](p)
