"""Parts of a corpus that are not trained on: the run is the one of a corpus that never had them."""
import csv

import numpy as np
import pytest
import soundfile
import torch

from essl_nb.core.config import to_json, without_later
from essl_nb.core.files import load_tensors, read_json
from essl_nb.core.registry import EsslError
from essl_nb.data.corpus import load_corpus
from essl_nb.data.opening import open_index
from essl_nb.mixers.base import list_mixers, mixers
from essl_nb.models.config import EncoderConfig
from essl_nb.objectives.objective import objectives
from essl_nb.study.study import run_fact
from essl_nb.train.config import PretrainConfig
from essl_nb.train.feed import make_feed
from essl_nb.train.loop import pretrain
from essl_nb.train.targets import sounds_hash

MIXER = list_mixers(family="pooling")[0]
QUIET = dict(progress=False, log_every=2, watch_every=4, save_every=4)


def corpus_of(folder, parts):
    "Twelve clips of each part, of other pitch and level, with a manifest."
    folder.mkdir()
    with open(folder / "manifest.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["id", "path", "split", "voice", "part"])
        for part in parts:
            generator = np.random.default_rng(len(part))
            for i in range(12):
                pitch = 150.0 * len(part) * 2 ** (np.repeat(generator.permutation(10), 1600) / 5)
                sound = 0.05 * len(part) * np.sin(2 * np.pi * np.cumsum(pitch) / 16000) + 0.01 * generator.standard_normal(16000)
                soundfile.write(folder / f"{part}{i}.wav", sound.astype("f4"), 16000)
                rows.writerow([f"{part}{i}", f"{part}{i}.wav", ("train", "train", "valid", "test")[i % 4], f"{part} {i % 2}", part])
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("parts")
    return corpus_of(root / "both", ("near", "farther")), corpus_of(root / "one", ("near",))


def settings(folder, objective="clusters", **kw):
    encoder = EncoderConfig(MIXER, dim=16, depth=1, mixer_kw=mixers.get(MIXER).meta.get("tiny", {}))
    own = dict(steps=4, batch_seconds=4.0, precision="fp32", objective=objective, objective_kw=objectives.get(objective).meta.get("tiny", {}))
    return PretrainConfig(encoder, corpus=str(folder), **own | kw)


@pytest.mark.parametrize("reading", ["stored", "streamed"])
def test_a_run_without_a_part_is_the_run_of_a_corpus_that_never_had_it(reading, folders, tmp_path):
    both, one = folders
    pretrain(settings(both, leave_out=("farther",), reading=reading), tmp_path / "left", **QUIET)
    pretrain(settings(one, reading=reading), tmp_path / "never", **QUIET)
    pretrain(settings(both, reading=reading), tmp_path / "whole", **QUIET)
    left, never, whole = (load_tensors(tmp_path / name / "encoder" / "model.safetensors") for name in ("left", "never", "whole"))
    same = lambda a, b: all(torch.equal(a[k], b[k]) for k in a)
    assert same(left, never) and not same(left, whole) and not torch.equal(left["frontend.mean"], whole["frontend.mean"])
    targets = [read_json(tmp_path / name / "run.json")["targets"] for name in ("left", "never", "whole")]
    assert targets[0] == targets[1] != targets[2]


def test_nothing_of_the_part_is_batched_labelled_or_watched(folders):
    feed = make_feed(settings(folders[0], leave_out=("farther",)), progress=False)
    assert {u.part for u in feed.corpus} == {"near"} and feed.named.data_hash == load_corpus(folders[0]).data_hash
    frames = feed.corpus.features(progress=False)
    assert torch.equal(frames.mean, feed.mean) and "farther0" in frames  # one store for all
    assert torch.equal(feed.corpus.select(split="train").features(progress=False).mean, feed.mean)


def test_a_study_knows_the_run_again(folders, tmp_path):
    config = settings(folders[0], leave_out=("farther",))
    first, _ = run_fact(config, tmp_path / "run")
    again, _ = run_fact(config, tmp_path / "run")  # finished: read from its folder
    assert again == first and read_json(tmp_path / "run" / "run.json")["data"]["sounds"] == sounds_hash(load_corpus(folders[0]))


def test_what_was_recorded_before_keeps_its_name(folders):
    plain = to_json(settings(folders[0]))
    assert plain["leave_out"] == [] and "leave_out" not in without_later(PretrainConfig, plain)
    assert without_later(PretrainConfig, to_json(settings(folders[0], leave_out=("near",))))["leave_out"] == ["near"]


@pytest.mark.parametrize("leave_out,why", [(("neer",), "did you mean 'near'"), (("near", "farther"), "nothing of the corpus .* is left; its parts: farther, near")])
def test_a_part_that_is_not_there_and_nothing_left(leave_out, why, folders):
    with pytest.raises(EsslError, match=why):
        make_feed(settings(folders[0], leave_out=leave_out), progress=False)


@pytest.mark.parametrize("leave_out", [("near", "near"), ("",), ["near"], ("near", 3), "near"])
def test_names_that_are_none(leave_out, folders):
    with pytest.raises(EsslError, match="leave_out"):
        settings(folders[0], leave_out=leave_out)


def test_sound_whose_parts_are_not_known(folders, tmp_path):
    (tmp_path / "plain").mkdir()
    config = settings(tmp_path / "plain", leave_out=("near",))
    for corpus in (None, open_index(folders[0])):
        with pytest.raises(EsslError, match="parts are known of the bundled corpus"):
            make_feed(config, corpus, progress=False)
