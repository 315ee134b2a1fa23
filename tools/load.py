"""Visitors of the explorer, as many as asked for, on this machine only: how long a first map and Compare take, what is refused, how much memory the server holds.

    python tools/load.py --visitors 1,20,50 --seconds 60

Starts an explorer of its own (or asks the one at --address, loopback only), waits until its first map stands in the page, lets every visitor open the page, choose a clip and an encoder every 2 to 5 s and
look at Compare once, by raw HTTP as the page does it, and prints a table. A run lasts --seconds and what is on its way is waited for, no longer than a minute.
"""
import argparse
import asyncio
import json
import os
import random
import re
import statistics
import subprocess
import sys
import time
import uuid

import httpx

MOST, LONGEST, GRACE = 100, 600, 60  # visitors, seconds of a run, seconds that answers are waited for


def holds_map(page: str) -> bool:
    "Does a map stand in the page itself?"
    return '\\"panels\\":[{' in page or '"panels":[{' in page


class Visitor:
    "One page: what it asks for and how long it waits."

    def __init__(self, client: httpx.AsyncClient, seen: dict, maps: int, dice: random.Random):
        self.client, self.seen, self.maps, self.dice, self.session = client, seen, maps, dice, uuid.uuid4().hex

    async def ask(self, what: str, fn: dict, data: list) -> list | None: # the first answer's data; None where it was refused
        "One event, through the queue; the time until its first answer is noted."
        began = time.monotonic()
        try:
            joined = await self.client.post("/gradio_api/queue/join", json=dict(data=data, fn_index=fn["id"], session_hash=self.session, event_data=None, trigger_id=None))
            if joined.status_code != 200:
                self.seen["refused"].append(what)
                return None
            event, first = joined.json()["event_id"], None
            async with self.client.stream("GET", "/gradio_api/queue/data", params=dict(session_hash=self.session)) as lines:
                async for line in lines.aiter_lines():
                    said = json.loads(line[5:]) if line.startswith("data:") else {}
                    if said.get("msg") in ("process_generating", "process_completed") and said.get("event_id") == event:
                        if first is None:
                            self.seen[what].append(time.monotonic() - began)
                            first = said.get("output", {}).get("data") or []
                        if said["msg"] == "process_completed":
                            return first
                    if said.get("msg") == "close_stream":
                        return first
        except (httpx.HTTPError, ValueError):
            self.seen["failed"].append(what)
        return None

    async def visit(self, until: float):
        "Open the page, then choose until the time is up."
        began = time.monotonic()
        try:
            page = await self.client.get("/")
            conf = (await self.client.get("/config")).json()
        except (httpx.HTTPError, ValueError):
            return self.seen["failed"].append("page")
        self.seen["page"].append(time.monotonic() - began)
        self.seen["painted"].append(holds_map(page.text))
        value = {c["id"]: c["props"].get("value") for c in conf["components"]}
        choices = {c["id"]: [x[1] for x in c["props"].get("choices") or []] for c in conf["components"]}
        named = lambda name: next(d for d in conf["dependencies"] if (d.get("api_name") or "").startswith(name))
        draw = next(d for d in conf["dependencies"] if (d.get("api_name") or "").startswith("draw") and len(d["inputs"]) == 9)
        refresh, fields = named("refresh"), [value[i] for i in draw["inputs"]]
        turn = 0
        while time.monotonic() < until:
            clips, encoders = choices[draw["inputs"][1]] or [fields[1]], choices[draw["inputs"][2]]
            pick = self.dice.randrange(self.maps)
            fields[1], fields[2], fields[8] = clips[pick % len(clips)], encoders[pick // len(clips) % min(6, len(encoders))], ""
            await self.ask("map", draw, fields)
            if turn == 0:
                await self.ask("compare", refresh, [value[i] for i in refresh["inputs"]])
            turn += 1
            await asyncio.sleep(self.dice.uniform(2, 5))


def resident(pid: int) -> float: # MB
    "Memory of a process."
    try:
        with open(f"/proc/{pid}/status", encoding="utf-8") as f:
            return next(int(x.split()[1]) for x in f if x.startswith("VmRSS")) / 1000
    except (OSError, StopIteration):
        return float("nan")


async def run(address: str, pid: int | None, visitors: int, seconds: float, maps: int) -> dict:
    "One crowd."
    seen = {k: [] for k in ("page", "painted", "map", "compare", "refused", "failed")}
    most = resident(pid) if pid else float("nan")
    async with httpx.AsyncClient(base_url=address, timeout=seconds + GRACE, trust_env=False, limits=httpx.Limits(max_connections=None)) as client:
        until = time.monotonic() + seconds
        crowd = [asyncio.create_task(Visitor(client, seen, maps, random.Random(i)).visit(until)) for i in range(visitors)]
        while any(not t.done() for t in crowd) and time.monotonic() < until + GRACE:
            await asyncio.sleep(1)
            most = max(most, resident(pid)) if pid else most
        late = [t for t in crowd if not t.done()]
        for t in late:
            t.cancel()
        await asyncio.gather(*crowd, return_exceptions=True)
    return dict(seen, rss=most, late=len(late))


def told(times: list) -> str:
    "Median and 95th percentile, in seconds, and of how many."
    if not times:
        return "–"
    high = statistics.quantiles(times, n=20, method="inclusive")[-1] if len(times) > 1 else times[0]
    return f"{statistics.median(times):.1f} / {high:.1f} ({len(times)})"


def start() -> tuple: # (process, address)
    "An explorer of our own."
    call = "from essl_nb.app.explorer import essl_explore; essl_explore(port=0, no_browser=True)"
    process = subprocess.Popen([sys.executable, "-c", call], stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    for line in process.stdout:
        if found := re.findall(r"http://127\.0\.0\.1:\d+", line):
            return process, found[0]
    raise SystemExit("The explorer did not start.")


def first_map(address: str, began: float, patience: float = 120) -> float | None: # s since `began`; None: it never came
    "Wait for the map that the server makes before anyone asks."
    while time.monotonic() - began < patience:
        if holds_map(httpx.get(address + "/", trust_env=False, timeout=GRACE).text):
            return time.monotonic() - began
        time.sleep(0.5)
    return None


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--visitors", default="1,20,50", help="how many at once, one run each")
    parser.add_argument("--seconds", type=float, default=60, help="length of a run")
    parser.add_argument("--maps", type=int, default=12, help="different pairs of clip and encoder that visitors choose among")
    parser.add_argument("--address", help="of an explorer that runs already, on loopback; its memory is then not known")
    args = parser.parse_args()
    crowds = [int(n) for n in args.visitors.split(",")]
    if not all(1 <= n <= MOST for n in crowds) or not 1 <= args.seconds <= LONGEST:
        raise SystemExit(f"load: 1 to {MOST} visitors and 1 to {LONGEST} seconds, please.")
    if args.address and not re.fullmatch(r"http://(127\.0\.0\.1|localhost):\d+/?", args.address):
        raise SystemExit("load: only an explorer on this machine is asked, such as http://127.0.0.1:7860.")
    began = time.monotonic()
    process, address = (None, args.address) if args.address else start()
    try:
        answered, mapped = time.monotonic() - began, first_map(address.rstrip("/"), began)
        print(f"The page answered after {answered:.1f} s; its first map stood in it {'never' if mapped is None else f'after {mapped:.1f} s'}.\n")
        print("| visitors | page, s | map, s | Compare, s | refused | failed | late | first map in the page | RSS, MB | load average |\n" + "|---" * 10 + "|")
        for n in crowds:
            d = asyncio.run(run(address, process and process.pid, n, args.seconds, args.maps))
            print(f"| {n} | {told(d['page'])} | {told(d['map'])} | {told(d['compare'])} | {len(d['refused'])} | {len(d['failed'])} | {d['late']} | {sum(d['painted'])} of {n} | {d['rss']:.0f} | {os.getloadavg()[0]:.1f} |", flush=True)
    finally:
        if process:
            process.terminate()
            process.wait(30)


if __name__ == "__main__":
    main()
