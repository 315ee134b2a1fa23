"""The card of live sound: its fields, a stream in both runtimes, counters and cold starts; no timing decides a test."""
import json

import numpy as np
import pytest
import torch

from essl_nb.core.registry import EsslError
from essl_nb.costs.command import streaming_text
from essl_nb.costs.streaming import Live, built, live_pair, percentiles, streaming_form
from essl_nb.costs.streaming_card import PRECISIONS, LiveFile, cold_start, energy_counter, files_of, streaming_cost
from essl_nb.mixers.base import baseline_mixer, list_mixers, mixers
from essl_nb.models.config import EncoderConfig

BASE = EncoderConfig(baseline_mixer(), dim=32, depth=1)
CANNOT = next(n for n in list_mixers() if not mixers.get(n).obj.can_be_chunked)


@pytest.fixture(scope="module")
def card():
    return streaming_cost(BASE, quick=True)


def test_a_card_holds_what_it_promises(card):
    assert card["card"] == "streaming" and card["streams"] and card["chunk_frames"] == 8 and card["protocol"]["chunk_seconds"] == 0.16
    for name in ("torch_float32", *(f"onnx_{p}" for p in PRECISIONS)):
        for who in ("", "baseline_"):
            assert 0 < card[f"{who}chunk_s_{name}_p50"] <= card[f"{who}chunk_s_{name}_p95"] <= card[f"{who}chunk_s_{name}_p99"]
            assert card[f"{who}cpu_s_per_audio_s_{name}"] > 0
        assert card[f"chunk_s_{name}_ratio_low"] <= card[f"chunk_s_{name}_ratio"] <= card[f"chunk_s_{name}_ratio_high"]
    assert card["latency_ms"] > 140 and "grows" in card["bound"] and card["state_bytes_per_second"] > 0
    assert card["disk_bytes_int8"] < card["disk_bytes_bf16"] < card["disk_bytes_fp32"]
    assert card["disk_bytes_onnx_int4"] < card["disk_bytes_onnx_float32"]
    assert 0 < card["cold_s_onnx_float32"] and card["peak_rss_bytes_onnx_float32"] < card["peak_rss_bytes_torch"]
    assert json.loads(json.dumps(card, allow_nan=False)) == card
    assert (card["energy"] is None) == ("joules_per_audio_s_torch_float32" not in card)
    assert "onnx_int8" in streaming_text(card)


def test_what_cannot_stream_has_a_card_that_says_why():
    card = streaming_cost(EncoderConfig(CANNOT, dim=32, depth=1), quick=True)
    assert card["streams"] is False and "look-ahead" in card["why"] and card["disk_bytes_fp32"] > 0
    assert card["why"] in streaming_text(card)


def test_the_streaming_form_keeps_what_streams_already():
    causal = EncoderConfig(baseline_mixer(), dim=32, depth=1, causal=True)
    assert streaming_form(causal) == causal and streaming_form(BASE, 0.32).chunk_frames == 16
    chunked = EncoderConfig(baseline_mixer(), dim=32, depth=1, chunk_frames=3)
    assert streaming_form(chunked) == chunked
    with pytest.raises(EsslError, match="less than a frame"):
        streaming_form(BASE, 0.001)


def test_both_runtimes_are_fed_chunk_by_chunk():
    config = streaming_form(BASE)
    live, file = Live(built(config, "cpu"), lead=1.0), LiveFile(files_of(config)["float32"], lead=1.0)
    assert live().frames.shape == (1, 8, 32) and file().shape == (1, 8, 32)
    before = file.state["cache"].shape[2], int(file.state["position"][0])
    file()
    assert file.state["cache"].shape[2] == before[0] + 8 and int(file.state["position"][0]) == before[1] + 8
    times = np.array(live_pair([config, config], chunks=4, lead=1.0))
    assert times.shape == (4, 2) and (times > 0).all()


def test_percentiles_are_those_of_the_values():
    found = percentiles("t", torch.arange(101).tolist())
    assert found == {"t_p50": 50.0, "t_p95": 95.0, "t_p99": 99.0}


def test_a_counter_of_energy_is_read_only_where_it_can_be(tmp_path):
    assert energy_counter(tmp_path) is None
    for name, value in (("intel-rapl:0", 3_000_000), ("intel-rapl:1", 1_500_000), ("intel-rapl:0:0", 9_000_000)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "energy_uj").write_text(f"{value}\n")
    assert energy_counter(tmp_path)() == 4.5, "both sockets, and not the cores within one of them once more"


def test_a_cold_start_that_fails_is_said(tmp_path):
    with pytest.raises(EsslError, match="cold start"):
        cold_start("onnx", tmp_path / "none.onnx", 1)


def test_the_command_says_where_streams_are_measured_on_a_gpu(tmp_path):
    from essl_nb.costs.command import essl_cost

    with pytest.raises(EsslError, match="tools/gpu.py"):
        essl_cost(baseline_mixer(), out=str(tmp_path / "x.json"), what="streaming", device="cuda")
