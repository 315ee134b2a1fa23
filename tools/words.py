"""Fine-tune an encoder to characters of the three languages with the most speech, from pre-training and from scratch.

    python tools/words.py results/small/encoders/NAME     # rows go to results/words/rows.jsonl; the same again resumes

One core takes two to four minutes a run. The page probes.languages shows the rows.
"""
import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("encoder", help="the folder of a pre-trained encoder")
    parser.add_argument("--rows", default="results/words/rows.jsonl")
    parser.add_argument("--folders", default="runs/words", help="where the runs go")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch_seconds", type=float, default=30.0)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--freeze", type=float, default=0.0, help="share of the steps in which a pre-trained encoder is frozen")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    args = parser.parse_args()
    import torch

    from essl_nb.data.corpus import load_corpus
    from essl_nb.probes.languages import language_rows, most_speech
    from essl_nb.probes.words_config import FinetuneConfig

    torch.set_num_threads(1)
    languages = tuple(most_speech(load_corpus("bundled")))
    for seed in args.seeds:
        own = dict(steps=args.steps, batch_seconds=args.batch_seconds, lr=args.lr, precision="bf16", seed=seed)
        for language in languages[::-1]:
            for start, freeze in (("pretrained", dict(freeze=args.freeze)), ("scratch", {})):
                config = FinetuneConfig(args.encoder, **own, **freeze)
                language_rows(args.rows, config, languages=(language,), starts=(start,), folders=args.folders, watch_every=50, save_every=100, progress=sys.stderr.isatty())


if __name__ == "__main__":
    main()
