"""The report: its words, its tables, its figures, and that nothing in a name can break out of them."""

import io
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from rich.console import Console

from alsace_dist.files.costs import Cost
from alsace_dist.files.evaluation import Evaluation, LanguageChange, Round
from alsace_dist.files.warnings import Warned
from alsace_dist.reporting.facts import Facts
from alsace_dist.reporting.report import format_plain, format_table, print_summary, write_report
from alsace_dist.reporting.statistics import summary
from alsace_dist.reporting.tables import Row, Table
from alsace_dist.reporting.verdict import conditions, outcome, percent, points, ruled_out, verdict

NUM_EXAMPLES = 1000
SVG = "{http://www.w3.org/2000/svg}"
HOSTILE = "<script>alert('1')</script>", 'x" onload="y', "a|b`*[c](d)&amp;", "[red]e", "\x1b[31mf\x00\u202e"


def make_evaluation(
    before: dict[str, float],
    after: dict[str, float],
    teachers: tuple[str, ...] = ("en",),
    p_values: dict[str, float] | None = None,
    average_ci: tuple[float, float] | None = None,
    gap_ci: tuple[float, float] | None = None,
) -> Evaluation:
    """metrics.json of these accuracies; languages are significant as told, intervals are +- 1 point unless told."""
    old, new = summary(before, "en"), summary(after, "en")
    change = new.average - old.average
    gap_change = None if old.gap is None or new.gap is None else new.gap - old.gap
    value = {
        "source_language": "en",
        "teachers": list(teachers),
        "students": [language for language in before if language not in teachers],
        "languages": {
            language: {
                "before": before[language],
                "after": after[language],
                "ci95": (after[language] - before[language] - 0.01, after[language] - before[language] + 0.01),
                "num_examples": NUM_EXAMPLES,
                "num_gained": max(0, round((after[language] - before[language]) * NUM_EXAMPLES)),
                "num_lost": max(0, round((before[language] - after[language]) * NUM_EXAMPLES)),
                "p_value": (p_values or {}).get(language, 1.0),
                "p_value_raw": min(0.01, (p_values or {}).get(language, 1.0)),
                "score": 0.5 if teachers else None,
            }
            for language in before
        },
        "average": {
            "before": old.average,
            "after": new.average,
            "ci95": average_ci or (change - 0.01, change + 0.01),
        },
        "gap": {
            "before": old.gap,
            "after": new.gap,
            "ci95": None if gap_change is None else (gap_ci or (gap_change - 0.01, gap_change + 0.01)),
        },
        "std": {"before": old.std, "after": new.std},
        "paired_gap": {"before": old.gap, "after": new.gap, "ci95": None if gap_change is None else (-1.0, 1.0)},
        "rounds": [{"teachers": list(teachers), "scores": dict.fromkeys(before, 0.5)}] if teachers else [],
        "uses_labels": False,
        "worst": {
            "before": {"language": old.worst_language, "accuracy": old.worst_accuracy},
            "after": {"language": new.worst_language, "accuracy": new.worst_accuracy},
        },
    }
    return Evaluation.model_validate(value)


@pytest.fixture
def success() -> Evaluation:
    return make_evaluation(
        {"de": 0.4, "en": 0.7, "sw": 0.2}, {"de": 0.55, "en": 0.7, "sw": 0.45}, ("en", "de"), {"de": 0.01, "sw": 0.0}
    )


@pytest.fixture
def collapse() -> Evaluation:
    """The gap closes because the source language falls."""
    return make_evaluation(
        {"de": 0.4, "en": 0.7, "sw": 0.2}, {"de": 0.4, "en": 0.4, "sw": 0.4}, p_values={"en": 1e-9, "sw": 0.01}
    )


def test_numbers_in_words() -> None:
    assert (percent(0.5534), percent(-0.0021), percent(-0.0001), percent(None)) == ("55.3", "−0.2", "0.0", "–")
    assert (points(0.2764), points(-0.031), points(0.0), points(-0.0001)) == ("+27.6", "−3.1", "0.0", "0.0")


def test_significance_is_the_adjusted_p_value_below_alpha() -> None:
    row = LanguageChange(
        before=0.5,
        after=0.6,
        ci95=(0.0, 0.2),
        num_examples=100,
        num_gained=10,
        num_lost=0,
        p_value=0.04,
        p_value_raw=0.001,
        score=None,
    )
    assert outcome(row, 0.05) == "better"
    assert outcome(row, 0.04) == outcome(row, 0.01) == "same"
    assert outcome(row.model_copy(update={"after": 0.4}), 0.05) == "worse"


def test_verdict_of_a_success_names_all_three(success: Evaluation) -> None:
    assert verdict(success) == (
        "All three conditions hold: the average went up by 13.3 points, "
        "the gap shrank from 40.0 to 20.0 points, and no language is significantly worse."
    )


def test_a_smaller_gap_is_never_praised_alone(collapse: Evaluation) -> None:
    assert verdict(collapse) == (
        "Only one of the three conditions holds: the gap shrank from 40.0 to 0.0 points, "
        "but the average went down by 3.3 points and 1 language is significantly worse (en −30.0 points). "
        "A smaller gap alone proves nothing."
    )


def test_verdict_asks_for_intervals_that_exclude_zero() -> None:
    before, after = {"en": 0.7, "de": 0.4, "fr": 0.4}, {"en": 0.7, "de": 0.45, "fr": 0.42}
    unclear = make_evaluation(before, after, average_ci=(-0.005, 0.05), gap_ci=(-0.06, 0.01))
    assert [one.holds for one in conditions(unclear)] == [False, False, True]
    assert "the average did not clearly change (+2.3 points, interval −0.5 to +5.0)" in verdict(unclear)
    assert "the gap did not clearly change (from 30.0 to 26.5 points" in verdict(unclear)
    assert all(one.holds for one in conditions(make_evaluation(before, after)))


def test_verdict_when_nothing_holds() -> None:
    worse = make_evaluation({"en": 0.7, "de": 0.4}, {"en": 0.7, "de": 0.2}, p_values={"de": 0.001})
    assert verdict(worse).startswith(
        "None of the three conditions holds: the average went down by 10.0 points, the gap"
    )
    assert "grew from 30.0 to 50.0 points" in verdict(worse)
    assert "proves nothing" not in verdict(worse)


def test_a_gap_that_turns_over_shrinks_only_in_size() -> None:
    turned = make_evaluation({"en": 0.5, "de": 0.45}, {"en": 0.5, "de": 0.6})
    assert "the gap grew from 5.0 to −10.0 points" in verdict(turned)


def test_alpha_decides_who_is_worse(collapse: Evaluation) -> None:
    assert not conditions(collapse, alpha=0.05)[2].holds
    assert conditions(collapse, alpha=1e-12)[2].holds


def test_report_json_is_the_metrics_with_the_variants(
    tmp_path: Path, success: Evaluation, collapse: Evaluation
) -> None:
    write_report(tmp_path, {"main": success}, Facts())
    metrics = json.loads((tmp_path / "report.json").read_text())
    own = success.as_json()
    assert set(own) == {
        "source_language", "teachers", "students", "languages", "average", "gap", "paired_gap",
        "rounds", "std", "worst", "uses_labels"
    }  # fmt: skip
    of_the_run: dict[str, Any] = {"about": [], "costs": [], "warnings": [], "reproducibility": {}}
    assert metrics == own | of_the_run
    write_report(tmp_path, {"main": success, "paper": collapse}, Facts())
    assert json.loads((tmp_path / "report.json").read_text()) == own | of_the_run | {
        "variants": {"paper": collapse.as_json()}
    }
    assert "variants" not in success.as_json()


def test_markdown_holds_the_figures(tmp_path: Path, success: Evaluation, collapse: Evaluation) -> None:
    run_dir = tmp_path / "demo"
    write_report(
        run_dir, {"main": success, "paper": collapse}, Facts(details={"model": "runs/demo/model", "seconds": 1234.56})
    )
    text = (run_dir / "report.md").read_text()
    assert text.startswith("# Report of demo\n\n**All three conditions hold: ")
    languages = [line for line in text.splitlines() if re.match(r"\| (en|de|sw) ", line)]
    assert languages == [
        "| en | source, teacher | 70.0 | 70.0 | 0.0 | no significant change | 1.000 | −1.0 to +1.0 | 1,000 | 0.500 |",
        "| de | teacher | 40.0 | 55.0 | +15.0 | significantly better | 0.010 | +14.0 to +16.0 | 1,000 | 0.500 |",
        "| sw | – | 20.0 | 45.0 | +25.0 | significantly better | \\< 0.001 | +24.0 to +26.0 | 1,000 | 0.500 |",
    ]
    assert "| **Average over languages** | **43.3** | **56.7** | **+13.3** | **+12.3 to +14.3** |" in text
    assert "| **Gap (en minus the others)** | **40.0** | **20.0** | **−20.0** | **−21.0 to −19.0** |" in text
    assert "| before | 43.3 | 40.0 | 70.0 | 20.0 (sw) | – | – | – |" in text
    assert "| **main** | **56.7** | **20.0** | **70.0** | **45.0 (sw)** | **2** | **0** | **yes** |" in text
    assert "| paper | 40.0 | 0.0 | 40.0 | 40.0 (de) | 1 | 1 | no |" in text
    assert text.endswith("| model | runs/demo/model |\n| seconds | 1,234.6 |\n")
    assert (run_dir / "report.svg").exists()


class Page(HTMLParser):
    """Elements, attributes and visible texts of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_html_is_self_contained(tmp_path: Path, success: Evaluation, collapse: Evaluation) -> None:
    write_report(tmp_path, {"main": success, "paper": collapse}, Facts(details={"model": "runs/demo/model"}))
    text = (tmp_path / "report.html").read_text()
    assert not re.search(r"https?:|//\w|url\((?!#)|@import", text)
    page = Page(text)
    assert not page.tags & {"script", "link", "img", "iframe", "object", "embed", "base", "image"}
    assert not page.attributes & {"src", "href", "srcset"}
    assert set(re.findall('xlink:href="(.)', text)) <= {"#"}  # marks of a figure, drawn once in the figure itself
    assert len(names := re.findall(r' id="([^"]*)"', text)) == len(set(names))
    assert not any(name.startswith("on") for name in page.attributes)
    assert text.count("<svg ") == 3
    assert "prefers-color-scheme:dark" in text
    visible = " ".join(page.texts)
    for expected in ("All three conditions hold", "significantly better", "Teachers: en, de.", "runs/demo/model"):
        assert expected in visible
    write_report(tmp_path, {"main": success}, Facts())
    text = (tmp_path / "report.html").read_text()
    assert text.count("<svg ") == 2 and "Variants" not in text and "Where things are" not in text


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    before = {"en": 0.7} | dict.fromkeys(HOSTILE, 0.3)
    evaluation = make_evaluation(before, before, ("en", *HOSTILE[:2]))
    calm = make_evaluation({"en": 0.7, "de": 0.3}, {"en": 0.7, "de": 0.3})
    plain_page = tmp_path / "calm"
    write_report(plain_page, {"main": calm, "paper": calm}, Facts(details={"model": "x"}))
    write_report(tmp_path, {"main": evaluation, HOSTILE[0]: evaluation}, Facts(details={HOSTILE[0]: HOSTILE[1]}))
    text = (tmp_path / "report.html").read_text()
    expected, page = Page((plain_page / "report.html").read_text()), Page(text)
    assert page.tags == expected.tags and page.attributes == expected.attributes
    assert HOSTILE[0] in page.texts and HOSTILE[1] in page.texts
    svg = ElementTree.parse(tmp_path / "report.svg")
    assert not any("script" in element.tag for element in svg.iter())
    assert not any(name.startswith("on") for element in svg.iter() for name in element.attrib)
    assert HOSTILE[0][:23] in {(element.text or "")[:23] for element in svg.iter(f"{SVG}text")}
    for file in ("report.html", "report.svg", "report.md"):
        assert not re.search("[\x00-\x09\x0b-\x1f\u202e]", (tmp_path / file).read_text())
    table_rows = [line for line in (tmp_path / "report.md").read_text().splitlines() if "30.0 | 30.0" in line]
    assert len(table_rows) == len(HOSTILE)
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in table_rows} == {11}
    assert "<script>" not in (tmp_path / "report.md").read_text().replace("\\<script\\>", "")


def test_one_language_has_a_report_too(tmp_path: Path) -> None:
    alone = make_evaluation({"en": 0.7}, {"en": 0.8}, ())
    write_report(tmp_path, {"main": alone, "other": alone}, Facts())
    assert json.loads((tmp_path / "report.json").read_text())["gap"]["before"] is None
    assert "Gap: not defined" in format_plain(alone) and "Teachers: none" in format_plain(alone)
    assert "Score" not in (tmp_path / "report.md").read_text()


def printed(evaluation: Evaluation, terminal: bool, encoding: str = "utf-8") -> str:
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    print_summary(evaluation, Console(file=stream, force_terminal=terminal, width=100, color_system=None))
    stream.flush()
    return stream.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]


def test_final_table_on_a_terminal_and_in_a_log(success: Evaluation, collapse: Evaluation) -> None:
    shown = printed(success, terminal=True)
    assert "│ de       │ teacher         │   40.0 │  55.0 │  +15.0 │ significantly better  │" in shown
    assert format_table(success).row_count == 3
    log = printed(collapse, terminal=False).splitlines()
    assert log[:2] == [
        "Language  Role             Before  After  Change  Significance",
        "en        source, teacher    70.0   40.0   -30.0  significantly worse",
    ]
    assert "Average: 43.3 -> 40.0, -3.3 points (95 % interval -4.3 to -2.3)" in log
    assert "Gap: 40.0 -> 0.0, -40.0 points (95 % interval -41.0 to -39.0)" in log
    assert log[-1] == verdict(collapse).replace("−", "-")
    assert all(line.isascii() for line in log)


def test_final_table_survives_hostile_names_and_poor_encodings() -> None:
    before = {"en": 0.7} | dict.fromkeys((*HOSTILE, "日本語"), 0.3)
    evaluation = make_evaluation(before, before, ("en",))
    for terminal, encoding in ((True, "utf-8"), (False, "utf-8"), (True, "ascii"), (False, "latin-1")):
        shown = printed(evaluation, terminal, encoding)
        assert "[red]e" in shown and "\x1b[31mf" not in shown and "\x00" not in shown
        assert ("日本語" in shown) == (encoding == "utf-8")


def test_report_and_evaluate_start_without_heavy_modules() -> None:
    heavy = ["torch", "matplotlib", "scipy", "rich", "jinja2", "pyarrow", "transformers", "deepspeed", "datasets"]
    code = "import sys, alsace_dist.reporting.report, alsace_dist.stages.evaluate; "
    code += f"print([m for m in {heavy} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout.strip() == "[]"


def test_losses_that_a_small_test_set_cannot_see_are_said() -> None:
    """Of 30 examples none has changed, so that nobody is worse, and the bootstrap knows of no other result."""
    small = make_evaluation({"en": 0.7, "de": 0.4}, {"en": 0.7, "de": 0.5})
    few = {"num_examples": 30, "num_gained": 0, "num_lost": 0, "before": 0.4, "after": 0.4, "ci95": (0.0, 0.0)}
    small = small.model_copy(
        update={"languages": small.languages | {"de": small.languages["de"].model_copy(update=few)}}
    )
    one = "In 1 of 2 languages a loss of 5.0 points or more can be ruled out (95 % score interval)"
    assert ruled_out(small, 0.05) == f"{one}, not in de (up to 11.4)."
    every = "In every language a loss of 20.0 points or more can be ruled out (95 % score interval)."
    assert ruled_out(small, 0.2) == every
    tiny_set = {name: row.model_copy(update=few | {"num_examples": 20}) for name, row in small.languages.items()}
    said = ruled_out(small.model_copy(update={"languages": tiny_set}), 0.2)
    assert said == f"{every} With 20 examples the intervals of average and gap are too narrow."


def test_every_rounds_teachers_and_missing_translations_are_shown(tmp_path: Path, success: Evaluation) -> None:
    second = Round(teachers=["de"], scores={"de": 0.8, "en": 0.7})
    fewer = success.languages["sw"].model_copy(update={"num_examples": 10})
    several = success.model_copy(
        update={"rounds": [*success.rounds, second], "languages": success.languages | {"sw": fewer}}
    )
    write_report(tmp_path, {"main": several}, Facts())
    for name in ("report.md", "report.html"):
        text = (tmp_path / name).read_text()
        assert "Score in round 2" in text and "Paired gap (on the groups that both languages have)" in text
    assert "| de | \\[0.500\\] | \\[0.800\\] |" in (tmp_path / "report.md").read_text()
    assert "| sw | 0.500 | – |" in (tmp_path / "report.md").read_text()
    write_report(tmp_path, {"main": success}, Facts())
    assert "Paired gap" not in (tmp_path / "report.md").read_text()


def test_what_is_known_of_a_run_is_in_every_format(tmp_path: Path, success: Evaluation) -> None:
    warned = Warned(time="2026-12-01T00:00:00Z", stage="distill round 1", text=f"slow {HOSTILE[0]}")
    cost = Cost(time="2026-12-01T00:00:00Z", stage="score", seconds=7200, num_ranks=16, num_nodes=2, is_done=True)
    facts = Facts(
        about=["mT5-large answers with one of 3 labels.", "It was finetuned."],
        data=["test: 10 groups"],
        tables={"selection": [("What labels say", Table(["What"], [Row(["votes"])]))]}
        | {"data": [("Prompts of the split test", Table(["Language"], [Row([HOSTILE[2]])]))]},
        speeds=["distill round 1: 700 examples and 9,000 tokens a second (median)"],
        costs=[cost],
        warnings=[(warned, 3)],
        again={"command": "alsace run run/config.yaml"},
    )
    write_report(tmp_path, {"main": success}, facts)
    page, text = Page((tmp_path / "report.html").read_text()), (tmp_path / "report.md").read_text()
    visible = " ".join(page.texts)
    for expected in (
        "mT5-large answers with one of 3 labels. It was finetuned.",
        "What labels say",
        "Prompts of the split test",
        "700 examples and 9,000 tokens a second (median)",
        "alsace run run/config.yaml",
        "2 h 00 min",
        "4.00",
    ):
        assert expected in visible and expected in text
    assert f"distill round 1: slow {HOSTILE[0]} (said 3 times)" in visible and "<script" not in page.tags
    numbers = json.loads((tmp_path / "report.json").read_text())
    assert numbers["warnings"] == [warned.model_dump() | {"count": 3}] and numbers["costs"] == [cost.model_dump()]
