"""Saved, read, uploaded and downloaded by the three words of the Hugging Face hub; the hub here is a server on loopback that speaks its protocol."""
import base64
import copy
import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
import yaml

from essl_nb import EncoderConfig, build_encoder, list_mixers, load_encoder
from essl_nb.core.registry import EsslError
from essl_nb.models.card import model_card
from essl_nb.models.encoder import Encoder

pytest.importorskip("huggingface_hub")
CONFIG = EncoderConfig(list_mixers()[0], dim=32, depth=1)
WAV = torch.randn(1, 8000, generator=torch.Generator().manual_seed(0)) * 0.1


@pytest.fixture
def encoder():
    return build_encoder(CONFIG, seed=3).eval()


def test_what_is_saved_is_read_by_either_door(encoder, tmp_path):
    assert encoder.save_pretrained(tmp_path / "a") is None
    assert sorted(os.listdir(tmp_path)) == ["a"] and sorted(os.listdir(tmp_path / "a")) == ["README.md", "config.json", "model.safetensors"]
    for again in (Encoder.from_pretrained(tmp_path / "a"), load_encoder(tmp_path / "a"), Encoder.from_pretrained(encoder.save(tmp_path / "b"))):
        assert again.config == CONFIG and torch.equal(again(WAV).frames, encoder(WAV).frames)


def test_a_card_that_somebody_wrote_stays(encoder, tmp_path):
    (tmp_path / "README.md").write_text("mine")
    encoder.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_a_save_that_fails_leaves_what_was_there(encoder, tmp_path, monkeypatch):
    encoder.save_pretrained(tmp_path / "a")
    before = {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()}
    full = lambda *a, **k: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    monkeypatch.setattr("essl_nb.core.files.safetensors.torch.save_file", full)
    with pytest.raises(EsslError, match="disk is full"):
        build_encoder(CONFIG, seed=4).save_pretrained(tmp_path / "a")
    assert {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()} == before and os.listdir(tmp_path) == ["a"]


def test_a_class_of_ones_own_comes_back_as_itself(encoder, tmp_path):
    class Mine(Encoder):
        "With a head of its own, perhaps."

    build_encoder(CONFIG, seed=3, cls=Mine).save_pretrained(tmp_path)
    again = Mine.from_pretrained(tmp_path)
    assert type(again) is Mine and torch.equal(again.eval()(WAV).frames, encoder(WAV).frames)


def test_a_copy_is_as_without_the_mixin(encoder):
    assert torch.equal(copy.deepcopy(encoder)(WAV).frames, encoder(WAV).frames)


def test_a_name_that_is_nowhere_is_answered():
    with pytest.raises(EsslError, match="neither a folder nor a name"):
        Encoder.from_pretrained("no such/place/at all")
    with pytest.raises(EsslError, match="hub gave no 'no/one'"):  # the tests are offline
        Encoder.from_pretrained("no/one")


WITHOUT = """
import sys; sys.modules["huggingface_hub"] = None
import torch
from essl_nb import EncoderConfig, build_encoder, list_mixers
from essl_nb.models.encoder import Encoder
encoder = build_encoder(EncoderConfig(list_mixers()[0], dim=32, depth=1), seed=3).eval()
encoder.save_pretrained(sys.argv[1])
wav = torch.zeros(1, 8000)
assert torch.equal(Encoder.from_pretrained(sys.argv[1])(wav).frames, encoder(wav).frames)
for wrong in (lambda: encoder.push_to_hub("a/b"), lambda: Encoder.from_pretrained("a/b")):
    try:
        wrong()
    except ValueError as e:
        assert "pip install 'essl_nb[hf]'" in str(e), e
    else:
        raise AssertionError("no word of what is missing")
"""


def test_folders_need_no_hub(tmp_path):
    done = subprocess.run([sys.executable, "-c", WITHOUT, str(tmp_path / "a")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


class Repository(BaseHTTPRequestHandler):
    "As much of the hub as one upload and one download ask for."
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, value, status=200, head=False, **headers):
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for k, v in {"Content-Length": str(len(body)), "Content-Type": "application/json", **headers}.items():
            self.send_header(k.replace("_", "-"), v)
        self.end_headers()
        if not head:
            self.wfile.write(body)

    def do_POST(self):
        size = int(self.headers.get("Content-Length") or 0)
        body, path, files = self.rfile.read(size), self.path.split("?")[0], self.server.files
        if path == "/api/repos/create":
            return self.answer({"url": f"{self.server.url}/{json.loads(body).get('organization') or 'org'}/name", "name": "org/name", "id": "1"})
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if "/preupload/" in path:
            return self.answer({"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]]})
        if "/commit/" in path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return self.answer({"success": True, "commitOid": "0" * 40, "commitUrl": f"{self.server.url}/org/name/commit/{'0' * 40}", "hookOutput": ""})
        return self.answer({"error": path}, 404)

    def do_HEAD(self):
        self.do_GET(head=True)

    def do_GET(self, head=False):
        path, files = self.path.split("?")[0], self.server.files
        for repository in self.server.others:  # they lie beside the one that is written to
            if f"/{repository}/" in f"{path}/":
                path, files = path.replace(repository, "org/name"), self.server.others[repository]
        if "/revision/nowhere" in path:
            return self.answer({"error": path}, 404, head=head, X_Error_Code="RevisionNotFound")
        if "/tree/" in path:
            return self.answer([{"type": "file", "path": f, "size": len(b), "oid": hashlib.sha1(b).hexdigest()} for f, b in files.items()], head=head)
        if path.startswith("/api/models/org/name"):
            return self.answer({"id": "org/name", "modelId": "org/name", "sha": "0" * 40, "private": False, "siblings": [{"rfilename": f} for f in files]}, head=head)
        name = path.rsplit("/", 1)[-1]
        if path.startswith("/org/name/resolve/") and name in files:
            return self.answer(files[name], head=head, ETag=f'"{hashlib.sha1(files[name]).hexdigest()}"', X_Repo_Commit="0" * 40)
        return self.answer({"error": path}, 404, head=head, X_Error_Code="RepoNotFound")


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Repository)
    server.files, server.others, server.url = {}, {}, f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


ROUND_TRIP = """
import sys, torch
from essl_nb import EncoderConfig, build_encoder, list_mixers
from essl_nb.models.encoder import Encoder
encoder = build_encoder(EncoderConfig(list_mixers()[0], dim=32, depth=1), seed=3).eval()
print(encoder.push_to_hub("org/name", token="hf_none"))
again = Encoder.from_pretrained("org/name", cache_dir=sys.argv[1], token="hf_none")
assert torch.equal(again(torch.ones(1, 8000)).frames, encoder(torch.ones(1, 8000)).frames)
"""


def python(hub, code, *arguments, **more):
    "What an isolated process prints that takes the loopback server for the hub."
    env = {k: v for k, v in os.environ.items() if "OFFLINE" not in k} | {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1"} | more
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, env=env, timeout=180)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_up_to_the_hub_and_down_again(hub, tmp_path):
    printed = python(hub, ROUND_TRIP, tmp_path / "cache", HF_HOME=str(tmp_path / "home"))
    assert {"README.md", "config.json", "model.safetensors"} <= hub.files.keys() and "org/name" in printed
    assert 'Encoder.from_pretrained("org/name")' in hub.files["README.md"].decode()


RUN = {
    "config.json": dict(encoder=dict(mixer=list_mixers()[0], dim=32, depth=1, block="transformer", frontend="logmel"), objective="clusters", steps=20, corpus="/data/one/speech"),
    "run.json": dict(data=dict(name="mine", data_hash="0123456789ab", hours=5.6, utterances=12, licences=["CC-BY-4.0"]), precision="fp32", made=dict(processes=1, device="cpu", torch="2")),
    "result.json": dict(value=dict(steps=20, hours=0.5, epochs=1.5, masked_share=0.4, skipped=0, stopped="a time limit", parameters=5, weights="ab" * 32, health=dict(masked_accuracy=0.16, rankme=109.6))),
    "cost.json": [dict(card="training", machine=dict(cpu="a processor"), threads=1, precision="fp32", step_s=0.25, peak_bytes=1 << 20)],
}


@pytest.fixture
def run_folder(encoder, tmp_path):
    encoder.save(tmp_path / "run" / "encoder")
    for name, value in RUN.items():
        (tmp_path / "run" / name).write_text(json.dumps(value))
    (tmp_path / "run" / "scores.jsonl").write_text(json.dumps(dict(probe="phones", metric="per", value=0.4, low=0.38, high=0.42, n=62, head="linear", split="test")) + "\n")
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(dict(step=s, alarms=a)) + "\n" for s, a in ((5, []), (10, ["code collapse"]), (15, ["code collapse", dict(name="loss at chance")]))))
    return tmp_path / "run"


def test_what_is_opened_from_a_run_is_shared_with_the_runs_card(encoder, run_folder, tmp_path):
    for folder in (run_folder, run_folder / "encoder"):
        again = Encoder.from_pretrained(folder)
        assert again.run_folder == run_folder and torch.equal(again(WAV).frames, encoder(WAV).frames)
    again.save_pretrained(tmp_path / "a", licence="cc-by-4.0")
    card = (tmp_path / "a" / "README.md").read_text(encoding="utf-8")
    head = yaml.safe_load(card.split("---\n")[1])
    assert head["license"] == "cc-by-4.0" and head["datasets"] == ["mine"] and head["metrics"] == ["per"] and {"speech", "clusters", CONFIG.mixer} <= set(head["tags"])
    assert "corpus: speech" in card and "/data/one" not in card
    for found in ("0123456789ab", "5.6", "a time limit", "109.6", "38.0% to 42.0%", "code collapse, since step 10; loss at chance, since step 15", "CC-BY-4.0", "0.25", "a processor", "mixer: "):
        assert found in card, found
    from huggingface_hub import ModelCard, metadata_load

    assert ModelCard(card).data.library_name == "essl_nb" and metadata_load(tmp_path / "a" / "README.md")["license"] == "cc-by-4.0"
    encoder.save_pretrained(tmp_path / "b", run=run_folder)
    assert "not stated" in (tmp_path / "b" / "README.md").read_text() and encoder.run_folder is None
    encoder.save_pretrained(tmp_path / "c", licence="mit")
    assert metadata_load(tmp_path / "c" / "README.md")["license"] == "mit"


def test_a_card_of_what_is_no_run_or_torn_is_refused(run_folder, tmp_path):
    with pytest.raises(EsslError, match="has no config.json"):
        model_card(tmp_path)
    with pytest.raises(EsslError, match="has no run.json"):
        model_card(run_folder / "encoder")
    (run_folder / "result.json").unlink()
    assert "not finished" in model_card(run_folder)
    (run_folder / "run.json").write_text("{")
    with pytest.raises(EsslError, match="not JSON"):
        model_card(run_folder)


def test_the_bundled_corpus_has_its_licences_on_the_card(run_folder):
    record = RUN["run.json"] | {"data": dict(name="bundled", data_hash="0", hours=5.6)}
    (run_folder / "run.json").write_text(json.dumps(record))
    assert "CC-BY-SA-3.0" in model_card(run_folder)


def test_a_folder_of_another_program_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "wav2vec2"}')
    with pytest.raises(EsslError, match="a wav2vec2 of transformers"):
        Encoder.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"layers": 3}')
    with pytest.raises(EsslError, match="of something else"):
        Encoder.from_pretrained(tmp_path)


WRONG = """
import sys
from essl_nb.models.encoder import Encoder
for run in sys.argv[1:]:
    Encoder.from_pretrained(run).push_to_hub("org/name", token="hf_none", licence="mit")
for name, kw in (("org/name", {}), ("org/none", {}), ("org/name", dict(revision="nowhere")), ("org/foreign", {}), ("org/torn", {}), ("org/empty", {})):
    try:
        encoder = Encoder.from_pretrained(name, token="hf_none", **kw)
        print("opened", name, encoder.run_folder is not None)
    except ValueError as e:
        print(type(e).__name__, str(e).replace("\\n", " "))
"""


def test_what_is_on_the_hub_and_no_encoder_is_told_apart_and_the_cache_serves_offline(hub, run_folder, tmp_path):
    whole = {p.name: p.read_bytes() for p in (run_folder / "encoder").iterdir()}
    foreign, torn = {"config.json": b'{"model_type": "hubert"}', "model.safetensors": b"x"}, whole | {"model.safetensors": whole["model.safetensors"][:-40]}
    hub.others |= {"org/foreign": foreign, "org/torn": torn, "org/empty": {"README.md": b"#"}}
    lines = python(hub, WRONG, run_folder, HF_HOME=str(tmp_path / "home")).splitlines()
    card = hub.files["README.md"].decode()
    assert "license: mit" in card and "0123456789ab" in card and 'Encoder.from_pretrained("org/name")' in card
    expected = ("opened org/name", "no such repository", "no such revision", "a hubert of transformers", "not a whole safetensors file", "holds no encoder")
    assert len(lines) == len(expected) and all(e in line for e, line in zip(expected, lines)), lines
    assert "force_download=True" in lines[4]
    lines = python(hub, WRONG, HF_HOME=str(tmp_path / "home"), HF_HUB_OFFLINE="1").splitlines()
    assert lines[0].startswith("opened org/name") and "HF_HUB_OFFLINE is set" in lines[1], lines
