"""Text that a model reads for calibration: documents, encoded as prompts are, in windows of tokens."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from adallm.tiny import corpus

TOKENS = 65_536
MIN_TOKENS = 512
# Tokens in a window; shorter where a model's context is.
WINDOW = 2048
# Characters of a file that are tokenized at a time.
_PIECE = 1 << 20


def read_windows(source: Path, files: Sequence[str | Path] = (), tokens: int = TOKENS) -> list[list[int]]:
    """The first ``tokens`` tokens in windows, none across two documents.

    Args:
        source: a model's directory, with its tokenizer.
        files: UTF-8 text, each a document, in pieces of 2^20 characters if longer. By default the bundled corpus: the
            source of the running Python's standard library without test suites, its validation split and then its
            training split, never held-out text.
        tokens: at least ``MIN_TOKENS``. Shorter text is read whole.

    Raises:
        ValueError: a tokenizer that is missing or does not fit; text that is not UTF-8 or has fewer than ``MIN_TOKENS``
            tokens.
    """
    if tokens < MIN_TOKENS:
        raise ValueError(f"tokens {tokens}; calibration needs at least {MIN_TOKENS}")
    from transformers import AutoConfig, AutoTokenizer

    try:
        # Said outright, so that nobody is asked whether to run a program from the directory.
        config = AutoConfig.from_pretrained(source, trust_remote_code=False).get_text_config()
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:
        raise ValueError(f"{source}: config or tokenizer cannot be loaded ({type(error).__name__}: {error})") from None
    # What transformers makes of a directory without the tokenizer's files.
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise ValueError(f"{source}: its tokenizer has no vocabulary; is tokenizer.json missing?")
    length = min(getattr(config, "max_position_embeddings", None) or WINDOW, WINDOW)
    found, left = [], tokens
    for document in _documents(files):
        ids = tokenizer(document, verbose=False).input_ids[:left]
        found += [ids[i : i + length] for i in range(0, len(ids), length)]
        left -= len(ids)
        if not left:
            break
    if tokens - left < MIN_TOKENS:
        raise ValueError(
            f"{', '.join(map(os.fspath, files)) or 'the corpus'}: {tokens - left} tokens of text; calibration needs at "
            f"least {MIN_TOKENS}"
        )
    return found


def check_tokens(source: Path, windows: Sequence[Sequence[int]], rows: int) -> None:
    """Whether a model with ``rows`` embeddings has each token.

    Raises:
        ValueError: it has not.
    """
    if (largest := max(map(max, windows))) >= rows:
        raise ValueError(f"{source}: the tokenizer gives token {largest}, but the model has {rows}")


def _documents(files: Sequence[str | Path]) -> Iterator[str]:
    if not files:
        splits = corpus.load()
        # Test suites are missing from some installations of Python.
        yield from (d.text for name in ("validation", "train") for d in splits[name] if not corpus.is_test(d.path))
    for file in files:
        try:
            with Path(file).open(encoding="utf-8") as stream:
                while piece := stream.read(_PIECE):
                    yield piece
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is not UTF-8: {error}") from None
