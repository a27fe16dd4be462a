"""Benchmarks: ``python -m adallm.bench <what>`` and ``adallm bench <what>`` run the module ``adallm.bench.<what>``.

Each module has ``main(argv) -> int``, checks that its results are right before it times them, and writes a record.
The first line of its docstring is its entry in the list.
"""

from __future__ import annotations

import ast
import importlib
import pkgutil
import sys
from collections.abc import Sequence
from pathlib import Path


def benchmarks() -> dict[str, str]:
    """Name -> first line of the docstring, read without importing the modules, which may need a GPU or vLLM."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))
    found = {}
    for name in names:
        docstring = ast.get_docstring(ast.parse((Path(__file__).parent / f"{name}.py").read_text())) or ""
        found[name] = docstring.partition("\n")[0]
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark that the first argument names with the others, or list what there is.

    Returns:
        an exit code: 2 for a name that is no benchmark.
    """
    what, *rest = [*(sys.argv[1:] if argv is None else argv)] or ["--help"]
    known = benchmarks()
    if what in known:
        return importlib.import_module(f"{__name__}.{what}").main(rest)
    out = sys.stdout if what in ("-h", "--help") else sys.stderr
    if out is sys.stderr:
        print(f"no benchmark {what!r}", file=out)
    print("usage: python -m adallm.bench WHAT [OPTION ...]   (WHAT --help lists its options)\n", file=out)
    width = max(map(len, known))
    for name, line in known.items():
        print(f"  {name:{width}}  {line}", file=out)
    return 0 if out is sys.stdout else 2
