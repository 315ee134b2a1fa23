"""Further scores of the encoders that a study ships, as rows of a grid: no pre-training is repeated.

    python tools/shipped.py results/global/grid.json                    # every score of the grid that results/global/rows.jsonl lacks
    python tools/shipped.py results/global/grid.json --only units       # of the probes whose name or task begins so; several too
    python tools/shipped.py results/global/grid.json --who NAME NAME    # of these encoders, in this order
    python tools/shipped.py results/global/grid.json --state untrained  # pretrained, untrained, baseline; all without it

The grid asks for the runs of that study (the same settings, hence the same keys), and `origin.json` beside each shipped encoder says which run it
is of. Shipped weights are in eight bits, which a row's `made` says. It may be stopped at any moment and goes on where it was.
"""
import argparse
import time
import warnings
from datetime import datetime, timezone
from pathlib import Path

import torch

from essl_nb.core.config import from_json, to_json
from essl_nb.core.files import append_line, read_json
from essl_nb.core.machine import library_versions, machine_record
from essl_nb.core.registry import EsslError
from essl_nb.data.corpus import load_corpus
from essl_nb.models.config import EncoderConfig
from essl_nb.models.encoder import load_encoder
from essl_nb.probes.frames import Baseline
from essl_nb.probes.probe import run_probe
from essl_nb.study.results import headline, known_rows
from essl_nb.study.study import Study, revision, untrained_encoder

ROOT = Path(__file__).resolve().parents[1]


def encoder_of(what: dict, shipped: Path, corpus) -> tuple: # an encoder or a baseline; what `made` says of its weights
    "What a cell asks to score. Raises EsslError where the shipped encoder is of another run."
    if what["state"] == "baseline":
        return Baseline("logmel", context_ms=what["context_ms"]), {}
    if what["state"] == "untrained":
        return untrained_encoder(from_json(EncoderConfig, what["config"]), what["seed"], corpus), {}
    origin = read_json(shipped / what["encoder"] / "origin.json")
    of = next((key for key, row in known_rows(shipped.parent / "rows.jsonl").items() if row["key"] == origin["run"]), origin["run"])  # its key of today
    if of != what["run"]:
        raise EsslError(f"{shipped / what['encoder']} is of the run {of}, and the grid asks for {what['run']}; give a grid with the settings of that study.")
    return load_encoder(shipped / what["encoder"]), dict(weights=f"{shipped.parent.name}/{shipped.name}", stored_as=origin["stored_as"])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("grid", type=Path)
    parser.add_argument("--encoders", type=Path, default=ROOT / "results" / "small" / "encoders", help="the folder of the shipped ones")
    parser.add_argument("--only", nargs="*", default=[""], help="how the probe's name or its task begins")
    parser.add_argument("--who", nargs="*", default=[], help="encoders, the first first; all without it")
    parser.add_argument("--state", default="", help="pretrained, untrained or baseline")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    study = Study(args.grid)
    corpus, known = load_corpus(study.grid.corpus), known_rows(study.rows_file)
    asked = [c for c in study.cells("score") if c.key not in known and args.state in ("", c.what["state"])
             and any(c.what[name].startswith(only) for only in args.only for name in ("probe", "call"))]
    shared = dict(git=revision(), jobs=1, data_hash=corpus.data_hash)
    of = lambda c: (c.what["encoder"], c.what["state"])
    place = lambda who: args.who.index(who[0]) if who[0] in args.who else len(args.who)
    for who in sorted((w for w in dict.fromkeys(map(of, asked)) if not args.who or w[0] in args.who), key=place):
        memo = {}  # frames that several probes of one encoder read
        for cell in [c for c in asked if of(c) == who]:
            began = time.perf_counter()
            encoder, weights = encoder_of(cell.what, args.encoders, corpus)
            score = to_json(run_probe(encoder, cell.what["call"], corpus, progress=False, memo=memo, **cell.what["kw"]))
            times = {f"probe_{k}": [one.pop(k) for one in (score, *score["also"])][0] for k in ("seconds", "cpu_seconds")}
            made = dict(when=datetime.now(timezone.utc).isoformat(timespec="seconds"), seconds=round(time.perf_counter() - began, 2), **times)
            row = dict(key=cell.key, kind=cell.kind, what=cell.what, value=score, made=made | dict(machine=machine_record(), versions=library_versions()) | weights | shared)
            append_line(study.rows_file, row)
            print(f"{cell}: {made['seconds']:.0f} s{headline(row)}", flush=True)


if __name__ == "__main__":
    main()
