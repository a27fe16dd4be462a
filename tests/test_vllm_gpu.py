"""The plugin inside vLLM on a GPU: the bundled model's own words, by our kernels, in CUDA graphs."""

import copy
import inspect
import json
import os
import subprocess
import sys

import pytest
import torch

from adallm import checkpoint, evaluate, fp8, hf_model
from adallm.linear import FP8Linear

pytestmark = [pytest.mark.gpu, pytest.mark.vllm, pytest.mark.slow]

MODEL = evaluate.BUNDLED_MODEL
PROMPTS = ("def __init__(self", "import os\nimport sys\n", "class TestCase(unittest.TestCase):\n    def")
# Logits of BF16 are about 8 here, one unit of which is 2^-5; two candidates closer than this may change places.
NEAR = 0.15
TOKENS = 64
# With FP8 activations a bit more or less in BF16 takes some to the next E4M3 number: how far that moves the likeliest
# logits is measured, and two candidates within so many standard deviations of their difference may change places.
DEVIATIONS = 4
LIKELIEST = 16

# An engine of its own process: two do not fit beside each other, and its memory is gone with it.
ENGINE = """
import json, sys
import vllm
given = json.loads(sys.argv[1])
if __name__ == "__main__":
    llm = vllm.LLM(given["model"], max_model_len=512, seed=0, gpu_memory_utilization=0.3, **given["options"])
    sampling = vllm.SamplingParams(temperature=0, max_tokens=given["tokens"], logprobs=2)
    outputs = llm.generate(given["prompts"], sampling, use_tqdm=False)
    backends = {
        layer.get_attn_backend().get_name()
        for layer in llm.llm_engine.vllm_config.compilation_config.static_forward_context.values()
        if hasattr(layer, "get_attn_backend")
    }
    found = {
        "quantization": llm.llm_engine.vllm_config.model_config.quantization,
        "backends": sorted(backends),
        "outputs": [[list(o.prompt_token_ids), list(o.outputs[0].token_ids)] for o in outputs],
    }
    print("FOUND " + json.dumps(found), flush=True)
"""


def generated(model, prompts=PROMPTS, **options):
    given = {"model": str(model), "prompts": prompts, "tokens": TOKENS, "options": options}
    one = {} if options.get("tensor_parallel_size", 1) > 1 else {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    # Greedy sampling does not need FlashInfer's, which is compiled when an engine starts.
    fixed = {"VLLM_USE_FLASHINFER_SAMPLER": "0"}
    done = subprocess.run(
        [sys.executable, "-c", ENGINE, json.dumps(given)],
        env=os.environ | fixed | one,
        capture_output=True,
        text=True,
        timeout=580,
    )
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")] or [None]
    assert line is not None, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads(line[6:]), done.stdout + done.stderr


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    pytest.importorskip("vllm", reason="needs vLLM")
    path = tmp_path_factory.mktemp("gpu") / "model"
    checkpoint.convert(MODEL, path, layout="modelopt", progress=False)
    return path


def assert_greedy(found, path, form, edit=None):
    """Each token is the reference's likeliest, given those before it, or as good as that.

    ``edit`` makes layers of the reference FP8.
    """
    reference = hf_model.load(path, hf_model.FORMATS[form])
    if edit is not None:
        edit(reference)
    fp8_activations = hf_model.FORMATS[form].activations == "fp8" or edit is not None
    exact = copy.deepcopy(reference).float() if fp8_activations else None
    for prompt, tokens in found["outputs"]:
        logits, near = words(reference, prompt, tokens), NEAR
        if exact is not None:
            moved = (logits - words(exact, prompt, tokens)).gather(1, logits.topk(LIKELIEST, -1).indices)
            near = DEVIATIONS * 2**0.5 * float((moved - moved.mean(1, keepdim=True)).std())
            assert near < 1
        lost = logits.amax(-1) - logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        passed_over = [(i, float(x)) for i, x in enumerate(lost) if x]
        print(form, "near-tie:", near, "passed over:", passed_over)
        assert all(x <= near for _, x in passed_over), (prompt, near, passed_over)
        assert len(passed_over) < 0.1 * len(tokens)


def words(model, prompt, tokens):
    """Logits of each token, FP32 ``[len(tokens), V]``."""
    with torch.no_grad():
        return model(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1].float()


@pytest.mark.parametrize("form", ["nvfp4", "nvfp4-w4a8", "nvfp4-fp8kv"])
def test_greedy_words_are_the_references(quantized, form):
    options = {"additional_config": {"adallm": {"activations": hf_model.FORMATS[form].activations}}}
    options |= {"attention_backend": "CUSTOM"}
    if form == "nvfp4-fp8kv":
        options["kv_cache_dtype"] = "fp8"
    found, log = generated(quantized, **options)
    assert (found["quantization"], found["backends"]) == ("adallm", ["CUSTOM"])
    assert "adallm decode, vLLM FlashAttention" in log
    assert_greedy(found, quantized, form)


def test_a_prompt_that_comes_in_pieces(quantized):
    """Longer than a step may be, beside others that are being generated: pieces behind what the cache has."""
    source = inspect.getsource(inspect)
    prompts = (source[:300], *PROMPTS, source[2000:2900])
    options = {"additional_config": {"adallm": {"activations": "bf16"}}, "max_num_batched_tokens": 48}
    found, _ = generated(
        quantized, prompts, attention_backend="CUSTOM", kv_cache_dtype="fp8", max_num_seqs=8, **options
    )
    assert max(len(prompt) for prompt, _ in found["outputs"]) > 4 * 48
    assert_greedy(found, quantized, "nvfp4-fp8kv")


def test_a_head_in_fp8(quantized):
    def edit(reference):
        dense = reference.lm_head.weight.detach()
        reference.lm_head = FP8Linear(fp8.quantize(dense, granularity="row"))

    options = {"additional_config": {"adallm": {"activations": "bf16", "lm_head": "fp8"}}}
    found, log = generated(quantized, attention_backend="CUSTOM", kv_cache_dtype="fp8", **options)
    assert "lm_head fp8: quantized here" in log
    assert_greedy(found, quantized, "nvfp4-fp8kv", edit)


def test_two_gpus(quantized):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA GPUs")
    options = {"additional_config": {"adallm": {"activations": "bf16"}}, "tensor_parallel_size": 2}
    # FlashInfer's all-reduce with norms, a default on Hopper, not on Ada, would be compiled by nvcc for minutes.
    options["compilation_config"] = {"pass_config": {"fuse_allreduce_rms": False}}
    found, _ = generated(quantized, attention_backend="CUSTOM", kv_cache_dtype="fp8", **options)
    assert found["quantization"] == "adallm"
    assert_greedy(found, quantized, "nvfp4-fp8kv")
