"""What is in front of a linear layer, as vLLM compiles it: ``silu(gate_up[:, :K]) * gate_up[:, K:]`` and
``adallm::nvfp4_linear`` behind it become ``adallm::nvfp4_linear_gated``, and the RMSNorm of a sum
``adallm::nvfp4_linear_normed``: one pass over memory and one launch fewer where that product is in FP8, kernels of ours
in place of Inductor's where it is not.

It is a pass of Inductor over the graph that is lowered next, by a name among ``post_grad_fusion_options``: these are
in the keys of Inductor's and of vLLM's caches, and nothing of vLLM is replaced. Where ``silu_and_mul`` is an operator
of vLLM's, the RMSNorm is none of its IR, and without ``torch.compile``, there is nothing to find.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import operator
from pathlib import Path
from typing import Any

import torch
from torch._inductor import config
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true, sym_eq

from adallm.formats import NVFP4_BLOCK
from adallm.fp8 import INPUT_DTYPES

NAME = "adallm_linear"
# What was compiled by another version of this file is compiled again.
_VERSION = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]

aten, prims = torch.ops.aten, torch.ops.prims
_VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)


def use(wanted: bool, *, norms: bool = True) -> None:
    """Fuse in what this process compiles from now on, or do not; again is no error.

    Args:
        norms: those too, which passes of vLLM's may be looking for.
    """
    options = {name: given for name, given in config.post_grad_fusion_options.items() if name != NAME}
    if wanted:
        # Here: of Inductor's own, and needed by those alone who want it.
        from torch._inductor.fx_passes.split_cat import POST_GRAD_PATTERNS

        POST_GRAD_PATTERNS[NAME] = _Pass(norms)  # first: a name that is not there is an error
        options[NAME] = {"version": _VERSION, "norms": norms}
    config.post_grad_fusion_options = options


def used() -> bool:
    """Whether this process fuses what it compiles."""
    return NAME in config.post_grad_fusion_options


def norms() -> bool:
    """Whether RMSNorms are among that."""
    return config.post_grad_fusion_options.get(NAME, {}).get("norms", False)


class _Pass:
    """Stands for a ``PatternMatcherPass`` of Inductor, whose patterns do not reach across views."""

    pass_name = NAME

    def __init__(self, norms: bool = True) -> None:
        self._fuse = (_gated, _normed) if norms else (_gated,)

    def apply(self, graph: Graph) -> int:
        """How many were fused."""
        from torch._dynamo.utils import counters

        from adallm.kernels import ops  # noqa: F401  defines the operators

        found = 0
        # In this order: a layer is looked for in front of a gated product.
        for fuse in self._fuse:
            for linear in list(graph.find_nodes(op="call_function", target=torch.ops.adallm.nvfp4_linear.default)):
                found += fuse(linear)
        counters["inductor"][NAME] += found
        return found


def _gated(linear: Node) -> bool:
    if (product := _front(linear)) is None or (gate_up := _halves_of(product)) is None:
        return False
    with linear.graph.inserting_before(linear):
        fused = linear.graph.call_function(torch.ops.adallm.nvfp4_linear_gated.default, (gate_up, *linear.args[2:]))
    # Inductor would give gate_up the strides that x had.
    fused.meta = {name: value for name, value in linear.meta.items() if name != "eager_input_vals"}
    linear.replace_all_uses_with(fused)
    _erase(linear, until=gate_up)
    return True


def _normed(linear: Node) -> bool:
    first = _front(linear)
    if first is None or first.target is not operator.getitem or first.args[1] != 0 or not _is_norm(first.args[0]):
        return False
    norm = first.args[0]
    # What a layer has is an input of the graph. The new node is where the RMSNorm was, in front of who takes the sum.
    if any(node.op not in ("placeholder", "get_attr") for node in linear.all_input_nodes if node is not linear.args[0]):
        return False
    x, residual, weight, eps = norm.args[:4]
    with linear.graph.inserting_before(norm):
        fused = linear.graph.call_function(
            torch.ops.adallm.nvfp4_linear_normed.default, (x, residual, weight, eps, *linear.args[2:])
        )
        out, total = (linear.graph.call_function(operator.getitem, (fused, i)) for i in range(2))
    out.meta, total.meta = dict(linear.meta), {"val": norm.meta["val"][1]}
    out.meta.pop("eager_input_vals", None)
    fused.meta = {"val": (out.meta["val"], total.meta["val"])}
    linear.replace_all_uses_with(out)
    for node in list(norm.users):
        if node.args[1] == 1:
            node.replace_all_uses_with(total)
            linear.graph.erase_node(node)
    _erase(linear, until=x)
    return True


def _is_norm(node: Node) -> bool:
    """``vllm_ir.fused_add_rms_norm``, of matrices of one dtype and of all of a row."""
    if node.op != "call_function" or str(node.target) != "vllm_ir.fused_add_rms_norm.default" or node.kwargs:
        return False
    x, residual, weight, _, *rest = node.args
    if any(part is not None for part in rest) or weight is None or "val" not in node.meta:
        return False
    value, other, of_weight = (part.meta["val"] for part in (x, residual, weight))
    return (
        value.dim() == 2
        and value.dtype == other.dtype
        and of_weight.dim() == 1
        and of_weight.dtype in INPUT_DTYPES
        and value.shape[1] % NVFP4_BLOCK == 0
        and statically_known_true(sym_eq(tuple(value.shape), tuple(other.shape)))
    )


def _front(linear: Node) -> Node | None:
    """What computes the tokens of a layer and of it alone, views left out; None for tokens that are quantized."""
    if linear.kwargs or linear.args[1] is not None:
        return None
    chain = _through_views(linear.args[0])
    return None if any(len(node.users) != 1 for node in chain) else chain[-1]


def _through_views(node: Node) -> list[Node]:
    """The node, and those behind it as long as each is a view ``[M, K]`` of the next, which is ``[M, K]``."""
    found = [node]
    while node.target in _VIEWS and statically_known_true(sym_eq(_shape(node), _shape(node.args[0]))):
        node = node.args[0]
        found.append(node)
    return found


def _shape(node: Node) -> tuple[Any, ...]:
    return tuple(node.meta["val"].shape)


def _halves_of(product: Node) -> Node | None:
    """What ``product`` is the gated half of, an ``nvfp4_linear``; None if it is anything else."""
    for pattern in _patterns():
        if not (match := pattern.match(product)):
            continue
        source, half, stop = (match.kwargs[name] for name in ("gate_up", "half", "stop"))
        gate_up = _through_views(source)[-1]
        value = source.meta["val"]
        if (
            gate_up.target == torch.ops.adallm.nvfp4_linear.default
            and isinstance(half, int)
            and isinstance(stop, int)
            and value.dim() == 2
            and 2 * half == value.shape[1] <= stop
            and half % NVFP4_BLOCK == 0
            and match.kwargs["dtype"] == value.dtype
        ):
            return gate_up
    return None


@functools.cache
def _patterns() -> tuple[Any, ...]:
    """The product, either way round; Inductor has ``silu(a)`` as ``a / (1 + exp(-a))``, in FP32."""
    from torch._inductor.pattern_matcher import CallFunction, KeywordArg

    gate_up, half = KeywordArg("gate_up"), KeywordArg("half")
    gate = CallFunction(aten.slice.Tensor, gate_up, 1, 0, half)
    up = CallFunction(aten.slice.Tensor, gate_up, 1, half, KeywordArg("stop"))
    a = CallFunction(prims.convert_element_type.default, gate, torch.float32, _users=2)
    below = CallFunction(aten.add.Tensor, CallFunction(aten.exp.default, CallFunction(aten.neg.default, a)), 1)
    quotient = CallFunction(aten.div.Tensor, a, below)
    silu = CallFunction(prims.convert_element_type.default, quotient, KeywordArg("dtype"))
    return tuple(CallFunction(aten.mul.Tensor, *factors) for factors in itertools.permutations((silu, up)))


def _erase(node: Node, *, until: Node) -> None:
    """A node without users, and what then has none."""
    if node is until or node.users or node.op != "call_function":
        return
    behind = node.all_input_nodes
    node.graph.erase_node(node)
    for one in behind:
        _erase(one, until=until)
