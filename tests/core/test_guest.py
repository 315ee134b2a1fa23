"""What a scratch file defines with one decorator is everywhere at once: lists, battery, isolated processes, studies, costs, explorer."""
import numpy as np
import pytest
import soundfile as sf
import torch
from torch import nn

from essl_nb import EncoderConfig, Study, check_mixer, influence_map, list_mixers, load_results, training_cost
from essl_nb.app.explorer import create_app
from essl_nb.app.library import UNTRAINED, EncoderLibrary
from essl_nb.core.fresh import run_fresh
from essl_nb.core.registry import Registry
from essl_nb.core.shapes import masked_mean, zero_pads
from essl_nb.mixers.base import Mixer, mixers
from essl_nb.objectives.objective import objectives
from essl_nb.study.grid import grid_cells, read_grid

NAME = "guest for a test"


@pytest.fixture
def guest():
    @mixers.register(NAME, family="pooling", complexity="T", paper="", tiny={})
    class Guest(Mixer):
        "Adds what the utterance has in common to every frame."
        can_be_causal = streams = False

        def __init__(self, dim, *, causal=False):
            super().__init__(dim, causal=causal)
            self.inward, self.outward = nn.Linear(dim, dim), nn.Linear(dim, dim)

        def forward(self, x, mask=None):
            x = zero_pads(x, mask)
            common = masked_mean(self.inward(x), mask)[:, None]  # (B,1,D)
            return zero_pads(self.outward(x + common), mask)

    yield NAME
    mixers.remove(NAME)


def test_one_decorator_is_enough(guest, tmp_path):
    assert guest in list_mixers()
    check_mixer(guest)
    grid = read_grid(dict(name="g", encoders=[dict(name="mine", config=dict(mixer=guest, dim=16, depth=1))], objectives=[dict(name="clusters")]))
    assert any(guest in str(cell.what) for cell in grid_cells(grid))


def test_the_explorer_offers_it_and_draws_its_map(guest):
    library = EncoderLibrary(None)
    assert UNTRAINED + guest in [key for _, key in library.choices()]
    encoder = library.get(UNTRAINED + guest)
    values = influence_map(encoder, torch.randn(8000) * 0.1, layer=1).values
    assert values.shape == (25, 25) and values.min() > 0  # a mean joins every frame with every other
    assert guest in str(create_app().get_config_file())


WORD = "guest of every kind"


@pytest.fixture
def guests(guest):
    "One guest of each kind, defined here and registered by nothing but its decorator."
    from essl_nb.models.block import TransformerBlock, blocks
    from essl_nb.models.frontend import frontends
    from essl_nb.objectives.objective import objectives
    from essl_nb.probes.frames import Frames
    from essl_nb.probes.heads import heads, posteriors, train_head
    from essl_nb.probes.probe import probes

    plain = frontends.get("logmel").obj
    teacher = objectives.get(objectives.names()[0])

    @blocks.register(WORD, paper="")
    class Halved(TransformerBlock):
        "Half of what the mixer adds."

        def mixed(self, x, mask, layer_state):
            y, layer_state = super().mixed(x, mask, layer_state)
            return y / 2, layer_state

    @frontends.register(WORD)
    class Front(plain):
        "Log-mel frames under another name."

    @objectives.register(WORD, paper="", tiny=teacher.meta["tiny"])
    class Task(teacher.obj):
        "An objective under another name."

    @heads.register(WORD, lr=1e-2)
    def head(dim, classes, generator):
        "A linear layer from torch's own start."
        return nn.Linear(dim, classes)

    @probes.register(WORD, needs="sound", heads=("linear", "mlp"))
    def loud(job, steps: int = 3):
        "Which frames are louder than their clip's median."
        clips = list(job.corpus)
        mels = [job.source.features[u.id] for u in clips]
        answers = [(mel.mean(1) > mel.mean(1).median()).long() for mel in mels]
        x = Frames(torch.cat(mels)[:, None].half(), {"all": (0, sum(map(len, mels)))})
        model = train_head(x, torch.cat(answers), 2, head=job.head, steps=steps, batch=64, progress=False)
        right = (posteriors(model, x).argmax(-1) == torch.cat(answers)).split([len(a) for a in answers])
        return job.score("accuracy", [[int(r.sum()), len(r)] for r in right], [u.id for u in clips], len(torch.cat(right)), steps=steps)

    kinds = (blocks, frontends, objectives, heads, probes)
    yield kinds
    for registry in kinds:
        registry.remove(WORD)


def here() -> list:
    "What a process knows of the guests: kinds and whether something can be built of them."
    from essl_nb import EncoderConfig, build_encoder
    from essl_nb.core.registry import shared_guests

    built = build_encoder(EncoderConfig(NAME, dim=16, depth=1, block=WORD, frontend=WORD), seed=0)
    return [sorted(r.kind for r, _ in shared_guests()), type(built.blocks[0]).__name__, type(built.frontend).__name__]


def grandchild() -> list:
    "The same, one process further."
    return run_fresh(here).value


def test_guests_of_every_kind_travel_to_an_isolated_process_and_on_from_there(guests):
    kinds = sorted(["mixer", *(r.kind for r in guests)])
    assert set(kinds) == {r.kind for r in Registry.made if r.module.startswith("essl_nb.")}, "a registry of the package without a guest in this test"
    assert run_fresh(here).value == run_fresh(grandchild).value == [kinds, "Halved", "Front"]


def test_what_this_package_defines_and_someone_else_registers_travels_too():
    known = mixers.get(list_mixers()[0])
    mixers.register(WORD, **known.meta)(known.obj)
    try:
        assert mixers.get(WORD).is_guest() and not known.is_guest() and known.obj.registered_name == known.name
        assert run_fresh(build_and_name, WORD).value == known.obj.__name__
    finally:
        mixers.remove(WORD)


def build_and_name(name: str) -> str:
    "The class behind a name."
    from essl_nb import build_mixer

    return type(build_mixer(name, 16)).__name__


def test_a_study_and_a_cost_card_of_nothing_but_guests(guests, tmp_path):
    config = dict(mixer=NAME, dim=16, depth=1, block=WORD, frontend=WORD)
    sounds = tmp_path / "sounds"
    sounds.mkdir()
    generator = np.random.default_rng(0)
    for i in range(8):
        sf.write(sounds / f"{i}.wav", 0.1 * generator.standard_normal(32000), 16000)
    grid = dict(name="guests", corpus=str(sounds), encoders=[dict(name="mine", config=config)], seeds=[0], baselines=[],
                objectives=[dict(name=WORD, kw=objectives.get(WORD).meta["tiny"])], pretrain=dict(steps=20, batch_seconds=8),
                probes=[dict(name=WORD, kw=dict(head=WORD), untrained=False)])
    outcome = Study(grid, tmp_path / "study").run(progress=False)
    assert not outcome.failed, outcome
    rows = load_results(tmp_path / "study")
    assert set(rows.kind) == {"run", "score"} and set(rows["head"].dropna()) == {WORD} and set(rows.objective) == {WORD}
    card = training_cost(EncoderConfig(**config), batch_seconds=4, crop_seconds=2, repeats=2, threads=1)
    assert card["step_s"] > 0 and card["config"]["block"] == WORD
