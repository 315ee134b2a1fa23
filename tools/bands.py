"""Healthy runs of several mixers on the bundled corpus: no alarm is raised in any, and the range of their losses becomes the reference band.

    python tools/bands.py --folder runs/bands                      # five mixers, each of the objectives; resumes
    python tools/bands.py --folder runs/bands --objectives clusters --steps 800
    python tools/bands.py --folder runs/bands --grid results/objectives/grid.json   # encoder size, options and learning rates of a study
    python tools/bands.py --folder runs/bands --only-check         # the alarms of runs that are there already

Each run is the default configuration with a small encoder, or that of a study's grid. The alarms are asked after every line of its log, as they
would have been while it trained. Bands of objectives without alarms go into results/health/bands.json, beside those of
other objectives that the file has. Exit status: 0 where no healthy run raised an alarm, 1 otherwise.
"""
import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from essl_nb.core.files import read_json, read_lines  # noqa: E402
from essl_nb.core.places import results_dir  # noqa: E402
from essl_nb.mixers.base import list_mixers, mixers  # noqa: E402
from essl_nb.objectives.alarms import alarms, bands_file, bands_of, save_bands  # noqa: E402
from essl_nb.objectives.objective import list_objectives  # noqa: E402
from essl_nb.study.results import load_results, score_table  # noqa: E402


def usual_mixers(count: int) -> list:
    "Of each family the mixer that answers masked phones best in the shipped study, the best families first."
    table = score_table(load_results(results_dir() / "small"), "masked phones, 200 ms")
    table = table[table.state.eq("pretrained") & table.metric.eq("accuracy")].sort_values("value", ascending=False)
    best = {}
    for name in table.encoder:
        best.setdefault(mixers.get(name).meta["family"], name)
    return list(best.values())[:count]


def config_of(objective: str, mixer: str, steps: int, grid: dict):
    "What a healthy run of an objective is with this mixer; the first point of the grid with this objective says more, where there is a grid."
    from essl_nb.models.config import EncoderConfig, named_config
    from essl_nb.train.config import PretrainConfig

    size = {k: v for k, v in grid["encoders"][0]["config"].items() if k != "mixer"} if grid else {}
    point = next((o for o in grid.get("objectives", ()) if o.get("objective", o["name"]) == objective), {})
    settings = dict(steps=steps) | grid.get("pretrain", {}) | point.get("pretrain", {})
    encoder = EncoderConfig(mixer, **size) if size else named_config("small", mixer)
    return PretrainConfig(encoder, objective=objective, objective_kw=point.get("kw", {}), **settings)


def train(folder: Path, config):
    "One healthy run; nothing where it is finished."
    from essl_nb.train.loop import pretrain

    pretrain(config, folder, watch_every=max(1, config.steps // 20), keep_state=False)


def raised(folder: Path, bands: dict) -> list:
    "Every alarm that was raised at some line of the log, once by name."
    rows, objective = read_lines(folder / "metrics.jsonl")[0], read_json(folder / "config.json")["objective"]
    found = {}
    for end in range(1, len(rows) + 1):
        for a in alarms(rows[:end], objective=objective, band=bands.get(objective)):
            found.setdefault(a.name, a)
    return list(found.values())


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--folder", type=Path, required=True, help="of the runs, one folder each")
    p.add_argument("--objectives", nargs="+", default=list_objectives(), choices=list_objectives())
    p.add_argument("--mixers", nargs="+", default=usual_mixers(5), choices=list_mixers())
    p.add_argument("--steps", type=int, default=2000, help="of a run, where no grid says it")
    p.add_argument("--grid", type=Path, default=None, help="a study's grid.json")
    p.add_argument("--only-check", action="store_true", help="train nothing; runs that are there")
    p.add_argument("--out", type=Path, default=None, help="bands.json; by default that of results/health")
    a = p.parse_args()
    bad, grid = 0, read_json(a.grid) if a.grid else {}
    for objective in a.objectives:
        folders = [a.folder / f"{objective}-{m}" for m in a.mixers]
        for folder, mixer in zip(folders, a.mixers):
            if not a.only_check:
                train(folder, config_of(objective, mixer, a.steps, grid))
        if a.only_check:
            folders = sorted(p.parent for p in a.folder.glob(f"{objective}-*/metrics.jsonl"))
        if not folders:
            continue
        bands = bands_of(folders)
        found = {f.name: raised(f, bands) for f in folders}
        for name, those in found.items():
            print(f"{name:30}", "no alarm" if not those else "; ".join(map(str, those)))
        if any(found.values()):
            bad += 1
        else:
            save_bands(bands, a.out or bands_file())
            print(f"{objective:30} band of {len(folders)} runs up to {bands[objective].hours[-1]:.2f} h in {a.out or bands_file()}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
