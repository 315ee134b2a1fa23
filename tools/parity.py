"""Run every parity case and write the table: whose implementation, what was compared, how far apart.

    .venv/bin/python tools/parity.py            # prints the table and writes results/parity.json
"""
import sys
from importlib.metadata import packages_distributions, version
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
import parity

from essl_nb.core.files import write_json


def system(package: str) -> str:
    "The distribution that an import name belongs to, with its version."
    if not package:
        return "the paper's equations"
    name = packages_distributions()[package.split(".")[0]][0]
    return f"{name} {version(name)}"


def row(case) -> dict:
    "One line of the table."
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pairs = case.run()
    dtype = str(next(iter(pairs.values()))[1].dtype).removeprefix("torch.")
    return {
        "ours": case.ours.__name__, "module": case.ours.__module__, "mixer": getattr(case.ours, "registered_name", None),
        "system": system(case.package),
        "what": case.what, "quantities": len(pairs), "dtype": dtype,
        "difference": float(f"{max(parity.away(*p) for p in pairs.values()):.2g}"), "tolerance": case.tolerance,
    }


if __name__ == "__main__":
    rows = [row(c) for c in parity.all_cases()]
    for r in rows:
        print(f"{r['ours']:24} {r['system']:32} {r['difference']:9.2g}  ({r['quantities']} quantities, {r['dtype']})  {r['what']}")
    write_json(ROOT / "results" / "parity.json", rows)
    print(f"{len(rows)} cases → results/parity.json")
