"""Byte-level BPE for the bundled model, trained with ``tokenizers`` on the ``train`` split."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
# A word takes one leading space, dot or bracket with it, a number one space; a line break takes the indentation that follows.
_PIECES = r"[ .(]?[\p{L}_]+| ?\p{N}{1,3}|\n[\n ]*| ?[^\s\p{L}\p{N}_]+|\s+"


def train(texts: Iterable[str], *, vocab_size: int, max_length: int) -> PreTrainedTokenizerFast:
    """Train a tokenizer of ``vocab_size`` entries, ``END_OF_TEXT`` (id 0) included; every byte string round-trips."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )


def split_spaces(tokenizer: PreTrainedTokenizerFast, ids: np.ndarray, *, share: float, seed: int) -> np.ndarray:
    """Write a random ``share`` of the tokens that begin with a space as two: the space, and the rest.

    A prompt that ends in a space (``"def "``) ends in a lone space token, which BPE hardly ever writes inside a line;
    the model has to have seen it in front of words.
    """
    vocabulary = tokenizer.get_vocab()
    space = vocabulary["Ġ"]
    rest = np.zeros(len(vocabulary), dtype=ids.dtype)
    for piece, i in vocabulary.items():
        if piece.startswith("Ġ") and piece[1:] in vocabulary:
            rest[i] = vocabulary[piece[1:]]
    chosen = (rest[ids] > 0) & (np.random.default_rng(seed).random(len(ids)) < share)
    out = np.repeat(ids, 1 + chosen)
    first = np.flatnonzero(chosen) + np.arange(chosen.sum())
    out[first], out[first + 1] = space, rest[ids[chosen]]
    return out
