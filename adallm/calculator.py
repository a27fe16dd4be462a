"""A calculator for a notebook: what one model takes on one card, computed by ``memory.py``.

``answer`` is the whole of it, as Markdown; ``show`` puts it under controls of ipywidgets.
"""

from __future__ import annotations

from typing import Any

from adallm.hardware import GPUS
from adallm.memory import CACHES, GIB, RESERVED, SHARE, WEIGHTS, cache_bytes, fit
from adallm.models import MODELS
from adallm.text import table

CONTEXTS = tuple(1 << i for i in range(8, 18))
_ID = "adallm-kv-calculator"
_shown: list[Any] = []


def answer(model: str, gpu: str, weights: str, cache: str, tokens: int) -> str:
    """A Markdown table of GiB and a sentence on what fits.

    Args:
        model, gpu, weights, cache: names in ``MODELS``, ``GPUS``, ``WEIGHTS`` and ``CACHES``.
        tokens: of a sequence.

    Raises:
        ValueError: a name that is none of those; no tokens.
    """
    for what, name, known in (("model", model, MODELS), ("gpu", gpu, GPUS)):
        if name not in known:
            raise ValueError(f"{what} {name!r}; supported: {', '.join(known)}")
    found = fit(MODELS[model], GPUS[gpu], weights=weights, cache=cache, tokens=tokens)
    of_sequence = cache_bytes(MODELS[model], tokens, cache)
    whole = GPUS[gpu].memory_mib / 1024
    rows = [
        (f"memory of {gpu}, as its driver counts it", f"{whole:.2f}"),
        (f"left free: {1 - SHARE:.0%}", f"{(SHARE - 1) * whole:.2f}"),
        ("activations and CUDA graphs, an allowance", f"{-RESERVED / GIB:.2f}"),
        (f"weights in {WEIGHTS[weights]}", f"{-found.weights / GIB:.2f}"),
        ("**room for the cache**", f"**{found.room / GIB:.2f}**"),
        (f"a sequence of {tokens:,} tokens in {CACHES[cache][0]}", f"{of_sequence / GIB:.3f}"),
    ]
    return table((model, "GiB"), rows, align="lr", markdown=True) + f"\n\n{_verdict(found, model)}"


def _verdict(found: Any, model: str) -> str:
    if found.bound == "weights":
        return f"**The weights do not fit**: {-found.room / GIB:.2f} GiB are missing before the first token."
    positions = MODELS[model]["max_position_embeddings"]
    longest = f"One sequence can have **{found.context:,} tokens**"
    longest += ", all of the model's positions" if found.bound == "positions" else f" of the model's {positions:,}"
    if found.tokens > positions:
        return f"{longest}; {found.tokens:,} are more than the model has."
    return f"{longest}; **{found.batch:,} sequences** of {found.tokens:,} tokens fit side by side."


def show() -> None:
    """Display the controls with the answer below. Without a kernel there is a line of text in their place.

    The view has the same id in every run, so that a notebook that is run again stays the same file.
    """
    import ipywidgets
    from IPython.display import Markdown, display

    # A second widget of this id would take the first one's messages.
    while _shown:
        _shown.pop().close()
    controls = {
        "model": ipywidgets.Dropdown(options=list(MODELS), description="model"),
        "gpu": ipywidgets.Dropdown(options=list(GPUS), description="card"),
        "weights": ipywidgets.Dropdown(
            options=[(title, name) for name, title in WEIGHTS.items()], value="nvfp4", description="weights"
        ),
        "cache": ipywidgets.Dropdown(
            options=[(title, name) for name, (title, _) in CACHES.items()], value="fp8", description="cache"
        ),
        "tokens": ipywidgets.SelectionSlider(
            options=[(f"{n:,}", n) for n in CONTEXTS], value=8192, description="tokens", continuous_update=False
        ),
    }
    out = ipywidgets.interactive_output(lambda **chosen: display(Markdown(answer(**chosen))), controls)
    box = ipywidgets.VBox([*controls.values(), out], model_id=_ID)
    _shown.append(box)
    kind = "application/vnd.jupyter.widget-view+json"
    view = {"version_major": 2, "version_minor": 0, "model_id": _ID}
    without = "The controls need a running kernel: open this notebook with `make lab`."
    display({kind: view, "text/plain": without}, raw=True)
