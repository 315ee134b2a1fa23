"""Imported wav2vec 2.0 and HuBERT compute what the model computes, or the import says which setting stands in the way."""
import pytest
import torch
from torch import nn

from essl_nb.core.registry import EsslError
from essl_nb.models.wav2vec2 import from_torchaudio, from_transformers

SMALL = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, conv_dim=(32,) * 7)
WAV = torch.randn(1, 8000, generator=torch.Generator().manual_seed(0)) * 0.1


def published(kind="Wav2Vec2", head="Model", **changes):
    import transformers

    torch.manual_seed(0)
    return getattr(transformers, f"{kind}{head}")(getattr(transformers, f"{kind}Config")(**{**SMALL, **changes})).eval()


@pytest.mark.parametrize("kind, head", [("Wav2Vec2", "Model"), ("Wav2Vec2", "ForCTC"), ("Wav2Vec2", "ForPreTraining"), ("Hubert", "Model"), ("Hubert", "ForCTC")])
def test_with_and_without_a_head_the_frames_are_the_models(kind, head):
    model = published(kind, head)
    inner = getattr(model, model.base_model_prefix, model)
    with torch.no_grad():
        torch.testing.assert_close(from_transformers(model)(WAV).frames, inner(WAV).last_hidden_state, atol=1e-5, rtol=1e-4)
    assert not model.training


CHANGES = [
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
