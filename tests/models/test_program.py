"""Programs of torch.export: saved, loaded again and equal, for every mixer; what cannot be one says so."""
import pytest
import torch

from essl_nb.core.registry import EsslError
from essl_nb.mixers.base import baseline_mixer, list_mixers, mixers
from essl_nb.models.config import EncoderConfig
from essl_nb.models.encoder import build_encoder
from essl_nb.models.program import export_program, load_program

QUICK = (baseline_mixer(), list_mixers("recurrent")[0])


def tiny(name, **kw):
    return build_encoder(EncoderConfig(name, dim=16, depth=2, mixer_kw=mixers.get(name).meta.get("tiny", {}), **kw), seed=0).eval()


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in list_mixers()])
def test_a_program_read_again_is_the_encoder(name, tmp_path):
    encoder = tiny(name)
    try:
        about = export_program(encoder, tmp_path / "encoder.pt2")
    except EsslError as e:
        assert "example's size only" in str(e) and name not in QUICK and list(tmp_path.iterdir()) == []
        return
    program, told = load_program(tmp_path / "encoder.pt2")
    assert told == about and told["parity"] < 1e-4
    wav, lengths = 0.1 * torch.randn(4, 20000), torch.tensor([20000, 15000, 700, 9000])
    with torch.no_grad():
        frames, real = program(wav, lengths)
        want = encoder(wav, lengths)
    torch.testing.assert_close(frames, want.frames, atol=1e-4, rtol=1e-4)
    assert real.tolist() == want.lengths.tolist()


def test_what_is_no_program_is_refused_and_nothing_is_lost(tmp_path):
    encoder, path = tiny(baseline_mixer()), tmp_path / "encoder.pt2"
    export_program(encoder, path)
    before = path.read_bytes()
    with pytest.raises(EsslError, match="there already"):
        export_program(encoder, path)
    (tmp_path / "torn.pt2").write_bytes(before[: len(before) // 2])
    with pytest.raises(EsslError, match="cannot be read"):
        load_program(tmp_path / "torn.pt2")
    with pytest.raises(EsslError, match="cannot be read"):
        load_program(tmp_path / "missing.pt2")
    torch.export.save(torch.export.export(torch.nn.Linear(2, 2), (torch.ones(1, 2),)), tmp_path / "other.pt2")
    with pytest.raises(EsslError, match="no program of export_program"):
        load_program(tmp_path / "other.pt2")
    with pytest.raises(EsslError, match="float32 on the CPU"):
        export_program(tiny(baseline_mixer()).double(), tmp_path / "new.pt2")
    assert path.read_bytes() == before and not (tmp_path / "new.pt2").exists()
