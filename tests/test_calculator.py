"""``calculator.py``: the answer is ``memory``'s, and the controls lead to it."""

import ipywidgets
import pytest

from adallm import calculator, memory
from adallm.hardware import GPUS
from adallm.models import MODELS


def test_the_answer_is_that_of_memory():
    said = calculator.answer("Llama-3.1-8B", "L4", "nvfp4", "bf16", 8192)
    found = memory.fit(MODELS["Llama-3.1-8B"], GPUS["L4"], weights="nvfp4", cache="bf16", tokens=8192)
    assert f"**{found.context:,} tokens** of the model's 131,072" in said
    assert f"**{found.batch:,} sequences** of 8,192 tokens" in said
    table = said.partition("\n\n")[0].splitlines()
    numbers = [float(line.split("|")[2].strip(" *")) for line in table[2:]]
    assert sum(numbers[:4]) == pytest.approx(numbers[4], abs=0.02)
    assert numbers[5] == pytest.approx(8192 * 128 / 2**20, abs=1e-3)


def test_what_does_not_fit_is_said():
    assert "**The weights do not fit**: 1.00 GiB are missing" in calculator.answer(
        "Qwen3-32B", "L4", "nvfp4", "fp8", 512
    )
    said = calculator.answer("Qwen3-8B", "L4", "nvfp4", "fp8", 131072)
    assert "**40,960 tokens**, all of the model's positions; 131,072 are more than the model has" in said


def test_names_that_are_none():
    with pytest.raises(ValueError, match="model 'GPT'; supported: Qwen3-8B"):
        calculator.answer("GPT", "L4", "nvfp4", "fp8", 512)
    with pytest.raises(ValueError, match="gpu 'B200'; supported: RTX 4090"):
        calculator.answer("Qwen3-8B", "B200", "nvfp4", "fp8", 512)


def test_controls_lead_to_the_answer(monkeypatch):
    displayed = []
    monkeypatch.setattr("IPython.display.display", lambda shown, **options: displayed.append(shown))
    calculator.show()
    first, view = displayed
    assert first.data == calculator.answer("Qwen3-8B", "RTX 4090", "nvfp4", "fp8", 8192)
    (box,) = calculator._shown
    assert view["application/vnd.jupyter.widget-view+json"]["model_id"] == box.model_id
    assert "make lab" in view["text/plain"]
    controls = {child.description: child for child in box.children if hasattr(child, "description")}
    controls["model"].value = "Gemma3-27B"
    controls["tokens"].value = 32768
    assert displayed[-1].data == calculator.answer("Gemma3-27B", "RTX 4090", "nvfp4", "fp8", 32768)
    # Shown again, it is one widget still, under the same id.
    calculator.show()
    assert [other.model_id for other in calculator._shown] == [
        view["application/vnd.jupyter.widget-view+json"]["model_id"]
    ]
    assert isinstance(calculator._shown[0], ipywidgets.VBox)
    assert box.comm is None
