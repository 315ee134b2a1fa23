"""Corpora larger than memory: the index, shards, the plan, batches from disk, and the loader's promise: killed and resumed = never killed."""

import csv
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import soundfile
import torch

from essl_nb.core.registry import EsslError
from essl_nb.data.audio import load_audio, log_mel_long
from essl_nb.data.batches import BucketBatches, Item, cut_clip
from essl_nb.data.corpus import corpus_from_rows
from essl_nb.data.excerpts import Sound, load_part, load_sound
from essl_nb.data.index import Clip, ClipIndex, write_index
from essl_nb.data.loader import Loader
from essl_nb.data.opening import open_index
from essl_nb.data.sampling import sampled_features
from essl_nb.data.shards import shards_of_dataset, write_shards
from essl_nb.data.streams import Faults, StreamBatches, as_mel
from essl_nb.data.windows import WindowPlan, batch_counts, cuts

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ESSL_CACHE", str(tmp_path / "cache"))


def noise(k, seconds):
    return 0.1 * np.random.default_rng(k).standard_normal(int(seconds * 16000))


def recordings(folder, count=24, longest=2.0, suffix="flac"):
    "A folder of noise of different lengths."
    folder.mkdir(parents=True, exist_ok=True)
    for k in range(count):
        soundfile.write(folder / f"{k:03}.{suffix}", noise(k, 0.5 + (longest - 0.5) * (k * 7 % count) / count), 16000)
    return folder


def tables(index):
    return [(c.id, round(c.seconds, 3), c.split, c.text, c.voice, c.language) for c in index]


def equal(a, b):
    return a.ids == b.ids and torch.equal(a.mel, b.mel) and torch.equal(a.lengths, b.lengths) and a.targets.keys() == b.targets.keys() and all(torch.equal(a.targets[k], b.targets[k]) for k in a.targets)


# ---- the index and what it is made of

ROWS = [dict(id="a", path="a.wav", seconds="1.5", split="train", text='say "a, b"', voice="v1", lang="de"), dict(id="ü", path="b.wav", seconds="", split="dev", text="", voice="", lang="")]


def write_table(path, rows, kind):
    if kind == "jsonl":
        path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    else:
        with open(path, "w", newline="", encoding="utf-8") as f:
            quoting = dict(quoting=csv.QUOTE_NONE, quotechar=None, escapechar=None) if kind == "tsv" else {}
            w = csv.DictWriter(f, list(rows[0]), delimiter="\t" if kind == "tsv" else ",", **quoting)
            w.writeheader()
            w.writerows(rows)


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl"])
def test_a_manifest_becomes_an_index_and_missing_durations_are_measured(tmp_path, kind):
    for name, seconds in (("a", 1.5), ("b", 0.75)):
        soundfile.write(tmp_path / f"{name}.wav", noise(1, seconds), 16000)
    write_table(tmp_path / f"m.{kind}", ROWS, kind)
    index = open_index(tmp_path / f"m.{kind}")
    assert tables(index) == [("a", 1.5, "train", 'say "a, b"', "v1", "de"), ("ü", 0.75, "valid", "", "", "")]
    assert index.select("valid").tolist() == [1] and index.select(voice="v1").tolist() == [0]
    assert torch.equal(index.read(1), load_audio(tmp_path / "b.wav"))
    again = open_index(tmp_path / f"m.{kind}")
    assert again.folder == index.folder and again.hash == index.hash


WRONG_TABLES = {
    "a duration": ("id,path,seconds\na,a.wav,1.5\nb,b.wav,long\n", "line 3.*'long'"),
    "a split": ("path,split\na.wav,everything\n", "line 2.*'everything'.*train"),
    "no path": ("id,path\na,\n", "line 2: no path"),
    "no column of paths": ("id,seconds\na,1\n", "one has to name the sound files"),
    "an id twice": ("id,path,seconds\na,a.wav,1\na,b.wav,1\n", "more than once: a"),
    "too many cells": ("path,seconds\na.wav,1,x\n", "line 2: 3 cells"),
    "no rows": ("path,seconds\n", "no rows"),
    "a segment": ("path,duration,offset\na.wav,1,2.5\n", "offset = 2.5"),
    "files that are not there": ("path,seconds\nx.wav,1\n", "None of 1 sampled clips can be read|None of 1 sampled"),
    "milliseconds": ("path,seconds\na.wav,1500\n", "not those of the sound"),
}


@pytest.mark.parametrize("what", WRONG_TABLES)
def test_a_mistake_in_a_manifest_is_named_with_its_line(tmp_path, what):
    soundfile.write(tmp_path / "a.wav", noise(1, 1.5), 16000)
    text, words = WRONG_TABLES[what]
    (tmp_path / "m.csv").write_text(text)
    with pytest.raises(EsslError, match=words):
        open_index(tmp_path / "m.csv")


def test_broken_json_and_text_of_another_encoding(tmp_path):
    (tmp_path / "m.jsonl").write_text('{"path": "a.wav"}\n{"path": \n')
    with pytest.raises(EsslError, match="line 2: no JSON"):
        open_index(tmp_path / "m.jsonl")
    (tmp_path / "m.csv").write_bytes(b"path,text\na.wav,\xff\xfe\n")
    with pytest.raises(EsslError, match="UTF-8"):
        open_index(tmp_path / "m.csv")


def librispeech(root):
    for part, voice, book in (("train-clean-100", "103", "1240"), ("dev-other", "116", "288045"), ("test-clean", "61", "70968")):
        folder = root / part / voice / book
        folder.mkdir(parents=True)
        soundfile.write(folder / f"{voice}-{book}-0000.flac", noise(1, 0.5), 16000)
        (folder / f"{voice}-{book}.trans.txt").write_text(f"{voice}-{book}-0000 A TEXT\n")
    return [("103-1240-0000", 0.5, "train", "A TEXT", "103", "en"), ("116-288045-0000", 0.5, "valid", "A TEXT", "116", "en"), ("61-70968-0000", 0.5, "test", "A TEXT", "61", "en")]


def librilight(root):
    folder = root / "small" / "100" / "sea_fairies"
    folder.mkdir(parents=True)
    soundfile.write(folder / "01.flac", noise(1, 0.5), 16000)
    (folder / "01.json").write_text('{"speaker": "100", "voice_activity": [[0.1, 0.4]]}')
    return [("small/100/sea_fairies/01", 0.5, "train", "", "100", "en")]


def commonvoice(root):
    (root / "clips").mkdir()
    for word in ("train", "dev", "test"):
        soundfile.write(root / "clips" / f"cv_{word}.mp3", noise(1, 0.576), 32000)
        (root / f"{word}.tsv").write_text(f"client_id\tpath\tsentence\tlocale\nspk{word}\tcv_{word}.mp3\tEr sagte \"ja\ttr\n")
    (root / "clip_durations.tsv").write_text("clip\tduration[ms]\ncv_train.mp3\t500\ncv_dev.mp3\t500\ncv_test.mp3\t500\n")
    return [(f"cv_{w}", 0.5, s, 'Er sagte "ja', f"spk{w}", "tr") for w, s in (("dev", "valid"), ("test", "test"), ("train", "train"))]


def voxpopuli(root):
    folder = root / "transcribed_data" / "de" / "2012"
    other = root / "unlabelled_data" / "fr" / "2010"
    for place, id in ((folder, "20120101-x"), (other, "20100101_y")):
        place.mkdir(parents=True)
        soundfile.write(place / f"{id}.ogg", noise(1, 0.5), 16000)
    (root / "transcribed_data" / "de" / "asr_dev.tsv").write_text("id\traw_text\tnormalized_text\tspeaker_id\tsplit\n20120101-x\tJa.\tja\t77\tdev\n")
    return [("20120101-x", 0.5, "valid", "ja", "77", "de"), ("unlabelled_data/fr/2010/20100101_y", 0.5, "train", "", "", "fr")]


def vctk(root):
    for name, kind in (("wav48_silence_trimmed/p225", "flac"), ("txt/p225", "txt")):
        (root / name).mkdir(parents=True)
    for mic in (1, 2):
        soundfile.write(root / "wav48_silence_trimmed/p225" / f"p225_001_mic{mic}.flac", noise(1, 0.5), 48000)
    (root / "txt/p225/p225_001.txt").write_text("Please call Stella.\n")
    from essl_nb.data.corpus import split_of

    return [("p225_001", round(8000 / 48000, 3), split_of("p225"), "Please call Stella.", "p225", "en")]


@pytest.mark.parametrize("build", [librispeech, librilight, commonvoice, voxpopuli, vctk])
def test_layouts_of_published_corpora_are_recognised(tmp_path, build):
    expected = build(tmp_path)
    index = open_index(tmp_path)
    assert sorted(tables(index)) == expected == sorted(tables(open_index(tmp_path, layout=build.__name__)))
    assert all(len(index.read(i)) > 1000 for i in range(len(index)))


def test_an_index_of_a_corpus_is_that_corpus(tmp_path):
    folder = recordings(tmp_path / "r", 6)
    corpus = corpus_from_rows([dict(path=p, voice="x", split="train") for p in sorted(folder.iterdir())])
    index = ClipIndex.of(corpus)
    assert [(c.id, c.voice, c.split) for c in index] == [(u.id, u.voice, u.split) for u in corpus]
    assert [(u.id, u.seconds) for u in corpus] == [(c.id, pytest.approx(c.seconds, abs=1e-3)) for c in index]


def test_an_empty_split_unknown_names_and_no_clips_are_errors(tmp_path):
    recordings(tmp_path / "r", 3)
    index = open_index(tmp_path / "r", split="train")
    with pytest.raises(EsslError, match="'valid' of 'r' is empty.*train 3"):
        StreamBatches(index, split="valid", seed=0)
    with pytest.raises(EsslError, match="no split 'vaild'.*valid"):
        index.select("vaild")
    with pytest.raises(EsslError, match="no clip that can be used"):
        (tmp_path / "empty").mkdir()
        open_index(tmp_path / "empty")
    with pytest.raises(EsslError, match="shorter than min_seconds"):
        StreamBatches(index, seed=0, min_seconds=3, batch_seconds=8)


def test_an_index_is_kept_where_it_is_asked_for_and_replaces_nothing_else(tmp_path):
    folder = recordings(tmp_path / "r", 3)
    index = open_index(folder, folder=tmp_path / "mine")
    assert index.folder == tmp_path / "mine" and open_index(tmp_path / "mine").hash == index.hash
    soundfile.write(folder / "more.flac", noise(9, 1), 16000)
    assert len(open_index(folder, folder=tmp_path / "mine")) == 4
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "notes.txt").write_text("mine")
    with pytest.raises(EsslError, match="something else than an index"):
        open_index(folder, folder=tmp_path / "precious")
    assert (tmp_path / "precious" / "notes.txt").read_text() == "mine"


def test_the_columns_of_an_index_are_not_in_memory(tmp_path):
    count = 200_000
    clips = (Clip(f"clip-{i}", f"folder/{i // 100}/clip-{i}.flac", 5.0, "train", "", "", f"v{i // 50}") for i in range(count))
    index = write_index(tmp_path / "i", clips, "many", "/")
    held = [v for v in vars(index).values() if isinstance(v, (list, dict))]
    assert len(index) == count and index[-1].id == "clip-199999" and index[-1].voice == "v3999"
    assert sum(len(v) for v in held) < 100 and all(isinstance(getattr(index, n), np.memmap) for n in ("seconds", "split", "voice_codes"))
    assert sum(f.stat().st_size for f in index.folder.iterdir()) < 120 * count


# ---- parts of sound, in files and in archives

@pytest.mark.parametrize("suffix, kind", [("wav", {}), ("flac", {}), ("ogg", {}), ("opus", dict(format="OGG", subtype="OPUS")), ("mp3", {})])
@pytest.mark.parametrize("rate", [16000, 48000])
def test_a_part_is_that_part_of_the_whole(tmp_path, suffix, kind, rate):
    t = np.arange(6 * rate) / rate
    soundfile.write(tmp_path / f"a.{suffix}", 0.3 * np.sin(2 * np.pi * 300 * t * (1 + t / 6)), rate, **kind)
    data = (tmp_path / f"a.{suffix}").read_bytes()
    (tmp_path / "x.tar").write_bytes(b"x" * 700 + data + b"y" * 300)
    member = Sound(str(tmp_path / "x.tar"), f"a.{suffix}", 700, len(data))
    whole = load_audio(tmp_path / f"a.{suffix}")
    assert torch.equal(load_sound(member), whole)
    for start, samples in ((0, 4000), (12345, 20000), (80001, 16000), (len(whole) - 500, 4000)):
        part = load_part(member, start, samples)
        assert len(part) == min(samples, len(whole) - start)
        assert (part - whole[start : start + samples]).abs().max() < 2e-3, (start, samples)


def test_damage_in_a_member_is_named_with_its_archive(tmp_path):
    soundfile.write(tmp_path / "a.flac", noise(0, 2), 16000)
    data = bytearray((tmp_path / "a.flac").read_bytes())
    data[len(data) // 2] ^= 255
    (tmp_path / "x.tar").write_bytes(b"x" * 512 + data)
    with pytest.raises(EsslError, match=r"x\.tar/a\.flac is damaged"):
        load_sound(Sound(str(tmp_path / "x.tar"), "a.flac", 512, len(data)))
    with pytest.raises(EsslError, match="cut short"):
        load_sound(Sound(str(tmp_path / "x.tar"), "a.flac", 512, len(data) + 10))
    with pytest.raises(EsslError, match="cannot be read"):
        load_part(Sound(str(tmp_path / "gone.tar"), "a.flac", 512, 100), 0, 100)


# ---- shards

def test_shards_hold_what_the_folder_held_and_writing_goes_on_after_a_kill(tmp_path):
    folder = recordings(tmp_path / "r", 24)
    made = write_shards(folder, tmp_path / "s", seconds_per_shard=6, progress=False)
    source = open_index(folder)
    assert len(made.shards) > 4 and sorted(tables(made)) == sorted(tables(source))
    bytes_of = {p.name: p.read_bytes() for p in (tmp_path / "s").glob("*.tar")}
    for name in sorted(bytes_of)[2:]:
        (tmp_path / "s" / name).unlink()  # as if the command had been killed after two
    write_shards(folder, tmp_path / "s", seconds_per_shard=6, progress=False)
    assert bytes_of == {p.name: p.read_bytes() for p in (tmp_path / "s").glob("*.tar")}
    with pytest.raises(EsslError, match="other settings"):
        write_shards(folder, tmp_path / "s", seconds_per_shard=7, progress=False)
    with pytest.raises(EsslError, match="encode='mp3'"):
        write_shards(folder, tmp_path / "t", encode="mp3", progress=False)


def test_shards_in_flac_leave_out_what_cannot_be_read(tmp_path, capsys):
    folder = recordings(tmp_path / "r", 12, suffix="wav")
    source = open_index(folder, split="train")
    data = (folder / "004.wav").read_bytes()
    (folder / "004.wav").write_bytes(data[: len(data) // 2])
    made = write_shards(source, tmp_path / "s", encode="flac", progress=False)
    assert {c.id for c in made} == {c.id for c in source} - {"004"}
    assert "1 of 12 clips are left out" in capsys.readouterr().err and "004" in json.loads((tmp_path / "s/left_out.json").read_text())


def test_webdataset_reads_our_layout_and_we_read_its(tmp_path):
    folder = recordings(tmp_path / "r", 4)
    made = write_shards(folder, tmp_path / "s", progress=False, split="train")
    with tarfile.open(tmp_path / "s" / made.shards[0]) as tar:
        names = tar.getnames()
    assert [n.split(".")[0] for n in names[::2]] == [n.split(".")[0] for n in names[1::2]] and {n.split(".")[1] for n in names} == {"flac", "json"}
    with tarfile.open(tmp_path / "other.tar", "w") as tar:  # keys in folders, transcripts as text, no durations
        for n, key in enumerate(("x/one", "x/two")):
            for suffix, data in (("txt", b"hello there"), ("flac", (folder / f"00{n}.flac").read_bytes()), ("cls", b"7")):
                entry = tarfile.TarInfo(f"{key}.{suffix}")
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
    index = open_index(tmp_path / "other.tar", split="test")
    assert [(c.id, c.text, c.split) for c in index] == [("other/x/one", "hello there", "test"), ("other/x/two", "hello there", "test")]
    assert torch.equal(index.read(1), load_audio(folder / "001.flac"))


def test_a_damaged_shard_gives_what_stands_before_the_damage_and_is_named(tmp_path):
    folder = recordings(tmp_path / "r", 12)
    made = write_shards(folder, tmp_path / "s", seconds_per_shard=100, progress=False, split="train")
    whole, path = len(made), tmp_path / "s" / made.shards[0]
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 2 // 3])
    cut = open_index(path)
    assert 0 < len(cut) < whole and "cut short" in str(cut.left_out)
    path.write_bytes(b"no archive" * 1000)
    with pytest.raises(EsslError, match="no clip that can be used.*tar archive"):
        open_index(path)
    (tmp_path / "c.tar.gz").write_bytes(b"")
    with pytest.raises(EsslError, match="compressed"):
        open_index(str(tmp_path / "*.tar.gz"))
    with pytest.raises(EsslError, match="are missing"):
        open_index(str(tmp_path / "s" / "train-{000000..000003}.tar"))


def test_a_streamed_data_set_becomes_shards_and_goes_on_where_it_was_stopped(tmp_path):
    datasets = pytest.importorskip("datasets")
    folder = recordings(tmp_path / "r", 10)
    rows = dict(audio=[dict(bytes=(folder / f"{k:03}.flac").read_bytes(), path=f"{k:03}.flac") for k in range(10)], sentence=[f"text {k}" for k in range(10)])
    whole = shards_of_dataset(datasets.Dataset.from_dict(rows), tmp_path / "a", clips_per_shard=4, progress=False)
    assert len(whole) == 10 and len(whole.shards) == 3 and whole[9].text == "text 9" and whole[9].split == "train"
    assert torch.equal(whole[9 - 0] and whole.read(9), load_audio(folder / "009.flac"))

    class Killed(Exception):
        pass

    def broken(rows, limit):
        for k in range(10):
            if k == limit:
                raise Killed
            yield {n: v[k] for n, v in rows.items()}

    first = datasets.IterableDataset.from_generator(broken, gen_kwargs=dict(rows=rows, limit=6))
    with pytest.raises(Exception):
        shards_of_dataset(first, tmp_path / "b", clips_per_shard=4, progress=False)
    second = datasets.IterableDataset.from_generator(broken, gen_kwargs=dict(rows=rows, limit=99))
    resumed = shards_of_dataset(second, tmp_path / "b", clips_per_shard=4, progress=False)
    assert tables(resumed) == tables(whole)


# ---- the plan

def test_chunks_are_cut_as_batches_cut_them():
    frames = np.arange(1, 3000, 7)
    for most, multiple in ((400, 4), (1000, 6), (96, 4)):
        n, width = cuts(frames, most, multiple)
        for f, k, w in zip(frames, n, width):
            expected = cut_clip(0, int(f), most, multiple)
            assert len(expected) == k and [c.start for c in expected] == [j * w for j in range(k)]


def test_batches_are_counted_without_planning_them():
    rng = np.random.default_rng(0)
    frames = rng.integers(20, 900, 3000).astype(np.int32)
    plan = WindowPlan(frames, np.append(np.arange(0, 3000, 37), 3000), seed=3, most=4000, longest=400, window=60000)
    for epoch in (0, 1):
        e = plan.epoch(epoch)
        assert [len(plan.make_window(epoch, k).ends) for k in range(len(e.starts))] == np.diff(e.ends, prepend=0).tolist()
        assert sorted(np.concatenate([plan.clips_of(e, k) for k in range(len(e.starts))])) == list(range(3000))
    first = [plan.find(int(plan.epoch(0).ends[-1]) + d) for d in (-1, 0)]
    assert first == [(0, int(plan.epoch(0).ends[-1]) - 1), (1, 0)]
    full, rest = batch_counts(np.array([[3, 0, 5]]), np.array([4, 2, 1]))
    assert (full.tolist(), rest.tolist()) == ([[0, 1, 6]], [0])


def test_epochs_differ_and_seeds_differ(tmp_path):
    index = open_index(recordings(tmp_path / "r", 24), split="train")
    a, b = (StreamBatches(index, seed=s, batch_seconds=6) for s in (0, 1))
    n = len(a)
    assert [a.ids_at(k) for k in range(n)] != [a.ids_at(k + n) for k in range(n)] and [a.ids_at(k) for k in range(n)] != [b.ids_at(k) for k in range(n)]
    assert sorted(i for k in range(n) for i, *_ in a.ids_at(k)) == sorted(c.id for c in index) and a.name != b.name
    assert a.epochs_at(n) == 1.0 and 0 < a.epochs_at(1) < 1 and StreamBatches(index, seed=0, batch_seconds=6).name == a.name


# ---- batches from disk

def test_log_mel_of_a_chunk_is_that_of_the_whole_clip(tmp_path):
    (tmp_path / "r").mkdir()
    soundfile.write(tmp_path / "r" / "long.flac", noise(5, 21.3), 16000)
    index = open_index(tmp_path / "r", split="train")
    whole = log_mel_long(index.read(0))
    batches, seen = StreamBatches(index, seed=0, batch_seconds=12, max_seconds=4, stride=4), 0
    for k in range(len(batches)):
        for (_, start, frames), mel, n in zip(batches.ids_at(k), (b := batches.at_step(k)).mel, b.lengths):
            assert n == frames and torch.allclose(mel[:n], whole[start : start + frames], atol=1e-4) and not mel[n:].any()
            seen += frames
    assert seen == len(whole)


def test_samples_instead_of_frames_and_targets_of_frames(tmp_path):
    index = open_index(recordings(tmp_path / "r", 8), split="train")
    label = lambda mel: {"level": mel.mean(1)[::2], "two": mel[::2, :2]}
    mels, waves = (StreamBatches(index, seed=0, batch_seconds=6, raw=raw, label=label).at_step(0) for raw in ("logmel", "wave"))
    assert waves.mel.shape[2] == 1 and (waves.lengths == mels.lengths * 160).all() and waves.ids == mels.ids
    assert mels.targets["level"].shape == (len(mels.ids), -(-mels.mel.shape[1] // 2)) and mels.targets["two"].shape[2] == 2
    assert equal(mels._replace(mel=mels.mel[:0]), waves._replace(mel=mels.mel[:0], lengths=mels.lengths))
    made = as_mel(waves)
    inner = slice(3, int(mels.lengths.min()) - 3)
    assert made.mel.shape == mels.mel.shape and torch.allclose(made.mel[:, inner], mels.mel[:, inner], atol=1e-4)


def test_faulty_clips_are_left_out_counted_and_named_and_too_many_stop(tmp_path):
    folder = recordings(tmp_path / "r", 30)
    soundfile.write(folder / "nan.wav", np.full(16000, np.nan), 16000, subtype="FLOAT")
    soundfile.write(folder / "silent.wav", np.zeros(16000), 16000)
    index = open_index(folder, split="train")
    (folder / "007.flac").unlink()
    (folder / "008.flac").write_bytes(b"not sound" * 99)
    batches, faults = StreamBatches(index, seed=0, batch_seconds=5), Faults(max_share=0.2, least=10)
    kept = []
    for k in range(len(batches)):
        faults.add(batch := batches.at_step(k))
        kept += batch.ids
        assert torch.isfinite(batch.mel).all()
    assert set(faults.reasons) == {"nan", "silent", "007", "008"} and faults.count == 4 and faults.seen == 32 and len(set(kept)) == 28
    assert "4 clips were left out" in str(faults) and "no file" in faults.reasons["007"]
    strict = Loader(batches, faults=Faults(max_share=0.01, least=32), last_step=len(batches))
    with pytest.raises(EsslError, match=r"chunks of clips could not be used.*max_fault_share = 0\.01"):
        list(strict)
    again = Faults()
    again.restore(json.loads(json.dumps(faults.state())))
    assert again.reasons == faults.reasons and again.seen == faults.seen


def test_a_batch_without_rows_is_replaced_and_a_corpus_without_sound_ends(tmp_path):
    folder = recordings(tmp_path / "r", 8, longest=0.6)
    index = open_index(folder, split="train")
    batches = StreamBatches(index, seed=0, batch_seconds=0.7)
    bad = [i for i, *_ in batches.ids_at(2)]
    for id in bad:
        (folder / f"{id}.flac").write_bytes(b"")
    made = batches.at_step(2)
    assert [i for i, _ in made.faults] == bad and made.ids == batches.at_step(3).ids
    for p in folder.iterdir():
        p.write_bytes(b"")
    with pytest.raises(EsslError, match="100 batches in a row"):
        batches.at_step(0)


@pytest.mark.parametrize("wrong", [dict(raw="mel"), dict(batch_seconds=2, max_seconds=3), dict(stride=0), dict(min_seconds=20)])
def test_settings_that_cannot_be_are_refused(tmp_path, wrong):
    index = open_index(recordings(tmp_path / "r", 3), split="train")
    with pytest.raises(EsslError, match=next(iter(wrong)).split("_")[0]):
        StreamBatches(index, seed=0, **wrong)


# ---- the loader: killed and resumed = never killed

LOAD = """
import sys, json, hashlib, os, torch
from essl_nb.data.opening import open_index
from essl_nb.data.streams import StreamBatches
from essl_nb.data.loader import Loader

def level(mel):
    return {"level": mel.mean(1)[::2]}

if __name__ == "__main__":
    where, out, first, workers, stop, method = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5]), sys.argv[6]
    torch.set_num_threads(1)
    batches = StreamBatches(open_index(where, split="train"), seed=5, batch_seconds=5, max_seconds=1.5, label=level)
    with Loader(batches, first, workers=workers, method=method) as loader, open(out, "a") as f:
        for k, b in enumerate(loader, first):
            digest = hashlib.sha256(b.mel.numpy().tobytes() + b.lengths.numpy().tobytes() + b.targets["level"].numpy().tobytes()).hexdigest()
            f.write(json.dumps([k, b.ids, digest]) + "\\n")
            f.flush()
            if k + 1 == stop:
                os.kill(os.getpid(), 9) if stop < 24 else sys.exit(0)
"""


def test_killed_twice_and_resumed_twice_is_never_killed_with_any_number_of_workers(tmp_path):
    where = recordings(tmp_path / "r", 20)
    write_shards(where, tmp_path / "s", seconds_per_shard=5, progress=False, split="train")
    (tmp_path / "load.py").write_text(LOAD)
    env = dict(os.environ, PYTHONPATH=str(ROOT))

    def run(out, first, workers, stop, method="fork"):
        return subprocess.run([sys.executable, tmp_path / "load.py", tmp_path / "s", out, str(first), str(workers), str(stop), method], env=env, timeout=120, capture_output=True, text=True)

    lines = lambda out: [json.loads(line) for line in Path(out).read_text().splitlines()]
    done = run(tmp_path / "whole", 0, 0, 24)
    assert done.returncode == 0, done.stderr
    for first, workers, stop, method in ((0, 0, 7, "fork"), (7, 2, 15, "fork"), (15, 1, 24, "spawn")):
        done = run(tmp_path / "parts", first, workers, stop, method)
        assert done.returncode == (-9 if stop < 24 else 0), done.stderr
    assert lines(tmp_path / "parts") == lines(tmp_path / "whole") and len(lines(tmp_path / "whole")) == 24


def test_other_numbers_of_ranks_see_the_same_batches_in_the_same_global_order(tmp_path):
    index = open_index(recordings(tmp_path / "r", 24), split="train")
    batches = StreamBatches(index, seed=0, batch_seconds=5)
    whole = list(Loader(batches, last_step=5, per_step=4))
    for world in (2, 4):
        ranks = [list(Loader(batches, last_step=5, per_step=4, rank=r, world=world)) for r in range(world)]
        assert all(equal(a, b) for a, b in zip([b for group in zip(*ranks) for b in group], whole, strict=True))
    later = list(Loader(batches, 3, last_step=5, per_step=4, rank=1, world=2))
    assert [b.ids for b in later] == [b.ids for b in whole[13::2]]


def test_the_loader_takes_stored_batches_too():
    items = [Item(str(k), "v", torch.randn(50 + k, 80)) for k in range(12)]
    batches = BucketBatches(items, batch_seconds=2, seed=0)
    with Loader(batches, 2, last_step=9, workers=2) as loader:
        assert all(equal(a, batches.at_step(k)) for k, a in enumerate(loader, 2)) and loader.count == 7


class Troubled:
    "Batches of which one raises, kills its process, or is slow."

    def __init__(self, what):
        self.what = what

    def at_step(self, step):
        if step == 3 and self.what == "raises":
            raise ZeroDivisionError("a bug")
        if step == 3 and self.what == "refuses":
            raise EsslError("A sentence of ours.")
        if step == 3 and self.what == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.what == "slow":
            time.sleep(0.05)
        return BucketBatches([Item(str(step), "v", torch.zeros(50, 80))], seed=0).at_step(0)


def children():
    return [p for p in psutil.Process().children(recursive=True) if "resource_tracker" not in " ".join(p.cmdline())]


@pytest.mark.parametrize("what, words", [("raises", "Batch 3 cannot be made: ZeroDivisionError: a bug"), ("refuses", "^A sentence of ours.$"), ("dies", "was killed.*fewer workers")])
def test_an_error_in_a_worker_and_its_death_arrive_as_one_sentence_and_leave_no_process(what, words):
    before = {p.pid for p in children()}
    handler = signal.getsignal(signal.SIGCHLD)
    with pytest.raises(EsslError, match=words):
        for _ in Loader(Troubled(what), workers=2, prefetch=1):
            pass
    assert {p.pid for p in children()} <= before and signal.getsignal(signal.SIGCHLD) == handler


def test_workers_leave_signals_to_the_process_that_trains(tmp_path):
    before = {p.pid for p in children()}
    with Loader(Troubled("slow"), workers=2) as loader:
        next(loader)
        mine = [p for p in children() if p.pid not in before]
        for p in mine:
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
                p.send_signal(number)
        assert len(mine) == 2 and [next(loader).ids for _ in range(6)] == [[str(k)] for k in range(1, 7)]
    assert not [p for p in children() if p.pid not in before] and not any(p.is_running() for p in mine)


def test_waiting_is_measured():
    shares = {}
    for workers in (0, 2):
        with Loader(Troubled("slow"), workers=workers) as loader:
            next(loader)
            time.sleep(0.3)  # two workers make several batches meanwhile
            loader.waiting_share()
            for _ in range(8):
                next(loader)
                time.sleep(0.1)
            shares[workers] = loader.waiting_share()
            assert loader.waited > 0.05 * (1 if workers else 9)
    assert 0.2 < shares[0] < 0.6 and shares[2] < shares[0] / 2


@pytest.mark.parametrize("wrong", [dict(workers=-1), dict(rank=2, world=2), dict(per_step=3, world=2), dict(prefetch=0), dict(first_step=-1)])
def test_a_loader_that_cannot_be_is_refused(wrong):
    with pytest.raises(EsslError, match="they need"):
        Loader(Troubled(""), **wrong)


# ---- a sample to learn targets from

def test_a_sample_has_the_frames_of_its_clips_and_is_made_once(tmp_path):
    index = open_index(recordings(tmp_path / "r", 24), split="train")
    a = sampled_features(index, hours=10 / 3600, progress=False)
    assert 1000 <= sum(a.lengths.values()) < 1300 and isinstance(a.frames, np.memmap)
    places = {c.id: i for i, c in enumerate(index)}
    assert torch.allclose(a[a.ids[0]], log_mel_long(index.read(places[a.ids[0]])), atol=2e-2)
    frames = torch.cat([a[i] for i in a.ids])
    assert torch.allclose(a.mean, frames.mean(0), atol=1e-3) and torch.allclose(a.std, frames.std(0), rtol=1e-2)
    for p in (tmp_path / "r").iterdir():
        p.unlink()
    assert sampled_features(index, hours=10 / 3600, progress=False).ids == a.ids
    with pytest.raises(EsslError, match="None of"):
        sampled_features(index, hours=1, seed=2, progress=False)


def test_stored_features_are_mapped_and_not_read_into_memory(tmp_path):
    index = open_index(recordings(tmp_path / "r", 6), split="train")
    a = sampled_features(index, hours=1, progress=False)
    assert a.half(a.ids[2]).data_ptr() == a.frames.ctypes.data + a.starts[a.ids[2]] * 160
