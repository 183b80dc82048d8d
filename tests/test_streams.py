"""Whatever becomes of stdout and stderr, the exit code stays and nobody else's words appear."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


def _shell(line: str, **environment: str) -> subprocess.CompletedProcess[str]:
    program = f'"{sys.executable}" -m alsace_dist'
    return subprocess.run(
        ["bash", "-c", line.replace("ALSACE", program)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | environment,
    )


@pytest.mark.parametrize("redirected", [">&-", "2>&-", ">&- 2>&-", "<&-", ">/dev/full", ">/dev/full 2>/dev/full"])
def test_a_closed_or_full_stream_leaves_the_exit_code_as_it_is(redirected: str) -> None:
    done = _shell(f"ALSACE init demo {redirected}")
    assert (done.returncode, done.stderr) == (0, "")
    failed = _shell(f"ALSACE rnu {redirected}")
    assert failed.returncode == 2
    assert "Traceback" not in failed.stderr


def test_a_reader_that_leaves_early_is_no_error() -> None:
    done = _shell("set -o pipefail; ALSACE init demo | head -1")
    assert (done.returncode, done.stderr) == (0, "")


def test_an_encoding_without_the_letters_gets_them_escaped() -> None:
    done = _shell("ALSACE größe", PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert done.returncode == 2
    assert "gr\\xf6" in done.stderr
    assert "Traceback" not in done.stderr


def test_what_is_printed_after_a_stream_was_closed_does_not_end_up_in_a_file(tmp_path: Path) -> None:
    """A closed descriptor is the number that the next file gets, so that words would be written into it."""
    path = tmp_path / "work"
    program = (
        "from alsace_dist import streams; streams.make_steady(); import sys;"
        f"file = open({str(path)!r}, 'w'); print('words', flush=True); file.write('work'); file.close()"
    )
    done = subprocess.run(["bash", "-c", f'"{sys.executable}" -c "$0" >&-', program], check=False)
    assert done.returncode == 0
    assert path.read_text() == "work"


def test_a_locale_without_unicode_keeps_no_file_from_being_found(tmp_path: Path) -> None:
    """As LC_ALL=C does where the two ways in which Python would mend it are switched off."""
    config = tmp_path / "дата" / "größe.yaml"
    config.parent.mkdir()
    config.write_text((Path(__file__).parents[1] / "configs/demo.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    done = _shell(
        f"cd '{tmp_path}' && ALSACE prepare дата/größe.yaml --run_dir=прогон",
        LC_ALL="C",
        PYTHONUTF8="0",
        PYTHONCOERCECLOCALE="0",
        PYTHONPATH=str(Path(__file__).parents[1]),
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "прогон/data/manifest.json").exists()


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "cp500"])
def test_an_encoding_that_spells_no_ascii_is_not_used(encoding: str) -> None:
    done = _shell("ALSACE rnu", PYTHONIOENCODING=encoding)
    assert done.returncode == 2
    assert done.stderr.startswith("error: 'rnu' is no command")
