"""Are the notebooks clean, and are the modules, README.md and the pages of results what the notebooks make?

    python tools/check.py          say what is out of step, change nothing, exit 1 if anything is
    python tools/check.py --mend   clean the notebooks, write the modules and the pages   (`make export`)

The check runs nbdev-clean, nbdev-export and tools/readme.py in a copy, and compares the copy with this folder.
"""
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import readme

ROOT = Path(__file__).resolve().parents[1]


def nbdev(command, root, *arguments):
    "Run one of nbdev's commands in `root`; its own errors come back as they are."
    call = f"{command}({', '.join(map(repr, arguments))})"
    env = {k: v for k, v in os.environ.items() if k != "IN_TEST"}
    done = subprocess.run([sys.executable, "-c", f"from nbdev.clean import nbdev_clean; from nbdev.doclinks import nbdev_export; {call}"], cwd=root, env=env, capture_output=True, text=True)
    if done.returncode or "Failed to clean" in done.stderr:
        sys.exit(f"nbdev could not do its work ({command}):\n{done.stdout}{done.stderr}")


def notebooks(root):
    "Every notebook of the project, index.ipynb and those of docs/ included, relative to `root`."
    found = [p.relative_to(root) for p in (root / "nbs").rglob("*.ipynb") if not any(part.startswith((".", "_")) for part in p.parts)]
    pages = sorted(p.relative_to(root) for p in (root / "docs").glob("*.ipynb"))
    return sorted(p for p in found if not (root / p).is_symlink()) + [Path("index.ipynb"), *pages]


def folders(root):
    "The folders of notebooks in reading order: the first column of the table in docs/design.md, such as core and ligru/cpu."
    table = (root / "docs" / "design.md").read_text(encoding="utf-8").split("## Folders")[1].split("\n## ")[0]
    return re.findall(r"^\| `([\w/]+)`", table, re.M)


def modules(root):
    "Every exported module, relative to `root`."
    return sorted(p.relative_to(root) for p in (root / "essl_nb").rglob("*.py") if p.name not in ("__init__.py", "_modidx.py"))


def copy(root, to):
    "The part of the project that nbdev works on, links kept."
    quiet = shutil.ignore_patterns(".*", "__pycache__")
    shutil.copytree(root / "nbs", to / "nbs", symlinks=True, ignore=quiet)
    for p in root.glob("essl_nb/**/__init__.py"):
        (to / p.relative_to(root)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(p, to / p.relative_to(root))
    for name in ("index.ipynb", "pyproject.toml", "settings.ini"):
        shutil.copy2(root / name, to / name)
    (to / "docs").mkdir()
    for p in (root / "docs").glob("*.ipynb"):
        shutil.copy2(p, to / "docs" / p.name)


def clean(root):
    "nbdev-clean, in nbs/ (which holds a link to index.ipynb) and docs/."
    nbdev("nbdev_clean", root)
    if any((root / "docs").glob("*.ipynb")):
        nbdev("nbdev_clean", root, "docs")


def differences(root=ROOT):
    "One line for each file that is out of step, with what to do."
    with tempfile.TemporaryDirectory() as tmp:
        to = Path(tmp).resolve()
        copy(root, to)
        same = lambda p: (root / p).is_file() and (root / p).read_bytes() == (to / p).read_bytes()
        clean(to)
        found = [f"{p} is not as nbdev-clean writes it" for p in notebooks(to) if not same(p)]
        nbdev("nbdev_export", to)
        found += [f"{p} is not what its notebook exports" for p in modules(to) if not same(p)]
        found += [f"{p} comes from no notebook" for p in modules(root) if not (to / p).exists()]
        found += [f"{p} would be changed by nbdev-export" for p in (q.relative_to(to) for q in to.glob("essl_nb/**/__init__.py")) if not same(p)]
        found += [f"{p} was left by nbdev-export" for p in (q.relative_to(to) for q in to.rglob("llms.txt"))]
    return found + readme.differences(root)


def mend(root=ROOT):
    "Clean, export, README and pages: what a commit needs."
    clean(root)
    nbdev("nbdev_export", root)
    readme.write(root)


if __name__ == "__main__":
    if "--mend" in sys.argv[1:]:
        print("essl_nb: cleaning the notebooks, writing essl_nb/, README.md and the pages of results", flush=True)
        mend()
    else:
        print("essl_nb: checking that notebooks, modules, README.md and the pages of results are in step", flush=True)
    if found := differences():
        sys.exit("\n".join(found) + "\nTo mend: make export (edit notebooks, never essl_nb/*.py, README.md or the pages made of docs/*.ipynb), then commit what changed.")
