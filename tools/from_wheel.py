"""Does the package work for someone who has nothing but its wheel?

    python tools/from_wheel.py                   build the wheel, make a virtual environment, run the list below, print a log
    python tools/from_wheel.py --only ten_lines,explorer --keep FOLDER

The environment holds the wheel; its requirements are lent by the Python that runs this (a .pth file), and what is lacking there
is installed. No path of the repository is on sys.path, no variable of this project is set, the home is an empty folder.
Ends with 1 where something on the list failed.
"""
import argparse
import contextlib
import email
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
import urllib.request
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MOST = 15_000_000  # bytes of a wheel


class Failed(Exception):
    "Something on the list did not come out as it should; the sentence says what."


class Place:
    "A folder with the wheel, its environment, and an empty folder to work in."

    def __init__(self, folder: Path):
        self.folder, self.venv, self.work = folder, folder / "venv", folder / "work"
        self.bin = self.venv / ("Scripts" if os.name == "nt" else "bin")
        keep = {k: v for k, v in os.environ.items() if not k.startswith(("ESSL_", "PYTHON", "NUMBA_CACHE", "VIRTUAL_ENV", "XDG_"))}
        self.env = keep | {"HOME": str(folder / "home"), "PATH": f"{self.bin}{os.pathsep}{keep['PATH']}", "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1",
                           "GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1"}
        for made in (self.work, folder / "home"):
            made.mkdir(parents=True, exist_ok=True)

    def run(self, *command, status=0, **env) -> str: # what it printed
        "Run a command of the environment in the work folder."
        done = subprocess.run([str(self.bin / command[0]), *map(str, command[1:])], cwd=self.work, env=self.env | env, capture_output=True, text=True)
        if done.returncode != status:
            raise Failed(f"{command[0]} {' '.join(map(str, command[1:3]))[:60]} ended with {done.returncode}, not {status}: {(done.stderr or done.stdout)[-1500:]}")
        return done.stdout + done.stderr

    def python(self, code: str, **env) -> str:
        return self.run("python", "-c", code, **env)

    def start(self, *command):
        return subprocess.Popen([str(self.bin / command[0]), *map(str, command[1:])], cwd=self.work, env=self.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def build(folder: Path) -> Path: # the wheel
    "Build the wheel from a copy, so that nothing is left in the repository."
    source = folder / "source"
    skip = shutil.ignore_patterns(".git", ".venv", ".cache", "__pycache__", "build", "dist", "_site", "*.egg-info", "stamps")
    shutil.copytree(ROOT, source, ignore=skip, symlinks=True)
    with contextlib.suppress(ImportError):
        import setuptools
    here = "setuptools" in sys.modules and int(setuptools.__version__.split(".")[0]) >= 77
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", *(["--no-build-isolation"] if here else []), "-w", str(folder), str(source)]
    subprocess.run(command, check=True, cwd=folder, env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"})
    shutil.rmtree(source)
    return next(folder.glob("*.whl"))


def environment(place: Place, wheel: Path):
    "Make the environment: the wheel with its extras; what is installed here is lent, the rest is fetched."
    subprocess.run([sys.executable, "-m", "venv", str(place.venv)], check=True)
    site = Path(subprocess.run([str(place.bin / "python"), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], capture_output=True, text=True, check=True).stdout.strip())
    (site / "lent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    place.run("python", "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-warn-conflicts", "--ignore-installed", "--no-deps", wheel)
    place.run("python", "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-warn-conflicts", f"{wheel}[study,app]")


def alone(place: Place) -> str:
    "The wheel is small, and the package comes from it."
    wheel = next(place.folder.glob("*.whl"))
    if (size := wheel.stat().st_size) > MOST:
        raise Failed(f"the wheel has {size} bytes; {MOST} are allowed")
    found, *paths = place.python("import sys, essl_nb; print(essl_nb.__file__, *sys.path, sep='\\n')").splitlines()
    lent = sysconfig.get_path("purelib")  # may stand in the repository's own .venv
    foreign = [p for p in paths if Path(p).is_relative_to(ROOT) and p != lent]
    if foreign or not found.startswith(str(place.venv)):
        raise Failed(f"the package is {found}, and of the repository {foreign} is on sys.path")
    return f"{size / 1e6:.1f} MB"


def ten_lines(place: Place) -> str:
    "README's ten lines, as the wheel's own metadata shows them."
    with zipfile.ZipFile(next(place.folder.glob("*.whl"))) as z:
        text = email.message_from_bytes(z.read(next(n for n in z.namelist() if n.endswith("METADATA")))).get_payload(decode=True).decode()
    return place.python(re.search(r"## In ten lines.*?```python\n(.*?)```", text, re.S)[1]).strip()


def tutorial(place: Place) -> str:
    "The first tutorial, from top to bottom."
    book = shutil.copy(next((ROOT / "nbs/tutorials").glob("01_*.ipynb")), place.work / "tutorial.ipynb")
    place.run("python", "-m", "nbconvert", "--to", "notebook", "--execute", "--inplace", book, ESSL_QUICK="1")
    cells = json.loads(Path(book).read_text(encoding="utf-8"))["cells"]
    return f"{sum(bool(c.get('outputs')) for c in cells)} cells with output"


def control(place: Place) -> str: # a mixer that is quick to train
    return place.python("from essl_nb.mixers.base import mixers; print(next(e.name for e in mixers if e.meta.get('control')))").strip()


def plain_audio(place: Place) -> Path: # 90 clips without a manifest
    folder = place.work / "audio"
    if not folder.exists():
        folder.mkdir()
        sample = Path(place.python("import essl_nb; print(essl_nb.__file__)").strip()).parent / "data/sample"
        for n, clip in enumerate(sorted(sample.glob("*/*/*/*.opus"))[-90:]):
            shutil.copy(clip, folder / f"take {n}.opus")
    return folder


def pretrain(place: Place, folder: str, *more, steps=60) -> dict: # the result
    place.run("essl_pretrain", control(place), "--size", "tiny", "--steps", steps, "--corpus", plain_audio(place), "--threads", 1, "--folder", folder, *more)
    return json.loads((place.work / folder / "result.json").read_text())


def pretraining(place: Place) -> str:
    "Pre-training on a folder of plain audio."
    value = pretrain(place, "run")["value"]
    return f"{value['steps']} steps, weights {value['weights'][:12]}"


def config_file(place: Place) -> str:
    "Settings from a file of one's own, and a run made again from the config.json that it wrote: the same weights."
    (place.work / "run.yaml").write_text(f"encoder: {{mixer: {control(place)}, dim: 32, depth: 1}}\nsteps: 20\nlr: 1e-3\ncorpus: {plain_audio(place)}\n")
    place.run("essl_pretrain", "--config", "run.yaml", "--set", "encoder.dim=48", "--threads", 1, "--folder", "first")
    place.run("essl_pretrain", "--config", "first/config.json", "--threads", 1, "--folder", "second")
    weights = [json.loads((place.work / f / "result.json").read_text())["value"]["weights"] for f in ("first", "second")]
    dim = json.loads((place.work / "first/encoder/config.json").read_text())["dim"]
    if dim != 48 or weights[0] != weights[1]:
        raise Failed(f"dim {dim}, weights {weights}")
    return f"twice {weights[0][:12]}"


def resume(place: Place) -> str:
    "Ctrl-C in the middle, the same command again: the weights of a run that was never stopped."
    whole = pretrain(place, "whole", "--log_every", 5, steps=200)["value"]["weights"]
    words = ("essl_pretrain", control(place), "--size", "tiny", "--steps", 200, "--corpus", plain_audio(place), "--threads", 1, "--folder", "stopped", "--log_every", 5)
    child = place.start(*words)
    log, begun = place.work / "stopped" / "metrics.jsonl", time.time()
    while child.poll() is None and time.time() - begun < 300 and not (log.exists() and log.read_text().count("\n") >= 4):
        time.sleep(0.05)
    child.send_signal(signal.SIGINT)
    said, _ = child.communicate(timeout=120)
    if child.returncode != 130:
        raise Failed(f"Ctrl-C ended with {child.returncode}: {said[-500:]}")
    if not (place.work / "stopped" / "last.safetensors").exists():
        raise Failed("Ctrl-C saved nothing")
    place.run(*words)
    stopped = json.loads((place.work / "stopped" / "result.json").read_text())
    if stopped["value"]["weights"] != whole:
        raise Failed("the resumed run has other weights")
    return f"{whole[:12]} both; after the stop {stopped['made']['steps']} steps were made"


def label_free(place: Place) -> str:
    "The encoder's score on plain audio, without labels, with its interval."
    if not (place.work / "run/encoder").exists():
        pretrain(place, "run")
    said = place.run("essl_probe", "run/encoder", "--corpus", plain_audio(place))
    scores = [line.strip() for line in said.splitlines() if re.search(r"\[[-+]?[\d.]+ ?%?, ?[-+]?[\d.]+ ?%?\]", line)]
    if not scores:
        raise Failed(f"no interval: {said[-500:]}")
    return "\n".join(scores)


def explorer(place: Place) -> str:
    "The explorer serves a page with a study's encoders in it, and ends with Ctrl-C."
    trained = place.python("from essl_nb.core.places import study_dir; print(*sorted(p.name for p in (study_dir() / 'encoders').iterdir()))").split()
    child = place.start("essl_explore", "--no_browser", "--port", 7960)
    try:
        line = next((w for w in child.stdout if "http://" in w), "")
        if not line:
            raise Failed(f"it did not start (status {child.wait(60)})")
        address = re.search(r"http://[\w.]+:\d+", line)[0]
        page = urllib.request.urlopen(f"{address}/config", timeout=120).read().decode()
        if missing := [n for n in trained if f'"{n}"' not in page and f'"{n}, ' not in page]:
            raise Failed(f"the page does not offer {missing}")
    finally:
        child.send_signal(signal.SIGINT)
        child.wait(60)
    return f"{len(page) / 1e3:.0f} kB of page with {', '.join(trained)}"


def study(place: Place) -> str:
    "A grid to start from, its facts listed, and help, version and a mistake in the shell."
    (place.work / "grid.json").write_text(subprocess.run([place.bin / "essl_study", "--example"], cwd=place.work, env=place.env, capture_output=True, text=True, check=True).stdout)
    said = place.run("essl_study", "grid.json", "--dry")
    place.run("essl_study", "no.json", status=2)
    return said.strip().splitlines()[-1]


LIST = [alone, ten_lines, study, pretraining, config_file, resume, label_free, explorer, tutorial]


def main(only: list, folder: Path) -> int: # how many failed
    "Build, install, run the list."
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore Ctrl-C, and children would inherit that
    failed, began = 0, time.time()
    place = Place(folder)
    environment(place, build(folder))
    print(f"wheel and environment: {time.time() - began:.0f} s", flush=True)
    for item in LIST:
        if only and item.__name__ not in only:
            continue
        began = time.time()
        try:
            said, state = item(place), "ok"
        except (Failed, subprocess.SubprocessError, OSError) as e:
            failed, said, state = failed + 1, f"{type(e).__name__}: {e}", "FAILED"
        print(f"\n{state}  {item.__name__} ({time.time() - began:.0f} s): {item.__doc__}\n    " + said.replace(str(folder), "…").replace("\n", "\n    "), flush=True)
    print(f"\n{'all is well' if not failed else f'{failed} failed'}")
    return failed


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", help=f"with commas between: {','.join(f.__name__ for f in LIST)}")
    parser.add_argument("--keep", default="", help="an empty folder that stays afterwards")
    args = parser.parse_args()
    with contextlib.ExitStack() as stack:
        made = Path(args.keep or stack.enter_context(tempfile.TemporaryDirectory())).resolve()
        sys.exit(1 if main([w for w in args.only.split(",") if w], made) else 0)
