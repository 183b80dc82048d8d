"""A run's report and its TensorBoard in a real headless Chromium: nothing is fetched, nothing overflows, all is there.

The run is a small one made here, or that of the environment's ALSACE_LOOK_AT (``make look``: the demo's). Screenshots
go to build/screenshots.
"""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.request import urlopen

import pytest
import tiny
from playwright.sync_api import Browser, Page, sync_playwright

from alsace_dist.config_file import load_config
from alsace_dist.files.layout import Layout

SCREENSHOTS = Path(__file__).parents[2] / "build/screenshots"
LOOK_AT = os.environ.get("ALSACE_LOOK_AT")
WAIT = 30_000  # milliseconds


@pytest.fixture(scope="module")
def run(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run with a variant, and its report."""
    if LOOK_AT:
        return Path(LOOK_AT).resolve()
    directory = tmp_path_factory.mktemp("pages")
    value = tiny.make_config(world, run_dir=str(directory / "run"), variants={"paper": {"method": "paper"}})
    tiny.alsace("run", str(tiny.write_config(directory / "c.yaml", value)), timeout=300)
    return directory / "run"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    assert path, "install Debian's chromium, as .ci/run does"
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield opened
        opened.close()


@contextmanager
def page_of(browser: Browser, width: int, scheme: str = "light") -> Iterator[tuple[Page, list[str], list[str]]]:
    """A page, what its console says, and what it asks for."""
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)  # type: ignore[arg-type]
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    yield page, said, asked
    page.close()


WIDTHS = [("phone", 360, "light"), ("desktop", 1280, "light"), ("dark", 800, "dark")]


@pytest.mark.parametrize(("name", "width", "scheme"), WIDTHS)
def test_the_report_opens_from_disk_at_any_width(
    run: Path, browser: Browser, name: str, width: int, scheme: str
) -> None:
    with page_of(browser, width, scheme) as (page, said, asked):
        page.goto((run / "report.html").as_uri())
        page.screenshot(path=SCREENSHOTS / f"report-{name}.png", full_page=True)
        assert said == []
        assert [url for url in asked[1:] if not url.startswith("data:")] == []
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        # Main columns can be seen without scrolling, on a phone because the others are left out.
        heads = "[...box.querySelectorAll('th:not(.minor)')].slice(0, 5)"
        ends = f"box => {heads}.map(head => head.getBoundingClientRect().right)"
        for box in page.locator(".scroll").all():
            assert max(box.evaluate(ends)) <= width
            assert name == "dark" or box.evaluate("box => box.scrollWidth <= box.clientWidth + 1")
        drawn = page.locator("figure svg")
        assert drawn.count() >= 4
        for number in range(drawn.count()):
            box = drawn.nth(number).bounding_box()
            assert box and box["width"] > 200 and box["x"] + box["width"] <= width
            assert len(drawn.nth(number).get_attribute("aria-label") or "") > 20
        assert page.locator("h1").inner_text().startswith("Report of ")
        back = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (back == "rgb(255, 255, 255)") == (scheme == "light")


def test_long_words_are_broken_on_a_phone(run: Path, browser: Browser) -> None:
    with page_of(browser, 360) as (page, _, _):
        page.goto((run / "report.html").as_uri())
        text = f"finetune: /{'scratch_of_a_project/' * 4}tensorboard: cannot be written; {'x' * 90}"
        page.evaluate("text => document.querySelectorAll('p, li, figcaption').forEach(one => one.append(text))", text)
        assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_the_report_can_be_printed(run: Path, browser: Browser) -> None:
    with page_of(browser, 800, "dark") as (page, _, _):
        page.goto((run / "report.html").as_uri())
        page.emulate_media(media="print")
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        assert len(page.pdf()) > 10_000


@pytest.fixture(scope="module")
def board(run: Path) -> Iterator[str]:
    """The address of a TensorBoard on loopback."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(run / "tensorboard"), "--host", "127.0.0.1"]
    command += ["--port", str(port), "--load_fast=false", "--reload_interval=1"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 90
        while True:
            try:
                if b"finetune" in urlopen(f"http://127.0.0.1:{port}/data/runs").read():
                    break
            except OSError:
                assert process.poll() is None
            assert time.monotonic() < deadline, "TensorBoard shows no run"
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/"
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("tab", "texts"),
    [
        ("scalars", ["agreement_of", "checkpoint_age_seconds", "finetune", "round1/distill"]),
        ("custom_scalars", ["Is it learning?", "agreement by language", "divergence by language"]),
        ("images", ["agreement", "changes", "languages", "reliability", "scores", "training"]),
        ("text", ["config", "versions", "run_dir:", "alsace-dist"]),
        ("hparams", ["distill.learning_rate", "report/main", "select.rule"]),
    ],
)
def test_tensorboard_shows_the_run_in_every_tab(browser: Browser, board: str, tab: str, texts: list[str]) -> None:
    with page_of(browser, 1400) as (page, _, asked):
        page.goto(f"{board}#{tab}")
        for text in texts:
            page.get_by_text(re.compile(re.escape(text))).first.wait_for(state="attached", timeout=WAIT)
        page.wait_for_timeout(1500)  # for curves to be drawn into the picture
        page.screenshot(path=SCREENSHOTS / f"tensorboard-{tab}.png")
        # The fonts' address stands in TensorBoard's own page; nothing else is asked of anybody but it.
        assert [url for url in asked if not url.startswith((board, "data:", "https://fonts.g"))] == []


def test_events_are_the_lines_of_metrics(run: Path) -> None:
    """Each step once, under the tag of its name, with the same value."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from alsace_dist.monitor.scalars import tag_of
    from alsace_dist.monitor.sinks import METRICS, read_scalars

    layout = Layout(run)
    directories = [layout.finetune, layout.distill(1), layout.scores(0, "unlabeled"), layout.scores(0, "test")]
    for directory in directories:
        events = EventAccumulator(str(layout.tensorboard(directory)), size_guidance={"scalars": 0})
        events.Reload()
        expected: dict[str, list[tuple[int, float]]] = {}
        for row in read_scalars(directory / METRICS):
            for name, value in row.items():
                if name != "step":
                    expected.setdefault(tag_of(name), []).append((row["step"], value))
        assert set(events.Tags()["scalars"]) == set(expected) and expected
        for tag, points in expected.items():
            found = [(event.step, event.value) for event in events.Scalars(tag)]
            assert [step for step, _ in found] == [step for step, _ in points] == sorted({step for step, _ in points})
            assert [value for _, value in found] == pytest.approx([value for _, value in points], rel=1e-5)


def test_every_language_has_its_curves(run: Path) -> None:
    from alsace_dist.monitor.sinks import METRICS, read_scalars

    config = load_config(run / "config.yaml")
    rows = read_scalars(Layout(run).distill(1) / METRICS)
    seen = {name.partition("/")[2] for row in rows for name in row if name.startswith("agreement_of/")}
    assert config.data.source_language in seen and len(seen) >= 2
    last = read_scalars(Layout(run).scores(0, "unlabeled") / METRICS)[-1]
    assert last["done_share"] == 1.0 and {f"confidence_of/{one}" for one in seen} <= set(last)
    assert all(0 <= last[name] <= 1 for name in last if name.startswith(("confidence_of/", "vote_agreement_of/")))
