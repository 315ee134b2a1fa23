"""Files and folders of the project have names of their own.

Python started inside a folder, or an editor that runs one of its files, puts that folder first on the module path:
a `wave.py` there is then what `import wave` finds, in whatever library needs it.
"""
import configparser
import re
import sys
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def plain(name: str) -> str:
    "A distribution's name as package indexes compare it."
    return re.sub(r"[-_.]+", "-", name).lower()


def needed() -> set:
    "The distributions of settings.ini, of every extra, and what they need in turn."
    settings = configparser.ConfigParser()
    settings.read(ROOT / "settings.ini")
    open_ends = [r for key, value in settings["DEFAULT"].items() if "requirements" in key for r in value.split()]
    found = set()
    while open_ends:
        name = plain(re.match(r"[\w.-]+", open_ends.pop())[0])
        if name in found:
            continue
        found.add(name)
        try:
            open_ends += [r for r in metadata.requires(name) or [] if "extra ==" not in r]
        except metadata.PackageNotFoundError:
            pass  # not installed here: its own name is all that is known of it
    return found


def importable(distributions: set) -> set:
    "The names by which distributions are imported."
    by_name = {module for module, owners in metadata.packages_distributions().items() if any(plain(o) in distributions for o in owners)}
    return by_name | {name.replace("-", "_") for name in distributions}


@pytest.mark.parametrize("top", ["essl_nb", "tools", "tests"])
def test_no_file_or_folder_has_the_name_of_a_module_of_pythons_or_of_a_dependencys(top):
    taken = {"the standard library": set(sys.stdlib_module_names), "a dependency": importable(needed())}
    assert {"wave", "operator"} <= taken["the standard library"] and {"torch", "onnx", "filelock"} <= taken["a dependency"]
    names = {p.relative_to(ROOT): p.stem for p in (ROOT / top).rglob("*") if (p.suffix == ".py" and p.stem != "__init__") or (p / "__init__.py").is_file()}
    assert len(names) > 5
    clashes = [f"{path} has the name of a module of {whose}" for path, name in sorted(names.items()) for whose, those in taken.items() if name in those]
    assert not clashes, "\n".join(clashes)
