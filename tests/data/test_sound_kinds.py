"""Sound of every kind that folders hold: as much is read as there is, at the scale it has; what cannot be read is named."""
import os
import struct
import subprocess
import sys
import warnings

import numpy as np
import pytest
import soundfile
import torch

from essl_nb.core.registry import EsslError
from essl_nb.data import containers
from essl_nb.data.audio import LogMelSpec, audio_seconds, check_audio, load_audio, log_mel, log_mel_long, mel_filters
from essl_nb.data.corpus import load_corpus

rng = np.random.default_rng(0)
NOISE = (0.1 * rng.standard_normal(32000)).astype("f4")
LOUD_LATER = NOISE * np.repeat([0.01, 1.0], 16000).astype("f4")  # a VBR coder spends little on the beginning


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("ESSL_CACHE", str(tmp_path_factory.mktemp("cache")))


def written(path, x=NOISE, rate=16000, **kw):
    soundfile.write(path, x, rate, **kw)
    return path.read_bytes()


def lasts(path):
    "Seconds, which decoding and the container have to agree about."
    decoded = len(load_audio(path)) / 16000
    assert abs(audio_seconds(path)[0] - decoded) < 0.001
    return decoded


def test_mp3_with_and_without_its_announcement(tmp_path):
    whole = written(tmp_path / "a.mp3", LOUD_LATER, bitrate_mode="VARIABLE")
    frames, lost = containers.mp3_frames(whole)
    assert not lost and lasts(tmp_path / "a.mp3") == 2.0
    second = frames[1].place
    for name, data, seconds in [("bare", whole[second:], 2.0), ("twice", whole + whole, 4.0), ("then bare", whole + whole[second:], 4.0), ("begins within a frame", whole[second + 50 :], 1.96),
                                ("ID3 before and behind", b"ID3\x04\0\0\0\0\x07\x76" + bytes(1014) + whole + b"TAG" + bytes(125), 2.0),
                                ("too few announced", whole.replace(struct.pack(">I", len(frames) - 1), struct.pack(">I", 20), 1), 2.0)]:
        (tmp_path / "b.mp3").write_bytes(data)
        assert seconds <= lasts(tmp_path / "b.mp3") < seconds + 0.15, name
    for data, words in [(whole[: len(whole) // 2], "cut short"), (whole.replace(struct.pack(">I", len(frames) - 1), struct.pack(">I", 500), 1), "cut short"),
                        (whole[: frames[9].place + 4] + bytes(2000) + whole[frames[9].place + 4 :], "between its MP3 frames"), (whole[: frames[1].place], "no samples|cut short")]:
        (tmp_path / "b.mp3").write_bytes(data)
        with pytest.raises(EsslError, match=words):
            load_audio(tmp_path / "b.mp3")


@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24", "FLOAT", "PCM_U8"])
@pytest.mark.parametrize("said, seconds", [(0, 2.0), (0xFFFFFFFF, 2.0), (0x7FFFFFFF, 2.0), (8000, None), (10**6, None)])
def test_wav_whose_length_is_not_known_or_wrong(tmp_path, subtype, said, seconds):
    data = written(tmp_path / "a.wav", subtype=subtype)
    place = data.index(b"data") + 4
    (tmp_path / "a.wav").write_bytes(data[:place] + struct.pack("<I", said) + data[place + 4 :])
    if seconds is None:
        with pytest.raises(EsslError, match="cut short|more than its header"):
            load_audio(tmp_path / "a.wav")
    else:
        assert lasts(tmp_path / "a.wav") == seconds


def test_wav_with_other_chunks_and_without_sound(tmp_path):
    data = written(tmp_path / "a.wav")
    extra = b"LIST" + struct.pack("<I", 26) + b"INFOISFT" + struct.pack("<I", 14) + b"a sound editor"
    (tmp_path / "a.wav").write_bytes(data[:36] + extra + data[36:] + extra + b"id3 " + struct.pack("<I", 3) + b"abc\0")
    assert lasts(tmp_path / "a.wav") == 2.0
    (tmp_path / "a.wav").write_bytes(data[:40] + struct.pack("<I", 0) + extra)
    with pytest.raises(EsslError, match="no samples"):
        load_audio(tmp_path / "a.wav")
    (tmp_path / "a.wav").write_bytes(data[:24] + struct.pack("<I", 48000) + data[28:])  # a rate that does not fit the bytes a second
    with pytest.raises(EsslError, match="contradicts itself"):
        load_audio(tmp_path / "a.wav")


@pytest.mark.parametrize("suffix, kw", [("ogg", {}), ("opus", dict(format="OGG", subtype="OPUS")), ("flac", {}), ("wav", {}), ("aiff", {})])
def test_files_joined_in_one(tmp_path, suffix, kw):
    data = written(tmp_path / f"a.{suffix}", **kw)
    (tmp_path / f"b.{suffix}").write_bytes(data + written(tmp_path / f"c.{suffix}", NOISE[:16000] / 2, **kw) + data)
    assert lasts(tmp_path / f"b.{suffix}") == 5.0
    first = load_audio(tmp_path / f"a.{suffix}")
    joined = load_audio(tmp_path / f"b.{suffix}")
    assert torch.equal(joined[:32000], first) and torch.equal(joined[48000:], first)


def test_flac_says_when_it_was_changed(tmp_path):
    data = bytearray(written(tmp_path / "a.flac"))
    assert np.array_equal(load_audio(tmp_path / "a.flac").numpy(), soundfile.read(tmp_path / "a.flac", dtype="float32")[0])
    for bits in (8, 24):
        soundfile.write(tmp_path / "b.flac", NOISE, 16000, subtype={8: "PCM_S8", 24: "PCM_24"}[bits])
        assert np.array_equal(load_audio(tmp_path / "b.flac").numpy(), soundfile.read(tmp_path / "b.flac", dtype="float32")[0])
    few = bytes(data[:22]) + struct.pack(">I", 20000) + bytes(data[26:])
    (tmp_path / "few.flac").write_bytes(few)
    with pytest.raises(EsslError, match="MD5|damaged"):
        load_audio(tmp_path / "few.flac")
    (tmp_path / "none.flac").write_bytes(bytes(data[:22]) + bytes(4) + bytes(data[26:]))
    with pytest.raises(EsslError, match="how long|damaged|cut short"):
        load_audio(tmp_path / "none.flac")


def test_ogg_says_when_it_was_changed(tmp_path):
    data = written(tmp_path / "a.ogg")
    pages = containers.ogg_pages(data)
    for bad, words in [(data[: pages[-1].place], "cut short"), (data[: len(data) - 9], "cut short"), (data[: pages[2].place] + data[pages[3].place :], "missing|cut short"),
                       (data[:-50] + bytes([data[-50] ^ 1]) + data[-49:], "checksum"), (data + b"junk" * 99, "no Ogg page")]:
        (tmp_path / "b.ogg").write_bytes(bad)
        with pytest.raises(EsslError, match=words):
            audio_seconds(tmp_path / "b.ogg")


@pytest.mark.parametrize("suffix, kw", [
    ("aiff", {}), ("aif", dict(format="AIFF", subtype="FLOAT")), ("au", {}), ("sph", dict(format="NIST")), ("oga", dict(format="OGG")), ("wav", dict(subtype="PCM_U8")),
    ("wav", dict(subtype="IMA_ADPCM")), ("wav", dict(subtype="MS_ADPCM")), ("wav", dict(subtype="GSM610")), ("wav", dict(subtype="ULAW")), ("wav", dict(subtype="DOUBLE")),
    ("wav", dict(format="WAVEX")), ("wav", dict(format="RF64")), ("wav", dict(format="NIST")), ("mp3", dict(format="WAV")), ("wav", dict(format="FLAC")), ("flac", dict(format="MP3")),
])
def test_formats_whatever_they_are_called(tmp_path, suffix, kw):
    data = written(tmp_path / f"a.{suffix}", **kw)
    assert 1.99 < lasts(tmp_path / f"a.{suffix}") < 2.1
    (tmp_path / f"b.{suffix}").write_bytes(data[: len(data) * 2 // 3])
    if kw.get("format") not in ("RF64",):
        with pytest.raises(EsslError):
            load_audio(tmp_path / f"b.{suffix}")
    assert list(load_corpus(tmp_path).by_id)[0] == "a" if kw.get("format") != "RF64" else True


@pytest.mark.parametrize("rate", [1000, 8000, 11025, 22050, 44100, 48000, 96000, 192000, 384000])
def test_rates(tmp_path, rate):
    x = np.sin(2 * np.pi * 200 * np.arange(rate) / rate)
    written(tmp_path / "a.wav", 0.5 * x, rate)
    wav = load_audio(tmp_path / "a.wav")
    assert abs(len(wav) - 16000) <= 1 and abs(wav[4000:12000].abs().max() - 0.5) < 0.01
    with pytest.raises(EsslError, match="samples per second"):
        written(tmp_path / "b.wav", 0.5 * x, 500)
        load_audio(tmp_path / "b.wav")


def test_channels_are_averaged_and_may_not_cancel(tmp_path):
    left, right = NOISE, 0.1 * rng.standard_normal(32000).astype("f4")
    written(tmp_path / "a.wav", np.stack([left, right], 1), subtype="FLOAT")
    assert torch.allclose(load_audio(tmp_path / "a.wav"), torch.from_numpy((left + right) / 2))
    written(tmp_path / "six.wav", np.stack([left] * 6, 1), subtype="FLOAT")
    assert torch.allclose(load_audio(tmp_path / "six.wav"), torch.from_numpy(left))
    written(tmp_path / "b.wav", np.stack([left, -left], 1))
    with pytest.raises(EsslError, match="cancel each other"):
        load_audio(tmp_path / "b.wav")


@pytest.mark.parametrize("peak", [1.0, 1.5, 12.0])
def test_float_samples_keep_their_scale(tmp_path, peak):
    x = (peak * NOISE / np.abs(NOISE).max()).astype("f4")
    written(tmp_path / "a.wav", x, subtype="FLOAT")
    assert np.array_equal(load_audio(tmp_path / "a.wav").numpy(), x)


def test_constant_and_silent_sound_gives_finite_frames(tmp_path):
    written(tmp_path / "dc.wav", np.full(16000, 0.5))
    written(tmp_path / "zero.wav", np.zeros(16000))
    written(tmp_path / "noise.wav")
    with pytest.warns(UserWarning, match="1 clips are silent: zero"):
        features = load_corpus(tmp_path).features(progress=False)
    assert all(torch.isfinite(features[i]).all() for i in features.ids) and (features["zero"].max() - np.log(1e-8)) < 0.01


def test_links_are_followed_once(tmp_path):
    for name in ("disk/a", "disk/b", "corpus/own/c"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        written(tmp_path / f"{name}.wav", NOISE * rng.random())
    corpus = tmp_path / "corpus"
    links = {"speaker": tmp_path / "disk", "again": tmp_path / "disk", "above": corpus, "own/loop": corpus / "own", "one.wav": tmp_path / "disk" / "a.wav", "c2.wav": corpus / "own" / "c.wav", "gone.wav": tmp_path / "absent.wav"}
    for name, target in links.items():
        os.symlink(target, corpus / name)
    with pytest.warns(UserWarning, match="left out") as said:
        found = load_corpus(corpus)
    assert sorted(found.by_id) == ["again/a", "again/b", "own/c"]
    assert {k: v.split(" is a link ")[1] for k, v in found.left_out.items()} == {"one.wav": "to a file that is in the corpus already.", "c2.wav": "to a file that is in the corpus already.", "gone.wav": "that leads nowhere."}
    assert len([w for w in said if "left out" in str(w.message)]) == 1


def test_odd_names(tmp_path):
    names = ["a b.wav", "quote'\"s.wav", "comma,semi;.wav", "newline\n.wav", "ünïcode-日本語-🎧.wav", "e\u0301.wav", "UPPER.WAV", "two.dots.wav", "-dash.wav", "{brace}.wav", "%d.wav", ".hidden.wav"]
    for n, name in enumerate(names):
        written(tmp_path / name, NOISE * (n + 1) / 20)
    if sys.platform == "linux":
        (tmp_path / os.fsdecode(b"caf\xe9.wav")).write_bytes((tmp_path / "a b.wav").read_bytes())
        names.append("caf\\xe9.wav")
    corpus = load_corpus(tmp_path)
    assert set(corpus.by_id) == {n.rsplit(".", 1)[0] for n in names if not n.startswith(".")}
    assert len(corpus.features(progress=False)) == len(corpus) and load_corpus(tmp_path).data_hash == corpus.data_hash


def test_what_is_not_read_is_named(tmp_path):
    written(tmp_path / "good.wav")
    for name in ("talk.m4a", "film.mp4", "voice.amr", "fake.au", "text.wav", "notes.txt"):
        (tmp_path / name).write_text("something\n" * 500)
    os.mkfifo(tmp_path / "pipe.wav") if hasattr(os, "mkfifo") else None
    with pytest.warns(UserWarning, match="5 of 6 clips"):
        corpus = load_corpus(tmp_path)
    assert list(corpus.by_id) == ["good"] and set(corpus.left_out) == {"talk.m4a", "film.mp4", "voice.amr", "fake", "text"} and "ffmpeg" in corpus.left_out["talk.m4a"]
    (tmp_path / "good.wav").unlink()
    with pytest.raises(EsslError, match="No sound.*talk.m4a"):
        load_corpus(tmp_path)


def test_files_that_vanish(tmp_path):
    for n in range(4):
        written(tmp_path / f"{n}.wav", NOISE * (n + 1) / 10)
    corpus = load_corpus(tmp_path)
    (tmp_path / "2.wav").unlink()
    with pytest.warns(UserWarning, match="1 of 4 clips.*2.wav"):
        features = corpus.features(progress=False)
    assert "2" not in corpus and "2" not in features and len(corpus) == 3 and list(corpus.left_out) == ["2"]


@pytest.mark.skipif(os.name == "nt" or os.getuid() == 0, reason="files that this user may not read")
def test_files_that_may_not_be_read(tmp_path):
    written(tmp_path / "a.wav")
    written(tmp_path / "b.wav")
    (tmp_path / "closed").mkdir(mode=0)
    (tmp_path / "b.wav").chmod(0)
    with pytest.warns(UserWarning, match="2 of 3"):
        corpus = load_corpus(tmp_path)
    assert set(corpus.left_out) == {"b", "closed"}
    (tmp_path / "b.wav").chmod(0o644)
    assert "b" in load_corpus(tmp_path)


def test_a_damaged_clip_leaves_the_corpus_and_its_selections(tmp_path):
    for n in range(12):
        written(tmp_path / f"{n}.flac", NOISE * (n + 1) / 20)
    corpus = load_corpus(tmp_path)
    data = bytearray((tmp_path / "5.flac").read_bytes())
    data[30] ^= 1  # the MD5 sum
    (tmp_path / "5.flac").write_bytes(data)
    corpus = load_corpus(tmp_path)
    part, hash = corpus.select(split=corpus["5"].split), corpus.data_hash
    with pytest.warns(UserWarning, match="1 of 12 clips.*5.flac is damaged"):
        part.features(progress=False)
    assert "5" not in corpus and "5" not in part and len(corpus) == 11 and corpus.data_hash == hash and "MD5" in corpus.left_out["5"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once is enough
        corpus.features(progress=False)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_log_mel_whatever_the_default_dtype_is(tmp_path, dtype):
    wav = torch.from_numpy(NOISE)[None]
    truth = log_mel(wav)[0]
    written(tmp_path / "a.wav")
    stored = load_corpus(tmp_path).features(progress=False)
    torch.set_default_dtype(dtype)
    try:
        mel, frames = log_mel(wav)
        assert mel.dtype == torch.float32 and torch.equal(mel, truth) and frames.dtype == torch.int64
        assert mel_filters(LogMelSpec()).dtype == torch.float32 and torch.equal(log_mel_long(wav[0]), truth[0])
        again = load_corpus(tmp_path).features(progress=False)
        assert again.mean.dtype == torch.float32 and torch.equal(again.mean, stored.mean) and again.path == stored.path
        assert check_audio(load_audio(tmp_path / "a.wav")).dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_filters_do_not_keep_the_mode_of_their_first_caller():
    code = """
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from essl_nb.data.audio import log_mel
wav = 0.1 * torch.randn(1, 16000)
with FakeTensorMode():
    log_mel(torch.zeros(1, 16000))
with torch.inference_mode():
    log_mel(wav)
make_fx(lambda x: log_mel(x)[0], tracing_mode="fake")(wav)
with torch.device("meta"):
    assert log_mel(torch.zeros(1, 16000))[0].device.type == "meta"
class M(torch.nn.Module):
    def forward(self, x):
        return log_mel(x)[0]
exported = torch.export.export(M(), (wav,)).module()
x = wav.clone().requires_grad_()
mel = log_mel(x)[0]
mel.sum().backward()
assert type(mel) is torch.Tensor and torch.isfinite(x.grad).all() and torch.allclose(exported(wav), mel, atol=1e-4)
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-1500:]


def test_log_mel_is_traced_whole():
    wav = 0.1 * torch.randn(2, 8000)
    lengths = torch.tensor([8000, 5000])
    whole = torch.compile(log_mel, fullgraph=True, backend="eager")
    assert torch.allclose(whole(wav, lengths)[0], log_mel(wav, lengths)[0], atol=1e-5)


@pytest.mark.parametrize("wav, lengths, words", [
    (torch.zeros(16000), None, r"shape \(16000,\)"), (torch.zeros(1, 1, 16000), None, r"shape \(1, 1, 16000\)"), (np.zeros((1, 16000)), None, "ndarray"),
    (torch.zeros(1, 16000, dtype=torch.int16), None, "int16"), (torch.zeros(2, 16000), torch.tensor([1.0, 0.5]), "float32.*relative lengths times N"),
    (torch.zeros(2, 16000), [16000, 8000], "list"), (torch.zeros(2, 16000), torch.tensor([16000]), r"shape \(1,\)"),
    (torch.zeros(2, 16000), torch.tensor([16000, 16001]), "16001 samples, the waveforms have 16000"), (torch.zeros(2, 16000), torch.tensor([16000, -1]), "from -1"),
])
def test_log_mel_says_what_it_takes(wav, lengths, words):
    with pytest.raises(EsslError, match=words):
        log_mel(wav, lengths)


def test_log_mel_of_nothing_and_of_little():
    assert log_mel(torch.zeros(0, 16000))[0].shape == (0, 100, 80) and log_mel(torch.zeros(2, 100))[0].shape == (2, 0, 80)
