"""Tables as people and programs write them: each is read as it is meant, or refused with the line and what to do."""
import os
import warnings

import numpy as np
import pytest
import soundfile

from essl_nb.core.registry import EsslError
from essl_nb.data.corpus import corpus_from_rows, load_corpus
from essl_nb.data.tables import read_table


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("ESSL_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def folder(tmp_path):
    for n in range(4):
        soundfile.write(tmp_path / f"w{n}.wav", 0.1 * np.random.default_rng(n).standard_normal(16000), 16000)
    return tmp_path


def corpus_of(folder, text, phones=None, encoding="utf-8", **kw):
    (folder / "manifest.csv").write_bytes(text.encode(encoding))
    if phones is not None:
        (folder / "phones.csv").write_text("id,phone,start,end\n" + phones)
    return load_corpus(folder, **kw)


ROWS = "u0,w0.wav,train,one\nu1,w1.wav,dev,two\n"
READ = {
    "byte order mark": ("\ufeffid,path,split,text\n" + ROWS, "one"),
    "semicolons": (("id,path,split,text\n" + ROWS).replace(",", ";"), "one"),
    "tabs": (("id,path,split,text\n" + ROWS).replace(",", "\t"), "one"),
    "bars": (("id,path,split,text\n" + ROWS).replace(",", "|"), "one"),
    "capitals and blanks in the header": ("ID, Path ,SPLIT, Text\n" + ROWS, "one"),
    "carriage returns": (("id,path,split,text\n" + ROWS).replace("\n", "\r\n"), "one"),
    "carriage returns alone": (("id,path,split,text\n" + ROWS).replace("\n", "\r"), "one"),
    "lines that end in several ways": ("id,path,split,text\r" + ROWS, "one"),
    "no last newline": (("id,path,split,text\n" + ROWS).strip(), "one"),
    "empty rows": ("id,path,split,text\n\nu0,w0.wav,train,one\n,,,\n\nu1,w1.wav,dev,two\n", "one"),
    "short rows": ("id,path,split,text\nu0,w0.wav,train,one\nu1,w1.wav\n", "one"),
    "empty cells behind the last": ("id,path,split,text\nu0,w0.wav,train,one,,\nu1,w1.wav,dev,two\n", "one"),
    "quoted comma": ('id,path,split,text\nu0,w0.wav,train,"one, two"\nu1,w1.wav,dev,two\n', "one, two"),
    "quoted marks": ('id,path,split,text\nu0,w0.wav,train,"say ""one"""\nu1,w1.wav,dev,two\n', 'say "one"'),
    "marks inside a cell": ('id,path,split,text\nu0,w0.wav,train,say "one"\nu1,w1.wav,dev,two\n', 'say "one"'),
    "a text of several lines": ('id,path,split,text\nu0,w0.wav,train,"one,\ntwo, three, four"\nu1,w1.wav,dev,two\n', "one,\ntwo, three, four"),
    "words for splits": ("id,path,split,text\nu0,w0.wav,Training,one\nu1,w1.wav, Validation ,two\n", "one"),
    "backslashes": ("id,path,split,text\nu0,.\\w0.wav,train,one\nu1,w1.wav,dev,two\n", "one"),
    "a way up and down": ("id,path,split,text\nu0,{up}/w0.wav,train,one\nu1,w1.wav,dev,two\n", "one"),
    "absolute paths": ("id,path,split,text\nu0,{here}/w0.wav,train,one\nu1,w1.wav,dev,two\n", "one"),
    "blanks around cells": ("id,path,split,text\n u0 , w0.wav ,train,one\nu1,w1.wav,dev,two\n", "one"),
    "duration in place of seconds": ("id,path,split,text,duration\nu0,w0.wav,train,one,1.0\nu1,w1.wav,dev,two,1.0\n", "one"),
    "other letters": ("id,path,split,text\nu0,w0.wav,train,двадцать один – «да»\nu1,w1.wav,dev,two\n", "двадцать один – «да»"),
}


@pytest.mark.parametrize("name", READ)
def test_tables_that_are_read(folder, name):
    text, first = READ[name]
    corpus = corpus_of(folder, text.replace("{up}", f"../{folder.name}").replace("{here}", str(folder)))
    assert list(corpus.by_id) == ["u0", "u1"] and corpus["u0"].text == first and corpus["u0"].seconds == 1.0
    assert corpus["u0"].split == "train" and not corpus.left_out and corpus["u0"].path.samefile(folder / "w0.wav")


REFUSED = {
    "a mark that is never closed": ('id,path,split,text\nu0,w0.wav,train,"one\nu1,w1.wav,dev,two\n', "lines 2 to 3.*quotation marks"),
    "a mark that is closed rows later": ('id,path,split,text\nu0,w0.wav,train,"one\nu1,w1.wav,dev,two"\nu2,w2.wav,test,x\n', "line 2: a text in quotation marks goes on over 'u1,w1.wav,dev,two'"),
    "a mark closed too early": ('id,path,split,text\nu0,w0.wav,train,"one" two\nu1,w1.wav,dev,two\n', "line.*2.*quotation marks"),
    "a comma in a text": ("id,path,split,text\nu0,w0.wav,train,one, two\n", "line 2: 5 cells under a header of 4"),
    "a newline in a text": ("id,path,split,text\nu0,w0.wav,train,one\ntwo\n", "no path for two"),
    "columns missing": ("file,text\nw0.wav,one\n", "lacks the columns id, path; it has file, text"),
    "no header": ("u0,w0.wav,train,one\n", "lacks the columns id, path"),
    "a column twice": ("id,path,path\nu0,w0.wav,w1.wav\n", "column 'path' more than once"),
    "ids twice": ("id,path\nu0,w0.wav\nu0 ,w1.wav\n", "more than once: u0"),
    "no id": ("id,path\nu0,w0.wav\n,w1.wav\n", r"1 row.*\(no id\) \(line 3\)"),
    "a file twice": ("id,path\nu0,w0.wav\nu1,w0.wav\n", "in more than one row.*w0.wav"),
    "a file that is not there": ("id,path\nu0,w0.wav\nu1,w9.wav\n", "1 of 2 files that are not there: w9.wav; paths are relative to"),
    "an address": ("id,path\nu0,https://example.org/w0.wav\n", "not there: https"),
    "a path of Windows": ("id,path\nu0,C:\\sound\\w0.wav\n", "not there"),
    "a split of its own": ("id,path,split\nu0,w0.wav,train-clean-100\nu1,w1.wav,train\n", "1 row.*u0 .line 2.: the split 'train-clean-100'.*train, valid, test"),
    "nan": ("id,path,seconds\nu0,w0.wav,nan\n", "u0.*duration 'nan'"), "inf": ("id,path,seconds\nu0,w0.wav,inf\n", "u0.*duration 'inf'"),
    "negative": ("id,path,seconds\nu0,w0.wav,-5\n", "u0.*duration '-5'"), "nothing": ("id,path,seconds\nu0,w0.wav,0\n", "u0.*duration '0'"),
    "a decimal comma": ("id;path;seconds\nu0;w0.wav;1,0\n", "duration '1,0'.*with a point"),
    "a clock": ("id,path,seconds\nu0,w0.wav,00:01\n", "duration '00:01'"),
    "stretches of files": ("id,path,start\nu0,w0.wav,0.0\nu1,w1.wav,0.5\n", "1 row.*u1.*start = 0.5.*whole file"),
    "only a header": ("id,path\n\n", "no rows"), "empty": ("", "lacks the columns"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_tables_that_are_refused(folder, name):
    text, words = REFUSED[name]
    with pytest.raises(EsslError, match=words) as e:
        corpus_of(folder, text)
    assert "\n" not in str(e.value) and len(str(e.value)) < 1000


@pytest.mark.parametrize("encoding", ["utf-16", "cp1251"])
def test_other_encodings_are_refused(folder, encoding):
    with pytest.raises(EsslError, match="UTF-8"):
        corpus_of(folder, "id,path,text\nu0,w0.wav,да\n", encoding=encoding)


def test_many_mistakes_are_one_short_sentence(folder):
    with pytest.raises(EsslError, match=r"300 rows.*and 295 more") as e:
        corpus_of(folder, "id,path,seconds\n" + "".join(f"u{n},w0.wav,long\n" for n in range(300)))
    assert len(str(e.value)) < 600


def test_a_table_in_another_place(folder, tmp_path_factory):
    tables = tmp_path_factory.mktemp("tables")
    (tables / "some.csv").write_text("id,path\nu0,w0.wav\nu1,w1.wav\n")
    (folder / "mine.csv").write_text("id,path\nu3,w3.wav\n")
    corpus = load_corpus(folder, manifest=tables / "some.csv")
    assert corpus["u1"].path.samefile(folder / "w1.wav") and corpus.root == folder
    assert list(load_corpus(folder, manifest="mine.csv").by_id) == list(load_corpus(manifest=folder / "mine.csv").by_id) == ["u3"]
    with pytest.raises(EsslError, match=f"relative to {tables}"):
        load_corpus(manifest=tables / "some.csv")


@pytest.mark.parametrize("name", ["manifest.tsv", "metadata.csv", "phones.csv"])
def test_a_table_that_is_not_read_is_told_of(folder, name):
    (folder / name).write_text("id\tpath\nu0\tw0.wav\n")
    with pytest.warns(UserWarning, match=f"{name}, which is not read.*manifest="):
        assert len(load_corpus(folder)) == 4


def test_listed_durations_give_way_to_the_sound(folder):
    text = "id,path,seconds\n" + "".join(f"u{n},w{n}.wav,{s}\n" for n, s in enumerate((1000, 1000, 1000, 1000)))
    with pytest.warns(UserWarning, match="w0.wav is listed with 1000 s and lasts 1.00 s"):
        assert [u.seconds for u in corpus_of(folder, text)] == [1.0] * 4
    soundfile.write(folder / "short.wav", np.full(80, 0.1), 16000)
    with pytest.warns(UserWarning, match="1 of 2 clips.*short.wav"):
        corpus = corpus_of(folder, "id,path,seconds\nu0,w0.wav,1.0\nu1,short.wav,0.005\n")
    assert list(corpus.by_id) == ["u0"] and list(corpus.left_out) == ["u1"]


def test_a_duration_that_no_sample_shows_is_found_when_decoded(tmp_path):
    for n in range(70):
        soundfile.write(tmp_path / f"{n}.wav", 0.1 * np.random.default_rng(n).standard_normal(4800), 16000)
    rows = [f"u{n},{n}.wav,{7.5 if n == 1 else 0.3}" for n in range(70)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        corpus = corpus_of(tmp_path, "id,path,seconds\n" + "\n".join(rows) + "\n")
        half = corpus.select(split=corpus["u1"].split)
    assert half["u1"].seconds == 7.5
    with pytest.warns(UserWarning, match="1 clips.*u1 .7.5 s listed, 0.3 s decoded"):
        corpus.features(progress=False)
    assert corpus["u1"].seconds == half["u1"].seconds == 0.3


GOOD = "u0,a,0,0.5\nu0,b,0.5,0.9\n"
PHONES = {
    "milliseconds": ("u0,a,0,500\nu0,b,500,900\n", "labels until 900, a clip of 1.00 s.*seconds"),
    "samples": ("u0,a,0,8000\n", "labels until 8000"),
    "milliseconds in one clip of two": (GOOD + "u1,a,0,500\n", "1 row.*u1: labels until 500"),
    "unknown ids": (GOOD + "x9,a,0,0.5\n", "labels 1 of 2 clips.*x9.*u0|u1"),
    "ids with a suffix": ("u0.wav,a,0,0.5\n", "labels 1 of 1 clips.*u0.wav"),
    "nan": ("u0,a,nan,0.5\n", "'a' from 'nan' to '0.5'"), "inf": ("u0,a,0,inf\n", "to 'inf'"), "a word": ("u0,a,0,end\n", "to 'end'"),
    "backwards": ("u0,a,0.5,0.2\n", "from '0.5' to '0.2'"), "before the beginning": ("u0,a,-1,0.2\n", "from '-1'"),
    "overlap": ("u0,a,0,0.5\nu0,b,0.3,0.9\n", "a until 0.5, b from 0.3"), "twice": (GOOD + GOOD, "a until 0.5, a from 0.0|until"),
    "no label": ("u0,,0,0.5\n", "each phone has a name"), "decimal commas": ('u0,a,"0,1","0,5"\n', "with a point"),
    "a cell too few": ("u0,a,0\n", "'a' from '0'"), "a comma too many": ("u0,a,b,0,0.5\n", "5 cells under a header of 4"),
}


@pytest.mark.parametrize("name", PHONES)
def test_phones_that_cannot_be_are_refused(folder, name):
    rows, words = PHONES[name]
    with pytest.raises(EsslError, match=words):
        corpus_of(folder, "id,path\nu0,w0.wav\nu1,w1.wav\n", rows)


def test_phones_in_any_order_touching_and_rounded(folder):
    corpus = corpus_of(folder, "id,path\nu0,w0.wav\nu1,w1.wav\n", "u0,b,0.49,1.05\nu0,a,0,0.5\n")
    assert [p.label for p in corpus["u0"].phones] == ["a", "b"] and corpus["u1"].phones is None


def test_rows_in_memory(folder):
    tone = np.sin(np.arange(8000) / 5)
    rows = [dict(path=folder / "w0.wav", text="one", phones=[("a", 0, 0.5)], mood=3), dict(id=7, array=tone, rate=8000, split="dev", speaker="s"),
            dict(id="int", array=(tone * 20000).astype("i2"), rate=16000), dict(id="stereo", array=np.stack([tone, tone]), rate=16000)]
    corpus = corpus_from_rows(rows, "mine")
    assert [u.id for u in corpus] == ["w0", "7", "int", "stereo"] and corpus["7"].voice == "s" and corpus["7"].split == "valid"
    assert [u.seconds for u in corpus] == [1.0, 1.0, 0.5, 0.5] and corpus["w0"].extra == {"mood": "3"} and corpus["w0"].phones[0].end == 0.5
    assert np.allclose(soundfile.read(corpus["int"].path)[0], tone * 20000 / 32768, atol=1e-4)
    assert np.array_equal(soundfile.read(corpus["7"].path, dtype="float32")[0], tone.astype("f4"))
    assert corpus_from_rows(rows, "again").data_hash == corpus.data_hash and len(corpus.features(progress=False)) == 4


@pytest.mark.parametrize("rows, words", [
    ("folder", "Rows are given as str"), (dict(path="a.wav"), "Rows are given as dict"), ([], "no rows"), (["a.wav"], "Row 0 is a.wav; give a dict"),
    ([dict(id="a")], "Row 0.*'path', or with 'array'"), ([dict(path="absent.wav")], "Row 0 names absent.wav"),
    ([dict(array=np.zeros(8000))], "rate None"), ([dict(array=np.zeros(8000), rate=0)], "rate 0"), ([dict(array=np.zeros(8000), rate=16000.5)], "rate 16000.5"),
    ([dict(array=np.zeros((2, 3, 4)), rate=16000)], r"shape \(2, 3, 4\)"), ([dict(array=np.zeros(8000, int), rate=16000)], "int64"), ([dict(array=[], rate=16000)], r"shape \(0,\)"),
    ([dict(id="a", array=np.ones(8000), rate=16000, phones=[("a", 0, 500)])], "labels until 500"), ([dict(id="a", array=np.ones(8000), rate=16000, phones=[("a", 0.2, 0.1)])], "phones"),
    ([dict(id="a", array=np.ones(8000), rate=16000, phones=["a"])], "phones"), ([dict(id="a", array=np.ones(8000), rate=16000, seconds=float("nan"))], "duration nan"),
    ([dict(id="a", array=np.ones(8000), rate=16000), dict(id="a", array=np.ones(9000), rate=16000)], "more than once: a"),
    ([dict(id="a", array=np.full(8000, np.nan), rate=16000)], "No sound.*NaN"),
])
def test_rows_that_are_refused(rows, words):
    with pytest.raises(EsslError, match=words):
        corpus_from_rows(rows)


@pytest.mark.parametrize("given, words", [
    (["a.wav"], "given as list.*corpus_from_rows"), (None, "given as NoneType"), ({"train": []}, "given as dict"), (3, "given as int"),
    ("{folder}/manifest.csv", "is a file.*manifest='manifest.csv'"), ("{folder}/w0.wav", "is a file"), ("nowhere", "no corpus 'nowhere'"),
])
def test_what_is_no_corpus(folder, given, words):
    (folder / "manifest.csv").write_text("id,path\nu0,w0.wav\n")
    with pytest.raises(EsslError, match=words):
        load_corpus(given.replace("{folder}", str(folder)) if isinstance(given, str) else given)


@pytest.mark.skipif(os.name == "nt" or os.getuid() == 0, reason="a file that this user may not read")
def test_a_table_that_may_not_be_read(folder):
    (folder / "manifest.csv").write_text("id,path\nu0,w0.wav\n")
    (folder / "manifest.csv").chmod(0)
    with pytest.raises(EsslError, match="cannot be read"):
        read_table(folder / "manifest.csv", ("id", "path"))
