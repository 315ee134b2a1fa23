"""The learning curves of a study's runs, out of their logs into one small file beside the study's rows.

    python tools/learning.py results/objectives                                # runs in results/objectives/runs
    python tools/learning.py results/objectives --runs elsewhere/objectives    # runs that were made elsewhere

FOLDER/learning.jsonl then has a line for each run of the grid, in the grid's order: what was run, and a list for each
column of its log. A run whose log is gone keeps the line that it has.
"""
import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from essl_nb.core.files import atomic_write, read_lines  # noqa: E402
from essl_nb.study.grid import grid_cells, read_grid  # noqa: E402

COLUMNS = ("step", "hours", "loss", "masked_accuracy", "explained", "valid_loss", "valid_masked_accuracy", "valid_explained",
           "valid_target_largest", "valid_effective_rank")


def short(value):
    "Four digits of what is no whole number."
    return float(f"{value:.4g}") if isinstance(value, float) else value


def curve(cell, log: Path) -> dict:
    "One line of the file: columns that the log has, None where a step has no such number."
    rows = read_lines(log)[0]
    there = {c: [short(r.get(c)) for r in rows] for c in COLUMNS}
    about = {k: cell.what[k] for k in ("encoder", "objective", "seed")}
    return dict(key=cell.key, **about, **{c: v for c, v in there.items() if any(x is not None for x in v)})


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("folder", type=Path, help="of the study, with its grid.json")
    p.add_argument("--runs", type=Path, default=None, help="the folder that the study was run in, where that is another")
    a = p.parse_args()
    out = a.folder / "learning.jsonl"
    kept = {r["key"]: r for r in (read_lines(out)[0] if out.is_file() else [])}
    cells = [c for c in grid_cells(read_grid(a.folder / "grid.json")) if c.kind == "run"]
    for cell in cells:
        log = (a.runs or a.folder) / "runs" / cell.key / "metrics.jsonl"
        if log.is_file():
            kept[cell.key] = curve(cell, log)
    lines = [kept[c.key] for c in cells if c.key in kept]
    with atomic_write(out) as part:
        part.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    print(f"{out}: {len(lines)} of {len(cells)} runs")


if __name__ == "__main__":
    main()
