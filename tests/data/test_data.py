"""Sound, corpora, features and batches: what is read, what is refused, what is padded, what comes back after a restart."""

import csv
import os
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import torch

from essl_nb.core.registry import EsslError
from essl_nb.data.audio import LogMelSpec, check_audio, load_audio, log_mel, log_mel_long, mel_filters
from essl_nb.data.batches import BucketBatches, Item, PackedBatches, cut_clip
from essl_nb.data.corpus import load_corpus, split_of
from essl_nb.data.features import compute_features

FORMATS = {"wav": {}, "flac": {}, "ogg": {}, "opus": dict(format="OGG", subtype="OPUS"), "mp3": {}}


def tone(seconds=1.0, rate=16000, channels=1, hz=440):
    t = np.arange(int(seconds * rate)) / rate
    return np.stack([0.4 * np.sin(2 * np.pi * hz * t)] * channels, 1)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ESSL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def bundled():
    return load_corpus("bundled")


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("rate, channels", [(16000, 1), (8000, 1), (48000, 2)])
def test_any_format_rate_and_channels(tmp_path, suffix, rate, channels):
    path = tmp_path / f"a.{suffix}"
    soundfile.write(path, tone(1.0, rate, channels), rate, **FORMATS[suffix])
    wav = load_audio(path)
    assert wav.dtype == torch.float32 and wav.ndim == 1 and abs(len(wav) - 16000) <= 2
    middle = wav[4000:12000]
    peak = torch.fft.rfft(middle).abs().argmax() * 16000 / len(middle)
    assert abs(peak - 440) < 4 and 0.3 < middle.abs().max() < 0.5


def test_a_long_mp3_is_decoded_without_a_seam(tmp_path):
    "soundfile seeks between reads, and a seek in an MP3 misses its place: the samples must be those of one read."
    path, rng = tmp_path / "long.mp3", np.random.default_rng(0)
    soundfile.write(path, 0.1 * rng.standard_normal(65 * 16000), 16000, format="MP3")
    with soundfile.SoundFile(path) as f:
        whole = f.read(dtype="float32")
    assert np.array_equal(load_audio(path).numpy(), whole)


def test_96_khz_stereo(tmp_path):
    soundfile.write(tmp_path / "a.wav", tone(2, 96000, 2), 96000)
    assert load_audio(tmp_path / "a.wav").shape == (32000,)


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("share", [0.9, 0.5, 0.02])
def test_cut_short_is_refused(tmp_path, suffix, share):
    path = tmp_path / f"a.{suffix}"
    rng = np.random.default_rng(0)
    soundfile.write(path, tone(5) + 0.02 * rng.standard_normal((80000, 1)), 16000, **FORMATS[suffix])
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(EsslError, match="cut short|not audio"):
        load_audio(path)


def bad_files(folder):
    soundfile.write(folder / "nan.wav", np.array([0.1, np.nan] * 8000), 16000, subtype="FLOAT")
    soundfile.write(folder / "loud.wav", 30000 * tone(), 16000, subtype="FLOAT")
    soundfile.write(folder / "none.wav", np.zeros((0, 1)), 16000)
    soundfile.write(folder / "hour.wav", np.zeros(3600 * 8000, np.int16), 8000, subtype="PCM_U8")
    (folder / "empty.wav").write_bytes(b"")
    (folder / "text.wav").write_text("this is not sound\n" * 100)
    (folder / "noise.mp3").write_bytes(np.random.default_rng(0).bytes(20000))
    return {"nan.wav": "NaN", "loud.wav": "full scale", "none.wav": "no samples", "hour.wav": "less than an hour",
            "empty.wav": "empty", "text.wav": "not audio", "noise.mp3": "not audio", "absent.wav": "no file"}


def test_bad_files_get_one_sentence(tmp_path):
    for name, words in bad_files(tmp_path).items():
        with pytest.raises(EsslError, match=words) as e:
            load_audio(tmp_path / name)
        assert name in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("wav, words", [
    (torch.zeros(16000), "silent"), (torch.ones(800), "0.05 s"), (torch.full((16000,), float("nan")), "NaN"),
    (torch.ones(1).expand(3600 * 16000), "less than an hour"), (torch.ones(2, 16000), "one channel"),
])
def test_check_audio(wav, words):
    with pytest.raises(EsslError, match=words):
        check_audio(wav)


def test_log_mel_equals_torchaudio():
    transforms = pytest.importorskip("torchaudio.transforms")
    theirs = transforms.MelSpectrogram(16000, 512, 400, 160, f_min=20, f_max=8000, n_mels=80, power=2.0, center=True,
                                       pad_mode="constant", mel_scale="htk", norm=None)
    assert torch.allclose(mel_filters(LogMelSpec()), theirs.mel_scale.fb, atol=1e-5)
    for n in (400, 16000, 12345):
        wav = 0.1 * torch.randn(3, n, generator=torch.Generator().manual_seed(n))
        mel, frames = log_mel(wav)
        expected = theirs(wav).clamp(min=1e-8).log().transpose(1, 2)[:, : n // 160]
        assert mel.shape == (3, n // 160, 80) and frames.tolist() == [n // 160] * 3
        assert torch.allclose(mel, expected, atol=1e-3)


def test_log_mel_obeys_the_padding_law():
    g = torch.Generator().manual_seed(0)
    lengths = torch.tensor([16000, 15999, 8001, 400, 159])
    wav = torch.full((5, 16000), float("nan"))
    for row, n in zip(wav, lengths):
        row[:n] = 0.1 * torch.randn(int(n), generator=g)
    wav.requires_grad_()
    mel, frames = log_mel(wav, lengths)
    assert frames.tolist() == [100, 99, 50, 2, 0] and torch.isfinite(mel).all()
    for b, (n, t) in enumerate(zip(lengths.tolist(), frames.tolist())):
        assert torch.allclose(mel[b, :t], log_mel(wav[b : b + 1, :n].detach())[0][0], atol=1e-5) and (mel[b, t:] == 0).all()
    mel.sum().backward()
    for b, n in enumerate(lengths.tolist()):
        assert torch.isfinite(wav.grad[b, :n]).all() and (wav.grad[b, n:] == 0).all()


def test_log_mel_in_pieces_and_under_autocast():
    wav = 0.1 * torch.randn(40000, generator=torch.Generator().manual_seed(0))
    whole = log_mel(wav[None])[0][0]
    for block in (1, 7, 100, 250, 1000):
        assert torch.allclose(log_mel_long(wav, block=block), whole, atol=1e-5)
    assert log_mel_long(wav[:100]).shape == (0, 80)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(log_mel(wav[None])[0][0], whole)


def test_bundled_corpus(bundled):
    corpus = bundled
    assert len(corpus) == 7802 and 5.5 < corpus.hours < 5.7 and len(corpus.languages) == 9
    u = corpus["fvr_ru_0001"]
    assert u.text and u.language == "ru" and u.voice and u.split in ("train", "valid", "test") and u.path.is_file()
    assert u.phones[0].origin == "festvox" and u.phones[0].start == 0 and u.phones[-1].end <= u.seconds + 0.1
    assert {p.origin for v in corpus if v.phones for p in v.phones} == {"festvox", "aligned"}
    test = corpus.select(split="test", part="readru")
    assert len(test) == 70 and test.whole is corpus and all(v.split == "test" for v in test)
    assert len(corpus.select(language=["fr", "ru"])) == sum(v.language in ("fr", "ru") for v in corpus)


def test_wrong_names(bundled):
    with pytest.raises(EsslError, match="bundled"):
        load_corpus("no-such-corpus")
    with pytest.raises(EsslError, match="language 'xx'.*ru"):
        bundled.select(language="xx")
    with pytest.raises(EsslError, match="fvr_ru_0001"):
        bundled["fvr_ru_000"]


def test_folder_of_anything(tmp_path):
    for n, (suffix, options) in enumerate(FORMATS.items()):
        (tmp_path / "deep").mkdir(exist_ok=True)
        soundfile.write(tmp_path / "deep" / f"clip{n}.{suffix}", tone(1, 24000, 2), 24000, **options)
    soundfile.write(tmp_path / "deep" / "clip0.flac", tone(1), 16000)  # the same name, another suffix
    bad = bad_files(tmp_path)
    soundfile.write(tmp_path / "short.wav", tone(0.05), 16000)
    with pytest.warns(UserWarning, match="left out") as said:
        corpus = load_corpus(tmp_path)
    assert len(said) == 1 and all(name in str(said[0].message) for name in [*bad, "short.wav"] if name != "absent.wav")
    assert [u.id for u in corpus] == ["deep/clip0.flac", "deep/clip0.wav", *(f"deep/clip{n}" for n in range(1, 5))]
    assert {u.split for u in corpus} == {"train", "valid", "test"} and all(abs(u.seconds - 1) < 0.1 for u in corpus)


def test_folder_without_sound(tmp_path):
    with pytest.raises(EsslError, match="No sound"):
        load_corpus(tmp_path)
    (tmp_path / "a.wav").write_text("no")
    with pytest.raises(EsslError, match="No sound.*a.wav"):
        load_corpus(tmp_path)


def test_split_is_a_property_of_the_id():
    draws = [split_of(f"clip{n}") for n in range(2000)]
    assert draws == [split_of(f"clip{n}") for n in range(2000)]
    assert 1540 < draws.count("train") < 1660 and 150 < draws.count("valid") < 250


def write_manifest(folder, rows, name="manifest.csv"):
    with open(folder / name, "w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def test_manifest(tmp_path, cache):
    for n in range(3):
        soundfile.write(tmp_path / f"{n}.wav", tone(0.5 + n, hz=200 * (n + 1)), 16000)
    rows = [dict(id=f"u{n}", path=f"{n}.wav", split=s, lang="eo", speaker="a", text="saluton", mood="good") for n, s in enumerate(["train", "dev", ""])]
    write_manifest(tmp_path, rows)
    write_manifest(tmp_path, [dict(id="u0", phone="s", start="0.1", end="0.2", origin="hand"), dict(id="u0", phone="pau", start="0", end="0.1", origin="hand")], "phones.csv")
    corpus = load_corpus(tmp_path)
    assert [u.seconds for u in corpus] == [0.5, 1.5, 2.5] and [u.split for u in corpus][:2] == ["train", "valid"]
    assert corpus.voices == ["a"] and corpus.languages == ["eo"] and corpus["u0"].extra == {"mood": "good"}
    assert [p.label for p in corpus["u0"].phones] == ["pau", "s"] and corpus["u1"].phones is None
    assert len(load_corpus(tmp_path, manifest=tmp_path / "manifest.csv")) == 3


@pytest.mark.parametrize("rows, words", [
    ([dict(id="a", file="a.wav")], "lacks the column path.*id, file"),
    ([dict(name="a", file="a.wav")], "lacks the columns id, path"),
    ([dict(id="a", path="a.wav"), dict(id="b", path="b.wav"), dict(id="c", path="c.wav")], "2 of 3 files that are not there: b.wav, c.wav"),
    ([dict(id="a", path="a.wav"), dict(id="a", path="a.wav")], "more than once: a"),
    ([dict(id="a", path="a.wav", split="practice")], "split 'practice'.*train, valid, test"),
    ([dict(id="a", path="a.wav", seconds="long")], "duration 'long'"),
    ([dict(id="a", path="")], "no path for a"),
])
def test_faulty_manifests(tmp_path, rows, words):
    soundfile.write(tmp_path / "a.wav", tone(), 16000)
    write_manifest(tmp_path, rows)
    with pytest.raises(EsslError, match=words):
        load_corpus(tmp_path)


def test_manifest_that_is_no_table(tmp_path):
    (tmp_path / "manifest.csv").write_bytes(b"id,path\n")
    with pytest.raises(EsslError, match="no rows"):
        load_corpus(tmp_path)
    (tmp_path / "manifest.csv").write_bytes(b"\xff\xfe\x00id")
    with pytest.raises(EsslError, match="UTF-8"):
        load_corpus(tmp_path)
    with pytest.raises(EsslError, match="no file"):
        load_corpus(tmp_path, manifest=tmp_path / "other.csv")


def test_essl_corpus_variable(tmp_path, monkeypatch):
    import essl_nb.data.corpus as module
    soundfile.write(tmp_path / "a.wav", tone(), 16000)
    write_manifest(tmp_path, [dict(id="a", path="a.wav")])
    monkeypatch.setattr(module, "package", lambda: tmp_path / "site" / "essl_nb")
    monkeypatch.setattr(module, "SAMPLE", tmp_path / "nowhere")
    monkeypatch.delenv("ESSL_CORPUS", raising=False)
    with pytest.raises(EsslError, match="ESSL_CORPUS"):
        load_corpus()
    monkeypatch.setenv("ESSL_CORPUS", str(tmp_path))
    assert len(load_corpus()) == 1
    monkeypatch.delenv("ESSL_CORPUS")
    monkeypatch.setattr(module, "SAMPLE", tmp_path)
    with pytest.warns(UserWarning, match="small sample"):
        assert len(load_corpus()) == 1


@pytest.fixture
def folder(tmp_path, cache):
    (tmp_path / "sound").mkdir()
    for n in range(6):
        soundfile.write(tmp_path / "sound" / f"{n}.wav", tone(0.3 + 0.2 * n, hz=150 * (n + 1)), 16000)
    return tmp_path / "sound"


def test_features_are_computed_once(folder, cache, monkeypatch):
    import essl_nb.data.features as module
    corpus = load_corpus(folder)
    features = corpus.features(progress=False)
    for u in corpus:
        truth = log_mel(load_audio(u.path)[None])[0][0]
        assert features[u.id].dtype == torch.float32 and features.half(u.id).dtype == torch.float16
        assert features[u.id].shape == (features.lengths[u.id], 80) and (features[u.id] - truth).abs().max() < 0.01
    frames = torch.cat([features[u.id] for u in corpus.select(split="train")]).double()
    assert torch.allclose(features.mean.double(), frames.mean(0), atol=1e-4) and torch.allclose(features.std.double(), frames.std(0, correction=0).clamp(min=0.01), atol=1e-3)

    monkeypatch.setattr(module, "compute_features", None)  # computing again would fail
    again = load_corpus(folder)
    assert again.data_hash == corpus.data_hash and again.features(progress=False).path == features.path
    assert again.select(split="train").features(progress=False).path == features.path
    with pytest.raises(EsslError, match="no features of 'other'"):
        features["other"]


def test_features_follow_content(folder, tmp_path):
    first = load_corpus(folder)
    path, hash = first.features(progress=False).path, first.data_hash
    (tmp_path / "moved").mkdir()
    for p in folder.iterdir():
        (tmp_path / "moved" / p.name).write_bytes(p.read_bytes())
    moved = load_corpus(tmp_path / "moved")
    assert moved.data_hash == hash and moved.features(progress=False).path == path
    assert first.features(LogMelSpec(fmin=50.0), progress=False).path != path
    soundfile.write(folder / "0.wav", tone(0.3, hz=999), 16000)
    assert load_corpus(folder).data_hash != hash and load_corpus(folder).features(progress=False).path != path


def test_spoilt_features_are_made_again(folder):
    path = load_corpus(folder).features(progress=False).path
    truth = path.read_bytes()
    for spoilt in (truth[:-100], b""):
        path.write_bytes(spoilt)
        assert load_corpus(folder).features(progress=False).path.read_bytes() == truth
    path.with_suffix(".json").write_text("{")
    assert len(load_corpus(folder).features(progress=False)) == 6


def test_features_of_bad_and_silent_files(tmp_path):
    (tmp_path / "a.wav").write_text("no")
    soundfile.write(tmp_path / "s.wav", np.zeros(8000), 16000)
    with pytest.raises(EsslError, match="1 of 3 files.*b.wav"):
        compute_features([(n, tmp_path / f"{n}.wav", True) for n in "abs"], tmp_path / "x.f16", progress=False)
    assert not (tmp_path / "x.f16").exists() and not list(tmp_path.glob(".x*"))
    with pytest.warns(UserWarning, match="silent: s"):
        features = compute_features([("s", tmp_path / "s.wav", True)], tmp_path / "x.f16", progress=False)
    assert (features.std >= 0.01).all() and features["s"].shape == (50, 80)


def test_a_killed_computation_leaves_nothing_whole(folder, tmp_path, cache):
    code = ("import os, essl_nb.data.features as f\nfrom essl_nb.data.corpus import load_corpus\n"
            "f.write_json = lambda path, x: os._exit(9) if 'features' in str(path) else None\n"
            f"load_corpus({str(folder)!r}).features(progress=False)")
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 9 and not list((cache / "features").glob("*.json"))
    assert len(load_corpus(folder).features(progress=False)) == 6


def clock_items(n=80, longest=900, seed=0):
    items = []
    for i, T in enumerate(torch.randint(20, longest, (n,), generator=torch.Generator().manual_seed(seed)).tolist()):
        clock = 1000 * i + torch.arange(T)
        targets = dict(clock=clock[::2], pair=torch.stack([clock[::2].float()] * 3, 1))
        items.append(Item(f"c{i}", f"v{i % 4}", clock[:, None].double().expand(T, 2).float(), targets))
    return items


MAKERS = {
    "packed": lambda items, **kw: PackedBatches(items, **{"seed": 0, **kw}),
    "bucket": lambda items, **kw: BucketBatches(items, **{"seed": 0, **kw}),
    "bucket_cut": lambda items, **kw: BucketBatches(items, **{"seed": 0, "max_seconds": 3.0, **kw}),
}


@pytest.mark.parametrize("kind", MAKERS)
def test_batches_hold_what_they_say(kind):
    batches = MAKERS[kind](clock_items())
    count = 0
    for batch in batches:
        B, T, _ = batch.mel.shape
        count += 1
        assert B * T <= 1600 and batch.mel.dtype == torch.float32 and len(batch.ids) == B == len(batch.lengths)
        assert batch.targets["clock"].dtype == torch.int64 and batch.targets["pair"].shape == (B, (T + 1) // 2, 3)
        for b, n in enumerate(batch.lengths.tolist()):
            assert torch.equal(batch.mel[b, :n:2, 0].long(), batch.targets["clock"][b, : (n + 1) // 2])
            assert (batch.mel[b, n:] == 0).all() and (batch.targets["clock"][b, (n + 1) // 2 :] == 0).all()
    assert count == len(batches) and batches.epoch == 1 and batches.index == 0


@pytest.mark.parametrize("kind", MAKERS)
def test_every_epoch_is_another_and_comes_back(kind):
    items = clock_items()
    a, b, other = MAKERS[kind](items), MAKERS[kind](items), MAKERS[kind](items, seed=1)
    state = torch.get_rng_state()
    first, second, again = ([x.ids for x in a] for _ in range(3))
    assert torch.equal(torch.get_rng_state(), state)
    assert first != second and second != again and first != [x.ids for x in other]
    assert [b.at(2, i).ids for i in range(len(b))] == again and b.at_step(len(b) + 1).ids == second[1]


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("steps", ["none", "some", "epoch", "more"])
def test_positions_are_restored(kind, steps):
    items = clock_items(40)
    a, b = MAKERS[kind](items), MAKERS[kind](items)
    n = {"none": 0, "some": 3, "epoch": len(a), "more": len(a) + 2}[steps]

    def forever(batches):
        while True:
            yield from batches

    run = forever(a)
    for _ in range(n):
        next(run)
    b.restore(a.state())
    rest = forever(b)
    for k in range(len(a)):
        x, y = next(run), next(rest)
        assert x.ids == y.ids and torch.equal(x.mel, y.mel) and torch.equal(x.mel, a.at_step(n + k).mel)
    with pytest.raises(EsslError, match="other clips"):
        MAKERS[kind](items[1:]).restore(a.state())
    with pytest.raises(EsslError, match="other clips"):
        MAKERS[kind](items, seed=5).restore(a.state())


def test_packed_uses_each_frame_once_and_reshapes():
    items = clock_items()
    batches = PackedBatches(items, seed=3)
    frames = torch.cat([b.mel[:, :, 0].flatten() for b in batches])
    assert len(frames.unique()) == len(frames) == 1600 * len(batches)
    shapes = {tuple(b.mel.shape[:2]) for e in range(4) for b in (batches.at(e, i) for i in range(len(batches)))}
    assert shapes == {(2, 800), (4, 400), (8, 200)}
    assert len(frames) >= sum(len(x.mel) // 4 * 4 for x in items) - 2 * 1600


def test_bucketed_has_each_clip_once_and_little_padding():
    items = clock_items(400, 1200)
    batches = BucketBatches(items, seed=3)
    assert sorted(i for b in batches for i in b.ids) == sorted(x.id for x in items)
    assert batches.padding_share < 0.15
    long = BucketBatches(clock_items(20, 900), seed=0, batch_seconds=4.0, max_seconds=2.0)
    frames = torch.cat([b.mel[i, :n, 0] for b in long for i, n in enumerate(b.lengths.tolist())])
    assert len(frames.unique()) == len(frames) == sum(len(x.mel) for x in clock_items(20, 900))


def test_cut_clip():
    for frames in (1, 3, 4, 399, 400, 401, 803, 8000):
        chunks = cut_clip(0, frames, 400, 4)
        assert sum(p.frames for p in chunks) == frames and max(p.frames for p in chunks) <= 400 and all(p.start % 4 == 0 for p in chunks)
        assert all(a.start + a.frames == b.start for a, b in zip(chunks, chunks[1:])) and len(chunks) == -(-frames // 400)


@pytest.mark.parametrize("make, words", [
    (lambda: PackedBatches([], seed=0), "no clips"),
    (lambda: BucketBatches([], seed=0), "no clips"),
    (lambda: PackedBatches(clock_items(2, 100), seed=0), "less than one batch of 16 s"),
    (lambda: PackedBatches(clock_items(), seed=0, chunk_seconds=8.03), "cannot be split"),
    (lambda: BucketBatches(clock_items(), seed=0, batch_seconds=4, max_seconds=8), "max_seconds"),
    (lambda: BucketBatches(clock_items(), seed=0, buckets=0), "bucket"),
])
def test_impossible_batches(make, words):
    with pytest.raises(EsslError, match=words):
        make()


def test_padding_of_the_bundled_corpus_is_small(bundled):
    clips = bundled.select(split="train")
    items = [Item(u.id, u.voice, torch.zeros(1, 1).expand(int(u.seconds * 100), 1)) for u in clips]
    assert BucketBatches(items, seed=0).padding_share < 0.12
