"""Forward passes of several encoders, timed in rounds of one process, so that each is also a ratio to the others.

    python tools/forward_times.py results/hourglass/grid.json            # every encoder of the grid, beside attention and its mixers as results/small has them
    python tools/forward_times.py GRID --seconds 1,10,40,160 --rounds 9  # what is asked by default
    python tools/forward_times.py GRID --beside luna convnext ligru      # beside these of results/small

One thread, batch 1, float32, from stored log-mel features to the last frame, in random weights; the clock is the processor time of the thread, freed
memory stays with the process (large activations would otherwise be mapped anew in each pass, which may double its time), and the order is drawn anew
in each round. One line for each encoder and duration is appended to forward.jsonl beside the grid.
"""
import argparse
import os
import random
import statistics
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

import torch

from essl_nb.core.config import from_json, to_json
from essl_nb.core.files import append_line, read_json
from essl_nb.core.machine import library_versions, machine_record
from essl_nb.core.registry import EsslError
from essl_nb.costs.curves import KEPT
from essl_nb.costs.macs import encoder_macs
from essl_nb.mixers.base import baseline_mixer
from essl_nb.models.config import EncoderConfig
from essl_nb.models.encoder import build_encoder

ROOT = Path(__file__).resolve().parents[1]


def configurations(grid: Path, beside: list) -> tuple: # two dicts, name → EncoderConfig
    "Those of a grid, and what they are compared with: attention, and others of results/small, by default the grid's mixers."
    of = lambda path: {e["name"]: from_json(EncoderConfig, e["config"]) for e in read_json(path)["encoders"]}
    own, small = of(grid), of(ROOT / "results" / "small" / "grid.json")
    return own, {name: small[name] for name in dict.fromkeys([baseline_mixer(), *(beside or sorted({c.mixer for c in own.values()}))])}


def time_of(encoder, raw) -> float: # s, of this thread
    began = time.thread_time()
    encoder.from_features(raw)
    return time.thread_time() - began


def able(encoders: dict, raw) -> dict: # those that take this length
    "Leaves out, and says so, what is not built for so many frames."
    found = {}
    for name, encoder in encoders.items():
        try:
            with torch.inference_mode():
                encoder.from_features(raw)
            found[name] = encoder
        except EsslError as e:
            print(f"       {name}: left out: {e}", flush=True)
    return found


def rounds_of(encoders: dict, raw, rounds: int) -> dict: # name → times, one for each round
    "Each encoder once in each round, in an order that changes; the first round is thrown away."
    times, order = {name: [] for name in encoders}, random.Random(0)
    with torch.inference_mode():
        for _ in range(rounds + 1):
            for name in order.sample(list(encoders), len(encoders)):
                times[name].append(time_of(encoders[name], raw))
    return {name: t[1:] for name, t in times.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("grid", type=Path)
    parser.add_argument("--seconds", default="1,10,40,160", help="durations, with commas between")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--beside", nargs="*", default=[], help="encoders of results/small")
    args = parser.parse_args()
    if any(os.environ.get(name) != value for name, value in KEPT.items()):  # the C library reads them when a process starts
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | KEPT)
    torch.set_num_threads(1)
    own, beside = configurations(args.grid, args.beside)
    configs = beside | own
    encoders = {name: build_encoder(c, seed=0).eval() for name, c in configs.items()}
    made = dict(when=datetime.now(timezone.utc).isoformat(timespec="seconds"), threads=1, rounds=args.rounds, precision="fp32", clock="thread time", freed_memory="kept",
                machine=machine_record(), versions=library_versions())
    for seconds in map(float, args.seconds.split(",")):
        raw = torch.randn(1, int(100 * seconds), 80, generator=torch.Generator().manual_seed(0))
        times = rounds_of(able(encoders, raw), raw, args.rounds)
        for name, took in times.items():
            ratios = {f"over_{other}": statistics.median(a / b for a, b in zip(took, times[other])) for other in beside if other in times}
            value = dict(seconds=statistics.median(took), macs=encoder_macs(configs[name], seconds)["total"], **ratios)
            append_line(args.grid.parent / "forward.jsonl", dict(what=dict(encoder=name, config=to_json(configs[name]), audio_seconds=seconds), value=value, made=made))
            print(f"{seconds:5g} s  {name:44} {1e3 * value['seconds']:8.1f} ms" + "".join(f"  {r:.2f} of {o.removeprefix('over_')}" for o, r in ratios.items()), flush=True)


if __name__ == "__main__":
    main()
