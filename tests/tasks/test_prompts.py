"""The prompts that come with published datasets: whole and valid in every language, shown as the model reads them."""

import re
from pathlib import Path
from typing import Any

import pytest
from tasks import publishing

from alsace_dist import tasks
from alsace_dist.config import Config, TaskConfig, prompts
from alsace_dist.data import show
from alsace_dist.errors import UserError
from alsace_dist.stages.prepare import prepare
from alsace_dist.tasks import geomlama

RUN = Path("run/data")
SETS = ["geomlama", "pawsx", "sib200", "xcopa", "xnli"]


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def config_of(inputs: list[dict[str, Any]], task: dict[str, Any], **data: Any) -> Config:
    value = {"run_dir": "run", "model": {"path": "some/mt5"}, "data": {"inputs": inputs, **data}, "task": task}
    return Config.model_validate(value)


def languages_of(name: str) -> set[str]:
    """The languages that there must be native prompts for."""
    dataset = tasks.dataset(name)
    if not isinstance(dataset, tasks.Published):
        return set(geomlama.LANGUAGES)
    if isinstance(dataset.languages, tuple):
        return set(dataset.languages)
    configured = (Path(__file__).parents[2] / "configs/sib200-mt5-large.yaml").read_text(encoding="utf-8")
    return set(dataset.languages.findall(configured))


def test_there_are_prompts_for_every_set_of_the_paper_and_sib200() -> None:
    assert prompts.datasets() == SETS


@pytest.mark.parametrize("score", ["sum", "mean", "pmi", "mean_pmi"])
@pytest.mark.parametrize("choice", ["english", "native"])
@pytest.mark.parametrize("name", SETS)
def test_they_are_whole_in_every_language(name: str, choice: str, score: str) -> None:
    """As fields, labels and answers of a dataset, with a prompt without context where scores need one."""
    value = {"template": f"{name}/{choice}", "candidate_score": score}
    task = TaskConfig.model_validate(prompts.filled_in(value, []))
    dataset = tasks.dataset(name)
    if isinstance(dataset, tasks.Published):
        assert set(task.fields) == set(dataset.fields) and task.labels == list(dataset.labels)
    languages = languages_of(name) if choice == "native" else {"default"}
    for texts in (task.templates(), task.words_of(), task.answers(), task.context_free_templates()):
        assert not texts or set(texts) == languages
    assert bool(task.context_free_templates()) == ("pmi" in score)
    if not task.gap:
        every = [*task.templates().values(), *task.context_free_templates().values()]
        assert all(
            re.search(r"(^| )\{answer\}", template) for template in every
        )  # mT5 needs a blank before its sentinel


def test_native_prompts_differ_from_english_and_from_each_other() -> None:
    for name in ("xnli", "pawsx", "sib200", "xcopa"):
        task = TaskConfig.model_validate(prompts.filled_in({"template": f"{name}/native"}, []))
        said = [(task.templates()[language], repr(task.words_of().get(language))) for language in task.templates()]
        assert len(set(said)) == len(said)
        answers = task.answers().values()
        assert len({tuple(one) for one in answers}) == len(answers)


def test_answers_follow_the_order_of_the_labels() -> None:
    labels = ["contradiction", "entailment", "neutral"]
    for choice, language, expected in (
        ("english", "default", ["No", "Yes", "Maybe"]),
        ("native", "zh", ["否", "是", "可能"]),
    ):
        task = TaskConfig.model_validate(prompts.filled_in({"template": f"xnli/{choice}", "labels": labels}, []))
        assert task.answers()[language] == expected
    own = {"template": "xnli/native", "verbalizers": ["true", "unclear", "false"]}
    assert TaskConfig.model_validate(prompts.filled_in(own, [])).answers() == {"default": own["verbalizers"]}


SHOWN: dict[str, tuple[Any, str, str, list[str]]] = {
    "xnli": (publishing.xnli_xtreme, "en", "th", ["คำถาม:", "ใช่ ไม่ใช่ หรืออาจจะ? {answer}", "    อาจจะ"]),
    "pawsx": (publishing.pawsx_xtreme, "en", "ko", ["두 문장의 뜻이 같습니까? 예 또는 아니요? {answer}", "    아니요"]),
    "sib200": (publishing.SIB200["files"], "eng_Latn", "yor_Latn", ["Àkòrí: {answer}", "    ìlera"]),
}


@pytest.mark.parametrize("name", SHOWN)
def test_they_are_shown_for_every_language(name: str) -> None:
    write, source, language, expected = SHOWN[name]
    write("set")
    one = {"kind": name, "path": "set", "hub_split": "dev", "split": "test"}
    named = {"sib200": ["eng_Latn", "arb_Arab", "tha_Thai", "yor_Latn"]}.get(name)
    config = config_of([one], {"template": "native"}, source_language=source, languages=named)
    found = prepare(config, RUN)["test"].languages
    lines = list(show.prompts(config))
    assert [line.partition(":")[0] for line in lines if not line.startswith(" ")] == sorted(found)
    start = next(number for number, line in enumerate(lines) if line.startswith(f"{language}:"))
    shown = "\n".join(lines[start : start + 10])
    assert all(text in shown for text in expected), shown
    english = "\n".join(
        show.prompts(config_of([one], {"template": "english"}, source_language=source, languages=named))
    )
    question = {"xnli": "Yes, no or maybe?", "pawsx": "Yes or no?", "sib200": "Topic:"}[name]
    assert english.count(question) == len(found)


def test_a_language_without_native_prompts_is_named() -> None:
    publishing.SIB200["files"]("set")
    one = {"kind": "sib200", "path": "set", "hub_split": "dev", "split": "test"}
    with pytest.raises(
        UserError,
        match=r"task\.template: has nothing for language 'nqo_Nkoo' and no default; add one, or take template: english",
    ):
        prepare(config_of([one], {"template": "native"}, source_language="eng_Latn"), RUN)
    task = {"template": "native", "verbalizers": ["a", "b", "c", "d", "e", "f", "g"]}
    with pytest.raises(UserError, match="'nqo_Nkoo'"):
        prepare(config_of([one], task, source_language="eng_Latn"), RUN)


def test_an_explicit_template_stays_what_it_is() -> None:
    one = {"kind": "xnli", "path": "set", "split": "test"}
    task = config_of([one], {**publishing.NLI, "template": "{premise} native {hypothesis}"}).task
    assert task.templates() == {"default": "{premise} native {hypothesis}"} and task.prompts == ""
    both = [one, {"kind": "pawsx", "path": "set", "split": "unlabeled"}]
    with pytest.raises(ValueError, match=r"data\.inputs names pawsx and xnli; write SET/english, where SET is"):
        config_of(both, {"template": "english"})
