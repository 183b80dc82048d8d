"""``python -m alsace_dist``: the same as the command ``alsace``; torchrun and job scripts start the ranks through it.

With ``-m`` Python puts the working directory first on its path: a file ``random.py`` of a person's would take the place
of Python's own. So the working directory leaves the path before anything else is imported.
"""

import os
import sys

try:
    here = os.getcwd()  # noqa: PTH109 (pathlib might be a person's file, too)
except FileNotFoundError:  # the directory has been deleted
    here = ""
if sys.path and sys.path[0] in ("", here):
    del sys.path[0]

from alsace_dist.cli import main

main()
