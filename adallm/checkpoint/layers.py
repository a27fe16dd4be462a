"""Group the tensors of a directory into layers, and hold them against the declared quantization.

====================  =========================  ==============================================
role                  ModelOpt                   compressed-tensors
====================  =========================  ==============================================
NVFP4 weight          ``weight`` U8 [N, K/2]     ``weight_packed`` U8 [N, K/2]
scale                 ``weight_scale`` F8_E4M3 [N, K/16], both
global_scale          ``weight_scale_2`` F32 []  ``weight_global_scale`` F32 [1], the reciprocal
input_scale           ``input_scale`` F32 []     ``input_global_scale`` F32 [1], the reciprocal
FP8 weight            ``weight`` F8_E4M3 [N, K], both
fp8_scale             ``weight_scale`` [], [N]   ``weight_scale`` [1], [N, 1]
fp8_input_scale       ``input_scale`` F32 []     ``input_scale`` [1]
====================  =========================  ==============================================
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from adallm.checkpoint.directory import Directory
from adallm.checkpoint.errors import fail
from adallm.checkpoint.names import is_linear_weight, split
from adallm.checkpoint.quantization import COMPRESSED_TENSORS, MODELOPT, Quantization, Scheme
from adallm.formats import NVFP4_BLOCK

NVFP4_PARTS = {
    MODELOPT: {
        "weight": "weight",
        "scale": "weight_scale",
        "global_scale": "weight_scale_2",
        "input_scale": "input_scale",
    },
    COMPRESSED_TENSORS: {
        "weight": "weight_packed",
        "scale": "weight_scale",
        "global_scale": "weight_global_scale",
        "input_scale": "input_global_scale",
    },
}
FP8_PARTS = {"weight": "weight", "fp8_scale": "weight_scale", "fp8_input_scale": "input_scale"}
_PART_NAMES = {name for parts in (*NVFP4_PARTS.values(), FP8_PARTS) for name in parts.values()}
# Parts of formats that are not supported; ignoring one would give wrong numbers.
_FOREIGN_PARTS = {"pre_quant_scale", "weight_zero_point", "weight_g_idx", "weight_shape", "weight_scale_inv", "qweight"}
_FUSED_EXPERTS = re.compile(r".*\bexperts\.(gate_up_proj|down_proj)(_blocks|_scales|_packed|_weight_scale.*|_scale)?")

FLOATS = ("BF16", "F16", "F32", "F64")


@dataclass(frozen=True)
class Layer:
    """A module's weight with its scales.

    Attributes:
        module: the module's name.
        format: ``"nvfp4"``, ``"fp8"`` or ``"dense"``.
        shape: of the weight that it stands for; ``[N, K]`` unless dense.
        parts: tensor names by role (the table above); ``{"weight": name}`` for dense.
    """

    module: str
    format: str
    shape: tuple[int, ...]
    parts: dict[str, str]

    @property
    def weight_name(self) -> str:
        """``<module>.weight``, whatever the stored weight is called."""
        return f"{self.module}.weight".removeprefix(".")


def group_layers(
    directory: Directory, quantization: Quantization | None, second: Quantization | None
) -> tuple[dict[str, Layer], dict[str, Layer]]:
    """Layers by module, and for every tensor that belongs to one, its layer.

    Raises:
        CheckpointError: a part is missing, has no weight or the wrong dtype or shape; a weight that the configs say is
            quantized is dense or the reverse; parts of an unsupported format.
    """
    modules: dict[str, dict[str, str]] = {}
    for name in directory.files:
        module, parameter = split(name)
        if parameter in _FOREIGN_PARTS:
            fail(directory.file(name), "belongs to a format that is not supported", tensor=name)
        if _FUSED_EXPERTS.fullmatch(name) and directory.entry(name).dtype not in FLOATS:
            fail(directory.file(name), "quantized experts in one 3-D tensor are not supported", tensor=name)
        if parameter in _PART_NAMES:
            modules.setdefault(module, {})[parameter] = name
    layers = {
        module: _layer(directory, quantization, module, parts)
        for module, parts in modules.items()
        # A bare scale with no weight beside it may be a parameter that a model happens to name so; dense models only.
        if quantization is not None or "weight" in parts or "weight_packed" in parts
    }
    for layer in layers.values():
        _check_declared(directory, layer, quantization)
        _check_declared(directory, layer, second)
    if quantization is not None:
        _check_input_scales(directory, layers, quantization)
    return layers, {name: layer for layer in layers.values() for name in layer.parts.values()}


def _layer(directory: Directory, quantization: Quantization | None, module: str, parts: dict[str, str]) -> Layer:
    weight = parts.get("weight_packed") or parts.get("weight")
    if weight is None:
        orphan, layout = next(iter(parts.values())), MODELOPT if quantization is None else quantization.layout
        missing = f"{module}.{NVFP4_PARTS[layout]['weight']}"
        fail(directory.file(orphan), f"is missing, but {orphan} is there", tensor=missing)
    dtype, shape = directory.entry(weight).dtype, directory.entry(weight).shape
    packed = dtype == "U8" or "weight_packed" in parts
    if (packed or dtype == "F8_E4M3") and quantization is None:
        fail(directory.file(weight), f"is {dtype}, but no config declares a quantization", tensor=weight)
    if packed:
        return _nvfp4_layer(directory, quantization.layout, module, parts)
    if dtype == "F8_E4M3":
        return _fp8_layer(directory, module, parts)
    if dtype not in FLOATS:
        fail(
            directory.file(weight), f"is {dtype}; weights are {', '.join(FLOATS)}, F8_E4M3 or packed U8", tensor=weight
        )
    extra = next((name for parameter, name in parts.items() if parameter != "weight"), None)
    if extra is not None:
        fail(directory.file(extra), f"is a scale, but {weight} is {dtype}, not quantized", tensor=extra)
    return Layer(module, "dense", shape, {"weight": weight})


def _nvfp4_layer(directory: Directory, layout: str, module: str, parts: dict[str, str]) -> Layer:
    names = NVFP4_PARTS[layout]
    found = _roles(directory, module, parts, names, f"the {layout} layout of NVFP4")
    _require(directory, module, found, names, ("weight", "scale", "global_scale"))
    shape = directory.entry(found["weight"]).shape
    if len(shape) != 2 or 0 in shape or shape[1] * 2 % NVFP4_BLOCK:
        _fail_entry(directory, found["weight"], f"U8 [N, K/2] with K a multiple of {NVFP4_BLOCK}")
    rows, columns = shape[0], shape[1] * 2
    _expect(directory, found["weight"], "U8", [shape])
    _expect(directory, found["scale"], "F8_E4M3", [(rows, columns // NVFP4_BLOCK)], beside=found["weight"])
    for role in ("global_scale", "input_scale"):
        if role in found:
            _expect(directory, found[role], "F32", [(), (1,)])
    return Layer(module, "nvfp4", (rows, columns), found)


def _fp8_layer(directory: Directory, module: str, parts: dict[str, str]) -> Layer:
    found = _roles(directory, module, parts, FP8_PARTS, "FP8")
    _require(directory, module, found, FP8_PARTS, ("weight", "fp8_scale"))
    shape = directory.entry(found["weight"]).shape
    if len(shape) != 2 or 0 in shape:
        _fail_entry(directory, found["weight"], "F8_E4M3 [N, K]")
    for role, shapes in (("fp8_scale", [(), (1,), (shape[0],), (shape[0], 1)]), ("fp8_input_scale", [(), (1,)])):
        if role in found:
            dtype = directory.entry(found[role]).dtype
            dtype = dtype if dtype in ("BF16", "F16") else "F32"
            _expect(directory, found[role], dtype, shapes, beside=found["weight"])
    return Layer(module, "fp8", shape, found)


def _roles(
    directory: Directory, module: str, parts: dict[str, str], names: dict[str, str], what: str
) -> dict[str, str]:
    role_of = {name: role for role, name in names.items()}
    for parameter, name in parts.items():
        if parameter not in role_of:
            fail(directory.file(name), f"is no part of {what}, as which {module} is stored", tensor=name)
    return {role_of[parameter]: name for parameter, name in parts.items()}


def _require(
    directory: Directory, module: str, found: dict[str, str], names: dict[str, str], roles: tuple[str, ...]
) -> None:
    for role in roles:
        if role not in found:
            beside = next(iter(found.values()))
            fail(directory.file(beside), f"is missing, but {beside} is there", tensor=f"{module}.{names[role]}")


def _expect(directory: Directory, name: str, dtype: str, shapes: list[tuple[int, ...]], beside: str = "") -> None:
    entry = directory.entry(name)
    if entry.dtype != dtype or entry.shape not in shapes:
        expected = f"{dtype} {' or '.join(str(list(shape)) for shape in shapes)}"
        if beside:
            expected += f" beside {beside} {list(directory.entry(beside).shape)}"
        _fail_entry(directory, name, expected)


def _fail_entry(directory: Directory, name: str, expected: str) -> None:
    entry = directory.entry(name)
    fail(directory.file(name), f"is {entry.dtype} {list(entry.shape)}; it must be {expected}", tensor=name)


def _check_input_scales(directory: Directory, layers: dict[str, Layer], quantization: Quantization) -> None:
    """All layers of one scheme have a calibrated activation scale or none has."""
    first: dict[Scheme, Layer] = {}
    for layer in layers.values():
        role = {"nvfp4": "input_scale", "fp8": "fp8_input_scale"}.get(layer.format)
        if role is None:
            continue
        other = first.setdefault(quantization.scheme_of(layer.module), layer)
        if (role in layer.parts) != (role in other.parts):
            without, beside = (other, layer) if role in layer.parts else (layer, other)
            name = (NVFP4_PARTS[quantization.layout] if role == "input_scale" else FP8_PARTS)[role]
            fail(
                directory.file(without.parts["weight"]),
                f"is missing, but {beside.parts[role]} is there",
                tensor=f"{without.module}.{name}",
            )


def _check_declared(directory: Directory, layer: Layer, quantization: Quantization | None) -> None:
    weight = layer.parts["weight"]
    if quantization is None or not (layer.format != "dense" or is_linear_weight(weight, layer.shape)):
        return
    scheme = quantization.scheme_of(layer.module)
    declared, file = "dense" if scheme is None else scheme.format, directory.file(weight)
    if declared != layer.format and not (layer.format == "dense" and quantization.may_be_dense(layer.module)):
        fail(file, f"is {layer.format}, but {' and '.join(quantization.files)} says {declared}", tensor=weight)
    if layer.format == "fp8" and scheme is not None:
        name = layer.parts["fp8_scale"]
        numbers = directory.entry(name).numel
        if numbers != (1 if scheme.granularity == "tensor" else layer.shape[0]):
            fail(directory.file(name), f"has {numbers} numbers, but {quantization.files[0]} says one for a "
                                       f"{scheme.granularity}", tensor=name)  # fmt: skip
