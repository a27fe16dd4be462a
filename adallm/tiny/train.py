"""Train the bundled model: ``python -m adallm.tiny.train``, or ``make model``.

A Qwen3 of ten million weights on the source of the standard library (``corpus.py``), trained in BF16 autocast with
Muon for the matrices and AdamW for the rest, the learning rate falling linearly to zero. Context,
dropout and epochs were chosen on the validation split (``results/tiny_recipes``); the held-out split decides nothing.

Two steps, so that the text can come from one machine and the GPU from another:

    python -m adallm.tiny.train prepare DIR     tokenizer and token streams of the running Python's library
    python -m adallm.tiny.train fit DIR         train on them; needs a CUDA GPU

Without a step, both run one after the other.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from adallm import results
from adallm.tiny import corpus, tokenizer

MODEL_DIRECTORY = Path(__file__).resolve().parent / "model"
_SHARD_SIZE = "12MB"


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Architecture and optimization; every field is also a command-line option."""

    vocab_size: int = 4096
    hidden_size: int = 384
    intermediate_size: int = 768
    layers: int = 7
    heads: int = 6
    kv_heads: int = 2
    head_dim: int = 64
    context: int = 2048
    batch_tokens: int = 32768
    epochs: int = 16
    dropout: float = 0.2
    matrix_lr: float = 4e-3
    vector_lr: float = 4e-3
    weight_decay: float = 0.1
    warmup_steps: int = 100
    seed: int = 0


def model_config(recipe: Recipe) -> Qwen3Config:
    """The Hugging Face configuration of a recipe; id 0 begins and ends a text."""
    return Qwen3Config(
        vocab_size=recipe.vocab_size,
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        head_dim=recipe.head_dim,
        max_position_embeddings=recipe.context,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        attention_bias=False,
        use_cache=True,
    )


def prepare(directory: Path, recipe: Recipe) -> None:
    """Write ``tokenizer/``, ``tokens.npz`` (one uint16 stream a split) and ``corpus.json`` into ``directory``."""
    directory.mkdir(parents=True, exist_ok=True)
    splits = corpus.load()
    print(f"corpus: {sum(len(d.text) for d in splits['train']) / 1e6:.1f} M characters to train on", flush=True)
    tok = tokenizer.train((d.text for d in splits["train"]), vocab_size=recipe.vocab_size, max_length=recipe.context)
    tok.save_pretrained(directory / "tokenizer")
    streams = {}
    for name, documents in splits.items():
        pieces = [np.array([0, *tok.encode(d.text)], dtype=np.uint16) for d in documents]
        streams[name] = np.concatenate(pieces)
        print(f"corpus: {name}: {len(documents)} files, {len(streams[name])} tokens", flush=True)
    np.savez_compressed(directory / "tokens.npz", **streams)
    description = {name: corpus.describe(documents) for name, documents in splits.items()}
    (directory / "corpus.json").write_text(json.dumps(description, indent=1) + "\n")


def _windows(stream: torch.Tensor, context: int, shift: int, order: torch.Tensor | None) -> Iterator[torch.Tensor]:
    count = (len(stream) - 1 - shift) // context
    for i in order[order < count].tolist() if order is not None else range(count):
        first = shift + i * context
        yield stream[first : first + context + 1]


def _batches(stream: torch.Tensor, recipe: Recipe, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """One epoch: every token once, in windows whose borders and order are drawn anew."""
    shift = int(torch.randint(recipe.context, (), generator=generator))
    order = torch.randperm(len(stream) // recipe.context, generator=generator)
    rows: list[torch.Tensor] = []
    for window in _windows(stream, recipe.context, shift, order):
        rows.append(window)
        if len(rows) * recipe.context == recipe.batch_tokens:
            yield torch.stack(rows)
            rows = []


@torch.no_grad()
def bits_per_byte(model: torch.nn.Module, stream: torch.Tensor, n_bytes: int, context: int, batch: int = 32) -> float:
    """``sum of -log2 p(token) / bytes`` over non-overlapping windows; end-of-text tokens are context, not targets."""
    training = model.training
    model.eval()
    nats = torch.zeros((), device=stream.device, dtype=torch.float64)
    windows = list(_windows(stream, context, 0, None))
    tail = stream[len(windows) * context :]
    groups = [torch.stack(windows[i : i + batch]) for i in range(0, len(windows), batch)]
    for tokens in [*groups, *([tail[None]] if len(tail) > 1 else [])]:
        with torch.autocast(stream.device.type, torch.bfloat16, enabled=stream.is_cuda):
            logits = model(tokens[:, :-1], use_cache=False).logits
        target = tokens[:, 1:].reshape(-1)
        loss = torch.nn.functional.cross_entropy(logits.float().reshape(len(target), -1), target, reduction="none")
        nats += (loss * (target != 0)).sum()
    model.train(training)
    return float(nats) / math.log(2) / n_bytes


def _add_dropout(model: Qwen3ForCausalLM, p: float) -> None:
    """Dropout on the embedding and on what every attention and MLP adds to the residual stream; gone when saved."""

    def drop(module: torch.nn.Module, _inputs: object, output: object) -> object:
        if isinstance(output, tuple):
            return (torch.nn.functional.dropout(output[0], p, module.training), *output[1:])
        return torch.nn.functional.dropout(output, p, module.training)

    model.model.embed_tokens.register_forward_hook(drop)
    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(drop)
        layer.mlp.register_forward_hook(drop)


def fit(directory: Path, recipe: Recipe, *, out: Path | None, device: str = "cuda") -> list[dict[str, object]]:
    """Train on the streams of ``directory``; save the model into ``out`` unless it is None.

    Returns:
        The learning curve, one row a measurement: ``epoch``, ``tokens``, ``split``, ``bits_per_byte``, ``seconds``.
    """
    torch.manual_seed(recipe.seed)
    torch.set_float32_matmul_precision("high")
    sizes = {name: split["bytes"] for name, split in json.loads((directory / "corpus.json").read_text()).items()}
    with np.load(directory / "tokens.npz") as file:
        streams = {name: torch.from_numpy(file[name].astype(np.int64)).to(device) for name in corpus.SPLITS}
    model = Qwen3ForCausalLM(model_config(recipe)).to(device)
    _add_dropout(model, recipe.dropout)
    n_parameters = sum(p.numel() for p in model.parameters())
    print(f"model: {n_parameters / 1e6:.2f} M parameters", flush=True)

    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and "embed_tokens" not in name]
    vectors = [p for name, p in model.named_parameters() if p.dim() != 2 or "embed_tokens" in name]
    optimizers = [
        torch.optim.Muon(
            matrices, lr=recipe.matrix_lr, weight_decay=recipe.weight_decay, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(vectors, lr=recipe.vector_lr, weight_decay=0.0, betas=(0.9, 0.98)),
    ]
    steps = recipe.epochs * (len(streams["train"]) // recipe.batch_tokens)
    schedulers = [
        torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min((step + 1) / recipe.warmup_steps, max(1 - step / steps, 0.0))
        )
        for optimizer in optimizers
    ]

    @torch.compile(disable=device == "cpu")
    def loss_of(tokens: torch.Tensor) -> torch.Tensor:
        logits = model(tokens[:, :-1], use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].reshape(-1))

    generator = torch.Generator().manual_seed(recipe.seed)
    rows: list[dict[str, object]] = []
    running, step, start = torch.zeros((), device=device), 0, time.monotonic()
    model.train()
    for epoch in range(1, recipe.epochs + 1):
        running.zero_()
        in_epoch = 0
        for tokens in _batches(streams["train"], recipe, generator):
            with torch.autocast(device, torch.bfloat16):
                loss = loss_of(tokens)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad(set_to_none=True)
            running += loss.detach()
            in_epoch += 1
        step += in_epoch
        seconds = time.monotonic() - start
        nats_per_token = float(running) / in_epoch
        train_bpb = nats_per_token / math.log(2) * len(streams["train"]) / sizes["train"]
        measured = {"train": train_bpb}
        for name in ("validation", "heldout"):
            measured[name] = bits_per_byte(model, streams[name], sizes[name], recipe.context)
        for name, value in measured.items():
            rows.append(
                {
                    "epoch": epoch,
                    "tokens": step * recipe.batch_tokens,
                    "split": name,
                    "bits_per_byte": round(value, 5),
                    "seconds": round(seconds, 1),
                }
            )
        print(
            f"epoch {epoch:2d}  {seconds:5.0f} s  bits per byte: "
            + "  ".join(f"{name} {value:.4f}" for name, value in measured.items()),
            flush=True,
        )
    if out is not None:
        _save(model, directory, out)
    return rows


def _save(model: Qwen3ForCausalLM, directory: Path, out: Path) -> None:
    model = model.to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    shutil.rmtree(out, ignore_errors=True)
    model.save_pretrained(out, max_shard_size=_SHARD_SIZE)
    for file in sorted((directory / "tokenizer").iterdir()):
        shutil.copy(file, out)


def sample(directory: Path, prompt: str = "def ", *, tokens: int = 120, temperature: float = 0.8, seed: int = 0) -> str:
    """A completion, to be read by a person; the likeliest one at temperature 0."""
    tok = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    torch.manual_seed(seed)
    ids = torch.tensor([tok.encode(prompt)])
    drawn = {"do_sample": True, "temperature": temperature, "top_p": 0.95} if temperature else {"do_sample": False}
    return tok.decode(model.generate(ids, max_new_tokens=tokens, pad_token_id=0, **drawn)[0])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m adallm.tiny.train", description=__doc__.splitlines()[0])
    parser.add_argument("step", nargs="?", choices=("prepare", "fit"), help="one step only; default: both")
    parser.add_argument("directory", nargs="?", type=Path, default=Path(".cache/tiny"), help="working directory")
    parser.add_argument("--out", type=Path, default=MODEL_DIRECTORY, help="where the trained model goes")
    parser.add_argument("--results", type=Path, default=None, help="where the record goes")
    for field in dataclasses.fields(Recipe):
        option = "--" + field.name.replace("_", "-")
        parser.add_argument(option, type=type(field.default), default=field.default)
    arguments = vars(parser.parse_args())
    recipe = Recipe(**{field.name: arguments[field.name] for field in dataclasses.fields(Recipe)})
    directory, step = arguments["directory"], arguments["step"]
    if step in (None, "prepare"):
        prepare(directory, recipe)
    if step == "prepare":
        return
    if not torch.cuda.is_available():
        raise SystemExit("training needs a CUDA GPU; the bundled model itself works without")
    extra = {"corpus": json.loads((directory / "corpus.json").read_text())}
    provenance = results.provenance(seed=recipe.seed)
    rows = fit(directory, recipe, out=arguments["out"])
    text = sample(arguments["out"])
    print(text)
    extra |= {"recipe": dataclasses.asdict(recipe), "sample": text}
    path = results.write("tiny_training", rows, provenance=provenance, root=arguments["results"], **extra)
    print(f"record: {path}")


if __name__ == "__main__":
    main()
