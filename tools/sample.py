"""The small corpus that a wheel carries: at most 5 MB of corpus/prompts, with its licences.

    python tools/sample.py FOLDER     write it there   (setup.py does so when a wheel is built)

Clips are taken in turn from every voice and split, in the order of a hash of their id, until the sample is full; so
every language, voice and split is in it, and it is the same sample everywhere. It is itself a corpus folder.
"""
import csv
import hashlib
import shutil
import sys
from collections import defaultdict
from itertools import chain, zip_longest
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BYTES = 4_200_000  # of audio; tables and licences come on top
AT_ONCE = dict(train=4, valid=1, test=1)  # clips of a voice taken in one turn
NOTE = """# A sample of essl_nb's corpus

{clips} telephone prompts in {languages}, {minutes:.0f} minutes, 16 kHz mono Ogg-Opus, re-encoded (and so modified) from the
Asterisk core sounds. Licences: CC-BY-3.0 and CC-BY-SA-3.0, see `licences/` and the column `licence` of `manifest.csv`.
The whole corpus (5.6 hours, nine languages, read Russian with phone labels) is in the folder `corpus/` of essl_nb's
repository: set `ESSL_CORPUS` to that folder, or work in a clone.
"""


def rows(path) -> list[dict]:
    with open(path, encoding="utf-8", newline="") as f:
        return list(csv.DictReader(f))


def chosen(root=ROOT) -> dict:
    "Path → manifest row of the clips that go into the sample."
    corpus, groups = Path(root) / "corpus", defaultdict(list)
    for row in rows(corpus / "manifest.csv"):
        if row["part"] == "prompts":
            groups[row["speaker"], row["lang"], row["split"]].append(row)
    for group in groups.values():
        group.sort(key=lambda row: hashlib.sha256(row["id"].encode()).hexdigest())
    taken, size = {}, 0
    turns = [[group[i : i + n] for i in range(0, len(group), n)] for key, group in sorted(groups.items()) for n in [AT_ONCE[key[2]]]]
    for row in chain.from_iterable(filter(None, chain.from_iterable(zip_longest(*turns)))):
        size += (corpus / row["path"]).stat().st_size
        if size > BYTES:
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
    for path in sorted((corpus / "licences").glob("asterisk*")):
        shutil.copyfile(path, to / "licences" / path.name)
    languages = sorted({row["lang"] for row in taken.values()})
    minutes = sum(float(row["seconds"]) for row in taken.values()) / 60
    (to / "README.md").write_text(NOTE.format(clips=len(taken), languages=", ".join(languages), minutes=minutes), encoding="utf-8")


if __name__ == "__main__":
    build(sys.argv[1])
