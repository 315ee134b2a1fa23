"""Everything about a GPU by one command: are the kernels right, how quick are they, what does each mixer and encoder cost.

    python tools/gpu.py                          # on a machine with an NVIDIA GPU; 8 minutes; rows in results/gpu/<card>/
    python tools/gpu.py --list                   # the cases, in order, and what they are thought to take
    python tools/gpu.py --device simulator --only a --quick     # the kernels in the project's simulator, without a GPU
    python tools/gpu.py --device cpu             # a rehearsal of the rest, at tiny sizes
    python tools/gpu.py --compile                # how long the kernels take to compile for sm_90, without a GPU

It needs Python, torch, numba, numba-cuda and the packages that they bring; neither an environment nor a network nor a
corpus. What is missing can lie as wheels in a folder (--wheels DIR): they are unpacked into a temporary folder that goes
before everything else on the path.

Steps: a kernels against float64, b recurrent layers beside cuDNN, c mixers beside fused attention, d training steps,
e encoders in use. Each case runs in a child process, and children are used again. Every row is on disk before the next case begins. A case that
fails, hangs or poisons its GPU context ends its child, leaves a row that says so, and the rest goes on. Children
build their cases (most of that is compiling) side by side; cases that are timed run one at a time. Where the
budget does not suffice, the cases of least worth are dropped, and rows say which.

Exit status: 0 if all of step a was asked for and is right (or a was not asked for); 1 if something of it is
wrong, failed or was dropped; 2 if nothing could be run; 130 after Ctrl-C.
"""
import argparse
import json
import math
import os
import re
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SHARES = {"a": 0.3, "b": 0.28, "c": 0.15, "d": 0.12, "e": 0.15}  # of the budget; what a step leaves goes to those after it
START, GRACE, POISONED = 120.0, 15.0, 3  # s to import and to greet; s after the budget; exit status of a child that lost its GPU


def unpack(folder: Path, into: Path) -> list:
    "Wheels into a folder to be put on the path, native libraries included. Returns their names."
    wheels = sorted(folder.glob("*.whl"))
    if not wheels:
        raise SystemExit(f"gpu.py: there is no wheel (*.whl) in {folder}.")
    for wheel in wheels:
        try:
            with zipfile.ZipFile(wheel) as z:
                z.extractall(into)
        except (OSError, zipfile.BadZipFile) as e:
            raise SystemExit(f"gpu.py: {wheel} cannot be unpacked ({e}); download it again.") from None
    for part in (*into.glob("*.data/purelib"), *into.glob("*.data/platlib")):
        shutil.copytree(part, into, dirs_exist_ok=True)
    return [w.name for w in wheels]


def environment(wheels: Path | None, scratch: Path) -> dict:
    "Variables of the children: this repository first, then the wheels; caches of their own where none are named."
    path = [str(ROOT), *([str(wheels)] if wheels else []), *filter(None, [os.environ.get("PYTHONPATH")])]
    caches = {"NUMBA_CACHE_DIR": "numba", "TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}
    own = {"PYTHONPATH": os.pathsep.join(path), "NUMBA_CUDA_LOW_OCCUPANCY_WARNINGS": "0", "PYTHONWARNINGS": "ignore"}
    return {**{k: str(scratch / v) for k, v in caches.items()}, **os.environ, **own, "PYTHONUNBUFFERED": "1"}


def child(device: str) -> None:
    "Read cases from stdin, one JSON object a line, and answer in JSON lines; what else is printed goes to stderr."
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(**message):
        out.write(json.dumps(message, default=str) + "\n")
        out.flush()

    import torch

    torch.set_num_threads(min(4, os.cpu_count() or 1))
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    simulator = load_simulator() if device == "simulator" else None
    if device == "cuda":
        (torch.ones(8, 8, device="cuda") @ torch.ones(8, 8, device="cuda")).sum().item()
    say(hello=whereabouts(device))
    from essl_nb.costs.gpu_cases import KINDS, all_cases

    for line in sys.stdin:
        asked, point = json.loads(line), None
        try:
            if "list" in asked:
                say(cases=all_cases(device, **asked["list"]))
                continue
            case = asked["case"]
            built = KINDS[case["kind"]](case, device, simulator, lambda name: say(trying=name))
            say(ready=True)
            if "go" not in json.loads(sys.stdin.readline() or "{}"):
                return
            for point, what in enumerate(case["points"]):
                say(point=point)
                say(rows=built(what), point=point)
        except Exception as e:
            complain(say, e, point, device)
        built = None
        clean(device)
        say(done=True)


def load_simulator():
    "The project's simulator of concurrent blocks, from its tests."
    from importlib.util import module_from_spec, spec_from_file_location

    spec = spec_from_file_location("cudasim", ROOT / "tests" / "cudasim.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def whereabouts(device: str) -> dict:
    "The machine, the card and the versions."
    from importlib.metadata import PackageNotFoundError, version

    import torch

    from essl_nb.core.machine import machine_record
    from essl_nb.costs.measure import meter_of

    found = {}
    for name in ("torch", "numba", "numba-cuda", "llvmlite", "triton", "nvidia-nvvm", "cuda-bindings", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    gpu = meter_of("cuda").record() if device == "cuda" else {}
    return {"machine": machine_record() | gpu, "versions": found, "python": sys.version.split()[0],
            "matmul_precision": torch.get_float32_matmul_precision()}


def complain(say, e: Exception, point, device: str) -> None:
    "Tell what failed; end this process where the GPU no longer answers it."
    import traceback

    first = e
    while first.__context__ is not None and not first.__suppress_context__:
        first = first.__context__
    text = f"{type(e).__name__}: {e}" + ("" if first is e else f" (after {type(first).__name__}: {first})")
    traceback.print_exc()
    lost = False
    if device == "cuda":
        import torch

        try:
            torch.cuda.synchronize()
        except Exception:
            lost = True
    say(failed=text[:600], point=point, lost=lost)
    if lost:
        os._exit(POISONED)


def clean(device: str) -> None:
    "Give memory back before the next case."
    import gc

    gc.collect()
    if device == "cuda":
        import torch

        torch.cuda.empty_cache()


def compiling() -> None:
    "For sm_90, without a GPU: every kernel that the cases ask for, and the seconds that the compiler takes."
    from dataclasses import replace

    from essl_nb.costs.gpu_cases import all_cases
    from essl_nb.ligru.cell import CELLS
    from essl_nb.ligru.gpu.graph import backward_frame, forward_frame
    from essl_nb.ligru.gpu.launch_plan import H100, plan_kernel
    from essl_nb.ligru.gpu.persistent import KERNELS, signature
    from essl_nb.ligru.gpu.ptx import device_words, to_ptx

    words, compiled = device_words(), {}  # kernel and shape → seconds
    for c in all_cases("cuda", "ab"):
        for cell in [c["cell"]] if "cell" in c else CELLS:
            for kw in (dict(), dict(keep=False), dict(backward=True)):
                activation = c.get("activation", "relu")
                limits = H100 if c.get("path") != "frames" else replace(H100, registers=0)
                how = dict(directions=c.get("directions", 2), cell=cell, activation=activation, **kw)
                plan = plan_kernel(c["hidden"], c["batch"], c["precision"], limits, **how)
                makers = KERNELS if plan.kind == "persistent" else {"forward": forward_frame, "backward": backward_frame}
                maker = makers["backward" if plan.shape.backward else "forward"]
                if (maker, plan.shape) in compiled:
                    continue
                began, kernel = time.process_time(), maker(words, plan.shape)
                to_ptx(kernel, signature(kernel, plan.shape), (9, 0), plan.shape.bounds)
                compiled[maker, plan.shape] = seconds = time.process_time() - began
                print(f"{c['step']} {maker.__name__:16} H {plan.shape.hidden:5} {plan.shape.warps:2} warps {plan.shape.tiles} tiles "
                      f"{plan.shape.precision} {cell:6} {activation:10} {seconds:5.2f} s", flush=True)
    print(f"{len(compiled)} kernels, {sum(compiled.values()):.0f} s of one core to PTX for sm_90, {max(compiled.values()):.1f} s the slowest")


class Worker:
    "A child process: what it does, and until when it may."

    def __init__(self, command: list, env: dict, log):
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=env,
                                        cwd=ROOT, start_new_session=True)
        os.set_blocking(self.process.stdout.fileno(), False)
        self.state, self.case, self.point, self.trying, self.rest = "starting", None, None, None, b""
        self.began = time.monotonic()
        self.until = self.began + START

    def send(self, **message) -> None:
        try:
            self.process.stdin.write(json.dumps(message).encode() + b"\n")
            self.process.stdin.flush()
        except OSError:
            pass  # it has ended; its closed output says so too

    def messages(self) -> list | None: # messages; None: it has ended
        "Its messages since the last call."
        try:
            data = self.process.stdout.read()
        except OSError:
            data = b""
        if data is None:
            return []
        *lines, self.rest = (self.rest + data).split(b"\n")
        found = [json.loads(line) for line in lines if line.strip()]
        return found if data or found else None

    def end(self, patience: float = 0.0) -> int | None: # exit status; None: the driver holds on to it
        "Kill it with all that it started; one that is ending by itself is given time for it."
        for seconds in (patience, 20):
            try:
                self.process.wait(seconds)
                break
            except subprocess.TimeoutExpired:
                kill_group(self.process.pid)
        for pipe in (self.process.stdin, self.process.stdout):
            try:
                pipe.close()
            except OSError:
                pass
        return self.process.returncode


def kill_group(leader: int) -> None:
    try:
        os.killpg(leader, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass


class Rows:
    "A file of rows, each on disk before the next thing happens."

    def __init__(self, path: Path):
        self.path, self.all = path, []
        path.parent.mkdir(parents=True, exist_ok=True)

    def add(self, row: dict) -> None:
        row = {"when": time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()), **finite(row)}
        with open(self.path, "ab") as f:
            f.write(json.dumps(row, allow_nan=False).encode() + b"\n")
            f.flush()
            os.fsync(f.fileno())
        self.all.append(row)


def finite(value):
    "Numbers that JSON does not have become words."
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def identity(case: dict) -> dict:
    "What a row says of its case."
    return {k: v for k, v in case.items() if k not in ("points", "seconds", "number", "alone", "tries")}


def named(case: dict, point: dict | None = None) -> str:
    "A case in a line."
    shown = {k: v for k, v in {**identity(case), **(point or {})}.items() if k not in ("step", "kind")}
    return f"{case['step']} {case['kind']}: " + ", ".join(f"{k} {v}" for k, v in shown.items())


def without_known(cases: list, file: Path | None) -> list:
    "What an earlier run has not found out yet: cases without the points that have a row of time or judgement in `file`."
    if file is None:
        return cases
    found = [r for r in map(json.loads, file.read_text().splitlines()) if "time_s" in r or "right" in r]
    known = lambda what: any(all(r.get(k) == v for k, v in what.items()) for r in found)
    left = [{**c, "points": [p for p in c["points"] if not known({**identity(c), **p})]} for c in cases]
    return [{**c, "seconds": c["seconds"] * len(c["points"]) / len(old["points"])} for c, old in zip(left, cases) if c["points"]]


class Run:
    "Cases through children, with limits, a budget, and a row for whatever happens."

    def __init__(self, command, env, rows, log, budget, workers, limit, steps):
        self.command, self.env, self.rows, self.log, self.limit = command, env, rows, log, limit
        self.size, self.workers, self.mute = workers, [], 0
        self.began = time.monotonic()
        self.last = self.began + budget + GRACE  # nobody is waited for longer
        self.ends, share, total = {}, 0.0, sum(SHARES[s] for s in steps)
        for s in steps:
            share += SHARES[s] / total
            self.ends[s] = self.began + budget * share

    # children

    def allowed(self, case: dict | None) -> float: # when a child that stays silent is late
        return min(time.monotonic() + max(self.limit, 4 * (case or {"seconds": 0})["seconds"]), self.last)

    def hire(self) -> Worker:
        worker = Worker(self.command, self.env, self.log)
        worker.until = min(worker.until, max(self.last, time.monotonic() + 5))
        self.workers.append(worker)
        return worker

    def dismiss(self, worker: Worker, patience: float = 0.0) -> int | None: # exit status
        self.workers.remove(worker)
        return worker.end(patience)

    def close(self) -> None:
        for worker in list(self.workers):
            self.dismiss(worker)

    def ask(self, worker: Worker, seconds: float, *keys) -> dict:
        "The next message with one of these keys. Raises RuntimeError where none comes."
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            sent = worker.messages()
            if sent is None:
                raise RuntimeError(f"the child ended with exit status {self.dismiss(worker, 5)}")
            for message in sent:
                if any(k in message for k in keys):
                    return message
            time.sleep(0.02)
        self.dismiss(worker)
        raise RuntimeError(f"the child did not answer within {seconds:.0f} s")

    # one step

    def step(self, name: str, cases: list) -> None:
        "All cases of a step, in order, until they are done or its time is used."
        self.todo = list(cases)
        while self.todo or any(w.case for w in self.workers):
            self.drop(name)
            self.hand_out()
            self.listen()
            self.watch()
            if self.mute > 2:
                for case in self.todo:
                    self.rows.add({**identity(case), "dropped": "three children one after the other could not start"})
                self.todo = []

    def drop(self, name: str) -> None:
        "Leave out what would end too late."
        late = [c for c in self.todo if time.monotonic() + c["seconds"] > self.ends[name]]
        for case in late:
            self.todo.remove(case)
            used = time.monotonic() - self.began
            self.rows.add({**identity(case), "points": len(case["points"]), "dropped": f"{used:.0f} s were used, and it is thought to take {case['seconds']:.0f} s more than step {name} had left"})

    def hand_out(self) -> None:
        "Cases to the idle; the word to begin to one that is ready, where it may."
        while len(self.workers) < min(self.size, len(self.todo) + sum(w.case is not None for w in self.workers)):
            self.hire()
        for worker in self.workers:
            if worker.state == "idle" and self.todo:
                worker.case, worker.state, worker.point, worker.trying = self.todo.pop(0), "building", None, None
                worker.until = self.allowed(worker.case)
                worker.began = time.monotonic()
                worker.send(case=worker.case)
        measuring = [w for w in self.workers if w.state == "measuring"]
        for worker in self.workers:
            if worker.state == "ready" and not (measuring and worker.case["alone"]):
                worker.state = "measuring"
                worker.until = self.allowed(worker.case)
                measuring.append(worker)
                worker.send(go=True)

    def listen(self) -> None:
        "What children say, for a tenth of a second at most."
        with selectors.DefaultSelector() as wait:
            for worker in self.workers:
                wait.register(worker.process.stdout, selectors.EVENT_READ, worker)
            for key, _ in wait.select(0.1):
                worker = key.data
                sent = worker.messages()
                for message in sent or ():
                    self.take(worker, message)
                if sent is None and worker in self.workers:
                    self.lost(worker, "its process ended", 5)

    def take(self, worker: Worker, message: dict) -> None:
        "One message of a child."
        if "hello" in message:
            worker.state, worker.until, self.mute = "idle", math.inf, 0
        elif "trying" in message:
            worker.trying, worker.until = message["trying"], self.allowed(worker.case)
        elif "ready" in message:
            worker.state, worker.until, worker.trying = "ready", math.inf, None
        elif "rows" in message:
            for row in message["rows"]:
                self.rows.add({**identity(worker.case), **worker.case["points"][message["point"]], **row})
            worker.point, worker.trying = message["point"] + 1, None
        elif "point" in message and "failed" not in message:
            worker.point, worker.until = message["point"], self.allowed(worker.case)
        elif "failed" in message:
            self.failed(worker, message["failed"], message["lost"])
        elif "done" in message:
            took = time.monotonic() - worker.began
            print(f"{time.monotonic() - self.began:6.1f} s  {named(worker.case)}  ({took:.1f} s)", flush=True)
            worker.case, worker.state, worker.until = None, "idle", math.inf

    def watch(self) -> None:
        "Kill those who are late."
        for worker in [w for w in self.workers if time.monotonic() > w.until]:
            late = START if worker.state == "starting" else max(self.limit, 4 * worker.case["seconds"])
            self.lost(worker, "no answer when the budget was used" if time.monotonic() > self.last else f"no answer within {late:.0f} s")

    def failed(self, worker: Worker, why: str, lost: bool) -> None:
        "A row for what failed; the points after it are asked for again."
        case, i = worker.case, worker.point
        again = self.without(worker, why) if lost else None
        point = case["points"][i] if i is not None and i < len(case["points"]) else {}
        if again is None:
            self.rows.add({**identity(case), **point, "failed": why})
            rest = case["points"][i + 1 :] if i is not None else []
            again = {**case, "points": rest, "seconds": case["seconds"] * len(rest) / len(case["points"])} if rest else None
        print(f"{time.monotonic() - self.began:6.1f} s  FAILED {named(case, point)}: {why}", flush=True)
        if again:
            self.todo.insert(0, again)

    def without(self, worker: Worker, why: str) -> dict | None: # None: nobody is to blame by name
        "The case without the contestant at which the child was lost."
        name, case = worker.trying, worker.case
        if name is None or len(case.get("without", ())) > 5:
            return None
        i = worker.point or 0
        self.rows.add({**identity(case), **case["points"][i], "name": name, "failed": why})
        return {**case, "points": case["points"][i:], "without": [*case.get("without", ()), name]}

    def lost(self, worker: Worker, why: str, patience: float = 0.0) -> None:
        "A child that hangs or has ended: its row, its end."
        case, state = worker.case, worker.state
        status = self.dismiss(worker, patience)
        if state == "starting":
            self.mute += 1
            self.rows.add({"step": "head", "failed": f"a child could not start: {why}, exit status {status}"})
        elif case is not None and status != POISONED:  # who is poisoned has said so before
            self.failed(worker, f"{why}; the child was ended (exit status {status}) while {state}", True)


def shape_of(row: dict) -> str:
    return f"H {row['hidden']}, B {row['batch']}, T {row.get('frames', '?')}, {row.get('layers', 1)} x {row['directions']}"


def summary(rows: list, asked: str) -> tuple: # lines, exit status
    "What is right, what is wrong, and ratios."
    lines, status = [], 0
    a = [r for r in rows if r["step"] == "a"]
    if "a" in asked:
        right = [r for r in a if r.get("right")]
        lines.append(f"a  {len(right)} of {len(a)} cases right")
        for r in a:
            if not r.get("right"):
                what = "WRONG in " + ", ".join(f"{n} {r['errors'][n]:.1e}" if isinstance(r["errors"][n], float) else f"{n} {r['errors'][n]}"
                                               for n in r["wrong"]) if "errors" in r else f"FAILED: {r['failed']}" if "failed" in r else f"dropped: {r['dropped']}"
                lines.append(f"   {r['kind']} {r['path']} {r['cell']} {r['precision']} {r['activation']}, {shape_of(r)}: {what}")
            elif isinstance(r.get("ran"), dict):
                fell = {n: p["why"] for n, p in r["ran"].items() if p["kind"] != r["path"]}
                if fell and r["path"] == "persistent":
                    lines.append(f"   right, but frame by frame: {r['cell']} {r['precision']}, {shape_of(r)}: {next(iter(fell.values()))}")
        status = 0 if a and len(right) == len(a) else 1
    timed = [r for r in rows if r["step"] == "b" and "time_s" in r]
    if timed:
        names = list(dict.fromkeys(r["name"] for r in timed))[1:]
        lines.append("\nb  ms of LiGRU; its time over that of " + ", ".join(f"[{i}] {n}" for i, n in enumerate(names, 1)))
        points = {}
        for r in timed:
            points.setdefault((r["precision"], r["pass"], shape_of(r)), {}).setdefault(r["name"], r)
        for (precision, which, shape), found in points.items():
            first = next(iter(found.values()))
            cells = "  ".join(f"[{i}] {found[n]['first_over_it']:.2f}" for i, n in enumerate(names, 1) if n in found)
            lines.append(f"   {precision} {which:16} {shape:34} {first['name']} {first['time_s'] * 1e3:8.2f} ms  {cells}")
    for step, key, head in (("c", "mixer", "c  time and peak memory over fused attention's, by seconds"),
                            ("d", "mixer", "d  training step: ms, MiB; over those of the encoder around fused attention"),
                            ("e", "mixer", "e  encoder in use: time, for streams of a chunk; over that of the encoder around fused attention")):
        found = {}
        for r in [r for r in rows if r["step"] == step and "time_s" in r]:
            at = f"{r['seconds']:g} s" if "seconds" in r else f"{r['streams']} streams" if "streams" in r else r["size"]
            memory = [f"{r['peak_ratio']:.2f}", f"{r['peak_bytes'] / 2**20:.0f} MiB"] if "peak_ratio" in r else ["", ""]
            said = f"{at}: " + ", ".join(filter(None, [f"{r['ratio']:.2f}", memory[0]]))
            said += " (" + ", ".join(filter(None, [f"{r['time_s'] * 1e3:.1f} ms", memory[1]])) + ")"
            found.setdefault(r[key], []).append(said)
        if found:
            lines.append("\n" + head)
            lines += [f"   {name:20} " + "   ".join(said) for name, said in found.items()]
    others = [r for r in rows if r["step"] != "a" and ("failed" in r or "dropped" in r)]
    if others:
        lines.append(f"\nnot measured: {sum('failed' in r for r in others)} failed, {sum('dropped' in r for r in others)} dropped")
        lines += [f"   {r['step']} {r.get('mixer') or r.get('name') or ''} " + (shape_of(r) if "hidden" in r else str(r.get("size", r.get("seconds", "")))) +
                  f": {r.get('failed') or r.get('dropped')}"[:200] for r in others if "failed" in r or r["step"] == "head"]
    return lines, status


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", default="cuda", choices=("cuda", "cpu", "simulator"), help="where it runs (cuda)")
    p.add_argument("--only", default=",".join(SHARES), help="steps, with commas between (all)")
    p.add_argument("--quick", action="store_true", help="the first cases of each step alone")
    p.add_argument("--budget", type=float, default=460, metavar="SECONDS", help="for all of it; what does not fit is dropped (460)")
    p.add_argument("--limit", type=float, default=60, metavar="SECONDS", help="that a child may stay silent, at least (60)")
    p.add_argument("--workers", type=int, default=0, metavar="N", help="children side by side (a quarter of the cores, at most 4)")
    p.add_argument("--wheels", type=Path, metavar="DIR", help="a folder of wheels with what this Python lacks")
    p.add_argument("--out", type=Path, metavar="FILE", help="rows are appended here (results/gpu/<card>/rows.jsonl)")
    p.add_argument("--known", type=Path, metavar="FILE", help="rows of an earlier run; points that were timed or judged there are left out")
    p.add_argument("--list", action="store_true", help="print the cases and do nothing else")
    p.add_argument("--compile", action="store_true", help="measure compiling for sm_90, without a GPU")
    p.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    a = p.parse_args()
    a.only = [s.strip() for s in a.only.split(",")]
    if unknown := [s for s in a.only if s not in SHARES]:
        p.error(f"--only {unknown[0]!r} was given; steps are {', '.join(SHARES)}.")
    if not (a.budget > 0 and a.limit > 0 and a.workers >= 0):
        p.error("--budget and --limit are seconds above 0, --workers a number of processes.")
    if a.known and not a.known.is_file():
        p.error(f"--known {a.known} is no file of rows.")
    if a.wheels and not a.wheels.is_dir():
        p.error(f"--wheels {a.wheels} is no folder.")
    a.only = [s for s in SHARES if s in a.only]
    return a


def main() -> int:
    a = arguments()
    if a.child:
        return child(a.device) or 0
    scratch = Path(tempfile.mkdtemp(prefix="essl-gpu-"))
    signal.signal(signal.SIGTERM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    try:
        return conduct(a, scratch)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def conduct(a: argparse.Namespace, scratch: Path) -> int:
    wheels = unpack(a.wheels, scratch / "wheels") if a.wheels else []
    env = environment(scratch / "wheels" if wheels else None, scratch)
    if a.compile:
        return subprocess.run([sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT / 'tools')!r}); import gpu; gpu.compiling()"], env=env, cwd=ROOT).returncode
    began, cores = time.monotonic(), len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with open(scratch / "log", "wb") as log:
        command = [sys.executable, str(Path(__file__).resolve()), "--child", "--device", a.device]
        run = Run(command, env, None, log, a.budget, a.workers or max(1, min(4, cores // 4)), a.limit, a.only)
        try:
            worker = run.hire()
            try:
                place = run.ask(worker, START, "hello")["hello"]
                worker.send(list={"only": a.only, "quick": a.quick})
                cases = without_known(run.ask(worker, START, "cases")["cases"], a.known)
            except RuntimeError as e:
                said = (scratch / "log").read_text(errors="replace").strip().splitlines()
                print(f"gpu.py: nothing can be run on {a.device}: {e}. " + (said[-1] if said else ""), file=sys.stderr)
                return 2
            worker.state, worker.until = "idle", math.inf
            if a.list:
                for c in cases:
                    print(f"{c['seconds']:5.1f} s  {named(c)}  ({len(c['points'])} points)")
                print(f"{len(cases)} cases, about {sum(c['seconds'] for c in cases):.0f} s if one after the other")
                return 0
            card = re.sub(r"[^a-z0-9]+", "_", place["machine"].get("gpu", a.device).lower()).strip("_")
            default = ROOT / "results/gpu" / card if a.device == "cuda" else Path(tempfile.gettempdir()) / f"essl-gpu-{card}"
            run.rows = rows = Rows(a.out or default / "rows.jsonl")
            rows.add({"step": "head", "arguments": [Path(v).name if v.startswith("/") else v for v in sys.argv[1:]], "budget_s": a.budget, "workers": run.size, "wheels": wheels, **place})
            print(f"{card}: {len(cases)} cases, rows in {rows.path}; {run.size} children, {a.budget:g} s", flush=True)
            for step in a.only:
                run.step(step, [c for c in cases if c["step"] == step])
            stopped = False
        except KeyboardInterrupt:
            stopped = True
        finally:
            run.close()
    if run.rows is None:
        return 130
    lines, status = summary(run.rows.all, a.only)
    print("\n".join(["", *lines, f"\n{time.monotonic() - began:.0f} s in all; rows in {run.rows.path}"]))
    return 130 if stopped else status


if __name__ == "__main__":
    sys.exit(main())
