"""The bundled model: its text, its tokenizer, its training script and the weights themselves."""

import json
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from adallm import results
from adallm.tiny import corpus, tokenizer, train

MODEL = train.MODEL_DIRECTORY


@pytest.fixture(scope="module")
def splits():
    return corpus.load()


@pytest.fixture(scope="module")
def tok():
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.mark.parametrize(
    ("path", "topic"),
    [
        ("json/decoder.py", "decoder"),
        ("test/test_json/test_decoder.py", "decoder"),
        ("_pydecimal.py", "pydecimal"),
        ("email/__init__.py", "email"),
        ("test/test_email/__init__.py", "email"),
        ("unittest/__main__.py", "unittest"),
        ("encodings/cp1250.py", "encodings"),
        ("test/__init__.py", "test"),
    ],
)
def test_topic(path, topic):
    assert corpus.topic(path) == topic


def test_the_rule_of_the_split_is_fixed():
    sides = {"unittest/mock.py": "heldout", "plistlib.py": "heldout", "pprint.py": "validation", "ast.py": "train"}
    assert {path: corpus.split_of(path) for path in sides} == sides


def test_splits_share_no_topic_and_no_near_duplicate(splits):
    topics = {name: {corpus.topic(d.path) for d in documents} for name, documents in splits.items()}
    shingles = {name: [corpus._shingles(d.text) for d in documents] for name, documents in splits.items()}
    held = set().union(*shingles["heldout"])
    chosen = held.union(*shingles["validation"])
    assert not topics["train"] & topics["heldout"]
    assert not topics["train"] & topics["validation"]
    assert not topics["validation"] & topics["heldout"]
    assert all(len(own & chosen) <= corpus.MAX_SHARED * len(own) for own in shingles["train"])
    assert all(len(own & held) <= corpus.MAX_SHARED * len(own) for own in shingles["validation"])
    assert min(len(documents) for documents in splits.values()) > 20


def test_no_file_names_this_installation(splits):
    assert not [d.path for s in splits.values() for d in s if "_sysconfigdata" in d.path or "site-packages" in d.path]


def test_a_near_duplicate_is_dropped_from_training(tmp_path):
    text = "\n".join(f"value_{i} = {i}" for i in range(60)) + "\n"
    (tmp_path / "plistlib.py").write_text(text)
    (tmp_path / "ast.py").write_text(text + "more = 1\n")
    (tmp_path / "dis.py").write_text("\n".join(f"other_{i} = {i}" for i in range(60)))
    (tmp_path / "bytes.py").write_bytes(b"\xff\xfe")
    found = corpus.load(tmp_path)
    assert [d.path for d in found["heldout"]] == ["plistlib.py"]
    assert [d.path for d in found["train"]] == ["dis.py"]


def test_the_hash_sees_paths_texts_and_their_border():
    d = corpus.Document
    hashes = {
        corpus.sha256(documents)
        for documents in ([d("a", "bc")], [d("ab", "c")], [d("a", "b"), d("c", "")], [d("a", "bd")], [])
    }
    assert len(hashes) == 5


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=200))
def test_the_tokenizer_gives_back_any_text(tok, text):
    assert tok.decode(tok.encode(text)) == text


def test_the_tokenizer_is_made_for_python(tok):
    assert tok.tokenize("def ") == ["defĠ"]
    assert tok.convert_tokens_to_ids(tokenizer.END_OF_TEXT) == 0 == tok.eos_token_id
    assert len(tok) == AutoConfig.from_pretrained(MODEL).vocab_size


def test_the_model_is_what_it_should_be():
    config = AutoConfig.from_pretrained(MODEL)
    shards = sorted(MODEL.glob("*.safetensors"))
    n_parameters = 0
    for shard in shards:
        with safe_open(shard, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                tensor = file.get_tensor(name)
                assert tensor.dtype == torch.bfloat16
                n_parameters += tensor.numel()
    assert config.model_type == "qwen3"
    assert len(shards) >= 2
    assert n_parameters <= 11_000_000
    assert sum(p.stat().st_size for p in MODEL.iterdir()) <= 22_000_000
    assert config.hidden_size % 128 == config.intermediate_size % 128 == 0
    assert config.head_dim in (64, 128)
    assert config.num_key_value_heads < config.num_attention_heads
    assert config.tie_word_embeddings


def test_the_record_says_what_it_was_trained_on_and_how_well(splits):
    (record,) = results.read_all("tiny_training").values()
    last = max(row["epoch"] for row in record["rows"])
    final = {row["split"]: row["bits_per_byte"] for row in record["rows"] if row["epoch"] == last}
    assert final["heldout"] <= 0.90
    assert record["recipe"] == train.Recipe().__dict__
    assert record["corpus"].keys() == set(corpus.SPLITS)
    described = {name: corpus.describe(documents) for name, documents in splits.items()}
    if record["corpus"]["train"]["python"] == described["train"]["python"]:
        assert record["corpus"] == described


def test_a_completion_of_def_looks_like_python():
    text = train.sample(MODEL, "def ", tokens=40, temperature=0)
    first, second = text.splitlines()[:2]
    assert re.fullmatch(r"def [a-z_]\w*\(.*\):", first), text
    assert second.startswith("    "), text


def test_the_model_predicts_text_that_it_has_not_seen(tok, splits):
    """The first window of the four longest held-out library modules."""
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    library = [d for d in splits["heldout"] if not corpus.is_test(d.path)]
    bits = n_bytes = 0
    for document in sorted(library, key=lambda d: len(d.text))[-4:]:
        tokens = tok.encode(document.text)[:2047]
        size = len(tok.decode(tokens).encode())
        bits += train.bits_per_byte(model, torch.tensor([0, *tokens]), size, 2048) * size
        n_bytes += size
    assert bits / n_bytes < 0.9


def test_training_learns(tmp_path):
    """Two small epochs on the CPU, on a text of one repeated line."""
    recipe = train.Recipe(
        vocab_size=300, hidden_size=64, intermediate_size=64, layers=1, heads=1, kv_heads=1, context=32,
        batch_tokens=256, epochs=3, warmup_steps=2, dropout=0.0,
    )  # fmt: skip
    stream = np.tile(np.arange(1, 33, dtype=np.uint16), 60)
    np.savez_compressed(tmp_path / "tokens.npz", train=stream, validation=stream[:200], heldout=stream[:200])
    sizes = {"train": len(stream), "validation": 200, "heldout": 200}
    (tmp_path / "corpus.json").write_text(json.dumps({name: {"bytes": n} for name, n in sizes.items()}))
    (tmp_path / "tokenizer").mkdir()
    rows = train.fit(tmp_path, recipe, out=tmp_path / "model", device="cpu")
    held = [row["bits_per_byte"] for row in rows if row["split"] == "heldout"]
    assert len(held) == 3
    assert held[-1] < held[0] - 1
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert loaded.dtype == torch.bfloat16
