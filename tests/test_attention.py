"""``attention.py``: the reference against softmax written out, and what it refuses."""

import math

import pytest
import torch
from paged_step import E4M3, OPTIONS, caches, step

from adallm import fp8
from adallm.attention import Workspace, paged_decode, paged_decode_reference, write_kv, write_kv_reference
from adallm.paged import Shape


def written_out(q, dense, *, scale, window=None, soft_cap=0.0, sinks=None, slopes=None, k_scale=1.0, v_scale=1.0):
    """One logit at a time, FP64."""
    _batch, queries, q_heads, _d = q.shape
    out = torch.zeros(q.shape, dtype=torch.float64)
    for b, (keys, values) in enumerate(dense):
        length = len(keys)
        for t in range(queries if length else 0):
            position = length - queries + t
            first = 0 if window is None else max(position - window + 1, 0)
            for h in range(q_heads):
                kv = h * keys.shape[1] // q_heads
                logits = []
                for j in range(first, position + 1):
                    logit = float(q[b, t, h].double() @ keys[j, kv].double()) * k_scale * scale
                    logit = soft_cap * math.tanh(logit / soft_cap) if soft_cap else logit
                    logits.append(logit + (0.0 if slopes is None else float(slopes[h]) * (j - position)))
                top = max([*logits, -math.inf if sinks is None else float(sinks[h])])
                weights = [math.exp(logit - top) for logit in logits]
                total = sum(weights) + (0.0 if sinks is None else math.exp(float(sinks[h]) - top))
                for j, weight in enumerate(weights, first):
                    out[b, t, h] += weight / total * v_scale * values[j, kv].double()
    return out


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("queries", [1, 3])
def test_against_softmax_written_out(options, queries):
    q, k_cache, v_cache, table, lengths, dense = step([0, 3, 16, 37], queries=queries)
    options = dict(options)
    if options.get("sinks"):
        options["sinks"] = torch.randn(4)
    if slopes := options.pop("slopes", None):
        slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625])
    expected = written_out(q, dense, scale=0.125, slopes=slopes, **options)
    out = paged_decode_reference(q, k_cache, v_cache, table, lengths, scale=0.125, alibi_slopes=slopes, **options)
    assert out.dtype == torch.float32
    assert not out[0].any()
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cache", [E4M3, torch.bfloat16])
@pytest.mark.parametrize("order", ["nhd", "hnd"])
@pytest.mark.parametrize("block_size", [16, 128])
def test_layouts_and_one_query(cache, order, block_size):
    q, k_cache, v_cache, table, lengths, dense = step([130, 1], block_size=block_size, cache=cache, order=order)
    expected = written_out(q, dense, scale=0.125)
    out = paged_decode_reference(q[:, 0], k_cache, v_cache, table, lengths, scale=0.125)
    torch.testing.assert_close(out.double(), expected[:, 0], rtol=1e-5, atol=1e-5)


def test_scales_of_each_token_and_head():
    k, v = torch.randn(2, 20, 2, 64).mul_(3).bfloat16()
    k[4, 1] = 0
    k_cache, v_cache = caches(3, 16, 2, 64)
    scales = torch.full((2, 3, 16, 2), float("nan"))
    slots = torch.arange(40, 20, -1)
    slots[7] = -1
    write_kv_reference(k, v, k_cache, v_cache, slots, k_scale=scales[0], v_scale=scales[1])
    expected = fp8.quantize(k, granularity="token")
    for i, slot in enumerate(slots.tolist()):
        block, position = divmod(slot, 16)
        if slot >= 0:
            assert torch.equal(k_cache[block, position].float(), expected.data[i].float())
            assert torch.equal(scales[0][block, position], expected.scale[i, :, 0])
    unused = {*range(48)} - set(slots.tolist())
    for slot in unused:
        assert k_cache[divmod(slot, 16)].float().isnan().all()
        assert scales[:, slot // 16, slot % 16].isnan().all()
    table, length = torch.tensor([[1, 2]], dtype=torch.int32), torch.tensor([20], dtype=torch.int32)
    at = torch.arange(16, 36)
    write_kv_reference(k, v, k_cache, v_cache, at, k_scale=scales[0], v_scale=scales[1])
    q = torch.randn(1, 4, 64).bfloat16()
    dense = [[fp8.dequantize(fp8.quantize(x, granularity="token")) for x in (k, v)]]
    out = paged_decode_reference(q, k_cache, v_cache, table, length, scale=0.125, k_scale=scales[0], v_scale=scales[1])
    torch.testing.assert_close(out.double(), written_out(q[:, None], dense, scale=0.125)[:, 0], rtol=1e-5, atol=1e-5)


def test_new_keys_and_values_saturate_and_keep_nan():
    k_cache, v_cache = caches(1, 16, 1, 64, fill=0.0)
    k, v = torch.full((1, 1, 64), 1000.0).bfloat16(), torch.full((1, 1, 64), 3.0).bfloat16()
    v[0, 0, 5] = float("nan")
    write_kv_reference(k, v, k_cache, v_cache, torch.tensor([9]), k_scale=2.0, v_scale=0.5)
    assert (k_cache[0, 9].float() == 448).all()
    assert v_cache[0, 9, 0, 5].isnan()
    assert (v_cache[0, 9, 0, :5].float() == 6).all()
    assert not k_cache[0, :9].float().any()


def test_a_length_that_is_none():
    q, k_cache, v_cache, table, lengths, _ = step([37], queries=3)
    for length in (-1, 2, 65):
        with pytest.raises(
            ValueError, match=rf"seq_lens\[0\] is {length}; it must be 0, or from 3 to what 4 blocks of 16"
        ):
            paged_decode_reference(q, k_cache, v_cache, table, torch.full_like(lengths, length), scale=1.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(1, 4, 64)}, r"q is torch.float32 \[1, 4, 64\]; supported: bfloat16, float16"),
        ({"q": torch.zeros(1, 3, 64).bfloat16()}, "Hq a multiple of Hkv, up to 16 times it"),
        ({"q": torch.zeros(1, 4, 96).bfloat16()}, "D must be the same"),
        ({"q": torch.zeros(1, 34, 64).bfloat16()}, "up to 16 times it"),
        ({"q": torch.zeros(1, 9, 4, 64).bfloat16()}, "q has 9 tokens of each sequence; supported: 1 to 8"),
        ({"k_cache": torch.zeros(5, 24, 2, 64).to(E4M3)}, "the caches are"),
        (
            {"caches": torch.zeros(5, 24, 2, 64).to(E4M3)},
            "blocks of 16, 32, 64, 128 tokens, heads of 64, 96, 128, 192, 256",
        ),
        ({"caches": torch.zeros(5, 16, 2, 64)}, "supported: float8_e4m3fn, bfloat16, float16"),
        ({"caches": torch.zeros(5, 16, 2, 64).half()}, "it must be the same, or float8_e4m3fn"),
        ({"caches": torch.zeros(5, 16, 64, 2).to(E4M3).transpose(2, 3)}, "the last must be 1"),
        ({"block_table": torch.zeros(1, 4, dtype=torch.int64)}, "block_table is torch.int64"),
        (
            {"seq_lens": torch.zeros(2, dtype=torch.int32)},
            r"seq_lens is torch.int32 \[2\]; it must be int32 with 1 rows",
        ),
        ({"sinks": torch.zeros(2)}, r"sinks is torch.float32 \[2\]; it must be float32 \[4\]"),
        ({"alibi_slopes": torch.zeros(4).half()}, "alibi_slopes is torch.float16"),
        ({"window": 0}, "window is 0; it must be 1 or more, or None"),
        ({"soft_cap": -1.0}, "soft_cap is -1.0"),
        ({"k_scale": 0.0}, "k_scale is 0.0; it must be positive and finite"),
        ({"v_scale": torch.ones(5, 16)}, r"v_scale is torch.float32 \[5, 16\]"),
        ({"sinks": torch.zeros(4, device="meta")}, "the tensors are on cpu and meta; they must be on one device"),
    ],
    ids=lambda value: "" if isinstance(value, str) else ",".join(value),
)
def test_what_does_not_fit_is_refused(change, message):
    q, k_cache, v_cache, table, lengths, _ = step([37])
    given = {
        "q": q[:, 0],
        "k_cache": k_cache,
        "v_cache": v_cache,
        "block_table": table,
        "seq_lens": lengths,
        "scale": 1.0,
    }
    if "caches" in change:
        change = {"k_cache": change["caches"], "v_cache": change["caches"]}
    with pytest.raises(ValueError, match=message):
        paged_decode_reference(**given | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"k": torch.zeros(2, 2, 96).bfloat16()},
            r"they must be bfloat16 or float16 \[N, 2, 64\], as the cache has it",
        ),
        ({"v": torch.zeros(2, 2, 64).half()}, "k is torch.bfloat16, v torch.float16"),
        (
            {"slot_mapping": torch.zeros(2, dtype=torch.int32)},
            r"slot_mapping is torch.int32 \[2\]; it must be int64 \[2\]",
        ),
        ({"k_scale": torch.ones(1, dtype=torch.float32)}, "k_scale is"),
        ({"k_scale": float("inf")}, "k_scale is inf"),
    ],
    ids=lambda value: "" if isinstance(value, str) else ",".join(value),
)
def test_what_cannot_be_written_is_refused(change, message):
    k_cache, v_cache = caches(1, 16, 2, 64)
    k = torch.zeros(2, 2, 64).bfloat16()
    given = {"k": k, "v": k, "k_cache": k_cache, "v_cache": v_cache, "slot_mapping": torch.arange(2)}
    with pytest.raises(ValueError, match=message):
        write_kv_reference(**given | change)
    assert k_cache.float().isnan().all()


def test_strides_that_the_kernels_cannot_follow():
    q, k_cache, v_cache, table, lengths = step([37])[:5]
    with pytest.raises(ValueError, match=r"block_table has strides \(\d+, 2\); the last must be 1"):
        paged_decode(q, k_cache, v_cache, table.repeat_interleave(2, 1)[:, ::2], lengths, scale=1.0)
    with pytest.raises(ValueError, match=r"sinks has strides \(2,\)"):
        paged_decode(q, k_cache, v_cache, table, lengths, scale=1.0, sinks=torch.zeros(8)[::2])
    for wrong in (torch.zeros(1, 1, 4, 65), torch.zeros(1, 1, 4, 66)[..., 1:], torch.zeros(1, 1, 64, 4).mT):
        with pytest.raises(ValueError, match=r"q has strides .* the last must be 1, the others and the offset even"):
            paged_decode(wrong.bfloat16()[..., :64], k_cache, v_cache, table, lengths, scale=1.0)
    odd = torch.zeros(6, 16, 2, 65).to(E4M3)[..., :64]
    k = torch.zeros(1, 2, 64).bfloat16()
    with pytest.raises(ValueError, match=r"a cache has strides .* the others and the offset even"):
        write_kv(k, k, odd, odd, torch.tensor([0]))
    with pytest.raises(ValueError, match=r"slot_mapping has strides \(2,\)"):
        write_kv(k.repeat(2, 1, 1), k.repeat(2, 1, 1), k_cache, v_cache, torch.arange(4)[::2])


def test_scales_of_one_kind():
    given = step([37])[:5]
    with pytest.raises(ValueError, match="k_scale and v_scale must be alike"):
        paged_decode_reference(*given, scale=1.0, k_scale=torch.tensor(1.0), v_scale=1.0)
    scales = torch.ones(16, 2, given[1].shape[0]).permute(2, 0, 1)
    with pytest.raises(ValueError, match=r"k_scale has strides .* it must be contiguous"):
        paged_decode_reference(*given, scale=1.0, k_scale=scales, v_scale=scales)


def test_only_eight_bits_have_scales():
    k_cache, v_cache = caches(1, 16, 1, 64, dtype=torch.bfloat16)
    k = torch.zeros(1, 1, 64).bfloat16()
    with pytest.raises(ValueError, match=r"v_scale is given, and the cache is torch\.bfloat16"):
        write_kv_reference(k, k, k_cache, v_cache, torch.tensor([0]), v_scale=2.0)


def test_queries_in_fp8_are_rounded_for_each_token_and_head():
    q, *given = step([37, 0, 5], queries=2)[:5]
    found = paged_decode_reference(q, *given, scale=0.125, fp8_queries=True)
    exact = fp8.to_e4m3(q.float() * 99).bfloat16()
    exact[..., 0] = 448
    given_exact = paged_decode_reference(exact, *given, scale=1e-3)
    assert torch.equal(paged_decode_reference(exact, *given, scale=1e-3, fp8_queries=True), given_exact)
    plain = paged_decode_reference(q, *given, scale=0.125)
    assert 1e-3 < float((found - plain).norm() / plain.norm()) < 6e-2
    cache = given[0].bfloat16(), given[1].bfloat16()
    with pytest.raises(ValueError, match=r"fp8_queries with a cache of torch\.bfloat16; they need float8_e4m3fn"):
        paged_decode(q, *cache, *given[2:], scale=1.0, fp8_queries=True)


def test_on_a_cpu_the_reference_runs_in_the_dtype_of_the_queries():
    q, k_cache, v_cache, table, lengths, _ = step([37, 0, 5], queries=2)
    expected = paged_decode_reference(q, k_cache, v_cache, table, lengths, scale=0.125, window=9)
    out = torch.full_like(q, float("nan"))
    given = paged_decode(q, k_cache, v_cache, table, lengths, scale=0.125, window=9, out=out)
    assert given is out
    assert torch.equal(out, expected.bfloat16())
    again = caches(*k_cache.shape)
    k = torch.randn(3, *k_cache.shape[2:]).bfloat16()
    write_kv(k, k, *again, torch.tensor([3, -1, 0]))
    assert torch.equal(again[0][0, 3].float(), fp8.to_e4m3(k[0].float()).float())


def test_an_output_that_does_not_fit():
    given = step([37])[:5]
    for out in (given[0].float(), given[0][:, 0], torch.empty(1, 1, 64, 4, dtype=torch.bfloat16).mT):
        with pytest.raises(ValueError, match=r"out is .* it must be torch.bfloat16 \[1, 1, 4, 64\] on cpu"):
            paged_decode(*given, scale=1.0, out=out)


@pytest.mark.gpu
def test_on_a_gpu_the_kernels_run_in_a_graph_while_lengths_change():
    q, k_cache, v_cache, table, lengths, _ = (
        x.cuda() if isinstance(x, torch.Tensor) else x for x in step([400, 0, 70])
    )
    workspace, out = Workspace.of(q, k_cache), torch.empty_like(q)
    paged_decode(q, k_cache, v_cache, table, lengths, scale=0.125, out=out, workspace=workspace)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        before = torch.cuda.memory_allocated()
        paged_decode(q, k_cache, v_cache, table, lengths, scale=0.125, out=out, workspace=workspace)
        assert torch.cuda.memory_allocated() == before
    for now in ([400, 0, 70], [1, 0, 33], [399, 0, 2]):
        lengths.copy_(torch.tensor(now))
        graph.replay()
        expected = paged_decode_reference(q, k_cache, v_cache, table, lengths, scale=0.125)
        assert float((out.float() - expected).norm() / expected.norm()) <= 4e-3
        assert not workspace.arrivals.any()
    out.fill_(float("nan"))
    checked = {"out": out, "workspace": workspace, "checked": Shape.of(q, k_cache)}
    paged_decode(q, k_cache, v_cache, table, lengths, scale=0.125, **checked)
    assert torch.equal(out, paged_decode(q, k_cache, v_cache, table, lengths, scale=0.125))
    many = q.repeat(1, 8, 4, 1)
    with pytest.raises(ValueError, match="the workspace has room for"):
        paged_decode(many, k_cache, v_cache, table, lengths, scale=1.0, workspace=workspace)
    more = q.repeat(3, 1, 1, 1), k_cache, v_cache, table.repeat(3, 1), lengths.repeat(3)
    given = paged_decode(*more, scale=0.125, workspace=workspace)
    assert torch.equal(given, paged_decode(*more, scale=0.125))
