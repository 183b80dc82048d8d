"""One rank of ``tiny.run_ranks``: joins the group, calls the function, leaves the result as JSON."""

import importlib
import json
import os
import sys
from pathlib import Path


def main() -> None:
    target, arguments, output = sys.argv[1:]
    sys.path.insert(0, str(Path(__file__).parent))
    module, function = target.split(":")
    from alsace_dist import runtime
    from alsace_dist.config import EngineConfig

    values = json.loads(arguments)
    group = runtime.start(EngineConfig(**values.pop("engine", {})))
    result = getattr(importlib.import_module(module), function)(group, **values)
    Path(output).write_text(json.dumps(result))
    runtime.finish()
    sys.stdout.flush()
    os._exit(0)


main()
