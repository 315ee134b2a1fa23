"""Encoders in a folder: what is written is what is read, in as many bits as asked for."""
import json

import pytest
import torch
from safetensors import safe_open

from essl_nb import build_encoder, list_mixers, load_encoder
from essl_nb.core.registry import EsslError
from essl_nb.models.checkpoint import COLUMNS, PACKED, SCALE, STORED, quantised, read_checkpoint, weights_hash
from essl_nb.models.config import named_config


@pytest.mark.parametrize("name", list_mixers())
def test_eight_bits_are_a_quarter_of_the_size_and_nearly_the_same_frames(name, tmp_path):
    encoder = build_encoder(named_config("tiny", name, dim=96), seed=1).eval()
    encoder.frontend.set_statistics(torch.full((80,), -5.0), torch.full((80,), 2.0))
    size = lambda folder: (folder / "model.safetensors").stat().st_size
    again = load_encoder(encoder.save(tmp_path / "q", dtype=torch.int8))
    assert again.stored_as == STORED[torch.int8] and "int8" in repr(again)
    assert all(t.dtype == torch.float32 for t in again.parameters()) and size(tmp_path / "q") < 0.36 * size(encoder.save(tmp_path / "w"))
    assert torch.equal(again.frontend.mean, encoder.frontend.mean), "what is not trained is stored as it is"
    wav = 0.1 * torch.randn(1, 8000, generator=torch.Generator().manual_seed(0))
    assert (again(wav).frames - encoder(wav).frames).norm() < 0.05 * encoder(wav).frames.norm()
    twice = load_encoder(again.save(tmp_path / "again", dtype=torch.int8))
    assert torch.allclose(twice(wav).frames, again(wav).frames, atol=1e-2), "to be stored again loses next to nothing"


def test_the_error_of_each_weight_is_half_a_step_of_its_channel():
    w = torch.randn(40, 3, 5, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 2, 40)[:, None, None]
    q, scale = quantised(w)
    assert q.dtype == torch.int8 and scale.dtype == torch.float16 and scale.shape == (40, 1, 1)
    assert ((q.float() * scale.float() - w).abs() <= 0.56 * scale.float()).all()  # half a step, and the scale's own rounding
    q, scale = quantised(torch.zeros(4, 4))
    assert (q == 0).all() and scale.isfinite().all() and (scale > 0).all()
    assert quantised(w[None])[1].shape == (1, 40, 1, 1), "a leading dimension of one is no channel"


def test_a_file_says_how_it_is_stored_and_plain_readers_understand_it(tmp_path):
    for dtype, words in STORED.items():
        encoder = build_encoder(named_config("tiny", list_mixers()[0], rounding=dtype if isinstance(dtype, str) else None), seed=0)
        again = encoder.save(tmp_path / "again", dtype=dtype)
        encoder.save(tmp_path, dtype=dtype)
        assert (again / "model.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes(), "the same encoder, the same file"
        with safe_open(tmp_path / "model.safetensors", "pt") as f:
            names = [n for n in f.keys() if n.endswith(SCALE)]
            assert bool(names) == (dtype in (torch.int8, *PACKED))
            names = [n for n in names if n.removesuffix(SCALE) + COLUMNS not in f.keys()]  # packed ones need `unpacked`
            rows = {n: f.get_tensor(n.removesuffix(SCALE)).float() * f.get_tensor(n).float() for n in names}
        found = read_checkpoint(tmp_path)
        assert found.stored_as == words and set(found.tensors) == set(encoder.state_dict())
        assert all(torch.equal(found.tensors[n.removesuffix(SCALE)], w) for n, w in rows.items())
    assert weights_hash(encoder) != weights_hash(load_encoder(tmp_path))


def test_another_type_is_refused_and_what_was_there_stays(tmp_path):
    encoder = build_encoder(named_config("tiny", list_mixers()[0]), seed=0)
    encoder.save(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    with pytest.raises(EsslError, match="torch.float64 was given; weights are stored as torch.float16"):
        encoder.save(tmp_path, dtype=torch.float64)
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_the_shipped_encoders_are_small_and_say_how_they_are_stored(root):
    folders = sorted(p.parent for p in (root / "results").glob("*/encoders/*/config.json"))
    if not folders:
        pytest.skip("this tree carries no encoders")
    assert sum(p.stat().st_size for f in folders for p in f.iterdir()) < 2 * 2**20 * len(folders)
    for folder in folders:
        assert read_checkpoint(folder).stored_as == STORED[torch.int8]
        assert json.loads((folder / "origin.json").read_text())["stored_as"] == STORED[torch.int8]
