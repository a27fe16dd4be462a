"""Time to quantize a whole model, from its files to those in NVFP4, by rule.

A model of the shapes of Qwen3-8B is written, its weights normal with standard deviation 0.02, those of all layers the
same. ``s`` is the time of ``calibrated.convert``, as ``adallm quantize`` calls it: reading, which is from memory where
the system still has the files there, and writing included. Once, without a repeat. Before, a model of one of the layers
is quantized, and the error of its weights must be one that the rule may have: ``rel_sq_err`` is ``sum (w - w')^2`` over
``sum w^2``.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from adallm import calibrated, checkpoint, evaluate, results
from adallm.bench import _e2e_model
from adallm.checkpoint.quantize import GPTQ, RULES
from adallm.text import table

SEED = 0
DEFAULT = ("max", "mse")
# Of normal weights: mse has 0.0066 and max 0.0090 (results/quantizers). GPTQ has more error in the weights,
# and less in what they are multiplied by.
BOUNDS = (0.006, 0.012)
GPTQ_BOUNDS = (0.006, 0.02)
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


def shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Of the tensors of one decoder layer of Qwen3."""
    d, hidden, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    return {
        "self_attn.q_proj": (queries, d),
        "self_attn.k_proj": (keys, d),
        "self_attn.v_proj": (keys, d),
        "self_attn.o_proj": (d, queries),
        "mlp.gate_proj": (hidden, d),
        "mlp.up_proj": (hidden, d),
        "mlp.down_proj": (d, hidden),
        "self_attn.q_norm": (head,),
        "self_attn.k_norm": (head,),
        "input_layernorm": (d,),
        "post_attention_layernorm": (d,),
    }


def write(directory: Path, config: Mapping[str, Any], layers: int, device: str) -> Path:
    """A BF16 model of random numbers with as many layers, a file for each, and the bundled tokenizer."""
    generator = torch.Generator(device).manual_seed(SEED)

    def tensor(shape: tuple[int, ...]) -> Tensor:
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16)
        return torch.randn(shape, generator=generator, dtype=torch.bfloat16, device=device).mul_(0.02).cpu()

    directory.mkdir(parents=True)
    layer = {name: tensor(shape) for name, shape in shapes(config).items()}
    whole = (config["vocab_size"], config["hidden_size"])
    others = {"model.embed_tokens": whole, "lm_head": whole, "model.norm": whole[1:]}
    weight_map = {}

    def save(file: str, tensors: Mapping[str, Tensor]) -> None:
        named = {f"{name}.weight": value for name, value in tensors.items()}
        save_file(named, directory / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(named, file))

    save("others.safetensors", {name: tensor(shape) for name, shape in others.items()})
    for i in range(layers):
        save(f"layer-{i}.safetensors", {f"model.layers.{i}.{name}": value for name, value in layer.items()})
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (directory / "config.json").write_text(json.dumps({**config, "num_hidden_layers": layers}))
    for name in _TOKENIZER:
        shutil.copyfile(evaluate.BUNDLED_MODEL / name, directory / name)
    return directory


def measure(
    name: str, config: Mapping[str, Any], rules: Sequence[str], device: str, folder: Path
) -> Iterator[dict[str, Any]]:
    """A row for each rule; models are written below ``folder``, which has room for two.

    Raises:
        ValueError: an error outside ``BOUNDS`` or ``GPTQ_BOUNDS``.
    """
    layers = config["num_hidden_layers"]
    one, whole = write(folder / "one", config, 1, device), write(folder / "whole", config, layers, device)
    for rule in rules:
        options = {"scale_rule": rule, "device": device}
        done = calibrated.convert(one, folder / "checked", **options)
        total = checkpoint.total(checkpoint.errors(done.path, one))
        rel_sq_err = total.noise / total.signal
        least, most = GPTQ_BOUNDS if rule == GPTQ else BOUNDS
        if not least < rel_sq_err < most:
            raise ValueError(f"{rule}: relative squared error {rel_sq_err:.5f}; it must be from {least} to {most}")
        shutil.rmtree(done.path)
        start = time.perf_counter()
        done = calibrated.convert(whole, folder / "timed", **options, progress=True)
        seconds = time.perf_counter() - start
        shutil.rmtree(done.path)
        weights = layers * sum(shape[0] * shape[1] for shape in shapes(config).values() if len(shape) == 2)
        yield {
            "model": name,
            "layers": layers,
            "rule": rule,
            "device": device,
            "weights": weights,
            "s": round(seconds, 3),
            "mweights_s": round(weights / seconds / 1e6, 3),
            "read_bytes": done.source_bytes,
            "written_bytes": done.nbytes,
            "rel_sq_err": round(rel_sq_err, 6),
        }


def report(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a table."""
    columns = ("model", "layers", "rule", "device", "s", "mweights_s", "rel_sq_err")
    return table(columns, [[str(row[column]) for column in columns] for row in rows], align="lrllrrr")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and write ``results/convert/<slug>.json``; other rules or layers have a record of their own."""
    parser = argparse.ArgumentParser(prog="python -m adallm.bench.convert", description=__doc__.partition("\n")[0])
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(DEFAULT), help="default: max mse")
    parser.add_argument("--device", choices=devices, default=devices[0], help="default: %(default)s")
    parser.add_argument("--layers", type=int, metavar="N", help="leave out all layers but the first N")
    parser.add_argument("--folder", type=Path, help="for the models, 22 GB for all layers (default: the system's)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="root of the records (default: results)")
    options = parser.parse_args(argv)
    try:
        name, config = _e2e_model.config(None, options.layers)
    except ValueError as error:
        parser.error(f"--layers: {error}")
    gpu = options.device == "cuda"
    provenance, rows = results.provenance(seed=SEED, gpu=gpu), []
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for row in measure(name, config, dict.fromkeys(options.rules), options.device, Path(folder)):
            rows.append(row)
            print(report([row]), flush=True)
    parts = [results.slug(provenance["gpu"])]
    # A part does not take the place of the whole.
    if set(options.rules) != set(DEFAULT):
        parts += dict.fromkeys(options.rules)
    if options.layers is not None:
        parts.append(f"first-{options.layers}")
    given = {
        "name": "-".join(parts),
        "root": options.out,
        "cpu": results.cpu_name(),
        "threads": torch.get_num_threads(),
    }
    path = results.write("convert", rows, provenance=provenance, **given)
    print(f"wrote {os.path.relpath(path)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
