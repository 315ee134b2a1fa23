"""The package as it is installed: what is declared is imported, what is imported is declared, a missing extra is a sentence, names have types."""
import ast
import json
import re
import subprocess
import sys
from configparser import ConfigParser
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import essl_nb

ROOT = Path(__file__).resolve().parents[1]
MODULES = sorted(p.relative_to(ROOT) for p in (ROOT / "essl_nb").rglob("*.py") if p.name != "_modidx.py")
# import name → what is installed, where the two differ; and what an installed package brings that is imported by its own name
DISTRIBUTION = {"yaml": "pyyaml", "torch.utils.tensorboard": "tensorboard"}
BROUGHT = {"llvmlite": "numba", "starlette": "gradio", "fastapi": "gradio", "uvicorn": "gradio"}
# what nobody imports by name: who needs it, and the words in our code that show that we use that
INDIRECT = {"onnxscript": r"onnx\.export\(", "nvidia-nvvm": r"numba import cuda|numba\.cuda", "ufal-flashlight-text": r"torchaudio\.models\.decoder"}
PEERS = {"speechbrain", "transformers", "torchaudio", "s3prl", "lhotse", "datasets"}  # asked for by adapters to them, where they are installed already


def settings():
    parser = ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return parser["DEFAULT"]


def names(key: str) -> set:
    return {re.split(r"[\[<>=!~ ]", r)[0].lower().replace("_", "-") for r in settings()[key].split()}


CORE = names("requirements")
EXTRAS = {k.removesuffix("_requirements"): names(k) for k in settings() if k.endswith("_requirements") and not k.startswith(("dev", "docs"))}


def imported(path: Path):
    "The distribution of every third-party import of a module."
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    guarded = {id(n) for f in ast.walk(tree) if isinstance(f, ast.If) and "TYPE_CHECKING" in ast.unparse(f.test) for n in ast.walk(f)}
    for n in ast.walk(tree):
        wanted = [a.name for a in n.names] if isinstance(n, ast.Import) else [n.module or ""] if isinstance(n, ast.ImportFrom) and not n.level else []
        for w in wanted:
            top = w.split(".")[0]
            if top and top not in sys.stdlib_module_names and top != "essl_nb" and id(n) not in guarded:
                name = next((d for k, d in DISTRIBUTION.items() if w == k or w.startswith(k + ".")), top)
                yield BROUGHT.get(name, name).lower().replace("_", "-")


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_imports_are_declared(path):
    declared = CORE | set().union(*EXTRAS.values()) | PEERS | {"ipython"}
    for name in imported(path):
        assert name in declared or f"numba-{name}" in declared, f"{path} imports {name}, which settings.ini asks for nowhere"


def test_every_requirement_is_imported_somewhere():
    code = "\n".join((ROOT / p).read_text(encoding="utf-8") for p in MODULES)
    used = {name for p in MODULES for name in imported(p)}
    used |= {name for name, words in INDIRECT.items() if re.search(words, code)}
    used |= {"numba-cuda"} if re.search(r"numba import cuda", code) else set()
    for kind, wanted in {"core": CORE, **EXTRAS}.items():
        assert not wanted - used, f"{kind} asks for {sorted(wanted - used)}, which no line imports"


def test_all_is_made_of_extras_that_there_are():
    assert set(settings()["all_extras"].split()) <= set(EXTRAS)


BLOCK = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name.split('.')[0])
sys.meta_path.insert(0, Block())
"""
IMPORTS = {"numba-cuda": "numba_cuda", "nvidia-nvvm": "nvvm", "huggingface-hub": "huggingface_hub", "ufal-flashlight-text": "flashlight"}


def test_with_the_core_alone_all_is_there_or_says_what_is_missing():
    "Every module either can be imported without the extras, or answers with the line that installs what it needs."
    blocked = {IMPORTS.get(n, n) for names in EXTRAS.values() for n in names} - {"essl_nb"}
    modules = [".".join(p.with_suffix("").parts).removesuffix(".__init__") for p in MODULES]
    code = BLOCK.format(blocked=blocked) + f"""
import json, importlib, essl_nb
said = {{}}
for name in {modules!r}:
    try:
        importlib.import_module(name)
    except Exception as e:
        said[name] = f"{{type(e).__name__}}: {{e}}"
for name in essl_nb.__all__:
    try:
        getattr(essl_nb, name)
    except Exception as e:
        said[f"public {{name}}"] = f"{{type(e).__name__}}: {{e}}"
print(json.dumps(said))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    said = json.loads(done.stdout)
    wrong = {k: v for k, v in said.items() if "pip install" not in v}
    assert not wrong, wrong
    free = {"mixers", "models", "core", "data", "objectives", "train.loop", "train.config", "probes.probe", "costs.cards", "ligru.layer"}
    held = [k for k in said if any(k == f"essl_nb.{f}" or k.startswith(f"essl_nb.{f}.") for f in free)]
    assert not held, f"a mixer, an encoder or a run needs an extra: {held}"
    assert {k.removeprefix("public ") for k in said if k.startswith("public ")} <= {"Study", "load_results", "pareto_front", "influence_map", "create_app"}


def test_checkers_see_every_public_name_where_it_is():
    tree = ast.parse((ROOT / "essl_nb/__init__.py").read_text(encoding="utf-8"))
    block = next(n for n in tree.body if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.unparse(n.test))
    seen = {a.asname: n.module for n in block.body for a in n.names if a.asname == a.name}
    assert seen == essl_nb._HOME
    assert (ROOT / "essl_nb/py.typed").is_file()


def test_a_wheel_carries_a_study_and_its_encoders(tmp_path):
    sys.path.insert(0, str(ROOT / "tools"))
    import sample

    sample.studies(tmp_path, ROOT)
    wanted = json.loads((ROOT / "results/wheel.json").read_text())
    for name in wanted["encoders"]:
        assert (tmp_path / wanted["study"] / "encoders" / name / "model.safetensors").is_file()
    assert (tmp_path / wanted["study"] / "grid.json").is_file() and (tmp_path / "curves" / "rows.jsonl").is_file()
    assert len(list(tmp_path.glob("*/encoders/*"))) == len(wanted["encoders"])
    assert (tmp_path / "health" / "bands.json").is_file()


def test_results_are_found_where_they_are_said_to_be(tmp_path, monkeypatch):
    from essl_nb.core import places
    from essl_nb.core.registry import EsslError

    monkeypatch.delenv("ESSL_RESULTS", raising=False)
    assert places.results_dir() == ROOT / "results" and places.repository() == ROOT
    (tmp_path / "mine").mkdir()
    monkeypatch.setenv("ESSL_RESULTS", str(tmp_path / "mine"))
    assert places.results_dir() == tmp_path / "mine"
    monkeypatch.setenv("ESSL_RESULTS", str(tmp_path / "none"))
    with pytest.raises(EsslError, match="ESSL_RESULTS"):
        places.results_dir()


def test_an_installed_package_takes_no_strangers_folder(tmp_path, monkeypatch):
    "results/ and corpus/ beside the package in site-packages belong to somebody else."
    from essl_nb.core import places
    from essl_nb.core.registry import EsslError

    monkeypatch.delenv("ESSL_RESULTS", raising=False)
    site = tmp_path / "site-packages"
    for folder in ("results/small", "essl_nb/data"):
        (site / folder).mkdir(parents=True)
    monkeypatch.setattr(places, "package", lambda: site / "essl_nb")
    assert places.repository() is None
    with pytest.raises(EsslError, match="No studies"):
        places.results_dir()
    (site / "essl_nb/data/results").mkdir()
    assert places.results_dir() == site / "essl_nb/data/results"


@pytest.mark.slow
def test_the_wheel_alone_does_what_the_readme_says(tmp_path):
    done = subprocess.run([sys.executable, "tools/from_wheel.py", "--keep", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def test_every_pin_holds_on_every_python_that_it_names():
    "A system may come with the first release of its Python, and a library ask for a later one."
    lines = [Requirement(line) for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    held, wrong = [r for r in lines if r.marker], []
    for r in held:
        try:
            needs = SpecifierSet(distribution(r.name).metadata["Requires-Python"] or "")
        except PackageNotFoundError:
            continue
        wrong += [f"{r}: needs Python {needs}, and is pinned on {v}" for v in ("3.11.0", "3.11.2", "3.12.0", "3.13.0") if r.marker.evaluate({"python_version": v.rsplit(".", 1)[0], "python_full_version": v}) and v not in needs]
    assert len(held) > 100 and not wrong, wrong
