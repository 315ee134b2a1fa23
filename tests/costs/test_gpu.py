"""One command on a GPU: what the meter asks of it, what is judged right, and what becomes of cases that fail, hang or lose it."""
import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import cudasim
import pytest
import torch

from essl_nb.core.registry import EsslError
from essl_nb.costs import cards, curves, measure
from essl_nb.costs.gpu_cases import KINDS, PASSES, all_cases
from essl_nb.costs.gpu_kernels import KernelCase, verdict
from essl_nb.ligru.cell import CELLS
from essl_nb.ligru.gpu.launch_plan import H100
from essl_nb.mixers.base import list_mixers
from essl_nb.models.config import EncoderConfig

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))
import gpu  # noqa: E402


class Card:
    "Stands in for torch.cuda: a clock that events read, and an allocator that remembers its maximum."

    def __init__(self):
        self.said, self.now, self.held, self.most = [], 0.0, 100, 900

    def Event(self, enable_timing):
        card, at = self, []

        def wait():
            card.said.append("wait for the event")

        return SimpleNamespace(record=lambda: (card.said.append("event"), at.append(card.now)), synchronize=wait, at=at,
                               elapsed_time=lambda other: 1e3 * (other.at[0] - at[0]))

    def synchronize(self):
        self.said.append("wait")

    def reset_peak_memory_stats(self):
        self.most = self.held

    def memory_allocated(self):
        return self.held

    def max_memory_allocated(self):
        return self.most

    def current_device(self):
        return 0

    def get_device_properties(self, device):
        return SimpleNamespace(name="A Card", major=9, minor=0, multi_processor_count=132, total_memory=80 * 2**30)


@pytest.fixture
def card(monkeypatch):
    found = Card()
    for module in (cards, curves):
        monkeypatch.setattr(module, "meter_of", lambda device: measure.CudaMeter(found))
    return found


def test_a_call_is_timed_between_two_events_in_the_gpus_queue():
    card = Card()

    def call():
        card.said.append("call")
        card.now += 0.25

    assert measure.CudaMeter(card).clock(call) == 0.25
    assert card.said == ["wait", "event", "call", "event", "wait for the event"]


def test_a_peak_is_what_a_call_adds_and_nothing_that_ran_before():
    card = Card()

    def call():
        card.most = card.held + 64

    assert measure.CudaMeter(card).peak(call) == 64
    assert measure.CudaMeter(card).peak(lambda: None) == 0


def test_the_record_names_card_driver_libraries_and_rounding():
    record = measure.CudaMeter(Card()).record()
    assert record["gpu"] == "A Card" and record["gpu_capability"] == "9.0" and record["gpu_gib"] == 80
    assert {"driver", "cuda", "cudnn", "tf32"} <= set(record) and json.loads(json.dumps(record)) == record


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_said():
    config = EncoderConfig(cards.baseline_mixer(), dim=32, depth=1)
    for call in (lambda: measure.meter_of("cuda"), lambda: cards.training_cost(config, device="cuda"), lambda: cards.deployment_cost(config, device="cuda")):
        with pytest.raises(EsslError, match="no NVIDIA GPU"):
            call()
    with pytest.raises(EsslError, match="cpu or cuda"):
        measure.meter_of("tpu")


def test_cards_are_measured_by_the_meter_of_their_device(card):
    configs = [cards.to_json(EncoderConfig(cards.baseline_mixer(), dim=32, depth=1))] * 2
    for raw in (cards.measure_training(configs, 1, 1.0, 2, 1, "fp32"), cards.measure_deployment(configs, [1.0], 2, 1)):
        assert raw["idle"] == 0 and raw["device"]["gpu"] == "A Card"
        assert all(t == 0 for t in torch.tensor(raw["times"]).flatten()), "the stand-in's clock stands still"
    assert card.said.count("event") > 8
    head = cards.card_head("training", *[EncoderConfig(cards.baseline_mixer(), dim=32, depth=1)] * 2, 1, cards.choose_precision("fp32"), {}, raw["device"])
    assert head["machine"]["gpu"] == "A Card" and head["machine"]["cpu"] and head["protocol"]["device"] == "cuda"


def test_curves_are_measured_by_the_meter_of_their_device(card):
    found = curves.measure_point([cards.baseline_mixer()], 32, 1, PASSES[1], 1.0, 0.0, 2)
    assert [t[0] for t in found[cards.baseline_mixer()]["times"]] == [0, 0] and found[cards.baseline_mixer()]["peak"] == 0
    assert "event" in card.said


def test_rows_of_two_cards_do_not_share_a_file(tmp_path, card):
    file, machine = tmp_path / "rows.jsonl", curves.machine_record()
    row = dict(zip(curves.GIVEN, (cards.baseline_mixer(), 32, 1, "forward", 1.0)), made={"machine": machine | {"gpu": "Another Card"}})
    file.write_text(json.dumps(row) + "\n")
    for device in ({}, {"gpu": "A Card"}):
        with pytest.raises(EsslError, match="Another Card"):
            curves.known_points(file, device)
    assert len(curves.known_points(file, {"gpu": "Another Card"})) == 1


@pytest.mark.parametrize("study", [p.parent.name for p in sorted((ROOT / "results").glob("*/grid.json"))])
def test_stored_costs_are_found_under_their_keys(study):
    from essl_nb.study.grid import grid_cells, key_of, read_grid

    said = lambda what: json.dumps([what[k] for k in ("config", "card", "kw")], sort_keys=True)
    rows = [json.loads(line) for line in open(ROOT / "results" / study / "rows.jsonl", encoding="utf-8")]
    stored = {said(r["what"]): r["key"] for r in rows if r["kind"] == "cost"}
    cells = [c for c in grid_cells(read_grid(ROOT / "results" / study / "grid.json")) if c.kind == "cost"]
    assert all(key_of("cost", r["what"]) == r["key"] for r in rows if r["kind"] == "cost")
    found = [c for c in cells if said(c.what) in stored]
    assert all(c.key == stored[said(c.what)] for c in found) and not any("device" in c.what["kw"] for c in cells)


def test_stored_curves_are_found_under_their_points():
    rows = [json.loads(line) for line in open(ROOT / "results/curves/rows.jsonl", encoding="utf-8")]
    assert curves.GIVEN == ("mixer", "width", "batch", "pass", "seconds") and all(set(curves.GIVEN) <= set(r) for r in rows)
    measured = {tuple(r[k] for k in curves.GIVEN) for r in rows if "skipped" not in r}
    assert {(n, *curves.points()[0]) for n in list_mixers()} <= measured
    assert {curves.device_name(r["made"]["machine"]) for r in rows if "made" in r} == {r["made"]["machine"]["cpu"] for r in rows if "made" in r}


def test_every_kind_of_kernel_and_every_mixer_is_asked_for():
    cases = all_cases("cuda")
    kernels = {(c["cell"], c["directions"], c["precision"], c["path"]) for c in cases if c["kind"] == "kernel"}
    assert {(c, r, p, "persistent") for c in CELLS for r in (1, 2) for p in ("fp32", "bf16")} <= kernels
    assert {(c, r, "fp32", "frames") for c in CELLS for r in (1, 2)} <= kernels
    shapes = {(c["hidden"], c["batch"], c["layers"], p["frames"], p["pass"]) for c in cases if c["step"] == "b" for p in c["points"]}
    assert {(h, b, n, t, p) for h in (256, 512, 1024) for b in (8, 32, 64) for n in (1, 4) for t in (500, 2000) for p in PASSES} <= shapes
    assert {c["mixer"] for c in cases if c["step"] == "c"} == {c["mixer"] for c in cases if c["step"] == "d"} == set(list_mixers())
    assert {p["seconds"] for c in cases if c["step"] == "c" for p in c["points"]} == {10, 40, 160}
    assert {c["size"] for c in cases if c["step"] == "d"} == {"small", "base"}
    assert json.loads(json.dumps(cases)) == cases and [c["step"] for c in cases] == sorted(c["step"] for c in cases)
    assert sum(c["seconds"] for c in all_cases("cuda", quick=True)) < sum(c["seconds"] for c in cases) / 3


SMALL = dict(step="a", kind="kernel", directions=1, hidden=8, batch=2, frames=3, activation="tanh", path="persistent")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("cell", CELLS)
def test_a_right_kernel_is_found_right(cell, precision):
    (row,) = KernelCase(dict(SMALL, cell=cell, precision=precision), "simulator", cudasim)({})
    assert row["right"], row
    assert {"truth states", "truth dwx", "truth du", "truth dh0", "recomputed dwx", "padding"} <= set(row["errors"])
    assert {p["kind"] for p in row["ran"].values()} == {"persistent"} and row["kept_nothing"]


def broken(**words):
    "The simulator with other words than PTX's."
    return SimpleNamespace(Simulator=lambda limits: cudasim.Simulator(limits, words=SimpleNamespace(**{**vars(cudasim.WORDS), **words})))


def test_a_kernel_that_swaps_two_numbers_of_a_word_is_found_wrong():
    (row,) = KernelCase(dict(SMALL, cell=CELLS[0], precision="bf16"), "simulator", broken(pack_bf16x2=lambda low, high: cudasim.pack_bf16x2(high, low)))({})
    assert not row["right"] and "step states" in row["wrong"]


def test_a_kernel_that_drops_bits_too_early_is_found_wrong_where_the_whole_hides_it():
    truncated = lambda low, high: cudasim.pack_bf16x2(*(x.view("i4").__and__(-65536).astype("i4").view("f4") for x in (low, high)))
    (row,) = KernelCase(dict(SMALL, cell=CELLS[0], precision="bf16"), "simulator", broken(pack_bf16x2=truncated))({})
    assert "step states" in row["wrong"] and "truth states" not in row["wrong"]


def test_nan_is_wrong():
    assert verdict({"truth a": float("nan")}, {"truth": 1.0})["wrong"] == ["truth a"]


def test_the_fall_back_is_reached_with_its_own_path():
    (row,) = KernelCase(dict(SMALL, cell=CELLS[1], precision="fp32", path="frames"), "simulator", cudasim)({})
    assert row["right"] and {p["kind"] for p in row["ran"].values()} == {"frames"}
    assert H100.registers > 0


def test_a_contestant_that_fails_leaves_a_row_and_the_rest_is_timed(monkeypatch):
    monkeypatch.setattr(torch.nn.LSTM, "forward", lambda *args: 1 / 0)
    case = next(c for c in all_cases("cpu", "b"))
    logged = []
    rows = KINDS["recurrent"](case, "cpu", None, logged.append)(case["points"][0])
    by = {r["name"]: r for r in rows}
    assert "ZeroDivisionError" in by["LSTM"]["failed"] and by["GRU"]["time_s"] > 0 and by["LiGRU"]["first_over_it"] == 1
    assert logged[:2] == ["LiGRU", "SLi-GRU"] and "LSTM" in logged
    left = KINDS["recurrent"](dict(case, without=["LSTM"]), "cpu")(case["points"][0])
    assert "LSTM" not in {r["name"] for r in left}


CHILD = """
import json, os, sys, time
say = lambda **m: print(json.dumps(m), flush=True)
say(hello={})
for line in sys.stdin:
    case = json.loads(line)["case"]
    if case["act"] == "hang while building" and "names" not in case:
        time.sleep(60)
    names = [n for n in case.get("names", []) if n not in case.get("without", [])]
    for n in names:
        say(trying=n)
        n == "hangs" and time.sleep(60)
    say(ready=True)
    json.loads(sys.stdin.readline())["go"]
    for i, p in enumerate(case["points"]):
        say(point=i)
        what = p.get("act", "")
        what == "hang" and time.sleep(60)
        what == "die" and os._exit(9)
        if what in ("raise", "poison"):
            say(failed="as asked", point=i, lost=what == "poison")
            what == "poison" and os._exit(3)
            break
        say(rows=[{"value": i, "names": names, "right": True, "child": os.getpid()}], point=i)
    say(done=True)
"""


def played(tmp_path, cases, budget=30.0, workers=1, limit=1.0):
    "The rows that a step leaves whose child does what each point says."
    (tmp_path / "child.py").write_text(CHILD)
    rows = gpu.Rows(tmp_path / "rows.jsonl")
    cases = [{"step": "a", "kind": "x", "alone": False, "seconds": 0.1, "act": "", **c} for c in cases]
    with open(tmp_path / "log", "wb") as log:
        run = gpu.Run([sys.executable, str(tmp_path / "child.py")], None, rows, log, budget, workers, limit, ["a"])
        try:
            run.step("a", cases)
        finally:
            run.close()
    stored = [json.loads(line) for line in open(rows.path)]
    assert stored == rows.all, "what is in memory is on disk"
    return stored


def points(*acts):
    return [{"n": i, "act": a} for i, a in enumerate(acts)]


def test_children_are_used_again(tmp_path):
    rows = played(tmp_path, [{"points": points("", "")}, {"points": points("")}])
    assert [r["value"] for r in rows] == [0, 1, 0] and len({r["child"] for r in rows}) == 1


@pytest.mark.parametrize("act,said,children", [("raise", "as asked", 1), ("poison", "as asked", 2), ("die", "ended", 2), ("hang", "no answer within 1 s", 2)])
def test_a_point_that_fails_leaves_a_row_and_the_rest_goes_on(tmp_path, act, said, children):
    began = time.monotonic()
    rows = played(tmp_path, [{"points": points("", act, "")}, {"points": points("")}])
    assert [r["n"] for r in rows] == [0, 1, 2, 0] and said in rows[1]["failed"] and not any("failed" in r for r in rows if r["n"] != 1)
    assert len({r["child"] for r in rows if "child" in r}) == children and time.monotonic() - began < 20


def test_who_hangs_is_named_and_left_out(tmp_path):
    rows = played(tmp_path, [{"names": ["quick", "hangs", "slow"], "points": points("", "")}])
    assert rows[0]["name"] == "hangs" and "no answer" in rows[0]["failed"]
    assert [r["names"] for r in rows[1:]] == [["quick", "slow"]] * 2


def test_a_case_that_hangs_while_it_is_built_is_given_up(tmp_path):
    rows = played(tmp_path, [{"act": "hang while building", "points": points("", "")}, {"points": points("")}])
    assert "while building" in rows[0]["failed"] and rows[1]["value"] == 0 and len(rows) == 2


def test_what_the_budget_does_not_hold_is_dropped_with_a_row(tmp_path):
    rows = played(tmp_path, [{"seconds": 100, "points": points("")}, {"points": points("")}], budget=20)
    assert "dropped" in rows[0] and rows[1]["value"] == 0


def test_children_that_cannot_start_end_the_step(tmp_path):
    rows = gpu.Rows(tmp_path / "rows.jsonl")
    with open(tmp_path / "log", "wb") as log:
        run = gpu.Run([sys.executable, "-c", "import sys; sys.exit(5)"], None, rows, log, 60, 1, 1, ["a"])
        run.step("a", [{"step": "a", "kind": "x", "alone": False, "seconds": 1, "points": [{}]}])
    assert "exit status 5" in rows.all[0]["failed"] and "could not start" in rows.all[-1]["dropped"]


def test_timed_cases_have_the_device_for_themselves(tmp_path):
    class Told:
        def __init__(self, alone):
            self.state, self.case, self.sent = "ready", {"alone": alone, "seconds": 1}, []
            self.send = lambda **m: self.sent.append(m)

    run = gpu.Run([], None, None, None, 60, 2, 1, ["a"])
    run.todo, run.workers = [], [Told(True), Told(True), Told(False)]
    run.hand_out()
    assert [bool(w.sent) for w in run.workers] == [True, False, True]


def kernel_row(**kw):
    return dict(step="a", kind="kernel", path="persistent", cell="c", precision="bf16", activation="tanh", hidden=8, batch=1, frames=2, directions=1, **kw)


def test_the_exit_status_is_that_of_the_kernels():
    right, wrong = kernel_row(right=True, ran="cpu"), kernel_row(right=False, errors={"truth du": 0.5, "step dwx": "nan"}, wrong=["truth du", "step dwx"])
    assert gpu.summary([right], "abcd")[1] == 0 and gpu.summary([], "b")[1] == 0
    lines, status = gpu.summary([right, wrong], "abcd")
    assert status == 1 and "1 of 2" in lines[0] and "truth du 5.0e-01" in lines[1] and "step dwx nan" in lines[1]
    for other in (kernel_row(failed="no answer"), kernel_row(dropped="late")):
        assert gpu.summary([right, other], "a")[1] == 1
    assert gpu.summary([], "a")[1] == 1, "nothing was shown"


def test_numbers_that_json_lacks_become_words(tmp_path):
    rows = gpu.Rows(tmp_path / "r" / "rows.jsonl")
    rows.add({"a": [float("nan"), {"b": float("inf")}], "c": 1.5})
    assert json.loads(rows.path.read_text())["a"] == ["nan", {"b": "inf"}]


def test_wheels_are_unpacked_libraries_included(tmp_path):
    import zipfile

    with zipfile.ZipFile(tmp_path / "pure-1-py3-none-any.whl", "w") as z:
        z.writestr("pure.py", "x = 1")
    with zipfile.ZipFile(tmp_path / "native-1-cp311-cp311-linux_x86_64.whl", "w") as z:
        z.writestr("native-1.data/platlib/native/__init__.py", "y = 2")
        z.writestr("native.libs/libx.so", "")
    into = tmp_path / "into"
    assert len(gpu.unpack(tmp_path, into)) == 2
    env = gpu.environment(into, tmp_path)
    code = "import pure, native, essl_nb; print(pure.x + native.y)"
    assert subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True).stdout.strip() == "3"
    with pytest.raises(SystemExit, match="no wheel"):
        gpu.unpack(into, tmp_path)


BARE = """
import importlib.abc, sys
missing = set("fastcore soundfile soxr filelock cloudpickle plotly torchaudio tensorboard gradio nbdev psutil".split())

class Bare(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in missing:
            raise ModuleNotFoundError(f"No module named {name!r}")

sys.meta_path.insert(0, Bare())
"""


def test_steps_a_to_c_need_nothing_but_torch_and_numba():
    code = BARE + "from essl_nb.costs.gpu_cases import KINDS, all_cases\n" \
        "c = all_cases('cpu', 'c')[0]\nprint(len(KINDS['mixer'](c, 'cpu')(c['points'][0])))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "1", done.stderr[-2000:]


@pytest.mark.parametrize("name", ["essl_cost", "essl_curves"])
def test_a_command_offers_the_device(name):
    from essl_nb.core import command

    assert "device" in [a for a, *_ in command.signature(getattr(command, name).module, name)[1]]


def test_timed_rows_are_read_and_the_newest_of_a_point_counts(tmp_path):
    from essl_nb.costs.gpu_cases import load_gpu
    from essl_nb.viz.recurrent import gpu_figure

    with pytest.raises(EsslError, match="tools/gpu.py"):
        load_gpu(tmp_path)
    point = dict(step="b", kind="recurrent", name="GRU", layers=1, directions=2, hidden=512, batch=8, precision="bf16", frames=500)
    row = point | {"pass": "forward+backward", "time_low": 1.0, "time_high": 3.0, "first_over_it": 0.5}
    rows = [dict(step="head", machine=dict(gpu="a card")), row | dict(time_s=1.0), row | dict(time_s=2.0),
            point | dict(dropped="no time"), point | dict(name="LSTM", failed="no memory")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    table = load_gpu(tmp_path)
    assert list(table.time_s) == [2.0] and list(table.card) == ["a card"]
    assert len(gpu_figure(table).data) == 1
    with pytest.raises(EsslError, match="'forward'"):
        gpu_figure(table, which="forward")
