"""A mixer defined in a scratch file with one decorator is everywhere at once: lists, battery, studies, explorer."""
import pytest
import torch
from torch import nn

from essl_nb import check_mixer, influence_map, list_mixers
from essl_nb.app.explorer import create_app
from essl_nb.app.shelf import UNTRAINED, Shelf
from essl_nb.core.shapes import masked_mean, zero_pads
from essl_nb.mixers.base import Mixer, mixers
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
    shelf = Shelf(None)
    assert UNTRAINED + guest in [key for _, key in shelf.choices()]
    encoder = shelf.get(UNTRAINED + guest)
    values = influence_map(encoder, torch.randn(8000) * 0.1, layer=1).values
    assert values.shape == (25, 25) and values.min() > 0  # a mean joins every frame with every other
    assert guest in str(create_app().get_config_file())
