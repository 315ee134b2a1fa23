"""Many visitors at once: times of the explorer's answers, refusals and memory, over HTTP as the page asks.

    python tools/visitors.py                       # 1, 20 and 50 visitors of the shipped study for 60 s each; rows are appended to results/visitors/rows.jsonl
    python tools/visitors.py --visitors 50 --seconds 30 --out /tmp/rows.jsonl

Each visitor opens the page, then chooses a clip every 2 to 5 s and waits for its whole map. `asked before`: of eight clips and two
encoders whose maps were computed beforehand; `new`: of any clip of the corpus and any shipped encoder.
"""
import argparse
import asyncio
import json
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil

from essl_nb.core.files import append_line
from essl_nb.core.machine import machine_record
from essl_nb.study.study import revision

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "results" / "visitors" / "rows.jsonl"


def started(tmp: Path) -> tuple: # (process, address)
    "The command, as a user starts it."
    call = "from essl_nb.app.explorer import essl_explore; essl_explore(port=0, no_browser=True)"
    process = subprocess.Popen([sys.executable, "-c", call], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, "GRADIO_TEMP_DIR": str(tmp)})
    for line in process.stdout:
        if found := re.findall(r"http://[\d.:]+", line):
            return process, found[0]
    raise SystemExit("the explorer did not start")


class Visitor:
    "What one page asks for."

    def __init__(self, address: str, number: int, events: dict, most: int | None, encoders: list): # most: clips of the list that are chosen from; None: all
        self.http = httpx.AsyncClient(base_url=address, timeout=300, trust_env=False)
        self.session, self.events, self.most, self.encoders, self.clips = f"visitor{number}", events, most, encoders, []
        self.random, self.times, self.refused, self.waited, self.page = random.Random(number), [], 0, 0, None

    async def ask(self, event: dict, data: list) -> dict | None: # the answer; None where it was refused
        "One request, from its place in the queue to its last value."
        joined = await self.http.post("/gradio_api/queue/join", json=dict(data=data, fn_index=event["id"], session_hash=self.session, event_data=None, trigger_id=None))
        if joined.status_code == 503:
            self.refused += 1
            return None
        joined.raise_for_status()
        async with self.http.stream("GET", f"/gradio_api/queue/data?session_hash={self.session}") as lines:
            async for line in lines.aiter_lines():
                if line.startswith("data:"):
                    self.waited += "in the line" in line or "yours is the next" in line
                    told = json.loads(line[5:])
                    if told.get("msg") == "process_completed":
                        if not told.get("success"):
                            raise SystemExit(f"an answer failed: {line[:300]}")
                        return told["output"]

    async def open(self):
        "Fetch the page, which holds its first views, and the lists."
        begin = time.perf_counter()
        (await self.http.get("/")).raise_for_status()
        self.page = time.perf_counter() - begin
        while (lists := await self.ask(self.events["on_open"], [self.encoders[0], 1, "influence"])) is None:
            await asyncio.sleep(1)
        self.clips = [key for _, key in lists["data"][2]["choices"]][: self.most]

    async def map(self, clip: str, encoder: str) -> float | None: # s until the whole map is there; None where it was refused
        "Choose a clip."
        begin = time.perf_counter()
        got = await self.ask(self.events["draw"], ["a clip of the corpus", clip, encoder, "", 1, "influence", "row", 0, ""])
        return None if got is None else time.perf_counter() - begin

    async def stay(self, until: float):
        "Choose clips until it is time to leave."
        await self.open()
        while time.perf_counter() < until:
            await asyncio.sleep(self.random.uniform(2, 5))
            took = await self.map(self.random.choice(self.clips), self.random.choice(self.encoders))
            self.times += [took] if took is not None else []
        await self.http.aclose()


def quantile(values: list, q: float) -> float | None: # s
    "One of the sorted values."
    return round(sorted(values)[min(len(values) - 1, int(q * len(values)))], 3) if values else None


async def measured(process, address: str, n: int, seconds: float, new: bool) -> dict: # what is told of it
    "So many visitors for so long."
    async with httpx.AsyncClient(base_url=address, timeout=300, trust_env=False) as http:
        conf = (await http.get("/config")).json()
    events = {name: next(d for d in conf["dependencies"] if (d.get("api_name") or "").startswith(name)) for name in ("draw", "on_open")}
    from essl_nb.app.library import TRAINED
    from essl_nb.core.places import study_dir

    shipped = [TRAINED + p.name for p in sorted((study_dir("small") / "encoders").iterdir()) if p.is_dir()]
    limit, encoders = (None, shipped) if new else (8, shipped[:2])
    server = psutil.Process(process.pid)
    idle = server.memory_info().rss
    if not new:
        first = Visitor(address, 10**6, events, limit, encoders)
        await first.open()
        for clip in first.clips:
            for encoder in encoders:
                await first.map(clip, encoder)
        await first.http.aclose()
    visitors, most = [Visitor(address, i, events, limit, encoders) for i in range(n)], 0
    until = time.perf_counter() + seconds
    work = [asyncio.create_task(v.stay(until)) for v in visitors]
    while not all(t.done() for t in work):
        most = max(most, server.memory_info().rss)
        await asyncio.sleep(0.5)
    for task in work:
        task.result()
    times, pages = [t for v in visitors for t in v.times], [v.page for v in visitors if v.page is not None]
    return dict(visitors=n, maps="new" if new else "asked before", seconds=seconds, answers=len(times), refused=sum(v.refused for v in visitors), told_their_place=sum(v.waited > 0 for v in visitors),
                p50_s=quantile(times, 0.5), p95_s=quantile(times, 0.95), slowest_s=quantile(times, 1.0), page_p95_s=quantile(pages, 0.95), before_mb=round(idle / 1e6), most_mb=round(most / 1e6))


def main():
    import tempfile

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--visitors", type=int, nargs="*", default=[1, 20, 50])
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as tmp:
        process, address = started(Path(tmp))
        try:
            for new in (False, True):
                for n in args.visitors:
                    load = os.getloadavg()[0]
                    value = asyncio.run(measured(process, address, n, args.seconds, new))
                    append_line(args.out, dict(what=dict(visitors=n, maps=value["maps"]), value=value, made=dict(machine=machine_record(), git=revision(), load_before=round(load, 2))))
                    print(value, flush=True)
        finally:
            process.terminate()
            process.wait(60)


if __name__ == "__main__":
    main()
