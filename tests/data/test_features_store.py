"""The store of features: what it costs is said first, where it cannot lie is said with what to set, and code that changed finds no old frames."""
import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import soundfile

import essl_nb.data.features as features
from essl_nb.core.registry import EsslError
from essl_nb.data.corpus import corpus_from_rows, load_corpus


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("ESSL_CACHE", str(tmp_path / "cache"))
    (tmp_path / "sound").mkdir()
    for n in range(8):
        soundfile.write(tmp_path / "sound" / f"{n}.wav", 0.1 * np.random.default_rng(n).standard_normal(8000), 16000)
    return tmp_path / "sound"


def test_frames_are_those_of_the_code_that_is_there(folder, tmp_path, monkeypatch):
    source = "def f(x):\n    '''Old.'''\n    return x + 1  # one\n"
    hashes = []
    for text in (source, source.replace("Old", "New").replace("  # one", ""), source.replace("1", "2")):
        (tmp_path / "probe_code.py").write_text(text)
        code = "import sys; sys.dont_write_bytecode = True; import probe_code; from essl_nb.data.features import code_hash; print(code_hash(probe_code, probe_code.f))"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"})
        assert done.returncode == 0, done.stderr[-800:]
        hashes.append(done.stdout)
    assert hashes[0] == hashes[1] != hashes[2]
    first = load_corpus(folder).features(progress=False)
    monkeypatch.setattr("essl_nb.data.corpus.analysis", lambda: "another")
    assert load_corpus(folder).features(progress=False).path != first.path


@pytest.mark.parametrize("workers", [1, 3])
def test_the_number_of_threads_changes_nothing(folder, monkeypatch, workers):
    truth = load_corpus(folder).features(progress=False).path.read_bytes()
    monkeypatch.setenv("ESSL_CACHE", str(folder.parent / f"cache{workers}"))
    assert load_corpus(folder).features(progress=False, workers=workers).path.read_bytes() == truth
    for wrong in (0, -1, "many", 1.5):
        with pytest.raises(EsslError, match="workers"):
            features.thread_count(wrong)
    monkeypatch.setenv("ESSL_WORKERS", "5")
    assert features.thread_count(None) == 5 and features.thread_count(2) == 2


def test_an_interrupt_need_not_wait_for_the_rest():
    begun, done = [], threading.Event()

    def work(n):
        begun.append(n)
        done.wait(0.01)
        return n

    results = features.in_order(work, list(range(10000)), 2)
    assert [next(results) for _ in range(5)] == [0, 1, 2, 3, 4]
    results.close()
    count = len(begun)
    time.sleep(0.05)
    assert len(begun) == count < 50


def test_much_work_is_announced(folder, monkeypatch, capfd):
    monkeypatch.setattr(features, "LONG", 1e-6)
    load_corpus(folder).features(progress=True)
    said = capfd.readouterr().err
    assert "about" in said and "GB in" in said and "ESSL_CACHE" in said and "2 threads" in said
    load_corpus(folder).features(progress=True)
    assert "GB in" not in capfd.readouterr().err


def test_a_disk_that_is_too_small_is_found_before_the_work(folder, monkeypatch):
    monkeypatch.setattr(features.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    monkeypatch.setattr(features, "mel_of_file", None)  # work would fail
    monkeypatch.setattr("essl_nb.data.corpus.analysis", lambda: "x")
    with pytest.raises(EsslError, match="need 0.00 GB.*ESSL_CACHE"):
        load_corpus(folder).features(progress=False)


def test_a_cache_that_cannot_be_written_names_the_variable(folder, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("in the way")
    corpus = load_corpus(folder)
    for place in (tmp_path / "file", tmp_path / "file" / "deep"):
        monkeypatch.setenv("ESSL_CACHE", str(place))
        with pytest.raises(EsslError, match="ESSL_CACHE"):
            corpus.features(progress=False)
        with pytest.raises(EsslError, match="ESSL_CACHE"):
            corpus_from_rows([dict(id="a", array=np.ones(8000), rate=16000)])
        assert len(load_corpus(folder)) == 8  # looking needs no cache


@pytest.mark.skipif(os.name == "nt" or os.getuid() == 0, reason="a folder that this user may not write")
def test_a_read_only_cache_is_read(folder, tmp_path):
    path = load_corpus(folder).features(progress=False).path
    (tmp_path / "cache").chmod(0o555), path.parent.chmod(0o555)
    try:
        assert load_corpus(folder).features(progress=False).path == path
        soundfile.write(folder / "9.wav", np.ones(8000) / 2, 16000)
        with pytest.raises(EsslError, match="ESSL_CACHE"):
            load_corpus(folder).features(progress=False)
    finally:
        path.parent.chmod(0o755), (tmp_path / "cache").chmod(0o755)


def test_frames_that_are_no_numbers_are_not_stored(folder, monkeypatch):
    real = features.log_mel_long
    corpus = load_corpus(folder)
    first = features.load_audio(corpus["3"].path)[0]
    monkeypatch.setattr(features, "log_mel_long", lambda wav, spec: real(wav, spec) * (float("nan") if wav[0] == first else 1))
    with pytest.warns(UserWarning, match="3.wav has log-mel frames that are not numbers"):
        stored = corpus.features(progress=False)
    assert "3" not in corpus and len(stored) == 7 and np.isfinite(stored.frames).all()


def test_without_a_train_split_all_clips_count(folder):
    (folder / "manifest.csv").write_text("id,path,split\n" + "".join(f"u{n},{n}.wav,test\n" for n in range(8)))
    stored = load_corpus(folder).features(progress=False)
    assert np.allclose(stored.mean, stored.frames.astype("f8").mean(0), atol=1e-4)
