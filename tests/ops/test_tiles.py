"""Long utterances in time tiles: the same as whole, for every mixer and block, with and without padding."""
import pytest
import torch

from essl_nb.core.config import derive_seed
from essl_nb.core.count import count_macs
from essl_nb.core.shapes import lengths_to_mask
from essl_nb.mixers.base import list_mixers, mixers
from essl_nb.models.block import FeedForward, blocks
from essl_nb.ops import tiles
from essl_nb.ops.tiles import by_tiles, in_tiles, tile_frames, sum_tiles

D, LENGTHS = 16, (150, 97, 33, 1)
FORMS = [(name, causal) for name in list_mixers() for causal in (False, True) if not causal or mixers.get(name).obj.can_be_causal]
CONTROL = next(e.name for e in mixers if e.meta.get("control"))
of_forms = pytest.mark.parametrize("name, causal", FORMS, ids=lambda v: v if isinstance(v, str) else "causal" if v else "bidirectional")


def shaken(make, dtype):
    "A module with weights of which none is at a special value."
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed("weights in tiles"))
        module = make()
        with torch.no_grad():
            for p in module.parameters():
                p.add_(0.1 * torch.randn_like(p))
    return module.to(dtype).eval()


def batch(padded, dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(len(LENGTHS), max(LENGTHS), D, dtype=torch.float64, generator=generator).to(dtype)
    if not padded:
        return x, None
    mask = lengths_to_mask(torch.tensor(LENGTHS))
    return torch.where(mask[..., None], x, torch.nan), mask


def agree(mix, padded, dtype, monkeypatch):
    "All at once with gradients, then in tiles without."
    x, mask = batch(padded, dtype)
    whole = mix(x, mask)[0].detach()
    monkeypatch.setattr(tiles, "TILE", 1)
    with torch.no_grad():
        assert tile_frames(x, D) == 32
        got = mix(x, mask)[0]
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(got, whole, rtol=tolerance, atol=tolerance * float(whole.abs().max()))
    if padded:
        assert got[~mask].abs().max() == 0


@of_forms
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_mixer_gives_the_same_in_tiles(name, causal, padded, dtype, monkeypatch):
    entry = mixers.get(name)
    module = shaken(lambda: entry.obj(D, causal=causal, **entry.meta.get("tiny", {})), dtype)
    agree(module.mix, padded, dtype, monkeypatch)


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("name", [e.name for e in blocks])
def test_a_block_gives_the_same_in_tiles(name, causal, padded, monkeypatch):
    block = shaken(lambda: blocks.get(name).obj(D, mixer=CONTROL, mixer_kw={}, causal=causal), torch.float64)
    agree(lambda x, mask: block(torch.nan_to_num(x), mask), padded, torch.float64, monkeypatch)


@pytest.mark.parametrize("past, future", [(0, 0), (4, 0), (0, 4), (3, 2), (20, 30), (60, 1)])
@pytest.mark.parametrize("T", [1, 31, 32, 33, 64, 100, 131])
def test_every_frame_gets_its_own_neighbours_and_its_own_second_half(past, future, T, monkeypatch):
    x = torch.arange(1.0, T + 1, dtype=torch.float64).view(1, T, 1).repeat(2, 1, 3)
    mask = lengths_to_mask(torch.tensor([T, max(1, T - 7)]))

    def after(z, own):
        n = z.shape[1] - past - future
        assert own.shape[1] == n and torch.equal(torch.where(z[:, past : past + n] != 0, own, 0), z[:, past : past + n])
        return torch.stack([z[:, j : j + n] * (j + 1) for j in range(past + future + 1)]).sum(0)

    run = lambda: in_tiles(after, x, mask, before=lambda part: (part, part), past=past, future=future, width=3)
    whole = run()
    monkeypatch.setattr(tiles, "TILE", 1)
    with torch.no_grad():
        assert torch.equal(run(), whole)


def test_an_utterance_is_one_tile_where_tiling_gains_nothing():
    x = torch.randn(1, 10**5, 1)
    assert tile_frames(x, 64) == 10**5
    with torch.no_grad():
        assert tile_frames(x.to("meta"), 64) == 10**5
        n = tile_frames(x, 64)
        assert n <= tiles.TILE // 64 and 0 <= -(10**5) % n < 20, "tiles are about equal"
        assert tile_frames(x, 64, multiple=50) % 50 == 0 and tile_frames(x, 2**30) == 32 and tile_frames(x, 2**30, least=100) == 100
        assert tile_frames(x, 2048, FeedForward(512)) == tile_frames(x, 2048), "two matrices of a million numbers: a tile of half a million is enough"
        assert tile_frames(x, 4096, FeedForward(1024)) > 3 * tile_frames(x, 4096), "the larger the weights, the fewer the tiles"


def test_nothing_of_nothing():
    with torch.no_grad():
        assert by_tiles(lambda s: torch.zeros(2, 0, 3), torch.zeros(2, 0, 5), 32).shape == (2, 0, 3)
        assert torch.equal(sum_tiles(torch.square, torch.zeros(2, 0, 5), width=5), torch.zeros(2, 1, 5))


def test_a_sum_of_halves_loses_no_digits_between_tiles():
    x = torch.ones(1, 5000, 2, dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(sum_tiles(lambda part: part, x, width=2**13), x.sum(1, keepdim=True))


def test_the_feed_forward_part_takes_little_room_and_counts_the_same():
    from essl_nb.core.memory import allocated_peak

    ff = FeedForward(64).eval()
    x = torch.randn(1, 20000, 64)
    with torch.inference_mode():
        ff(x)
        assert allocated_peak(lambda: ff(x)) < 1.2 * 4 * (x.numel() + 3 * tiles.TILE)
    assert count_macs(lambda: ff(x)) == 20000 * 2 * 4 * 64**2


def test_an_exported_program_is_free_in_its_length():
    ff, long = FeedForward(512).eval(), torch.randn(1, 1000, 512)
    with torch.no_grad():
        program = torch.export.export(ff, (torch.randn(1, 900, 512),), dynamic_shapes={"x": {1: torch.export.Dim("T", min=2, max=10**6)}}).module()
        torch.testing.assert_close(program(long), ff(long), rtol=1e-5, atol=1e-6)
