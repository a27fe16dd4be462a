"""``bench/divergence.py``: against probabilities written out by hand."""

import math

import pytest
import torch

from adallm import evaluate
from adallm.bench import divergence
from adallm.tiny.corpus import Document


def test_measure_on_two_tokens_of_a_vocabulary_of_two():
    p = torch.tensor([[0.5, 0.5], [0.9, 0.1]])
    q = torch.tensor([[0.25, 0.75], [0.9, 0.1]])
    sums = divergence.measure(q.log(), p.log(), torch.tensor([0, 1]))
    assert sums["kl"] == pytest.approx(0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75))
    entropy = -sum(x * math.log(x) for x in (0.25, 0.75, 0.9, 0.1))
    assert sums["entropy"] == pytest.approx(entropy, rel=1e-6)
    assert sums["loss_1.0"] == pytest.approx(-math.log(0.25) - math.log(0.1), rel=1e-6)


def test_bf16_diverges_from_itself_by_nothing_and_nvfp4_from_it():
    ids = torch.randint(1, 4096, (65,), generator=torch.Generator().manual_seed(0))
    rows = divergence.run(evaluate.BUNDLED_MODEL, {"random": [ids]}, ["bf16", "nvfp4"])
    assert [row["format"] for row in rows] == ["bf16", "nvfp4"]
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert rows[1]["kl"] > 1e-3
    assert all(row["tokens"] == 64 and row["best_loss"] <= row["loss"] for row in rows)


def test_too_few_long_documents_are_an_error():
    class Letters:
        def encode(self, text):
            return list(text.encode())

    with pytest.raises(ValueError, match="1 documents have 10 tokens; 2 are wanted"):
        divergence.windows([Document("a", "x" * 40), Document("b", "x")], Letters(), 10, 2)
