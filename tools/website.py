"""Build the site of notebooks into _site/: `make docs`. Nothing is fetched while building or reading it.

Notebooks become Markdown pages with their stored outputs, TeX becomes MathML (which browsers draw themselves), and
Plotly figures stay alive, drawn by the plotly.js that the Python package brings.
"""
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import plotly
import yaml
from latex2mathml.converter import convert

sys.path.insert(0, str(Path(__file__).resolve().parent))
import check
import readme

ROOT = Path(__file__).resolve().parents[1]
PAGES = ROOT / ".cache" / "site"
DRAW = """document.querySelectorAll(".figure-data").forEach(node => {
  const figure = JSON.parse(node.textContent), place = document.createElement("div");
  node.replaceWith(place);
  Plotly.newPlot(place, figure.data, figure.layout, {responsive: true, displaylogo: false});
});
"""
CODE = re.compile(r"(^```.*?^```$|`[^`\n]+`)", re.M | re.S)


def mathml(text: str) -> str:
    "TeX between dollars as MathML, code left alone; what cannot be converted stays as it is."
    def one(match, display):
        try:
            return convert(match[1].strip(), display=display)
        except Exception:
            return match[0]

    parts = CODE.split(text)
    for i in range(0, len(parts), 2):
        parts[i] = re.sub(r"\$\$(.+?)\$\$", lambda m: one(m, "block"), parts[i], flags=re.S)
        parts[i] = re.sub(r"(?<![\\$\w])\$([^$\n]+?)\$(?!\w)", lambda m: one(m, "inline"), parts[i])
    return "".join(parts)


def figure(data, cell_id) -> str:
    "A Plotly figure, to be drawn in the page."
    held = json.dumps({k: data[k] for k in ("data", "layout")}).replace("</", "<\\/")
    return f'<script type="application/json" class="figure-data">{held}</script>'


def page(path, to):
    "One notebook or Markdown file as a page of the site."
    text = readme.markdown(path, figure) if path.suffix == ".ipynb" else path.read_text(encoding="utf-8")
    to.parent.mkdir(parents=True, exist_ok=True)
    to.write_text(mathml(re.sub(r"(\([^()\s]+)\.ipynb(#[^()\s]*)?\)", r"\1.md\2)", text)).replace("(README.md)", "(index.md)"), encoding="utf-8")


def title(path) -> str:
    "The first heading of a notebook."
    found = re.search(r"^# (.+)$", readme.markdown(path, figure), re.M)
    return found[1].strip() if found else path.stem


def build():
    shutil.rmtree(PAGES, ignore_errors=True)
    page(ROOT / "index.ipynb", PAGES / "index.md")
    page(ROOT / "CONTRIBUTING.md", PAGES / "CONTRIBUTING.md")
    page(ROOT / "docs" / "design.md", PAGES / "docs" / "design.md")
    for name in ("results", "parity"):
        page(ROOT / "docs" / f"{name}.ipynb", PAGES / "docs" / f"{name}.md")
    for folder in ("docs/figures", "corpus/licences"):
        shutil.copytree(ROOT / folder, PAGES / folder)
    shutil.copy(ROOT / "LICENSE", PAGES / "LICENSE")
    (PAGES / "assets").mkdir()
    shutil.copy(Path(plotly.__file__).parent / "package_data" / "plotly.min.js", PAGES / "assets")
    (PAGES / "assets" / "figures.js").write_text(DRAW)
    nav = [{"essl_nb": "index.md"}, {"Results": "docs/results.md"}, {"Parity": "docs/parity.md"}, {"Sluice": "docs/sluice.md"}, {"An encoder that costs less": "docs/encoder.md"}, {"Design": "docs/design.md"}, {"Contributing": "CONTRIBUTING.md"}]
    for folder in ["tutorials", *check.folders(ROOT)]:
        found = sorted((ROOT / "nbs" / folder).glob("*.ipynb"))
        for path in found:
            page(path, PAGES / path.relative_to(ROOT).with_suffix(".md"))
        if found:
            nav.append({folder: [{title(p): p.relative_to(ROOT).with_suffix(".md").as_posix()} for p in found]})
    config = ROOT / ".cache" / "mkdocs.yml"
    config.write_text(yaml.safe_dump({"INHERIT": str(ROOT / "mkdocs.yml"), "docs_dir": str(PAGES), "site_dir": str(ROOT / "_site"), "nav": nav}, sort_keys=False))
    env = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    subprocess.run([sys.executable, "-m", "mkdocs", "build", "-q", "-f", str(config)], check=True, env=env)
    print(f"essl_nb: the site is in {(ROOT / '_site').relative_to(Path.cwd()) if ROOT == Path.cwd() else ROOT / '_site'}; open _site/index.html")


if __name__ == "__main__":
    build()
