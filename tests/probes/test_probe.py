"Probes: scores that must be near one or near chance, intervals, paths, refusals, the command."

import json
import subprocess
import sys
from inspect import getsource
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import essl_nb.probes  # noqa: F401, registers the probes
from essl_nb.core.config import from_json, to_json
from essl_nb.core.intervals import bootstrap_interval, paired_interval, ratio
from essl_nb.core.registry import EsslError, UnknownName
from essl_nb.mixers.base import list_mixers
from essl_nb.models.config import EncoderConfig
from essl_nb.models.encoder import build_encoder
from essl_nb.probes.finetune import Recogniser, augment, greedy, listen
from essl_nb.probes.frames import Baseline, Frames, Source, duration_batches, open_encoder, statistics
from essl_nb.probes.heads import LayerHead
from essl_nb.probes.hidden import hidden_frames
from essl_nb.probes.phones import edit_distance, few_labels, frame_labels, phone_errors, viterbi
from essl_nb.probes.probe import Score, list_probes, probes, run_probe
from essl_nb.probes.voices import balanced_units

PHONES = "abcd"
QUICK = {
    "phones": dict(steps=20, batch=256),
    "masked_phones": dict(steps=20, batch=256),
    "units": dict(clusters=8, steps=20, batch=256),
    "language": dict(shots=2, draws=3, least_scored=2),
    "voice": dict(shots=2, draws=3, least_scored=2),
    "language_across": dict(shots=2, draws=3, least_scored=2, seconds=0.5, train_part="one", test_part="two"),
    "far_context": dict(seconds=1.5, hidden_ms=100, read_ms=100, least_scored=2, steps=20),
    "finetune": dict(epochs=1, batch_seconds=8),
}


class Store(dict):
    mean, std = torch.zeros(80), torch.ones(80)


class Toy(list):
    "Clips of 1 s; each phone, each voice and each language lights bins of its own."

    def __init__(self, clips=20, phones=True, noise=0.3, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.store = Store()
        for i in range(clips):
            order = torch.randint(1, 4, (10,), generator=generator).cumsum(0) % 4
            spoken = tuple(SimpleNamespace(label=PHONES[c], start=0.1 * n, end=0.1 * n + 0.1) for n, c in enumerate(order.tolist()))
            split = ("train", "train", "valid", "test")[i // 2 % 4]
            language, part = "xy"[i % 2], ("one", "two")[i // 8 % 2]
            self.append(SimpleNamespace(id=f"toy{i}", phones=spoken if phones else None, part=part if not phones else "one", seconds=1.0,
                split=split, language=language, voice=f"voice {language}"))
            mel = 3 * torch.eye(80)[order].repeat_interleave(10, 0) + noise * torch.randn(100, 80, generator=generator)
            mel[:, 40 + 20 * (i % 2) :][:, :20] += 3
            self.store[f"toy{i}"] = mel

    def features(self, progress=True):
        return self.store


class Oracle(torch.nn.Module):
    "An encoder whose second layer is its input, and which cannot be fooled by spans."
    stride, frame_seconds = 2, 0.02
    frontend = SimpleNamespace(out_lengths=lambda n: (n - 1) // 2 + 1)

    def __init__(self, knows=True):
        super().__init__()
        self.knows = torch.nn.Parameter(torch.tensor(float(knows)))

    def from_features(self, mel, lengths, *, span=None, generator=None):
        x = mel[:, ::2] * self.knows + torch.randn(mel[:, ::2].shape, generator=torch.Generator().manual_seed(1)) * (1 - self.knows)
        return SimpleNamespace(frames=x, lengths=self.frontend.out_lengths(lengths), layers=[torch.zeros_like(x), x])


def probe(encoder, name, corpus, **kw):
    return run_probe(encoder, name, corpus, progress=False, precision="fp32", **kw)


@pytest.fixture(scope="module")
def encoder():
    "A real encoder, small and untrained."
    return build_encoder(EncoderConfig(list_mixers()[0], dim=16, depth=1), seed=0)


# scores


@pytest.mark.parametrize("head", ["linear", "mlp"])
@pytest.mark.parametrize("name", ["phones", "masked_phones"])
def test_oracle_scores_one_and_noise_scores_chance(name, head):
    toy, options = Toy(40), dict(steps=100, lr=0.03, batch=256)
    best, worst = probe(Oracle(), name, toy, head=head, **options), probe(Oracle(False), name, toy, head=head, **options)
    assert best.value > 0.94 and best.low > 0.9
    assert 0.1 < worst.value < 0.45
    assert paired_interval(best, worst)[1] > 0.4
    if name == "phones":
        assert best.also[0].metric == "per" and best.also[0].better == "lower" and best.also[0].value < 0.1


def test_oracle_layer_weights_find_the_layer():
    weights = probe(Oracle(), "phones", Toy(40), steps=50, batch=256, lr=0.03).settings["layer_weights"]
    assert len(weights) == 2 and abs(sum(weights) - 1) < 1e-3


@pytest.mark.parametrize("name", ["voice", "language"])
def test_few_shot_oracle_and_chance(name):
    toy = Toy(80)
    assert probe(Oracle(), name, toy, shots=4, least_scored=5).value > 0.97
    assert 0.3 < probe(Oracle(False), name, toy, shots=4, least_scored=5).value < 0.7


def test_hidden_frames_need_context():
    toy = Toy(40)
    narrow, wide = (probe(Baseline(context_ms=c), "masked_phones", toy, steps=100, lr=0.03, batch=256, span_ms=40) for c in (0, 100))
    assert narrow.value < 0.45 < wide.value
    assert abs(narrow.settings["hidden_share"] - 0.4) < 0.1


@pytest.mark.parametrize("name", list(QUICK))
def test_real_encoder_end_to_end_twice_the_same(name, encoder):
    toy = Toy(20) if probes.get(name).meta["needs"] == "phones" else Toy(40, phones=False)
    first, second = (probe(encoder, name, toy, **QUICK[name]) for _ in range(2))
    for a, b in zip(first.all(), second.all()):
        assert a.units == b.units and a.settings == b.settings and (a.low, a.value, a.high) == (b.low, b.value, b.high)
        assert a.n == len(a.units) and a.low <= a.value <= a.high and a.count > 0
        assert from_json(Score, json.loads(json.dumps(to_json(a)))) == a
        assert paired_interval(a, b) == (0.0, 0.0, 0.0)


def test_every_registered_probe_is_tried():
    assert set(list_probes()) == set(QUICK)


def test_split_valid_scores_other_utterances(encoder):
    toy = Toy(20)
    valid, test = (probe(encoder, "masked_phones", toy, steps=5, batch=256, split=s) for s in ("valid", "test"))
    assert valid.unit_ids_hash != test.unit_ids_hash and valid.split == "valid"
    with pytest.raises(EsslError, match="cannot be paired"):
        paired_interval(valid, test)


def test_memo_changes_nothing_and_is_used(encoder):
    toy, memo = Toy(20), {}
    plain = [probe(encoder, "phones", toy, steps=5, batch=256, labels=labels) for labels in ("all", "10min")]
    kept = [probe(encoder, "phones", toy, steps=5, batch=256, labels=labels, memo=memo) for labels in ("all", "10min")]
    assert [s.units for s in plain] == [s.units for s in kept]
    assert sum(len(stores) for stores in memo.values()) == 3  # train, valid, test: ten minutes are found in train
    other = build_encoder(encoder.config, seed=1)
    assert probe(other, "phones", toy, steps=5, batch=256, memo=memo).units == probe(other, "phones", toy, steps=5, batch=256).units


def test_probing_leaves_the_encoder_as_it_was(encoder):
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    state = torch.random.get_rng_state()
    for name in ("phones", "finetune"):
        probe(encoder.train(), name, Toy(20), **QUICK[name])
        assert encoder.training
    assert all(torch.equal(before[k], v) for k, v in encoder.state_dict().items())
    assert torch.equal(state, torch.random.get_rng_state())


# intervals


def test_bootstrap_covers():
    held = 0
    for trial in range(100):
        generator = np.random.default_rng(trial)
        units = [[int(generator.binomial(n, p)), n] for n, p in zip(generator.integers(20, 200, 60), generator.uniform(0.3, 0.7, 60))]
        low, high = bootstrap_interval(units, samples=500)
        held += low <= 0.5 <= high
    assert 87 <= held <= 100


def test_interval_of_equal_utterances_has_no_width():
    assert bootstrap_interval([[3, 10]] * 20) == pytest.approx((0.3, 0.3))


def test_intervals_refuse():
    with pytest.raises(EsslError, match="at least two"):
        bootstrap_interval([[1, 2]])
    with pytest.raises(EsslError, match="at least one"):
        ratio([[0, 0], [0, 0]])


def test_balanced_units_are_the_balanced_accuracy():
    generator = torch.Generator().manual_seed(0)
    classes = torch.randint(3, (50,), generator=generator).tolist()
    right = torch.rand(7, 50, generator=generator) < 0.6
    wanted = np.mean([right[:, [i for i, c in enumerate(classes) if c == k]].double().mean() for k in range(3)])
    assert ratio(balanced_units(right, classes)) == pytest.approx(wanted)


# paths and distances


@pytest.mark.parametrize("penalty", [0.0, 0.7, 5.0])
def test_viterbi_is_the_best_of_all_paths(penalty):
    generator = torch.Generator().manual_seed(3)
    logp, lengths = torch.randn(3, 6, 3, generator=generator).log_softmax(-1), torch.tensor([6, 4, 1])
    logp[1, 4:] = float("nan")
    for row, path, n in zip(logp, viterbi(logp, lengths, torch.full((3,), penalty)), lengths.tolist()):
        value = lambda p: sum(row[t, s].item() for t, s in enumerate(p)) - penalty * sum(a != b for a, b in zip(p, p[1:]))
        assert len(path) == n
        assert value(path) == pytest.approx(max(value(p) for p in product(range(3), repeat=n)), abs=1e-5)


@pytest.mark.parametrize("a,b,d", [("kitten", "sitting", 3), ("", "abc", 3), ("abc", "", 3), ("flaw", "lawn", 2), ("same", "same", 0)])
def test_edit_distance(a, b, d):
    assert edit_distance(list(a), list(b)) == d


def test_phone_errors_of_certain_posteriors():
    certain = torch.nn.functional.one_hot(torch.tensor([2, 0, 0, 1, 1, 2]), 3) * 20.0
    assert phone_errors([certain.log_softmax(-1)], [[0, 1]], [1.0], pause=2) == [[[0, 2]]]


def test_frame_labels_and_gaps():
    clip = SimpleNamespace(phones=(SimpleNamespace(label="a", start=0.1, end=0.2), SimpleNamespace(label="SIL", start=0.2, end=0.25)))
    labels = frame_labels(clip, 15, 0.02, ["a", "pau"]).tolist()
    assert labels == [-1] * 5 + [0] * 5 + [1] * 3 + [-1] * 2


def test_hidden_frames_depend_on_the_name_alone():
    draw = lambda id, span=200: hidden_frames(SimpleNamespace(id=id), 400, span_ms=span, share=0.4, frame_seconds=0.02)
    assert torch.equal(draw("a"), draw("a")) and not torch.equal(draw("a"), draw("b")) and not torch.equal(draw("a"), draw("a", 400))


def test_few_labels():
    clips = [SimpleNamespace(seconds=60.0) for _ in range(80)]
    assert [len(few_labels(clips, k)) for k in ("all", "10min", "10%")] == [80, 10, 8]
    assert len(few_labels(clips[:5], "10min")) == 5


# frames and heads


def test_padded_batches_give_the_frames_of_each_alone(encoder):
    store = Store({f"c{i}": torch.randn(60 + 9 * i, 80, generator=torch.Generator().manual_seed(i)) for i in range(6)})
    clips = [SimpleNamespace(id=id) for id in store]
    together, alone = (Source(encoder.eval(), store, precision="fp32", batch_seconds=s).frames(clips, progress=False) for s in (60, 0.1))
    assert torch.allclose(together.data.float(), alone.data.float(), atol=5e-3)


@pytest.mark.parametrize("limit", [10, 35, 1000])
def test_duration_batches_hold_all_once(limit):
    lengths = torch.randint(1, 40, (50,), generator=torch.Generator().manual_seed(0)).tolist()
    for generator in (None, torch.Generator().manual_seed(1)):
        batches = duration_batches(lengths, limit, generator=generator)
        assert sorted(sum(batches, [])) == list(range(50))
        assert all(len(b) == 1 or max(lengths[i] for i in b) * len(b) <= limit for b in batches)


def test_head_standardises():
    x = 5 + 3 * torch.randn(2000, 2, 4, generator=torch.Generator().manual_seed(0))
    mean, std = statistics(Frames(x.half(), {}))
    model = LayerHead(mean, std, 3, generator=torch.Generator().manual_seed(0))
    model.body = torch.nn.Identity()
    z = model(x)
    assert z.mean(0).abs().max() < 0.05 and (z.std(0) - 2**-0.5).abs().max() < 0.05


# fine-tuning


def test_blank_collapse_is_told(encoder):
    model = Recogniser(encoder, 4, torch.Generator().manual_seed(0))
    toy = Toy(4)
    mels, phones = list(toy.store.values()), [[1, 2, 3]] * 4
    torch.nn.init.zeros_(model.out.weight)
    model.out.bias.data[0] = 10
    heard = listen(model, mels, phones, bf16=False)
    assert heard.collapsed and heard.blank == 1 and heard.per == 1
    model.out.bias.data[1] = 20
    assert not listen(model, mels, phones, bf16=False).collapsed


def test_learning_rate_is_chosen_on_valid(encoder):
    score = probe(encoder, "finetune", Toy(20), lrs=(1e-5, 0.01), epochs=6, batch_seconds=4, start="scratch", labels="all")
    assert set(score.settings["lrs_tried"]) == {"1e-05", "0.01"} and score.settings["lr"] in (1e-5, 0.01)
    assert score.settings["curve"][-1]["epoch"] == 6
    assert not paired_interval(score, probe(encoder, "finetune", Toy(20), epochs=1))[0] == 0


def test_masks_leave_most_of_the_input():
    mel = torch.ones(400, 80)
    seen = [augment(mel, torch.zeros(80), torch.Generator().manual_seed(i)).mean().item() for i in range(50)]
    assert 0.6 < np.mean(seen) < 0.95 and torch.equal(mel, torch.ones(400, 80))
    assert augment(torch.ones(3, 80), torch.zeros(80), torch.Generator().manual_seed(0)).shape == (3, 80)


def test_greedy():
    assert greedy(torch.tensor([0, 0])) == [] and greedy(torch.tensor([1, 1, 0, 1, 2])) == [1, 1, 2]


# refusals


@pytest.mark.parametrize("wrong,says", [
    (dict(probe="phone"), "phones"),
    (dict(probe="phones", head="forest"), "'linear', 'mlp'"),
    (dict(probe="phones", labels="5min"), "'all', '10min'"),
    (dict(probe="phones", split="train"), "'test', 'valid'"),
    (dict(probe="masked_phones", span=200), "span_ms"),
    (dict(probe="masked_phones", span_ms=5), "20 to 2000"),
    (dict(probe="phones", part="three"), "'one'"),
    (dict(probe="language_across", train_part="prompts"), "'one'"),
    (dict(probe="finetune", start="middle"), "'scratch'"),
    (dict(probe="finetune", lr=1e-3, lrs=(1e-3, 1e-4)), "lrs"),
    (dict(probe="voice", shots=500), "Lower shots"),
    (dict(probe="voice", seconds=0.01), "0.1 to 10 s"),
    (dict(probe="phones", precision="fp8"), "auto, fp32, bf16"),
])
def test_refusals_say_what_is_allowed(wrong, says, encoder):
    with pytest.raises(EsslError, match=says):
        run_probe(encoder, corpus=Toy(20), progress=False, **wrong)


def test_unknown_probe_is_an_unknown_name(encoder):
    with pytest.raises(UnknownName):
        run_probe(encoder, "fones", Toy(8))


def test_corpus_without_phones_is_told_what_it_can_run(encoder):
    with pytest.raises(EsslError, match="voice") as told:
        probe(encoder, "phones", Toy(20, phones=False))
    assert "masked_phones" not in str(told.value)


def test_baselines():
    with pytest.raises(EsslError, match="nothing to train"):
        probe(Baseline(), "finetune", Toy(20))
    for wrong in (dict(kind="mfcc"), dict(context_ms=15), dict(context_ms=-10), dict(context_ms=9000)):
        with pytest.raises(EsslError):
            Baseline(**wrong)
    assert open_encoder("logmel:100") == Baseline("logmel", 100) and open_encoder("logmel") == Baseline()
    with pytest.raises(EsslError, match="logmel:40"):
        open_encoder("logmel:far")


def test_a_probe_of_ones_own(encoder):
    @probes.register("always right", needs="voice")
    def always(job):
        ids = [u.id for u in job.corpus]
        return job.score("accuracy", [[1, 1]] * len(ids), ids, len(ids))

    try:
        assert "always right" in list_probes() and probe(encoder, "always right", Toy(8)).value == 1
    finally:
        probes.remove("always right")


# the command


def test_command_says_units_and_imports_no_torch():
    from essl_nb.probes.command import essl_probe

    assert all(word in getsource(essl_probe) for word in ("milliseconds", "95 %", "logmel:100", "minutes", "hour"))
    code = "import sys, essl_nb.probes.command; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "False"


def test_command_on_a_folder(tmp_path, monkeypatch, capsys):
    import soundfile

    from essl_nb.probes.command import essl_probe

    rows, generator = ["id,path,language,voice,split"], np.random.default_rng(0)
    for i in range(16):
        tone = np.sin(2 * np.pi * (300 + 600 * (i % 2)) * np.arange(16000) / 16000) * 0.3 + 0.01 * generator.standard_normal(16000)
        soundfile.write(tmp_path / f"{i}.wav", tone, 16000)
        rows.append(f"c{i},{i}.wav,,v{i % 2},{'train' if i < 8 else 'test'}")
    (tmp_path / "manifest.csv").write_text("\n".join(rows))
    monkeypatch.setenv("ESSL_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "scores.jsonl"
    essl_probe("logmel", "voice", str(tmp_path), options="shots=3,draws=2,least_scored=2", out=str(out))
    row = json.loads(out.read_text())
    assert row["encoder"] == "logmel" and row["value"] > 0.9 and str(out) in capsys.readouterr().out
    with pytest.raises(EsslError, match="The probe 'phones' needs phones"):
        essl_probe("logmel", "phones", str(tmp_path), out=str(out))
    assert len(out.read_text().splitlines()) == 1
