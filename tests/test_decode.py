"""``kernels/decode.py`` against the reference: interpreted on a CPU, compiled on a GPU."""

import itertools
import random

import pytest
import torch
import triton
import triton.language as tl
from paged_step import E4M3, OPTIONS, caches, last_slots, step

from adallm.attention import paged_decode_reference, write_kv_reference
from adallm.kernels import decode, decode_choice, write_kv
from adallm.kernels.choice import GPU
from adallm.kernels.decode_choice import Config
from adallm.paged import HEAD_SIZES, Shape, check_decode

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def run(q, k_cache, v_cache, table, lengths, *, groups, n=16, whole=1, **options):
    names = ("window", "soft_cap", "sinks", "alibi_slopes")
    k_scale, v_scale = options.get("k_scale", 1.0), options.get("v_scale", 1.0)
    checked = [options.get(name, 0.0 if name == "soft_cap" else None) for name in names]
    shape = check_decode(q, k_cache, v_cache, table, lengths, k_scale, v_scale, *checked)
    out = torch.full_like(q, float("nan"))
    programs = groups * decode_choice.tiles(shape)
    partial = torch.full((decode_choice.workspace_floats(shape, programs),), float("nan"), device=q.device)
    arrivals = torch.zeros(3 * programs, dtype=torch.int32, device=q.device)
    config = Config(n, 4, 3, 1, parts=64, whole=whole)
    given = {"programs": programs, "partial": partial, "arrivals": arrivals, "scale": q.shape[-1] ** -0.5}
    decode.launch(q, k_cache, v_cache, table, lengths, out, shape, config, **given, **options)
    assert not arrivals.any()
    return out


def error(out, expected):
    return float((out.double() - expected.double()).norm() / expected.double().norm())


def prepared(options, q_heads=4):
    options = dict(options)
    if options.pop("sinks", None):
        options["sinks"] = torch.randn(q_heads, device=DEVICE)
    if options.pop("slopes", None):
        options["alibi_slopes"] = torch.tensor([2.0 ** -(h + 1) for h in range(q_heads)], device=DEVICE)
    return options


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("groups", [1, 5, 40])
def test_against_the_reference(options, queries, groups):
    given = [x.to(DEVICE) for x in step([0, 3, 16, 37, 150], queries=queries)[:5]]
    options = prepared(options)
    expected = paged_decode_reference(*given, scale=64**-0.5, **options)
    assert error(run(*given, groups=groups, **options), expected) <= 4e-3


@pytest.mark.parametrize("cache", [E4M3, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("d", "block_size"), [(64, 32), (96, 16), (128, 64), (192, 16), (256, 128)])
def test_heads_blocks_and_dtypes(cache, d, block_size):
    dtype = torch.float16 if cache == torch.float16 else torch.bfloat16
    order = "hnd" if d in (96, 256) else "nhd"
    given = step([70, 1, 33], d=d, block_size=block_size, cache=cache, dtype=dtype, order=order)[:5]
    given = [x.to(DEVICE) for x in given]
    expected = paged_decode_reference(*given, scale=d**-0.5)
    assert error(run(*given, groups=4, n=32), expected) <= 4e-3


@pytest.mark.parametrize(("q_heads", "kv_heads"), [(1, 1), (3, 3), (6, 2), (11, 1), (16, 1), (32, 2)])
@pytest.mark.parametrize("queries", [1, 8])
def test_query_heads_of_a_kv_head(q_heads, kv_heads, queries):
    given = [x.to(DEVICE) for x in step([40, 9], q_heads=q_heads, kv_heads=kv_heads, queries=queries)[:5]]
    expected = paged_decode_reference(*given, scale=0.125)
    assert error(run(*given, groups=3), expected) <= 4e-3


@pytest.mark.parametrize(
    ("d", "q_heads", "dtype"), [(64, 4, torch.bfloat16), (96, 2, torch.float16), (256, 32, torch.bfloat16)]
)
@pytest.mark.parametrize("options", [{}, {"window": 20, "soft_cap": 2.0, "sinks": True, "slopes": True}], ids=str)
def test_queries_in_fp8(d, q_heads, dtype, options):
    given = [x.to(DEVICE) for x in step([0, 3, 150], d=d, q_heads=q_heads, queries=2, dtype=dtype)[:5]]
    given[0][0, 0, 0], given[0][1, 0, 1] = 0, given[0][1, 0, 1] * 2.0**-12
    options = prepared(options, q_heads) | {"fp8_queries": True}
    expected = paged_decode_reference(*given, scale=d**-0.5, **options)
    assert error(run(*given, groups=5, **options), expected) <= 4e-3


@pytest.mark.parametrize("options", [*OPTIONS, {"fp8_queries": True}], ids=str)
@pytest.mark.parametrize("queries", [1, 3, 8])
@pytest.mark.parametrize("groups", [1, 5, 40])
def test_new_tokens_are_written_first(options, queries, groups):
    added_to_the_cache([0, queries, 16, 33, 150], groups, prepared(options), queries=queries)


@pytest.mark.parametrize("cache", [E4M3, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("d", "block_size"), [(64, 32), (96, 16), (128, 64), (192, 16), (256, 128)])
def test_new_tokens_of_heads_blocks_and_dtypes(cache, d, block_size):
    dtype = torch.float16 if cache == torch.float16 else torch.bfloat16
    given = {
        "d": d,
        "block_size": block_size,
        "cache": cache,
        "dtype": dtype,
        "order": "hnd" if d in (96, 256) else "nhd",
    }
    added_to_the_cache([70, 2, 33], 4, {}, queries=2, **given)
    added_to_the_cache([70], 3, {}, **given)


@pytest.mark.parametrize("kind", ["tensor", "token"])
def test_new_tokens_with_scales_on_the_device(kind):
    blocks = step([5, 60, 16], queries=4)[1].shape[:3]
    scales = {name: torch.full((), 0.5) if kind == "tensor" else torch.rand(blocks) + 0.5 for name in SCALES}
    added_to_the_cache([5, 60, 16], 4, {name: scale.to(DEVICE) for name, scale in scales.items()}, queries=4)


SCALES = ("k_scale", "v_scale")


def added_to_the_cache(lengths, groups, options, **sizes):
    """The cache and the result are what they are if ``write_kv`` is first."""
    q, k_cache, v_cache, table, seq_lens, _ = step(lengths, **sizes)
    k, v = torch.randn(2, *q.shape[:2], k_cache.shape[2], q.shape[3]).mul_(4).to(q.dtype)
    k[0, 0, 0, 0] = 1e4  # saturates
    given = [x.to(DEVICE) for x in (q, k_cache, v_cache, table, seq_lens)]
    before, after = given, [x.clone() for x in given]
    scales = {name: options[name] for name in SCALES if name in options}
    copied = options | {name: scale.clone() for name, scale in scales.items() if isinstance(scale, torch.Tensor)}
    slots = last_slots(table, lengths, [q.shape[1]] * len(lengths), k_cache.shape[1])
    slots[-1] = -1  # nothing is written, what is there is read
    new = {"k": k.to(DEVICE), "v": v.to(DEVICE), "slot_mapping": slots.to(DEVICE)}
    write_kv_reference(*(new[name].flatten(0, 1) for name in "kv"), *before[1:3], new["slot_mapping"], **scales)
    expected = run(*before, groups=groups, **options)
    out = run(*after, groups=groups, **copied, **new)
    assert torch.equal(out, expected)
    for one, other in zip(before[1:3], after[1:3], strict=True):
        assert torch.equal(*(x.float().nan_to_num(-7.0) for x in (one, other)))
    for name, scale in scales.items():
        assert not isinstance(scale, torch.Tensor) or torch.equal(scale, copied[name])


def test_scales_of_each_token_and_head():
    k, v = torch.randn(2, 40, 2, 64).mul_(torch.exp2(torch.randint(-12, 4, (2, 40, 2, 1)).float())).bfloat16()
    k_cache, v_cache = caches(4, 16, 2, 64)
    scales = torch.full((2, 4, 16, 2), float("nan"))
    write_kv_reference(k, v, k_cache, v_cache, torch.arange(16, 56), k_scale=scales[0], v_scale=scales[1])
    q, table = torch.randn(1, 1, 4, 64).bfloat16(), torch.tensor([[1, 2, 3, -5]], dtype=torch.int32)
    lengths = torch.tensor([40], dtype=torch.int32)
    given = [x.to(DEVICE) for x in (q, k_cache, v_cache, table, lengths)]
    options = {"k_scale": scales[0].to(DEVICE), "v_scale": scales[1].to(DEVICE)}
    expected = paged_decode_reference(*given, scale=0.125, **options)
    for groups in (1, 3):
        assert error(run(*given, groups=groups, **options), expected) <= 4e-3
    scalar = {"k_scale": torch.tensor(0.5, device=DEVICE), "v_scale": torch.tensor(2.0, device=DEVICE)}
    expected = paged_decode_reference(*given, scale=0.125, **scalar)
    assert error(run(*given, groups=2, **scalar), expected) <= 4e-3


def test_the_same_for_any_number_of_groups_but_rounding_and_from_run_to_run():
    given = [x.to(DEVICE) for x in step([900, 0, 20, 77])[:5]]
    first = run(*given, groups=1)
    for groups in (2, 7, 66):
        out = run(*given, groups=groups)
        assert torch.equal(out, run(*given, groups=groups))
        assert error(out, first) <= 4e-3


@pytest.mark.parametrize(("count", "groups", "whole", "used"), [
    (4, 17, 1, 16),  # four to a sequence
    (4, 9, 1, 9),  # too many would be left out
    (16, 17, 1, 16),
    (16, 17, 0, 17),
    (32, 17, 1, 17),
    (32, 17, 2, 16),  # two sequences each
    (33, 17, 2, 17),
])  # fmt: skip
def test_sequences_of_one_length_are_shared_along_their_ends(count, groups, whole, used):
    assert int(decode_whole(groups, count, whole)) == used
    given = [x.to(DEVICE) for x in step([130] * count)[:5]]
    expected = paged_decode_reference(*given, scale=64**-0.5)
    assert error(run(*given, groups=groups, whole=whole), expected) <= 4e-3


def decode_whole(groups, batch, whole):
    """``decode._whole`` of sequences of one length, by a kernel."""
    out = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    whole_kernel[(1,)](out, groups, batch, WHOLE=whole)
    return out


@triton.jit
def whole_kernel(out, groups, batch, WHOLE: tl.constexpr):
    tl.store(out + tl.arange(0, 1), decode._whole(groups, batch, batch > 0, WHOLE))


@pytest.mark.parametrize("seed", range(25))
def test_twenty_sequences_at_random(seed):
    chosen = random.Random(seed)
    queries, kv_heads = chosen.choice((1, 1, 2, 4)), chosen.choice((1, 2, 3))
    q_heads = kv_heads * chosen.choice((1, 2, 4, 5))
    d, block_size = chosen.choice((64, 64, 96, 128)), chosen.choice((16, 16, 32, 64))
    lengths = [chosen.choice((0, queries, int(2 ** chosen.uniform(3, 7.5)))) for _ in range(20)]
    made = step(
        lengths,
        q_heads=q_heads,
        kv_heads=kv_heads,
        d=d,
        block_size=block_size,
        queries=queries,
        cache=chosen.choice((E4M3, E4M3, torch.bfloat16)),
        order=chosen.choice(("nhd", "hnd")),
    )
    given = [x.to(DEVICE) for x in made[:5]]
    options = prepared(
        {
            "window": chosen.choice((None, None, 1, 17, 64)),
            "soft_cap": chosen.choice((0.0, 0.0, 5.0)),
            "sinks": chosen.random() < 0.3,
            "slopes": chosen.random() < 0.3,
        },
        q_heads,
    )
    expected = paged_decode_reference(*given, scale=d**-0.5, **options)
    assert error(run(*given, groups=chosen.choice((1, 7, 40)), n=chosen.choice((16, 64)), **options), expected) <= 4e-3


@pytest.mark.parametrize("family", ["sm_90", "sm_89", "sm_80"])
@pytest.mark.parametrize(("q_heads", "kv_heads"), [(8, 8), (32, 8), (16, 1), (40, 40), (640, 40)])
def test_a_workspace_serves_fewer_query_tokens(family, q_heads, kv_heads):
    gpu = GPU(family, 132, "")
    for head_size, itemsize in itertools.product(HEAD_SIZES, (1, 2)):
        most, floats = 0, 0
        for queries, batch in itertools.product(range(1, 9), (1, 3)):
            shape = Shape(batch, queries, q_heads, kv_heads, head_size, 10, 16)
            programs = decode_choice.programs(shape, itemsize, gpu)
            assert programs % decode_choice.tiles(shape) == 0
            most = max(most, programs)
            floats = max(floats, decode_choice.workspace_floats(shape, programs))
            room = decode_choice.most_programs(shape, itemsize, gpu)
            assert room >= most
            assert decode_choice.workspace_floats(shape, room) >= floats


def test_no_sequences():
    q, k_cache, v_cache, table, lengths = (x.to(DEVICE) for x in step([20, 5])[:5])
    assert run(q[:0], k_cache, v_cache, table[:0], lengths[:0], groups=2).shape == (0, 1, 4, 64)


def test_sinks_without_weight():
    given = [x.to(DEVICE) for x in step([0, 20])[:5]]
    out = run(*given, groups=2, sinks=torch.full((4,), float("-inf"), device=DEVICE))
    assert torch.equal(out, run(*given, groups=2))
    assert not out[0].any()


def test_queries_far_from_one():
    q, *rest = step([60, 5])[:5]
    q = (q.float() * torch.tensor([2.0**-60, 2.0**40, 1.0, 0.0])[:, None]).bfloat16()
    given = [x.to(DEVICE) for x in (q, *rest)]
    expected = paged_decode_reference(*given, scale=0.125)
    assert error(run(*given, groups=2), expected) <= 4e-3


@pytest.mark.parametrize("kind", ["number", "tensor", "token", "16 bits"])
@pytest.mark.parametrize(("heads", "d", "order"), [(1, 64, "nhd"), (3, 96, "hnd"), (8, 128, "nhd")])
def test_keys_and_values_are_written_as_the_reference_does(kind, heads, d, order):
    cache = torch.bfloat16 if kind == "16 bits" else E4M3
    k, v = torch.randn(2, 20, heads, 2 * d).mul(300).bfloat16().to(DEVICE)[..., :d]
    k[3, 0] = 0
    k[4, 0, 5], v[4, 0, 6], v[6, 0, :] = float("nan"), float("inf"), float("nan")
    slots = torch.randperm(48)[:20].to(DEVICE)
    slots[5] = -1
    found = []
    for write in (write_kv_reference, write_kv.launch):
        both = [x.to(DEVICE) for x in caches(3, 16, heads, d, dtype=cache, order=order)]
        scales = torch.full((2, 3, 16, heads), -1.0, device=DEVICE)
        given = {
            "number": {"k_scale": 0.7, "v_scale": 3.0},
            "tensor": {"k_scale": torch.tensor(0.7, device=DEVICE), "v_scale": torch.tensor(3.0, device=DEVICE)},
            "token": {"k_scale": scales[0], "v_scale": scales[1]},
            "16 bits": {},
        }[kind]
        write(k, v, *both, slots, **given)
        found.append((*both, scales))
    for ours, reference in zip(*found, strict=True):
        assert torch.equal(ours.float().nan_to_num(-7.0), reference.float().nan_to_num(-7.0))


def test_nothing_to_write():
    k_cache, v_cache = (x.to(DEVICE) for x in caches(1, 16, 2, 64))
    k = torch.zeros(0, 2, 64, device=DEVICE).bfloat16()
    write_kv.launch(k, k, k_cache, v_cache, torch.zeros(0, dtype=torch.int64, device=DEVICE))
    assert k_cache.float().isnan().all()
