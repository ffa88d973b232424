"""Runs tests in children that are forked from one process which has imported what is slow and used none of it.

Every line on stdin is a JSON task {"root": a copy of the project, "test": its id}, every line on stdout its answer
{"code": pytest's exit status, "output": what it printed}. It is started by its path, so that no package is imported.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import tempfile
from pathlib import Path

SLOW = (
    *("torch", "torch.distributed.tensor", "transformers.models.qwen2.modeling_qwen2"),
    *("transformers.models.gpt2.modeling_gpt2", "pytest", "hypothesis", "pydantic", "typer", "jaxtyping", "beartype"),
)


def run(root: str, test: str, output: str) -> int:
    """Run one test of a copy of the project, in this process, which is good for nothing afterwards."""
    import pytest

    os.chdir(root)
    here = Path(__file__).parent
    sys.path[:] = [root, *(path for path in sys.path if Path(path).resolve() not in (here, here.parent))]
    with open(output, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        return int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", test]))


def serve() -> None:
    """Answer tasks until stdin ends."""
    for name in SLOW:
        importlib.import_module(name)
    for line in sys.stdin:
        task = json.loads(line)
        with tempfile.NamedTemporaryFile() as output:
            child = os.fork()
            if not child:
                code = 70
                try:
                    code = run(task["root"], task["test"], output.name)
                finally:
                    os._exit(code)
            _, status = os.waitpid(child, 0)
            told = Path(output.name).read_text(errors="replace")
        print(json.dumps({"code": os.waitstatus_to_exitcode(status), "output": told}), flush=True)


if __name__ == "__main__":
    serve()
