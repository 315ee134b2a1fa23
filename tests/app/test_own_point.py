"""A visitor's own encoder in Compare: asked what the study asked, costed beside the same attention, seen by its visitor alone."""
import json
import shutil
import time

import numpy as np
import pytest
import soundfile
import torch
from browser import quiet_page
from test_costs_compared import run_code, same_figure
from test_stream_tab import chirp

from essl_nb.app.compare import BUDGETS, compare_updates, shown_probe
from essl_nb.app.curves import CurvesFile
from essl_nb.app.library import Studies
from essl_nb.app.own_point import OwnController, joined
from essl_nb.app.uploads import Uploads
from essl_nb.app.work import Jobs
from essl_nb.core.config import to_json
from essl_nb.core.files import append_line, load_tensors, save_tensors, write_json
from essl_nb.core.registry import EsslError
from essl_nb.costs.cards import baseline_of, deployment_cost
from essl_nb.data.corpus import load_corpus
from essl_nb.mixers.base import list_mixers
from essl_nb.models.config import EncoderConfig
from essl_nb.models.encoder import build_encoder
from essl_nb.probes.probe import run_probe
from essl_nb.study.own_encoder import asked_of, card_settings, own_encoder, own_machine, own_row, with_own
from essl_nb.study.results import OWN, cost_table, load_results, score_table
from essl_nb.viz.style import OWN_SHAPE
from essl_nb.viz.tradeoff import tradeoff_figure

KW = dict(steps=20)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "A study of one small encoder on noise, with a score and a card that were measured; and a saved encoder of another shape beside it."
    folder = tmp_path_factory.mktemp("own")
    corpus, generator = folder / "sound", np.random.default_rng(0)
    corpus.mkdir()
    for i in range(40):
        soundfile.write(corpus / f"{i}.wav", chirp(2.0) * 0.5 + 0.05 * generator.standard_normal(32000).astype("float32"), 16000)
    config, sounds = EncoderConfig(list_mixers()[0], dim=16, depth=1), load_corpus(corpus)
    score = to_json(run_probe(build_encoder(config, seed=0), "units", sounds, progress=False, **KW))
    card = deployment_cost(config, against=baseline_of(config), seconds=(1.0,), repeats=2)
    for kind, value, what in (("score", score, dict(probe="hidden units", call="units", corpus=str(corpus), kw=KW)), ("cost", card, dict(card="deployment"))):
        row = own_row(kind, config, "random", value, **what)
        row["what"] |= dict(encoder="first", seed=0)
        row["made"] |= dict(seconds=5.0, data_hash=sounds.data_hash)
        append_line(folder / "study" / "rows.jsonl", row | dict(key=kind))
    write_json(folder / "study" / "grid.json", dict(name="tiny", corpus=str(corpus), encoders=[]))
    build_encoder(EncoderConfig(list_mixers()[1], dim=32, depth=1), seed=1).save(folder / "mine", dtype=torch.int8)
    return folder


@pytest.fixture
def control(made, monkeypatch, tmp_path):
    monkeypatch.delenv("GRADIO_SERVER_NAME", raising=False)
    jobs = Jobs()
    yield OwnController(Studies(made / "study"), jobs, Uploads(tmp_path))
    jobs.close()


def measured(control, typed, paths=None, own=None) -> tuple: # what was yielded, the state at the end
    found = list(control.measuring(None, lambda s: shown_probe(s, {}), typed, paths, own, "me"))
    return [f for f, _ in found], found[-1][1]


def values_of(own, **more):
    return dict.fromkeys(["study", "task", "setting", "head", "metric", "machine", "cost", "log", "untrained", "chosen"]) | {f"budget_{b}": "" for b in BUDGETS} | dict(own=own) | more


@pytest.fixture(scope="module")
def mine(made, tmp_path_factory):
    "The state of a visit that has measured its encoder."
    jobs = Jobs()
    said, own = measured(OwnController(Studies(made / "study"), jobs, Uploads(tmp_path_factory.mktemp("uploads"))), str(made / "mine"))
    jobs.close()
    return said, own


def test_it_is_asked_what_the_study_asked(made, mine):
    said, own = mine
    assert said[-1].get("done") and not said[-1]["running"], said[-1]
    assert any("of 2 measurements" in f["note"] and "left" in f["note"] for f in said), "progress, and the time left"
    score, cost = own["rows"]
    first = load_results(made / "study")
    assert score["what"]["kw"] == KW and score["value"]["unit_ids_hash"] == first[first.kind == "score"].unit_ids_hash.iloc[0]
    assert score["value"]["settings"] == json.loads(json.dumps(score["value"]["settings"])) and score["value"]["split"] == "test"
    options, against, _ = card_settings(made / "study", EncoderConfig(list_mixers()[1], dim=32, depth=1))
    assert cost["value"]["against"] == against and options["against"].dim == 16, "attention as the study has it, not attention of its own width"
    assert cost["value"]["reference_seconds"] == 1.0 and cost["value"]["latency_s_ratio"] > 0 and cost["value"]["parameters"] != first.parameters.dropna().iloc[0]
    assert own_machine(own["rows"]) == first.machine.dropna().iloc[0]


def test_it_stands_in_the_figure_and_has_a_card(made, mine):
    studies = Studies(made / "study")
    for cost in ("deployment_latency_s_ratio", "deployment_latency_s", "parameters"):
        updates = compare_updates(studies, CurvesFile(None), values_of(mine[1], cost=cost, chosen=OWN), True)
        d = json.loads(updates["view"])
        point = next(t for t in d["figure"]["data"] if t.get("name") == OWN)
        assert point["marker"]["symbol"] == OWN_SHAPE and point["error_y"]["array"][0] > 0 and point["x"][0] > 0
        assert "yours, measured here" in [f["name"] for f in d["figure"]["layout"]["meta"]["families"]]
        assert "Yours: one seed, measured for this visit on " in d["caption"] and f"\n{OWN}," in d["csv"]
        assert f"<h3>{OWN}</h3>" in updates["card"] and "Here: " in updates["card"]
    other = json.loads(compare_updates(studies, CurvesFile(None), values_of({}), True)["view"])
    assert OWN not in [t.get("name") for t in other["figure"]["data"]] and "Yours" not in other["caption"], "another visitor sees nothing of it"


def test_the_code_gives_the_figure(made, mine, monkeypatch):
    d = json.loads(compare_updates(Studies(made / "study"), CurvesFile(None), values_of(mine[1], chosen=OWN), True)["view"])
    import essl_nb.study.own_encoder as library
    asked = []
    monkeypatch.setattr(library, "own_rows", lambda *a, **k: asked.append(a) or mine[1]["rows"])  # measured again, times would be others
    same_figure(run_code(d["code"])["_"], d["figure"])
    assert asked[0][1:] == (str(made / "study"), "hidden units")


def test_on_another_machine_the_ratio_alone_is_compared(made, mine):
    rows = json.loads(json.dumps(mine[1]["rows"]))
    for row in rows:
        row["made"]["machine"] = dict(cpu="elsewhere")
    rows[1]["value"]["machine"] = dict(cpu="elsewhere")
    frame = with_own(made / "study", rows)
    costs = cost_table(frame).set_index("encoder")
    assert costs.deployment_latency_s_ratio[OWN] == rows[1]["value"]["latency_s_ratio"] and costs.parameters[OWN] > 0 and np.isnan(costs.deployment_latency_s[OWN]) and np.isnan(costs.deployment_peak_bytes[OWN])
    drawn = lambda cost: {t.name for t in tradeoff_figure(frame, "hidden units", cost=cost).data if (t.meta or {}).get("role") == "point"}
    assert drawn("deployment_latency_s_ratio") == {"first", OWN} and drawn("deployment_latency_s") == {"first"} and drawn("deployment_rtf") == {"first"} and drawn("deployment_peak_bytes") == {"first"}
    assert len(score_table(frame)) == 2


def test_the_same_files_are_costed_once_and_others_replace_them(made, mine, control):
    assert joined(control.studies.opened, mine[1]).rows().own.eq(True).sum() == 2
    _, own = measured(control, str(made / "mine"), own=mine[1])
    assert [r["kind"] for r in own["rows"]] == ["cost", "score"] and own["rows"][0] == mine[1]["rows"][1]


def test_it_is_stopped_and_nothing_of_it_is_kept(made, control):
    found = control.measuring(None, lambda s: shown_probe(s, {}), str(made / "mine"), None, {}, "me")
    assert next(found)[0]["running"]
    with pytest.raises(EsslError, match="running already"):
        control.jobs.start("me", measured)
    control.jobs.stop("me")
    *_, (last, own) = found
    assert "Stopped" in last["note"] and own == {} and not control.jobs.open


BAD = {
    "nowhere": "There is no folder", "empty": "config.json and model.safetensors are missing", "pickled": "pickled weights", "torn": "is not JSON", "of transformers": "names no mixer",
    "other rate": "8000 samples a second", "unknown mixer": "no such mixer", "too large": "million parameters", "": "Give the folder",
}


def broken(folder, mine, kind):
    shutil.copytree(mine, folder)
    config = json.loads((folder / "config.json").read_text())
    if kind == "empty":
        shutil.rmtree(folder), folder.mkdir()
    elif kind == "pickled":
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    elif kind == "torn":
        (folder / "config.json").write_text("{")
    else:
        changed = {"of transformers": dict(model_type="wav2vec2"), "other rate": config | dict(sample_rate=8000), "unknown mixer": config | dict(mixer="no such mixer"), "too large": config | dict(dim=16384, depth=4)}[kind]
        write_json(folder / "config.json", changed)


@pytest.mark.parametrize("kind", BAD)
def test_what_cannot_be_measured_is_one_sentence_at_once(made, control, tmp_path, kind):
    folder = "" if not kind else tmp_path / kind
    if kind not in ("", "nowhere"):
        broken(folder, made / "mine", kind)
    began = time.monotonic()
    said, own = measured(control, str(folder))
    assert len(said) == 1 and BAD[kind] in said[0]["error"] and said[0]["error"].count("essl-error") == 1 and own == {}, said
    assert not control.jobs.open and time.monotonic() - began < 5


def test_weights_that_are_no_numbers_or_of_another_encoder(made, tmp_path):
    shutil.copytree(made / "mine", tmp_path / "nan")
    tensors = load_tensors(tmp_path / "nan" / "model.safetensors")
    name = next(n for n, t in tensors.items() if t.is_floating_point())
    save_tensors(tmp_path / "nan" / "model.safetensors", tensors | {name: torch.full_like(tensors[name], float("nan"))}, {})
    with pytest.raises(EsslError, match="NaN or infinity"):
        own_encoder(tmp_path / "nan")
    tensors.pop(name)
    save_tensors(tmp_path / "nan" / "model.safetensors", tensors, {})
    with pytest.raises(EsslError, match="do not fit its config.json"):
        own_encoder(tmp_path / "nan")
    with pytest.raises(EsslError, match="asked no encoder"):
        asked_of(made / "study", "nothing")


def test_a_hosted_page_reads_no_paths_and_removes_what_was_sent(made, control, tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_SERVER_NAME", "0.0.0.0")
    assert not OwnController(control.studies, control.jobs, control.uploads).local
    control.hosted()
    said, _ = measured(control, str(made / "mine"))
    assert "Paths are not read" in said[0]["error"]
    said, _ = measured(control, "", [str(made / "mine" / "config.json")])
    assert "is not here" in said[0]["error"] and (made / "mine" / "config.json").is_file(), "a path that was never uploaded is neither read nor removed"

    def sent(*names):
        paths = []
        for name in names:
            (tmp_path / name).mkdir(exist_ok=True)
            paths.append(str(shutil.copy(made / "mine" / name, tmp_path / name / name)) if (made / "mine" / name).exists() else str(tmp_path / name / name))
            (tmp_path / name / name).touch()
        control.uploads.add("me", paths)
        return paths

    said, _ = measured(control, "", sent("config.json"))
    assert "model.safetensors is missing" in said[0]["error"]
    said, _ = measured(control, "", sent("config.json", "weights.pt"))
    assert "pickled" in said[0]["error"]
    with control.folder_of("", sent("config.json", "model.safetensors")) as (folder, name):
        assert own_encoder(folder).config.dim == 32 and name == "my_encoder" and not list(tmp_path.rglob("*.safetensors"))
    assert not folder.exists() and control.uploads.bytes_held() == 0


def test_in_the_browser(made, tmp_path_factory):
    with quiet_page(tmp_path_factory.mktemp("uploads"), study=made / "study", corpus=made / "sound") as page:
        page.click("button[role=tab]:has-text('Compare')")
        page.wait_for_selector("#compare-view .essl-view[data-shown]")
        page.click("#compare-sidebar > .label-wrap[data-folded]")
        page.click("#own-encoder > .label-wrap")
        page.fill("#own-path input", str(made / "nowhere"))
        page.click("#own-run")
        page.wait_for_selector("#own-error .essl-error:has-text('There is no folder')")
        page.fill("#own-path input", str(made / "mine"))
        page.click("#own-run")
        page.wait_for_selector("#own-note:has-text('of 2 measurements')")
        assert page.locator("#own-error .essl-error").count() == 0
        page.wait_for_selector("#own-note:has-text('It stands in the figure')")
        page.wait_for_selector("#card h3:has-text('yours')")
        page.wait_for_selector("#compare-view .essl-key:has-text('yours, measured here')")
        assert page.evaluate("() => document.documentElement.scrollWidth") == 390
        page.click("#own-remove")
        page.wait_for_selector("#compare-view .essl-key:not(:has-text('yours, measured here'))", state="attached")
        page.wait_for_function("() => !document.querySelector('#compare-view .essl-caption').textContent.includes('Yours')")
