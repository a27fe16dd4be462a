"""The command line: what it prints, where, and its exit status."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from adallm import checkpoint, cli
from adallm.nvfp4 import NVFP4Tensor


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": "unheard_of", "dtype": "bfloat16"}))
    shapes = {"lm_head": (32, 32), "model.embed": (32, 32), "model.layers.0.self_attn.norm": (32,)}
    shapes |= {f"model.layers.{i}.self_attn.{name}_proj": (32, 32) for i in (2, 10) for name in "kv"}
    save_file(
        {f"{name}.weight": torch.randn(shape).bfloat16() for name, shape in shapes.items()}, path / "model.safetensors"
    )
    return path


def run(capsys: pytest.CaptureFixture, *arguments: object) -> tuple[int, str, str]:
    status = cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_quantize_and_inspect(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    dst = tmp_path / "dst"
    options = ("--layout", "compressed-tensors", "--kv-cache", "fp8", "--ignore", "*.10.*.v_proj")
    status, out, err = run(capsys, "quantize", source, dst, *options)
    assert (status, out) == (0, f"{dst}: 3 NVFP4 weights in the compressed-tensors layout, 12.35 KB -> 7.96 KB\n")
    assert "100%" in err  # the progress bar
    status, out, err = run(capsys, "inspect", dst)
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].startswith(f"{dst}: nvfp4-pack-quantized in the compressed-tensors layout, KV cache fp8, ignored: ")
    assert lines[1].split() == ["layer", "format", "shape", "bits/weight", "bytes"]
    row = next(line for line in lines if line.startswith("model.layers.2.self_attn.k_proj.weight"))
    assert row.split()[1:] == ["nvfp4", "32x32", "4.531", "580"]
    names = [line.split()[0] for line in lines[2:]]
    assert names.index("model.layers.2.self_attn.k_scale") < names.index("model.layers.10.self_attn.k_scale")
    total = next(line for line in lines if line.startswith("total"))
    assert total.split()[-1] == f"{sum(row.nbytes for row in checkpoint.inspect(dst)):,}"
    assert len({len(line) for line in lines[1:]}) == 1  # aligned


def test_inspect_a_dense_directory(source: Path, capsys: pytest.CaptureFixture) -> None:
    status, out, _ = run(capsys, "inspect", source)
    assert status == 0
    assert out.startswith(f"{source}: not quantized\n")


def test_lm_head_and_separate_scales(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    status, out, err = run(capsys, "quantize", source, tmp_path / "dst", "--lm-head", "--separate-scales", "--quiet")
    assert (status, err) == (0, "")
    assert "5 NVFP4 weights in the modelopt layout" in out
    assert isinstance(checkpoint.load(tmp_path / "dst")["lm_head.weight"], NVFP4Tensor)


def test_warnings_are_one_line(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    status, _, err = run(capsys, "quantize", source, tmp_path / "dst", "--ignore", "nothing", "--quiet")
    assert status == 0
    assert err == f"adallm: warning: ignore pattern 'nothing' matches no module of {source}\n"


@pytest.mark.parametrize("case", ["no source", "destination exists", "damaged", "pattern", "rule"])
def test_errors_are_one_line(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture, case: str) -> None:
    arguments, expected = ["quantize", source, tmp_path / "dst"], str(tmp_path)
    if case == "no source":
        arguments = ["inspect", tmp_path / "nowhere"]
    elif case == "destination exists":
        arguments[2] = source
    elif case == "damaged":
        (source / "model.safetensors").write_bytes(b"\x80\x04pickle, not safetensors")
        expected = "pickle"
    elif case == "pattern":
        arguments, expected = [*arguments, "--ignore", "re:("], "re:("
    else:
        arguments, expected = [*arguments, "--scale-rule", "best"], "scale_rule 'best'"
    status, out, err = run(capsys, *arguments)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("adallm: error: ")
    assert expected in err
    assert not (tmp_path / "dst").exists()


def test_usage_errors(capsys: pytest.CaptureFixture) -> None:
    for arguments in ([], ["fly"], ["quantize", "a"], ["quantize", "a", "b", "--layout", "gguf"]):
        with pytest.raises(SystemExit) as error:
            cli.main(arguments)
        assert error.value.code == 2
        assert "usage: adallm" in capsys.readouterr().err


def test_interrupt(monkeypatch: pytest.MonkeyPatch, source: Path, capsys: pytest.CaptureFixture) -> None:
    def interrupted(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "inspect", interrupted)
    assert run(capsys, "inspect", source) == (130, "", "adallm: interrupted\n")


def test_a_programming_error_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch, source: Path) -> None:
    monkeypatch.setattr(checkpoint, "inspect", lambda _: [].missing)
    with pytest.raises(AttributeError):
        cli.main(["inspect", str(source)])


def test_help_imports_nothing_heavy() -> None:
    program = (
        "import contextlib, sys\nfrom adallm import cli\n"
        "with contextlib.suppress(SystemExit): cli.main(['--help'])\n"
        "assert not {'torch', 'safetensors', 'transformers'} & set(sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert all(command in result.stdout for command in ("quantize", "calibrate", "inspect"))


def test_a_reader_that_leaves(source: Path) -> None:
    command = [sys.executable, "-m", "adallm.cli", "inspect", str(source)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


def test_bench_lists_and_passes_options_through(capsys: pytest.CaptureFixture) -> None:
    for arguments in ((), ("--help",)):
        status, out, err = run(capsys, "bench", *arguments)
        assert (status, err) == (0, "")
        assert {"linear", "quantize", "sm89", "tune"} <= {line.split()[0] for line in out.splitlines() if line.split()}
    status, out, err = run(capsys, "bench", "nothing")
    assert (status, out) == (2, "")
    assert "no benchmark 'nothing'" in err
    with pytest.raises(SystemExit) as stop:
        run(capsys, "bench", "tune", "--help")
    assert stop.value.code == 0
    assert "--forget" in capsys.readouterr().out
