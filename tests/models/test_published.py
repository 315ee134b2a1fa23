"""Imported wav2vec 2.0 and HuBERT compute what the model computes, or the import says which setting stands in the way."""
import pytest
import torch
from torch import nn

from essl_nb import EncoderConfig, build_encoder, list_mixers
from essl_nb.core.registry import EsslError
from essl_nb.mixers.attention import Attention
from essl_nb.models.wav2vec2 import from_torchaudio, from_transformers

SMALL = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, conv_dim=(32,) * 7)
WAV = torch.randn(1, 8000, generator=torch.Generator().manual_seed(0)) * 0.1


def published(kind="Wav2Vec2", head="Model", **changes):
    import transformers

    torch.manual_seed(0)
    own = dict(hidden_act="swish") if "Conformer" in kind else {}
    model = getattr(transformers, f"{kind}{head}")(getattr(transformers, f"{kind}Config")(**{**SMALL, **own, **changes}))
    for name, t in model.state_dict().items():  # what is 0 or 1 at the start would hide a mistake
        if name.endswith(("bias", "pos_bias_u", "pos_bias_v", "running_mean", "norm.weight")):
            t.add_(0.2 * torch.randn(t.shape))
        elif name.endswith("running_var"):
            t.mul_(torch.rand(t.shape) + 0.5)
    return model.eval()


@pytest.mark.parametrize("kind, head", [("Wav2Vec2", "Model"), ("Wav2Vec2", "ForCTC"), ("Wav2Vec2", "ForPreTraining"), ("Hubert", "Model"), ("Hubert", "ForCTC")])
def test_with_and_without_a_head_the_frames_are_the_models(kind, head):
    model = published(kind, head)
    inner = getattr(model, model.base_model_prefix, model)
    with torch.no_grad():
        torch.testing.assert_close(from_transformers(model)(WAV).frames, inner(WAV).last_hidden_state, atol=1e-5, rtol=1e-4)
    assert not model.training


LAYOUTS = {  # name → kind, head, settings
    "data2vec": ("Data2VecAudio", "Model", {}), "data2vec, CTC": ("Data2VecAudio", "ForCTC", {}),
    "conformer, relative": ("Wav2Vec2Conformer", "Model", dict(position_embeddings_type="relative")),
    "conformer, rotary": ("Wav2Vec2Conformer", "ForPreTraining", dict(position_embeddings_type="rotary", conv_depthwise_kernel_size=15)),
    "conformer, no position": ("Wav2Vec2Conformer", "ForCTC", dict(vocab_size=30, position_embeddings_type=None, feat_extract_norm="layer", conv_bias=True)),
    "wav2vec 2.0, group, pre-norm": ("Wav2Vec2", "Model", dict(do_stable_layer_norm=True)),
    "wav2vec 2.0, layer, pre-norm": ("Wav2Vec2", "Model", dict(do_stable_layer_norm=True, feat_extract_norm="layer", conv_bias=True)),
    "HuBERT, layer, post-norm": ("Hubert", "Model", dict(feat_extract_norm="layer")),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layer_of_every_kind_is_the_models(layout):
    kind, head, changes = LAYOUTS[layout]
    model = published(kind, head, **changes)
    inner = getattr(model, model.base_model_prefix, model)
    normalised = (WAV - WAV.mean()) / (WAV.var(correction=0) + 1e-5).sqrt()
    encoder = from_transformers(model)
    with torch.no_grad():
        ours = encoder(WAV)
        theirs = inner(normalised if encoder.frontend.normalise else WAV, output_hidden_states=True)
    torch.testing.assert_close(ours.frames, theirs.last_hidden_state, atol=1e-5, rtol=1e-4)
    last = -1 if not encoder.norm_first else None  # the last of theirs comes after the last norm
    for a, b in zip(ours.layers[:last], theirs.hidden_states[:last], strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("layout", ["data2vec", "conformer, relative", "conformer, rotary"])
def test_padding_changes_nothing(layout):
    kind, head, changes = LAYOUTS[layout]
    encoder = from_transformers(published(kind, head, **changes))
    batch = torch.full((2, 12000), torch.nan)
    batch[0], batch[1, :8000] = 0.1, WAV[0]
    with torch.no_grad():
        single, padded = encoder(WAV).frames, encoder(batch, torch.tensor([12000, 8000])).frames[1:]
    T = single.shape[1]
    torch.testing.assert_close(padded[:, :T], single, atol=1e-5, rtol=1e-4)
    assert not padded[:, T:].any()


@pytest.mark.parametrize("causal", [False, True])
def test_rotated_frames_know_distance_and_stream(causal):
    mixer = Attention(16, num_heads=2, rotary="frames", causal=causal).double()
    x, mask = torch.randn(2, 21, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), torch.arange(21)[None] < torch.tensor([[21], [13]])
    ours, single = mixer(torch.where(mask[..., None], x, torch.nan), mask), mixer(x[1:, :13])
    torch.testing.assert_close(ours[1:, :13], single)
    assert not ours[1, 13:].any() and not torch.allclose(ours[0], Attention.forward(mixer, x.flip(1))[0].flip(0))
    torch.testing.assert_close(mixer.maps(x)["weights"].values @ mixer.heads(x)[2], torch.nn.functional.scaled_dot_product_attention(*mixer.heads(x), is_causal=causal))
    if causal:
        state, parts = mixer.init_state(2), []
        for part in x.split(5, 1):
            y, state = mixer.step(part, state)
            parts.append(y)
        torch.testing.assert_close(torch.cat(parts, 1), mixer(x))
    with pytest.raises(EsslError, match="True, False or 'frames'"):
        Attention(16, num_heads=2, rotary="keys")


def test_a_norm_that_stands_nowhere_is_refused():
    with pytest.raises(EsslError, match="'first' or 'last'"):
        build_encoder(EncoderConfig(list_mixers()[0], dim=32, block="conformer", block_kw=dict(encoder_norm="never")))
    with pytest.raises(EsslError, match="looks ahead"):
        EncoderConfig(list_mixers()[0], dim=32, position="stacked", causal=True)


CHANGES = [
    ("Wav2Vec2Conformer", dict(hidden_act="gelu")), ("Wav2Vec2Conformer", dict(rotary_embedding_base=500)), ("Data2VecAudio", dict(conv_pos_kernel_size=9)),
    ("Wav2Vec2", dict(hidden_act="relu")), ("Wav2Vec2", dict(feat_extract_activation="relu")), ("Wav2Vec2", dict(layer_norm_eps=1e-3)),
    ("Wav2Vec2", dict(conv_stride=(5, 2, 2, 2, 2, 2, 1))), ("Wav2Vec2", dict(add_adapter=True)), ("Wav2Vec2", dict(num_conv_pos_embeddings=64)),
    ("Wav2Vec2", dict(adapter_attn_dim=8, do_stable_layer_norm=True)), ("Hubert", dict(conv_pos_batch_norm=True)), ("Hubert", dict(feat_proj_layer_norm=False)),
]


@pytest.mark.parametrize("kind, change", CHANGES, ids=lambda v: "-".join(v) if isinstance(v, dict) else v)
def test_a_setting_without_a_place_here_is_refused_by_name(kind, change):
    with pytest.raises(EsslError, match=next(iter(change))):
        from_transformers(published(kind, **change))


@pytest.mark.parametrize("change", [dict(hidden_dropout=0.3), dict(mask_time_prob=0.5), dict(ctc_loss_reduction="mean"), dict(vocab_size=40), dict(layerdrop=0.4)], ids=lambda c: next(iter(c)))
def test_settings_of_training_and_heads_do_not_matter(change):
    from_transformers(published("Wav2Vec2", "ForCTC", **change))


def test_code_that_differs_is_found_though_no_setting_tells_it():
    model = published()
    for layer in model.encoder.layers:
        layer.feed_forward.intermediate_act_fn = nn.SiLU()
    with pytest.raises(EsslError, match="other frames"):
        from_transformers(model)
    import torchaudio

    theirs = torchaudio.models.wav2vec2_model("group_norm", None, False, 64, 0.0, 128, 16, 2, 4, 0.0, 128, 0.0, 0.0, False, 0.0, None)
    from_torchaudio(theirs)
    for module in theirs.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-2
    with pytest.raises(EsslError, match="other frames"):
        from_torchaudio(theirs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_half_and_double_models_are_taken_and_left_as_they_were(dtype):
    model = published().to(dtype).train()
    encoder = from_transformers(model)
    assert model.training and next(model.parameters()).dtype == dtype
    assert encoder.norm.weight.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_another_kind_of_model_is_named():
    from transformers import WhisperConfig, WhisperModel

    model = WhisperModel(WhisperConfig(d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, vocab_size=100, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1))
    with pytest.raises(EsslError, match="'whisper' was given"):
        from_transformers(model)
    with pytest.raises(EsslError, match="no place for|kernels"):
        from_transformers(published("WavLM"))
