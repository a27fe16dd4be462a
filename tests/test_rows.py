"""The pieces cover every row once and in order, and the first value that is not finite is found wherever it is."""

import pytest
import torch

from adallm import rows

VIEWS = {
    "vector": lambda: torch.randn(48),
    "vector, every other": lambda: torch.randn(96)[::2],
    "matrix": lambda: torch.randn(7, 48),
    "transposed": lambda: torch.randn(48, 7).T,
    "columns cut": lambda: torch.randn(7, 64)[:, 8:56],
    "expanded": lambda: torch.randn(1, 48).expand(7, 48),
    "batch": lambda: torch.randn(3, 7, 48),
    "batch, transposed": lambda: torch.randn(3, 48, 7).mT,
    "batch, permuted": lambda: torch.randn(48, 7, 3).permute(2, 1, 0),
    "4-D, cut": lambda: torch.randn(2, 3, 5, 64)[:, 1:, ::2, :48],
}


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch):
    monkeypatch.setattr(rows, "_CPU_PIECE", 100)


@pytest.mark.parametrize("view", VIEWS)
def test_pieces_cover_all_rows(view):
    x = VIEWS[view]()
    seen = torch.full((x.shape[:-1].numel(), x.shape[-1]), torch.nan)
    last = 0
    for part, piece in rows.row_pieces(x):
        assert part.start == last
        assert 0 < piece.numel() <= 100
        assert piece.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
        seen[part] = piece
        last = part.stop
    assert torch.equal(seen.view(x.shape), x)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("view", [name for name in VIEWS if name != "expanded"])
def test_the_first_bad_value_is_named(view, value):
    x = VIEWS[view]()
    flat = torch.randint(x.numel() // 2, x.numel() - 1, ())
    index = [int(i) for i in torch.unravel_index(flat, x.shape)]
    x[tuple(index)] = value
    x[tuple(int(i) for i in torch.unravel_index(flat + 1, x.shape))] = value
    with pytest.raises(ValueError, match="must be finite") as error:
        rows.finite_amax(x)
    assert str(error.value).startswith(f"x{index} is {value}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("view", VIEWS)
def test_amax(view, dtype):
    x = VIEWS[view]().to(dtype)
    amax = rows.finite_amax(x)
    assert amax.dtype == dtype
    assert torch.equal(amax, x.abs().max())


@pytest.mark.parametrize("shape", [(0,), (0, 16), (3, 0), (2, 0, 16)])
def test_empty(shape):
    assert not list(rows.row_pieces(torch.empty(shape)))
    with pytest.raises(ValueError, match="no element"):
        rows.finite_amax(torch.empty(shape))


def test_a_row_longer_than_a_piece():
    assert [part for part, _ in rows.row_pieces(torch.empty(3, 500))] == [slice(i, i + 1) for i in range(3)]
