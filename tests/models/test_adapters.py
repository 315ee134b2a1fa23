"""The encoder inside the real SpeechBrain and the real s3prl gives the encoder's own frames, and trains there."""
import subprocess
import sys

import pytest
import torch
from torch import nn

from essl_nb import EncoderConfig, build_encoder, list_mixers
from essl_nb.core.registry import EsslError
from essl_nb.models.adapters import SpeechBrainEncoder, s3prl_upstream

WAVS = torch.randn(2, 16000, generator=torch.Generator().manual_seed(0)) * 0.1
SHARES, SAMPLES = torch.tensor([0.617, 1.0]), torch.tensor([9872, 16000])


def small():
    return build_encoder(EncoderConfig(list_mixers()[0], dim=32, depth=2), seed=0).eval()


def test_shares_are_the_samples_that_they_stand_for():
    encoder = small()
    ours = encoder(WAVS, SAMPLES)
    assert torch.equal(SpeechBrainEncoder(encoder).eval()(WAVS, SHARES), ours.frames)
    assert torch.equal(SpeechBrainEncoder(encoder, output_all_hiddens=True).eval()(WAVS, SHARES), torch.stack(ours.layers))


@pytest.mark.parametrize("wrong", [[16000.0, 8000.0], [0.0, 1.0], [1.0], [float("nan"), 1.0]], ids=str)
def test_what_is_no_share_is_refused(wrong):
    with pytest.raises(EsslError, match="shares of the longest"):
        SpeechBrainEncoder(small())(WAVS, torch.tensor(wrong))


def test_frozen_stays_frozen_whatever_the_recipe_sets(tmp_path):
    small().save(tmp_path)
    module = SpeechBrainEncoder(tmp_path, freeze=True).train()
    assert not module.model.training and not module(WAVS, SHARES).requires_grad and not any(p.requires_grad for p in module.parameters())


def test_it_is_trained_by_a_brain_on_padded_batches():
    sb = pytest.importorskip("speechbrain")
    from speechbrain.dataio.batch import PaddedBatch

    class Brain(sb.Brain):
        "A mean over the real frames, and two classes."

        def compute_forward(self, batch, stage):
            wavs, lens = batch.sig
            frames = self.modules.encoder(wavs, lens)
            return self.modules.head(sb.nnet.pooling.StatisticsPooling(return_std=False)(frames, lens)[:, 0])

        def compute_objectives(self, out, batch, stage):
            return nn.functional.cross_entropy(out, torch.tensor([0, 1]))

    batches = [PaddedBatch([{"id": "a", "sig": WAVS[0, :9872]}, {"id": "b", "sig": WAVS[1]}])]
    module = SpeechBrainEncoder(small())
    before = [p.clone() for p in module.parameters()]
    brain = Brain({"encoder": module, "head": nn.Linear(32, 2)}, lambda p: torch.optim.SGD(p, 0.1), run_opts={"device": "cpu"})
    brain.fit(range(1), torch.utils.data.DataLoader(batches, batch_size=None), progressbar=False)
    assert any(not torch.equal(a, b) for a, b in zip(before, module.parameters()))
    assert torch.equal(batches[0].sig[1], torch.tensor([9872 / 16000, 1.0]))


def test_an_upstream_of_s3prl_is_weighed_by_its_featurizer():
    pytest.importorskip("s3prl")
    from s3prl.upstream.interfaces import Featurizer, UpstreamBase

    encoder = small()
    upstream = s3prl_upstream(encoder)
    assert isinstance(upstream, UpstreamBase) and upstream.get_downsample_rates("hidden_states") == 320
    wavs = [WAVS[0, :9872], WAVS[1]]
    states = upstream(wavs)["hidden_states"]
    assert all(torch.equal(a, b) for a, b in zip(states, encoder(torch.stack([nn.functional.pad(wavs[0], (0, 6128)), wavs[1]]), SAMPLES).layers, strict=True))
    featurizer = Featurizer(upstream, upstream_device="cpu")
    features = featurizer(wavs, upstream(wavs))
    assert [len(f) for f in features] == [31, 50] and features[0].shape[1] == 32


HUB = """
import sys, types, torch, torchaudio
torchaudio.set_audio_backend = lambda *a: None  # two names that s3prl 0.4.18 wants of an older torchaudio
sox = types.ModuleType("torchaudio.sox_effects"); sox.apply_effects_tensor = sox.apply_effects_file = None
sys.modules["torchaudio.sox_effects"] = sox
from s3prl.nn import S3PRLUpstream
from essl_nb import load_encoder
from essl_nb.models.adapters import register_s3prl
register_s3prl()
model = S3PRLUpstream("essl_nb", path_or_url=sys.argv[1]).eval()
wavs = torch.randn(2, 16000) * 0.1
states, lengths = model(wavs, torch.tensor([9872, 16000]))
ours = load_encoder(sys.argv[1])(wavs, torch.tensor([9872, 16000]))
print(len(states), lengths[0].tolist(), max(float((a[:, :50] - b).abs().max()) for a, b in zip(states, ours.layers)))
assert len(states) == 3 and all(torch.equal(a[:, :50], b) for a, b in zip(states, ours.layers))
"""


def test_s3prls_own_door_opens_a_folder(tmp_path):
    pytest.importorskip("s3prl")
    small().save(tmp_path / "encoder")
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", HUB, str(tmp_path / "encoder")], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
