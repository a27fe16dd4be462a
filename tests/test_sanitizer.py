"""compute-sanitizer over the kernels: one launch of each kind, small, with edges in M, N and K."""

import shutil
import subprocess
import sys

import pytest

TOOL = shutil.which("compute-sanitizer")

# Inputs are made on the CPU, so that little but the kernels runs under the tool.
LAUNCHES = """
import dataclasses
import torch
from adallm import attention, nvfp4
from adallm.kernels import choice, layout, ops
from adallm.kernels.expand import expand
from adallm.kernels.norm import add_rms_norm
from adallm.kernels.quantize import quantize_tokens
from adallm.kernels.silu import silu_and_mul

torch.manual_seed(0)
found = {}
here = choice.gpu(0).family
for family in ("sm_90", "sm_89") if here == "sm_90" else (here,):
    for kind in choice.TABLES[family].keys() & {"bf16", "fp8"}:
        for config in (config for row in choice.TABLES[family][kind] for config in row.configs):
            tile = kind, config.overlap, config.slices > 1, config.m, config.m >= 128 and config.n
            one = dataclasses.replace(config, splits=min(config.splits, 2), programs=0)
            found.setdefault((*tile, one.splits), (kind, one))
            if config.programs:
                found.setdefault((*tile, "programs"), (kind, dataclasses.replace(config, splits=1, programs=3)))
for kind, config in found.values():
    m, n = config.m + 3, config.n + 16
    k = 2 * config.step * config.splits + (0 if config.overlap else 16)
    weight = nvfp4.quantize(torch.randn(n, k).mul_(0.02))
    p = layout.from_checkpoint(weight, fp8=kind == "fp8")
    x = torch.randn(m, k).bfloat16()
    data, x_scale = (x.cuda(), None) if kind == "bf16" else quantize_tokens(x.cuda())
    out = torch.full((m, n), float("nan"), dtype=torch.bfloat16).cuda()
    arrivals = torch.zeros(choice.MAX_SPLIT_TILES, dtype=torch.int32).cuda()
    words, scales, row_scale = p.words.cuda(), p.scales.cuda(), p.row_scale.cuda()
    ops.launcher(config)(data, words, scales, row_scale, out, config, x_scale=x_scale, arrivals=arrivals)
    expected = x.float() @ nvfp4.dequantize(weight).T
    error = float((out.cpu().float() - expected).norm() / expected.norm())
    assert error < (4e-3 if kind == "bf16" else 5e-2), (kind, config, error)
    assert not arrivals.cpu().any()
weight = nvfp4.quantize(torch.randn(80, 208))
for dtype, k in ((torch.bfloat16, 208), (torch.float16, 208), (torch.float8_e4m3fn, 256)):
    p = layout.from_checkpoint(weight, fp8=k == 256)
    expand(p.words.cuda(), p.scales.cuda(), p.shift.cuda(), 80, k, dtype)
for k in (208, 4112):
    x = torch.randn(3, 2 * k).bfloat16().cuda()
    quantize_tokens(x[:, :k])
    quantize_tokens(x[:, :k], weight=torch.randn(k).bfloat16().cuda())
    quantize_tokens(x, gated=True)
    silu_and_mul(x)
    added = {"residual": x[:, k:], "total": torch.empty(3, k).bfloat16().cuda(), "weight": x[0, :k], "eps": 1e-6}
    quantize_tokens(x[:, :k], **added)
    add_rms_norm(x[:, :k], **added)
lengths = torch.tensor([700, 0, 3, 130], dtype=torch.int32)
for d, cache, options in (
    (128, torch.float8_e4m3fn, {}),
    (64, torch.float8_e4m3fn, {"fp8_queries": True, "k_scale": 2.0}),
    (256, torch.float8_e4m3fn, {"window": 70, "soft_cap": 5.0, "tokens": True}),
    (128, torch.bfloat16, {"window": 200}),
):
    blocks = torch.arange(4 * 45, dtype=torch.int32).view(4, 45)
    k, v = torch.randn(2, 4 * 45 * 16, 2, d).bfloat16().cuda()
    both = [torch.zeros(180, 16, 2, d).to(cache).cuda() for _ in range(2)]
    slots = torch.arange(len(k))
    slots[5] = -1
    if options.pop("tokens", False):
        options |= {name: torch.ones(180, 16, 2).cuda() for name in ("k_scale", "v_scale")}
    scales = {name: value for name, value in options.items() if "scale" in name}
    attention.write_kv(k, v, *both, slots.cuda(), **scales)
    for queries in (1, 8):
        q = torch.randn(4, queries, 8, d).bfloat16()
        given = q, *(x.cpu() for x in both), blocks, torch.where(lengths < queries, 0, lengths)
        found_here = attention.paged_decode(*(x.cuda() for x in given), scale=d**-0.5, **options)
        on_cpu = {name: value.cpu() if isinstance(value, torch.Tensor) else value for name, value in options.items()}
        expected = attention.paged_decode_reference(*given, scale=d**-0.5, **on_cpu)
        error = float((found_here.cpu().float() - expected).norm() / expected.norm())
        assert error < 5e-3, (d, cache, options, queries, error)
        # The last tokens once more, by decode attention itself.
        last = torch.where(lengths < queries, 0, lengths)[:, None] - queries + torch.arange(queries)
        at = torch.where(last < 0, -1, torch.arange(4)[:, None] * 720 + last).flatten()
        new = {name: x[at].view(4, queries, 2, d) for name, x in (("k", k), ("v", v))} | {"slot_mapping": at.cuda()}
        again = attention.paged_decode(q.cuda(), *both, *(x.cuda() for x in given[3:]), scale=d**-0.5, **options, **new)
        assert torch.equal(again, found_here), (d, cache, options, queries)
torch.cuda.synchronize()
print(len(found), "products")
"""


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(TOOL is None, reason="needs compute-sanitizer")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck"])
def test_clean(tool, monkeypatch):
    # Each tensor an allocation of its own, so that the tool knows where it ends.
    monkeypatch.setenv("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")
    command = [TOOL, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", LAUNCHES]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "products" in done.stdout
