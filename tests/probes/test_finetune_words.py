"""Fine-tuning to words: labels and frames, exact resume after any stop, faults that are said, a model that transcribes and exports."""
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from madeup import whole

from essl_nb.core import files
from essl_nb.core.command import essl_finetune
from essl_nb.core.files import Busy, load_tensors, read_json, read_lines
from essl_nb.core.registry import EsslError
from essl_nb.core.stop import StoppedBySignal
from essl_nb.data.corpus import load_corpus
from essl_nb.mixers.base import list_mixers
from essl_nb.models.config import EncoderConfig
from essl_nb.models.encoder import build_encoder, load_encoder
from essl_nb.probes import words
from essl_nb.probes import words_step as words_step_module
from essl_nb.probes.decode import TextEvaluation
from essl_nb.probes.finetune import Diverged, Recogniser, seeded
from essl_nb.probes.languages import language_pairs, language_rows, most_speech
from essl_nb.probes.transcriber import Transcriber, export_recogniser, load_recogniser
from essl_nb.probes.vocabulary import Characters
from essl_nb.probes.words import compare_runs, finetune_words, load_score
from essl_nb.probes.words_config import FinetuneConfig
from essl_nb.probes.words_step import WordsRun, layer_groups, transcribed_clips, vocabulary_of, words_step

OFTEN = dict(progress=False, log_every=1, watch_every=4, save_every=2)
MIXER = list_mixers(family="convolution")[0]


@pytest.fixture(scope="module")
def clips(tmp_path_factory, root):
    "Forty short clips with transcripts in two languages, as anyone's folder with a manifest."
    folder, rows, counts = tmp_path_factory.mktemp("clips"), ["id,path,text,language,split"], {}
    for u in load_corpus("bundled"):
        kind = u.language, u.split
        if u.language in ("ca", "en") and 0.6 < u.seconds < 3 and u.extra.get("text_ok") == "1" and counts.get(kind, 0) < (12 if u.split == "train" else 4):
            counts[kind] = counts.get(kind, 0) + 1
            shutil.copy(u.path, folder / u.path.name)
            rows.append(f"{u.id},{u.path.name},{u.extra['text_norm']},{u.language},{u.split}")
    (folder / "manifest.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder")
    build_encoder(EncoderConfig(MIXER, dim=16, depth=2, dropout=0.1), seed=0).save(folder)
    return folder


@pytest.fixture(scope="module")
def config(clips, encoder):
    return FinetuneConfig(str(encoder), corpus=str(clips), language="ca", steps=8, batch_seconds=8.0, precision="fp32", freeze=0.25)


def same(a, b):
    "Whether two finished runs are equal, to the last bit and line."
    read = lambda f: [(f / n).read_bytes() for n in ("metrics.jsonl", "model/head.safetensors", "model/encoder/model.safetensors", "last.safetensors")]
    return read_json(a / "result.json")["value"] == read_json(b / "result.json")["value"] and read(a) == read(b)


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    return finetune_words(config, tmp_path_factory.mktemp("run") / "a", **OFTEN)


def test_a_run_ends_in_scores_and_a_model_that_transcribes(finished, config, clips):
    value = read_json(finished / "result.json")["value"]
    for split in ("valid", "test"):
        cer = load_score(finished, split)
        assert cer.n == 4 and cer.low <= cer.value <= cer.high and value[split]["wer"]["n"] == 4
    model, file = load_recogniser(finished), next(clips.glob("*.opus"))
    text = model.transcribe(file)
    assert isinstance(text, str) and model.transcribe([file, file]) == [text, text]
    rows = read_lines(finished / "metrics.jsonl")[0]
    assert [r["step"] for r in rows] == list(range(1, 9)) and [r["frozen"] for r in rows[:3]] == [True, True, False]
    assert "valid_cer" in rows[3] and "valid_blank" in rows[7] and whole(finished)
    assert compare_runs(finished, finished) == (0.0, 0.0, 0.0)
    assert load_encoder(finished / "model" / "encoder").config == load_encoder(config.encoder).config


class PowerCut(BaseException):
    "Ends a run as nothing that is caught would."


@pytest.mark.parametrize("step", range(8))
def test_a_run_cut_off_at_any_step_resumes_to_the_same_bits(step, config, finished, tmp_path, monkeypatch):
    real, calls = words.words_step, []

    def cut(run, folder):
        calls.append(run.step)
        if run.step == step and len(calls) == step + 1:
            raise PowerCut
        return real(run, folder)

    monkeypatch.setattr(words, "words_step", cut)
    with pytest.raises(PowerCut):
        finetune_words(config, tmp_path / "b", **OFTEN)
    assert whole(tmp_path / "b")
    assert same(finetune_words(config, tmp_path / "b", **OFTEN), finished)


@pytest.mark.parametrize("name", ["save_whole", "summary_of", "write_json"])
def test_a_run_cut_off_while_it_finishes_resumes_to_the_same_bits(name, config, finished, tmp_path, monkeypatch):
    real, cut = getattr(words, name), []

    def fail(*args, **kw):
        late = name != "write_json" or Path(args[0]).name == "result.json"
        if late and not cut:
            cut.append(1)
            raise PowerCut
        return real(*args, **kw)

    monkeypatch.setattr(words, name, fail)
    with pytest.raises(PowerCut):
        finetune_words(config, tmp_path / "b", **OFTEN)
    assert same(finetune_words(config, tmp_path / "b", **OFTEN), finished)


def shell(config, folder, **kw):
    "A run in a process of its own."
    code = f"""
import json, torch
torch.set_num_threads(1)
from essl_nb.core.config import from_json
from essl_nb.probes.words import finetune_words
from essl_nb.probes.words_config import FinetuneConfig
finetune_words(from_json(FinetuneConfig, json.loads({json.dumps(json.dumps(vars(config)))})), {str(folder)!r}, progress=False, log_every=1, watch_every=4, save_every=2)
"""
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kw)


@pytest.mark.parametrize("number", [pytest.param(signal.SIGTERM, marks=pytest.mark.slow), signal.SIGKILL], ids=["SIGTERM", "kill -9"])
def test_a_signal_stops_a_run_that_resumes_to_the_same_bits(number, config, finished, tmp_path):
    folder = tmp_path / "b"
    log = folder / "metrics.jsonl"
    process = shell(config, folder)
    deadline = time.monotonic() + 120
    while not (log.exists() and log.read_bytes().count(b"\n") >= 2) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert process.returncode in ((128 + number, -number) if number == signal.SIGTERM else (-number,)), err
    if number == signal.SIGTERM and "stopped at step" in out:
        step = int(load_tensors(folder / "last.safetensors")["step"])
        assert f"stopped at step {step} of 8 with its state saved" in out
    files.read_lines(log)
    assert same(finetune_words(config, folder, **OFTEN), finished) and whole(folder)


def test_a_signal_within_this_process_saves_and_says_where(config, finished, tmp_path, monkeypatch, capsys):
    real = words.words_step

    def signalled(run, folder):
        if run.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(run, folder)

    with monkeypatch.context() as m:
        m.setattr(words, "words_step", signalled)
        with pytest.raises(StoppedBySignal):
            finetune_words(config, tmp_path / "b", **OFTEN)
    assert "SIGTERM: the run in" in capsys.readouterr().out and int(load_tensors(tmp_path / "b" / "last.safetensors")["step"]) == 5
    assert same(finetune_words(config, tmp_path / "b", **OFTEN), finished)


def test_a_folder_of_another_configuration_shows_the_difference(config, finished):
    before = {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()}
    with pytest.raises(EsslError, match=r"differs in lr: 0.001 there, 0.002 now, units: 'characters' there, 'bpe' now|differs in units"):
        finetune_words(replace(config, lr=2e-3, units="bpe"), finished, **OFTEN)
    with pytest.raises(EsslError, match="resume it"):
        finetune_words(config, finished, resume=False, **OFTEN)
    assert before == {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()}


def test_two_runs_in_one_folder(config, tmp_path, monkeypatch):
    said, inside, leave, real = [], threading.Event(), threading.Event(), words.words_step

    def slow(run, folder):
        inside.set()
        leave.wait(60)
        return real(run, folder)

    monkeypatch.setattr(words, "words_step", slow)
    first = threading.Thread(target=lambda: finetune_words(replace(config, steps=1), tmp_path / "b", **OFTEN))
    first.start()
    assert inside.wait(60)
    try:
        finetune_words(replace(config, steps=1), tmp_path / "b", **OFTEN)
    except Busy as e:
        said.append(str(e))
    finally:
        leave.set()
        first.join()
    assert "Another process is running in this folder" in said[0]


def test_a_full_disk_at_any_write_is_one_message_and_loses_nothing(config, finished, tmp_path, monkeypatch):
    real, folder, writes = files.os.replace, tmp_path / "b", [0]
    for at in (1, 3, 5, 8, 12):
        def full(a, b, at=at):
            writes[0] += 1
            if writes[0] == at:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(a, b)

        writes[0] = 0
        with monkeypatch.context() as m:
            m.setattr(files.os, "replace", full)
            try:
                finetune_words(config, folder, **OFTEN)
            except EsslError as e:
                assert "disk is full" in str(e)
        for path in folder.rglob("*.safetensors"):
            load_tensors(path)
    assert same(finetune_words(config, folder, **OFTEN), finished) and whole(folder)


def test_a_loss_that_is_no_number_stops_with_its_batch_saved(config, finished, tmp_path, monkeypatch):
    real, calls = words_step_module.ctc, []

    def poisoned(logp, lengths, labels):
        calls.append(logp.requires_grad)
        return real(logp, lengths, labels) * (float("nan") if sum(calls) == 6 else 1.0)

    with monkeypatch.context() as m:
        m.setattr(words_step_module, "ctc", poisoned)
        with pytest.raises(Diverged, match="At step 6 of 8 the loss is nan.*No step was taken.*failed_batch"):
            finetune_words(config, tmp_path / "b", **OFTEN)
    batch, about = load_tensors(tmp_path / "b" / "failed_batch.safetensors"), read_json(tmp_path / "b" / "failed_batch.json")
    assert batch["raw"].isfinite().all() and len(about["clips"]) == len(batch["lengths"]) == len(batch["label_lengths"]) and about["step"] == 6
    assert int(load_tensors(tmp_path / "b" / "last.safetensors")["step"]) == 5
    assert same(finetune_words(config, tmp_path / "b", **OFTEN), finished)


def test_an_empty_split_names_the_languages_that_have_some(config, clips, tmp_path):
    with pytest.raises(EsslError, match="clips with a transcript by language: ca 20, en 20"):
        finetune_words(replace(config, language="fr"), tmp_path / "b", **OFTEN)
    assert not (tmp_path / "b" / "config.json").exists(), "the folder can be begun with another language"
    other = tmp_path / "clips"
    shutil.copytree(clips, other)
    text = (other / "manifest.csv").read_text(encoding="utf-8")
    (other / "manifest.csv").write_text(text.replace(",valid", ",train"), encoding="utf-8")
    with pytest.raises(EsslError, match="The valid split"):
        finetune_words(replace(config, corpus=str(other)), tmp_path / "b", **OFTEN)


def test_a_folder_whose_run_could_not_begin_takes_other_settings(config, tmp_path):
    with pytest.raises(EsslError, match="byte-pair tokens cannot be learnt"):
        finetune_words(replace(config, units="bpe", tokens=5000), tmp_path / "b", **OFTEN)
    finetune_words(replace(config, steps=1), tmp_path / "b", **OFTEN)


def test_labels_longer_than_their_frames_are_left_out_and_said(config, clips, tmp_path, capsys):
    other = tmp_path / "clips"
    shutil.copytree(clips, other)
    lines = (other / "manifest.csv").read_text(encoding="utf-8").splitlines()
    at = next(i for i, l in enumerate(lines) if ",ca,train" in l)
    id, path = lines[at].split(",")[:2]
    lines[at] = f"{id},{path},{'la mateixa frase ' * 40},ca,train"
    (other / "manifest.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    folder = finetune_words(replace(config, corpus=str(other), steps=2), tmp_path / "b", **OFTEN)
    assert "1 of 12 training clips are left out: their labels are longer than their frames" in capsys.readouterr().out
    assert read_json(folder / "result.json")["value"]["left_out"] == [id]
    (other / "manifest.csv").write_text("\n".join(f"{l.rsplit(',', 3)[0]},{'aa' * 400},ca,train" if ",ca,train" in l else l for l in lines) + "\n", encoding="utf-8")


def test_when_no_label_fits_the_message_says_what_to_do(config, monkeypatch, tmp_path):
    monkeypatch.setattr("essl_nb.probes.words_step.frames_needed", lambda labels: 10**6)
    with pytest.raises(EsslError, match="None of the 12 training clips has the frames for its label.*units='bpe'"):
        finetune_words(config, tmp_path / "b", **OFTEN)


def waveform_config(tmp_path, config, **kw):
    place = tmp_path / "waves"
    build_encoder(EncoderConfig(MIXER, dim=16, depth=1, frontend="wav2vec2", frontend_kw={}), seed=0).save(place)
    return replace(config, encoder=str(place), steps=3, **kw)


def test_a_clip_that_cannot_be_read_is_skipped_counted_and_named(config, clips, tmp_path, monkeypatch, capsys):
    from essl_nb.probes import frames

    config = waveform_config(tmp_path, config)
    broken = sorted(u.path for u in transcribed_clips(load_corpus(config.corpus), config)["train"])
    real, bad = frames.load_audio, {broken[0]}

    def load(path, rate):
        if path in bad:
            raise EsslError(f"{path} cannot be decoded.")
        return real(path, rate=rate)

    monkeypatch.setattr(frames, "load_audio", load)
    folder = finetune_words(config, tmp_path / "b", **OFTEN)
    named = read_json(folder / "result.json")["value"]["unreadable"]
    assert len(named) == 1 and "cannot be decoded" in capsys.readouterr().out
    bad.update(broken)
    with pytest.raises(EsslError, match="more than the share unreadable=0.05"):
        finetune_words(config, tmp_path / "c", **OFTEN)


def test_other_data_or_another_encoder_is_another_run(config, clips, encoder, tmp_path, monkeypatch):
    other, weights = tmp_path / "clips", tmp_path / "encoder"
    shutil.copytree(clips, other)
    shutil.copytree(encoder, weights)
    config = replace(config, corpus=str(other), encoder=str(weights))

    def cut(run, folder):
        raise PowerCut

    with monkeypatch.context() as m:
        m.setattr(words, "words_step", cut)
        with pytest.raises(PowerCut):
            finetune_words(config, tmp_path / "b", **OFTEN)
    build_encoder(EncoderConfig(MIXER, dim=16, depth=2, dropout=0.1), seed=1).save(weights)
    with pytest.raises(EsslError, match="is not the one that the run"):
        finetune_words(config, tmp_path / "b", **OFTEN)
    shutil.copytree(encoder, weights, dirs_exist_ok=True)
    text = (other / "manifest.csv").read_text(encoding="utf-8")
    (other / "manifest.csv").write_text("\n".join(l.replace(",ca,train", " la,ca,train") for l in text.splitlines()) + "\n", encoding="utf-8")
    with pytest.raises(EsslError, match="begun on other data"):
        finetune_words(config, tmp_path / "b", **OFTEN)


def test_a_torn_state_is_named(config, tmp_path, monkeypatch):
    folder = tmp_path / "b"
    with monkeypatch.context() as m:
        m.setattr(words, "finish_words", lambda *a: None)
        finetune_words(replace(config, steps=2), folder, **OFTEN)
    (folder / "last.safetensors").write_bytes((folder / "last.safetensors").read_bytes()[:-9])
    with pytest.raises(EsslError, match="remove it to begin again"):
        finetune_words(replace(config, steps=2), folder, **OFTEN)


def test_unknown_characters_are_said(config, clips, tmp_path, capsys):
    other = tmp_path / "clips"
    shutil.copytree(clips, other)
    lines = [l.rsplit(",", 3)[0] + ",ŵŷ," + ",".join(l.rsplit(",", 2)[1:]) if ",ca,test" in l else l for l in (other / "manifest.csv").read_text(encoding="utf-8").splitlines()]
    (other / "manifest.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    folder = finetune_words(replace(config, corpus=str(other), steps=1), tmp_path / "b", **OFTEN)
    assert "The test transcripts hold 8 characters that the vocabulary lacks (ŵ ŷ)" in capsys.readouterr().out
    assert read_json(folder / "result.json")["value"]["unknown"]["test"] == 8


def test_the_schedule_of_freezing_and_of_layers(config, clips):
    corpus = load_corpus(config.corpus)
    given = transcribed_clips(corpus, config)
    make = lambda c: WordsRun(c, corpus, torch.device("cpu"), clips=given, vocabulary=vocabulary_of(c, given["train"]), precision="fp32", progress=False)
    run = make(replace(config, layer_decay=0.5))
    weights = lambda part: [p.detach().clone() for p in part.parameters()]
    changed = lambda part, before: any(not torch.equal(a, b) for a, b in zip(part.parameters(), before))
    before = weights(run.model.encoder)
    for _ in range(2): # a quarter of 8 steps
        words_step(run, Path("."))
    assert not changed(run.model.encoder, before)
    words_step(run, Path("."))
    blocks, front = run.model.encoder.blocks, weights(run.model.encoder.frontend)
    first = weights(blocks[0])
    words_step(run, Path("."))
    assert changed(blocks[0], first) and not changed(run.model.encoder.frontend, front)
    scales = {id(p): g["scale"] for g in layer_groups(run.model, run.config) for p in g["params"]}
    scale_of = lambda part: {scales[id(p)] for p in part.parameters()}
    assert scale_of(blocks[1]) == {1.0} and scale_of(blocks[0]) == {0.5} and scale_of(run.model.encoder.frontend) == {0.25} and scale_of(run.model.out) == {1.0}
    assert len(scales) == sum(1 for _ in run.model.parameters())
    scratch = make(replace(config, start="scratch", freeze=None))
    front = weights(scratch.model.encoder.frontend)
    words_step(scratch, Path("."))
    assert changed(scratch.model.encoder.frontend, front)


def test_a_recogniser_learns_a_few_clips_by_heart(config, tmp_path):
    "Forty-two letters in twelve clips, two hundred steps: nearly no error is left on what it was trained on."
    corpus = load_corpus(config.corpus)
    given = transcribed_clips(corpus, config)
    given["valid"] = given["train"] = sorted(given["train"], key=lambda u: u.seconds)[:4]
    place = tmp_path / "encoder"
    build_encoder(EncoderConfig(MIXER, dim=64, depth=2), seed=0).save(place)
    config = replace(config, encoder=str(place), start="scratch", freeze=None, steps=150, lr=5e-3, masks=False, batch_seconds=30.0)
    run = WordsRun(config, corpus, torch.device("cpu"), clips=given, vocabulary=vocabulary_of(config, given["train"]), precision="fp32", progress=False)
    losses = [words_step(run, tmp_path)["loss"] for _ in range(150)]
    seen = words.evaluate_words(run, given["valid"])
    assert losses[-1] < 0.1 * losses[0] and seen.score("cer").value < 0.1 and not seen.collapsed, (losses[-1], seen.texts)


def test_a_collapse_is_in_the_log_and_said(config, tmp_path, capsys, monkeypatch):
    silent = lambda run, clips, decoder=None: TextEvaluation([u.id for u in clips], ["un paon"] * len(clips), [""] * len(clips), 3.0, 1.0)
    monkeypatch.setattr(words, "evaluate_words", silent)
    folder = finetune_words(config, tmp_path / "b", **OFTEN)
    out = capsys.readouterr().out
    assert "BLANK COLLAPSE" in out and read_lines(folder / "metrics.jsonl")[0][-1]["valid_collapsed"] is True
    assert read_json(folder / "result.json")["value"]["test"]["collapsed"] is True


def test_a_beam_scores_beside_greedy(config, tmp_path):
    folder = finetune_words(replace(config, steps=2, beam=5), tmp_path / "b", **OFTEN)
    assert load_score(folder, "test_beam").n == load_score(folder, "test").n == 4
    with pytest.raises(EsslError, match="has no cer of dev"):
        load_score(folder, "dev")


def test_a_batch_transcribes_as_each_clip_alone(finished, clips):
    model = load_recogniser(finished)
    files_ = sorted(clips.glob("*.opus"))[:5]
    assert model.transcribe(files_, batch=5) == [model.transcribe(f) for f in files_] and model.transcribe([]) == []
    with pytest.raises(EsslError, match="shape"):
        model.transcribe(torch.zeros(2, 16000))
    with pytest.raises(EsslError):
        model.transcribe("no/such/file.wav")


def test_the_exported_file_gives_the_same_posteriors(finished, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    model = load_recogniser(finished)
    made = export_recogniser(model, tmp_path / "words.onnx")
    session = runtime.InferenceSession(str(tmp_path / "words.onnx"), providers=["CPUExecutionProvider"])
    about = session.get_modelmeta().custom_metadata_map
    assert json.loads(about["symbols"]) == list(model.vocabulary.symbols) and made["parity"] < 1e-3
    wav, lengths = torch.randn(3, 20000, generator=torch.Generator().manual_seed(0)) * 0.1, torch.tensor([20000, 9000, 15000])
    logp, frames = session.run(None, {"wav": wav.numpy(), "lengths": lengths.numpy()})
    with torch.no_grad():
        want, want_frames = model(wav, lengths)
    assert frames.tolist() == want_frames.tolist()
    for a, b, n in zip(torch.from_numpy(logp), want, want_frames.tolist()):
        torch.testing.assert_close(a[:n], b[:n], rtol=1e-3, atol=1e-3)


def test_a_head_of_another_vocabulary_is_refused(finished, tmp_path):
    with pytest.raises(EsslError, match="The head has 4 classes, and the vocabulary needs 3"):
        Transcriber(Recogniser(build_encoder(EncoderConfig(MIXER, dim=16, depth=1), seed=0), 3, seeded("head", 0)), Characters("ab"))
    shutil.copytree(finished / "model", tmp_path / "model")
    Characters("ab").save(tmp_path / "model")
    with pytest.raises(EsslError, match="does not fit"):
        load_recogniser(tmp_path / "model")
    with pytest.raises(EsslError, match="holds no recogniser"):
        load_recogniser(tmp_path / "none")


def test_rows_of_languages_are_made_once_and_paired(config, tmp_path):
    config, path = replace(config, steps=1, freeze=None), tmp_path / "rows.jsonl"
    make = lambda: language_rows(path, config, languages=("en", "ca"), folders=tmp_path / "runs", **OFTEN)
    assert make() == 4 and make() == 0
    pairs = language_pairs(path)
    assert [p["language"] for p in pairs] == ["ca", "en"] and all(p["pretrained"].n == p["scratch"].n == 4 for p in pairs)
    away, low, high = pairs[0]["difference"]
    assert low <= away <= high and away == pairs[0]["pretrained"].value - pairs[0]["scratch"].value
    assert most_speech(load_corpus(config.corpus), 1).keys() <= {"ca", "en"}
    with pytest.raises(EsslError, match="tools/words.py"):
        language_pairs(tmp_path / "none.jsonl")


@pytest.mark.parametrize("wrong", [dict(steps=0), dict(freeze=1.0), dict(start="scratch", layer_decay=0.9), dict(lm="x.arpa"), dict(layer_decay=0.0), dict(lr=-1.0)])
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(EsslError):
        FinetuneConfig("encoder", **wrong)


def test_the_command(config, clips, encoder, tmp_path, capsys):
    folder = tmp_path / "run"
    argv = [str(encoder), "--corpus", str(clips), "--language", "ca", "--folder", str(folder), "--steps", "2", "--precision", "fp32", "--threads", "1"]
    assert essl_finetune(argv) == 0 and "CER" in capsys.readouterr().out
    assert essl_finetune(argv) == 0 and "nothing to do" in capsys.readouterr().out
    assert essl_finetune([*argv, "--lr", "0.5"]) == 2 and "differs in lr: 0.001 there, 0.5 now" in capsys.readouterr().err
    assert essl_finetune([]) == 2 and "No encoder was named" in capsys.readouterr().err
    assert essl_finetune([str(encoder), "--language", "xx", "--corpus", str(clips), "--folder", str(tmp_path / "no")]) == 2
    assert essl_finetune([str(encoder), "--threads", "-1"]) == 2
