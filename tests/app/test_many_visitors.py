"""Maps for many: two are computed at once, who waits is told the place, what is known waits for nobody, and who leaves makes room."""
import asyncio
import json
import threading

import numpy as np
import pytest
import soundfile
from browser import awaited
from madeup import make_study

from essl_nb.app.clips import Sessions
from essl_nb.app.library import EncoderLibrary
from essl_nb.app.listen import CORPUS, ListenController
from essl_nb.app.uploads import Uploads
from essl_nb.core.registry import EsslError
from essl_nb.data.corpus import load_corpus
from essl_nb.mixers.base import list_mixers


@pytest.fixture
def controller(tmp_path):
    study = make_study(tmp_path / "study", seeds=1, names=list_mixers()[:1])
    (tmp_path / "sound").mkdir()
    generator = np.random.default_rng(0)
    for i in range(5):
        soundfile.write(tmp_path / "sound" / f"{i}.wav", 0.1 * generator.standard_normal(16000).astype("float32"), 16000)
    corpus, uploads = load_corpus(tmp_path / "sound"), Uploads(tmp_path / "up")
    control = ListenController(lambda: corpus, EncoderLibrary(study), Sessions(remove_file=uploads.drop), uploads)
    control.clips, control.key = [u.id for u in corpus], control.library.choices()[0][1]
    return control


def asked(control, i: int) -> tuple:
    return CORPUS, control.clips[i], control.key, "", 1, "influence", "row", 0, "somebody", ""


async def all_of(control, i: int) -> list: # messages
    return [json.loads(v) async for v in control.drawn(*asked(control, i))]


def test_the_third_is_told_and_the_known_waits_for_nobody(controller):
    known = awaited(all_of(controller, 4))
    assert known[-1]["panels"] and controller.is_known(*asked(controller, 4)[:8]) and not controller.is_known(*asked(controller, 0)[:8])
    go_on, computing, whole = threading.Event(), [], controller.draw

    def slow(*a):
        computing.append(a[1])
        go_on.wait(30)
        yield from whole(*a)

    controller.draw = slow

    async def many():
        tasks = [asyncio.create_task(all_of(controller, i)) for i in range(4)]
        while len(computing) < 2:
            await asyncio.sleep(0.02)
        await asyncio.sleep(0.6)
        assert len(computing) == 2, "two at once"
        controller.draw = whole
        known = await asyncio.wait_for(all_of(controller, 4), 20)
        assert len(known) == 1 and known[0]["panels"], "no note, no waiting"
        go_on.set()
        return await asyncio.gather(*tasks)

    answers, first = awaited(many()), computing[:2]
    notes = [[m["note"] for m in told if m.get("keep")] for told in answers]
    assert all(told[-1]["panels"] for told in answers)
    assert [bool(n) for n in notes] == [c not in first for c in controller.clips[:4]], "who waits is told"
    assert {n[0].split("yours is ")[1] for n in notes if n} == {"the next.", "number 2 in the line."}
    assert not controller.line.asked, "all places are free again"


def test_who_leaves_makes_room(controller):
    async def leaving():
        values = controller.drawn(*asked(controller, 0))
        await anext(values)
        assert len(controller.line.asked) == 1
        await values.aclose()

    awaited(leaving())
    assert not controller.line.asked


def test_an_error_leaves_the_line(controller):
    async def wrong():
        async for _ in controller.drawn(CORPUS, "no such clip", controller.key, "", 1, "influence", "row", 0, "somebody", ""):
            pass

    with pytest.raises(EsslError, match="no such clip"):
        awaited(wrong())
    assert not controller.line.asked
