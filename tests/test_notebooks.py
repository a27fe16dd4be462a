"""The notebooks: clean files with their outputs kept, short cells, and the same findings from a fresh kernel."""

import ast
import json
import os
import platform
import re
import resource
import shutil
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

import adallm
from adallm import results

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MAX_CELL_LINES = 25
MAX_FUNCTION_LINES = 6
MAX_SECONDS = 90
# Cells whose output is measured as they run, on the text of the Python that runs them.
LIVE = {"live"}
ABSOLUTE_PATH = re.compile(r"(?<![\w.:/<])/(?:home|root|work|tmp|usr|opt|var|mnt|Users|private)/|[A-Z]:\\\\|\bfile://")
ADDRESS = re.compile(r"0x[0-9a-f]{6,}")


def read(path):
    return nbformat.read(path, as_version=nbformat.NO_CONVERT)


def code_cells(path):
    return [cell for cell in read(path).cells if cell.cell_type == "code"]


def texts(output):
    """Everything in an output that can be read, images left out."""
    yield output.get("text", "")
    for kind, value in output.get("data", {}).items():
        if not kind.startswith("image/"):
            yield value if isinstance(value, str) else json.dumps(value)


def name(path):
    return path.stem


def test_there_are_notebooks():
    wanted = {
        "01_microscaling_accuracy",
        "02_kv_cache_memory",
        "03_kernel_roofline",
        "04_vllm_throughput",
        "05_perplexity",
    }
    assert {path.stem for path in NOTEBOOKS} >= wanted


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_file_is_clean(path):
    notebook = read(path)
    nbformat.validate(notebook)
    assert notebook.nbformat == 4
    assert set(notebook.metadata) <= {"kernelspec", "language_info"}
    assert set(notebook.metadata.language_info) == {"name"}
    assert notebook.metadata.kernelspec.name == "python3"
    assert all(cell.metadata == {} for cell in notebook.cells)
    identifiers = [cell.id for cell in notebook.cells]
    assert len(set(identifiers)) == len(identifiers)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_outputs_are_those_of_one_run_from_top_to_bottom(path):
    cells = code_cells(path)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        for output in cell.outputs:
            assert output.output_type != "error", cell.id
            assert output.get("name") != "stderr", f"{cell.id} prints to stderr: {output.get('text')}"
            assert output.get("execution_count") in (None, cell.execution_count)
    shown = [output for cell in cells for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in shown)
    assert any("**Finding.**" in output.get("data", {}).get("text/markdown", "") for output in shown)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_outputs_name_no_machine_path_or_address(path):
    machine = [word for word in (platform.node(), str(Path.home()), str(ROOT)) if len(word) > 3]
    for cell in code_cells(path):
        for output in cell.outputs:
            for text in texts(output):
                assert not ABSOLUTE_PATH.search(text), f"{cell.id}: {ABSOLUTE_PATH.search(text)}"
                assert not ADDRESS.search(text), f"{cell.id}: {ADDRESS.search(text)}"
                assert not any(re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text) for word in machine), cell.id


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_cells_are_short_and_hold_no_class(path):
    for cell in read(path).cells:
        lines = cell.source.splitlines()
        assert 0 < len(lines) <= MAX_CELL_LINES, f"{cell.id} has {len(lines)} lines"
        if cell.cell_type != "code":
            continue
        for node in ast.walk(ast.parse(cell.source)):
            assert not isinstance(node, ast.ClassDef), f"{cell.id} defines a class"
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = node.end_lineno - node.lineno + 1
                assert length <= MAX_FUNCTION_LINES, f"{cell.id}: {node.name} has {length} lines"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_starts_with_question_method_and_versions(path):
    first, *_ = read(path).cells
    assert first.cell_type == "markdown"
    assert re.match(rf"# {int(path.stem[:2])} \w", first.source)
    assert "**Question.**" in first.source
    assert "**Method.**" in first.source
    printed = "".join(output.get("text", "") for output in code_cells(path)[0].outputs)
    assert re.search(r"^AdaLLM \S+, Python 3\.\d+\.\d+ on \w+\n.*torch \d.*\n\d+ CPU cores .*GPU: ", printed)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_figures_say_what_they_show(path):
    for cell in code_cells(path):
        for output in cell.outputs:
            if "image/png" in output.get("data", {}):
                assert len(output.metadata["image/png"]["alt"]) > 20, cell.id


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_links_to_other_notebooks_exist(path):
    for cell in read(path).cells:
        if cell.cell_type == "markdown":
            for target in re.findall(r"\]\(([\w./-]+)\)", cell.source):
                assert (path.parent / target).is_file(), f"{cell.id} links to {target}"


def test_every_figure_is_drawn_by_a_notebook():
    sources = "".join(cell.source for path in NOTEBOOKS for cell in code_cells(path))
    drawn = {file.stem for file in (ROOT / "results" / "figures").iterdir()}
    assert {figure for figure in drawn if f'"{figure}"' not in sources} == set()


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A copy of notebooks and records; what the kernel writes goes there, and imports this package."""
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    shutil.copytree(results.default_root(), tmp_path / "results", ignore=shutil.ignore_patterns("figures"))
    home = tmp_path / "home"
    home.mkdir()
    paths = [str(Path(adallm.__file__).parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    settings = {
        "ADALLM_RESULTS": tmp_path / "results",
        "ADALLM_CACHE": home / "adallm",
        "HOME": home,
        "XDG_CACHE_HOME": home / "cache",
        "MPLCONFIGDIR": home / "matplotlib",
        "IPYTHONDIR": home / "ipython",
        "JUPYTER_PREFER_ENV_PATH": "1",
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONDONTWRITEBYTECODE": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    for key, value in settings.items():
        monkeypatch.setenv(key, str(value))
    return tmp_path


def written():
    """Size and time of every file that a notebook could change by mistake."""
    files = [file for folder in ("notebooks", "results") for file in (ROOT / folder).rglob("*") if file.is_file()]
    return {file: (file.stat().st_size, file.stat().st_mtime_ns) for file in files}


def cpu_seconds():
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def execute(notebook, folder):
    where = {"metadata": {"path": str(folder / "notebooks")}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=where).execute()


def findings(notebook):
    """The Markdown that code cells displayed, by cell; those that measure live are left out."""
    return {
        cell.id: [output.data["text/markdown"] for output in cell.outputs if "text/markdown" in output.get("data", {})]
        for cell in notebook.cells
        if cell.cell_type == "code" and cell.id not in LIVE
    }


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_runs_from_a_fresh_kernel_and_finds_the_same(path, elsewhere):
    committed, before = read(path), written()
    notebook = read(elsewhere / "notebooks" / path.name)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    start = cpu_seconds()
    execute(notebook, elsewhere)
    # Of one core: wall-clock time is that of the tests beside this one too.
    assert cpu_seconds() - start < MAX_SECONDS
    warnings = [o.text for cell in notebook.cells for o in cell.get("outputs", ()) if o.get("name") == "stderr"]
    assert not warnings
    assert findings(notebook) == findings(committed), "the outputs are not those of these records: run `make figures`"
    drawn = {file.name for file in (elsewhere / "results" / "figures").iterdir()}
    assert drawn
    assert drawn <= {file.name for file in (ROOT / "results" / "figures").iterdir()}, "run `make figures`"
    assert written() == before, "the notebook wrote into the tree"


def test_a_changed_record_changes_what_the_notebook_finds(elsewhere):
    """One number of the record, two decimals of which the findings print."""
    path = elsewhere / "results" / "quantizers" / "cpu.json"
    record = results.read(path)
    results.find(record, source="laplace", format="nvfp4", rule="max")["sqnr_db"] = 33.3
    results.write("quantizers", record["rows"], provenance=record["provenance"], root=elsewhere / "results")
    notebook = read(elsewhere / "notebooks" / "01_microscaling_accuracy.ipynb")
    wanted = {"versions", "formats-figure", "formats-finding"}
    notebook.cells = [cell for cell in notebook.cells if cell.id in wanted]
    execute(notebook, elsewhere)
    [found] = findings(notebook)["formats-finding"]
    assert "laplace: NVFP4 has 33.3 dB" in found
    svg = (elsewhere / "results" / "figures" / "sqnr_by_format.svg").read_bytes()
    assert svg != (ROOT / "results" / "figures" / "sqnr_by_format.svg").read_bytes()


def test_a_changed_cache_record_changes_the_second_notebook(elsewhere):
    record = results.read(elsewhere / "results" / "kv_cache" / "cpu.json")
    results.find(record, part="magnitude", cache="fp8-one", log2_std=0)["rel_err"] = 0.4321
    results.find(record, part="perplexity", cache="fp8-token")["bits_per_byte"] = 0.1234
    results.write("kv_cache", record["rows"], provenance=record["provenance"], root=elsewhere / "results")
    notebook = read(elsewhere / "notebooks" / "02_kv_cache_memory.ipynb")
    wanted = ("versions", "magnitude-figure", "magnitude-finding", "loss-finding")
    notebook.cells = [cell for cell in notebook.cells if cell.id in wanted]
    execute(notebook, elsewhere)
    found = findings(notebook)
    assert "FP8, scale 1 0.4321" in found["magnitude-finding"][0]
    assert "0.1234" in found["loss-finding"][0]
    svg = (elsewhere / "results" / "figures" / "kv_magnitudes.svg").read_bytes()
    assert svg != (ROOT / "results" / "figures" / "kv_magnitudes.svg").read_bytes()


def test_a_changed_engine_record_changes_the_fourth_notebook(elsewhere):
    """Also the section on the cache, which has a figure as soon as a record has what it needs."""
    root = elsewhere / "results"
    for path in (root / "vllm_e2e").glob("*.json"):
        if path.stem != "h100-80gb-hbm3":
            path.unlink()
    record = results.read(root / "vllm_e2e" / "h100-80gb-hbm3.json")
    rows = [row for row in record["rows"] if not row["impl"].endswith("-bf16kv")]
    row = results.find({**record, "rows": rows}, impl="adallm-auto-lm-head", metric="itl_p99_ms", batch=16)
    row["value"] = 1.7
    steps = [row for row in rows if (row["impl"], row["metric"]) == ("bf16", "decode_tok_s")]
    names = {"adallm-w4a8-bf16kv": 1.0, "adallm-w4a8": 1.25}
    rows = [row for row in rows if row["impl"] not in ("adallm-w4a8", "adallm-w4a16", "adallm-auto")]
    rows += [row | {"impl": impl, "value": factor * row["value"]} for impl, factor in names.items() for row in steps]
    results.write("vllm_e2e", rows, provenance=record["provenance"], root=root)
    notebook = read(elsewhere / "notebooks" / "04_vllm_throughput.ipynb")
    wanted = ("versions", "cache-figure", "cache-finding", "latency-figure", "latency-finding")
    notebook.cells = [cell for cell in notebook.cells if cell.id in wanted]
    execute(notebook, elsewhere)
    found = findings(notebook)
    assert re.search(r"ITL P99, 16 requests +\| +1\.7 \| adallm-auto-lm-head ", found["latency-finding"][0])
    assert "Measured on H100" in found["cache-finding"][0]
    assert "- AdaLLM W4A8: decode x1 1.25, decode x2 1.25" in found["cache-finding"][0]
    assert (root / "figures" / "fp8_cache.png").is_file()
    svg = (root / "figures" / "engine_latency.svg").read_bytes()
    assert svg != (ROOT / "results" / "figures" / "engine_latency.svg").read_bytes()
