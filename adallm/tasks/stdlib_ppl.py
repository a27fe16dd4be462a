"""The documents and counts of the lm-eval task ``stdlib_ppl``."""

from __future__ import annotations

from typing import Any

import datasets

from adallm.tiny import corpus

# No single module should outweigh the others.
MAX_CHARACTERS = 32_768


def documents() -> list[corpus.Document]:
    """Held-out library modules, test suites left out: some Python installations come without them."""
    return [
        corpus.Document(document.path, document.text[:MAX_CHARACTERS])
        for document in corpus.load()["heldout"]
        if not corpus.is_test(document.path)
    ]


def load(**_: Any) -> dict[str, datasets.Dataset]:
    """One row a module: its path in the library and its text."""
    return {"test": datasets.Dataset.from_list([{"path": d.path, "text": d.text} for d in documents()])}


def process_results(doc: dict[str, str], results: tuple[float]) -> dict[str, tuple[float, int]]:
    """Log-likelihood with the number of words and of UTF-8 bytes that it is divided by."""
    (loglikelihood,) = results
    words, n_bytes = len(doc["text"].split()), len(doc["text"].encode())
    return {
        "word_perplexity": (loglikelihood, words),
        "byte_perplexity": (loglikelihood, n_bytes),
        "bits_per_byte": (loglikelihood, n_bytes),
    }
