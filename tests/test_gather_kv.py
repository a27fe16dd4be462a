"""``gather_kv`` against what was stored: interpreted on a CPU, compiled on a GPU."""

import pytest
import torch
from paged_step import E4M3, step

from adallm.attention import gather_kv
from adallm.kernels import gather_kv as kernel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("lengths", [[0, 3, 16, 37, 150], [1], [0]])
@pytest.mark.parametrize(
    ("cache", "order", "d", "block_size"),
    [(E4M3, "nhd", 64, 16), (E4M3, "hnd", 96, 32), (torch.bfloat16, "nhd", 128, 64), (E4M3, "nhd", 256, 128)],
)
@pytest.mark.parametrize("as_tensor", [False, True])
def test_keys_and_values_come_back(lengths, cache, order, d, block_size, as_tensor):
    _, *given, _, dense = step(lengths, d=d, block_size=block_size, cache=cache, order=order)
    starts = torch.tensor([0, *lengths]).cumsum(0).int()
    scales = {"k_scale": 0.5, "v_scale": 2.0} if cache == E4M3 else {"k_scale": 1.0, "v_scale": 1.0}
    expected = [
        torch.cat([pair[i] for pair in dense]) * scale for i, scale in enumerate((scales["k_scale"], scales["v_scale"]))
    ]
    if as_tensor and cache == E4M3:
        scales = {name: torch.tensor(value, device=DEVICE) for name, value in scales.items()}
    given = [x.to(DEVICE) for x in (*given, starts)]
    tokens, longest = sum(lengths) + 2, max(lengths)
    out = [torch.full((tokens, 2, d), 7.0, device=DEVICE).bfloat16() for _ in range(2)]
    kernel.launch(*given, longest, *out, **scales)
    found = gather_kv(*given, tokens=tokens, longest=longest, dtype=torch.bfloat16, **scales)
    for mine, other, wanted in zip(out, found, expected, strict=True):
        assert torch.equal(mine[:-2].float().cpu(), wanted.bfloat16().float())
        assert torch.equal(other[:-2].float().cpu(), wanted.bfloat16().float())
        assert (mine[-2:] == 7.0).all()  # behind the last


def test_bad_input():
    _, k_cache, v_cache, table, _, _ = step([5, 20])
    starts = torch.tensor([0, 5, 25], dtype=torch.int32)
    given = {"tokens": 25, "longest": 20, "dtype": torch.bfloat16}
    for change, said in (
        ({"starts": starts.long()}, r"starts is torch.int64 \[3\]; it must be int32"),
        ({"block_table": table[:1]}, r"block_table is torch.int32 \[1, 3\]; it must be int32 \[2, ...\]"),
        ({"dtype": torch.float32}, "dtype is torch.float32"),
        (
            {"k_scale": torch.ones(k_cache.shape[:3]), "v_scale": torch.ones(k_cache.shape[:3])},
            "one number for a layer",
        ),
        ({"k_scale": -1.0}, "k_scale is -1.0"),
        ({"v_cache": v_cache[:1]}, "the caches are"),
    ):
        arguments = {"k_cache": k_cache, "v_cache": v_cache, "block_table": table, "starts": starts, **given} | change
        with pytest.raises(ValueError, match=said):
            gather_kv(**arguments)
