"""A gated MLP as vLLM compiles it: ``silu(gate_up[:, :K]) * gate_up[:, K:]`` and ``adallm::nvfp4_linear`` behind it
become ``adallm::nvfp4_linear_gated``, one pass over memory and one launch fewer where that product is in FP8.

It is a pass of Inductor over the graph that is lowered next, by a name among ``post_grad_fusion_options``: these are
in the keys of Inductor's and of vLLM's caches, and nothing of vLLM is replaced. Where ``silu_and_mul`` is an operator
of vLLM's, and without ``torch.compile``, there is nothing to find.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
from pathlib import Path
from typing import Any

import torch
from torch._inductor import config
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true, sym_eq

from adallm.formats import NVFP4_BLOCK

NAME = "adallm_gated"
# What was compiled by another version of this file is compiled again.
_VERSION = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]

aten, prims = torch.ops.aten, torch.ops.prims
_VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)


def use(wanted: bool) -> None:
    """Fuse in what this process compiles from now on, or do not; again is no error."""
    options = {name: given for name, given in config.post_grad_fusion_options.items() if name != NAME}
    if wanted:
        # Here: of Inductor's own, and needed by those alone who want it.
        from torch._inductor.fx_passes.split_cat import POST_GRAD_PATTERNS

        POST_GRAD_PATTERNS[NAME] = _Pass()  # first: a name that is not there is an error
        options[NAME] = {"version": _VERSION}
    config.post_grad_fusion_options = options


def used() -> bool:
    """Whether this process fuses what it compiles."""
    return NAME in config.post_grad_fusion_options


class _Pass:
    """Stands for a ``PatternMatcherPass`` of Inductor, whose patterns do not reach across views."""

    pass_name = NAME

    def apply(self, graph: Graph) -> int:
        """How many were fused."""
        from torch._dynamo.utils import counters

        from adallm.kernels import ops  # noqa: F401  defines the operators

        found = 0
        for linear in graph.find_nodes(op="call_function", target=torch.ops.adallm.nvfp4_linear.default):
            found += _fuse(linear)
        counters["inductor"][NAME] += found
        return found


def _fuse(linear: Node) -> bool:
    if linear.kwargs or linear.args[1] is not None:
        return False
    chain = _through_views(linear.args[0])
    product = chain[-1]
    if any(len(node.users) != 1 for node in chain) or (gate_up := _halves_of(product)) is None:
        return False
    graph = linear.graph
    with graph.inserting_before(linear):
        fused = graph.call_function(torch.ops.adallm.nvfp4_linear_gated.default, (gate_up, *linear.args[2:]))
    # Inductor would give gate_up the strides that x had.
    fused.meta = {name: value for name, value in linear.meta.items() if name != "eager_input_vals"}
    linear.replace_all_uses_with(fused)
    _erase(linear, until=gate_up)
    return True


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
