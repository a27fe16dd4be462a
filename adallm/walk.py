"""Text through a model one decoder layer at a time: the second moments of what enters its linear layers.

Beside the model there are the hidden states of all windows, as they enter one layer, and the moments of that layer's
inputs. On a GPU a layer is while its turn lasts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# From the names of linear layers to their second moments: [K, K], or [K] if only the diagonal is asked for.
Moments = dict[str, Tensor]


class _Calls:
    """A model whose decoder layers are passed by, and what each would have been called with."""

    def __init__(self, model: PreTrainedModel, layers: Sequence[nn.Module]) -> None:
        self._model, self._layers = model, layers
        # By length of the window: that is all that masks and rotary embeddings depend on.
        self._others: dict[int, list[tuple[tuple, dict[str, Any]]]] = {}

    def enter(self, window: Sequence[int]) -> Tensor:
        """The hidden states that would enter the first layer, ``[1, T, D]``."""
        others = []
        entered: Tensor

        def note(_: int, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            nonlocal entered
            entered = hidden
            others.append((args, kwargs))
            return hidden

        with self._passed_by(note):
            # Without the head: no logits are needed.
            self._model.base_model(torch.tensor([window]), use_cache=False)
        self._others.setdefault(len(window), others)
        return entered

    def layer(self, index: int, hidden: Tensor) -> Tensor:
        """What a layer makes of hidden states."""
        args, kwargs = self._others[hidden.shape[1]][index]
        out = self._layers[index](hidden, *_to(args, hidden.device), **_to(kwargs, hidden.device))
        return out[0] if isinstance(out, tuple) else out

    def leave(self, window: Sequence[int], hidden: Tensor) -> None:
        """All behind the last layer, the head too."""
        with self._passed_by(lambda *_, **__: hidden):
            self._model(torch.tensor([window]), use_cache=False)

    @contextlib.contextmanager
    def _passed_by(self, call: Callable[..., Tensor]) -> Iterator[None]:
        forwards = [layer.forward for layer in self._layers]
        for index, layer in enumerate(self._layers):
            layer.forward = lambda *args, index=index, **kwargs: call(index, *args, **kwargs)
        try:
            yield
        finally:
            for layer, forward in zip(self._layers, forwards, strict=True):
                layer.forward = forward


@torch.inference_mode()
def walk(
    model: PreTrainedModel,
    windows: Sequence[Sequence[int]],
    wanted: Collection[str],
    visit: Callable[[Moments, Callable[[str], nn.Linear]], bool],
    *,
    ready: Callable[[Sequence[str], Callable[[str], nn.Linear]], bool] = lambda *_: False,
    diagonal: bool,
    device: str,
    title: str,
    progress: bool,
) -> None:
    """Show ``visit`` the moments of each decoder layer, and of what is behind the last, in order.

    Args:
        model: on the CPU.
        windows: of tokens.
        wanted: names of linear layers.
        visit: takes the moments and a function from name to module, whose weight it may change; True if it did, so that
            later layers are given what they then get.
        ready: takes the wanted names of a decoder layer, or those behind the last, before it runs, and the same
            function; True if their weights are as ``visit`` would leave them, which is then not called.
        diagonal: the diagonals alone.
        device: where a layer runs.

    Raises:
        ValueError: a model without a list of decoder layers; a name that is no linear layer, or sees no token; inputs
            that are NaN or infinite. The layer is named.
    """
    decoder = model.get_decoder()
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise ValueError(f"{type(model).__name__} has no list of decoder layers; supported: text models that have one")
    modules = dict(model.named_modules())
    for name in wanted:
        if not isinstance(modules.get(name), nn.Linear):
            raise ValueError(f"{name} is no linear layer of {type(model).__name__}; ignore it, or take another rule")
    inside = [[name for name in wanted if any(modules[name] is m for m in layer.modules())] for layer in layers]
    behind = sorted(set(wanted).difference(*inside), key=list(wanted).index)
    calls, tokens = _Calls(model, layers), sum(map(len, windows))
    with tqdm(total=tokens * len(layers), unit=" tokens", unit_scale=True, desc=title, disable=not progress) as bar:
        states = [calls.enter(window).to(device) for window in windows]
        for index, (layer, names) in enumerate(zip(layers, inside, strict=True)):
            layer.to(device)
            done = bool(names) and ready(names, modules.__getitem__)
            with _observed({} if done else {name: modules[name] for name in names}, diagonal) as moments:
                passed = []
                for state in states:
                    passed.append(calls.layer(index, state))
                    bar.update(state.shape[1])
            if not done:
                _check_seen(names, moments)
                if names and visit(moments, modules.__getitem__):
                    passed = [calls.layer(index, state) for state in states]
            states = passed
            layer.to("cpu")
        if behind and not ready(behind, modules.__getitem__):
            with _observed({name: modules[name] for name in behind}, diagonal) as moments:
                for window, state in zip(windows, states, strict=True):
                    calls.leave(window, state.cpu())
            _check_seen(behind, moments)
            visit(moments, modules.__getitem__)


@contextlib.contextmanager
def _observed(modules: dict[str, nn.Module], diagonal: bool) -> Iterator[Moments]:
    moments: Moments = {}

    def observer(name: str) -> Callable[[nn.Module, tuple], None]:
        def observe(_: nn.Module, args: tuple) -> None:
            x = args[0].detach().flatten(0, -2).float()
            found = x.square().sum(0) if diagonal else x.T @ x
            if not torch.isfinite(found).all():
                raise ValueError(f"{name}: {int((~torch.isfinite(x)).sum())} of {x.numel()} inputs are not finite")
            moments[name] = moments.get(name, 0) + found.double()

        return observe

    hooks = [module.register_forward_pre_hook(observer(name)) for name, module in modules.items()]
    try:
        yield moments
    finally:
        for hook in hooks:
            hook.remove()


def _check_seen(names: Sequence[str], moments: Moments) -> None:
    if missing := [name for name in names if name not in moments]:
        raise ValueError(f"{missing[0]} is given no token of the text; ignore it, or give more text")


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple | list):
        return type(value)(_to(entry, device) for entry in value)
    return {key: _to(entry, device) for key, entry in value.items()} if isinstance(value, dict) else value
