"""The layers of the package: imports go down only, and `import adallm` is light."""

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import adallm

PACKAGE = Path(adallm.__file__).parent

# A module may import its own layer and those before it. A name that no file has yet is no error; a file that no layer
# has is one.
LAYERS = (
    {"formats", "results", "hardware", "models", "memory", "calculator", "published", "text", "engines", "projection"},
    {"rows", "tiny"},
    {"nvfp4", "fp8", "baselines", "quantizers", "gptq", "paged"},
    {"kernels"},
    {"linear", "attention"},
    {"checkpoint", "sm89"},
    {"windows", "walk", "calibrated"},
    {"hf_model", "vllm_command"},
    {"lm"},
    {"plots", "evaluate", "calibrate", "bench", "vllm_plugin", "tasks"},
    {"serve", "doctor", "live"},
    {"cli", "cli_vllm"},
)
LAYER = {name: i for i, layer in enumerate(LAYERS) for name in layer}
ONLY = {"plots": {"results"}}

# What `pip install adallm` brings, and what the modules of a part may need beyond it when they are imported.
CORE = {"torch", "safetensors", "tqdm"}
MAY_NEED = {
    "kernels": {"triton"},
    "sm89": {"triton"},
    "plots": {"matplotlib", "numpy", "pandas"},
    "hf_model": {"transformers"},
    "calibrate": {"transformers"},
    "lm": {"lm_eval", "transformers"},
    "evaluate": {"lm_eval", "matplotlib", "numpy", "pandas", "transformers"},
    "bench": {"transformers", "triton", "vllm"},
    "vllm_command": {"vllm"},
    "vllm_plugin": {"triton", "vllm"},
    "tasks": {"datasets", "lm_eval"},
    "tiny": {"numpy", "tokenizers", "transformers"},
}
OPTIONAL = sorted(set().union(*MAY_NEED.values(), {"compressed_tensors", "IPython", "modelopt"}))


def modules() -> dict[str, Path]:
    """Dotted name below the package -> file; the package itself is left out."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name:
            found[name] = path
    return found


MODULES = modules()


def part(module: str) -> str:
    return module.partition(".")[0]


def imports(module: str, *, at_import: bool = False) -> Iterator[tuple[str, int]]:
    """Absolute dotted names that a module imports, with their lines; only those that run at import, if asked."""
    path = MODULES[module]
    package = ["adallm", *module.split(".")]
    if path.name != "__init__.py":
        package.pop()
    waiting: list[ast.AST] = [ast.parse(path.read_text())]
    while waiting:
        node = waiting.pop()
        if at_import and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if at_import and isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            waiting.extend(node.orelse)
            continue
        waiting.extend(ast.iter_child_nodes(node))
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base += node.module.split(".") if node.module else []
            # `from adallm import results` names a module, `from adallm.results import write` one of its functions.
            yield from ((".".join([*base, alias.name]), node.lineno) for alias in node.names)


def imported_modules(module: str) -> Iterator[tuple[str, int]]:
    """Modules of this package that a module imports anywhere in its text."""
    for name, line in imports(module):
        root, _, below = name.partition(".")
        if root == "adallm":
            while below and below not in MODULES:
                below = below.rpartition(".")[0]
            if below:
                yield below, line


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down_only(module):
    own = part(module)
    assert own in LAYER, f"adallm/{own} is in no layer: give it one in this test and in the design"
    for other, line in imported_modules(module):
        where = f"{MODULES[module]}:{line} imports adallm.{other}"
        allowed = ONLY.get(own, {name for name in LAYER if LAYER[name] <= LAYER[own]})
        assert part(other) in {own, *allowed}, f"{where}, but adallm.{own} may import only {sorted(allowed)}"


def test_parts_do_not_import_each_other_in_a_circle():
    graph = {part(module): set() for module in MODULES}
    for module in MODULES:
        graph[part(module)] |= {part(other) for other, _ in imported_modules(module)} - {part(module)}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


@pytest.mark.parametrize("module", MODULES)
def test_needs_no_package_beyond_its_own(module):
    allowed = CORE | MAY_NEED.get(part(module), set()) | set(sys.stdlib_module_names) | {"adallm"}
    for name, line in imports(module, at_import=True):
        assert part(name) in allowed, (
            f"{MODULES[module]}:{line} imports {part(name)} when adallm.{module} is imported; "
            f"import it where it is used, or add it to MAY_NEED and to an extra"
        )


# Run in a new process: packages that are not part of the core cannot be found, and every way that torch has to ask
# for a GPU fails.
PRELUDE = f"""
import sys, warnings
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {OPTIONAL}:
            raise ModuleNotFoundError(f"{{name}} is not part of the core", name=name)
sys.meta_path.insert(0, Absent())
warnings.simplefilter("ignore")  # torch warns that there is no NumPy
import torch
def no_cuda(*args, **kwargs):
    raise AssertionError("a CUDA call at import")
torch.cuda._lazy_init = torch.cuda.init = torch.cuda.is_available = torch.cuda.device_count = no_cuda
torch.cuda.get_device_name = torch.cuda.get_device_properties = torch.cuda.get_device_capability = no_cuda
"""


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_adallm_loads_nothing_else():
    code = "import sys, adallm; print([m for m in sys.modules if m.partition('.')[0] in ('torch', 'numpy', 'triton')])"
    assert python(code) == "[]\n"


def test_attribute_access_loads_the_module():
    code = "import adallm; print(adallm.nvfp4.quantize(torch.ones(1, 16)).packed.tolist())"
    assert python(PRELUDE + code) == f"{[[0x77] * 8]}\n"
    assert "nvfp4" in dir(adallm)
    with pytest.raises(AttributeError, match="no attribute 'no_such_module'"):
        _ = adallm.no_such_module


def test_modules_import_with_the_core_alone_and_without_a_cuda_call():
    light = [name for name in MODULES if part(name) not in MAY_NEED]
    assert "nvfp4" in light
    code = f"import importlib\nfor name in {light}: importlib.import_module('adallm.' + name)\n"
    assert python(PRELUDE + code + f"print({set(OPTIONAL)} & sys.modules.keys())") == "set()\n"
