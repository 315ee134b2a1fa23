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


def test_about_twenty_names_and_no_more():
    assert len(essl_nb.__all__) <= 22


def test_a_misspelt_name_is_answered():
    with pytest.raises(AttributeError, match="load_corpus"):
        essl_nb.load_korpus


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


@pytest.mark.parametrize("command", commands(), ids=lambda c: c.split("=")[0])
def test_command_helps(command):
    name, place = command.split("=")
    module, function = place.split(":")
    said = python(f"import sys; sys.argv = ['{name}', '--help']; from {module} import {function}; {function}()")
    assert "usage" in said and len(said.splitlines()) > 4


@pytest.mark.parametrize("command", commands(), ids=lambda c: c.split("=")[0])
def test_command_says_what_is_wrong_in_a_sentence(command):
    name, place = command.split("=")
    module, function = place.split(":")
    done = subprocess.run([sys.executable, "-c", f"import sys; sys.argv = ['{name}', '--no-such-option']; from {module} import {function}; {function}()"],
                          cwd=ROOT, capture_output=True, text=True, timeout=180)
    assert done.returncode != 0 and "Traceback" not in done.stderr and "no-such-option" in done.stderr
