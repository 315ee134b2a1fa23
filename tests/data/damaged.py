"""Sound files that went wrong, made by a seed: cut, changed, renamed, joined, or with a header that says something else than the file holds."""
import io
import json
import random
import sys
import threading
from pathlib import Path

import soundfile

KINDS = {  # name → suffix, how it is written
    "wav16": ("wav", dict(format="WAV", subtype="PCM_16")),
    "wav24": ("wav", dict(format="WAV", subtype="PCM_24")),
    "float": ("wav", dict(format="WAV", subtype="FLOAT")),
    "flac": ("flac", dict(format="FLAC", subtype="PCM_16")),
    "ogg": ("ogg", dict(format="OGG", subtype="VORBIS")),
    "opus": ("opus", dict(format="OGG", subtype="OPUS")),
    "mp3": ("mp3", dict(format="MP3", subtype="MPEG_LAYER_III")),
}


def place_of_length(kind: str, data: bytes) -> tuple:
    "Where the header says how much there is: place, bytes, byte order."
    if kind in ("wav16", "wav24", "float"):
        return data.index(b"data") + 4, 4, "<"
    if kind == "flac":
        return 22, 4, ">"
    if kind == "mp3":
        tag = max(data.find(b"Xing"), data.find(b"Info"))
        return tag + 8, 4, ">"
    return data.rindex(b"OggS") + 6, 8, "<"  # granule position of the last page


def cut(b, rng, kind):
    return b[: rng.randrange(1, len(b))]


def one_bit(b, rng, kind):
    b = bytearray(b)
    b[rng.randrange(len(b))] ^= 1 << rng.randrange(8)
    return bytes(b)


def bits(b, rng, kind):
    b = bytearray(b)
    for _ in range(rng.randrange(2, 200)):
        b[rng.randrange(len(b))] ^= 1 << rng.randrange(8)
    return bytes(b)


def header(b, rng, kind):
    b = bytearray(b)
    for _ in range(rng.randrange(1, 6)):
        b[rng.randrange(min(len(b), 120))] = rng.choice((0, 127, 128, 255, rng.randrange(256)))
    return bytes(b)


def length_lies(b, rng, kind):
    place, size, order = place_of_length(kind, b)
    now = int.from_bytes(b[place : place + size], "little" if order == "<" else "big")
    said = rng.choice((0, now // 2, now // 4 * 3, now + 2000, now * 3, (1 << 8 * size) - 1, 1))
    return b[:place] + (said % (1 << 8 * size)).to_bytes(size, "little" if order == "<" else "big") + b[place + size :]


def zeros(b, rng, kind):
    a = rng.randrange(len(b))
    n = min(len(b) - a, rng.randrange(1, 4000))
    return b[:a] + bytes(n) + b[a + n :]


def inserted(b, rng, kind):
    a = rng.randrange(len(b))
    return b[:a] + rng.randbytes(rng.randrange(1, 4000)) + b[a:]


def removed(b, rng, kind):
    a = rng.randrange(len(b))
    return b[:a] + b[a + rng.randrange(1, 4000) :]


def joined(b, rng, kind):
    return b + b


def headless(b, rng, kind):
    return b[rng.randrange(1, min(len(b), 2000)) :]


def tagged(b, rng, kind):
    return b"ID3\x04\0\0\0\0\x07\x76" + rng.randbytes(1014) + b if rng.random() < 0.5 else b + b"TAG" + bytes(125)


def other(b, rng, kind):
    return rng.choice((b"", b"RIFF", b"not sound\n" * 300, rng.randbytes(5000), b"<html>404</html>", bytes(5000), b[:44], b"OggS" * 500, b"\xff\xfb\x90\x64" * 700))


def same(b, rng, kind):
    return b


DAMAGES = (cut, cut, one_bit, bits, header, length_lies, length_lies, zeros, inserted, removed, joined, headless, tagged, other, same)


def make(folder, sounds: list, count: int, seed: int = 0) -> list:
    """Write `count` files made from `sounds` (float arrays at 16 kHz); a row for each: name, kind, what was done, samples that it had,
    and whether the file still says how many: an MP3 without its first frame does not."""
    folder, rows, written = Path(folder), [], {}
    for n in range(count):
        rng = random.Random(f"{seed}/{n}")
        kind, damage, which = rng.choice(list(KINDS)), rng.choice(DAMAGES), rng.randrange(len(sounds))
        suffix, how = KINDS[kind]
        if (kind, which) not in written:
            buffer = io.BytesIO()
            soundfile.write(buffer, sounds[which], 16000, **how)
            written[kind, which] = buffer.getvalue()
        if damage is same or rng.random() < 0.1:
            suffix = rng.choice([s for s, _ in KINDS.values()])  # renamed
        name = f"{n:04}.{suffix}"
        whole = written[kind, which]
        now = damage(whole, rng, kind)
        (folder / name).write_bytes(now)
        tells = damage is not other and (kind != "mp3" or whole[:60] in now)
        rows.append(dict(name=name, kind=kind, damage=damage.__name__, samples=len(sounds[which]) * (2 if damage is joined else 1), tells=tells))
    return rows


def read_all(names: list, seconds: float):
    "Read files one after the other, a line of JSON for each: its name, then what came of it. A reading that takes `seconds` ends the process."
    from essl_nb.core.registry import EsslError
    from essl_nb.data.audio import load_audio

    for name in names:
        print(json.dumps(dict(begins=name)), flush=True)
        guard = threading.Timer(seconds, lambda: __import__("os")._exit(124))
        guard.start()
        try:
            print(json.dumps(dict(name=name, samples=len(load_audio(name)))), flush=True)
        except EsslError as e:
            print(json.dumps(dict(name=name, refused=str(e))), flush=True)
        except Exception as e:
            print(json.dumps(dict(name=name, error=f"{type(e).__name__}: {e}")), flush=True)
        guard.cancel()


if __name__ == "__main__":
    read_all(json.load(sys.stdin), 20.0)
