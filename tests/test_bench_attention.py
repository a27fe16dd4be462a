"""The attention benchmark without a GPU: its steps, inputs and record, the check before the timing, and the ratios."""

import subprocess
import sys
import types

import pytest
import torch

from adallm import bench, results
from adallm.attention import paged_decode_reference
from adallm.bench import _attention_case, _attention_compile, _attention_peers, _attention_summary, _cases, attention
from adallm.bench._attention_case import Writes
from adallm.bench._attention_step import Inputs, Pool, Step, pool_tokens
from adallm.bench._attention_summary import DECODE, IMPLS, WRITE

PROVENANCE = dict.fromkeys(results.PROVENANCE) | {"command": "first", "commit": "c0", "dirty": False, "gpu": "H100"}
E4M3 = torch.float8_e4m3fn
SMALL = Step(4, 2, 64, 16, 3, 40)
RAGGED = Step(4, 2, 64, 16, 5, 200, ragged=True)
WINDOWED = Step(4, 2, 64, 16, 5, 200, ragged=True, window=20)


def row(impl, us, heads="32/8/128", block=16, batch=1, context=1024, *, ragged=False, tb_s=None, tokens_read=None):
    case = {"heads": heads, "block": block, "batch": batch, "context": context, "ragged": ragged}
    return case | {"impl": impl, "us": us, "tb_s": tb_s or 1 / us, "tokens_read": tokens_read or batch * context}


class Fake:
    """A measurer that takes ``seconds`` of a clock of its own for a case, and whose every time is 10 us."""

    def __init__(self, *, seconds=1.0, fails=(), wrong=None):
        self.seconds, self.fails, self.wrong = seconds, fails, wrong
        self.now, self.taken, self.planned, self.repeats = 0.0, [], None, None

    def __call__(self, planned, *, repeats):
        self.planned, self.repeats = planned, repeats
        return self

    def bandwidth(self):
        return [{"impl": "copy", "tb_s": 2.5}, {"impl": "read", "tb_s": 3.0}]

    def case(self, what, impls):
        self.now += self.seconds
        if isinstance(what, Writes):
            self.taken.append((what.heads, what.block, WRITE, tuple(impls)))
            case = {"heads": what.heads, "block": what.block, "impl": WRITE, "us": 10.0, "tb_s": 1.5}
            return [case | {"tokens": tokens} for tokens in (1, 8192)], []
        case = {name: getattr(what, name) for name in ("heads", "block", "batch", "context", "ragged")}
        if _attention_summary.step_name(*[*case.values()][2:]) == self.wrong:
            raise _cases.WrongResultError(f"{what.heads}: rel_err is 0.5")
        self.taken.append((*case.values(), tuple(impls)))
        absent = [case | {"impl": impl, "reason": "refused"} for impl in self.fails if impl in impls]
        return [row(impl, 10.0, **case, tb_s=1.5) for impl in impls if impl not in self.fails], absent


def run(tmp_path, *argv, measurer=None, **provenance):
    measurer = measurer or Fake()
    options = attention.parse([*argv, "--out", str(tmp_path)])
    code = attention.run(options, PROVENANCE | provenance, started=0.0, measurer=measurer, clock=lambda: measurer.now)
    return code, measurer


def record(tmp_path):
    return results.read(tmp_path / "attention" / "h100.json")


ONE = ("--heads", "64/8/128", "--blocks", "64")


def test_steps():
    assert {(heads, *map(int, heads.split("/"))) for heads in attention.HEADS} == {
        ("32/8/128", 32, 8, 128),
        ("64/8/128", 64, 8, 128),
        ("32/16/128", 32, 16, 128),
        ("16/2/256", 16, 2, 256),
    }
    assert attention.HEADS["32/16/128"] == 1024
    assert len(attention.STEPS) == 12
    assert attention.STEPS["1x131072"] == (1, 131072, False)
    assert attention.STEPS["64x64..16384"] == (64, 16384, True)
    every = attention.cases(attention.parse([]))
    assert len(every) == 4 * 2 * (12 + 1)
    assert len({case.key for case in every}) == len(every)
    assert set(_attention_peers.BUILDERS) == set(DECODE)


def test_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert attention.main([]) == bench.main(["attention"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "no CUDA GPU" in err
    assert err.count("\n") == 2


def test_neither_kernels_nor_peers_are_imported_with_it():
    code = (
        "import sys; sys.modules['triton'] = None; import adallm.bench.attention\n"
        "print(sorted({'triton', 'vllm', 'flashinfer'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "['triton']\n"


def test_options():
    options = attention.parse(["--heads", "16/2/256", "16/2/256", "--blocks", "64", "--steps", "1x1024"])
    assert (options.heads, options.blocks, options.steps) == (["16/2/256"], [64], ["1x1024"])
    assert options.impls == list(IMPLS)
    assert (options.budget, options.append, options.repeats) == (None, False, 15)


@pytest.mark.parametrize(
    "argv", [["--repeats", "14"], ["--blocks", "32"], ["--heads", "8/8/64"], ["--impls", "fa2"], ["--steps", "2x2"]]
)
def test_options_that_are_refused(argv, capsys):
    with pytest.raises(SystemExit):
        attention.parse(argv)
    assert argv[0] in capsys.readouterr().err


def test_ragged_lengths_are_the_same_every_time():
    lengths = RAGGED.lengths
    assert lengths == Step(4, 2, 64, 16, 5, 200, ragged=True).lengths
    assert len(set(lengths)) > 1
    assert all(64 <= length <= 200 for length in lengths)
    many = Step(32, 8, 128, 16, 64, 16384, ragged=True).lengths
    assert 64 <= min(many) < 200
    assert 8000 < max(many) <= 16384
    # Half of them below the geometric mean of 64 and 16384.
    assert 20 < sum(length < 1024 for length in many) < 44
    assert SMALL.lengths == [40, 40, 40]


def test_what_a_step_reads():
    assert (SMALL.tokens_read, SMALL.blocks, SMALL.nbytes(1)) == (120, 9, 120 * 2 * 2 * 64)
    assert WINDOWED.tokens_read == 5 * 20
    step = Step(32, 16, 128, 16, 1, 131072, window=1024)
    assert (step.tokens_read, step.blocks, step.spans) == (1024, 64, [(8128, 8192)])
    assert Step(32, 16, 128, 16, 1, 1030, window=1024).spans == [(0, 65)]
    assert Step(32, 16, 128, 64, 1, 1100, window=1024).spans == [(1, 18)]
    assert pool_tokens([(SMALL, 2), (step, 3)]) == 3 * 1024


@pytest.mark.parametrize("step", [SMALL, RAGGED, WINDOWED])
def test_inputs(step):
    pool = Pool(2, 64, step.blocks * step.block * 3, "cpu")
    inputs = Inputs.of(step, pool, 3)
    caches = inputs.caches()
    assert (len(caches), caches[0][0].shape) == (3, (step.blocks, 16, 2, 64))
    assert len({cache.data_ptr() for pair in caches for cache in pair}) == 6
    for pair, pair_16 in zip(caches, inputs.caches(torch.bfloat16), strict=True):
        assert all(torch.equal(x.float(), y.float()) for x, y in zip(pair, pair_16, strict=True))
    values = caches[0][0].float()
    assert abs(values.mean()) < 0.1
    assert 0.9 < values.std() < 1.1
    # Every block is read once, and what is not read names one too.
    assert inputs.table.shape[1] % 16 == 0
    read = torch.cat([inputs.table[b, begin:end] for b, (begin, end) in enumerate(step.spans)]).tolist()
    assert sorted(read) == list(range(step.blocks)) != read
    assert 0 <= inputs.table.min() <= inputs.table.max() < step.blocks


def test_every_case_is_measured_and_recorded(tmp_path, capsys):
    code, fake = run(tmp_path, "--repeats", "20", measurer=Fake(fails=["fa3-fp8"]))
    assert code == 0
    assert fake.repeats == 20
    assert [what for what, _ in fake.planned][:2] == [Writes(32, 8, 128, 16), Step(32, 8, 128, 16, 1, 1024)]
    assert {what.window for what, _ in fake.planned if isinstance(what, Step) and what.heads == "32/16/128"} == {1024}
    assert len(fake.taken) == 4 * 2 * 13
    rows = record(tmp_path)["rows"]
    assert [r["impl"] for r in rows[:3]] == ["copy", "read", "adallm"]
    assert len(rows) == 2 + 8 * (12 * (len(DECODE) - 1) + 2)
    assert rows[2]["share_of_read"] == 0.5
    writes = [r for r in rows if r["impl"] == WRITE]
    assert writes[0]["share_of_copy"] == 0.6
    assert rows[2 + 12 * 5 :][:2] == writes[:2]
    assert len(record(tmp_path)["absent"]) == 96
    assert "32/8/128 block 16 1x1024: adallm 10.0, adallm-bf16 10.0" in capsys.readouterr().out


def test_budget_and_append(tmp_path, capsys):
    argv = (*ONE, "--steps", "1x1024", "1x8192", "64x64..16384", "--budget", "2.5")
    code, fake = run(tmp_path, *argv)
    assert code == 0
    assert [taken[2] for taken in fake.taken] == [WRITE, 1, 1]
    left = "left out, as the budget of 2.5 s is spent; --append takes them up: 64/8/128 block 64: 64x64..16384\n"
    assert left in capsys.readouterr().out
    code, fake = run(tmp_path, *argv, "--append", command="second")
    assert [taken[:5] for taken in fake.taken] == [("64/8/128", 64, 64, 16384, True)]
    assert "1 cases to measure on H100, 3 in the record already" in capsys.readouterr().out
    assert [r["command"] for r in record(tmp_path)["runs"]] == ["first", "second"]
    before = record(tmp_path)
    code, fake = run(tmp_path, *argv, "--append", command="third")
    assert (code, fake.taken) == (0, [])
    assert record(tmp_path) == before


def test_a_new_implementation_has_its_case_measured_as_a_whole(tmp_path):
    argv = (*ONE, "--steps", "1x1024")
    run(tmp_path, *argv, "--impls", "adallm", "flashinfer", measurer=Fake(fails=["flashinfer"]))
    _, fake = run(tmp_path, *argv, "--impls", "flashinfer", "--append")
    assert fake.taken == []
    _, fake = run(tmp_path, *argv, "--impls", "fa3-fp8", WRITE, "--append")
    assert [taken[-1] for taken in fake.taken] == [(WRITE,), ("adallm", "flashinfer", "fa3-fp8")]
    rows = record(tmp_path)["rows"]
    assert [r["impl"] for r in rows] == ["copy", "read", "adallm", "flashinfer", "fa3-fp8", WRITE, WRITE]


def test_append_to_another_commit_is_refused(tmp_path, capsys):
    run(tmp_path, *ONE, "--steps", "1x1024")
    code, fake = run(tmp_path, *ONE, "--append", commit="c1")
    assert (code, fake.taken) == (2, [])
    assert "is of commit c0, this run of c1" in capsys.readouterr().err


def test_wrong_result_stops_the_run_and_keeps_what_was_before(tmp_path, capsys):
    assert run(tmp_path, "--steps", "1x1024", "--heads", "32/8/128", "--blocks", "16")[0] == 0
    code, _ = run(tmp_path, "--append", measurer=Fake(wrong="8x8192"))
    assert code == 1
    assert "stopped: 32/8/128: rel_err is 0.5" in capsys.readouterr().err
    assert {r["context"] for r in record(tmp_path)["rows"] if "context" in r} == {1024}


def measured(monkeypatch, impls, step=SMALL, **spoiled):
    """One case on the CPU, with every timing 2 us."""
    timed = []

    def replays(runs, *, at_least_us):
        timed.append(len([call() for call in runs]))
        times = iter([9.0, 9.0, *[1.9, 2.0, 2.1] * 5])
        return lambda: next(times)

    for impl, builder in spoiled.items():
        monkeypatch.setitem(_attention_peers.BUILDERS, impl.replace("_", "-"), builder)
    measurer = _attention_case.Measurer(
        [(step, impls)], repeats=15, device="cpu", copies=lambda nbytes: 2, replays=replays
    )
    try:
        return *measurer.case(step, impls), timed
    except Exception as error:
        error.timed = timed
        raise


def test_rows_of_a_case(monkeypatch):
    rows, absent, timed = measured(monkeypatch, ["adallm", "adallm-bf16"], RAGGED)
    assert (absent, timed) == ([], [2, 2])
    ours, bf16 = rows
    assert {**ours, "rel_err": 0} == {
        "heads": "4/2/64",
        "block": 16,
        "batch": 5,
        "context": 200,
        "ragged": True,
        "window": None,
        "impl": "adallm",
        "us": 2.0,
        "us_spread": 0.2,
        "tb_s": round(sum(RAGGED.lengths) * 2 * 2 * 64 / 2e6, 4),
        "tokens_read": sum(RAGGED.lengths),
        "repeats": 15,
        "path": None,
        "rel_err": 0,
    }
    # On a CPU it is the reference, rounded.
    assert 1e-4 < ours["rel_err"] == bf16["rel_err"] < 3e-3
    assert bf16["tb_s"] == pytest.approx(2 * ours["tb_s"], abs=1e-4)


def test_window(monkeypatch):
    ((ours,), _, _) = measured(monkeypatch, ["adallm"], WINDOWED)
    assert (ours["window"], ours["tokens_read"]) == (20, 100)
    assert ours["tb_s"] == round(100 * 2 * 2 * 64 / 2e6, 4)


def test_steps_of_the_same_heads_share_keys_and_values():
    steps = [SMALL, RAGGED, Step(2, 1, 64, 16, 1, 16)]
    measurer = _attention_case.Measurer([(s, []) for s in steps], repeats=15, device="cpu", copies=lambda nbytes: 2)
    pool = measurer._pool_for(SMALL)
    assert measurer._pool_for(RAGGED) is pool
    assert measurer._pool_for(steps[2]) is not pool


def peer(change=lambda out: out, itemsize=1):
    """The reference on each copy, changed."""

    def build(inputs):
        out = torch.empty_like(inputs.q)

        def call(k, v):
            given = {"scale": inputs.step.scale, "window": inputs.step.window}
            out.copy_(change(paged_decode_reference(inputs.q, k, v, inputs.table, inputs.seq_lens, **given)))

        return _attention_peers.Prepared(
            [lambda k=k, v=v: call(k, v) for k, v in inputs.caches()], out, itemsize, "a path", "so and so"
        )

    return build


def raises(*_):
    raise RuntimeError("no kernel for this step\nand a second line")


@pytest.mark.parametrize("impl", ["adallm", "adallm_bf16"])
def test_wrong_result_of_ours_is_not_timed(monkeypatch, impl):
    name = impl.replace("_", "-")
    with pytest.raises(
        _cases.WrongResultError, match=rf"4/2/64 block 16 3x40 {name}: rel_err is 0.0.*, above 0.005"
    ) as caught:
        measured(monkeypatch, [name], **{impl: peer(lambda out: out * 1.01)})
    assert caught.value.timed == []


def test_a_copy_that_is_wrong_is_found(monkeypatch):
    turn = iter(range(9))
    spoil = peer(lambda out: out if next(turn) == 0 else out * torch.nan)
    with pytest.raises(_cases.WrongResultError, match="adallm: rel_err is nan"):
        measured(monkeypatch, ["adallm"], adallm=spoil)


def test_a_result_that_is_not_written_is_found(monkeypatch):
    build = _attention_peers.ours

    def spoil(inputs):
        prepared = build(inputs)
        prepared.calls[0]()
        return _attention_peers.Prepared([lambda: None] * 2, prepared.out)

    with pytest.raises(_cases.WrongResultError, match="rel_err is nan"):
        measured(monkeypatch, ["adallm"], adallm=spoil)


def test_failure_of_ours_names_the_case(monkeypatch):
    with pytest.raises(RuntimeError) as caught:
        measured(monkeypatch, ["adallm"], adallm=raises)
    assert caught.value.__notes__ == ["in 4/2/64 block 16 3x40 adallm"]


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (raises, "RuntimeError: no kernel for this step"),
        (peer(raises), "RuntimeError: no kernel for this step"),
        (peer(lambda out: out * 1.2), "WrongResultError: rel_err is 0.2"),
        (peer(lambda out: out * torch.nan), "WrongResultError: rel_err is nan"),
    ],
)
def test_a_peer_that_fails_stops_nobody(monkeypatch, capsys, spoil, reason):
    rows, absent, _ = measured(monkeypatch, ["adallm", "flashinfer"], flashinfer=spoil)
    assert [r["impl"] for r in rows] == ["adallm"]
    assert [(entry["heads"], entry["batch"], entry["impl"]) for entry in absent] == [("4/2/64", 3, "flashinfer")]
    assert absent[0]["reason"].startswith(reason)
    assert f"4/2/64 block 16 3x40 flashinfer: no row, {absent[0]['reason']}\n" in capsys.readouterr().out


def test_a_peer_that_fails_while_it_is_timed(monkeypatch):
    calls = iter(range(9))
    spoil = peer(lambda out: out if next(calls) < 2 else raises())
    rows, absent, _ = measured(monkeypatch, ["flashinfer", "adallm"], flashinfer=spoil)
    assert ([r["impl"] for r in rows], [entry["impl"] for entry in absent]) == (["adallm"], ["flashinfer"])


def test_an_inaccurate_peer_has_a_note(monkeypatch):
    (found,), _, _ = measured(monkeypatch, ["fa3-fp8"], fa3_fp8=peer(lambda out: out * 1.03))
    assert (found["note"], found["path"]) == ("rel_err is above 0.005: so and so", "a path")


def test_peers_that_are_not_installed(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    names = ["flashinfer", "vllm-triton", "vllm-triton-fp8q", "fa3-fp8"]
    rows, absent, _ = measured(monkeypatch, names)
    assert (rows, [entry["impl"] for entry in absent]) == ([], names)
    assert capsys.readouterr().out.count("ModuleNotFoundError") == 4


def dense(q, k, v, table, lengths, scale, window=None):
    return paged_decode_reference(q.bfloat16(), k, v, table, lengths.int(), scale=scale, window=window)


@pytest.mark.parametrize("step", [RAGGED, WINDOWED])
def test_what_flashinfer_is_given(monkeypatch, step):
    class Wrapper:
        def __init__(self, workspace, layout, *, use_tensor_cores, backend):
            assert (layout, use_tensor_cores, backend) == ("NHD", True, "fa2")

        def plan(self, indptr, indices, last, q_heads, kv_heads, d, block, **given):
            assert (indptr.dtype, indices.dtype, last.dtype) == (torch.int32,) * 3
            assert (q_heads, kv_heads, d) == (4, 2, 64)
            assert (given["q_data_type"], given["kv_data_type"]) == (torch.bfloat16, E4M3)
            counts = indptr.diff()
            self.table = torch.zeros(len(last), int(counts.max()), dtype=torch.int32)
            for b, count in enumerate(counts.tolist()):
                self.table[b, :count] = indices[indptr[b] : indptr[b + 1]]
            self.lengths = (counts - 1) * block + last
            self.window = None if given["window_left"] < 0 else given["window_left"] + 1
            self.scale = given["sm_scale"]

        def run(self, q, cache, *, k_scale, v_scale, out):
            assert (k_scale, v_scale) == (1.0, 1.0)
            out.copy_(dense(q, *cache, self.table, self.lengths, self.scale, self.window))

    stand = types.SimpleNamespace(BatchDecodeWithPagedKVCacheWrapper=Wrapper)
    monkeypatch.setitem(sys.modules, "flashinfer", stand)
    monkeypatch.setattr(_attention_peers, "_flashinfer_workspace", lambda device: None)
    ((found,), absent, _) = measured(monkeypatch, ["flashinfer"], step)
    assert absent == []
    assert found["rel_err"] < 3e-3
    assert "note" not in found


def modules(monkeypatch, **contents):
    """Stand-ins for modules of vLLM, ``.`` written as ``__``."""
    for name, content in contents.items():
        parts = name.split("__")
        for i in range(1, len(parts)):
            monkeypatch.setitem(sys.modules, ".".join(parts[:i]), types.ModuleType(".".join(parts[:i])))
        monkeypatch.setitem(sys.modules, ".".join(parts), types.SimpleNamespace(**content))


@pytest.mark.parametrize("step", [RAGGED, WINDOWED])
@pytest.mark.parametrize("impl", ["vllm-triton", "vllm-triton-fp8q"])
def test_what_vllm_triton_is_given(monkeypatch, step, impl):
    def unified_attention(*, q, k, v, out, seqused_k, softmax_scale, window_size, block_table, **given):
        assert q.dtype == (E4M3 if impl.endswith("fp8q") else torch.bfloat16)
        assert (given["q_descale"] is None) == (q.dtype == torch.bfloat16)
        assert given["k_descale"].shape == given["v_descale"].shape == (5, 2)
        assert given["cu_seqlens_q"].tolist() == [0, 1, 2, 3, 4, 5]
        assert (given["max_seqlen_q"], given["max_seqlen_k"]) == (1, max(step.lengths))
        assert (given["causal"], given["softcap"], given["kv_quant_mode"]) == (True, 0, "per tensor")
        assert (given["seq_threshold_3D"], given["softmax_segm_output"].shape) == (64, (64, 4, 16, 64))
        window = None if window_size == (-1, -1) else window_size[0] + 1
        out.copy_(dense(q.float(), k, v, block_table, seqused_k, softmax_scale, window))

    modules(
        monkeypatch,
        vllm__v1__attention__backends__triton_attn={"MIN_LAUNCH_GRID_SIZE_2D": 128, "NUM_PAR_SOFTMAX_SEGMENTS": 16},
        vllm__v1__attention__ops__triton_unified_attention={"unified_attention": unified_attention},
        vllm__v1__kv_cache_interface={"KVQuantMode": types.SimpleNamespace(FP8_PER_TENSOR="per tensor")},
    )
    ((found,), absent, _) = measured(monkeypatch, [impl], step)
    assert absent == []
    assert found["path"].endswith("16 segments")
    assert found.get("note") == (
        "rel_err is above 0.005: queries and weights are rounded to E4M3" if impl.endswith("fp8q") else None
    )


@pytest.mark.parametrize("step", [RAGGED, WINDOWED])
def test_what_fa3_is_given(monkeypatch, step):
    def get_scheduler_metadata(*, batch_size, cache_seqlens, qkv_dtype, window_size, page_size, num_splits, **given):
        assert (batch_size, qkv_dtype, page_size, num_splits) == (5, E4M3, 16, 32)
        assert (given["num_heads_q"], given["num_heads_kv"], given["headdim"]) == (4, 2, 64)
        return ("metadata", window_size)

    def flash_attn_varlen_func(*, q, k, v, out, seqused_k, softmax_scale, window_size, block_table, **given):
        assert q.dtype == E4M3
        assert given["scheduler_metadata"] == ("metadata", tuple(window_size))
        assert given["q_descale"].shape == given["k_descale"].shape == given["v_descale"].shape == (5, 2)
        assert (given["fa_version"], given["num_splits"], given["causal"]) == (3, 32, True)
        window = None if window_size == [-1, -1] else window_size[0] + 1
        out.copy_(dense(q.float(), k, v, block_table, seqused_k, softmax_scale, window))

    supported = [True]
    modules(
        monkeypatch,
        vllm__vllm_flash_attn={
            "fa_version_unsupported_reason": lambda version: "FA3 is only supported on 9.x",
            "is_fa_version_supported": lambda version: supported[0],
            "flash_attn_varlen_func": flash_attn_varlen_func,
            "get_scheduler_metadata": get_scheduler_metadata,
        },
    )
    ((found,), absent, _) = measured(monkeypatch, ["fa3-fp8"], step)
    assert absent == []
    assert "Hopper only" in found["path"]
    assert "rounded to E4M3" in found["note"]
    supported[0] = False
    rows, absent, _ = measured(monkeypatch, ["fa3-fp8"], step)
    assert (rows, absent[0]["reason"]) == ([], "RuntimeError: FA3 is only supported on 9.x")


def writes(monkeypatch, **spoil):
    monkeypatch.setattr(_attention_case, "WRITTEN", (1, 20))
    counts = []

    def replays(runs, *, at_least_us):
        counts.append(len([call() for call in runs]))
        return lambda: 2.0

    for name, value in spoil.items():
        monkeypatch.setattr(_attention_case, name, value)
    what = Writes(4, 2, 64, 16)
    measurer = _attention_case.Measurer(
        [(what, [WRITE])], repeats=15, device="cpu", copies=lambda nbytes: 10**6 // nbytes, replays=replays
    )
    return *measurer.case(what, [WRITE]), counts


def test_rows_of_writing(monkeypatch):
    rows, absent, counts = writes(monkeypatch)
    nbytes = 20 * (2 * 2 * 64 * 3 + 8)
    assert (absent, counts) == ([], [_attention_case.WRITE_COPIES, min(10**6 // nbytes, _attention_case.WRITE_COPIES)])
    assert rows[1] == {
        "heads": "4/2/64",
        "block": 16,
        "tokens": 20,
        "impl": WRITE,
        "us": 2.0,
        "us_spread": 0.0,
        "tb_s": round(nbytes / 2e6, 4),
        "repeats": 15,
    }


def test_writing_other_bits_is_found(monkeypatch):
    write = _attention_case.write_kv

    def spoil(k, v, *rest):
        write(k, v * 1.25, *rest)

    with pytest.raises(
        _cases.WrongResultError, match=r"4/2/64 block 16 adallm-write-kv: 1 tokens leave other bits of v"
    ):
        writes(monkeypatch, write_kv=spoil)


def test_kernels_that_are_compiled_ahead():
    every = [case.arguments[0] for case in attention.cases(attention.parse([]))]
    steps = [step for step in every if isinstance(step, Step)]
    found = _attention_compile.tasks([(step, DECODE) for step in steps])
    by_impl = {impl: [step for step, name in found if name == impl] for impl in DECODE}
    assert [impl for _, impl in found[:3]] == ["flashinfer"] * 3
    # One for each heads, block and batch: 1, up to 16, to 64 and to 256.
    assert len(by_impl["adallm"]) == len(by_impl["adallm-bf16"]) == 4 * 2 * 4
    assert [(step.head_size, step.window) for step in by_impl["flashinfer"]] == [(128, None), (128, 1024), (256, None)]
    assert by_impl["fa3-fp8"] == []
    # Batches of 1 and 8 are split, 32 and more are not, but for 2 KV heads up to 64.
    assert len(by_impl["vllm-triton"]) == 2 * (3 + 3 + 3 + 4)
    assert all(step.lengths == [64] * step.batch for step, _ in found)


ROWS = [
    {"impl": "copy", "tb_s": 2.5},
    {"impl": "read", "tb_s": 3.0},
    row("adallm", 10.0),
    row("adallm-bf16", 15.0),
    row("flashinfer", 16.0),
    row("vllm-triton", 14.0),
    row("vllm-triton-fp8q", 12.0),
    row("fa3-fp8", 8.0),
    row("adallm", 200.0, context=262144, tb_s=2.7),
    row("flashinfer", 220.0, context=262144),
    row("adallm", 50.0, heads="16/2/256", block=64, batch=64, context=16384, ragged=True, tokens_read=190000),
    row("vllm-triton", 40.0, heads="16/2/256", block=64, batch=64, context=16384, ragged=True),
    row("flashinfer", 5.0, batch=8),
    {"heads": "32/8/128", "block": 16, "impl": WRITE, "tokens": 8192, "us": 20.0, "tb_s": 2.0},
]


def test_summary_cases():
    cases = {_attention_summary.key_of(case): case for case in attention.summary(ROWS)["cases"]}
    first = cases["32/8/128", 16, 1, 1024, False]
    assert (first["us"], first["sm89_peer"]) == (10.0, "vllm-triton")
    assert [first[against] for against in ("vs_sm89", "vs_fp8q", "vs_fa3", "vs_bf16")] == [1.4, 1.2, 0.8, 1.5]
    assert cases["32/8/128", 16, 1, 262144, False]["vs_fa3"] is None
    assert len(cases) == 3


def test_summary_groups():
    groups = {(g["group"], g["against"]): g for g in attention.summary(ROWS)["groups"]}
    every = groups["all", "vs_sm89"]
    assert every["geomean"] == pytest.approx((1.4 * 1.1 * 0.8) ** (1 / 3))
    assert (every["cases"], every["minimum"], every["minimum_at"]) == (3, 0.8, "16/2/256 block 64 64x64..16384")
    assert groups["32/8/128", "vs_sm89"]["geomean"] == pytest.approx((1.4 * 1.1) ** 0.5)
    assert groups["all", "vs_fa3"]["minimum_at"] == "32/8/128 block 16 1x1024"
    assert ("16/2/256", "vs_fa3") not in groups


def test_summary_of_bandwidths():
    found = attention.summary(ROWS)
    assert found["read_share"] == [
        {"at": "32/8/128 block 16 1x262144", "tokens_read": 262144, "share": pytest.approx(0.9)}
    ]
    assert found["writes"] == [
        {"heads": "32/8/128", "block": 16, "tokens": 8192, "us": 20.0, "share_of_copy": pytest.approx(0.8)}
    ]
    assert attention.summary([]) == {"cases": [], "groups": [], "read_share": [], "writes": []}


def test_report():
    text = attention.report(ROWS)
    assert "32/8/128     16  1x1024" in text
    assert "best sm_89 peer               3     1.07     0.80  16/2/256 block 64 64x64..16384" in text
    assert "32/8/128 block 16 1x262144        256 K              90.0%" in text
    assert "32/8/128     16    8192  20.00              80.0%" in text


def test_markdown():
    table = _attention_summary.times_table(ROWS, "32/8/128", 16, markdown=True)
    assert table.splitlines()[0].startswith("| batch x context | adallm | adallm-bf16 |")
    assert len(table.splitlines()) == 2 + 3
    groups = _attention_summary.groups_table(attention.summary(ROWS)["groups"], markdown=True)
    assert groups.splitlines()[1].startswith("| ---")
