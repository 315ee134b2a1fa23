"""The explorer over HTTP: whom it answers, what it takes, what it leaves behind. A server of its own, asked as the page asks and as others would."""
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import numpy as np
import pytest
import soundfile
from madeup import make_curves, make_study

from essl_nb.app.access import refusal
from essl_nb.app.explorer import free_port
from essl_nb.app.page import PLOTLY_JS
from essl_nb.app.uploads import PREFIX, Uploads
from essl_nb.core.registry import EsslError
from essl_nb.mixers.base import list_mixers

TOO_LONG = 300  # s; a loaded machine is slow


def start(tmp: Path, study: Path, corpus: Path, **more) -> tuple: # (process, address)
    "The command, started as a user would."
    call = f"from essl_nb.app.explorer import essl_explore; essl_explore(port=0, results={str(study)!r}, corpus={str(corpus)!r}, no_browser=True)"
    env = {**os.environ, "GRADIO_TEMP_DIR": str(tmp), **more}
    process = subprocess.Popen([sys.executable, "-c", call], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)
    said = []
    for line in process.stdout:
        said.append(line)
        if found := re.findall(r"http://[\d.:]+", line):
            return process, found[0]
    pytest.fail("the explorer did not start:\n" + "".join(said))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "A study, neighbours that are broken in several ways, and a corpus of three clips."
    folder = tmp_path_factory.mktemp("study")
    study = make_study(folder / "opened", seeds=1, names=list_mixers()[:3])
    make_curves(folder / "curves", list_mixers()[:3])
    grid = (study / "grid.json").read_bytes()
    whole = next(line for line in (study / "rows.jsonl").read_bytes().splitlines(True) if b'"kind": "score"' in line)
    for name, rows in (("noise", np.random.default_rng(0).integers(128, 256, 5000, dtype="uint8").tobytes()), ("list", whole + b"[]\n"), ("empty row", b'{"kind": "score"}\n')):
        (folder / name).mkdir()
        (folder / name / "grid.json").write_bytes(grid)
        (folder / name / "rows.jsonl").write_bytes(rows)
    (folder / "odd grid").mkdir()
    (folder / "odd grid" / "grid.json").write_bytes(b'{"encoders": {"a": [1]}}')
    (folder / "odd grid" / "rows.jsonl").write_bytes((study / "rows.jsonl").read_bytes())
    corpus = folder / "sound"
    corpus.mkdir()
    for i in range(3):
        tone(corpus / f"{i}.wav", 200 + 50 * i)
    return study, corpus


PROXIES = dict.fromkeys(("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"), "http://127.0.0.1:9") | dict(NO_PROXY="", no_proxy="")


@pytest.fixture(scope="module")
def server(made, tmp_path_factory):
    "An explorer where an earlier one was killed with an upload in its folder, behind proxies that lead nowhere; told to end, it takes its folder along."
    tmp = tmp_path_factory.mktemp("uploads")
    killed, address = start(tmp, *made)
    left = with_an_upload(address, tmp)
    killed.kill()
    killed.wait(60)
    process, address = start(tmp, *made, **PROXIES)
    mine = folder_of(tmp, left)
    yield address, mine, left
    process.terminate()
    process.wait(60)
    assert not mine.exists()


def folder_of(tmp: Path, *others: Path) -> Path: # of the explorer that runs
    (folder,) = set(tmp.glob(PREFIX + "*")) - set(others)
    assert folder.stat().st_mode & 0o077 == 0
    return folder


def with_an_upload(address: str, tmp: Path) -> Path: # the explorer's folder, with a clip in it
    folder = folder_of(tmp)
    with client(address) as c:
        upload(c, tone(tmp / "mine.wav", 555))
    assert [p for p in folder.rglob("*.wav")]
    return folder


def tone(path: Path, hertz: float, seconds: float = 1.0) -> Path:
    soundfile.write(path, np.sin(2 * np.pi * hertz * np.arange(int(16000 * seconds)) / 16000) / 2, 16000)
    return path


def client(address: str) -> httpx.Client:
    return httpx.Client(base_url=address, timeout=TOO_LONG, trust_env=False)


def config(c: httpx.Client) -> dict:
    return c.get("/config").json()


def event(conf: dict, name: str) -> dict:
    "The dependency whose callback has this name."
    return next(d for d in conf["dependencies"] if (d.get("api_name") or "").startswith(name))


def call(c: httpx.Client, fn_index: int, data: list, session: str) -> list: # answers of one event
    "Join the queue and read what comes of it."
    joined = c.post("/gradio_api/queue/join", json=dict(data=data, fn_index=fn_index, session_hash=session, event_data=None, trigger_id=None))
    joined.raise_for_status()
    answers = []
    with c.stream("GET", f"/gradio_api/queue/data?session_hash={session}") as lines:
        for line in lines.iter_lines():
            if line.startswith("data:"):
                said = json.loads(line[5:])
                answers.append(said)
                if said.get("msg") in ("process_completed", "close_stream"):
                    break
    return answers


def upload(c: httpx.Client, path: Path, **headers) -> httpx.Response:
    return c.post("/gradio_api/upload", files={"files": (path.name, path.read_bytes())}, headers=headers)


def lying(tmp: Path) -> list:
    "Uploads on the disk."
    return [p for p in tmp.rglob("*") if p.is_file() and p.suffix != ".lock" and p.stat().st_size]


def said_by(answers: list) -> str:
    return json.dumps(answers, ensure_ascii=False)


@pytest.mark.parametrize("path", ["/", "/config", "/gradio_api/info", "/gradio_api/upload", "/gradio_api/queue/join"])
@pytest.mark.parametrize("headers", [{"Host": "evil.example"}, {"Host": "evil.example", "Origin": "http://evil.example"}, {"Origin": "http://evil.example"}, {"Origin": "null"},
                                     {"Origin": "http://localhost:1"}, {"Host": "127.0.0.1.evil.example"}], ids=str)
def test_foreign_names_and_pages_are_refused(server, path, headers):
    with client(server[0]) as c:
        for method in ("GET", "POST", "OPTIONS"):
            answer = c.request(method, path, headers={**headers, "Access-Control-Request-Method": "POST"})
            assert answer.status_code == 403 and "access-control-allow-origin" not in answer.headers, (method, answer)


def test_the_page_itself_is_answered(server):
    address = server[0]
    port = address.rsplit(":", 1)[1]
    with client(address) as c:
        for host in ("127.0.0.1", "localhost"):
            assert c.get("/config", headers={"Host": f"{host}:{port}", "Origin": f"http://{host}:{port}"}).status_code == 200


def test_what_the_page_never_asks_for_is_not_there(server):
    with client(server[0]) as c:
        for path in ("/gradio_api/component_server", "/gradio_api/process_recording", "/gradio_api/call/draw", "/gradio_api/api/draw", "/login", "/gradio_api/vibe-edit"):
            assert c.post(path, json={}).status_code == 404, path
        assert c.get("/gradio_api/deep_link?session_hash=a").status_code == 404


def test_a_served_page_answers_under_its_own_name():
    assert refusal(dict(host="my.space")) and not refusal(dict(host="[::1]:7860", origin="http://[::1]:7860"))


def test_an_upload_is_read_once_and_gone(server, tmp_path):
    address, tmp, _ = server
    with client(address) as c:
        conf, sound = config(c), tone(tmp_path / "mine.wav", 333)
        path = upload(c, sound).json()[0]
        assert len(lying(tmp)) == 1
        own = event(conf, "on_upload")["id"]
        answers = call(c, own, [dict(path=path, meta={"_type": "gradio.FileData"})], "one")
        assert "essl-error" not in said_by(answers) and not lying(tmp)
        assert "choose it again" in said_by(call(c, own, [dict(path=path, meta={"_type": "gradio.FileData"})], "two")), "gone is gone"


def test_two_who_send_the_same_file_both_hear_it(server, tmp_path):
    address, tmp, _ = server
    with client(address) as c:
        own, sound = event(config(c), "on_upload")["id"], tone(tmp_path / "same.wav", 444)
        paths = [upload(c, sound).json()[0] for _ in "ab"]
        for session, path in zip(("a1", "b1"), paths):
            assert "essl-error" not in said_by(call(c, own, [dict(path=path, meta={"_type": "gradio.FileData"})], session))
        assert not lying(tmp)


def test_files_of_the_installation_cannot_be_named(server, made):
    "Whatever path a visitor names: nothing is read, nothing is removed, when the visit ends neither."
    address = server[0]
    victims = [PLOTLY_JS, made[1] / "0.wav", made[0] / "rows.jsonl"]
    with client(address) as c:
        conf = config(c)
        for name in ("on_upload", "on_record"):
            for i, victim in enumerate(victims):
                session = f"thief{name}{i}"
                try:
                    call(c, event(conf, name)["id"], [dict(path=str(victim), meta={"_type": "gradio.FileData"})], session)
                except httpx.HTTPStatusError:
                    pass
                with c.stream("GET", f"/gradio_api/heartbeat/{session}") as beat:
                    next(beat.iter_raw())
    time.sleep(2)
    assert all(v.is_file() for v in victims)


def test_several_files_at_once_are_refused(server, tmp_path):
    address, tmp, _ = server
    with client(address) as c:
        many = [("files", (f"{i}.wav", b"RIFF" + bytes([i]))) for i in range(200)]
        answer = c.post("/gradio_api/upload", files=many)
        assert answer.status_code == 400 and "one at a time" in answer.text and not lying(tmp)


def test_a_file_that_is_too_large_is_refused_before_it_is_read(server):
    host, port = server[0].removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), TOO_LONG) as s:
        s.sendall(f"POST /gradio_api/upload HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: multipart/form-data; boundary=x\r\nContent-Length: {40 * 10**6}\r\n\r\n".encode())
        answer = s.recv(65536).decode()
        while "25" not in answer and (more := s.recv(65536)):
            answer += more.decode()
    assert answer.startswith("HTTP/1.1 413") and "takes up to 25" in answer


def test_uploads_have_a_sum(tmp_path):
    uploads = Uploads(tmp_path, max_file=100, max_visitor=150, max_total=220)
    uploads.reserve("a", 100)
    with pytest.raises(EsslError, match="wait a minute"):
        uploads.reserve("a", 100)
    uploads.reserve("b", 100)
    with pytest.raises(EsslError, match="wait a minute"):
        uploads.reserve("c", 100)
    uploads.release("a", 100)
    uploads.reserve("c", 100)


def test_what_nobody_reads_is_swept(tmp_path):
    uploads = Uploads(tmp_path, max_age=0)
    for name in ("brought", "left by the framework"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.wav").write_bytes(b"x")
    uploads.add("a", [tmp_path / "brought" / "a.wav"])
    os.utime(tmp_path / "left by the framework" / "a.wav", (0, 0))
    time.sleep(0.05)
    uploads.sweep()
    assert not list(tmp_path.rglob("*.wav")) and uploads.bytes_held() == 0


@pytest.mark.slow
def test_ctrl_c_takes_the_uploads_along(made, tmp_path):
    process, address = start(tmp_path, *made)
    folder = with_an_upload(address, tmp_path)
    process.send_signal(signal.SIGINT)
    process.wait(60)
    assert not folder.exists()


def test_what_a_killed_one_left_is_gone_with_the_next_start(server):
    assert not server[2].exists()


def test_a_broken_neighbour_is_named_and_the_page_lives(server):
    with client(server[0]) as c:
        for _ in range(TOO_LONG):  # until the first views, and so the lists' choices, stand in the page itself
            conf = config(c)
            opening = next(d for d in conf["dependencies"] if "load" in [t[1] for t in d["targets"]] and len(d["inputs"]) > 9)
            values = {comp["id"]: comp["props"].get("value") for comp in conf["components"]}
            if values[opening["inputs"][0]]:
                break
            time.sleep(1)
        ask = lambda study: said_by(call(c, opening["id"], [study if n == 0 else values[i] for n, i in enumerate(opening["inputs"])], f"s{study}"))
        said = ask("opened")
        assert "unreadable: noise" in said and "odd grid" in said and "highest" in said
        for name, words in (("noise", "Line 1 of"), ("list", "which is no row"), ("empty row", "has no 'key'"), ("odd grid", "highest")):
            assert words in (got := ask(name)), (name, got[:500])
        assert "highest" in ask("opened"), "and the page goes on"


def test_a_proxy_is_not_asked_for_loopback(server):
    with client(server[0]) as c:
        assert c.get("/config").status_code == 200


def test_ports_are_answered_in_words(monkeypatch):
    for port in (-1, 65536, 70000):
        with pytest.raises(EsslError, match="There is no port"):
            free_port(port)
    assert 0 < free_port(0) < 65536
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert free_port(port) != port
        with pytest.raises(EsslError, match="in use"):
            free_port(port, tries=1)
    monkeypatch.setattr(socket.socket, "bind", lambda *_: (_ for _ in ()).throw(PermissionError(13, "no")))
    with pytest.raises(EsslError, match="may not open"):
        free_port(80)


def test_the_command_ends_in_a_sentence():
    done = subprocess.run([sys.executable, "-c", "from essl_nb.core.command import status_of; from essl_nb.app.explorer import essl_explore; raise SystemExit(status_of('essl_explore', lambda: essl_explore(port=70000, no_browser=True)))"], capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr and done.stderr.startswith("essl_explore: There is no port 70000")
