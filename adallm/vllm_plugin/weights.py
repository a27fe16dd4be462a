"""The tensors of an NVFP4 layer while vLLM loads a checkpoint: parameters that know what they were given.

vLLM fills a parameter by a loader of its own, which cuts out what a rank of tensor parallelism has, and does not notice
a tensor that never came. ``Weights`` stands between: each tensor's dtype and shape are compared with what the layer
needs before it is copied, and ``collect`` wants all of them to have come. Errors name tensors as the checkpoint does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.parameter import GroupQuantScaleParameter, ModelWeightParameter, PerTensorScaleParameter

from adallm.formats import NVFP4_BLOCK
from adallm.nvfp4 import NVFP4Tensor

_E4M3_NAN = 0x7F


@dataclass(frozen=True)
class Names:
    """What a layout calls the tensors of a layer; ``inputs`` is for activations of 4 bits, which are not used."""

    packed: str
    scale: str
    global_scale: str
    inputs: str
    divides: bool


MODELOPT = Names("weight", "weight_scale", "weight_scale_2", "input_scale", divides=False)
COMPRESSED_TENSORS = Names("weight_packed", "weight_scale", "weight_global_scale", "input_global_scale", divides=True)


@dataclass(eq=False)
class Weights:
    """Of one layer.

    Attributes:
        names: of the layout.
        prefix: of the layer in vLLM's model.
        partitions: output rows of this rank, of each shard that the layer is fused from.
        shards: the last part of the shards' names in the checkpoint.
        arrived: of each parameter the shards that were loaded; None is a tensor that is fused in the checkpoint.
    """

    names: Names
    prefix: str
    partitions: list[int]
    shards: Sequence[str]
    arrived: dict[str, set[Any]] = field(default_factory=dict)

    def create(self, layer: nn.Module, columns: int, loader: Callable[..., None]) -> None:
        """Register the parameters of this rank, ``[N, K/2]``, ``[N, K/16]`` and one global scale for each shard."""
        rows, names = sum(self.partitions), self.names
        kinds = {
            names.packed: (ModelWeightParameter, (rows, columns // 2), torch.uint8),
            names.scale: (GroupQuantScaleParameter, (rows, columns // NVFP4_BLOCK), torch.float8_e4m3fn),
            names.global_scale: (PerTensorScaleParameter, (len(self.partitions),), torch.float32),
            names.inputs: (PerTensorScaleParameter, (len(self.partitions),), torch.float32),
        }
        for name, (kind, shape, dtype) in kinds.items():
            sides = {} if kind is PerTensorScaleParameter else {"input_dim": 1, "output_dim": 0}
            data = torch.empty(shape, dtype=dtype)
            layer.register_parameter(name, kind(data=data, weight_loader=self._checking(layer, name, loader), **sides))

    def _checking(self, layer: nn.Module, name: str, loader: Callable[..., None]) -> Callable[..., None]:
        def load(parameter: nn.Parameter, loaded: Tensor, *args: Any, **kwargs: Any) -> None:
            shard = args[0] if args else next(iter(kwargs.values()), None)
            tensor, expected = self._tensor(name, shard), self._expected(layer, name, shard)
            if loaded.dtype != parameter.dtype or (expected is not None and tuple(loaded.shape) not in expected):
                wanted = " or ".join(str(list(shape)) for shape in expected or ())
                found = f"{loaded.dtype} {list(loaded.shape)}"
                raise ValueError(f"{tensor} is {found}; this layer needs {parameter.dtype} {wanted}".rstrip())
            try:
                loader(parameter, loaded, *args, **kwargs)
            except (AssertionError, RuntimeError) as error:
                raise ValueError(f"{tensor} of {list(loaded.shape)} does not fit: {error}") from error
            self.arrived.setdefault(name, set()).add(shard)

        return load

    def _expected(self, layer: nn.Module, name: str, shard: Any) -> tuple[tuple[int, ...], ...] | None:
        """Shapes that the checkpoint may have; None where vLLM alone knows."""
        if name in (self.names.global_scale, self.names.inputs):
            return ((), (1,))
        rows = _full_rows(layer, shard)
        if rows is None:
            return None
        columns = layer.embedding_dim if isinstance(layer, VocabParallelEmbedding) else layer.input_size
        return ((rows, columns // (2 if name == self.names.packed else NVFP4_BLOCK)),)

    def _tensor(self, name: str, shard: Any) -> str:
        """As it is called in the checkpoint."""
        module, _, last = self.prefix.rpartition(".")
        index = "qkv".index(shard) if isinstance(shard, str) and shard in "qkv" else shard
        if isinstance(index, int) and index < len(self.shards):
            last = self.shards[index]
        return f"{module}.{last}.{name}".lstrip(".")

    def collect(self, layer: nn.Module, *, dummy: bool) -> NVFP4Tensor:
        """The weight that has been loaded. The parameters are removed from the layer.

        Args:
            dummy: nothing was loaded, as with ``--load-format dummy``: random codes.

        Raises:
            ValueError: a tensor never came, or has a scale that is none.
        """
        names = self.names
        packed, scale, number = (getattr(layer, name).data for name in (names.packed, names.scale, names.global_scale))
        if dummy:
            packed.random_(0, 256)
            scale.fill_(1.0)
            number.fill_(64.0 if names.divides else 1 / 64)
        else:
            self._check_arrived()
            self._check_values(scale, number)
        for name in (names.packed, names.scale, names.global_scale, names.inputs):
            delattr(layer, name)
        if bool((number == number[0]).all()):
            number = number[0].clone()
        else:
            # Exact, where vLLM takes the largest for all.
            sizes = torch.tensor(self.partitions, device=number.device)
            number = torch.repeat_interleave(number, sizes)
        if names.divides:
            return NVFP4Tensor(packed, scale, 1 / number, number)
        return NVFP4Tensor(packed, scale, number)

    def _check_arrived(self) -> None:
        for name in (self.names.packed, self.names.scale, self.names.global_scale):
            arrived = self.arrived.get(name, set())
            if None in arrived or len(arrived) == len(self.partitions):
                continue
            shards = range(len(self.partitions)) if len(self.partitions) > 1 else (None,)
            seen = {"qkv".index(shard) if isinstance(shard, str) else shard for shard in arrived}
            missing = [self._tensor(name, shard) for shard in shards if shard not in seen]
            raise ValueError(f"the checkpoint has no {', '.join(missing)}")

    def _check_values(self, scale: Tensor, number: Tensor) -> None:
        for i, value in enumerate(number.tolist()):
            if not 0 < value < math.inf:
                shard = i if len(self.partitions) > 1 else None
                raise ValueError(
                    f"{self._tensor(self.names.global_scale, shard)} is {value}; it must be finite and positive"
                )
        if scale.numel() and int(scale.view(torch.uint8).max()) >= _E4M3_NAN:
            row = int((scale.view(torch.uint8) >= _E4M3_NAN).any(1).nonzero()[0])
            shard = sum(row >= sum(self.partitions[: i + 1]) for i in range(len(self.partitions)))
            shard = shard if len(self.partitions) > 1 else None
            raise ValueError(f"{self._tensor(self.names.scale, shard)} has a block scale that is negative or NaN")


def _full_rows(layer: nn.Module, shard: Any) -> int | None:
    """Rows of a shard before it is divided among ranks."""
    if isinstance(layer, QKVParallelLinear):
        heads = {"q": layer.total_num_heads, "k": layer.total_num_kv_heads, "v": layer.total_num_kv_heads}
        size = getattr(layer, "v_head_size", layer.head_size) if shard == "v" else layer.head_size
        return heads[shard] * size if shard in heads else None
    if isinstance(layer, MergedColumnParallelLinear):
        return layer.output_sizes[shard] if isinstance(shard, int) else None
    if isinstance(layer, VocabParallelEmbedding):
        return layer.org_vocab_size
    plain = type(layer) in (ColumnParallelLinear, RowParallelLinear, ReplicatedLinear)
    return layer.output_size if plain else None


def shard_names(prefix: str, packed_modules: Mapping[str, Sequence[str]], count: int) -> Sequence[str]:
    """The last parts of the names that a fused layer's shards have in the checkpoint."""
    last = prefix.rpartition(".")[2]
    found = packed_modules.get(last, ())
    return found if len(found) == count else ()
