"""Read the quantization that the configs of a directory declare, in either layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from adallm.checkpoint.directory import CONFIG, HF_QUANT_CONFIG, Directory
from adallm.checkpoint.errors import fail
from adallm.checkpoint.quantization import COMPRESSED_TENSORS, MODELOPT, Group, Quantization, Scheme
from adallm.formats import NVFP4_BLOCK

NVFP4_FORMAT, FP8_FORMATS = "nvfp4-pack-quantized", ("float-quantized", "naive-quantized")
MODELOPT_SCHEMES = {
    "NVFP4": Scheme("nvfp4", "block", "nvfp4"),
    "W4A16_NVFP4": Scheme("nvfp4", "block", None),
    "FP8": Scheme("fp8", "tensor", "fp8"),
    "FP8_PER_CHANNEL_PER_TOKEN": Scheme("fp8", "channel", "fp8-token"),
}
MIXED_PRECISION = "MIXED_PRECISION"


def read_quantization(directory: Directory) -> tuple[Quantization | None, Quantization | None]:
    """What ``config.json`` declares, and what ``hf_quant_config.json`` declares where that is a second opinion.

    Returns:
        (the quantization or None for a dense directory, the same from ``hf_quant_config.json`` if both files have one).

    Raises:
        CheckpointError: malformed, of an unsupported kind, or the two files contradict each other.
    """
    file, hf_file = directory.config_file, directory.path / HF_QUANT_CONFIG
    inner = directory.text_config.get("quantization_config")
    declared = directory.config.get("quantization_config")
    declared = inner if declared is None else declared
    hf = None if directory.hf_quant_config is None else _modelopt(directory.hf_quant_config, hf_file, None)
    if declared is None:
        return hf, None
    if not isinstance(declared, dict):
        fail(file, "quantization_config is not an object")
    method = str(declared.get("quant_method", "modelopt" if "quant_algo" in declared else None))
    if method == COMPRESSED_TENSORS:
        if hf is not None:
            fail(hf_file, f"declares ModelOpt's {hf.algorithm}, but {CONFIG} declares {COMPRESSED_TENSORS}")
        return _compressed_tensors(declared, file), None
    if not method.startswith(MODELOPT):
        fail(file, f"quant_method {method!r} is not supported; supported: {MODELOPT}, {COMPRESSED_TENSORS}")
    layers = None if directory.hf_quant_config is None else directory.hf_quant_config.get("quantization", {})
    main = _modelopt(declared, file, layers.get("quantized_layers") if isinstance(layers, dict) else None)
    if main is None:
        fail(file, "quantization_config has no quant_algo")
    if hf is not None:
        for what in ("algorithm", "kv_cache"):
            if getattr(main, what) != getattr(hf, what):
                fail(hf_file, f"{what} {getattr(hf, what)!r} disagrees with {getattr(main, what)!r} in {CONFIG}")
    return main, hf


def _modelopt(config: dict[str, Any], file: Path, layers: Any) -> Quantization | None:
    producer = config.get("producer")
    inner = config.get("quantization", config)
    if not isinstance(inner, dict):
        fail(file, "quantization is not an object")
    algorithm = inner.get("quant_algo")
    if algorithm is None:
        return None
    algorithm = str(algorithm).upper()
    ignored = inner.get("exclude_modules", inner.get("ignore")) or []
    _check_names(ignored, file, "the list of excluded modules")
    _check_group_size(inner.get("group_size"), file)
    groups = inner.get("config_groups")
    if algorithm == MIXED_PRECISION:
        schemes = _mixed_layers(inner.get("quantized_layers", layers), file)
    elif algorithm in MODELOPT_SCHEMES:
        scheme = MODELOPT_SCHEMES[algorithm]
        if groups is not None and _all_weights_only(groups, file):
            scheme = Scheme(scheme.format, scheme.granularity, None)
        schemes = (Group(scheme, ("Linear",)),)
    else:
        fail(file, f"quant_algo {algorithm!r} is not supported; supported: {', '.join(MODELOPT_SCHEMES)}, "
                   f"{MIXED_PRECISION}")  # fmt: skip
    kv_cache = inner["kv_cache_quant_algo"] if "kv_cache_quant_algo" in inner else inner.get("kv_cache_scheme")
    return _checked(
        Quantization(
            layout=MODELOPT,
            algorithm=algorithm,
            groups=schemes,
            ignored=tuple(ignored),
            kv_cache=_kv_cache(kv_cache, file),
            producer=_producer(producer),
            files=(file.name,),
        ),
        file,
    )


def _mixed_layers(layers: Any, file: Path) -> tuple[Group, ...]:
    if not isinstance(layers, dict) or not layers:
        fail(file, f"{MIXED_PRECISION} needs quantized_layers, an object with an algorithm for each layer")
    targets: dict[str, list[str]] = {}
    for name, layer in layers.items():
        algorithm = str(layer.get("quant_algo")).upper() if isinstance(layer, dict) else None
        if algorithm not in MODELOPT_SCHEMES:
            fail(file, f"quantized_layers gives {name} the algorithm {algorithm!r}, which is not supported")
        if MODELOPT_SCHEMES[algorithm].format == "nvfp4":
            _check_group_size(layer.get("group_size"), file)
        targets.setdefault(algorithm, []).append(name)
    return tuple(Group(MODELOPT_SCHEMES[algorithm], tuple(names)) for algorithm, names in targets.items())


def _all_weights_only(groups: Any, file: Path) -> bool:
    if not isinstance(groups, dict) or not all(isinstance(group, dict) for group in groups.values()):
        fail(file, "config_groups is not an object of objects")
    for group in groups.values():
        weights = group.get("weights")
        if isinstance(weights, dict) and weights.get("num_bits") == 4:
            _check_group_size(weights.get("group_size"), file)
    return bool(groups) and all(group.get("input_activations") is None for group in groups.values())


def _compressed_tensors(config: dict[str, Any], file: Path) -> Quantization:
    status = config.get("quantization_status", "compressed")
    if status != "compressed":
        fail(file, f"quantization_status is {status!r}; only compressed checkpoints hold packed weights")
    for key in ("transform_config", "sparsity_config"):
        # Rotations and sparsity change what the stored weights mean.
        value = config.get(key)
        if value and not (isinstance(value, dict) and value.get("format") == "dense"):
            fail(file, f"{key} is not supported")
    groups, ignored = config.get("config_groups"), config.get("ignore") or []
    if not isinstance(groups, dict) or not groups:
        fail(file, "config_groups is not an object with a scheme for each group")
    _check_names(ignored, file, "ignore")
    parsed = [_group(name, group, config.get("format"), file) for name, group in groups.items()]
    return _checked(
        Quantization(
            layout=COMPRESSED_TENSORS,
            algorithm=str(config.get("format")),
            groups=tuple(group for group in parsed if group is not None),
            ignored=tuple(ignored),
            kv_cache=_kv_cache(config.get("kv_cache_scheme"), file),
            producer=_producer(config.get("producer")),
            files=(file.name,),
        ),
        file,
    )


def _group(name: str, group: Any, default_format: Any, file: Path) -> Group | None:
    if not isinstance(group, dict):
        fail(file, f"config group {name} is not an object")
    weights, inputs, targets = group.get("weights"), group.get("input_activations"), group.get("targets")
    _check_names(targets, file, f"targets of config group {name}")
    if weights is None:
        return None  # quantizes attention, whose scales are those of the KV cache
    if not isinstance(weights, dict) or not isinstance(inputs, dict | None):
        fail(file, f"weights or input_activations of config group {name} are not objects")
    kind = (weights.get("num_bits"), weights.get("type"), weights.get("strategy"))
    stored = group.get("format") or default_format
    # "group" with 16 is what compressed-tensors wrote before it had a word for blocks below a global scale.
    block = kind == (4, "float", "tensor_group") or (*kind, weights.get("group_size")) == (
        4,
        "float",
        "group",
        NVFP4_BLOCK,
    )
    if block and weights.get("symmetric", True) is True:
        _check_group_size(weights.get("group_size"), file)
        scheme, formats = Scheme("nvfp4", "block", None if inputs is None else "nvfp4"), (NVFP4_FORMAT,)
    elif kind in ((8, "float", "tensor"), (8, "float", "channel")) and weights.get("symmetric", True) is True:
        activations = None if inputs is None else "fp8-token" if inputs.get("dynamic") else "fp8"
        scheme, formats = Scheme("fp8", kind[2], activations), FP8_FORMATS
    else:
        fail(file, f"config group {name} stores weights as {kind[0]}-bit {kind[1]} by {kind[2]}, which is not "
                   "supported; supported: NVFP4, and FP8 by tensor or channel, all symmetric")  # fmt: skip
    if stored not in formats:
        fail(file, f"config group {name} has the format {stored!r}; its weights need {' or '.join(formats)}")
    return Group(scheme, tuple(targets))


def _producer(value: Any) -> str | None:
    name = value.get("name") if isinstance(value, dict) else value
    return name if isinstance(name, str) else None


def _kv_cache(value: Any, file: Path) -> str | None:
    if value is None or isinstance(value, str):
        return value.lower() if value else None
    if not isinstance(value, dict):
        fail(file, "the KV cache scheme is neither a name nor an object")
    kind = f"{value.get('type')}{value.get('num_bits')}"
    return "fp8" if kind == "float8" else kind


def _check_group_size(value: Any, file: Path) -> None:
    if value not in (None, NVFP4_BLOCK):
        fail(file, f"group_size is {value!r}; NVFP4 has groups of {NVFP4_BLOCK}")


def _check_names(value: Any, file: Path, what: str) -> None:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        fail(file, f"{what} is not a list of names")


def _checked(quantization: Quantization, file: Path) -> Quantization:
    try:
        quantization.scheme_of("")
    except ValueError as error:
        fail(file, str(error))
    return quantization
