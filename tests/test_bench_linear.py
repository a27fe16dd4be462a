"""The linear benchmark without a GPU: its shapes, plan and record, the check before the timing, and the ratios."""

import os
import subprocess
import sys

import pytest
import torch

from adallm import bench, fp8, nvfp4, results
from adallm.bench import _linear_case, _peers, linear
from adallm.bench._linear_record import Record
from adallm.bench._linear_summary import IMPLS

PROVENANCE = dict.fromkeys(results.PROVENANCE) | {"command": "first", "commit": "c0", "dirty": False, "gpu": "H100"}


def row(shape, m, impl, us, **fields):
    return {"shape": shape, "m": m, "impl": impl, "us": us, "gb_s": 1e6 / us, **fields}


class Fake:
    """A measurer that takes ``seconds`` of a clock of its own for a case, and whose every time is 10 us."""

    def __init__(self, ms, *, repeats, seconds=1.0, fails=(), wrong=None):
        self.ms, self.repeats, self.seconds, self.fails, self.wrong = ms, repeats, seconds, fails, wrong
        self.now, self.taken = 0.0, []

    def __call__(self, ms, *, repeats):
        self.ms, self.repeats = ms, repeats
        return self

    def bandwidth(self):
        return [{"impl": "copy", "tb_s": 2.5}, {"impl": "read", "tb_s": 3.0}]

    def case(self, shape, n, k, m, impls):
        if (shape, m) == self.wrong:
            raise _linear_case.WrongResultError(f"{shape} M={m}: rel_err is 0.5")
        self.now += self.seconds
        self.taken.append((shape, m, tuple(impls)))
        absent = [{"shape": shape, "m": m, "impl": impl, "reason": "refused"} for impl in self.fails if impl in impls]
        return [row(shape, m, impl, 10.0) for impl in impls if impl not in self.fails], absent


def run(tmp_path, *argv, measurer=None, **provenance):
    measurer = measurer or Fake([], repeats=0)
    options = linear.parse([*argv, "--out", str(tmp_path)])
    code = linear.run(options, PROVENANCE | provenance, started=0.0, measurer=measurer, clock=lambda: measurer.now)
    return code, measurer


def record(tmp_path):
    return results.read(tmp_path / "linear" / "h100.json")


ONE_LAYER = ("--models", "Qwen3-8B", "--layers", "o")


def test_shapes():
    assert {name: {layer: layers[layer] for layer in linear.LAYERS} for name, layers in linear.MODELS.items()} == (
        linear.MODELS
    )
    for name, hidden, heads, kv_heads, intermediate in (
        ("Qwen3-8B", 4096, 32, 8, 12288),
        ("Qwen3-32B", 5120, 64, 8, 25600),
        ("Gemma3-27B", 5376, 32, 16, 21504),
    ):
        assert linear.MODELS[name] == {
            "qkv": ((heads + 2 * kv_heads) * 128, hidden),
            "o": (hidden, heads * 128),
            "gate_up": (2 * intermediate, hidden),
            "down": (hidden, intermediate),
        }
    assert linear.TOKENS == (1, 2, 4, 8, 16, 24, 32, 64, 96, 128, 192, 256, 384, 512, 1024, 3000, 4096, 8192)
    assert set(linear.IMPLS) == {"adallm-w4a16", "adallm-w4a8", *_peers.PEERS}


def test_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert linear.main([]) == bench.main(["linear"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "no CUDA GPU" in err
    assert err.count("\n") == 2


def test_neither_kernels_nor_peers_are_imported_with_it():
    code = "import sys, adallm.bench.linear; print(sorted({'triton', 'vllm', 'humming'} & sys.modules.keys()))"
    absent = "import sys; sys.modules['triton'] = None; " + code
    done = subprocess.run([sys.executable, "-c", absent], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "['triton']\n"


def test_options():
    options = linear.parse(["--models", "Gemma3-27B", "Gemma3-27B", "--m", "64", "1", "64"])
    assert (options.models, options.layers, options.m) == (["Gemma3-27B"], list(linear.LAYERS), [1, 64])
    assert options.impls == list(IMPLS)
    assert (options.budget, options.append, options.repeats) == (None, False, 15)


@pytest.mark.parametrize(
    "argv", [["--repeats", "14"], ["--m", "0"], ["--models", "Llama"], ["--impls", "cutlass"], ["--layers", "head"]]
)
def test_options_that_are_refused(argv, capsys):
    with pytest.raises(SystemExit):
        linear.parse(argv)
    assert argv[0] in capsys.readouterr().err


def test_every_case_is_measured_and_recorded(tmp_path, capsys):
    code, fake = run(tmp_path, "--m", "1", "64", "--repeats", "20", measurer=Fake([], repeats=0, fails=["marlin"]))
    assert code == 0
    assert (fake.ms, fake.repeats) == ([1, 64], 20)
    assert fake.taken == [(shape, m, IMPLS) for shape in linear.SHAPES for m in (1, 64)]
    rows = record(tmp_path)["rows"]
    assert [r["impl"] for r in rows[:2]] == ["copy", "read"]
    assert len(rows) == 2 + 12 * 2 * (len(IMPLS) - 1)
    assert rows[2]["share_of_copy"] == pytest.approx(1e6 / 10 / 2500)
    assert len(record(tmp_path)["absent"]) == 24
    assert "left out" not in (out := capsys.readouterr().out)
    assert "Qwen3-8B.o M=64: adallm-w4a16 10.0" in out


def test_budget_and_append(tmp_path, capsys):
    argv = (*ONE_LAYER, "--m", "1", "16", "64", "4096", "--budget", "2.5")
    code, fake = run(tmp_path, *argv)
    assert code == 0
    assert [m for _, m, _ in fake.taken] == [1, 16, 64]
    assert "left out, as the budget of 2.5 s is spent; --append takes them up: Qwen3-8B.o M=4096\n" in (
        capsys.readouterr().out
    )
    code, fake = run(tmp_path, *argv, "--append", command="second")
    assert [m for _, m, _ in fake.taken] == [4096]
    assert "1 cases to measure on H100, 3 in the record already" in capsys.readouterr().out
    assert [r["command"] for r in record(tmp_path)["runs"]] == ["first", "second"]
    assert {r["m"] for r in record(tmp_path)["rows"] if "m" in r} == {1, 16, 64, 4096}
    before = record(tmp_path)
    code, fake = run(tmp_path, *argv, "--append", command="third")
    assert (code, fake.taken) == (0, [])
    assert record(tmp_path) == before


def test_spent_budget_leaves_the_record_alone(tmp_path):
    run(tmp_path, *ONE_LAYER, "--m", "1")
    before = record(tmp_path)
    code, fake = run(tmp_path, "--budget", "0", command="second")
    assert (code, fake.taken) == (0, [])
    assert record(tmp_path) == before


def test_a_new_implementation_has_its_case_measured_as_a_whole(tmp_path):
    run(
        tmp_path,
        *ONE_LAYER,
        "--m",
        "1",
        "--impls",
        "adallm-w4a16",
        "marlin",
        measurer=Fake([], repeats=0, fails=["marlin"]),
    )
    _, fake = run(tmp_path, *ONE_LAYER, "--m", "1", "--impls", "marlin", "--append")
    assert fake.taken == []
    _, fake = run(tmp_path, *ONE_LAYER, "--m", "1", "--impls", "humming", "--append")
    assert fake.taken == [("Qwen3-8B.o", 1, ("adallm-w4a16", "marlin", "humming"))]
    assert [r["impl"] for r in record(tmp_path)["rows"]] == ["copy", "read", "adallm-w4a16", "marlin", "humming"]
    assert record(tmp_path)["absent"] == []


def test_without_append_the_record_is_replaced(tmp_path):
    run(tmp_path, *ONE_LAYER, "--m", "1")
    run(tmp_path, *ONE_LAYER, "--m", "64")
    assert {r["m"] for r in record(tmp_path)["rows"] if "m" in r} == {64}


@pytest.mark.parametrize(
    ("field", "value", "match"),
    [("commit", "c1", "is of commit c0, this run of c1"), ("dirty", True, "dirty"), ("commit", None, "ADALLM_COMMIT")],
)
def test_append_to_another_commit_is_refused(tmp_path, capsys, field, value, match):
    run(tmp_path, *ONE_LAYER, "--m", "1")
    code, fake = run(tmp_path, *ONE_LAYER, "--append", **{field: value})
    assert (code, fake.taken) == (2, [])
    assert match in capsys.readouterr().err


def test_append_without_a_record_begins_one(tmp_path):
    assert run(tmp_path, *ONE_LAYER, "--m", "1", "--append")[0] == 0
    assert len(record(tmp_path)["rows"]) == 2 + len(IMPLS)


def test_faster_bandwidth_counts_for_every_row(tmp_path):
    r = Record(PROVENANCE, list(linear.SHAPES), root=tmp_path, append=False)
    for tb_s in (2.0, 2.5, 1.0):
        r.add_bandwidth([{"impl": "copy", "tb_s": tb_s}])
    r.add(("Qwen3-8B.o", 1), [row("Qwen3-8B.o", 1, "marlin", 1000.0)], [])
    r.write()
    assert [entry.get("share_of_copy") for entry in record(tmp_path)["rows"]] == [None, 0.4]


def test_wrong_result_stops_the_run_and_keeps_the_shapes_before(tmp_path, capsys):
    fake = Fake([], repeats=0, wrong=("Qwen3-8B.o", 64))
    assert run(tmp_path, "--m", "1", "64", measurer=fake)[0] == 1
    assert "stopped: Qwen3-8B.o M=64: rel_err is 0.5" in capsys.readouterr().err
    assert {r["shape"] for r in record(tmp_path)["rows"] if "shape" in r} == {"Qwen3-8B.qkv"}


def measured(monkeypatch, impls, m=3, *, spoil=None):
    """One case on the CPU, with every timing 2 us."""
    monkeypatch.setattr(_linear_case, "fp8_tokens", lambda x: fp8.qdq(x.float()))
    monkeypatch.setattr(_linear_case, "fp8_weight", nvfp4.dequantize)
    timed = []

    def replays(runs, *, at_least_us):
        assert at_least_us == _linear_case.REPLAY_US
        which = len(timed)
        timed.append([len([call() for call in runs]), 0])
        times = iter([9.0, 9.0, *[1.9, 2.0, 2.1] * 5])

        def one():
            # One replay of each before the next of any.
            assert all(count - timed[which][1] == (i < which) for i, (_, count) in enumerate(timed))
            timed[which][1] += 1
            return next(times)

        return one

    measurer = _linear_case.Measurer([1, m], repeats=15, device="cpu", copies=lambda nbytes: 2, replays=replays)
    if spoil:
        monkeypatch.setitem(_peers.PEERS, "marlin", spoil)
    try:
        return *measurer.case("tiny", 48, 64, m, impls), timed
    except Exception as error:
        error.timed = timed
        raise


def test_rows_of_a_case(monkeypatch):
    rows, absent, timed = measured(monkeypatch, ["adallm-w4a16", "adallm-w4a8", "cublas-bf16"])
    assert (absent, timed) == ([], [[2, 17]] * 3)
    ours, w4a8, bf16 = rows
    assert {**ours, "rel_err": 0} == {
        "shape": "tiny",
        "n": 48,
        "k": 64,
        "m": 3,
        "impl": "adallm-w4a16",
        "us": 2.0,
        "us_spread": 0.2,
        "gb_s": round((48 * 64 // 2 + 48 * 64 // 16 + 4 + 3 * 64 * 2 + 3 * 48 * 2) / 2e3, 2),
        "tflop_s": round(2 * 3 * 48 * 64 / 2e6, 3),
        "weight_bits": 4.5,
        "repeats": 15,
        "path": "reference",
        "activation_quant": None,
        "rel_err": 0,
    }
    assert 0 < ours["rel_err"] < 2e-3
    assert 1e-2 < w4a8["rel_err"] < 4e-2
    assert w4a8["rel_err_operands"] < 2e-3
    assert (w4a8["activation_quant"], bf16["weight_bits"], bf16["rel_err"] < 5e-3) == ("included", 16, True)
    assert "note" not in bf16


def test_path_of_a_layer_that_names_one(monkeypatch):
    monkeypatch.setattr(_linear_case.NVFP4Linear, "path", lambda self, m: f"tile for {m}", raising=False)
    rows, _, _ = measured(monkeypatch, ["adallm-w4a16"])
    assert rows[0]["path"] == "tile for 3"


def test_a_sample_of_the_rows_is_compared(monkeypatch):
    monkeypatch.setattr(_linear_case, "SAMPLE", 2)
    rows, _, _ = measured(monkeypatch, ["adallm-w4a16"], m=9)
    assert rows[0]["rel_err"] < 2e-3


@pytest.mark.parametrize("name", ["rel_err", "rel_err_operands"])
def test_wrong_result_of_ours_is_not_timed(monkeypatch, name):
    forward = _linear_case.NVFP4Linear.forward
    monkeypatch.setattr(_linear_case.NVFP4Linear, "forward", lambda self, x: forward(self, x) * 1.01)
    impl = {"rel_err": "adallm-w4a16", "rel_err_operands": "adallm-w4a8"}[name]
    with pytest.raises(
        _linear_case.WrongResultError, match=rf"tiny M=3 {impl}: {name} is 0.00.*, above 0.002"
    ) as caught:
        measured(monkeypatch, ["cublas-bf16", impl])
    assert caught.value.timed == []


def test_failure_of_ours_names_the_case(monkeypatch):
    monkeypatch.setattr(_linear_case.NVFP4Linear, "forward", lambda self, x: 1 / 0)
    with pytest.raises(ZeroDivisionError) as caught:
        measured(monkeypatch, ["adallm-w4a16"])
    assert caught.value.__notes__ == ["in tiny M=3 adallm-w4a16"]


# What the kernels do on a GPU, in Triton's interpreter, which must be chosen before Triton is imported.
INTERPRETED = """
import torch
from adallm import fp8, nvfp4
from adallm.bench import _bandwidth, _linear_case
from adallm.kernels.layout import FP8_COLUMNS

torch.manual_seed(0)
t = nvfp4.quantize(torch.randn(32, 128))
x = torch.randn(3, 128).bfloat16()
columns = torch.arange(128).view(-1, 64)[:, list(FP8_COLUMNS)].flatten()
assert torch.equal(_linear_case.fp8_tokens(x), fp8.qdq(x.float())[:, columns])
w, dense = _linear_case.fp8_weight(t), nvfp4.dequantize(t)[:, columns]
assert 0 < (w - dense).abs().max() and ((w - dense).abs() <= dense.abs() / 16).all()

x, out = torch.randint(-9, 9, (4096,), dtype=torch.int32), torch.empty(8, dtype=torch.int32)
_bandwidth.read_sums(x, out, (128, 4, 1))
assert torch.equal(out, x.view(8, 512).sum(1).int())
"""


def test_fp8_operands_and_the_read_kernel():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED], capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stderr


def peer(call):
    return lambda weight, ms, copies: _peers.Prepared([lambda x: call(x, weight.dense)], 1, 4.5, rounds="so and so")


def raises(*_):
    raise RuntimeError("no kernel for this shape\nand a second line")


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (raises, "RuntimeError: no kernel for this shape"),
        (peer(raises), "RuntimeError: no kernel for this shape"),
        (peer(lambda x, w: (x.float() @ w.T).bfloat16() * float("nan")), "WrongResultError: rel_err is nan"),
        (peer(lambda x, w: x @ w.bfloat16()[:5].T), r"WrongResultError: the output is torch.bfloat16 [3, 5], not"),
    ],
)
def test_a_peer_that_fails_stops_nobody(monkeypatch, capsys, spoil, reason):
    rows, absent, _ = measured(monkeypatch, ["adallm-w4a16", "marlin", "cublas-bf16"], spoil=spoil)
    assert [r["impl"] for r in rows] == ["adallm-w4a16", "cublas-bf16"]
    assert [(entry["shape"], entry["m"], entry["impl"]) for entry in absent] == [("tiny", 3, "marlin")]
    assert absent[0]["reason"].startswith(reason)
    assert f"tiny M=3 marlin: no row, {absent[0]['reason']}\n" in capsys.readouterr().out


def test_a_peer_that_fails_while_it_is_timed(monkeypatch):
    calls = iter(range(10))
    spoil = peer(lambda x, w: (x.float() @ w.T).bfloat16() if next(calls) < 1 else raises())
    rows, absent, _ = measured(monkeypatch, ["marlin", "cublas-bf16"], spoil=spoil)
    assert ([r["impl"] for r in rows], [entry["impl"] for entry in absent]) == (["cublas-bf16"], ["marlin"])


def test_an_inaccurate_peer_has_a_note(monkeypatch):
    spoil = peer(lambda x, w: (x.float() @ w.T).bfloat16() * 1.1)
    rows, _, _ = measured(monkeypatch, ["marlin"], spoil=spoil)
    assert rows[0]["note"] == "rel_err is above 0.01: so and so"


def test_peers_that_are_not_installed(monkeypatch, capsys):
    # With what other tests have imported of them, which is found without them.
    for name in {"vllm", "humming", *(name for name in sys.modules if name.split(".")[0] in ("vllm", "humming"))}:
        monkeypatch.setitem(sys.modules, name, None)
    rows, absent, _ = measured(monkeypatch, ["marlin", "humming"])
    assert (rows, [entry["impl"] for entry in absent]) == ([], ["marlin", "humming"])
    assert capsys.readouterr().out.count("ModuleNotFoundError") == 2


def test_fp8_peer_gets_activations_that_are_quantized(monkeypatch):
    def scaled_mm(a, b, *, scale_a, scale_b, out_dtype, use_fast_accum):
        assert (a.dtype, b.dtype, use_fast_accum) == (torch.float8_e4m3fn, torch.float8_e4m3fn, True)
        assert (scale_a.shape, scale_b.shape) == ((3, 1), (1, 48))
        return (a.float() @ b.float() * scale_a * scale_b).to(out_dtype)

    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
    (found,), _, _ = measured(monkeypatch, ["scaled-mm-fp8"])
    assert (found["activation_quant"], found["weight_bits"]) == ("not included", 8)
    assert found["gb_s"] == round((48 * 64 + 48 * 4 + 3 * 64 + 3 * 4 + 3 * 48 * 2) / 2e3, 2)
    assert 1e-2 < found["rel_err"] < 6e-2
    assert found["note"] == "rel_err is above 0.01: weight and activations are rounded to E4M3"


def test_ranges_that_are_needed():
    table = [[0, 8, "a"], [8, 16, "b"], [16, 100, "c"], [100, 200, "d"], [200, 1 << 30, "e"]]
    assert _peers.needed_ranges(table, [1, 2, 150]) == [[0, 8, "a"], [8, 1 << 30, "d"]]
    assert _peers.needed_ranges(table, [64]) == [[0, 1 << 30, "c"]]
    assert _peers.needed_ranges(table, [8, 9, 9000]) == [[0, 8, "a"], [8, 16, "b"], [16, 1 << 30, "e"]]


ROWS = [
    {"impl": "copy", "tb_s": 2.5},
    {"impl": "read", "tb_s": 3.0},
    row("A.gate_up", 1, "adallm-w4a16", 20.0) | {"gb_s": 2700.0},
    row("A.gate_up", 1, "marlin", 34.0) | {"gb_s": 1500.0},
    row("A.gate_up", 1, "humming", 32.0) | {"gb_s": 1600.0},
    row("A.gate_up", 1, "cublas-bf16", 76.0),
    row("A.o", 16, "adallm-w4a16", 10.0),
    row("A.o", 16, "marlin", 9.0),
    row("A.o", 16, "cublas-bf16", 20.0),
    row("A.o", 1024, "adallm-w4a16", 100.0),
    row("A.o", 1024, "adallm-w4a8", 50.0),
    row("A.o", 1024, "humming", 120.0),
    row("A.o", 3500, "adallm-w4a16", 100.0),
    row("A.o", 3500, "humming", 1.0),
    row("A.o", 8192, "adallm-w4a8", 400.0),
    row("A.o", 8192, "cublas-bf16", 600.0),
    row("A.down", 64, "marlin", 5.0),
]


def test_summary_cases():
    cases = {(case["shape"], case["m"], case["impl"]): case for case in linear.summary(ROWS)["cases"]}
    first = cases["A.gate_up", 1, "adallm-w4a16"]
    assert (first["us"], first["w4_peer"], first["vs_w4"], first["vs_bf16"]) == (20.0, "humming", 1.6, 3.8)
    assert cases["A.o", 1024, "adallm-w4a8"]["vs_w4"] == 2.4
    assert cases["A.o", 1024, "adallm-w4a8"]["vs_bf16"] is None
    assert (cases["A.o", 8192, "adallm-w4a8"]["w4_peer"], cases["A.o", 8192, "adallm-w4a8"]["vs_w4"]) == (None, None)
    assert cases["A.o", 1024, "adallm, the better"]["us"] == 50.0
    assert len(cases) == 7


def test_summary_groups():
    groups = {(g["group"], g["impl"], g["against"]): g for g in linear.summary(ROWS)["groups"]}
    small = groups["M <= 16", "adallm-w4a16", "vs_w4"]
    assert small["geomean"] == pytest.approx((1.6 * 0.9) ** 0.5)
    assert (small["cases"], small["minimum"], small["minimum_at"]) == (2, 0.9, "A.o M=16")
    assert groups["M <= 16", "adallm-w4a16", "vs_bf16"]["minimum"] == 2.0
    assert groups["M 1024..3000", "adallm-w4a16", "vs_w4"]["geomean"] == pytest.approx(1.2)
    assert groups["M >= 4096", "adallm-w4a8", "vs_bf16"]["geomean"] == pytest.approx(1.5)
    # 3500 is in no group, 64 has no row of ours, and w4a16 has none past 4096.
    assert {name for name, _, _ in groups} == {"M <= 16", "M 1024..3000", "M >= 4096"}
    assert ("M >= 4096", "adallm-w4a16", "vs_w4") not in groups


def test_summary_read_share():
    shares = linear.summary(ROWS)["read_share"]
    assert [(s["shape"], s["impl"], pytest.approx(s["share"])) for s in shares] == [
        ("A.gate_up", "adallm-w4a16", 0.9),
        ("A.gate_up", "marlin", 0.5),
        ("A.gate_up", "humming", 1600 / 3000),
    ]
    assert linear.summary(ROWS[2:])["read_share"] == []
    assert linear.summary([]) == {"cases": [], "groups": [], "read_share": []}


def test_report():
    text = linear.report(ROWS)
    assert "A.gate_up     1          20.0            -         76.0" in text
    assert "best W4 peer      2     1.20     0.90  A.o M=16" in text
    assert "A.gate_up  adallm-w4a16              90.0%" in text
