"""``plots``: figures show what the record says, name their source and come out the same every time."""

import copy
import math
from xml.etree import ElementTree

import pytest

from adallm import engines, formats, hardware, memory, plots, projection, published, results

RESULTS = results.default_root()


def record(experiment, slug="cpu"):
    return copy.deepcopy(results.read(RESULTS / experiment / f"{slug}.json"))


def texts(figure):
    from matplotlib.text import Text

    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


def widths(axes):
    return [bar.get_width() for bar in axes.patches]


def heights(axes):
    return [bar.get_height() for bar in axes.patches]


def rooflines(measured, projected):
    gpus = {name: hardware.GPUS[name] for name in ("RTX 4090", "L40S", "L4", "H100")}
    return plots.rooflines(gpus, {"H100": measured}, projected)


def with_bf16_cache(of):
    """A record with an implementation that no record has yet."""
    rows = [row | {"impl": "adallm-w4a8-bf16kv"} for row in of["rows"] if row["impl"] == "adallm-w4a8"]
    return {**of, "rows": [*of["rows"], *rows]}


def fp8_cache(of):
    return plots.fp8_cache(engines.cache_pairs(of), of)


def decode_projection(of):
    rows = projection.decode(of, "RTX 4090", impls=engines.OURS)
    return plots.decode_projection(rows, [row for row in published.throughput() if row["batch"]], of)


BLOCK = {"title": "a block", "source": "three weights"}
FIGURES = {
    "perplexity": lambda: plots.perplexity(record("eval")),
    "loss_by_bits": lambda: plots.loss_by_bits(record("eval")),
    "divergence": lambda: plots.divergence(record("divergence")),
    "published": lambda: plots.published(published.perplexity()),
    "training_curve": lambda: plots.training_curve(record("tiny_training", "h100-80gb-hbm3")),
    "recipes": lambda: plots.recipes(record("tiny_recipes", "h100-80gb-hbm3")),
    "grids": lambda: plots.grids(formats.E2M1_VALUES, formats.E4M3_VALUES, formats.E8M0_VALUES),
    "block": lambda: plots.block([0.1, -0.4, 0.9], [0.0, -0.5, 1.0], {-0.5: "-0.5", 0: "0", 1: "1"}, **BLOCK),
    "sqnr": lambda: plots.sqnr(record("quantizers")),
    "sqnr_by_layer": lambda: plots.sqnr_by_layer(record("quantizers")),
    "block_sizes": lambda: plots.block_sizes(record("quantizers")),
    "global_scales": lambda: plots.global_scales(record("global_scale")),
    "scale_formats": lambda: plots.scale_formats(record("quantizers")),
    "rooflines": lambda: rooflines(record("linear", "h100-80gb-hbm3"), record("sm89")),
    "linear_speedup": lambda: plots.linear_speedup(record("linear", "h100-80gb-hbm3")),
    "decode_attention": lambda: plots.decode_attention(record("attention", "h100-80gb-hbm3")),
    "throughput": lambda: plots.throughput(record("vllm_e2e", "h200")),
    "tokens_per_second": lambda: plots.tokens_per_second(record("vllm_e2e", "h200")),
    "engine_memory": lambda: plots.engine_memory(record("vllm_e2e", "h200")),
    "latencies": lambda: plots.latencies(record("vllm_e2e", "h100-80gb-hbm3")),
    "fp8_cache": lambda: fp8_cache(with_bf16_cache(record("vllm_e2e", "h200"))),
    "decode_projection": lambda: decode_projection(record("vllm_e2e", "h200")),
    "kv_bytes": lambda: plots.kv_bytes(memory.per_token(), memory.by_context((256, 1024, 8192))),
    "kv_fits": lambda: plots.kv_fits(list(memory.fits(("RTX 4090", "L40S", "L4"), tokens=8192))),
    "kv_magnitudes": lambda: plots.kv_magnitudes(record("kv_cache")),
    "kv_model": lambda: plots.kv_model(record("kv_cache")),
    "rule_errors": lambda: plots.rule_errors(record("quantizers")),
    "rule_outputs": lambda: plots.rule_outputs(record("quantizers")),
    "rule_perplexity": lambda: plots.rule_perplexity(record("rules")),
}
SOURCE = {
    "published": "published, not measured here: RaZeR, arXiv 2501.04052",
    "grids": "computed from the definitions",
    "block": "three weights",
    "kv_bytes": "computed from config.json and data sheets, measured on no card",
    "kv_fits": "computed from config.json and data sheets, measured on no card",
}


@pytest.mark.parametrize("name", FIGURES)
def test_the_same_figure_gives_the_same_files_and_names_its_source(name, tmp_path):
    first = plots.save(FIGURES[name](), "figure", root=tmp_path / "a")
    figure = FIGURES[name]()
    second = plots.save(figure, "figure", root=tmp_path / "b")
    assert [path.name for path in first] == ["figure.svg", "figure.png"]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    assert any(SOURCE.get(name, "measured on ") in text for text in texts(figure))
    shown = "".join(ElementTree.parse(first[0]).getroot().itertext())
    assert SOURCE.get(name, "measured on ") in shown
    # The files are cut to what is drawn: text beyond the edge of the canvas would make them larger than it.
    for pixels, inches in zip(png_size(second[1]), figure.get_size_inches(), strict=True):
        assert pixels == pytest.approx(160 * inches, rel=0.06)


def png_size(path):
    header = path.read_bytes()[16:24]
    return int.from_bytes(header[:4]), int.from_bytes(header[4:])


def test_every_figure_function_is_tested():
    functions = {name for name in plots.__all__ if callable(getattr(plots, name))}
    assert functions - {"save", "show", "source_of", "table"} == FIGURES.keys()


def test_perplexity_bars_are_the_differences():
    changed = record("eval")
    figure = plots.perplexity(changed)
    assert widths(figure.axes[0]) == [row["delta"] for row in changed["rows"][1:]]
    changed["rows"][2]["delta"] = 0.25
    assert widths(plots.perplexity(changed).axes[0])[1] == 0.25
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels[0].startswith(changed["rows"][1]["title"])
    assert f"{changed['rows'][0]['bits_per_byte']:.4f} bits per byte" in figure.axes[0].get_title("left")


def test_loss_by_bits_points_are_the_rows():
    rows = record("eval")["rows"][1:]
    [axes] = plots.loss_by_bits(record("eval")).axes
    points = [container[0].get_xydata()[0] for container in axes.containers]
    assert [y for _, y in points] == [row["delta"] for row in rows]
    # Formats of equal size are set apart, by little.
    assert all(abs(x - row["bits_per_weight"]) <= 0.2 for (x, _), row in zip(points, rows, strict=True))
    assert len({x for x, _ in points}) == len(rows)
    errors = [container[2][0].get_segments()[0] for container in axes.containers]
    assert [(top - bottom) / 4 for (_, bottom), (_, top) in errors] == pytest.approx([r["delta_stderr"] for r in rows])


def test_divergence_bars_are_the_rows():
    changed = record("divergence")
    [axes] = plots.divergence(changed).axes
    drawn = [
        r["kl"] for t in ("held out", "train") for r in changed["rows"] if r["text"] == t and r["format"] != "bf16"
    ]
    assert widths(axes) == drawn


def test_published_bars_are_hollow_and_in_bits():
    rows = published.perplexity()
    figure = plots.published(rows)
    assert [axes.get_title("left") for axes in figure.axes] == ["Llama-3.1-8B, WikiText-2", "Qwen3-8B, WikiText-2"]
    of = {(row["model"], row["format"]): row for row in rows}
    llama = of["Llama-3.1-8B", "NVFP4"]
    assert llama["delta_bits"] == pytest.approx(math.log2(6.63 / 6.24))
    assert of["Llama-3.1-8B", "FP16"]["delta_bits"] == 0
    assert widths(figure.axes[0])[0] == llama["delta_bits"]
    assert all(bar.get_facecolor()[:3] == (1, 1, 1) for axes in figure.axes for bar in axes.patches)
    assert all("arXiv" in row["source"] for row in rows)


def test_sqnr_bars_are_the_rows():
    changed = results.select(record("quantizers"), rule=(None, "max"))
    results.find(changed, source="tiny", format="fp8")["sqnr_db"] = 12.5
    [axes] = plots.sqnr(changed).axes
    sources = ("gaussian", "laplace", "student-t4", "outliers", "tiny")
    expected = [
        results.find(changed, source=source, format=form)["sqnr_db"]
        for form in ("nvfp4", "mxfp4", "int4-g128", "fp8")
        for source in sources
    ]
    assert heights(axes) == expected
    assert expected[-1] == 12.5
    with pytest.raises(ValueError, match="no row of source 'laplace'"):
        plots.sqnr(changed | {"rows": [row for row in changed["rows"] if row["source"] != "laplace"]})


def test_layer_maps_are_the_rows_and_share_a_scale():
    changed = results.select(record("quantizers"), rule=(None, "max"))
    *panels, _ = plots.sqnr_by_layer(changed).axes
    images = [axes.images[0] for axes in panels]
    assert len({image.get_clim() for image in images}) == 1
    for image, form in zip(images, ("nvfp4", "mxfp4", "int4-g128"), strict=True):
        grid = image.get_array()
        assert grid.shape == (7, 7)
        for layer, module, column in ((0, "self_attn.q_proj", 0), (6, "mlp.down_proj", 6), (3, "mlp.gate_proj", 4)):
            row = results.find(changed, source=f"tiny.layers.{layer}.{module}", format=form)
            assert grid[layer][column] == row["sqnr_db"]


def test_block_size_lines_are_the_sweep_and_the_marks_the_formats():
    changed = results.select(record("quantizers"), rule=(None, "max"))
    panels = plots.block_sizes(changed, ("laplace", "tiny")).axes
    assert len(panels) == 2
    for axes, source in zip(panels, ("laplace", "tiny"), strict=True):
        lines = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
        for label, scale in (("FP32 (exact)", "fp32"), ("E8M0 (powers of two)", "e8m0")):
            rows = [r for r in changed["rows"] if r["source"] == source and r["scale_format"] == scale]
            assert lines[label] == [[r["block"], r["sqnr_db"]] for r in rows if r["format"] == "e2m1"]
        for form, size in (("nvfp4", 16), ("mxfp4", 32)):
            row = results.find(changed, source=source, format=form)
            assert lines[plots.TITLES[form]] == [[size, row["sqnr_db"]]]


def test_scale_format_bars_are_ratios_of_errors():
    changed = results.select(record("quantizers"), rule=(None, "max"))
    [axes] = plots.scale_formats(changed).axes

    def error(scale, block, source):
        fields = {"format": "e2m1", "scale_format": scale, "block": block, "source": source}
        return results.find(changed, **fields)["rel_sq_err"]

    above = [100 * (error("e8m0", 16, s) / error("fp32", 16, s) - 1) for s in ("gaussian", "tiny")]
    assert [heights(axes)[5], heights(axes)[9]] == pytest.approx(above)


def test_grids_draw_every_value_once():
    top, bottom = FIGURES["grids"]().axes
    assert sorted(top.lines[-1].get_xdata()) == sorted(set(formats.E2M1_VALUES))
    subnormal, normal, e8m0 = (sorted(line.get_xdata()) for line in bottom.lines)
    assert subnormal + normal == sorted(v for v in formats.E4M3_VALUES if v > 0)
    assert len(subnormal) == 7
    assert set(e8m0) <= set(formats.E8M0_VALUES)


def test_block_draws_weights_and_where_they_go():
    figure = FIGURES["block"]()
    [axes] = figure.axes
    lines = {line.get_label(): line.get_ydata().tolist() for line in axes.lines}
    assert lines["weight"] == [0.1, -0.4, 0.9]
    assert lines["quantized"] == [0.0, -0.5, 1.0]
    assert axes.get_title("left") == "a block"
    assert "three weights" in texts(figure)


def test_show_saves_and_returns_the_png(tmp_path):
    image = plots.show(FIGURES["block"](), "shown", alt="three weights", root=tmp_path)
    assert image.data == (tmp_path / "figures" / "shown.png").read_bytes()
    assert image.alt == "three weights"
    assert (tmp_path / "figures" / "shown.svg").read_text().startswith("<?xml")


def test_figures_go_where_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.setenv("ADALLM_RESULTS", str(tmp_path / "elsewhere"))
    paths = plots.save(FIGURES["block"](), "figure")
    assert all(path.parent == tmp_path / "elsewhere" / "figures" for path in paths)


def test_formats_look_alike_in_all_figures():
    from matplotlib.colors import to_hex

    bars = plots.sqnr(record("quantizers")).axes[0].patches
    by_format = {form: to_hex(bars[5 * i].get_facecolor()) for i, form in enumerate(("nvfp4", "mxfp4", "int4-g128"))}
    rows = record("eval")["rows"][1:]
    drawn = plots.perplexity(record("eval")).axes[0].patches
    colors = {row["format"]: to_hex(bar.get_facecolor()) for row, bar in zip(rows, drawn, strict=True)}
    assert {form: colors[form] for form in by_format} == by_format
    assert len(set(colors.values())) == len(colors)


def test_rule_errors_are_those_of_the_record():
    changed = record("quantizers")
    results.find(changed, source="laplace", format="nvfp4-w4a8", rule="mse_fp8")["vs_max"] = 0.123
    stored, met = plots.rule_errors(changed).axes
    sources = 5
    assert len(heights(stored)) == 4 * sources + 1
    assert len(heights(met)) == 4 * sources
    assert (
        heights(stored)[sources]
        == results.find(changed, source="gaussian", format="nvfp4", rule="four_over_six")["vs_max"]
    )
    assert heights(met)[3 * sources + 1] == 0.123


def test_rule_outputs_are_those_of_the_record():
    changed = record("quantizers")
    row = results.find(changed, source="tiny", format="nvfp4", rule="gptq")
    row["rel_out_err"] = 0.01
    (axes,) = plots.rule_outputs(changed).axes
    points = [tuple(line.get_xydata()[0]) for line in axes.lines]
    assert len(points) == 6
    assert points[-1] == (row["rel_sq_err"], 0.01)


def test_rule_perplexity_is_that_of_the_record():
    changed = record("rules")
    rows = [row for row in changed["rows"] if row["rule"] is not None]
    rows[1]["delta"] = 0.05
    figure = plots.rule_perplexity(changed)
    (axes,) = figure.axes
    assert widths(axes) == [row["delta"] for row in rows]
    assert {"gptq*", "imatrix*", "max"} <= set(texts(figure))


def test_linear_speedups_are_ratios_of_the_record():
    changed = record("linear", "h100-80gb-hbm3")
    where = {"shape": "Qwen3-8B.o", "m": 64}
    us = {row["impl"]: row for row in changed["rows"] if row.get("shape") == where["shape"] and row["m"] == where["m"]}
    us["marlin"]["us"], us["humming"]["us"] = 30.0, 50.0
    us["adallm-w4a16"]["us"], us["adallm-w4a8"]["us"], us["cublas-bf16"]["us"] = 8.0, 10.0, 44.0
    w4, bf16, _ = plots.linear_speedup(changed).axes
    layers = [label.get_text() for label in w4.get_yticklabels()]
    tokens = [label.get_text() for label in bf16.get_xticklabels()]
    assert len(layers) == 12
    cells = [[text.get_text() for text in axes.texts] for axes in (w4, bf16)]
    at = layers.index("Qwen3-8B.o") * len(tokens) + tokens.index("64")
    assert (cells[0][at], cells[1][at]) == ("3.75", "5.50")


def test_decode_attention_points_are_those_of_the_record():
    changed = record("attention", "h100-80gb-hbm3")
    step = {"heads": "32/8/128", "block": 16, "batch": 8, "context": 32768}
    results.find(changed, impl="flashinfer", **step)["tb_s"] = 1.25
    titles = [axes.get_title(loc="left") for axes in plots.decode_attention(changed).axes]
    assert titles[0] == "32 query, 8 KV heads of 128"
    assert titles[2:] == ["32 query, 16 KV heads of 128, window 1,024", "16 query, 2 KV heads of 256"]
    (axes,) = plots.decode_attention(changed, heads=["32/8/128"]).axes
    lines = {line.get_label(): line for line in axes.lines}
    x = [label.get_text() for label in axes.get_xticklabels()].index("8 x 32 K")
    assert (x, 1.25) in {tuple(point) for point in lines["FlashInfer"].get_xydata()}
    assert lines["FA3 FP8, Hopper only"].get_markerfacecolor() == "white"
    with pytest.raises(ValueError, match="no row of heads '1/1/1' and block 16"):
        plots.decode_attention(changed, heads=["32/8/128", "1/1/1"])


def test_throughput_is_that_of_the_best_of_stock():
    changed = record("vllm_e2e", "h200")
    base = results.find(changed, impl="bf16", metric="prefill_tok_s", batch=8)["value"]
    results.find(changed, impl="stock-marlin-flashinfer", metric="prefill_tok_s", batch=8)["value"] = 3 * base
    (axes,) = plots.throughput(changed).axes
    bars = {bars.get_label(): [bar.get_height() for bar in bars] for bars in axes.containers}
    assert bars["the best of stock NVFP4"][-1] == pytest.approx(3)
    assert bars["BF16"] == [1] * 7
    ours = results.find(changed, impl="adallm-w4a8", metric="prefill_tok_s", batch=8)["value"]
    assert bars["AdaLLM W4A8"][-1] == pytest.approx(ours / base)


def test_rooflines_tell_what_was_measured_from_what_is_projected():
    measured, projected = record("linear", "h100-80gb-hbm3"), record("sm89")
    where = {"shape": "Qwen3-8B.gate_up", "impl": "adallm-w4a8", "m": 64}
    row = results.find(measured, **where)
    row["tflop_s"], row["gb_s"] = 300.0, 1500.0
    results.find(projected, gpu="RTX 4090", **(where | {"m": 1}))["projected_us"] = 100.0
    ada, _, l4, hopper = rooflines(measured, projected).axes
    titles = [axes.get_title("left") for axes in (ada, l4, hopper)]
    assert titles == ["RTX 4090: projected", "L4: data sheet alone", "H100: measured"]
    points = {line.get_label(): line for line in (*ada.lines, *hopper.lines)}
    assert (200.0, 300.0) in {tuple(point) for point in points["W4A8, measured"].get_xydata()}
    assert points["W4A8, projected"].get_markerfacecolor() == "none"
    assert 2 * 24576 * 4096 / 100e6 == pytest.approx(points["W4A8, projected"].get_ydata()[0])
    assert {"Marlin, measured", "Humming, measured", "cuBLAS BF16, measured", "cuBLAS FP8, measured"} <= points.keys()
    # Bandwidth times operations a byte, up to the tensor rate.
    x, y = points["FP16 tensor cores, data sheet"].get_data()
    assert y[-1] == hardware.GPUS["H100"].fp16_tflops
    assert y[0] == pytest.approx(x[0] * hardware.GPUS["H100"].dram_gb_s / 1e3)
