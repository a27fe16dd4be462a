"""Damaged checkpoints: each ends in one error that names file and tensor, or loads to exactly the right values."""

import json
import math
import os
import pickle
import random
import re
import shutil
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from adallm import checkpoint
from adallm.checkpoint import CheckpointError, convert, load
from adallm.checkpoint.exact import same_bytes
from adallm.checkpoint.header import DTYPE_BYTES, read_header
from adallm.nvfp4 import NVFP4Tensor

CONFIG = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "dtype": "bfloat16", "vocab_size": 48,
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": False,
}  # fmt: skip
INDEX = "model.safetensors.index.json"
LAYER = "model.layers.0."


def dense_tensors() -> dict[str, torch.Tensor]:
    shapes = {"model.embed_tokens": (48, 32), "model.norm": (32,), "lm_head": (48, 32)}
    for i in range(2):
        layer = f"model.layers.{i}."
        shapes |= {f"{layer}self_attn.{name}": (16,) for name in ("q_norm", "k_norm")}
        shapes |= {f"{layer}self_attn.{name}": (32, 32) for name in ("k_proj", "v_proj")}
        shapes |= {f"{layer}self_attn.q_proj": (64, 32), f"{layer}self_attn.o_proj": (32, 64)}
        shapes |= {f"{layer}{name}": (32,) for name in ("input_layernorm", "post_attention_layernorm")}
        shapes |= {f"{layer}mlp.{name}": (48, 32) for name in ("gate_proj", "up_proj")}
        shapes[f"{layer}mlp.down_proj"] = (32, 48)
    generator = torch.Generator().manual_seed(0)
    return {f"{name}.weight": torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}


@dataclass
class Base:
    """A good directory, what it loads to, and what it loads to without ``__metadata__``, which is optional."""

    path: Path
    layout: str
    sharded: bool
    expected: dict
    plain: dict

    @property
    def files(self) -> list[str]:
        return sorted(file.name for file in self.path.glob("*.safetensors"))


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> list[Base]:
    """Both layouts, single and sharded, calibrated (activation and KV-cache scales)."""
    root, result = tmp_path_factory.mktemp("bases"), []
    src = root / "src"
    src.mkdir()
    (src / "config.json").write_text(json.dumps(CONFIG))
    save_file(dense_tensors(), src / "model.safetensors")
    modelopt = convert(src, root / "start", kv_cache="fp8").path
    tensors = load_file(modelopt / "model.safetensors")
    for i, name in enumerate([name for name in tensors if name.endswith("weight_scale_2")]):
        tensors[name.replace("weight_scale_2", "input_scale")] = torch.tensor(0.01 * (i + 1))
    edit_json(modelopt / "config.json", lambda config: config["quantization_config"].pop("config_groups"))
    for sharded in (False, True):
        path = root / f"modelopt-{sharded}"
        shutil.copytree(modelopt, path)
        if sharded:
            (path / "model.safetensors").unlink()
            names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
            weight_map = {tensor: names["layers.1." in tensor] for tensor in tensors}
            for name in names:
                save_file({key: tensors[key] for key in tensors if weight_map[key] == name}, path / name)
            (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        else:
            save_file(tensors, path / "model.safetensors")
        other = convert(path, root / f"compressed-tensors-{sharded}", layout="compressed-tensors").path
        stripped = shutil.copytree(other, root / f"stripped-{sharded}")
        for file in stripped.glob("*.safetensors"):
            save_file(load_file(file), file)
        result.append(Base(path, "modelopt", sharded, load(path), load(path)))
        result.append(Base(other, "compressed-tensors", sharded, load(other), load(stripped)))
    return result


def edit_json(file: Path, edit: Callable[[dict], object]) -> None:
    value = json.loads(file.read_text())
    edit(value)
    file.write_text(json.dumps(value))


def split_file(file: Path) -> tuple[dict, bytes]:
    """Header and tensor bytes."""
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def join_file(file: Path, header: dict | bytes, data: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


@dataclass
class Case:
    """A way to damage a directory.

    Attributes:
        kind: for counting.
        damage: changes the copy at the path.
        names: what the error names, each an alternative of texts; empty: it may load to the right values instead.
        tensor: the tensor that the error names too.
    """

    kind: str
    damage: Callable[[Path], object]
    names: tuple[str, ...] = ()
    tensor: str | None = None


def tensor_cases(base: Base) -> Iterator[Case]:
    """Every tensor with another dtype, another shape, missing, misplaced, and NaN in every scale."""
    for file in base.files:
        header, _ = split_file(base.path / file)
        header.pop("__metadata__", None)
        for tensor, entry in header.items():
            width = DTYPE_BYTES[entry["dtype"]]
            swapped = [dtype for dtype in DTYPE_BYTES if DTYPE_BYTES[dtype] == width and dtype != entry["dtype"]]
            for dtype in [*random.Random(tensor).sample(swapped, 1), "F8_E4M3" if width == 1 else "F16", "F128"]:
                if dtype != entry["dtype"]:
                    yield Case("dtype", edit_header(file, tensor, dtype=dtype), (file,), tensor)
            shape, bad = entry["shape"], []
            if len(shape) == 2:
                rows, columns = shape
                bad = [[columns, rows]] if rows != columns else [[rows * 2, columns // 2]]
                bad += [[rows * columns], [1, *shape]]
            elif shape and shape != [1]:
                bad = [[shape[0] // 2, 2], [shape[0], 1]]
            for new in [*bad, [*shape, 2], [-1], [True], "12", None, [2**70, 0]]:
                yield Case("shape", edit_header(file, tensor, shape=new), (file,), tensor)
            yield Case("missing tensor", drop_tensor(file, tensor), (file, INDEX), tensor)
            yield Case("renamed tensor", rename_tensor(file, tensor, f"{tensor}x"), (file, INDEX), tensor)
            if base.sharded:
                yield Case("only in the index", drop_tensor(file, tensor, index=False), (file,), tensor)
                other = next(name for name in base.files if name != file)
                yield Case("index names the other file", edit_map(tensor, other), (file, other), tensor)
                yield Case("not in the index", edit_map(tensor, None), (file,), tensor)
            if "scale" in tensor:
                for value in (math.nan, -1.0, math.inf, 0.0):
                    block = entry["dtype"] == "F8_E4M3"
                    if not block or value not in (math.inf, 0.0):  # E4M3 has no Inf, and a block scale may be 0
                        yield Case(f"scale {value}", set_value(file, tensor, value), (file,), tensor)


def edit_header(file: str, tensor: str, **changes: object) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        header, data = split_file(path / file)
        header[tensor] |= changes
        join_file(path / file, header, data)

    return damage


def drop_tensor(file: str, tensor: str, index: bool = True) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        tensors = load_file(path / file)
        del tensors[tensor]
        save_file(tensors, path / file)
        if index and (path / INDEX).exists():
            edit_json(path / INDEX, lambda value: value["weight_map"].pop(tensor))

    return damage


def rename_tensor(file: str, tensor: str, new: str) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        header, data = split_file(path / file)
        join_file(path / file, {new if name == tensor else name: entry for name, entry in header.items()}, data)

    return damage


def edit_map(tensor: str, file: object) -> Callable[[Path], None]:
    def edit(index: dict) -> None:
        if file is None:
            del index["weight_map"][tensor]
        else:
            index["weight_map"][tensor] = file

    return lambda path: edit_json(path / INDEX, edit)


def set_value(file: str, tensor: str, value: float) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        tensors = load_file(path / file)
        changed = tensors[tensor].float()
        changed.reshape(-1)[-1] = value
        tensors[tensor] = changed.to(tensors[tensor].dtype)
        save_file(tensors, path / file)

    return damage


class Boom:
    """Unpickling this would be seen."""

    def __reduce__(self) -> tuple:
        return (os.abort, ())


def file_cases(base: Base) -> Iterator[Case]:
    """Whole files: truncated, replaced, of the wrong kind."""
    for file in base.files:
        size = (base.path / file).stat().st_size

        def replace(content: bytes, file: str = file) -> Callable[[Path], int]:
            return lambda path: (path / file).write_bytes(content)

        def truncate(length: int, file: str = file) -> Callable[[Path], None]:
            return lambda path: os.truncate(path / file, length)

        def special(make: Callable[[Path], object], file: str = file) -> Callable[[Path], None]:
            return lambda path: ((path / file).unlink(), make(path / file))

        for length in {0, 1, 7, 8, 9, 100, size // 4, size // 2, size - 4, size - 1}:
            yield Case("truncated", truncate(length), (file,))
        for length in (0, 1, 2**31, 2**63, 2**64 - 1, 100_000_001, size, size - 8):
            content = struct.pack("<Q", length) + (base.path / file).read_bytes()[8:]
            yield Case("header length", replace(content), (file,))
        header, data = split_file(base.path / file)
        for text in (b"{}", b"[]", b"null", b"{", b"\xff\xfe", b'{"a": NaN}', b"[" * 100_000, b'{"a":' * 100_000):
            yield Case("header text", lambda path, f=file, t=text, d=data: join_file(path / f, t, d), (file,))
        name = next(name for name in header if name != "__metadata__")
        twice = json.dumps(header).encode()[:-1] + f', "{name}": {json.dumps(header[name])}}}'.encode()
        yield Case("repeated name", lambda path, f=file, t=twice, d=data: join_file(path / f, t, d), (file,))
        bad_metadata = header | {"__metadata__": {"format": 1}}
        yield Case("metadata", lambda path, f=file, h=bad_metadata, d=data: join_file(path / f, h, d), (file,))
        for i, entry in enumerate(list(header.values())[1:6]):
            start, end = entry["data_offsets"]
            tensor = list(header)[i + 1]
            for offsets in ([start + 1, end + 1], [end, start], [start], [start, 2**80], "0", [start - 1, end]):
                yield Case("offsets", edit_header(file, tensor, data_offsets=offsets), (file,), tensor)
        yield Case("bytes behind the end", replace((base.path / file).read_bytes() + b"\0"), (file,))
        for protocol in (0, 2, 4):
            yield Case("pickle", replace(pickle.dumps({"weight": Boom()}, protocol)), (file,))
        yield Case("zip", replace(b"PK\x03\x04" + bytes(1000)), (file,))
        yield Case("missing file", lambda path, f=file: (path / f).unlink(), (file,))
        yield Case("directory", special(Path.mkdir), (file,))
        yield Case("pipe", special(lambda target: os.mkfifo(target)), (file,))
        yield Case("dangling link", special(lambda target: target.symlink_to("nowhere")), (file,))
        yield Case("link to itself", special(lambda target: target.symlink_to(target.name)), (file,))
    extra = "model-00007-of-00007.safetensors"
    yield Case("extra file", lambda path: shutil.copy(path / base.files[0], path / extra), (extra,))
    if base.sharded:
        yield Case("swapped shards", swap(*base.files), tuple(base.files))


def swap(a: str, b: str) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        (path / a).rename(path / "t")
        (path / b).rename(path / a)
        (path / "t").rename(path / b)

    return damage


def index_cases(base: Base) -> Iterator[Case]:
    tensor = f"{LAYER}input_layernorm.weight"
    climbing = ("../x.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "..", "", "x.bin", "model.safetensors\0",
                "..\\x.safetensors", ".x.safetensors", "C:x.safetensors", None.__class__, 1, ["x"])  # fmt: skip
    for name in climbing:
        value = "" if name is type(None) else name
        yield Case("index climbs out", edit_map(tensor, value), (INDEX,), tensor)
    for name in ("missing.safetensors", "model-00003-of-00002.safetensors"):
        yield Case("index names a missing file", edit_map(tensor, name), (name,), tensor)
    yield Case(
        "index names a missing tensor",
        edit_map("model.extra.weight", base.files[0]),
        (base.files[0],),
        "model.extra.weight",
    )
    for text in ("", "{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": null}', "[" * 50_000):
        yield Case("index text", lambda path, t=text: (path / INDEX).write_text(t), (INDEX,))
    yield Case("no index", lambda path: (path / INDEX).unlink(), (INDEX,))
    yield Case(
        "both forms", lambda path: shutil.copy(path / base.files[0], path / "model.safetensors"), ("model.safetensors",)
    )


def config_cases(base: Base) -> Iterator[Case]:
    """Dimensions that disagree with the tensors, and quantization configs that do."""

    def edit(**changes: object) -> Callable[[Path], None]:
        return lambda path: edit_json(path / "config.json", lambda config: config.update(changes))

    def quantization(change: Callable[[dict], object], name: str = "config.json") -> Callable[[Path], None]:
        key = "quantization_config" if name == "config.json" else "quantization"
        return lambda path: edit_json(path / name, lambda config: change(config[key]))

    blame = {
        "hidden_size": "model.embed_tokens.weight", "vocab_size": "weight", "intermediate_size": "mlp",
        "num_attention_heads": "self_attn", "num_key_value_heads": "self_attn", "head_dim": "self_attn",
        "num_hidden_layers": "model.layers.",
    }  # fmt: skip
    for key, tensor in blame.items():
        value = CONFIG[key]
        for wrong in (value * 2, value + 1, value - 1):
            yield Case(
                "config disagrees", edit(**{key: wrong}), ("model", INDEX), None if key == "hidden_size" else tensor
            )
        for wrong in (0, -value, str(value), value + 0.5, [value], True, {}):
            yield Case("config malformed", edit(**{key: wrong}), ("config.json",))
    yield Case("config disagrees", edit(num_hidden_layers=10**12), ("config.json",))
    yield Case("config disagrees", edit(num_hidden_layers=10**9), ("model", INDEX), "model.layers.2.")
    yield Case("config disagrees", edit(tie_word_embeddings=True), ("model",), "lm_head.weight")
    yield Case("config disagrees", edit(attention_bias=True), ("model", INDEX), ".bias")
    for dtype in ("float16", "float32", "int8", 5):
        yield Case("config dtype", edit(dtype=dtype), ("config.json", "model"))
    yield Case("config model type", edit(model_type="qwen2"), ("model", INDEX), "self_attn.")
    for model_type in ("unheard_of", None):
        yield Case("config model type", edit(model_type=model_type))
    for model_type in ("qwen3_moe", 3, [], {}):
        yield Case("config model type", edit(model_type=model_type), ("config.json",))
    yield Case("harmless", edit(rope_theta=5, torch_dtype=None))
    for text in ("", "{", "[]", "null", "\x00", '{"a": NaN}', '{"a": 1, "a": 2}', "{" * 50_000, '{"a":' * 50_000):
        yield Case("config text", lambda path, t=text: (path / "config.json").write_text(t), ("config.json",))
    yield Case("no config", lambda path: (path / "config.json").unlink(), ("config.json",))
    yield Case("config binary", lambda path: (path / "config.json").write_bytes(b"\xff\xfe\x00"), ("config.json",))

    for value in ("x", [], 3, {}, {"quant_method": "gptq"}, {"quant_method": "fp8"}, {"quant_method": None}):
        yield Case("quantization", edit(quantization_config=value), ("config.json",))
    proj, first = f"{LAYER}self_attn.o_proj", ("model",)
    yield Case("dense by config", quantization(lambda q: q["ignore"].append(proj)), first, f"{proj}.weight")
    yield Case(
        "dense by config",
        quantization(lambda q: q["ignore"].append("*" if base.layout == "modelopt" else "re:.*")),
        first,
        "weight",
    )
    yield Case("quantized by config", quantization(lambda q: q.update(ignore=[])), first, "lm_head.weight")
    yield Case("ignore malformed", quantization(lambda q: q.update(ignore="lm_head")), ("config.json",))
    yield Case("ignore malformed", quantization(lambda q: q.update(ignore=[1])), ("config.json",))
    yield Case("ignore malformed", quantization(lambda q: q["ignore"].append("re:(")), ("config.json",))
    yield Case("no KV cache", quantization(lambda q: q.pop("kv_cache_scheme")), ("config.json", "model"))
    if base.layout == "modelopt":
        hf = "hf_quant_config.json"
        for algorithm in ("FP8", "INT4_AWQ", "NVFP4_AWQ", "MIXED_PRECISION", 4):
            yield Case(
                "algorithm", quantization(lambda q, a=algorithm: q.update(quant_algo=a)), ("config.json", hf, "model")
            )
            yield Case(
                "algorithm", quantization(lambda q, a=algorithm: q.update(quant_algo=a), hf), ("config.json", hf)
            )
        yield Case("group size", quantization(lambda q: q.update(group_size=32), hf), (hf,))
        yield Case("no KV cache", quantization(lambda q: q.pop("kv_cache_quant_algo"), hf), (hf,))
        yield Case("second opinion", quantization(lambda q: q.update(exclude_modules=[]), hf), first, "lm_head.weight")
        yield Case(
            "second opinion", quantization(lambda q: q["exclude_modules"].append(proj), hf), first, f"{proj}.weight"
        )
        yield Case("hf text", lambda path: (path / hf).write_text("{"), (hf,))
        yield Case("only config.json", lambda path: (path / hf).unlink())
        yield Case("only hf_quant_config.json", edit(quantization_config=None))
        return

    def group(**changes: object) -> Callable[[Path], None]:
        return quantization(lambda q: q["config_groups"]["group_0"].update(changes))

    def weights(**changes: object) -> Callable[[Path], None]:
        return quantization(lambda q: q["config_groups"]["group_0"]["weights"].update(changes))

    yield Case("no quantization", edit(quantization_config=None), ("model",), "weight_packed")
    yield Case("harmless", weights(strategy="group"))
    for targets in ([], ["Embedding"], ["re:.*mlp.*"], [proj]):
        yield Case("targets", group(targets=targets), ("model",), "weight")
    for value in ("Linear", None, [1], ["re:["]):
        yield Case("targets", group(targets=value), ("config.json",))
    for change in (
        {"num_bits": 8},
        {"num_bits": 3},
        {"type": "int"},
        {"strategy": "channel"},
        {"group_size": 32},
        {"symmetric": False},
    ):
        yield Case("weights", weights(**change), ("config.json",))
    for change in (
        {"weights": None},
        {"weights": 1},
        {"format": "pack-quantized"},
        {"format": 1},
        {"input_activations": 3},
    ):
        yield Case("group", group(**change), ("config.json", "model"))
    for change in (
        {"quantization_status": "frozen"},
        {"transform_config": {"a": 1}},
        {"sparsity_config": {"format": "x"}},
        {"config_groups": {}},
        {"config_groups": []},
        {"config_groups": {"a": 1}},
        {"kv_cache_scheme": 1},
    ):
        yield Case("quantization", quantization(lambda q, c=change: q.update(c)), ("config.json",))


def flip_cases(base: Base, count: int) -> Iterator[Case]:
    """One random bit of a header, of the index or of a config."""
    rng = random.Random(f"{base.layout} {base.sharded}")
    names = [*base.files, "config.json", *([INDEX] if base.sharded else [])]
    for _ in range(count):
        name = rng.choice(names)
        content = (base.path / name).read_bytes()
        end = 8 + struct.unpack("<Q", content[:8])[0] if name.endswith(".safetensors") else len(content)
        position, bit = rng.randrange(end), 1 << rng.randrange(8)
        flipped = content[:position] + bytes([content[position] ^ bit]) + content[position + 1 :]
        yield Case("flipped bit", lambda path, n=name, c=flipped: (path / n).write_bytes(c))


def same_value(a: torch.Tensor | NVFP4Tensor, b: torch.Tensor | NVFP4Tensor) -> bool:
    if isinstance(a, NVFP4Tensor) != isinstance(b, NVFP4Tensor):
        return False
    if not isinstance(a, NVFP4Tensor):
        return same_bytes(a, b)
    pairs = [(getattr(a, name), getattr(b, name)) for name in ("packed", "scale", "global_scale", "divisor")]
    return all(x is y is None or same_bytes(x, y) for x, y in pairs)


def same_values(a: dict, base: Base) -> bool:
    if a.keys() != base.expected.keys():
        return False
    return all(same_value(a[name], base.expected[name]) or same_value(a[name], base.plain[name]) for name in a)


def check(case: Case, base: Base, path: Path) -> str:
    """Damage a copy at ``path``, load it, and return "error" or "right"."""
    path.mkdir()
    for file in base.path.iterdir():
        shutil.copyfile(file, path / file.name)
    case.damage(path)
    loaded, message = attempt(load, path)
    if message:
        assert "\n" not in message, (case, message)
        assert len(message) < 1000, (case, message)
        assert str(path) in message, (case, message)
        assert not case.names or any(name in message for name in case.names), (case, message)
        assert case.tensor is None or case.tensor in message, (case, message)
        return "error"
    assert not case.names, f"{case} was loaded"
    assert same_values(loaded, base), f"{case} loaded wrong values"
    return "right"


def attempt(function: Callable, path: Path) -> tuple[Any, str]:
    """The result, or the message of a CheckpointError."""
    try:
        return function(path), ""
    except CheckpointError as error:
        return None, str(error)


def run(cases: list[tuple[Case, Base]], tmp_path: Path) -> Counter:
    outcomes = Counter()
    for case, base in cases:
        outcomes[check(case, base, tmp_path / "copy")] += 1
        shutil.rmtree(tmp_path / "copy")
    return outcomes


def test_good_directories(bases: list[Base], tmp_path: Path) -> None:
    harmless = [(Case("nothing", lambda path: None), base) for base in bases]
    assert run(harmless, tmp_path) == {"right": 4}
    assert all(base.expected.keys() == bases[0].expected.keys() for base in bases)
    assert sum(isinstance(value, NVFP4Tensor) for value in bases[0].expected.values()) == 14


def test_damaged_tensors(bases: list[Base], tmp_path: Path) -> None:
    """Each kind of damage to each kind of tensor in each layout; variant, layer and sharding by a fixed seed."""
    cases = [(case, base) for base in bases for case in tensor_cases(base)]
    random.Random(0).shuffle(cases)
    kinds = {(case.kind, re.sub(r"\d", "", case.tensor), base.layout): (case, base) for case, base in cases}
    picked = list(kinds.values())
    outcomes = run(picked, tmp_path)
    print(f"{len(picked)} of {len(cases)} cases, {dict(outcomes)}")
    assert outcomes["error"] == len(picked) >= 500


@pytest.mark.parametrize("make", [file_cases, config_cases, index_cases])
def test_damaged_files(bases: list[Base], tmp_path: Path, make: Callable) -> None:
    cases = [(case, base) for base in bases if base.sharded or make is not index_cases for case in make(base)]
    outcomes = run(cases, tmp_path)
    print(f"{len(cases)} cases, {dict(outcomes)}")
    assert len(cases) >= 50


def test_flipped_bits(bases: list[Base], tmp_path: Path) -> None:
    outcomes = run([(case, base) for base in bases for case in flip_cases(base, 100)], tmp_path)
    print(dict(outcomes))
    assert outcomes["error"] >= 200


def test_conversion_of_damaged_directories(bases: list[Base], tmp_path: Path) -> None:
    """What ``load`` refuses, ``convert`` refuses too, and leaves nothing behind."""
    cases = [(case, base) for base in bases for make in (tensor_cases, file_cases) for case in make(base)]
    for case, base in random.Random(1).sample(cases, 100):
        src = tmp_path / "src"
        shutil.copytree(base.path, src)
        case.damage(src)
        with pytest.raises(CheckpointError):
            convert(src, tmp_path / "dst", layout="modelopt" if base.layout != "modelopt" else "compressed-tensors")
        assert [path.name for path in tmp_path.iterdir()] == ["src"]
        if not any(path.is_dir() or path.is_fifo() for path in src.iterdir()):
            with pytest.raises(CheckpointError):
                checkpoint.load_dense(src)
        shutil.rmtree(src)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=100, deadline=None)
@given(st.binary(max_size=200), st.booleans())
def test_any_bytes_as_a_file(tmp_path: Path, content: bytes, with_length: bool) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(content)) + content if with_length else content)
    header, message = attempt(read_header, file)
    assert str(file) in message or header.tensors.keys() == load_file(file).keys()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=80, deadline=None)
@given(st.data())
def test_any_json_in_a_header(tmp_path: Path, data: st.DataObject) -> None:
    file = tmp_path / "model.safetensors"
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    entry |= data.draw(st.dictionaries(st.sampled_from(sorted(entry)), JSON, max_size=2))
    join_file(file, {"t": entry} | data.draw(st.dictionaries(st.text(max_size=8), JSON, max_size=1)), bytes(8))
    header, message = attempt(read_header, file)
    assert str(file) in message or header.tensors.keys() == load_file(file).keys()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=80, deadline=None)
@given(st.data())
def test_any_json_in_a_config(bases: list[Base], tmp_path: Path, data: st.DataObject) -> None:
    base = data.draw(st.sampled_from(bases))
    config = json.loads((base.path / "config.json").read_text())
    inner = config["quantization_config"]
    where = data.draw(
        st.sampled_from([config, inner, *(value for value in inner.values() if isinstance(value, dict) and value)])
    )
    where[data.draw(st.sampled_from(sorted(where)))] = data.draw(JSON)
    copy = tmp_path / "copy"
    shutil.copytree(base.path, copy, dirs_exist_ok=True)
    (copy / "config.json").write_text(json.dumps(config))
    loaded, message = attempt(load, copy)
    assert str(copy) in message or same_values(loaded, base)
    shutil.rmtree(copy)
