"""Does a probe without labels rank encoders as phones do? One row for each of some encoders of a study.

    python tools/units.py --every 3                  # every third encoder of results/small, on the part that bears phones
    python tools/units.py --out results/units.jsonl  # rows that the file holds are not made again

A row holds the score of `units` (ten minutes of train, the whole test split) beside the study's `masked_phones` of the same encoder.
`nbs/probes/07_units.ipynb` shows the rows.
"""
import argparse
import warnings
from pathlib import Path

import torch

from essl_nb.core.config import to_json
from essl_nb.core.files import append_line, read_lines
from essl_nb.core.machine import library_versions, machine_record
from essl_nb.data.corpus import load_corpus
from essl_nb.probes.phones import phone_part
from essl_nb.probes.probe import run_probe

ROOT = Path(__file__).resolve().parents[1]


def masked_phones_of(study: Path) -> dict:
    "Encoder → the study's score of hidden phones: spans of 200 ms, linear head, first seed."
    asked = lambda r: (r["what"]["call"], r["value"]["settings"]["span_ms"], r["value"]["head"], r["value"]["labels"], r["value"]["split"], r["what"]["state"], r["what"].get("seed"))
    wanted = ("masked_phones", 200, "linear", "all", "test", "pretrained", 0)
    scores = [r for r in read_lines(study / "rows.jsonl")[0] if r["kind"] == "score" and r["what"]["call"] == wanted[0]]
    return {r["what"]["encoder"]: {k: r["value"][k] for k in ("value", "low", "high", "n")} for r in scores if asked(r) == wanted}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--study", type=Path, default=ROOT / "results" / "small")
    parser.add_argument("--every", type=int, default=3, help="take one encoder in so many, in the order of the names")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "units.jsonl")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    phones, held = masked_phones_of(args.study), {r["encoder"] for r in read_lines(args.out)[0]}
    corpus = load_corpus()
    corpus = corpus.select(part=phone_part(corpus)[0].part)
    for name in [n for n in sorted(p.name for p in (args.study / "encoders").iterdir() if p.is_dir()) if n in phones][:: args.every]:
        if name not in held:
            score = run_probe(args.study / "encoders" / name, "units", corpus, labels="10min", precision="fp32", progress=False)
            append_line(args.out, dict(encoder=name, study=args.study.name, masked_phones=phones[name], units=to_json(score),
                made=dict(machine=machine_record(), versions=library_versions(), threads=1)))
            print(name, score, flush=True)


if __name__ == "__main__":
    main()
