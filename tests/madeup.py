"""A made-up study and made-up curves, for looking at the explorer's page only."""
import sys
from pathlib import Path

import numpy as np

from essl_nb.core.config import to_json
from essl_nb.core.files import append_line, load_tensors, read_json, read_lines, write_json
from essl_nb.core.intervals import ratio
from essl_nb.costs.curves import PASSES
from essl_nb.mixers.base import list_mixers, mixers
from essl_nb.models.config import EncoderConfig
from essl_nb.models.encoder import build_encoder


def make_study(folder: Path, seeds=3, utterances=20, names=None, dims=(32,), ship=True) -> Path:
    "Rows and encoders in the form of a study; the numbers are random and no result."
    generator, names = np.random.default_rng(0), names or list_mixers()
    configs = {name: EncoderConfig(mixer=name, dim=dims[i % len(dims)], depth=2) for i, name in enumerate(names)}
    write_json(folder / "grid.json", dict(name="random", encoders=[dict(name=n, config=to_json(c)) for n, c in configs.items()]))
    for place, name in enumerate(names):
        config, family = configs[name], mixers.get(name).meta["family"]
        if ship:
            build_encoder(config, seed=0).save(folder / "encoders" / name)
        who = dict(encoder=name, mixer=name, family=family, objective="random", config=to_json(config))
        for seed in range(seeds):
            for state, chance in (("pretrained", 0.05 + 0.0285 * place), ("untrained", 0.1)):
                for probe, span in (("first question", 200), ("second question", None)):
                    units = [[int(generator.binomial(100, np.clip(chance + generator.normal() / 50, 0, 1))), 100] for _ in range(utterances)]
                    value = dict(probe="masked_phones" if span else "phones", metric="accuracy", value=ratio(units), low=0, high=1, n=utterances, count=100 * utterances,
                                 units=units, unit_ids_hash="random", head="linear", labels="all", split="test", settings=dict(span_ms=span), also=[])
                    what = dict(**who, seed=seed, state=state, probe=probe, call=value["probe"], kw={})
                    append_line(folder / "rows.jsonl", dict(key=f"{name}{seed}{state}{probe}", kind="score", what=what, value=value, made=dict(seconds=1.0)))
        cost = dict(card="deployment", parameters=10**6 * (place + 1), disk_bytes_fp32=4 * 10**6 * (place + 1), rtf=0.01 * (place + 1), latency_s=0.1 * (place + 1),
                    peak_bytes=2**20 * 20 * (place + 1), macs_per_second=10**8 * (len(names) - place))
        append_line(folder / "rows.jsonl", dict(key=f"{name}cost", kind="cost", what=dict(encoder=name, mixer=name, family=family, card="deployment"), value=cost, made=dict(seconds=1.0)))
    units = [[15, 100]] * utterances
    value = dict(probe="masked_phones", metric="accuracy", value=0.15, low=0.15, high=0.15, n=utterances, count=100 * utterances, units=units, unit_ids_hash="random", head="linear",
                 labels="all", split="test", settings=dict(span_ms=200), also=[])
    what = dict(encoder="some features", mixer=None, family="none", objective=None, seed=None, state="baseline", probe="first question", call="masked_phones", kw={})
    append_line(folder / "rows.jsonl", dict(key="base", kind="score", what=what, value=value, made=dict(seconds=1.0)))
    return folder


def make_curves(folder: Path, names) -> Path:
    "Rows in the form of measured curves; the numbers are made up: each mixer is linear, and the later its place the later it pays."
    rival = next(e.name for e in mixers if e.meta.get("baseline"))
    for place, name in enumerate(names):
        for width, which, seconds in [(w, p, s) for w in (64, 128) for p in PASSES for s in (1.0, 10.0, 40.0)]:
            ratio = 1.0 if name == rival else (1 + place) / seconds
            row = dict(mixer=name, width=width, batch=1, seconds=seconds, frames=round(50 * seconds), family=mixers.get(name).meta["family"], complexity="T", level="mixer", time_s=0.01 * seconds,
                       time_s_low=0.009 * seconds, time_s_high=0.011 * seconds, ratio=ratio, ratio_low=ratio, ratio_high=ratio, rounds=5, peak_bytes=10**6 * seconds, baseline_peak_bytes=2 * 10**6 * seconds,
                       macs=10**6 * seconds, made=dict(threads=1, precision="fp32", machine=dict(cpu="a made-up CPU")))
            append_line(folder / "rows.jsonl", row | {"pass": which})
    return folder


if __name__ == "__main__":  # python tests/madeup.py FOLDER: a study to look at
    print(make_study(Path(sys.argv[1])))


def steps_of(folder) -> list:
    "The lines of a run's log without what is measured with a clock: they are those of any other run of its configuration."
    return [{k: v for k, v in row.items() if k != "waiting"} for row in read_lines(folder / "metrics.jsonl")[0]]


def whole(folder):
    "Whether every file that stands there can be read, and nothing half written is left."
    for path in folder.rglob("*"):
        assert not path.name.endswith(".part"), path
        if path.suffix == ".json":
            read_json(path)
        elif path.suffix == ".safetensors":
            load_tensors(path)
        elif path.suffix == ".jsonl":
            assert read_lines(path)[1] is None, path
    return True
