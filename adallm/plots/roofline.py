"""Rooflines of GPUs with what was measured on them, and, hollow, what is projected for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib

from adallm.plots.style import COLORS, GREY, STYLE, new_figure, source_of, write_source

IMPLS = {"adallm-w4a16": "W4A16", "adallm-w4a8": "W4A8"}
PEERS = {"marlin": "Marlin", "humming": "Humming", "cublas-bf16": "cuBLAS BF16", "scaled-mm-fp8": "cuBLAS FP8"}
_LOWEST, _HIGHEST = 1.0, 1e4  # operations a byte


def rooflines(
    gpus: Mapping[str, Any],
    measured: Mapping[str, Mapping[str, Any]],
    projected: Mapping[str, Any],
    *,
    shape: str = "Qwen3-8B.gate_up",
) -> Any:
    """``min(tensor rate, bandwidth * operations a byte)``, a panel for each GPU, with the points of one layer.

    Args:
        gpus: name -> data sheet, with ``dram_gb_s``, ``fp16_tflops`` and ``fp8_tflops``.
        measured: name -> ``linear`` record of that GPU.
        projected: an ``sm89`` record, whose ``projected_us`` belong to ``gpu``.
    """
    with matplotlib.rc_context(STYLE):
        figure, panels = new_figure(2, 2, size=(8.5, 6.2), sharex=True, sharey=True)
        for axes, (name, gpu) in zip(panels.flat, gpus.items(), strict=True):
            _roof(axes, gpu.dram_gb_s, gpu.fp16_tflops, COLORS[7], "FP16 tensor cores, data sheet")
            _roof(axes, gpu.dram_gb_s, gpu.fp8_tflops, GREY, "FP8 tensor cores, data sheet")
            for i, (impl, title) in enumerate(PEERS.items() if name in measured else ()):
                points = _measured(measured[name], shape, impl)
                axes.plot(*points, "^v+x"[i], color=COLORS[2 + i], markersize=4, label=f"{title}, measured")
            kind = "data sheet alone"
            for i, (impl, title) in enumerate(IMPLS.items()):
                if name in measured:
                    points, kind = _measured(measured[name], shape, impl), "measured"
                    axes.plot(*points, "os"[i], color=COLORS[i], markersize=5, label=f"{title}, measured")
                else:
                    points = _projected(projected, name, shape, impl)
                    kind = "projected" if points[0] else kind
                    axes.plot(
                        *points,
                        "os"[i],
                        color=COLORS[i],
                        markerfacecolor="none",
                        markersize=6,
                        label=f"{title}, projected",
                    )
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.set_title(f"{name}: {kind}")
        for axes in panels[-1]:
            axes.set_xlabel("operations a byte that must be moved")
        for axes in panels[:, 0]:
            axes.set_ylabel("10^12 operations a second")
        handles = {label: h for axes in panels.flat for h, label in zip(*axes.get_legend_handles_labels(), strict=True)}
        figure.legend(handles.values(), handles, loc="outside upper right", ncols=4, fontsize=7)
        sources = "; ".join(map(source_of, measured.values()))
        write_source(figure, f"{shape}; hollow: projected from sm_89 code, measured by nobody; {sources}")
    return figure


def _roof(axes: Any, gb_s: float, tflops: float, color: str, label: str) -> None:
    ridge = tflops * 1e3 / gb_s
    x = [_LOWEST, ridge, _HIGHEST]
    axes.plot(x, [min(tflops, v * gb_s / 1e3) for v in x], color=color, linewidth=1, label=label)


Points = tuple[Sequence[float], Sequence[float]]


def _measured(record: Mapping[str, Any], shape: str, impl: str) -> Points:
    rows = [row for row in record["rows"] if row.get("shape") == shape and row["impl"] == impl]
    return [row["tflop_s"] * 1e3 / row["gb_s"] for row in rows], [row["tflop_s"] for row in rows]


def _projected(record: Mapping[str, Any], gpu: str, shape: str, impl: str) -> Points:
    """Bytes as in a ``linear`` record: the weight at 4.5 bits, activations and outputs in 16."""
    rows = [
        row
        for row in record["rows"]
        if (row.get("gpu"), row.get("shape"), row.get("impl")) == (gpu, shape, impl) and "projected_us" in row
    ]
    operations = [2 * row["m"] * row["n"] * row["k"] for row in rows]
    nbytes = [row["n"] * row["k"] * 4.5 / 8 + 2 * row["m"] * (row["n"] + row["k"]) for row in rows]
    per_byte = [flop / moved for flop, moved in zip(operations, nbytes, strict=True)]
    return per_byte, [flop / row["projected_us"] / 1e6 for flop, row in zip(operations, rows, strict=True)]
