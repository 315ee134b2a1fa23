"""The shell: help that is there at once, settings that are checked with their names, one exit status for one kind of end."""
import contextlib
import dataclasses
import io
import json
import os
import re
import signal
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest

import essl_nb
from essl_nb.core import command
from essl_nb.core.config import BadField, from_json, to_json
from essl_nb.core.readers import read_values
from essl_nb.core.registry import EsslError
from essl_nb.mixers.base import list_mixers
from essl_nb.models.config import EncoderConfig
from essl_nb.study.grid import example_grid, grid_cells, grid_schema, read_grid
from essl_nb.train.config import PretrainConfig
from essl_nb.train.launch import run_config

ROOT = Path(__file__).resolve().parents[2]
NAME = list_mixers()[0]
HEAVY = ("torch", "gradio", "pandas", "plotly", "numba", "numpy")


def entries() -> dict: # command → "module:object"
    parser = ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return dict(c.split("=") for c in parser["DEFAULT"]["console_scripts"].split())


ENTRIES = entries()


def told(cmd, *argv) -> tuple: # status, stdout, stderr
    "What a command says, in this process."
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = cmd(list(map(str, argv)))
        except SystemExit as end:
            status = end.code
    return status, out.getvalue(), err.getvalue()


def started(name, *argv, **kw):
    module, entry = ENTRIES[name].split(":")
    code = f"import sys; from {module} import {entry}; sys.exit({entry}())"
    return subprocess.Popen([sys.executable, "-c", code, *map(str, argv)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=kw.pop("cwd", ROOT), **kw)


@pytest.mark.parametrize("name", ENTRIES)
def test_help_and_version_import_nothing_heavy(name):
    module, entry = ENTRIES[name].split(":")
    code = f"""
import sys
from {module} import {entry}
for flag in ('--help', '--version'):
    try:
        {entry}([flag])
    except SystemExit as end:
        print('ended with', end.code)
print([m for m in {HEAVY!r} if m in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.startswith(f"usage: {name}") and done.stdout.count("ended with 0") == 2, done.stderr
    assert essl_nb.__version__ in done.stdout
    assert done.stdout.strip().endswith("[]"), "help waits for a heavy import"


@pytest.mark.parametrize("name", ENTRIES)
def test_every_option_says_what_it_is(name):
    cmd = getattr(command, name)
    doc, arguments = command.signature(cmd.module, cmd.name)
    assert doc and not [a for a, _, _, said in arguments if not said], "an argument of a command has a comment at the end of its line"


@pytest.mark.parametrize("name", ENTRIES)
def test_an_unknown_option_is_bad_input(name):
    needed = ["x"] * sum(d is ... for _, _, d, _ in command.signature(getattr(command, name).module, name)[1])
    status, _, err = told(getattr(command, name), *needed, "--no-such-option")
    assert status == 2 and err.startswith(f"{name}: ") and "--no_such_option" in err and err.count("\n") == 1


BAD = {
    "essl_pretrain": [NAME + "x"], "essl_probe": ["no/such/folder"], "essl_cost": [NAME + "x"], "essl_curves": ["--only", NAME + "x"],
    "essl_study": ["no-such-grid.json"], "essl_submit": ["study", "no-such-grid.json"], "essl_ligru_bench": ["--frames", "many"],
    "essl_recognise": ["--seeds", "many"], "essl_finetune": ["no/such/folder"], "essl_explore": ["--corpus", "no/such/folder"],
    "essl_shards": ["no/such/folder", "shards"], "essl_export": ["no/such/folder", "encoder.onnx"],
}


@pytest.mark.parametrize("name", ENTRIES)
def test_bad_input_is_one_sentence_and_status_2(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, _, err = told(getattr(command, name), *BAD[name])
    assert status == 2 and err.count("\n") == 1 and "Traceback" not in err and err.startswith(name), err


def test_a_list_without_brackets_is_shown_with_them():
    status, _, err = told(command.essl_finetune, "x", "--chunks", "null,32,8")
    assert status == 2 and "--chunks '[null,32,8]'" in err
    assert command.essl_finetune.parse(["x", "--chunks", "[null,32,8]"])["settings"]["chunks"] == (None, 32, 8)


def test_dashes_and_underscores_are_one():
    said = [command.essl_pretrain.parse([NAME, option, "8"]) for option in ("--batch-seconds", "--batch_seconds")]
    assert said[0] == said[1] and said[0]["settings"] == {"batch_seconds": 8.0}


def test_flags_take_no_value():
    assert command.essl_cost.parse(["--quick", NAME]) == command.essl_cost.parse([NAME, "--quick"])


@pytest.mark.parametrize("error, status", [(EsslError("x"), 2), (KeyboardInterrupt(), 130), (command.StoppedBySignal(signal.SIGTERM, "x"), 143), (PermissionError(13, "Permission denied", "there"), 2), (None, 0)])
def test_one_status_for_one_kind_of_end(error, status, capsys):
    def work():
        if error:
            raise error

    assert command.status_of("essl_x", work) == status
    assert not error or capsys.readouterr().err.startswith("essl_x: ")


def test_a_fault_of_the_program_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        command.status_of("essl_x", lambda: 1 / 0)


@pytest.mark.skipif(os.name == "nt", reason="signals of Unix")
@pytest.mark.parametrize("sent, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_end_with_the_shells_own_status(sent, status):
    code = "import sys, time\nfrom essl_nb.core.command import status_of\ndef work():\n    print('ready', flush=True); time.sleep(60)\nsys.exit(status_of('essl_x', work))"
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert child.stdout.readline() == "ready\n"
    child.send_signal(sent)
    _, err = child.communicate(timeout=30)
    assert child.returncode == status and "Traceback" not in err


def leaves(cls, prefix=""):
    for f in dataclasses.fields(cls):
        inner = f.type if dataclasses.is_dataclass(f.type) else None
        yield from leaves(inner, f"{prefix}{f.name}.") if inner else [f"{prefix}{f.name}"]


def test_every_field_of_a_run_can_be_said_in_the_shell():
    options = {o.lstrip("-") for a in command.essl_pretrain.parser()._actions for o in a.option_strings}
    assert set(leaves(PretrainConfig)) - {"encoder.mixer"} <= options


VALUES = dict(steps=7, batching="padded", lr=0.25, betas=[0.5, 0.75], precision="fp32", seed=3, **{
    "encoder.dim": 32, "encoder.causal": True, "encoder.ff_mult": 2, "encoder.block": "conformer", "encoder.block_kw": {"kernel": 7}})


def nested(values) -> dict:
    made = {}
    for name, value in values.items():
        *path, last = name.split(".")
        inner = made
        for p in path:
            inner = inner.setdefault(p, {})
        inner[last] = value
    return made


def test_options_set_and_files_say_the_same(tmp_path):
    text = lambda v: json.dumps(v) if not isinstance(v, str) else v
    by_option = command.essl_pretrain.parse([NAME, *(w for k, v in VALUES.items() for w in (f"--{k}", text(v)))])
    by_set = command.essl_pretrain.parse([NAME, *(w for k, v in VALUES.items() for w in ("--set", f"{k}={text(v)}"))])
    (tmp_path / "run.json").write_text(json.dumps(nested(VALUES | {"encoder.mixer": NAME, "$schema": "x"})))
    made = [run_config(kw["settings"], mixer=kw["mixer"]) for kw in (by_option, by_set)]
    small = run_config({}, size="small", mixer=NAME).encoder.depth
    made.append(run_config({"encoder": {"depth": small}}, str(tmp_path / "run.json")))
    assert made[0] == made[1] == made[2] and made[0].betas == (0.5, 0.75)


def test_a_file_counts_less_than_size_and_size_less_than_an_option(tmp_path):
    (tmp_path / "run.yaml").write_text(f"encoder: {{mixer: {NAME}, dim: 48, depth: 3}}\nlr: 1e-3\nsteps: 9\n")
    c = run_config({"encoder": {"dim": 32}, "steps": 8}, str(tmp_path / "run.yaml"), size="tiny")
    assert (c.encoder.dim, c.encoder.depth, c.lr, c.steps) == (32, 2, 1e-3, 8)


def test_what_a_run_wrote_can_be_run_again(tmp_path):
    status, out, _ = told(command.essl_pretrain, NAME, "--size", "tiny", "--encoder.dropout", "0.1", "--lr", "1e-3", "--dry")
    (tmp_path / "config.json").write_text(out)
    assert status == 0 and told(command.essl_pretrain, "--config", tmp_path / "config.json", "--dry")[1] == out
    assert to_json(run_config({}, str(tmp_path / "config.json"))) == json.loads(out)


WRONG = {
    "dim": ["64", 64.0, True, None, [64], float("nan")], "ff_mult": ["4", True, float("inf"), 0], "causal": [1, "true", None], "position": ["left", 0],
    "mixer": [3, None], "mixer_kw": [[], "x", {"a": float("nan")}, {1: 2}], "dropout": [1, -0.1, "0"], "depth": [0, 1.5],
}


@pytest.mark.parametrize("field, value", [(f, v) for f, values in WRONG.items() for v in values], ids=str)
def test_a_wrong_value_is_refused_with_its_fields_name(field, value):
    with pytest.raises(EsslError, match=rf"\b{field}\b"):
        EncoderConfig(**{"mixer": NAME, field: value})
    with pytest.raises(EsslError, match=rf"encoder\b.*\b{field}\b"):
        from_json(PretrainConfig, {"encoder": {"mixer": NAME, field: value}})


WRONG_RUN = {"steps": ["10", 10.0, 0, True], "lr": ["fast", float("nan"), 0], "betas": [0.9, [0.9], ["a", 0.9], [0.9, 1.0]], "seed": [-1, 0.0, "0"],
             "precision": ["fp8", None], "batching": ["none"], "warmup": [1.5, "x"], "floor": [-0.1, 2], "weight_decay": [-1], "corpus": [False], "objective": ["nothing", 1]}


@pytest.mark.parametrize("field, value", [(f, v) for f, values in WRONG_RUN.items() for v in values], ids=str)
def test_a_wrong_training_setting_is_refused_with_its_name(field, value):
    with pytest.raises(EsslError, match=rf"\b{field}\b"):
        from_json(PretrainConfig, {"encoder": {"mixer": NAME}, field: value})


def test_numbers_keep_the_form_they_were_given_in():
    "An integer where a float may stand stays one: a configuration's hash is of what was written."
    assert to_json(EncoderConfig(NAME, ff_mult=4))["ff_mult"] == 4 and repr(EncoderConfig(NAME, ff_mult=4.0).ff_mult) == "4.0"


def test_options_of_parts_are_held_to_their_annotations():
    from essl_nb.mixers.base import mixers

    name, option = next((e.name, k) for e in mixers for k, v in e.meta.get("tiny", {}).items() if isinstance(v, int))
    with pytest.raises(BadField, match=rf"mixer_kw\.{option}="):
        EncoderConfig(name, mixer_kw={option: "2"})


FILES = {
    "a.json": ('{"lr": 1, "lr": 2}', "'lr' stands twice"), "b.yaml": ("lr: 1\nlr: 2", "'lr' stands twice"), "c.toml": ("lr = 1\nlr = 2", "not TOML"),
    "d.json": ('{"lr": 1} // peak', "not JSON"), "e.json": ("# peak\n{}", "no comments"), "f.json": ('{"lr": Infinity}', "Infinity"), "g.yaml": ("a: [", "not YAML"),
    "h.json": ("[]", "an object"), "i.yaml": ("a: !!python/object/apply:os.getcwd []", "not YAML"), "j.txt": ("{}", "suffix"), "k.json": ('{"a": {"b": 1, "b": 1}}', "'b' stands twice"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_something_else_is_refused(name, tmp_path):
    text, word = FILES[name]
    (tmp_path / name).write_text(text)
    with pytest.raises(EsslError, match=re.escape(word)):
        read_values(tmp_path / name)


def test_files_of_other_editors_are_read(tmp_path):
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a": 1e-3}\r\n')
    (tmp_path / "b.yaml").write_text("base: &b {lr: 1e-3, x: 12}\nmore: {<<: *b, x: 3}\n")
    (tmp_path / "c.json").write_bytes('{"a": "é"}'.encode("utf-16"))
    assert read_values(tmp_path / "a.json") == {"a": 0.001}
    assert read_values(tmp_path / "b.yaml")["more"] == {"lr": 0.001, "x": 3}
    with pytest.raises(EsslError, match="UTF-8"):
        read_values(tmp_path / "c.json")


def test_the_example_that_is_printed_runs_dry(tmp_path):
    status, out, _ = told(command.essl_study, "--example")
    (tmp_path / "grid.json").write_text(out)
    assert status == 0 and json.loads(out) == example_grid()
    status, out, err = told(command.essl_study, tmp_path / "grid.json", "--dry")
    assert status == 0 and "0 of 8 facts are known" in out, err


def test_the_commented_example_is_the_same_grid(tmp_path):
    text = re.search(r"```yaml\n(.*?)```", (ROOT / "docs/grid.md").read_text(encoding="utf-8"), re.S)[1]
    (tmp_path / "grid.yaml").write_text(text, encoding="utf-8")
    assert read_values(tmp_path / "grid.yaml") == example_grid()


def test_the_schema_in_docs_is_the_one_of_the_dataclasses():
    stored = json.loads((ROOT / "docs/grid.schema.json").read_text(encoding="utf-8"))
    assert stored == grid_schema(), "write it again: essl_study --schema > docs/grid.schema.json"
    assert json.loads(told(command.essl_study, "--schema")[1]) == stored


def test_the_schema_takes_every_grid_there_is_and_refuses_a_wrong_one():
    jsonschema = pytest.importorskip("jsonschema")
    check = jsonschema.Draft202012Validator(grid_schema())
    for path in sorted(ROOT.glob("results/*/grid.json")):
        check.validate(json.loads(path.read_text(encoding="utf-8")))
    check.validate(example_grid() | {"$schema": "grid.schema.json"})
    for wrong in ({"sedes": [0]}, {"pretrain": {"lr": "fast"}}, {"pretrain": {"seed": 1}}, {"encoders": [{"name": "a", "config": {"mixer": NAME, "dim": "64"}}]}, {"costs": [{"card": "x"}]}):
        assert not check.is_valid(example_grid() | wrong), wrong


def test_a_grid_names_the_place_of_what_is_wrong():
    point = lambda **kw: {"name": "b", "config": {"mixer": NAME, **kw}}
    first = example_grid()["encoders"][0]
    for change, place in (
        ({"encoders": [first, point(dim="64")]}, "encoders[1].config.dim"), ({"encoders": [first, point(dimm=64)]}, "encoders[1].config"),
        ({"encoders": [first, {"config": {}}]}, "encoders[1]"), ({"probes": [{"name": "phones", "kw": {"steps": "20"}}]}, "probes[0].kw.steps"),
        ({"probes": [{"name": "phones", "seeds": ["0"]}]}, "probes[0].seeds"), ({"pretrain": {"lr": "x"}}, "pretrain.lr"), ({"seeds": [0.0]}, "seeds[0]"),
        ({"pretrain_for": {NAME: {"steps": 1.0}}}, f"pretrain_for['{NAME}'].steps"), ({"costs": [{"card": "training", "kw": {"quick": 1}}]}, "costs[0].kw.quick"),
        ({"name": 3}, "name"), ({"corpus": None}, "corpus"), ({"baselines": ["0"]}, "baselines[0]"), ({"baselines": [True]}, "baselines[0]"),
    ):
        with pytest.raises(EsslError) as e:
            read_grid(example_grid() | change)
        assert place in str(e.value) and "rid" in str(e.value), str(e.value)


def test_a_schema_key_changes_nothing():
    keys = lambda grid: [c.key for c in grid_cells(read_grid(grid))]
    assert keys(example_grid() | {"$schema": "../docs/grid.schema.json"}) == keys(example_grid())


@pytest.mark.parametrize("study", ["equal", "hybrid", "recipe", "small"])
def test_every_fact_that_was_known_still_is(study):
    "A change of the configurations must not change what the facts of the committed studies are called: tests/known_keys.json is the list of them."
    from essl_nb.study.results import known_rows

    folder = ROOT / "results" / study
    now, then = known_rows(folder / "rows.jsonl"), set(json.loads((ROOT / "tests/known_keys.json").read_text())[study].split())
    assert then <= set(now)
    assert {c.key for c in grid_cells(read_grid(folder / "grid.json"))} & then, "the grid asks for none of its facts any more"
