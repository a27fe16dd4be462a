"""Kullback-Leibler divergence from BF16 by format, on held-out and on training text: what perplexity alone can hide.

``kl = mean over tokens of sum_v p(v) (log p(v) - log q(v))`` in nats, p the model in BF16 and q under a format. A model
that is too sure of itself gains perplexity from anything that flattens its output, an error in the weights included;
the divergence counts every change as a loss. Beside it stand the entropy of q, and the loss at the one temperature
that suits the format best.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoTokenizer

from adallm import evaluate, hf_model, lm, results, text
from adallm.tasks import stdlib_ppl
from adallm.tiny import corpus

TEMPERATURES = tuple(round(0.8 + 0.05 * i, 2) for i in range(15))
BASE = "bf16"


def windows(documents: Sequence[corpus.Document], tokenizer: Any, length: int, count: int) -> list[Tensor]:
    """The first ``length + 1`` tokens of ``count`` documents that are so long, evenly spread over all of them."""
    found = []
    for document in documents:
        tokens = [0, *tokenizer.encode(document.text[: 8 * length])]
        if len(tokens) > length:
            found.append(torch.tensor(tokens[: length + 1]))
    if len(found) < count:
        raise ValueError(f"{len(found)} documents have {length} tokens; {count} are wanted")
    return found[:: len(found) // count][:count]


def measure(logits: Tensor, reference: Tensor, target: Tensor) -> dict[str, float]:
    """Sums over the tokens of one window.

    Args:
        logits: ``[tokens, vocabulary]`` float32, under a format.
        reference: log-probabilities of the same shape, in BF16.
        target: ``[tokens]``, the tokens that follow.

    Returns:
        ``kl``, ``entropy`` and, for each temperature T, ``loss_T``: nats.
    """
    logp = logits.log_softmax(-1)
    sums = {
        "kl": float((reference.exp() * (reference - logp)).sum(dtype=torch.float64)),
        "entropy": -float((logp.exp() * logp).sum(dtype=torch.float64)),
    }
    for temperature in TEMPERATURES:
        loss = torch.nn.functional.cross_entropy(logits / temperature, target, reduction="sum")
        sums[f"loss_{temperature}"] = float(loss)
    return sums


@torch.no_grad()
def run(directory: Path, texts: dict[str, list[Tensor]], formats: Sequence[str]) -> list[dict[str, Any]]:
    """One row for each format and text; ``formats`` begins with BF16."""
    references: dict[tuple[str, int], Tensor] = {}
    rows = []
    total = len(formats) * sum(map(len, texts.values()))
    with tqdm(total=total, unit=" windows") as bar:
        for name in formats:
            bar.set_description(hf_model.FORMATS[name].title)
            model = hf_model.load(directory, hf_model.FORMATS[name])
            for split, batch in texts.items():
                sums: dict[str, float] = {}
                for i, tokens in enumerate(batch):
                    logits = model(tokens[None, :-1], use_cache=False).logits[0].float()
                    reference = references.setdefault((split, i), logits.log_softmax(-1))
                    for key, value in measure(logits, reference, tokens[1:]).items():
                        sums[key] = sums.get(key, 0.0) + value
                    bar.update()
                count = sum(len(tokens) - 1 for tokens in batch)
                mean = {key: value / count for key, value in sums.items()}
                best = min(TEMPERATURES, key=lambda t: mean[f"loss_{t}"])
                rows.append(
                    {
                        "text": split,
                        "format": name,
                        "title": hf_model.FORMATS[name].title,
                        "tokens": count,
                        "kl": mean["kl"],
                        "loss": mean["loss_1.0"],
                        "entropy": mean["entropy"],
                        "best_temperature": best,
                        "best_loss": mean[f"loss_{best}"],
                    }
                )
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m adallm.bench.divergence", description=__doc__.partition("\n")[0])
    parser.add_argument("--windows", type=int, default=9, help="of each text, one a document (default: %(default)s)")
    parser.add_argument("--results", type=Path, help="where the record goes (default: results/)")
    args = parser.parse_args(argv)
    directory = evaluate.BUNDLED_MODEL
    tokenizer, length = AutoTokenizer.from_pretrained(directory), lm.max_length(directory)
    train = [d for d in corpus.load()["train"] if not corpus.is_test(d.path)]
    texts = {
        "held out": windows(stdlib_ppl.documents(), tokenizer, length, args.windows),
        "train": windows(train, tokenizer, length, args.windows),
    }
    rows = run(directory, texts, evaluate.DEFAULT_FORMATS)
    path = results.write("divergence", rows, provenance=results.provenance(seed=0, gpu=False), root=args.results)
    fields = ("text", "title", "kl", "loss", "entropy", "best_temperature", "best_loss")
    lines = [tuple(f"{row[f]:.4f}" if isinstance(row[f], float) else row[f] for f in fields) for row in rows]
    print(text.table(fields, lines, align="llrrrrr"))
    print(f"record: {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
