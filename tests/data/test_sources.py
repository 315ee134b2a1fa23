"""Cuts of lhotse and data sets of Hugging Face become corpora with their own splits, texts, voices and phones, and nothing that is whole is copied."""
import numpy as np
import pytest
import soundfile

from essl_nb.core.registry import EsslError
from essl_nb.data.audio import load_audio
from essl_nb.data.sources import corpus_from_dataset, corpus_from_lhotse


@pytest.fixture
def tones(tmp_path):
    "Three files of one second, of three tones."
    t = np.arange(16000) / 16000
    for i in range(3):
        soundfile.write(tmp_path / f"{i}.wav", (0.1 * np.sin(2 * np.pi * 200 * (i + 1) * t)).astype("float32"), 16000, subtype="FLOAT")
    return [tmp_path / f"{i}.wav" for i in range(3)]


@pytest.fixture
def cuts(tones):
    lhotse = pytest.importorskip("lhotse")
    from lhotse.supervision import AlignmentItem

    made = []
    for i, path in enumerate(tones):
        recording = lhotse.Recording.from_file(path)
        word = lhotse.SupervisionSegment(f"s{i}", recording.id, 0, 1, text=f"tone {i}", language="en", speaker=f"v{i % 2}", alignment={"phone": [AlignmentItem("AA", 0.1, 0.4), AlignmentItem("S", 0.5, 0.25)]})
        made.append(lhotse.MonoCut(f"c{i}", 0, 1, 0, recording=recording, supervisions=[word], custom={"split": ("train", "valid", "test")[i]}))
    return lhotse.CutSet.from_cuts(made)


def test_whole_cuts_are_their_files(cuts, tones):
    corpus = corpus_from_lhotse(cuts)
    assert [u.path for u in corpus] == tones and [u.split for u in corpus] == ["train", "valid", "test"]
    assert [(u.text, u.voice, u.language) for u in corpus] == [("tone 0", "v0", "en"), ("tone 1", "v1", "en"), ("tone 2", "v0", "en")]
    assert [tuple(p)[:3] for p in corpus["c0"].phones] == [("AA", 0.1, 0.5), ("S", 0.5, 0.75)]


def test_a_part_a_change_and_a_mixture_sound_as_lhotse_makes_them(cuts, tones):
    first = cuts["c0"]
    odd = [first.truncate(offset=0.25, duration=0.5, preserve_id=False), first.perturb_speed(1.1), first.mix(cuts["c1"], snr=10)]
    corpus = corpus_from_lhotse(odd)
    for u, cut in zip(corpus, odd, strict=True):
        theirs = cut.load_audio()[0]
        assert u.path not in tones and abs(u.seconds - cut.duration) < 1e-3
        np.testing.assert_allclose(load_audio(u.path).numpy(), theirs, atol=1e-6)


def test_phones_are_where_they_sound(cuts):
    part, sped, after = cuts["c0"].truncate(offset=0.25, duration=0.4, preserve_id=False), cuts["c0"].perturb_speed(2.0), cuts["c0"].pad(1.5).append(cuts["c1"])
    of = lambda cut: [tuple(p)[:3] for p in corpus_from_lhotse([cut])[0].phones]
    assert of(part) == [("AA", 0.0, 0.25), ("S", 0.25, 0.4)]
    assert of(part.append(part.with_id("again"))) == [("AA", 0.0, 0.25), ("S", 0.25, 0.4), ("AA", 0.4, 0.65), ("S", 0.65, 0.8)]
    assert of(sped) == [("AA", 0.05, 0.25), ("S", 0.25, 0.375)]
    assert of(after) == [("AA", 0.1, 0.5), ("S", 0.5, 0.75), ("AA", 1.6, 2.0), ("S", 2.0, 2.25)]


def test_where_two_voices_speak_at_once_there_are_no_phones(cuts):
    mixed = cuts["c0"].mix(cuts["c1"], snr=10)
    with pytest.warns(UserWarning, match=f"1 of 2 cuts.*{mixed.id}"):
        corpus = corpus_from_lhotse([cuts["c2"], mixed])
    assert [len(u.phones or ()) for u in corpus] == [2, 0] and corpus[mixed.id].text == "tone 0 tone 1"


def test_a_data_set_with_files_bytes_and_splits(tones):
    datasets = pytest.importorskip("datasets")
    columns = {"audio": [str(p) for p in tones], "sentence": ["a", "b", "c"], "client_id": ["x", "y", "x"], "locale": ["en"] * 3}
    whole = datasets.Dataset.from_dict(columns).cast_column("audio", datasets.Audio())
    corpus = corpus_from_dataset(datasets.DatasetDict(train=whole.select([0]), validation=whole.select([1]), test=whole.select([2])))
    assert [(u.split, u.text, u.voice, u.language) for u in corpus] == [("train", "a", "x", "en"), ("valid", "b", "y", "en"), ("test", "c", "x", "en")]
    stored = datasets.Dataset.from_dict({"audio": [{"bytes": p.read_bytes(), "path": p.name} for p in tones]}).cast_column("audio", datasets.Audio(decode=False))
    for data in (stored, stored.to_iterable_dataset()):
        for u, path in zip(corpus_from_dataset(data), tones, strict=True):
            assert u.path.read_bytes() == path.read_bytes()


def test_other_columns_can_be_named_and_wrong_ones_are_answered(tones):
    rows = [{"sound": str(p), "reader": "r"} for p in tones]
    assert {u.voice for u in corpus_from_dataset(rows, audio="sound", columns={"voice": "reader"})} == {"r"}
    for kw, words in ((dict(), "sound, reader"), (dict(audio="sound", columns={"voice": "who"}), "who were asked for"), (dict(audio="sound", columns={"speaker": "reader"}), "a corpus knows")):
        with pytest.raises(EsslError, match=words):
            corpus_from_dataset(rows, **kw)
    with pytest.raises(EsslError, match="is no cut"):
        corpus_from_lhotse(rows)
    with pytest.raises(EsslError, match="a path, a dict of bytes"):
        corpus_from_dataset([{"audio": 3}])
