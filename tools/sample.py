"""What a wheel carries beside the modules: a small corpus with its licences, the rows of the studies, three encoders.

    python tools/sample.py FOLDER     write the corpus there   (setup.py does so when a wheel is built)

Clips of corpus/prompts and corpus/readru are taken in turn from every voice and split, in the order of a hash of their
id, until each part is full; so every language, voice and split is in it, and it is the same sample everywhere. It is
itself a corpus folder. corpus/stamps is GPL speech and stays out.
"""
import csv
import hashlib
import json
import shutil
import sys
from collections import defaultdict
from itertools import chain, zip_longest
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BYTES = {"prompts": 2_200_000, "readru": 2_000_000}  # of audio; tables and licences come on top
AT_ONCE = dict(train=4, valid=1, test=1)  # clips of a voice taken in one turn
NOTE = """# A sample of essl_nb's corpus

{clips} clips in {languages}, {minutes:.0f} minutes, 16 kHz mono Ogg-Opus, re-encoded (and so modified): telephone prompts from
the Asterisk core sounds (`prompts/`), and sentences read by N. Shmyrev with phone labels (`readru/`, festvox-ru).
Licences: CC-BY-3.0, CC-BY-SA-3.0 and, of `readru/`, the permissive one in `licences/festvox-ru.copyright` (SPDX:
MIT-Festival); see `licences/` and the column `licence` of `manifest.csv`. The whole corpus (5.6 hours, nine languages)
is in the folder `corpus/` of essl_nb's repository: set `ESSL_CORPUS` to that folder, or work in a clone.
"""
STUDIES_NOTE = """# Studies of essl_nb

Grids and rows of the studies in the folder `results/` of essl_nb's repository, and the encoders {encoders} of the
study `{study}`; the other encoders are in the repository only (set `ESSL_RESULTS` to its `results/`). The encoders were
trained on the whole bundled corpus of the repository, of which the sample beside this folder is a part.
"""


def rows(path) -> list[dict]:
    with open(path, encoding="utf-8", newline="") as f:
        return list(csv.DictReader(f))


def chosen(root=ROOT) -> dict:
    "Path → manifest row of the clips that go into the sample."
    corpus, groups, taken = Path(root) / "corpus", defaultdict(list), {}
    for row in rows(corpus / "manifest.csv"):
        groups[row["part"], row["speaker"], row["lang"], row["split"]].append(row)
    for part, most in BYTES.items():
        turns, size = [], 0
        for key, group in sorted((k, g) for k, g in groups.items() if k[0] == part):
            group.sort(key=lambda row: hashlib.sha256(row["id"].encode()).hexdigest())
            n = AT_ONCE[key[3]]
            turns.append([group[i : i + n] for i in range(0, len(group), n)])
        for row in chain.from_iterable(filter(None, chain.from_iterable(zip_longest(*turns)))):
            size += (corpus / row["path"]).stat().st_size
            if size > most:
                break
            taken[row["path"]] = row
    return taken


def table(path, found):
    "Rows (dicts) as a CSV file."
    with open(path, "w", encoding="utf-8", newline="") as f:
        writer = csv.DictWriter(f, found[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(found)


def build(to, root=ROOT):
    "Write the sample into the folder `to`."
    corpus, to, taken = Path(root) / "corpus", Path(to), chosen(root)
    for path in taken:
        (to / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(corpus / path, to / path)
    table(to / "manifest.csv", list(taken.values()))
    ids = {row["id"] for row in taken.values()}
    table(to / "phones.csv", [row for row in rows(corpus / "phones.csv") if row["id"] in ids])
    (to / "licences").mkdir(exist_ok=True)
    for path in [p for kind in ("asterisk*", "festvox*") for p in sorted((corpus / "licences").glob(kind))]:
        shutil.copyfile(path, to / "licences" / path.name)
    languages = sorted({row["lang"] for row in taken.values()})
    minutes = sum(float(row["seconds"]) for row in taken.values()) / 60
    (to / "README.md").write_text(NOTE.format(clips=len(taken), languages=", ".join(languages), minutes=minutes), encoding="utf-8")


def studies(to, root=ROOT):
    "Write grids and rows of every study, and the encoders that results/wheel.json names, into the folder `to`."
    wanted = json.loads((Path(root) / "results" / "wheel.json").read_text(encoding="utf-8"))
    results, to = Path(root) / "results", Path(to)
    found = [p for name in ("grid.json", "bands.json", "*.jsonl") for p in sorted(results.glob(f"*/{name}"))]
    found += [p for name in wanted["encoders"] for p in sorted((results / wanted["study"] / "encoders" / name).iterdir())]
    for path in found:
        (to / path.relative_to(results)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, to / path.relative_to(results))
    (to / "README.md").write_text(STUDIES_NOTE.format(study=wanted["study"], encoders=", ".join(wanted["encoders"])), encoding="utf-8")


if __name__ == "__main__":
    build(sys.argv[1])
