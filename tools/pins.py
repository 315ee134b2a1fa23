"""Write constraints.txt: the versions in this environment of all that settings.ini asks for, directly or not.

    .venv/bin/python tools/pins.py > constraints.txt

torch and torchaudio are pinned everywhere, since they must fit each other. The other pins hold for Python 3.11 and
later, or from that release of 3.11 on which a library asks for (some do for 3.11.5, and systems come with 3.11.2); before
it pip takes the newest that still supports it. Libraries that torch itself pins (CUDA, triton) stay out.
"""
from configparser import ConfigParser
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).resolve().parents[1]
TORCHS_OWN = ("nvidia-", "cuda-", "triton", "setuptools")


def closure(wanted):
    "Name → version of every installed package that `wanted` (requirement strings) brings in."
    found, todo = {}, [(Requirement(w), frozenset()) for w in wanted]
    seen = set()
    while todo:
        req, extras = todo.pop()
        if req.marker and not any(req.marker.evaluate({"extra": e}) for e in extras or [""]):
            continue
        name = req.name.lower().replace("_", "-")
        if (name, frozenset(req.extras)) in seen:
            continue
        seen.add((name, frozenset(req.extras)))
        try:
            dist = distribution(name)
        except PackageNotFoundError:
            continue
        found[name] = dist.version
        todo += [(Requirement(r), frozenset(req.extras)) for r in dist.requires or []]
    return found


def marker(name):
    "For which versions of Python the installed version of a library is pinned."
    if name in ("torch", "torchaudio", "torchvision"):
        return ""
    spec = SpecifierSet(distribution(name).metadata["Requires-Python"] or "")
    if "3.11.0" in spec:
        return ' ; python_version >= "3.11"'
    first = next((f"3.11.{k}" for k in range(1, 30) if f"3.11.{k}" in spec), "3.12")
    return f' ; python_full_version >= "{first}"'


if __name__ == "__main__":
    parser = ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    wanted = [w for k, v in parser["DEFAULT"].items() if k.endswith("requirements") for w in v.split()]
    print("# Written by tools/pins.py: the versions that the tests were last run with.")
    for name, version in sorted(closure(wanted).items()):
        if not name.startswith(TORCHS_OWN):
            print(f"{name}=={version.split('+')[0]}{marker(name)}")
