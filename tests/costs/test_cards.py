"""Cost cards: what is counted is exact, what is measured has its protocol beside it; no timing decides a test."""
import json
import platform
from pathlib import Path

import pytest
import torch

from essl_nb.core import machine
from essl_nb.core.count import count_macs
from essl_nb.core.memory import forked_peak
from essl_nb.core.precision import choose_precision
from essl_nb.core.registry import EsslError
from essl_nb.costs import cards, command, measure
from essl_nb.costs.macs import encoder_macs, parameter_count, training_macs
from essl_nb.mixers.base import FAMILIES, Mixer, list_mixers, mixers
from essl_nb.models.config import EncoderConfig
from essl_nb.models.encoder import POSITION_GROUPS, POSITION_KERNEL, build_encoder
from essl_nb.models.frontend import frontends
from essl_nb.probes.finetune import fresh_copy

BASE = cards.baseline_mixer()


def tiny(name, **kw):
    return EncoderConfig(name, dim=32, depth=2, mixer_kw=dict(mixers.get(name).meta.get("tiny", {})), **kw)


@pytest.mark.parametrize("T", [10, 200, 4000])
@pytest.mark.parametrize("D,depth,m", [(32, 1, 4), (192, 4, 4), (96, 3, 2)])
def test_the_baseline_has_its_square_term(T, D, depth, m):
    got = encoder_macs(EncoderConfig(BASE, dim=D, depth=depth, ff_mult=m), T / 50)
    assert got["frames"] == T
    assert got["mixer"] == depth * (4 * T * D**2 + 2 * T**2 * D)
    assert got["rest"] == depth * 2 * m * T * D**2
    assert got["frontend"] == T * 80 * 5 * D
    assert got["total"] == sum(got[k] for k in ("features", "frontend", "mixer", "rest"))


@pytest.mark.parametrize("name", list_mixers())
def test_encoder_and_mixer_count_alike(name):
    config = tiny(name)
    encoder = build_encoder(config, seed=0)
    assert encoder_macs(config, 4)["mixer"] == pytest.approx(sum(b.mixer.macs(200) for b in encoder.blocks), abs=2)
    assert parameter_count(config) == encoder.parameter_count()


@pytest.mark.parametrize("name", list_mixers())
def test_counts_grow_as_declared(name):
    config, seconds = EncoderConfig(name, dim=32, depth=1, mixer_kw=mixers.get(name).meta.get("long", {})), [80, 160]
    slope = measure.exponent(seconds, [encoder_macs(config, s)["mixer"] for s in seconds])
    low, high = {"T": (0.98, 1.02), "T log T": (1.0, 1.2), "T^2": (1.9, 2.01)}.get(mixers.get(name).meta["complexity"], (0.9, 2.1))
    assert low <= slope <= high


@pytest.mark.parametrize("name", list_mixers())
def test_a_training_step_is_between_two_and_three_forward_passes(name):
    forward, head = encoder_macs(tiny(name), 4), 200 * 32 * 500
    ratio = training_macs(tiny(name), 4) / (forward["total"] - forward["features"] + head)
    assert 2 < ratio <= 3


@pytest.mark.parametrize("groups", [1, 4, 16])
def test_a_grouped_convolution_backward_is_twice_its_forward(groups):
    conv = torch.nn.Conv1d(16, 32, 5, padding=2, groups=groups, device="meta")
    x = torch.empty(3, 16, 40, device="meta", requires_grad=True)

    def both():
        with torch.enable_grad():
            conv(x).sum().backward()

    assert count_macs(both) == 3 * (3 * 40 * 32 * (16 // groups) * 5)


def test_turns_alternate_and_medians_have_quartiles():
    order = []
    turns = measure.interleaved([lambda: order.append("A"), lambda: order.append("B")], repeats=3, warmup=1, fill=0)
    assert "".join(order) == "AB" * 4 and len(turns) == 3 and all(len(t) == 2 for t in turns)
    assert measure.spread([1, 2, 3, 4, 100]) == (3, 2, 4)
    row = cards.against_baseline("x", [[2, 1], [4, 2], [9, 3]])
    assert (row["x"], row["baseline_x"], row["x_ratio"], row["x_ratio_high"]) == (4, 2, 2, 2.5)
    assert measure.exponent([5], [1]) is None


def test_a_child_that_fails_says_so():
    def fail():
        raise MemoryError

    with pytest.raises(RuntimeError, match="no result"):
        forked_peak(fail)


class Doubler(Mixer):
    "A guest: each frame twice."
    needs_position = True

    def forward(self, x, mask=None):
        return 2 * x if mask is None else 2 * x * mask[..., None]


@pytest.fixture
def guest():
    mixers.register("guest-doubler", family=FAMILIES[-1], complexity="T", paper="none", tiny={})(Doubler)
    yield "guest-doubler"
    mixers.remove("guest-doubler")


def test_the_deployment_card_of_a_guest(guest):
    config = EncoderConfig(guest, dim=64, depth=2)
    card = cards.deployment_cost(config, quick=True)
    assert json.loads(json.dumps(card)) == card
    assert card["mixer"] == guest and card["against"]["mixer"] == BASE and card["against"]["dim"] == 64
    assert card["threads"] == 1 and card["protocol"]["order"] == "interleaved" and card["versions"]["torch"] == torch.__version__
    assert [p["seconds"] for p in card["points"]] == [1, 8]
    for p in card["points"]:
        assert p["frames"] == 50 * p["seconds"] and p["macs_ratio"] < 1
        for x in ("latency_s", "baseline_latency_s", "latency_s_ratio", "rtf", "peak_bytes", "peak_bytes_ratio"):
            assert 0 < p[x + "_low"] <= p[x] <= p[x + "_high"]
        assert p["peak_bytes"] < 2**29  # the library itself is not in it
    assert card["points"][1]["peak_bytes"] > card["points"][0]["peak_bytes"]
    assert 4 * card["parameters"] < card["disk_bytes_fp32"] < 4 * card["parameters"] + 20_000 and card["disk_bytes_bf16"] < 0.6 * card["disk_bytes_fp32"]
    text = json.dumps(card)
    assert str(Path.home()) not in text and f'"{platform.node()}"' not in text
    assert "deployment card" in cards.card_text(card)


def test_the_command_writes_a_training_card(tmp_path, capsys):
    out = tmp_path / "card.json"
    command.essl_cost(BASE, dim=32, depth=1, what="training", quick=True, out=str(out))
    (card,) = json.loads(out.read_text())
    assert card["card"] == "training" and card["macs_ratio"] == card["parameters_ratio"] == 1
    assert card["protocol"]["audio_seconds"] == 2 and card["precision"] == choose_precision().name
    assert 0 < card["step_s_low"] <= card["step_s"] <= card["step_s_high"] and card["peak_bytes"] > 0
    said = capsys.readouterr().out
    assert "training card" in said and str(out) in said


def test_the_command_reads_a_saved_encoder(tmp_path):
    config = tiny(BASE)
    build_encoder(config, seed=0).save(tmp_path)
    assert command.cost_config(str(tmp_path), dim=999, depth=9, causal=True) == config
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(EsslError, match="is not JSON"):
        command.cost_config(str(tmp_path), 1, 1, False)


def test_the_command_answers_in_one_sentence(tmp_path):
    for kw, part in [(dict(mixer="no-such"), "There is no mixer called"), (dict(mixer=BASE, what="everything"), "both, training, deployment"),
                     (dict(mixer=BASE, threads=0), "whole number from 1"), (dict(mixer=BASE, what="deployment", seconds="1,two"), "durations")]:
        with pytest.raises(EsslError, match=part):
            command.essl_cost(**kw, out=str(tmp_path / "x.json"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kw,part", [
    (dict(seconds=(0, 1)), "durations between"), (dict(seconds=(-5,)), "-5 s"), (dict(seconds=()), "no duration"),
    (dict(seconds=(float("nan"),)), "nan s"), (dict(seconds="soon"), "not a list"), (dict(threads=0), "from 1 to"),
    (dict(threads=machine.available_cores() + 1), "from 1 to"), (dict(threads=1.5), "from 1 to"), (dict(repeats=0), "1 or more"),
    (dict(precision="int3"), "auto, fp32, bf16"),
])
def test_bad_input(kw, part):
    with pytest.raises(EsslError, match=part):
        cards.deployment_cost(tiny(BASE), **kw)


def test_bad_training_input():
    with pytest.raises(EsslError, match="one crop at least"):
        cards.training_cost(tiny(BASE), batch_seconds=1, crop_seconds=8)
    with pytest.raises(EsslError, match="EncoderConfig is needed"):
        cards.training_cost({"mixer": BASE})


def test_state_only_where_it_streams():
    assert cards.state_bytes(tiny(BASE), 10) is None
    short, long = (cards.state_bytes(tiny(BASE, causal=True), s) for s in (1, 10))
    assert 0 < short < long


CONTROL = next(e.name for e in mixers if e.meta.get("control"))


@pytest.mark.parametrize("block, wide", [("hybrid", 1), ("conformer", 1), ("branchformer", 2)])
def test_a_stream_remembers_the_branch_beside_the_mixer(block, wide):
    bare, branched = (EncoderConfig(CONTROL, dim=32, depth=3, causal=True, block=b, block_kw=kw) for b, kw in (("transformer", {}), (block, {"kernel": 5})))
    assert cards.state_bytes(branched, 2.0) - cards.state_bytes(bare, 2.0) == 4 * 3 * (5 - 1) * 32 * wide


def test_the_positional_convolution_is_counted():
    bare, placed = (EncoderConfig(CONTROL, dim=32, depth=1, position=p) for p in ("none", "convolutional"))
    without, counts = encoder_macs(bare, 2.0), encoder_macs(placed, 2.0)
    own = counts["frames"] * 32 * 32 // POSITION_GROUPS * POSITION_KERNEL
    assert without["position"] == 0 and counts["position"] == own == counts["total"] - without["total"]
    assert training_macs(placed, 2.0) - training_macs(bare, 2.0) == 3 * own


@pytest.mark.parametrize("frontend", [e.name for e in frontends])
def test_a_fresh_copy_starts_anew_whatever_the_front_end(frontend):
    encoder = build_encoder(EncoderConfig(CONTROL, dim=32, depth=1, frontend=frontend), seed=0)
    if encoder.frontend.stored:
        encoder.frontend.set_statistics(torch.full((80,), 3.0), torch.full((80,), 2.0))
    new = fresh_copy(encoder, "scratch", 1)
    assert not torch.equal(new.blocks[0].ff[0].weight, encoder.blocks[0].ff[0].weight)
    if encoder.frontend.stored:
        assert torch.equal(new.frontend.mean, encoder.frontend.mean) and torch.equal(new.frontend.std, encoder.frontend.std)
