"""How much is hidden: the realised share of every paper's settings, placement, contradictions."""
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch

from essl_nb.core.config import from_json, to_json
from essl_nb.core.registry import EsslError, UnknownName
from essl_nb.objectives.masking import MASKINGS, Masking, named_masking
from essl_nb.objectives.spans import counted_spans, draw_spans, realised_share, start_prob_for, whole_spans


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def runs(row):
    "Lengths of the hidden runs of an utterance."
    edges = torch.nn.functional.pad(row.int(), (1, 1)).diff()
    return ((edges == -1).nonzero() - (edges == 1).nonzero()).flatten()


@pytest.mark.parametrize("name, share", [("essl", 0.40), ("wav2vec2", 0.49), ("hubert", 0.57), ("data2vec", 0.49), ("data2vec2", 0.50), ("best_rq", 0.33)])
@pytest.mark.parametrize("frame_seconds", [0.01, 0.02, 0.04])
def test_realised_share_of_the_papers(name, share, frame_seconds):
    lengths = torch.full((150,), 500)
    hidden = MASKINGS[name].draw(lengths, frame_seconds=frame_seconds, generator=seeded())
    assert abs(realised_share(hidden, lengths) - share) < 0.025 and abs(MASKINGS[name].expected_share(frame_seconds) - share) < 0.015
    assert set(MASKINGS) == {"essl", "wav2vec2", "hubert", "data2vec", "data2vec2", "best_rq"}


@pytest.mark.parametrize("count", ["bernoulli", "utterance", "batch"])
@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("inverse", [True, False])
def test_spans_stay_inside_and_follow_the_share(count, overlap, inverse):
    masking = Masking(0.1, share=0.3, count=count, overlap=overlap, inverse=inverse)
    lengths = torch.tensor([300] * 100)
    assert abs(realised_share(masking.draw(lengths, generator=seeded()), lengths) - 0.3) < 0.03
    ragged = torch.tensor([60, 3, 1, 0, 200])
    hidden = masking.draw(ragged, generator=seeded(), T=210)
    assert hidden.shape == (5, 210) and not hidden[torch.arange(210) >= ragged[:, None]].any()
    assert hidden[[0, 1, 2, 4]].any(1).all()  # one span at least
    assert torch.equal(hidden, masking.draw(ragged, generator=seeded(), T=210))


def test_the_default_is_draw_spans():
    lengths = torch.tensor([60, 35, 8])
    ours = Masking().draw(lengths, generator=seeded(4))
    assert torch.equal(ours, draw_spans(lengths, span=10, start_prob=start_prob_for(0.4, 10), generator=seeded(4)))
    assert torch.equal(ours, MASKINGS["essl"].draw(lengths, generator=seeded(4)))


def test_whole_spans():
    for seed in range(40):
        separate = whole_spans(50, 7, 4, seeded(seed), overlap=False)
        assert separate.sum() == 28 and (runs(separate) % 7 == 0).all()
        over = whole_spans(50, 7, 4, seeded(seed))
        assert 10 <= over.sum() <= 28 and (runs(over) >= 7).all()
    assert whole_spans(50, 7, 99, seeded(), overlap=False).sum() == 49 and whole_spans(3, 7, 1, seeded()).all() and len(whole_spans(0, 7, 1, seeded())) == 0
    often = torch.stack([whole_spans(30, 5, 3, seeded(s), overlap=False) for s in range(3000)]).float().mean(0)
    assert abs(often.mean() - 0.5) < 0.01 and (often[5:25] - 0.5).abs().max() < 0.12


def test_count_per_utterance_and_per_batch():
    lengths = torch.tensor([400, 100])
    spans_of = lambda count: counted_spans(lengths, span=5, start_prob=0.05, overlap=False, count=count, generator=seeded()).sum(1) // 5
    assert spans_of("utterance").tolist() == [20, 5] and spans_of("batch").tolist() == [5, 5]
    with pytest.raises(EsslError, match="T ="):
        counted_spans(lengths, span=5, start_prob=0.05, generator=seeded(), T=300)


def test_inverse_leaves_whole_blocks_visible():
    masking = Masking(5, "frames", 0.5, count="utterance", inverse=True)
    hidden = masking.draw(torch.full((50,), 200), generator=seeded())
    assert all((runs(~row) >= 5).all() for row in hidden) and any((runs(row) < 5).any() for row in hidden)


def test_plain_values():
    for masking in MASKINGS.values():
        assert from_json(Masking, to_json(masking)) == masking == Masking(**asdict(masking))
    assert named_masking("wav2vec2", span=5) == Masking(5, "frames", None, 0.065, count="utterance")


def test_needs_no_torch():
    code = "import sys; from essl_nb.objectives.masking import Masking; Masking(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("wrong", [
    dict(share=None), dict(start_prob=0.1), dict(share=None, start_prob=0.1), dict(share=1.0), dict(span=0.0), dict(span=2.5, unit="frames"),
    dict(min_spans=-1), dict(unit="samples"), dict(count="each"), dict(share="0.4")], ids=str)
def test_contradictions_are_refused(wrong):
    with pytest.raises(EsslError):
        Masking(**wrong)
    with pytest.raises(UnknownName, match="wav2vec2"):
        named_masking("wav2vec")
