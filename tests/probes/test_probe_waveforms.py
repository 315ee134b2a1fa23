"Encoders that read the waveform, published ones among them, are probed and fine-tuned like those that read log-mel."

import numpy as np
import pytest
import torch
from test_probe import QUICK

from essl_nb.core.registry import EsslError
from essl_nb.data.corpus import load_corpus
from essl_nb.mixers.base import list_mixers
from essl_nb.models.config import EncoderConfig
from essl_nb.models.encoder import build_encoder
from essl_nb.models.frontend import frontends
from essl_nb.probes.finetune import Recogniser, masked_batch, time_mask
from essl_nb.probes.frames import Segment, Source
from essl_nb.probes.probe import baseline_scores, run_probe

WAVES = [e.name for e in frontends if not e.obj.stored]
SMALL = {"wav2vec2": dict(channels=16)}


def wave_encoder(frontend, **kw):
    return build_encoder(EncoderConfig(list_mixers()[0], dim=16, depth=1, frontend=frontend, frontend_kw={**SMALL.get(frontend, {}), **kw}), seed=0).eval()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    "Twenty clips of about 0.6 s: tones of four heights, 100 ms each, with their labels; two voices; one clip is shorter than a frame."
    import soundfile

    root = tmp_path_factory.mktemp("tones")
    rows, phones = ["id,path,split,speaker,part"], ["id,phone,start,end"]
    for i in range(20):
        generator = np.random.default_rng(i)
        order, size = generator.integers(4, size=6), 9600 + 70 * i
        t = np.arange(size) / 16000
        heights = 300.0 * 2 ** order[np.minimum(np.arange(size) // 1600, 5)]
        tone = 0.3 * np.sin(2 * np.pi * np.cumsum(heights) / 16000) + 0.01 * generator.standard_normal(size)
        tone = tone[:330] if i == 19 else tone
        soundfile.write(root / f"{i}.wav", tone, 16000)
        rows.append(f"c{i},{i}.wav,{('train', 'train', 'valid', 'test')[i // 2 % 4]},v{i % 2},x")
        if i != 19:
            phones += [f"c{i},{'abcd'[c]},{n / 10},{n / 10 + 0.1}" for n, c in enumerate(order)]
    (root / "manifest.csv").write_text("\n".join(rows))
    (root / "phones.csv").write_text("\n".join(phones))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ESSL_CACHE", str(tmp_path_factory.mktemp("cache")))
        found = load_corpus(root)
        found.features(progress=False)
        yield found


def ask(encoder, name, corpus, **kw):
    return run_probe(encoder, name, corpus, progress=False, precision="fp32", **{**QUICK[name], **kw})


@pytest.mark.parametrize("frontend", WAVES)
@pytest.mark.parametrize("name", ["phones", "masked_phones", "voice", "units", "finetune"])
def test_every_probe_takes_an_encoder_over_the_waveform(frontend, name, corpus):
    score = ask(wave_encoder(frontend), name, corpus)
    assert score.count > 0 and score.low <= score.value <= score.high


def test_published_weights_are_probed_and_fine_tuned(corpus):
    transformers = pytest.importorskip("transformers")
    from essl_nb.models.wav2vec2 import from_transformers

    sizes = dict(hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=32, conv_dim=(16,) * 7)
    for config, model in ((transformers.Wav2Vec2Config, transformers.Wav2Vec2Model), (transformers.HubertConfig, transformers.HubertModel)):
        torch.manual_seed(0)
        encoder = from_transformers(model(config(**sizes)))
        for name in ("phones", "masked_phones", "units", "finetune"):
            assert 0 <= ask(encoder, name, corpus).value
    rivals = baseline_scores(encoder, "masked_phones", corpus, progress=False, **QUICK["masked_phones"])
    assert list(rivals) == ["log-mel", "log-mel ±40 ms", "log-mel ±100 ms", "untrained"]


@pytest.mark.parametrize("frontend", WAVES)
def test_a_batch_of_waveforms_gives_the_frames_of_each_alone(frontend, corpus):
    encoder, features = wave_encoder(frontend), corpus.features(progress=False)
    clips = [u for u in corpus if u.id != "c19"]
    together, alone = (Source(encoder, features, precision="fp32", batch_seconds=s).frames(clips, progress=False) for s in (60, 0.1))
    assert together.bounds == alone.bounds and torch.allclose(together.data.float(), alone.data.float(), atol=5e-3)
    wav = Source(encoder, features, precision="fp32").samples(clips[3])
    first, last = alone.bounds[clips[3].id]
    with torch.no_grad():
        direct = encoder(wav[None]).layers[-1][0]
    assert torch.allclose(alone.data[first:last, -1].float(), direct, atol=5e-3)


def test_hidden_frames_hear_nothing_of_the_sound(corpus):
    "With every frame but the first hidden, what is hidden looks the same whatever was said there."
    encoder = wave_encoder("wav2vec2")
    source = Source(encoder, corpus.features(progress=False), precision="fp32")
    raws = [source.raw(corpus["c0"])[:8000], source.raw(corpus["c1"])[:8000]]
    hidden = torch.ones(source.out_length(8000), dtype=torch.bool)
    layers, _ = source.layers(raws, [hidden, hidden])
    assert torch.equal(layers[0], layers[1])


def test_a_frame_is_about_the_middle_of_what_it_sees(corpus):
    source = Source(wave_encoder("wav2vec2"), corpus.features(progress=False), precision="fp32")
    assert source.centre_seconds == pytest.approx(0.0125) and source.rate == 16000
    assert Source(build_encoder(EncoderConfig(list_mixers()[0], dim=16, depth=1), seed=0), corpus.features(progress=False), precision="fp32").centre_seconds == 0.005


def test_a_piece_of_a_waveform_is_the_sound_of_its_log_mel(corpus):
    source = Source(wave_encoder("wav2vec2"), corpus.features(progress=False), precision="fp32")
    u = corpus["c2"]
    piece = Segment("a piece", u, 20, 30)
    assert torch.equal(source.samples(piece), source.samples(u)[3200:8000]) and source.raw_length(piece) == 4800
    assert torch.equal(source.mel(piece), source.mel(u)[20:50])


def test_statistics_of_a_clip_are_taken_before_it_is_padded(corpus):
    source = Source(wave_encoder("wav2vec2", normalise=True), corpus.features(progress=False), precision="fp32")
    raw = source.raw(corpus["c4"])
    assert raw.mean().abs() < 1e-4 and abs(raw.std(correction=0) - 1) < 1e-2


def test_time_is_masked_where_samples_are_read(corpus):
    encoder = wave_encoder("wav2vec2")
    model = Recogniser(encoder, 4, torch.Generator().manual_seed(0))
    raw, lengths, span = masked_batch(model, [torch.randn(16000, 1), torch.randn(9000, 1)], None, [torch.Generator().manual_seed(i) for i in range(2)])
    assert raw.shape == (2, 16000, 1) and span.shape == (2, 49) and lengths.tolist() == [16000, 9000]
    shares = [time_mask(500, 0.02, torch.Generator().manual_seed(i)).float().mean().item() for i in range(30)]
    assert 0 < np.mean(shares) < 0.15
    model(raw, lengths, span)[0].sum().backward()
    assert encoder.frontend.hidden.grad is not None


def test_a_crop_shorter_than_a_frame_is_refused(corpus):
    from essl_nb.probes.frames import pooled

    source = Source(wave_encoder("wav2vec2"), corpus.features(progress=False), precision="fp32")
    with pytest.raises(EsslError, match="shorter than a frame"):
        pooled(source, [Segment("short", corpus["c0"], 0, 2)], progress=False)
