"""Write README.md from index.ipynb, the pages of results in docs/ from their notebooks, and their figures into docs/figures/.

Cells under `#| hide` are dropped, cells under `#| hide_input` show only their output, other `#|` lines go. A Plotly figure becomes
docs/figures/<cell id>.svg; the file ends with a hash of the figure, so that it is drawn again only when the figure has
changed and the pages can be checked without a browser. Drawing needs kaleido and a Chromium. A figure drawn for a page
that no longer shows it is removed.
"""
import base64
import hashlib
import json
import os
import re
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter
from nbformat.v4 import new_markdown_cell

FIGURES = Path("docs/figures")
PAGES = {"README.md": "index.ipynb", "docs/results.md": "docs/results.ipynb", "docs/parity.md": "docs/parity.ipynb", "docs/encoder.md": "docs/encoder.ipynb", "docs/sluice.md": "docs/sluice.ipynb"}  # page: its notebook
PLOTLY = "application/vnd.plotly.v1+json"
HEAD = "<!-- Written by tools/readme.py from {}; edit the notebook. -->\n"


def figure_hash(data) -> str:
    "Twelve digits that change when the figure does."
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:12]


def split_directives(source) -> tuple[set, str]:
    "The names of a cell's leading `#|` lines, and the code below them."
    lines = source.split("\n")
    n = next((i for i, line in enumerate(lines) if not line.startswith("#|")), len(lines))
    return {(line[2:].split() or [""])[0].rstrip(":") for line in lines[:n]}, "\n".join(lines[n:]).strip("\n")


def shown(out, plotly) -> str:
    "An output as Markdown; `plotly` says what becomes of a Plotly figure."
    data = out.get("data", {})
    if PLOTLY in data:
        return plotly(data[PLOTLY])
    if "text/markdown" in data:
        return data["text/markdown"].strip()
    for kind in ("image/png", "image/svg+xml"):
        if kind in data:
            code = data[kind].strip() if kind == "image/png" else base64.b64encode(data[kind].encode()).decode()
            return f"![output](data:{kind};base64,{code})"
    text = out.get("text", "") or data.get("text/plain", "")
    return f"```text\n{text.rstrip()}\n```" if text.strip() else ""


def markdown(path, plotly) -> str:
    "A notebook as Markdown; `plotly(figure, cell id)` gives what stands for a figure."
    nb = nbformat.read(path, as_version=4)
    cells = []
    for c in nb.cells:
        directives, c.source = split_directives(c.source)
        if directives & {"hide", "default_exp", "exporti"}:
            continue
        outputs = [new_markdown_cell(s) for o in c.pop("outputs", []) if (s := shown(o, lambda data: plotly(data, c.id)))]
        if c.cell_type == "code":
            c["outputs"] = []
        if c.source and "hide_input" not in directives:
            cells.append(c)
        cells += outputs
    nb.cells = cells
    nb.metadata["language_info"] = {"name": "python"}  # without it, fences have no language
    text, _ = MarkdownExporter().from_notebook_node(nb)
    return re.sub(r"\n{3,}", "\n\n", re.sub(r"[ \t]+$", "", text, flags=re.M)).strip() + "\n"


def page(root, target="README.md") -> tuple[str, dict]:
    "A page's text, and its figures: file name → Plotly JSON."
    figures = {}
    folder = Path(os.path.relpath(FIGURES, Path(target).parent)).as_posix()

    def picture(data, cell_id):
        figures[f"{cell_id}.svg"] = data
        return f"![{figure_title(data)}]({folder}/{cell_id}.svg)"

    return f"{HEAD.format(PAGES[target])}\n{markdown(Path(root) / PAGES[target], picture)}", figures


def pages(root) -> dict:
    "Every page that has a notebook in `root`: its path → (text, figures)."
    return {target: page(root, target) for target, notebook in PAGES.items() if (Path(root) / notebook).exists()}


def figure_title(data) -> str:
    "The figure's own title, without markup, for readers who do not see it."
    title = data.get("layout", {}).get("title", {})
    text = title.get("text", "") if isinstance(title, dict) else title
    return re.sub(r"<[^>]+>", "", re.sub(r"<br */?>", ", ", text)).replace("]", ")").strip() or "figure"


def drawn(path) -> str:
    "The hash that a drawn figure carries, or nothing."
    found = re.search(r"<!-- figure (\w{12}) -->\s*$", path.read_text(encoding="utf-8")) if path.exists() else None
    return found[1] if found else ""


def draw(data, path):
    "A Plotly figure as SVG."
    import plotly.graph_objects as go

    fig = go.Figure({k: data[k] for k in ("data", "layout")})
    fig.update_layout(paper_bgcolor="white", plot_bgcolor="white")  # a page may be dark
    svg = fig.to_image(format="svg", width=820, height=fig.layout.height or 460).decode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{svg.rstrip()}\n<!-- figure {figure_hash(data)} -->\n", encoding="utf-8")


def unused(root, made) -> list[Path]:
    "Figures that were drawn for a page and are on none any more."
    kept = {name for _, figures in made.values() for name in figures}
    return [p for p in sorted((Path(root) / FIGURES).glob("*.svg")) if p.name not in kept and drawn(p)]


def differences(root) -> list[str]:
    "What of the pages and their figures is not what the notebooks make."
    made, found = pages(root), []
    for target, (text, figures) in made.items():
        path = Path(root) / target
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            found.append(f"{target} is not what {PAGES[target]} makes")
        stale = [n for n, data in figures.items() if drawn(Path(root) / FIGURES / n) != figure_hash(data)]
        found += [f"{FIGURES / n} is not the figure of {PAGES[target]}" for n in stale]
    return found + [f"{FIGURES / p.name} is on no page any more" for p in unused(root, made)]


def write(root):
    "The pages, and the figures that changed."
    made = pages(root)
    for target, (text, figures) in made.items():
        for name, data in figures.items():
            if drawn(Path(root) / FIGURES / name) != figure_hash(data):
                draw(data, Path(root) / FIGURES / name)
        (Path(root) / target).write_text(text, encoding="utf-8")
    for path in unused(root, made):
        path.unlink()


if __name__ == "__main__":
    write(Path(__file__).resolve().parents[1])
