"""Write constraints.txt: the versions in this environment of all that settings.ini asks for, directly or not.

    .venv/bin/python tools/pins.py > constraints.txt

torch and torchaudio are pinned everywhere, since they must fit each other. The other pins hold for Python 3.11 and
later; on 3.10 pip takes the newest that still supports it. Libraries that torch itself pins (CUDA, triton) stay out.
"""
from configparser import ConfigParser
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement

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


if __name__ == "__main__":
    parser = ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    wanted = [w for k, v in parser["DEFAULT"].items() if k.endswith("requirements") for w in v.split()]
    print("# Written by tools/pins.py: the versions that the tests were last run with.")
    for name, version in sorted(closure(wanted).items()):
        if not name.startswith(TORCHS_OWN):
            always = name in ("torch", "torchaudio", "torchvision")
            print(f"{name}=={version.split('+')[0]}" + ("" if always else ' ; python_version >= "3.11"'))
