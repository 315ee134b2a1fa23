"""One model trained for several look-aheads: what is drawn, what is scored, what resumes."""
import pytest
import torch

from essl_nb.core.registry import EsslError
from essl_nb.mixers.base import list_mixers, mixers
from essl_nb.models.config import EncoderConfig
from essl_nb.models.encoder import Encoder, load_encoder
from essl_nb.train.config import PretrainConfig
from essl_nb.train.loop import pretrain

MIXER = next(name for name in list_mixers() if mixers.get(name).obj.can_be_chunked)


def config(folder, **changes):
    encoder = EncoderConfig(MIXER, dim=16, depth=1, mixer_kw=mixers.get(MIXER).meta.get("tiny", {}))
    return PretrainConfig(encoder, objective="best_rq", objective_kw=dict(codebook=32), corpus=str(folder), steps=12, batch_seconds=4, precision="fp32", **changes)


def test_each_step_draws_a_look_ahead_and_the_encoder_ends_with_its_own(clips, tmp_path, monkeypatch):
    seen, encode = [], Encoder.encode

    def watched(self, *given):
        if self.training:
            seen.append(self.chunk_frames)
        return encode(self, *given)

    monkeypatch.setattr(Encoder, "encode", watched)
    chunks = (None, 8, 2)
    pretrain(config(clips, chunks=chunks), tmp_path / "a", progress=False)
    first = list(seen)
    assert set(first) == set(chunks) and len(first) == 12
    seen.clear()
    pretrain(config(clips, chunks=chunks), tmp_path / "b", progress=False)
    assert seen == first
    assert load_encoder(tmp_path / "a" / "encoder").chunk_frames is None
    ends = [load_encoder(tmp_path / name / "encoder").state_dict() for name in "ab"]
    assert all(torch.equal(t, ends[1][name]) for name, t in ends[0].items())


def test_what_cannot_be_drawn_is_refused(clips, tmp_path):
    for chunks in ((0,), (1, -3)):
        with pytest.raises(EsslError, match="whole numbers of frames"):
            config(clips, chunks=chunks)
    with pytest.raises(EsslError, match="causal encoder"):
        PretrainConfig(EncoderConfig(MIXER, causal=True), chunks=(8,))
    whole = next(name for name in list_mixers() if not mixers.get(name).obj.can_be_chunked)
    with pytest.raises(EsslError, match="bounded look-ahead"):
        pretrain(PretrainConfig(EncoderConfig(whole, dim=16, depth=1), corpus=str(clips), chunks=(8, None), steps=3), tmp_path / "run", progress=False)
