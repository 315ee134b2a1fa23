"""A training step of BEST-RQ here beside SpeechBrain's, from the same waveforms: audio-seconds a second, interleaved.

    python tools/throughput.py                         # one thread, float32 and bf16; rows in results/throughput/rows.jsonl
    python tools/throughput.py --threads 2 --rounds 9

Both begin with a batch of waveforms in memory and end with an optimiser step: log-mel or filter banks, random-projection
codes, spans hidden by noise, 40 ms frames, the encoder, cross-entropy at hidden frames, AdamW. Width, depth, heads,
feed-forward and codebook are equal. SpeechBrain's side is built from its own modules, put together as its recipe does
(recipes/LibriSpeech/self-supervised-learning/BEST-RQ): a convolutional front end, TransformerASR, its Fbank, its
InputNormalization, its RandomProjectionQuantizer, its mask, one for the whole batch.
"""
import argparse
import os
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from essl_nb.core.files import append_line
from essl_nb.core.machine import machine_record
from essl_nb.core.precision import autocast
from essl_nb.costs.measure import spread
from essl_nb.mixers.base import baseline_mixer
from essl_nb.models.config import EncoderConfig
from essl_nb.models.encoder import build_encoder
from essl_nb.objectives.masking import named_masking
from essl_nb.objectives.objective import build_objective
from essl_nb.train.optim import adamw
from essl_nb.train.step import Pretraining

ROOT = Path(__file__).resolve().parents[1]
MODELS = {"transformer": ("transformer", "regularMHA"), "conformer": ("conformer", "RelPosMHAXL")}  # block → SpeechBrain's words
CODES, STRIDE = 8192, 4


class Ours:
    "A step of this package."

    def __init__(self, block: str, dim: int, depth: int, heads: int, precision: str):
        config = EncoderConfig(baseline_mixer(), dim=dim, depth=depth, block=block, mixer_kw=dict(num_heads=heads), frontend_kw=dict(stride=STRIDE))
        self.encoder = build_encoder(config, seed=0)
        self.objective = build_objective("best_rq", dim, stride=STRIDE, codebook=CODES)
        self.objective.fit_targets(None, ["-"], torch.Generator().manual_seed(0))
        self.objective.fitted.fill_(True)
        self.network, self.masking = Pretraining(self.encoder, self.objective, precision), named_masking("best_rq")
        self.optimiser, self.generator = adamw([self.encoder, self.objective], lr=1e-4), torch.Generator().manual_seed(0)
        self.parameters = sum(p.numel() for p in self.network.parameters())

    def __call__(self, wav, samples):
        raw, lengths = self.encoder.frontend.features(wav, samples)
        labels = [self.objective.label(mel[:n])["codes"] for mel, n in zip(raw, lengths.tolist())]
        targets = {"codes": torch.nn.utils.rnn.pad_sequence(labels, batch_first=True)}
        span = self.masking.draw(self.encoder.frontend.out_lengths(lengths), frame_seconds=self.encoder.frame_seconds, generator=self.generator)
        self.optimiser.zero_grad(set_to_none=True)
        _, loss = self.network(raw, lengths, span, targets, generator=self.generator)
        loss.total.backward()
        self.optimiser.step()


class Theirs:
    "A step of SpeechBrain's modules."

    def __init__(self, block: str, dim: int, depth: int, heads: int, precision: str):
        from speechbrain.lobes.features import Fbank
        from speechbrain.lobes.models.BESTRQ import compute_mask
        from speechbrain.lobes.models.convolution import ConvolutionFrontEnd
        from speechbrain.lobes.models.transformer.TransformerASR import EncoderWrapper, TransformerASR
        from speechbrain.nnet.linear import Linear
        from speechbrain.nnet.quantisers import RandomProjectionQuantizer
        from speechbrain.processing.features import InputNormalization

        module, attention = MODELS[block]
        self.mask, self.precision = compute_mask, precision
        self.fbank, self.normalise = Fbank(n_mels=80, n_fft=400, sample_rate=16000), InputNormalization(norm_type="sentence")
        self.front = ConvolutionFrontEnd((8, 10, 80), num_blocks=2, num_layers_per_block=1, out_channels=(64, 32), kernel_sizes=(3, 3), strides=(2, 2), residuals=(False, False))
        body = TransformerASR(tgt_vocab=1, input_size=640, d_model=dim, nhead=heads, num_encoder_layers=depth, num_decoder_layers=0, d_ffn=4 * dim, dropout=0.0,
                              activation=torch.nn.GELU, encoder_module=module, attention_type=attention, normalize_before=True, causal=False)
        self.body, self.quantiser = EncoderWrapper(body), RandomProjectionQuantizer(80 * STRIDE, 16, CODES)
        self.head = Linear(input_size=dim, n_neurons=CODES)
        trained = [p for m in (self.front, self.body, self.head) for p in m.parameters()]
        self.optimiser, self.parameters = torch.optim.AdamW(trained, lr=1e-4), sum(p.numel() for p in trained)

    def __call__(self, wav, samples):
        shares = samples / samples.max()
        with torch.no_grad():
            x = self.normalise(self.fbank(wav), shares)
            x = F.pad(x, (0, 0, 0, -x.shape[1] % STRIDE))
            codes = self.quantiser(x.unflatten(1, (-1, STRIDE)).flatten(2))
        frames = [int(x.shape[1] * s) // STRIDE * STRIDE for s in shares]
        hidden = self.mask(tuple(x.shape), frames, 0.01, 40)
        x[:, hidden] = 0.1 * torch.randn(len(x), len(hidden), x.shape[2])
        self.optimiser.zero_grad(set_to_none=True)
        with autocast(self.precision, "cpu"):
            logits = self.head(self.body(self.front(x), shares))
        at = torch.unique(hidden // STRIDE)
        at = at[at < logits.shape[1]]
        F.cross_entropy(logits[:, at].float().flatten(0, 1), codes[:, at].flatten()).backward()
        self.optimiser.step()


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--threads", type=int, default=1, help="of torch (1)")
    p.add_argument("--rounds", type=int, default=7, help="steps of each, taken in turns, after one that does not count (7)")
    p.add_argument("--batch", type=int, default=8, help="utterances (8)")
    p.add_argument("--seconds", type=float, default=8.0, help="of the longest utterance; the shortest has half of it (8)")
    p.add_argument("--dim", type=int, default=256), p.add_argument("--depth", type=int, default=6), p.add_argument("--heads", type=int, default=4)
    p.add_argument("--out", type=Path, default=ROOT / "results/throughput/rows.jsonl", help="where rows are appended")
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    torch.manual_seed(0)
    samples = torch.linspace(a.seconds / 2, a.seconds, a.batch).mul(16000).long()
    wav = 0.1 * torch.randn(a.batch, int(samples.max())) * (torch.arange(int(samples.max())) < samples[:, None])
    a.out.parent.mkdir(parents=True, exist_ok=True)
    for block in MODELS:
        for precision in ("fp32", "bf16"):
            sides = [cls(block, a.dim, a.depth, a.heads, precision) for cls in (Ours, Theirs)]
            times = []
            for round in range(a.rounds + 1):
                taken = []
                for side in sides:
                    began = time.perf_counter()
                    side(wav, samples)
                    taken.append(time.perf_counter() - began)
                times += [taken] if round else []
            ours, theirs = (spread([t[i] for t in times]) for i in (0, 1))
            ratio = spread([t[1] / t[0] for t in times])
            sound = float(samples.sum()) / 16000
            row = dict(block=block, precision=precision, threads=a.threads, batch=a.batch, seconds=a.seconds, dim=a.dim, depth=a.depth, heads=a.heads, codes=CODES, rounds=a.rounds,
                       parameters=[s.parameters for s in sides], audio_seconds=sound, ours_s=ours, speechbrain_s=theirs,
                       ours_audio_per_s=sound / ours[0], speechbrain_audio_per_s=sound / theirs[0], times_as_fast=ratio, load=os.getloadavg()[0], machine=machine_record())
            append_line(a.out, row)
            print(f"{block:12} {precision}: {sound / ours[0]:.0f} and {sound / theirs[0]:.0f} audio-seconds a second, {ratio[0]:.2f} [{ratio[1]:.2f}, {ratio[2]:.2f}] times as fast", flush=True)


if __name__ == "__main__":
    main()
