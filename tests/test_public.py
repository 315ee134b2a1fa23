"""The front door: the public names, a light import, commands with help, and examples that run as they are printed."""
import re
import subprocess
import sys
from pathlib import Path

import pytest

import essl_nb

ROOT = Path(__file__).resolve().parents[1]


def python(code: str) -> str:
    "What a fresh Python prints for `code`."
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("name", essl_nb.__all__)
def test_public_name(name):
    thing = getattr(essl_nb, name)
    assert thing.__doc__ and thing.__module__.startswith("essl_nb."), "a public name says in a line what it is"
    assert name in dir(essl_nb)


def test_about_thirty_names_and_no_more():
    assert len(essl_nb.__all__) <= 30


def test_a_misspelt_name_is_answered():
    with pytest.raises(AttributeError, match="load_corpus"):
        essl_nb.load_korpus


MIXER = essl_nb.list_mixers()[0]
WRONG_THINGS = {  # what stands in place of what a public function takes
    "an encoder by the name of a size": lambda: essl_nb.build_encoder("small"),
    "an encoder from plain values": lambda: essl_nb.build_encoder({"mixer": MIXER}),
    "a run from plain values": lambda: essl_nb.pretrain({"mixer": MIXER}, "nowhere"),
    "a run of an encoder's configuration": lambda: essl_nb.pretrain(essl_nb.EncoderConfig(MIXER), "nowhere"),
    "a run on the name of a corpus": lambda: essl_nb.pretrain(essl_nb.PretrainConfig(essl_nb.EncoderConfig(MIXER)), "nowhere", corpus="bundled"),
    "the cost of an encoder": lambda: essl_nb.training_cost(essl_nb.build_encoder(essl_nb.EncoderConfig(MIXER, dim=8, depth=1))),
    "an encoder in place of a probe": lambda: essl_nb.run_probe("phones", essl_nb.build_encoder(essl_nb.EncoderConfig(MIXER, dim=8, depth=1)), "bundled"),
    "a file of another module": lambda: essl_nb.export_onnx(essl_nb.LiGRU(8, 8), "nowhere.onnx"),
    "published weights by name": lambda: essl_nb.from_transformers("facebook/wav2vec2-base"),
    "a mixer of no width": lambda: essl_nb.build_mixer(MIXER, 0),
    "a mixer of half a width": lambda: essl_nb.build_mixer(MIXER, 8.5),
}


@pytest.mark.parametrize("what", WRONG_THINGS)
def test_a_thing_of_another_type_is_named_with_what_makes_the_right_one(what, tmp_path, monkeypatch):
    from essl_nb.core.registry import EsslError

    monkeypatch.chdir(tmp_path)
    with pytest.raises(EsslError) as told:
        WRONG_THINGS[what]()
    assert len(str(told.value)) < 300 and not any(tmp_path.iterdir())


def test_importing_the_package_is_light():
    loaded = python("import sys, essl_nb; print([m for m in ('torch', 'gradio', 'pandas', 'plotly') if m in sys.modules])")
    assert loaded.strip() == "[]"


def test_the_page_is_loaded_only_when_asked_for():
    loaded = python("import sys; from essl_nb import build_encoder, load_corpus, run_probe, pretrain, load_results, influence_map; print('gradio' in sys.modules)")
    assert loaded.strip() == "False", "the library must not import gradio; only essl_nb.app does"


def test_the_mixer_of_the_design_page_is_a_mixer():
    code = re.search(r"```python\n(.*?)```", (ROOT / "docs/design.md").read_text(encoding="utf-8"), re.S)[1]
    head = "from essl_nb import check_mixer, list_mixers\nfrom essl_nb.mixers.base import Mixer, mixers\nfrom essl_nb.core.shapes import zero_pads\nimport torch.nn.functional as F\n"
    said = python(f"{head}{code}\nassert 'shift' in list_mixers()\nprint(check_mixer('shift'))")
    assert "hold" in said


def commands() -> list:
    from configparser import ConfigParser

    parser = ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return parser["DEFAULT"]["console_scripts"].split()


@pytest.mark.parametrize("name", [c.split("=")[0] for c in commands()])
def test_command_helps_and_refuses_in_a_sentence(name):
    module, entry = next(c.split("=")[1].split(":") for c in commands() if c.split("=")[0] == name)
    said = python(f"""
import sys
from {module} import {entry}
for given in (['--help'], ['x', '--no-such-option']):
    sys.argv, sys.stderr = [{name!r}, *given], sys.stdout
    try:
        print('ended with', {entry}())
    except SystemExit as end:
        print('ended with', end.code)
""")
    assert "usage: " + name in said and "ended with 0" in said
    assert "unrecognized arguments" in said and "--no_such_option" in said and said.strip().endswith("ended with 2")
