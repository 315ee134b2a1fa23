"""Front ends over the waveform and the picture, and whole wav2vec 2.0 and HuBERT models with their weights."""
import torch

from essl_nb.mixers.base import mixers
from essl_nb.mixers.mbconv import fold_batchnorm
from essl_nb.models.block import PostNormBlock, TransformerBlock
from essl_nb.models.encoder import ConvolutionalPosition, Encoder
from essl_nb.models.sincnet import SincFilters
from essl_nb.models.spectrogram import FusedMBConv2d
from essl_nb.models.wav2vec2 import from_torchaudio, from_transformers, torchaudio_names
from essl_nb.models.waveform import Wav2Vec2Frontend

from . import case, compare

BASELINE = next(e.name for e in mixers if e.meta.get("baseline"))
SMALL = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, conv_dim=(32,) * 7)
LAYOUTS = {"base": ("group_norm", False, False), "large": ("layer_norm", True, True)}  # convolutions, bias, pre-norm


def small(mode, bias, first, depth=3, dim=64):
    from torchaudio.models import wav2vec2_model

    return wav2vec2_model(mode, None, bias, dim, 0.0, 128, 16, depth, 4, 0.0, 2 * dim, 0.0, 0.0, first, 0.0, None).eval()


def through(encoder, theirs, wav):
    "Every layer and the output, then gradients of the waveform and of each parameter, through all layers at once."
    ours = encoder(wav)
    layers, last = theirs.extract_features(wav)[0], theirs(wav)[0]
    pairs = {f"layer {i + 1}": (a.detach(), b.detach()) for i, (a, b) in enumerate(zip(ours.layers[1:], layers, strict=True))}
    pairs["output"] = (ours.frames.detach(), last.detach())

    def flat(frames):
        return torch.cat(frames, -1)

    named = dict(theirs.named_parameters())
    encoder.zero_grad(), theirs.zero_grad()
    parameters = {}
    for name, p in encoder.named_parameters():
        if name != "frontend.hidden":
            parameters[name] = (p, [named[n] for n in torchaudio_names(name)])
    # a key's offset shifts all scores of a query alike: its true gradient is 0 and what is found is rounding
    qkv = [name for name in parameters if name.endswith("qkv.bias")]
    offsets = {name: parameters.pop(name) for name in qkv}
    gradients = compare(lambda x: flat([*encoder(x).layers[1:], encoder(x).frames]), lambda x: flat([*theirs.extract_features(x)[0], theirs(x)[0]]), wav, parameters)
    for name, (p, (q, _, v)) in offsets.items():
        gradients[f"gradient of {name}, queries and values"] = (torch.cat([p.grad.chunk(3)[i] for i in (0, 2)]), torch.cat([q.grad, v.grad]))
    return pairs | gradients


@case(Encoder, package="torchaudio", what="wav2vec2_model, layout of wav2vec2_base and hubert_base: every layer, all gradients, float64", tolerance=1e-11)
def wav2vec2_base_layout():
    theirs = small(*LAYOUTS["base"]).double()
    return through(from_torchaudio(theirs), theirs, torch.randn(2, 8000, dtype=torch.float64) * 0.1)


@case(Encoder, package="torchaudio", what="wav2vec2_model, layout of wav2vec2_large_lv60k: every layer, all gradients, float64", tolerance=1e-11)
def wav2vec2_large_layout():
    theirs = small(*LAYOUTS["large"]).double()
    return through(from_torchaudio(theirs), theirs, torch.randn(2, 8000, dtype=torch.float64) * 0.1)


@case(Encoder, package="torchaudio", what="wav2vec2_model, layout of wav2vec2_base: every layer, all gradients, float32", tolerance=1e-5)
def wav2vec2_base_layout_float32():
    theirs = small(*LAYOUTS["base"])
    return through(from_torchaudio(theirs), theirs, torch.randn(2, 8000) * 0.1)


@case(Encoder, package="torchaudio", what="wav2vec2_base() at real size, 2 s: every layer, float32", tolerance=1e-5)
def wav2vec2_base_real_size():
    from torchaudio.models import wav2vec2_base

    theirs = wav2vec2_base().eval()
    encoder, wav = from_torchaudio(theirs), torch.randn(1, 32000) * 0.1
    with torch.no_grad():
        return {f"layer {i + 1}": pair for i, pair in enumerate(zip(encoder(wav).layers[1:], theirs.extract_features(wav)[0], strict=True))}


@case(Encoder, package="torchaudio", what="wav2vec2_model, layout of wav2vec2_large_lv60k, padded batch with lengths (its convolutions' LayerNorm sees no padding)", tolerance=1e-11)
def wav2vec2_large_layout_padded():
    theirs = small(*LAYOUTS["large"]).double()
    encoder, lengths = from_torchaudio(theirs), torch.tensor([12000, 7000])
    wav = torch.randn(2, 12000, dtype=torch.float64) * 0.1
    with torch.no_grad():
        ours, (layers, out) = encoder(wav, lengths), theirs.extract_features(wav, lengths)
    assert torch.equal(ours.lengths, out)
    return {f"layer {i + 1}, utterance {b + 1}": (a[b, : out[b]], z[b, : out[b]]) for i, (a, z) in enumerate(zip(ours.layers[1:], layers)) for b in range(2)}


def hf_config(norm="group", stable=False, dim=32, **kw):
    from transformers import Wav2Vec2Config

    given = dict(hidden_size=dim, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48, feat_extract_norm=norm, conv_bias=norm == "layer", do_stable_layer_norm=stable)
    none = dict(hidden_dropout=0.0, attention_dropout=0.0, activation_dropout=0.0, feat_proj_dropout=0.0, layerdrop=0.0, apply_spec_augment=False)
    return Wav2Vec2Config(**given, **none, **kw)


def convolutions(norm):
    from transformers.models.wav2vec2.modeling_wav2vec2 import Wav2Vec2FeatureEncoder

    theirs = Wav2Vec2FeatureEncoder(hf_config(norm, conv_dim=(64,) * 7)).double().eval()
    ours = Wav2Vec2Frontend(8, norm=norm, channels=64, bias=norm == "layer").double()
    parameters = {}
    for i, layer in enumerate(theirs.conv_layers):
        ours.layers[i].load_state_dict(layer.conv.state_dict())
        parameters[f"layer {i}"] = (ours.layers[i].weight, layer.conv.weight)
        if i < len(ours.norms):
            ours.norms[i].load_state_dict(layer.layer_norm.state_dict())
            parameters[f"norm {i}"] = (ours.norms[i].weight, layer.layer_norm.weight)
    lengths = torch.tensor([4000, 4000])
    return compare(lambda x: ours.convolved(x[..., None], lengths), lambda x: theirs(x).transpose(1, 2), torch.randn(2, 4000, dtype=torch.float64), parameters)


@case(Wav2Vec2Frontend, package="transformers", what="Wav2Vec2FeatureEncoder, feat_extract_norm='group'", tolerance=1e-11)
def convolutions_group():
    return convolutions("group")


@case(Wav2Vec2Frontend, package="transformers", what="Wav2Vec2FeatureEncoder, feat_extract_norm='layer'", tolerance=1e-11)
def convolutions_layer():
    return convolutions("layer")


@case(ConvolutionalPosition, package="transformers", what="Wav2Vec2PositionalConvEmbedding, added to its input", tolerance=1e-11)
def positional_convolution():
    from transformers.models.wav2vec2.modeling_wav2vec2 import Wav2Vec2PositionalConvEmbedding

    theirs, ours = Wav2Vec2PositionalConvEmbedding(hf_config()).double(), ConvolutionalPosition(32).double()
    g, v = theirs.conv.parametrizations.weight.original0, theirs.conv.parametrizations.weight.original1
    with torch.no_grad():
        g.mul_(torch.rand_like(g) + 0.5)
        for mine, other in ((ours.length, g), (ours.direction, v), (ours.bias, theirs.conv.bias)):
            mine.copy_(other)
    return compare(ours, lambda x: x + theirs(x), torch.randn(2, 90, 32, dtype=torch.float64), {"length": (ours.length, g), "direction": (ours.direction, v), "bias": (ours.bias, theirs.conv.bias)})


def layer_of(theirs, ours, mask):
    pairs = ((ours.mixer.out, theirs.attention.out_proj), (ours.mixer_norm, theirs.layer_norm), (ours.ff_norm, theirs.final_layer_norm),
             (ours.ff[0], theirs.feed_forward.intermediate_dense), (ours.ff[3], theirs.feed_forward.output_dense))
    for mine, other in pairs:
        mine.load_state_dict(other.state_dict())
    qkv = [theirs.attention.q_proj, theirs.attention.k_proj, theirs.attention.v_proj]
    ours.mixer.qkv.load_state_dict({k: torch.cat([m.state_dict()[k] for m in qkv]) for k in ("weight", "bias")})
    parameters = {"qkv": (ours.mixer.qkv.weight, [m.weight for m in qkv]), **{f"weight {i}": (mine.weight, other.weight) for i, (mine, other) in enumerate(pairs)}}
    hidden = torch.where(mask, 0.0, -torch.inf).double()[:, None, None]
    clean = mask[..., None].double()  # theirs computes something in the padding, which nothing reads
    return compare(lambda x: ours(x, mask)[0], lambda x: theirs(x, attention_mask=hidden.expand(-1, 1, x.shape[1], -1)) * clean, torch.randn(2, 20, 32, dtype=torch.float64) * clean, parameters)


def real(lengths, T):
    return torch.arange(T)[None] < torch.tensor(lengths)[:, None]


@case(PostNormBlock, package="transformers", what="Wav2Vec2EncoderLayer, with padding", tolerance=1e-11)
def layer_postnorm():
    from transformers.models.wav2vec2.modeling_wav2vec2 import Wav2Vec2EncoderLayer

    config = hf_config()
    config._attn_implementation = "sdpa"
    ours = PostNormBlock(32, mixer=BASELINE, mixer_kw=dict(num_heads=4, rotary=False), ff_mult=1.5).double()
    return layer_of(Wav2Vec2EncoderLayer(config).double().eval(), ours, real([20, 13], 20))


@case(TransformerBlock, package="transformers", what="Wav2Vec2EncoderLayerStableLayerNorm, with padding", tolerance=1e-11)
def layer_prenorm():
    from transformers.models.wav2vec2.modeling_wav2vec2 import Wav2Vec2EncoderLayerStableLayerNorm

    config = hf_config()
    config._attn_implementation = "sdpa"
    ours = TransformerBlock(32, mixer=BASELINE, mixer_kw=dict(num_heads=4, rotary=False), ff_mult=1.5).double()
    return layer_of(Wav2Vec2EncoderLayerStableLayerNorm(config).double().eval(), ours, real([20, 13], 20))


def whole(model):
    model = model.double().eval()
    encoder, wav = from_transformers(model, normalise=False), torch.randn(2, 8000, dtype=torch.float64) * 0.1
    with torch.no_grad():
        ours, theirs = encoder(wav), model(wav, output_hidden_states=True)
    # the last of theirs is taken after the last norm
    pairs = {f"layer {i}": (a, b) for i, (a, b) in enumerate(zip(ours.layers[:-1], theirs.hidden_states[:-1], strict=True))}
    return pairs | {"output": (ours.frames, theirs.last_hidden_state)}


@case(Encoder, package="transformers", what="Wav2Vec2Model, post-norm: every layer", tolerance=1e-11)
def wav2vec2_model_postnorm():
    from transformers import Wav2Vec2Model

    return whole(Wav2Vec2Model(hf_config()))


@case(Encoder, package="transformers", what="HubertModel, pre-norm: every layer", tolerance=1e-11)
def hubert_model_prenorm():
    from transformers import HubertConfig, HubertModel

    return whole(HubertModel(HubertConfig(**{k: v for k, v in hf_config("layer", True).to_dict().items() if k in HubertConfig().to_dict() and k not in ("model_type", "architectures")})))


@case(Encoder, package="transformers", what="Data2VecAudioModel: every layer", tolerance=1e-11)
def data2vec_audio_model():
    from transformers import Data2VecAudioConfig, Data2VecAudioModel

    return whole(Data2VecAudioModel(Data2VecAudioConfig(**SMALL)))


def conformer(position):
    from transformers import Wav2Vec2ConformerConfig, Wav2Vec2ConformerModel

    model = Wav2Vec2ConformerModel(Wav2Vec2ConformerConfig(**SMALL, hidden_act="swish", position_embeddings_type=position))
    for name, t in model.named_parameters():  # biases of distances are 0 at the start
        if "pos_bias" in name:
            torch.nn.init.normal_(t, std=0.3)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm1d):
            for t in (module.weight, module.bias, module.running_mean):
                torch.nn.init.normal_(t)
            torch.nn.init.uniform_(module.running_var, 0.5, 2.0)
    return whole(model)


@case(Encoder, package="transformers", what="Wav2Vec2ConformerModel, relative position, BatchNorm folded: every layer; its positions are in float32", tolerance=1e-5)
def wav2vec2_conformer_relative():
    return conformer("relative")


@case(Encoder, package="transformers", what="Wav2Vec2ConformerModel, rotary position, BatchNorm folded: every layer; its positions are in float32", tolerance=1e-5)
def wav2vec2_conformer_rotary():
    return conformer("rotary")


@case(SincFilters, package="speechbrain", what="CNN.SincConv with valid padding and its window; its filters have the middle tap 1, ours gain 1", tolerance=1e-5)
def sinc_filters():
    from speechbrain.nnet.CNN import SincConv

    theirs = SincConv(40, 251, in_channels=1, padding="valid", stride=5, min_low_hz=30, min_band_hz=50)
    ours = SincFilters(40, lowest=30, narrowest=50)
    with torch.no_grad():
        ours.low.copy_(theirs.low_hz_[:, 0] / 1000)
        ours.band.copy_(theirs.band_hz_[:, 0] / 1000)
        ours.window.copy_(torch.cat([theirs.window_, torch.ones(1), theirs.window_.flip(0)]))
    low, high = (f.detach() for f in ours.cutoffs())
    scale = (2 * (high - low) / 16000)[:, None]  # from their scale to ours, held fixed: gradients of the cutoffs are not compared
    return compare(lambda x: ours(x[:, None], 5) / scale, lambda x: theirs(x[..., None]).transpose(1, 2), torch.randn(2, 4000) * 0.1)


@case(SincFilters, package="", what="1808.00158, equations 4 to 6: taps and gradients of the cutoffs", tolerance=1e-12)
def sinc_equations():
    ours = SincFilters(12, kernel=51).double()
    ours.window.copy_(torch.hamming_window(51, periodic=False, dtype=torch.float64))
    a, b = (p.detach().clone().requires_grad_() for p in (ours.low, ours.band))
    rows = []
    for i in range(12):
        f1 = (30 + 1000 * a[i].abs()) / 16000
        f2 = f1 + (50 + 1000 * b[i].abs()) / 16000
        taps = []
        for n in range(-25, 26):
            w = 0.54 - 0.46 * torch.cos(torch.tensor(2 * torch.pi * (n + 25) / 50, dtype=torch.float64))
            x2, x1 = 2 * torch.pi * f2 * n, 2 * torch.pi * f1 * n
            taps.append((2 * f2 * (x2.sin() / x2 if n else 1) - 2 * f1 * (x1.sin() / x1 if n else 1)) * w)
        rows.append(torch.stack(taps))
    weight, mine = torch.stack(rows), ours.weight()[:, 0]
    some = torch.randn(12, 51, dtype=torch.float64)
    (weight * some).sum().backward()
    (mine * some).sum().backward()
    return {"taps": (mine.detach(), weight.detach()), "gradient of low": (ours.low.grad, a.grad), "gradient of band": (ours.band.grad, b.grad)}


@case(FusedMBConv2d, package="timm", what="EdgeResidual in evaluation, BatchNorm folded: with and without stride, and ConvBnAct for expansion 1", tolerance=1e-11)
def fused_mbconv():
    from timm.models._efficientnet_blocks import ConvBnAct, EdgeResidual

    pairs = {}
    for expand, inside, outside, stride in ((4, 8, 8, 1), (4, 8, 12, 2), (1, 8, 8, 1)):
        if expand == 1:
            theirs = ConvBnAct(inside, outside, 3, stride=stride, pad_type="", skip=True, act_layer=torch.nn.SiLU)
        else:
            theirs = EdgeResidual(inside, outside, exp_kernel_size=3, stride=stride, exp_ratio=expand, act_layer=torch.nn.SiLU)
        theirs = theirs.double()
        theirs.train()(torch.randn(8, inside, 12, 12, dtype=torch.float64))  # statistics
        theirs.eval()
        ours = FusedMBConv2d(inside, outside, expand=expand, stride=stride, norm="affine").double()
        convolution = theirs.conv if expand == 1 else theirs.conv_exp
        parameters = {f"3×3 convolution, expansion {expand}": (ours.convolve.weight, convolution.weight)}
        with torch.no_grad():
            ours.convolve.weight.copy_(convolution.weight)
        ours.norm.load_state_dict(fold_batchnorm(theirs.bn1).state_dict())
        if expand > 1:
            ours.project.load_state_dict({"weight": theirs.conv_pwl.weight[:, :, 0, 0]})
            ours.last_norm.load_state_dict(fold_batchnorm(theirs.bn2).state_dict())
        x = torch.randn(2, 14, 10, inside, dtype=torch.float64)  # (B,T,F,C); theirs strides over both, so every second frame of ours
        found = compare(lambda x: ours(x)[:, ::stride], lambda x: theirs(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1), x, parameters)
        pairs |= {f"{k}, {inside} to {outside} channels, stride {stride}, expansion {expand}": v for k, v in found.items()}
    return pairs
