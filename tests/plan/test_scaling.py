"""docs/scaling.md is what its generator makes now."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_page_on_scaling_is_what_the_generator_makes_now() -> None:
    spec = importlib.util.spec_from_file_location("make_scaling", ROOT / "docs" / "make_scaling.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    written = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    assert written == module.make_page(), "run `python docs/make_scaling.py`"
