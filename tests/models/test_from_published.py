"""Published weights as they lie on a disk or in huggingface_hub's cache: every kind gives the model's own frames, with another mixer all the rest is kept, and what is not weights is refused."""
import json

import pytest
import torch
from safetensors.torch import save_file

from essl_nb import build_encoder, list_mixers
from essl_nb.core.registry import EsslError
from essl_nb.mixers.base import baseline_mixer, mixers
from essl_nb.models.config import named_config
from essl_nb.models.published import from_published, start_from
from essl_nb.models.swap import inherit, with_mixer

from test_published import LAYOUTS, WAV, published

OTHER = list_mixers("recurrent")[0]
KINDS = ["data2vec, CTC", "conformer, relative", "conformer, rotary", "wav2vec 2.0, layer, pre-norm", "HuBERT, layer, post-norm"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    "kind → (model, folder as transformers writes it)"
    made = {}
    for name in KINDS:
        kind, head, changes = LAYOUTS[name]
        folder = tmp_path_factory.mktemp("published")
        made[name] = (published(kind, head, **changes), folder)
        made[name][0].save_pretrained(folder)
    return made


def frames_of(model, wav):
    with torch.no_grad():
        return getattr(model, model.base_model_prefix, model)(wav).last_hidden_state


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_of_transformers_gives_the_models_frames(folders, kind):
    model, folder = folders[kind]
    found = from_published(folder, normalise=False)
    torch.testing.assert_close(found.encoder(WAV).frames.detach(), frames_of(model, WAV), atol=1e-5, rtol=1e-4)
    assert not found.inherited.new and found.inherited.kept == {n: t.numel() for n, t in found.encoder.state_dict().items()}
    if model.base_model_prefix and hasattr(model, model.base_model_prefix):
        assert any(name.startswith(("lm_head", "quantizer")) for name in found.inherited.left), "what a head was is counted"
    assert not any("conv_module" in name for name in found.inherited.left) and ("conformer" in kind) == any("pos_conv_embed" in name for name in found.inherited.left)


@pytest.mark.parametrize("kind", KINDS)
def test_with_another_mixer_all_the_rest_is_kept(folders, kind):
    own = from_published(folders[kind][1]).encoder
    found = from_published(folders[kind][1], OTHER, seed=3)
    state, there = found.encoder.state_dict(), own.state_dict()
    assert found.encoder.config.mixer == OTHER and set(found.inherited.new) == {n for n in state if ".mixer." in n}
    assert all(torch.equal(state[n], there[n]) for n in found.inherited.kept) and len(found.inherited.kept) == len(state) - len(found.inherited.new)
    assert f"of {sum(t.numel() for t in state.values()):,} numbers" in str(found)
    again = from_published(folders[kind][1], OTHER, seed=3).encoder
    assert torch.equal(again(WAV).frames, found.encoder(WAV).frames) and found.encoder(WAV).frames.isfinite().all()
    found.encoder.train()(WAV).frames.square().mean().backward()
    assert all(p.grad is not None for p in found.encoder.parameters())


@pytest.mark.parametrize("name", list_mixers())
def test_every_mixer_fits_where_attention_stood(folders, name):
    encoder, counts = with_mixer(from_published(folders["wav2vec 2.0, layer, pre-norm"][1]).encoder, name)
    assert encoder(WAV).frames.isfinite().all() and counts.kept
    if name != baseline_mixer():
        assert all(".mixer." in n for n in counts.new), "only the mixer is new, whole blocks included"


def test_shards_and_what_lies_beside_are_read(folders, tmp_path):
    from transformers import Wav2Vec2FeatureExtractor

    model, whole = folders["HuBERT, layer, post-norm"]
    model.save_pretrained(tmp_path, max_shard_size="150KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    Wav2Vec2FeatureExtractor(do_normalize=False).save_pretrained(tmp_path)
    found = from_published(tmp_path)
    assert not found.encoder.frontend.normalise and from_published(whole).encoder.frontend.normalise
    torch.testing.assert_close(found.encoder(WAV).frames.detach(), frames_of(model, WAV), atol=1e-5, rtol=1e-4)
    next(iter(sorted(tmp_path.glob("*.safetensors")))).unlink()
    with pytest.raises(EsslError, match="There is no file"):
        from_published(tmp_path)


def test_a_file_alone_is_read_by_its_names(folders, tmp_path):
    import torchaudio

    model, folder = folders["conformer, relative"]
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    found = from_published(tmp_path / "model.safetensors", normalise=False)  # the biases of distances tell the number of heads
    torch.testing.assert_close(found.encoder(WAV).frames.detach(), frames_of(model, WAV), atol=1e-5, rtol=1e-4)
    theirs = torchaudio.models.wav2vec2_model("layer_norm", None, True, 64, 0.0, 128, 16, 2, 4, 0.0, 128, 0.0, 0.0, True, 0.0, None).eval()
    save_file(theirs.state_dict(), tmp_path / "torchaudio.safetensors")
    with pytest.raises(EsslError, match="give heads="):
        from_published(tmp_path / "torchaudio.safetensors")
    with torch.no_grad():
        torch.testing.assert_close(from_published(tmp_path / "torchaudio.safetensors", heads=4).encoder(WAV).frames, theirs(WAV)[0], atol=1e-5, rtol=1e-4)


def test_layers_are_those_that_were_asked_for(folders):
    own = from_published(folders["HuBERT, layer, post-norm"][1]).encoder
    first, last = (from_published(folders["HuBERT, layer, post-norm"][1], layers=i).encoder for i in (1, [1]))
    assert torch.equal(first(WAV).layers[1], own(WAV).layers[1]) and first.config.depth == 1
    assert torch.equal(last.blocks[0].mixer.qkv.weight, own.blocks[1].mixer.qkv.weight) and torch.equal(last.blocks[0].ff[0].weight, own.blocks[1].ff[0].weight)
    for wrong in (0, 3, [2], [-1], [], True, "1"):
        with pytest.raises(EsslError, match="the encoder has 2 blocks"):
            with_mixer(own, layers=wrong)
    with pytest.raises(EsslError, match="2 blocks were chosen for an encoder of 1"):
        inherit(first, own)


def test_the_same_mixer_with_other_options_is_another(folders):
    own = from_published(folders["wav2vec 2.0, layer, pre-norm"][1]).encoder
    _, counts = with_mixer(own, own.config.mixer, mixer_kw=dict(num_heads=2, rotary=False))
    assert counts.new and all(".mixer." in n for n in counts.new)


def test_a_folder_of_this_project_is_opened_too(folders, tmp_path):
    own = from_published(folders["data2vec, CTC"][1]).encoder
    own.save(tmp_path / "run" / "encoder")
    for folder in (tmp_path / "run", tmp_path / "run" / "encoder"):
        assert torch.equal(from_published(folder).encoder(WAV).frames, own(WAV).frames)
    assert from_published(tmp_path / "run", OTHER).inherited.new


@pytest.mark.parametrize("kind", ["conformer, relative", "HuBERT, layer, post-norm"])
def test_an_encoder_of_that_configuration_starts_from_the_weights(folders, kind, tmp_path):
    first = from_published(folders[kind][1], OTHER, seed=3).encoder
    built = build_encoder(first.config, seed=4)
    counts = start_from(built, folders[kind][1])
    assert set(counts.new) == {n for n in built.state_dict() if ".mixer." in n}
    counts = start_from(built, first.save(tmp_path))  # the new mixer goes over too
    assert not counts.new and torch.equal(built.eval()(WAV).frames, first(WAV).frames)
    with pytest.raises(EsslError, match="differ in .*frontend: 'wav2vec2' there, 'logmel' here"):
        start_from(build_encoder(named_config("tiny", OTHER)), folders[kind][1])


def cache(root, name, files):
    "A repository in huggingface_hub's cache, as it leaves it after a download."
    at = root / f"models--{name.replace('/', '--')}"
    (at / "refs").mkdir(parents=True)
    (at / "refs" / "main").write_text("0" * 40)
    (at / "snapshots" / ("0" * 40)).mkdir(parents=True)
    for file, content in files.items():
        (at / "snapshots" / ("0" * 40) / file).write_bytes(content)


def test_a_name_on_the_hub_is_read_from_the_cache(folders, tmp_path):
    pytest.importorskip("huggingface_hub")
    model, folder = folders["data2vec, CTC"]
    cache(tmp_path, "org/data2vec", {p.name: p.read_bytes() for p in folder.iterdir()})
    cache(tmp_path, "org/pickled", {"config.json": b'{"model_type": "hubert"}'})
    found = from_published("org/data2vec", normalise=False, cache_dir=tmp_path, local_files_only=True)
    torch.testing.assert_close(found.encoder(WAV).frames.detach(), frames_of(model, WAV), atol=1e-5, rtol=1e-4)
    assert "from org/data2vec" in str(found)
    with pytest.raises(EsslError, match="'org/pickled' holds no safetensors file.*revision='refs/pr/1'"):
        from_published("org/pickled", cache_dir=tmp_path, local_files_only=True)
    with pytest.raises(EsslError, match="not in the local cache"):
        from_published("org/none", cache_dir=tmp_path, local_files_only=True)


def test_what_is_not_weights_is_refused(folders, tmp_path):
    _, folder = folders["data2vec, CTC"]
    torch.save({"a": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    for place in (tmp_path, tmp_path / "pytorch_model.bin"):
        with pytest.raises(EsslError, match="weights_only=True"):
            from_published(place)
    torn = tmp_path / "torn"
    torn.mkdir()
    (torn / "config.json").write_text((folder / "config.json").read_text())
    (torn / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(EsslError, match="not a whole safetensors file"):
        from_published(torn)
    (torn / "config.json").write_text(json.dumps({"model_type": "whisper"}))
    (torn / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(EsslError, match="'whisper' was given"):
        from_published(torn)
    with pytest.raises(EsslError, match="There is no file"):
        empty = tmp_path / "empty"
        empty.mkdir()
        from_published(empty)
    with pytest.raises(EsslError, match="is for names on the hub"):
        from_published(folder, revision="main")


def test_a_whole_block_in_a_post_norm_model_is_refused_with_what_to_take(folders):
    whole = [e.name for e in mixers if e.obj.whole_block]
    with pytest.raises(EsslError, match="whole block"):
        from_published(folders["HuBERT, layer, post-norm"][1], whole[0])
