"""Figures show what the numbers say, stay inside, and can be read aloud."""

from functools import partial
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from reporting.test_report import HOSTILE, make_evaluation

from alsace_dist.reporting import figures, pictures
from alsace_dist.reporting.figures import COLOURS, Picture, reliability_of

BEFORE, AFTER = {"de": 0.4, "en": 0.7, "sw": 0.2}, {"de": 0.55, "en": 0.7, "sw": 0.15}


def changed() -> list[Picture]:
    found = make_evaluation(BEFORE, AFTER, ("en", "de"), {"de": 0.01, "sw": 0.001})
    return pictures.of_evaluation(found, 0.05)


def labels(figure: Any) -> list[str]:
    return [label.get_text() for label in figure.axes[0].get_yticklabels()]


def offsets(figure: Any) -> np.ndarray:
    """Where the marks are: across, down."""
    return np.array([one for marks in figure.axes[0].collections for one in marks.get_offsets().tolist()])


def test_each_language_is_a_row_with_a_mark_before_and_one_after() -> None:
    figure = changed()[0].draw()
    assert labels(figure) == ["en (source, teacher)", "de (teacher)", "sw"]  # the best before first
    assert offsets(figure) == pytest.approx(np.array([(70, 2), (70, 2), (40, 1), (55, 1), (20, 0), (15, 0)]))
    hollow, filled = figure.axes[0].collections[2:4]
    assert not len(hollow.get_facecolor()) and len(filled.get_facecolor())
    colours = [line.get_color() for line in figure.axes[0].lines]
    assert colours == [COLOURS["same"], COLOURS["better"], COLOURS["worse"]]
    assert [text.get_text() for text in figure.axes[0].texts] == ["0.0", "+15.0", "−5.0"]


def test_every_change_has_its_interval() -> None:
    figure = changed()[1].draw()
    assert labels(figure) == ["average", "gap (less is better)", "en", "de", "sw"]
    de = figure.axes[0].lines[1 + 3]  # after the line at 0, average, gap and en
    assert de.get_xdata() == pytest.approx([14, 16]) and offsets(figure)[3] == pytest.approx(np.array([15, 1]))


def test_what_a_figure_shows_is_said_in_words() -> None:
    first, second = changed()
    assert "average 43.3 to 46.7 %, gap to en 40.0 to 35.0 points. en 70.0 to 70.0; de 40.0 to 55.0" in first.alt
    assert "gap −5.0; en 0.0; de +15.0; sw −5.0" in second.alt
    assert 'aria-label="Accuracy in % by language' in first.svg() and "currentColor" in first.svg()


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_extreme_accuracies_stay_inside(value: float) -> None:
    same = {"en": value, "de": value}
    evaluation = make_evaluation(same, same, ("en", "de"))
    drawn = [*pictures.of_evaluation(evaluation, 0.05), pictures.of_variants({"main": evaluation, "other": evaluation})]
    for picture in drawn:
        figure = picture.draw()
        (low, high), marks = figure.axes[0].get_xlim(), offsets(figure)
        assert len(marks) and all(low <= across <= high for across, _ in marks)
        _, (width, height) = picture.png()
        assert 200 < width < 1200 and 80 < height < 800


def test_two_hundred_languages_are_drawn() -> None:
    names = {f"l{number:03}": number / 210 for number in range(205)} | {"en": 1.0}
    _, (width, height) = pictures.of_evaluation(make_evaluation(names, names), 0.05)[0].png()
    assert width < 1200 and height > 3000


def test_a_name_is_text_whatever_it_holds() -> None:
    names = {"en": 0.9} | dict.fromkeys((*HOSTILE, "$x^2$", "_a_", "日本語"), 0.5)
    for picture in pictures.of_evaluation(make_evaluation(names, names), 0.05):
        root = ElementTree.fromstring(picture.standalone())
        shown = {"".join(element.itertext()).strip() for element in root.iter("{http://www.w3.org/2000/svg}text")}
        assert {"$x^2$", "_a_", "日本語"} <= shown or picture.name == "languages"
        assert not any("script" in element.tag for element in root.iter())
        assert "<script" not in picture.svg()


def test_the_same_numbers_are_the_same_file() -> None:
    assert [one.svg() for one in changed()] == [one.svg() for one in changed()]


def test_confidence_and_accuracy_are_binned_by_hand() -> None:
    confidence = np.array([0.05, 0.51, 0.55, 0.95, 1.0])
    found = reliability_of(confidence, np.array([False, True, False, True, True]))
    assert found is not None
    assert found.confidence == pytest.approx([0.05, 0.53, 0.975])
    assert found.accuracy == pytest.approx([0.0, 0.5, 1.0]) and found.count.tolist() == [1, 2, 2]
    assert found.error == pytest.approx((0.05 + 2 * 0.03 + 2 * 0.025) / 5)
    assert reliability_of(np.array([]), np.array([])) is None


def test_other_figures_draw_what_they_are_given() -> None:
    shown = figures.scores([("en", 0.9, (0.8, 0.95), True), ("de", 0.5, (0.4, 0.6), False)], 0.7)
    assert labels(shown) == ["en", "de"] and offsets(shown) == pytest.approx(np.array([(0.9, 1), (0.5, 0)]))
    square = figures.matrix(["en", "de"], np.array([[1.0, np.nan], [np.nan, 1.0]]))
    assert [text.get_text() for text in square.axes[0].texts] == ["1.00", "1.00"]
    curves = Picture("c", "t", "a", partial(figures.curves, {"finetune": {"loss": [(1, 2.0), (2, 1.0)], "x": []}}))
    assert curves.draw().axes[0].lines[0].get_ydata() == pytest.approx([2.0, 1.0])
    assert pictures.of_trainings({"finetune": [], "distill": [{"step": 1}]}) is None
