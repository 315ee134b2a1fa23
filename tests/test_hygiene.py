"""The rules that keep the repository readable, as tests. CONTRIBUTING.md says why each is there."""
import ast
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))
import check

NOTEBOOKS = [p for p in check.notebooks(ROOT) if (ROOT / p).exists()]
MODULES = check.modules(ROOT)
SOURCES = [p.relative_to(ROOT) for folder in ("app", "tests", "tools") for p in sorted((ROOT / folder).rglob("*.py"))]

MAX_CELLS, MAX_KILOBYTES = 60, 200
MAX_CELL_LINES, MAX_MODULE_LINES = 60, 450  # aim at 40 and 350


def cells(path) -> list[dict]:
    return json.loads((ROOT / path).read_text(encoding="utf-8"))["cells"]


def source(cell) -> str:
    return "".join(cell["source"])


def is_exported(cell) -> bool:
    return cell["cell_type"] == "code" and bool(re.match(r"\s*#\|\s*export", source(cell)))


def tree(code) -> ast.AST | None:
    "The syntax tree of a cell or file; nothing where IPython's own syntax stands."
    try:
        return ast.parse("\n".join(line for line in code.split("\n") if not line.lstrip().startswith(("%", "!"))))
    except SyntaxError:
        return None


ids = dict(ids=lambda p: Path(p).as_posix())


def test_modules_and_readme_are_what_the_notebooks_make():
    found = check.differences(ROOT)
    assert not found, "\n".join([*found, "To mend: make export"])


@pytest.mark.parametrize("path", NOTEBOOKS, **ids)
def test_notebook_is_small_and_stored_cleanly(path):
    nb = json.loads((ROOT / path).read_text(encoding="utf-8"))
    size = (ROOT / path).stat().st_size / 1000
    assert len(nb["cells"]) <= MAX_CELLS, f"{len(nb['cells'])} cells; split the notebook ({MAX_CELLS} at most)"
    assert size <= MAX_KILOBYTES, f"{size:.0f} kB; make its outputs smaller ({MAX_KILOBYTES} at most)"
    named = [c.get("id") for c in nb["cells"]]
    assert all(named) and len(set(named)) == len(named), "every cell needs an id of its own"
    assert all(isinstance(c["source"], list) for c in nb["cells"]), "sources are stored as lists of lines"
    code = [c for c in nb["cells"] if c["cell_type"] == "code"]
    assert all(c["execution_count"] is None for c in code), "execution counts are not stored"
    stored = json.dumps([c["outputs"] for c in code])
    assert "plotly.min.js" not in stored and "Plotly.newPlot" not in stored, "store Plotly figures as the plotly mimetype"
    assert '"output_type": "error"' not in stored, "a stored output is an error"


def lines_of_code(code: str) -> int:
    "Lines that hold code: blank lines, comments, docstrings and signatures (one argument on each line) do not count."
    skip = {i for i, line in enumerate(code.split("\n"), 1) if not line.strip() or line.lstrip().startswith("#")}
    for n in ast.walk(tree(code)):
        if isinstance(n, (ast.FunctionDef, ast.ClassDef)):
            body = n.body[0]
            skip |= set(range(n.lineno, body.lineno))
            if isinstance(body, ast.Expr) and isinstance(body.value, ast.Constant):
                skip |= set(range(body.lineno, body.end_lineno + 1))
    return code.count("\n") + 1 - len(skip)


@pytest.mark.parametrize("path", NOTEBOOKS, **ids)
def test_export_cells_are_short(path):
    for c in cells(path):
        lines = lines_of_code(source(c)) if is_exported(c) else 0
        assert lines <= MAX_CELL_LINES, f"{lines} lines of code in one export cell; split it:\n{source(c)[:200]}"


@pytest.mark.parametrize("path", [p for p in NOTEBOOKS if p.parts[0] == "nbs" and p.parts[1] != "tutorials"], **ids)
def test_source_notebook_asserts_and_is_where_its_name_says(path):
    code = "\n".join(source(c) for c in cells(path) if c["cell_type"] == "code" and not is_exported(c))
    parsed = [t for c in cells(path) if c["cell_type"] == "code" and not is_exported(c) and (t := tree(source(c)))]
    asserts = any(isinstance(n, ast.Assert) or (isinstance(n, ast.Call) and re.match(r"test_|check_|raises|.*assert", ast.unparse(n.func))) for t in parsed for n in ast.walk(t))
    assert asserts, "a source notebook asserts what its reader should believe"
    name = re.search(r"^#\|\s*default_exp\s+(\S+)", code, re.M)
    assert name, "the first cell names the module: #| default_exp folder.name"
    assert name[1] == ".".join([*path.parts[1:-1], re.sub(r"^[0-9]+_", "", path.stem)]), f"{path} exports {name[1]}: folder = subpackage, name without number = module"


FOLDERS = check.folders(ROOT)
PLACES = {module: place for place, module in enumerate((folder, path.stem) for folder in FOLDERS for path in sorted((ROOT / "nbs" / folder).glob("*.ipynb")))}


def test_pages_are_numbered_from_one_in_every_folder_and_design_orders_all_folders():
    found = {p.parent.relative_to("nbs").as_posix() for p in NOTEBOOKS if p.parts[0] == "nbs"} - {"tutorials", "."}
    assert found == set(FOLDERS), "docs/design.md has one row for each folder, in reading order"
    for folder in FOLDERS:
        numbers = [int(p.name.split("_")[0]) for p in sorted((ROOT / "nbs" / folder).glob("*.ipynb"))]
        assert numbers == [*range(1, len(numbers) + 1)], f"nbs/{folder} counts {numbers}; `python tools/nb.py number {folder}` closes gaps"


def imported(path) -> set:
    "Modules of the package that a module takes names from, in the first lines or anywhere in it, such as core.registry."
    package, found = path.parent.parts, set()
    known = {".".join(p.with_suffix("").parts) for p in MODULES}
    for n in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(n, ast.ImportFrom):
            home = ".".join([*(package[: len(package) - n.level + 1] if n.level else ()), *([n.module] if n.module else [])])
            found |= {whole if (whole := f"{home}.{a.name}") in known else home for a in n.names}
    return {m for m in found if m in known}


@pytest.mark.parametrize("path", MODULES, **ids)
def test_no_import_leads_to_a_later_page_or_folder(path):
    place = {}
    for folder, stem in PLACES:
        place[".".join(["essl_nb", *folder.split("/"), stem.split("_", 1)[1]])] = PLACES[folder, stem]
    here = ".".join(path.with_suffix("").parts)
    later = sorted(m for m in imported(path) if place[m] >= place[here])
    whole = [n for n in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))) if isinstance(n, (ast.Import, ast.ImportFrom))
             and ("essl_nb" in [a.name for a in n.names] or isinstance(n, ast.ImportFrom) and not n.level and n.module == "essl_nb")]
    assert not whole, f"{here} imports the package itself, whose first lines lead to everything; import from the page that has the name"
    assert not later, f"{here} imports {', '.join(later)}, which a reader meets later: move what they share down, or the page up (docs/design.md, Folders)"


SAID = re.compile(r"from essl_nb\.([\w.]+) import (\w+(?:, \w+)*)")


@pytest.mark.parametrize("path", [p for p in [*NOTEBOOKS, *SOURCES, *(q.relative_to(ROOT) for q in ROOT.glob("docs/*.md")), Path("README.md")] if (ROOT / p).exists()], **ids)
def test_what_code_prose_or_a_string_imports_is_there(path):
    for module, listed in set(SAID.findall((ROOT / path).read_text(encoding="utf-8"))):
        home = importlib.import_module(f"essl_nb.{module}")
        for name in listed.split(", "):
            assert hasattr(home, name) or (ROOT / "essl_nb" / module.replace(".", "/") / f"{name}.py").exists(), f"essl_nb.{module} has no {name}"


def test_a_folder_has_one_class_of_a_name():
    homes = {}
    for path in MODULES:
        for n in ast.parse((ROOT / path).read_text(encoding="utf-8")).body:
            if isinstance(n, ast.ClassDef):
                homes.setdefault((path.parent.as_posix(), n.name), []).append(path.name)
    assert not (double := {k: v for k, v in homes.items() if len(v) > 1}), double


@pytest.mark.parametrize("path", [p for p in NOTEBOOKS if "tutorials" in p.parts], **ids)
def test_tutorial_uses_the_public_package_only(path):
    for c in cells(path):
        if c["cell_type"] == "code" and (t := tree(source(c))):
            assert not is_exported(c), "tutorials export nothing"
            for n in ast.walk(t):
                if isinstance(n, ast.ImportFrom) and (n.module or "").startswith("essl_nb."):
                    private = [a.name for a in n.names if a.name.startswith("_")]
                    assert not private, f"a tutorial imports {private}"


@pytest.mark.parametrize("path", MODULES, **ids)
def test_module_is_short_and_imports_by_name(path):
    text = (ROOT / path).read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_MODULE_LINES, f"{len(text.splitlines())} lines; split its notebook"
    for n in ast.walk(ast.parse(text)):
        if isinstance(n, ast.ImportFrom):
            assert not any(a.name == "*" for a in n.names), f"line {n.lineno}: import names, not *"


UNPICKLES = {"pickle.load", "pickle.loads", "joblib.load", "np.load", "numpy.load", "pd.read_pickle", "torch.load", "cloudpickle.loads"}
PICKLES_ITS_OWN = {"essl_nb/core/fresh.py"}  # ships a function to its own child process and reads no file of anyone's


@pytest.mark.parametrize("path", [p for p in [*MODULES, *SOURCES] if p.as_posix() not in PICKLES_ITS_OWN and p.name != "test_hygiene.py"], **ids)
def test_nothing_unpickles(path):
    for n in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(n, ast.Call) and ast.unparse(n.func) in UNPICKLES:
            said = {k.arg: ast.unparse(k.value) for k in n.keywords}
            own = n.args and ast.unparse(n.args[0]).startswith("pickle.dumps(")  # pickled in the same expression: no file is read
            safe = own or said.get("weights_only") == "True" or (ast.unparse(n.func) in ("np.load", "numpy.load") and said.get("allow_pickle", "False") == "False")
            assert safe, f"{path}:{n.lineno}: {ast.unparse(n)} may run what it reads; use safetensors or JSON"


# These names are words that other things bear too (a family, a method): they count only where a mixer is meant.
WORDS = {"attention", "summary", "none", "window", "recurrent", "scan", "hyper", "ligru", "sligru"}
TAKES_A_MIXER = {"build_mixer", "check_mixer", "EncoderConfig"}


def is_mixer_word(name: str) -> bool:
    return bool(re.search(r"(^|_)mixers?$|^against$", name))


def named_mixers(code: ast.AST, names: set) -> list[str]:
    """Places where `code` names a mixer by a literal.

    A string equal to a name that is no English word counts anywhere. A word counts as the value of an argument, key,
    default or variable called `mixer` (or `mixers`, `against`), as the first argument of build_mixer, check_mixer, EncoderConfig
    or a method of `mixers`, in `mixers[…]`, and where something called `mixer` is compared with it.
    """
    found = []

    def strings(node):
        return [n for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str) and n.value in names] if node is not None else []

    def last(node):
        return (re.findall(r"\w+", ast.unparse(node)) or [""])[-1]

    for n in ast.walk(code):
        here = []
        if isinstance(n, ast.Constant) and isinstance(n.value, str) and n.value in names - WORDS:
            here = [n]
        elif isinstance(n, ast.keyword) and n.arg and is_mixer_word(n.arg):
            here = strings(n.value)
        elif isinstance(n, ast.Dict):
            here = [s for k, v in zip(n.keys, n.values) if isinstance(k, ast.Constant) and is_mixer_word(str(k.value)) for s in strings(v)]
        elif isinstance(n, ast.Call) and n.args and (last(n.func) in TAKES_A_MIXER or ast.unparse(n.func).startswith("mixers.")):
            here = strings(n.args[0])
        elif isinstance(n, ast.Subscript) and last(n.value) == "mixers":
            here = strings(n.slice)
        elif isinstance(n, ast.Compare):
            sides = [n.left, *n.comparators]
            here = [s for side in sides for s in strings(side)] if any(is_mixer_word(last(side)) for side in sides) else []
        elif isinstance(n, (ast.Assign, ast.AnnAssign)):
            targets = n.targets if isinstance(n, ast.Assign) else [n.target]
            here = strings(n.value) if any(is_mixer_word(last(t)) for t in targets) else []
        elif isinstance(n, ast.arguments):
            pairs = [*zip(n.args[len(n.args) - len(n.defaults):], n.defaults), *zip(n.kwonlyargs, n.kw_defaults)]
            here = [s for a, d in pairs if is_mixer_word(a.arg) for s in strings(d)]
        found += [f"line {s.lineno}: {s.value!r}" for s in here]
    return sorted(set(found))


def test_the_scan_finds_what_it_should():
    names = {"fnet", "none"}
    for bad in ("x = 'fnet'", "build_mixer('none', 8)", "f(mixer='none')", "{'mixer': 'none'}", "mixers.get('none')", "mixers['none']",
                "row.mixer == 'none'", "row['mixer'] in ('a', 'none')", "def f(mixer='none'): 0", "mixer: str = 'none'"):
        assert named_mixers(ast.parse(bad), names), bad
    for good in ("x = 'none'", "print('none')", "family == 'none'", "f(norm='none')", "build_mixer(name, 8)"):
        assert not named_mixers(ast.parse(good), names), good


def code_of(path) -> list[ast.AST]:
    if path.suffix == ".py":
        return [ast.parse((ROOT / path).read_text(encoding="utf-8"))]
    return [t for c in cells(path) if c["cell_type"] == "code" and (t := tree(source(c)))]


def is_free(path) -> bool:
    "mixers/, tutorials/, index.ipynb (a tutorial in front of the door) and the pages of results may name mixers; study configurations are JSON."
    return bool({"mixers", "tutorials", "docs"} & set(path.parts)) or path.name in ("index.ipynb", "test_hygiene.py")


@pytest.mark.parametrize("path", [p for p in [*MODULES, *NOTEBOOKS, *SOURCES] if not is_free(p)], **ids)
def test_no_mixer_is_named_outside_its_folder(path):
    names = {p.stem.split("_", 1)[1] for p in (ROOT / "nbs/mixers").glob("[0-9]*_*.ipynb")}
    from essl_nb.mixers.base import list_mixers

    names = (names | set(list_mixers())) - {"base"}
    found = [place for code in code_of(path) for place in named_mixers(code, names)]
    assert not found, f"{path} names a mixer ({'; '.join(found)}); take it from list_mixers() or from the study's configuration"


def prose(path) -> str:
    if path.suffix == ".md":
        text = (ROOT / path).read_text(encoding="utf-8")
    else:
        text = "\n".join(source(c) for c in cells(path) if c["cell_type"] == "markdown")
    return re.sub(r"^```.*?^```|`[^`\n]*`", "", text, flags=re.M | re.S)


PAGES = [p for p in (Path("README.md"), Path("CONTRIBUTING.md"), *sorted(q.relative_to(ROOT) for q in (ROOT / "docs").glob("*.md")), Path("corpus/README.md")) if (ROOT / p).exists()]


@pytest.mark.parametrize("path", [*NOTEBOOKS, *PAGES], **ids)
def test_links_within_the_repository_lead_somewhere(path):
    targets = re.findall(r"\]\(([^)\s#]+)(?:#[^)\s]*)?\)", prose(path))
    broken = [t for t in targets if not re.match(r"\w+:", t) and not (ROOT / path).parent.joinpath(t).exists()]
    assert not broken, f"{path} links to {', '.join(broken)}"


def test_every_figure_is_on_a_page():
    shown = {(p.parent / target).as_posix() for p in PAGES for target in re.findall(r"\]\(([^)\s#]+)\)", (ROOT / p).read_text(encoding="utf-8"))}
    figures = {p.relative_to(ROOT).as_posix() for p in (ROOT / "docs/figures").iterdir()}
    assert figures and not (orphans := figures - shown), f"on no page: {', '.join(sorted(orphans))}; `make export` removes figures that were drawn for one"


def tracked() -> list[Path]:
    out = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True).stdout
    return [Path(p) for p in out.split("\0") if p and (ROOT / p).is_file()]


FORBIDDEN = {
    "a path of one machine": r"/work/(main|shared)|/home/\w+/|/Users/\w+/|/root/|(?<![\w.])/tmp/[\w.-]+/",
    "a registry's host": r"https?://[\w.-]*(pypi|pythonhosted|npmjs|registry|artifactory|mirror|download\.pytorch)[\w.-]*",
}


def test_no_paths_of_a_machine_and_no_registry_hosts():
    found = []
    for path in tracked():
        if path.suffix in (".ogg", ".opus", ".safetensors", ".png", ".wav") or path.name in ("test_hygiene.py", "LICENSE") or path.parts[0] == "corpus":
            continue
        text = (ROOT / path).read_text(encoding="utf-8", errors="replace")
        found += [f"{path}: {what}: {m[0]}" for what, pattern in FORBIDDEN.items() for m in re.finditer(pattern, text)]
    assert not found, "\n".join(found)


def test_wheel_sample_is_small_and_carries_no_gpl_speech(tmp_path):
    import sample

    taken = sample.chosen(ROOT)
    assert taken and all("CC-BY" in row["licence"] or row["part"] == "readru" and "BSD" in row["licence"] for row in taken.values())
    assert len({row["speaker"] for row in taken.values()}) == 5 and len({row["lang"] for row in taken.values()}) == 5
    assert {row["split"] for row in taken.values() if row["part"] == "readru"} == {"train", "valid", "test"}
    sample.build(tmp_path, ROOT)
    assert sum(p.stat().st_size for p in tmp_path.rglob("*") if p.is_file()) < 5_000_000
    assert {"asterisk-core-sounds-ru-g722.copyright", "festvox-ru.copyright"} <= {p.name for p in (tmp_path / "licences").iterdir()}
