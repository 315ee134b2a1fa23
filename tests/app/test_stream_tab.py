"""Stream: what it hears so far, in real time, for two visitors at once; bad input, and a page in a real browser that stays alive."""
import asyncio
import json

import numpy as np
import plotly.graph_objects as go
import pytest
import soundfile
import torch
from browser import awaited
from madeup import make_study
from test_access import start
from test_app import FLAGS, NO_BROWSER, PATIENCE, chromium

from essl_nb.app.clips import Sessions, Sound, sound_key
from essl_nb.app.library import EncoderLibrary, StudyFile
from essl_nb.app.listen import OWN
from essl_nb.app.live_sound import REPEATED, Line, LiveSound, PhoneFollower, so_far, tick_values
from essl_nb.app.stream_tab import AHEAD, StreamController, costs_html, guarded, live_code, look_ahead_costs
from essl_nb.app.uploads import Uploads
from essl_nb.core.places import results_dir
from essl_nb.core.registry import EsslError
from essl_nb.costs.live import LiveEncoding, live_encoding, more_log_mel
from essl_nb.data.audio import log_mel
from essl_nb.data.corpus import load_corpus
from essl_nb.data.tables import Phone
from essl_nb.mixers.base import build_mixer, list_mixers, mixers
from essl_nb.models.config import EncoderConfig
from essl_nb.models.encoder import build_encoder
from essl_nb.probes.heads import LayerHead
from essl_nb.probes.phone_head import PhoneHead
from essl_nb.study.results import scores_of
from essl_nb.viz.live import frame_bytes, live_figure, live_finding, mel_bytes


def looks_ahead(name: str) -> bool:
    "Whether a mixer has a form with a bounded look-ahead."
    try:
        build_mixer(name, 32).set_chunk(8)
        return True
    except EsslError:
        return False


STREAMS = next(n for n in list_mixers("convolution") if looks_ahead(n))
WHOLE = next(n for n in list_mixers() if not looks_ahead(n) and mixers.get(n).meta["family"] != "none")


def chirp(seconds: float, rate: int = 16000) -> np.ndarray:
    t = np.arange(round(seconds * rate)) / rate
    return (np.sin(2 * np.pi * (200 + 300 * t) * t) * (0.3 + 0.2 * np.sin(9 * t))).astype("float32")


@pytest.fixture(scope="module")
def encoder():
    return build_encoder(EncoderConfig(STREAMS, dim=32, depth=2, chunk_frames=8), seed=0).eval()


@pytest.mark.parametrize("chunk", AHEAD.values(), ids=AHEAD)
def test_sound_in_any_portions_is_the_sound_whole(encoder, chunk):
    wav, generator = torch.from_numpy(chirp(2.1)), np.random.default_rng(0)
    encoder.set_chunk(chunk)
    live, at = LiveEncoding(encoder, wav), 0
    while at < len(wav):
        n = int(generator.integers(1, 4000))
        live.accept(wav[at : at + n])
        at += n
        assert len(live.frames) % chunk == 0 and live.seconds - len(live.frames) * 0.02 < chunk * 0.02 + 0.03, "a chunk leaves as soon as its last window is there"
    live.finish()
    assert len(live.differences) == len(live.frames) == len(live.offline) and float(live.differences.max()) < 1e-4
    torch.testing.assert_close(live.mel, log_mel(wav[None])[0][0], atol=1e-4, rtol=1e-4)
    assert sum(s for _, s in live.times) > 0 and live.times[-1][0] == pytest.approx(2.1)
    encoder.set_chunk(8)


def test_a_difference_is_seen(encoder):
    wav = torch.from_numpy(chirp(1.0))
    live = live_encoding(encoder, wav)
    assert float(live.differences.max()) < 1e-5
    live.compare(wav + 0.05 * torch.randn(len(wav), generator=torch.Generator().manual_seed(0)))
    assert float(live.differences.max()) > 1e-2 and "0e+" not in live_finding(live)


def test_bad_sound_is_one_sentence_and_changes_nothing(encoder):
    live = LiveEncoding(encoder)
    live.accept(torch.from_numpy(chirp(0.5)))
    before, bad = len(live.wav), torch.full((100,), torch.nan)
    with pytest.raises(EsslError, match="NaN or infinite after 0.50 s"):
        live.accept(bad)
    assert len(live.wav) == before
    with pytest.raises(EsslError, match="too short"):
        live_encoding(encoder, torch.zeros(100))
    short = LiveEncoding(encoder)
    short.accept(torch.zeros(100))
    with pytest.raises(EsslError, match="0.01 s, which is too short"):
        short.finish()
    live.finish()
    with pytest.raises(EsslError, match="had ended"):
        live.accept(torch.zeros(100))
    assert more_log_mel(torch.zeros(0), 0).shape == (0, 80)


def test_the_figure_says_what_came(encoder):
    wav = torch.from_numpy(chirp(12.0))
    slow = live_encoding(encoder, wav, 1.0)
    slow.times = [(t, 0.5) for t, _ in slow.times]
    assert live_finding(slow).startswith("6 of 6 chunks took longer than the 160 ms") or live_finding(slow).startswith("5 of 5"), live_finding(slow)
    live = live_encoding(encoder, wav)
    fig = live_figure(live, [Phone("a", 0.0, 1.0), Phone("s", 11.0, 11.5)])
    roles = {t.meta["role"]: t for t in fig.data if t.meta}
    assert tuple(fig.layout.xaxis.range) == (2.0, 12.0) and roles["live-mel"].x0 == 2.0 and len(roles["live-mel"].z) == 500, "the last ten seconds"
    assert list(roles["phone-labels"].text) == ["s"] and "It keeps up" in live_finding(live)
    empty = live_figure(LiveEncoding(encoder), [], total=3.0)
    assert tuple(empty.layout.xaxis.range) == (0.0, 3.0) and "not there yet" in live_finding(LiveEncoding(encoder))


def test_a_page_that_adds_ticks_has_the_whole_figure(encoder):
    import base64

    wav, seen, mel, frames, times = torch.from_numpy(chirp(1.5)), {}, [], [], []
    live = LiveEncoding(encoder, wav)
    for start in range(0, len(wav), 2560):
        live.accept(wav[start : start + 2560])
        d = json.loads(json.dumps(tick_values(live, None, 1, seen)))
        for kept, name in ((mel, "mel"), (frames, "frames")):
            columns = np.frombuffer(base64.b64decode(d[name]), dtype="uint8").reshape(-1, d["size"][name])
            kept[d["at"][name] :] = columns.tolist()
        times[d["at"]["times"] :] = d["times"]
        assert len(json.dumps(d)) < 20_000, "a message is small"
    assert mel == mel_bytes(live.mel).tolist() and frames == frame_bytes(live.frames).tolist() and len(times) == len(live.times)
    assert d["at"]["frames"] == max(0, len(live.frames) - 8 - REPEATED)


def test_phones_follow_the_frames():
    generator = torch.Generator().manual_seed(0)
    model = LayerHead(torch.zeros(1, 6), torch.ones(1, 6), 6, generator=generator)
    with torch.no_grad():
        model.body.weight.copy_(6 * torch.eye(6))
    head = PhoneHead(model.eval(), ["a", "b", "c", "d", "e", "pau"], 1.0, "made", 1.0, 0.5, 0.5, 2)
    spoken = torch.tensor([0] * 30 + [5] * 10 + [3] * 200 + [1] * 60)
    frames, follower = torch.eye(6)[spoken], PhoneFollower(head, 0.02)
    for n in range(8, len(frames) + 1, 4):
        follower.follow(frames[:n])
    assert [(p.label, round(p.start, 2), round(p.end, 2)) for p in follower.phones] == [("a", 0.0, 0.6), ("pau", 0.6, 0.8), ("d", 0.8, 4.8), ("b", 4.8, 6.0)]
    assert so_far(follower.phones) == "a d b" and so_far([Phone("ab", 0, 1)] * 99).startswith("… ab ") and so_far(None) == ""


def test_the_study_of_look_aheads_is_read_and_others_are_told_so():
    scores = scores_of(StudyFile(results_dir() / "streaming").rows())
    name = scores[scores.state == "pretrained"].encoder.iloc[0]
    lost = look_ahead_costs(scores, name)
    assert [x[0] for x in lost[:3]] == list(AHEAD) and lost[0][2] < lost[1][2] < lost[2][2] < 0.5 and all(low <= v <= high for *_, v, low, high in lost)
    assert "<img" not in costs_html([], "<img src=x>", "20 ms") and "was not studied" in costs_html([], name, "20 ms")


def test_the_line_forgets_who_left():
    line = Line(places=2, patience=0.2)
    assert [line.position(k) for k in "abc"] == [0, 0, 1]
    import time

    time.sleep(0.3)
    assert line.position("c") == 0 and len(line.asked) == 1, "who does not ask any more has left"


@pytest.fixture(scope="module")
def controller(tmp_path_factory):
    "A controller over a corpus without labels and a study of two encoders, one of which cannot look ahead by chunks."
    folder = tmp_path_factory.mktemp("stream")
    study = make_study(folder / "opened", seeds=1, names=[STREAMS, WHOLE])
    (folder / "sound").mkdir()
    for i, seconds in enumerate((30.0, 3.0, 1.2)):
        soundfile.write(folder / "sound" / f"{i}.wav", chirp(seconds), 16000)
    corpus, uploads = load_corpus(folder / "sound"), Uploads(folder / "up")
    (folder / "up").mkdir()
    live = LiveSound(lambda: corpus, EncoderLibrary(study), Sessions(remove_file=uploads.drop), uploads)

    class Listen:
        corpus_source = str(folder / "sound")

    yield StreamController(live, StudyFile(folder / "streaming"), Listen()), [u.id for u in corpus], folder


def told(generator) -> list: # dicts
    "All messages of an asynchronous generator."
    async def collect():
        return [json.loads(value) async for value in generator]
    return awaited(collect())


def test_half_then_all_of_a_clip(controller):
    control, clips, _ = controller
    key = f"trained:{STREAMS}"
    half = told(control.half_played("a clip of the corpus", clips[1], key, "160 ms", None, "somebody"))
    assert len(half) == 1 and not half[0]["playing"] and "nothing in this corpus is labelled" in half[0]["caption"]
    assert half[0]["csv"].startswith("chunk_end_s,") and half[0]["csv"].count("\n") == 1 + len([t for t in half[0]["figure"]["data"] if (t.get("meta") or {}).get("role") == "live-times"][0]["x"])
    import time

    begun = time.monotonic()
    played = told(control.play("a clip of the corpus", clips[2], key, "160 ms", None, "somebody"))
    assert 1.1 < time.monotonic() - begun, "in real time"
    assert played[0]["playing"] and played[0]["audio"] and played[-1]["figure"] and not played[-1]["playing"] and not played[-1]["note"]
    assert sum(bool(d.get("tick")) for d in played) == 8 and "in 60 frames" in played[-1]["finding"]
    assert not control.live.line.asked, "the place is free again"


def test_the_code_gives_the_figure(controller):
    control, clips, folder = controller
    from essl_nb.app.clips import corpus_sound

    sound = corpus_sound(control.live.corpus, clips[1])
    encoder = control.live.encoder(f"trained:{STREAMS}", 8)
    live = live_encoding(encoder, sound.wav, 1.5)
    lines = live_code(sound, control.live.library.code(f"trained:{STREAMS}"), 8, None, live, str(folder / "sound")).splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("live_figure("))
    names = {}
    exec("\n".join([*lines[:at], "figure = " + lines[at]]), names)
    one, two = names["figure"], live_figure(live, total=sound.seconds)
    assert isinstance(one, go.Figure) and (one.data[0].z == two.data[0].z).all() and (one.data[1].z == two.data[1].z).all() and one.layout.xaxis.range == two.layout.xaxis.range


@pytest.mark.parametrize("source, clip, key, words", [
    (OWN, None, f"trained:{STREAMS}", "Choose a file first"),
    ("a clip of the corpus", "0", f"trained:{WHOLE}", "no form with a bounded look-ahead"),
    ("a clip of the corpus", "0", "trained:nobody", "There is no encoder"),
    ("a clip of the corpus", "no such clip", f"trained:{STREAMS}", "no such clip"),
    ("a clip of the corpus", None, f"trained:{STREAMS}", "Choose a clip first"),
], ids=["no file", "no step", "no encoder", "no clip", "nothing"])
def test_what_cannot_be_played_is_said_in_a_sentence(controller, source, clip, key, words):
    control, clips, _ = controller
    clip = next((c for c in clips if c.startswith("0")), clip) if clip == "0" else clip
    for ask in (control.half_played, control.play):
        async def all_of(make):
            return [x async for x in guarded(make)[0](source, clip, key, "160 ms", None, "a")]
        (value, error), = awaited(all_of(ask))[-1:]
        assert words in error and error.count('role="alert"') == 1 and json.loads(value)["dim"] and "failed" not in error


def test_two_run_the_third_is_told_and_who_leaves_makes_room(controller):
    control, clips, _ = controller
    control.live.sessions.start("c", Sound("mine", torch.from_numpy(chirp(0.6)), sound_key(torch.zeros(1)), uploaded=True))

    async def three():
        async def visitor(name, source, clip):
            return [json.loads(v) async for v in control.play(source, clip, f"trained:{STREAMS}", "160 ms", None, name)]
        tasks = [asyncio.create_task(visitor(n, "a clip of the corpus", clips[1])) for n in "ab"]
        await asyncio.sleep(0.5)
        tasks.append(asyncio.create_task(visitor("c", OWN, None)))
        await asyncio.sleep(0.6)
        control.live.leave("a")  # in the middle
        return await asyncio.gather(*tasks)

    a, b, c = awaited(three())
    assert "Two streams are running already" in c[0]["note"] and "the next" in c[0]["note"] and c[-1]["figure"] and c[-1]["about"].startswith("mine")
    assert sum(bool(d.get("tick")) for d in a) < 12 < sum(bool(d.get("tick")) for d in b) and not control.live.line.asked
    assert "a" not in control.live.runs


def test_a_recording_comes_in_files(controller):
    control, _, folder = controller
    key, wav, rate = f"trained:{STREAMS}", chirp(1.6, 44100), 44100
    shown = []
    control.begin_recording("speaker")
    for i, start in enumerate(range(0, len(wav), 7056)):
        path = folder / "up" / str(i) / "audio.wav"
        path.parent.mkdir(parents=True)
        soundfile.write(path, wav[start : start + 7056], rate)
        control.live.uploads.add("x", [str(path)])
        shown.append(json.loads(control.record(str(path), key, "20 ms", None, "speaker")))
        assert not path.exists(), "nothing of it is kept"
    assert shown[0]["figure"] and all(d["tick"] for d in shown[1:]) and shown[0]["note"].startswith("Listening")
    control.live.recordings["speaker"].began -= 60
    for i in range(8):
        path = folder / "up" / f"late {i}.wav"
        path.parent.mkdir(exist_ok=True)
        soundfile.write(path, wav[:7056], rate)
        control.live.uploads.add("x", [str(path)])
        late = json.loads(control.record(str(path), key, "20 ms", None, "speaker"))
    assert "s of sound did not arrive" in late["note"]
    (folder / "up").mkdir(exist_ok=True)
    (folder / "up" / "bad.wav").write_text("no sound")
    control.live.uploads.add("x", [str(folder / "up" / "bad.wav")])
    with pytest.raises(EsslError, match="cannot be read"):
        control.record(str(folder / "up" / "bad.wav"), key, "20 ms", None, "speaker")
    last = json.loads(control.end_recording(key, None, "speaker"))
    assert "Streamed − offline" in last["finding"] and not last["playing"] and "speaker" not in control.live.recordings
    assert "Nothing was recorded" in control.end_recording(key, None, "speaker")


def test_a_file_that_comes_after_the_end_begins_nothing(controller):
    control, _, folder = controller
    key, run = f"trained:{STREAMS}", None
    def send(who="late speaker"):
        path = folder / "up" / "late.wav"
        path.parent.mkdir(exist_ok=True)
        soundfile.write(path, chirp(0.4), 16000)
        control.live.uploads.add("x", [str(path)])
        return json.loads(control.record(str(path), key, "20 ms", None, who))
    assert send()["keep"] and "late speaker" not in control.live.runs, "before the microphone is on"
    control.begin_recording("late speaker")
    run = send()["run"]
    recording = control.live.recordings["late speaker"]
    last = json.loads(control.end_recording(key, None, "late speaker"))
    assert last["run"] == run and not last["playing"]
    assert send()["keep"] and "late speaker" not in control.live.recordings and not control.live.line.asked
    control.live.speaking.add("late speaker"), control.live.recordings.update({"late speaker": recording}), control.live.runs.update({"late speaker": run})
    assert send()["keep"], "in the middle of the end"
    control.live.leave("late speaker")


@pytest.fixture(scope="module")
def page(controller, tmp_path_factory):
    if chromium() is None:
        pytest.skip(NO_BROWSER)
    sync = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install playwright")
    folder = controller[2]
    process, address = start(tmp_path_factory.mktemp("uploads"), folder / "opened", folder / "sound")
    said, asked = [], []
    with sync.sync_playwright() as p:
        page = p.chromium.launch(executable_path=chromium(), args=FLAGS).new_page(viewport=dict(width=1440, height=900))
        page.set_default_timeout(PATIENCE / 2)
        page.on("console", lambda m: said.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda e: said.append(str(e)))
        page.on("request", lambda r: asked.append(r.url))
        page.goto(address)
        yield page
    process.terminate()
    process.wait(60)
    assert not said, said
    assert not [u for u in asked if not u.startswith((address, address.replace("http:", "ws:"), "data:", "blob:"))]


def test_in_a_browser(page, tmp_path):
    page.wait_for_selector("button[role=tab]:has-text('Stream')")
    assert not page.evaluate("() => Boolean(window.essl && essl.views.live && essl.views.live.payload)"), "nothing is computed before it is selected"
    page.click("button[role=tab]:has-text('Stream')")
    page.wait_for_selector("#live-view .essl-view[data-shown]")
    assert page.locator("#live-view .essl-finding").inner_text().count("Streamed − offline") == 1
    page.click("#stream-play")
    page.wait_for_selector("#live-view .essl-view[data-playing='1']")
    page.wait_for_function("() => essl.views.live.ticks > 3 && essl.views.live.div.data.find(t => t.meta && t.meta.role === 'live-mel').z.length > 30")
    page.click("#stream-stop")
    page.wait_for_selector("#live-view .essl-busy:has-text('Stopped.')")
    page.focus("#stream-play")
    page.keyboard.press("Enter")
    page.wait_for_selector("#live-view .essl-view[data-playing='1']")
    page.wait_for_function("() => essl.views.live.ticks > 0")
    page.click("#stream-stop")
    page.wait_for_selector("#live-view .essl-view[data-playing='']")
    page.click("#stream-encoder input")
    page.fill("#stream-encoder input", f"{WHOLE}, pre-trained")
    page.keyboard.press("Enter")
    page.wait_for_selector("#stream-error .essl-error:has-text('bounded look-ahead')")
    page.click("#stream-encoder input")
    page.fill("#stream-encoder input", f"{STREAMS}, pre-trained")
    page.keyboard.press("Enter")
    page.wait_for_selector("#stream-error .essl-error", state="detached")
    page.click("label:has-text('your own') >> visible=true")
    soundfile.write(tmp_path / "short.wav", chirp(0.05), 16000)
    page.set_input_files("#stream-own input[type=file]", tmp_path / "short.wav")
    page.wait_for_selector("#stream-error .essl-error:has-text('0.05 s')")
    page.wait_for_timeout(1000)
    assert "0.05 s" in page.inner_text("#stream-error"), "it stays"
    page.click("#stream-mic button:has-text('Record')")
    page.wait_for_selector("#live-view .essl-about:has-text('microphone')")
    page.wait_for_timeout(1500)
    page.click("#stream-mic button:has-text('Stop')")
    page.wait_for_selector("#live-view .essl-finding:has-text('Streamed − offline')")
    page.set_viewport_size(dict(width=390, height=900))
    page.wait_for_timeout(500)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
