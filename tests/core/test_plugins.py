"""Another installed package's mixers, objectives and front ends are there without an import; one that is broken is named and left out."""
import os
import subprocess
import sys

import pytest

MIXER = '''
from essl_nb.core.shapes import zero_pads
from essl_nb.mixers.base import Mixer, mixers

@mixers.register("from a plug-in", family="none", complexity="T", paper="", tiny={})
class Plugged(Mixer):
    "Doubles each frame."
    can_be_causal = True

    def forward(self, x, mask=None):
        return zero_pads(2 * x, mask)
'''


@pytest.fixture
def installed(tmp_path):
    "A package with entry points, as pip would leave it."
    (tmp_path / "plugged.py").write_text(MIXER)
    (tmp_path / "broken_plug.py").write_text("import a_module_that_is_nowhere\n")
    info = tmp_path / "plugged-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plugged\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[essl_nb.mixer]\nmine = plugged\nbroken = broken_plug\n")

    def run(code):
        env = dict(os.environ, PYTHONPATH=os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
        done = subprocess.run([sys.executable, "-W", "default", "-c", code], capture_output=True, text=True, env=env)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout + done.stderr

    return run


def test_a_plug_in_is_listed_and_built_without_an_import(installed):
    said = installed("""
import torch
from essl_nb import EncoderConfig, build_encoder, build_mixer, list_mixers
assert "from a plug-in" in list_mixers() and "attention" in list_mixers()
assert torch.equal(build_mixer("from a plug-in", 8)(torch.ones(1, 2, 8)), 2 * torch.ones(1, 2, 8))
assert 1 == len(build_encoder(EncoderConfig("from a plug-in", dim=16, depth=1)).blocks)
""")
    assert "'broken' of essl_nb.mixer" in said and "a_module_that_is_nowhere" in said


def test_a_guest_is_told_of_a_taken_name_before_the_folder_was_asked_for():
    code = """
from essl_nb.mixers.base import Mixer, mixers
assert not mixers.filled
try:
    @mixers.register("attention", family="none", complexity="T", paper="", tiny={})
    class Mine(Mixer): ...
except ValueError as e:
    print(e)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "is taken by essl_nb.mixers.attention" in done.stdout, done.stdout + done.stderr
