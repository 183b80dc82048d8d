"""Variables of the environment that would break this program, or the libraries below it, in their own words.

What is this program's own (RANK, SLURM_*, ALSACE_*) is read in ranks/job and cluster/.
"""

import os
import re
import sys

from alsace_dist.errors import UserError

# What people set for programs of their own: warnings that end them, no docstrings (--help is made of them) and no
# checks, a console at the end, a trace of every allocation.
OF_PYTHON = ("PYTHONWARNINGS", "PYTHONOPTIMIZE", "PYTHONINSPECT", "PYTHONTRACEMALLOC")
# Variable -> the values that a library accepts when it is loaded, as a regular expression and in words.
OF_LIBRARIES = {
    "TORCH_DISTRIBUTED_DEBUG": (r"(?i)off|info|detail", "OFF, INFO or DETAIL"),
    "TORCH_LOGS": (r"[+-]?[a-z_.]+(,[+-]?[a-z_.]+)*", "names of torch's logs"),
    "DS_ACCELERATOR": (
        r"cpu|cuda|xpu|xpu\.external|npu|mps|hpu|mlu|sdaa",
        "cpu, cuda or another accelerator of DeepSpeed's",
    ),
    "HF_HUB_DOWNLOAD_TIMEOUT": (r"\d+", "a number of seconds"),
    "HF_HUB_ETAG_TIMEOUT": (r"\d+", "a number of seconds"),
}


def start_soundly() -> None:
    """Call it first: if that is needed, start this program anew, in UTF-8 mode and without those variables of Python's.

    Where the locale knows no Unicode (an old LC_ALL=C with Python's own remedies switched off), the names of files
    could not be spelt.
    """
    is_other = [name for name in OF_PYTHON if os.environ.pop(name, "")]
    is_utf8 = sys.getfilesystemencoding().lower() in ("utf-8", "utf8")
    if not is_utf8:
        os.environ["PYTHONUTF8"] = "1"  # for what this process starts
    if is_other or not is_utf8:
        os.execv(sys.executable, [sys.executable, *([] if is_utf8 else ["-X", "utf8"]), *sys.orig_argv[1:]])


def check() -> None:
    """Raises ``UserError`` for a variable that a library would stumble over."""
    for name, (pattern, words) in OF_LIBRARIES.items():
        value = os.environ.get(name, "")
        if value and not re.fullmatch(pattern, value):
            raise UserError(f"{name}: is {value!r} in the environment, where {words} can be; correct or unset it")
