"""A rank of ``tiny.run_ranks``: joins the group, then calls functions of test files as they are asked for on stdin.

A line asks for one call: ``{"file", "function", "arguments", "output"}``. The result, or the traceback of what was
raised, goes into the file ``output`` as JSON.
"""

import importlib.util
import json
import os
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any


def load(path: str) -> ModuleType:
    """A test file as a module; each is loaded once."""
    name = f"on_ranks_{Path(path).stem}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[name]


def answer(group: Any, line: str) -> None:
    call = json.loads(line)
    try:
        result = {"result": getattr(load(call["file"]), call["function"])(group, **call["arguments"])}
    except BaseException:
        result = {"error": traceback.format_exc()}
    temporary = Path(call["output"] + ".tmp")
    temporary.write_text(json.dumps(result))
    temporary.replace(call["output"])


def main() -> None:
    from alsace_dist.config import EngineConfig
    from alsace_dist.ranks import group as ranks

    group = ranks.start(EngineConfig())
    for line in sys.stdin:
        answer(group, line)
    ranks.finish()
    sys.stdout.flush()
    os._exit(0)  # threads of the communication libraries abort the interpreter on its way out, now and then


main()
