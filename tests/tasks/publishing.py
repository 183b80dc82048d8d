"""Small published datasets, written in every layout in which the real ones are."""

import csv
import gzip
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

NLI = {
    "fields": ["premise", "hypothesis"],
    "template": "{premise} {hypothesis}",
    "labels": ["entailment", "neutral", "contradiction"],
}
PARAPHRASES = {"fields": ["sentence1", "sentence2"], "template": "{sentence1} {sentence2}", "labels": ["0", "1"]}
TOPICS = {
    "fields": ["text"],
    "template": "{text}",
    "labels": ["science/technology", "travel", "politics", "sports", "health", "entertainment", "geography"],
}

# Right to left, no blanks, combining marks, joiners, astral letters, what looks like a line's end, and quotes.
PREMISES = {
    "en": ['"Mum," he said, "I\'m home."', "cafe\u0301 \U0001f469\u200d\U0001f52c e\u2028nd"],
    "ar": ['قال: "أمي، أنا في البيت."', "مقهى \u200fصغير\u061f"],
    "ur": ["اس نے کہا، امی، میں گھر آ گیا۔", "ایک چھوٹا\u200cسا کیفے"],
    "th": ["เขาพูดว่า “แม่ ผมกลับมาแล้ว”", "ร้านกาแฟ น้ำ"],
    "zh": ["他说，“妈妈，我回来了。”", "一家小咖啡馆𠮷"],
    "hi": ["उसने कहा, माँ, मैं घर आ गया।", "क़हवा ख़ाना"],
}
LABELS = ["neutral", "contradiction", "entailment"]


def nli_rows(language: str) -> list[dict[str, Any]]:
    """Six rows: three hypotheses for each of two premises."""
    rows = []
    for number in range(6):
        premise = PREMISES[language][number // 3]
        row = {"premise": premise, "hypothesis": f"{premise[::-1]} {language}{number}", "label": LABELS[number % 3]}
        rows.append(row | {"pairID": str(70 + number), "promptID": str(30 + number // 3)})
    return rows


def texts_of(rows: Sequence[dict[str, Any]], fields: Sequence[str]) -> list[dict[str, str]]:
    return [{field: row[field] for field in fields} for row in rows]


def write_lines(path: str, rows: Sequence[Sequence[str]], end: str = "\n") -> None:
    """Cells separated by tabs, quotes being letters."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    data = "".join("\t".join(row) + end for row in rows).encode()
    Path(path).write_bytes(gzip.compress(data) if path.endswith(".gz") else data)


def write_csv(path: str, rows: Sequence[Sequence[str]]) -> None:
    """Cells separated by tabs, and quoted where they hold quotes."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with Path(path).open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter="\t", lineterminator="\n").writerows(rows)


def write_parquet(path: str, columns: dict[str, Any]) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


def columns_of(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> dict[str, Any]:
    return {name: [row[name] for row in rows] for name in names}


# --- XNLI ----------------------------------------------------------------------------------------------------------

ORIGINAL_HEADER = ["language", "gold_label", "sentence1_binary_parse", "sentence1", "sentence2", "promptID", "pairID"]


def xnli_original(folder: str) -> None:
    """All languages in one file, one after another; the parses are empty."""
    rows = [ORIGINAL_HEADER]
    for language in PREMISES:
        for row in nli_rows(language):
            ids = [row["promptID"], row["pairID"]]
            rows.append([language, row["label"], "", row["premise"], row["hypothesis"], *ids])
    write_lines(f"{folder}/XNLI-1.0/xnli.dev.tsv", rows)


def xnli_original_jsonl(folder: str) -> None:
    lines = []
    for language in PREMISES:
        for row in nli_rows(language):
            record = {"language": language, "gold_label": row["label"], "sentence1": row["premise"]}
            lines.append(record | {"sentence2": row["hypothesis"], "pairID": row["pairID"]})
    Path(folder).mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    Path(f"{folder}/xnli.dev.jsonl").write_text(text, encoding="utf-8")


def xnli_translated(folder: str) -> None:
    for language in PREMISES:
        rows = nli_rows(language)
        cells = [[row["premise"], row["hypothesis"], row["label"]] for row in rows]
        cells = [[*row[:2], row[2].replace("contradiction", "contradictory")] for row in cells]
        header = ["premise", "hypo", "label"]
        write_lines(f"{folder}/XNLI-MT-1.0/multinli/multinli.dev.{language}.tsv", [header, *cells])


def _nli_cells(language: str) -> list[list[str]]:
    return [[row["premise"], row["hypothesis"], row["label"]] for row in nli_rows(language)]


def xnli_xtreme(folder: str) -> None:
    for language in PREMISES:
        rows = [[str(number), *cells] for number, cells in enumerate(_nli_cells(language))]
        write_lines(f"{folder}/dev.{language}.tsv", [["row", "premise", "hypothesis", "label"], *rows], "\r\n")
    write_lines(f"{folder}/meta.dev.tsv", [["row", "promptID"], ["0", "30"]])


def xnli_xtreme_bare(folder: str) -> None:
    for language in PREMISES:
        write_lines(f"{folder}/dev-{language}.tsv", _nli_cells(language))


def xnli_xtreme_quoted(folder: str) -> None:
    """As pandas writes it, with a BOM, as spreadsheets do, in one of them."""
    for language in PREMISES:
        write_csv(f"{folder}/dev.{language}.tsv", [["premise", "hypothesis", "label"], *_nli_cells(language)])
    path = Path(f"{folder}/dev.ar.tsv")
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())


def xnli_packed(folder: str) -> None:
    for language in PREMISES:
        write_lines(f"{folder}/dev.{language}.tsv.gz", [["premise", "hypothesis", "label"], *_nli_cells(language)])


def _numbered(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    columns = columns_of(rows, ["premise", "hypothesis"])
    return columns | {"label": [NLI["labels"].index(row["label"]) for row in rows]}


def xnli_hub(folder: str) -> None:
    """A folder for each configuration; the rows of one language are in two files."""
    for language in PREMISES:
        rows = nli_rows(language)
        cut = 4 if language == "th" else 6
        write_parquet(f"{folder}/{language}/validation-00000-of-00002.parquet", _numbered(rows[:cut]))
        if cut < 6:
            write_parquet(f"{folder}/{language}/validation-00001-of-00002.parquet", _numbered(rows[cut:]))
    xnli_hub_all(folder)


def xnli_hub_converted(folder: str) -> None:
    for language in PREMISES:
        write_parquet(f"{folder}/{language}/validation/0000.parquet", _numbered(nli_rows(language)))


def mappings() -> dict[str, list[Any]]:
    """The columns of the hub's configuration all_languages."""
    rows = {language: nli_rows(language) for language in PREMISES}
    hypotheses = [[rows[language][number]["hypothesis"] for language in PREMISES] for number in range(6)]
    return {
        "premise": [{language: rows[language][number]["premise"] for language in PREMISES} for number in range(6)],
        "hypothesis": [{"language": list(PREMISES), "translation": texts} for texts in hypotheses],
        "label": [NLI["labels"].index(row["label"]) for row in rows["en"]],
    }


def xnli_hub_all(folder: str) -> None:
    write_parquet(f"{folder}/all_languages/validation-00000-of-00001.parquet", mappings())


def xnli_saved(folder: str) -> None:
    """As ``save_to_disk`` writes the configurations."""
    import datasets

    for language in PREMISES:
        one = datasets.Dataset.from_dict(_numbered(nli_rows(language)))
        one = one.cast_column("label", datasets.ClassLabel(names=NLI["labels"]))
        datasets.DatasetDict({"validation": one}).save_to_disk(f"{folder}/{language}")


def xnli_saved_all(folder: str) -> None:
    import datasets

    features = datasets.Features(
        {
            "premise": datasets.Translation(languages=list(PREMISES)),
            "hypothesis": datasets.TranslationVariableLanguages(languages=list(PREMISES)),
            "label": datasets.ClassLabel(names=NLI["labels"]),
        }
    )
    columns = mappings()
    columns["hypothesis"] = [
        dict(zip(cell["language"], cell["translation"], strict=True)) for cell in columns["hypothesis"]
    ]
    one = datasets.Dataset.from_dict(columns, features=features)
    datasets.DatasetDict({"validation": one}).save_to_disk(folder)


XNLI: dict[str, Callable[[str], None]] = {
    "original": xnli_original,
    "original jsonl": xnli_original_jsonl,
    "translated": xnli_translated,
    "xtreme": xnli_xtreme,
    "xtreme without names": xnli_xtreme_bare,
    "xtreme quoted": xnli_xtreme_quoted,
    "packed": xnli_packed,
    "hub": xnli_hub,
    "hub converted": xnli_hub_converted,
    "hub all languages": xnli_hub_all,
    "saved": xnli_saved,
    "saved all languages": xnli_saved_all,
}

# --- PAWS-X --------------------------------------------------------------------------------------------------------

SENTENCES = {
    "en": ["A was born in B .", "He ` said '' so .", "C met D .", "E flew ."],
    "de": ['"A" wurde in B geboren.', "NS", "C traf D.", "E flog."],
    "ko": ["A는 B에서 태어났다.", "그가 “그렇게” 말했다.", "C는 D를 만났다.", "E는 날았다."],
    "ja": ["Aは``B''で生まれた。", "彼はそう言った。", "NS", "Eは飛んだ。"],
}


def paws_rows(language: str, part: str = "dev") -> list[dict[str, Any]]:
    """Four rows with ids 4, 6, 7, 9; NS rows have label 0, whatever is true; the test hides the last label."""
    labels = ["1", "1", "0", "-1" if part == "test" else "0"]
    rows = []
    for key, sentence, label in zip((4, 6, 7, 9), SENTENCES[language], labels, strict=True):
        own = "0" if sentence == "NS" else label
        other = sentence if sentence == "NS" else f"{sentence} {language} \u00e9e\u0301"
        rows.append({"id": str(key), "sentence1": sentence, "sentence2": other, "label": own})
    return rows


PAWS_COLUMNS = ["id", "sentence1", "sentence2", "label"]


def _paws_cells(language: str, part: str) -> list[list[str]]:
    return [[row[name] for name in PAWS_COLUMNS] for row in paws_rows(language, part)]


def pawsx_original(folder: str) -> None:
    for language in SENTENCES:
        for part in ("dev", "test"):
            cells = _paws_cells(language, part)
            write_csv(f"{folder}/x-final/{language}/{part}_2k.tsv", [PAWS_COLUMNS, *cells])
        cells = [row for row in _paws_cells(language, "dev") if language == "en" or row[0] != "4"]
        name = "train" if language == "en" else "translated_train"
        write_csv(f"{folder}/x-final/{language}/{name}.tsv", [PAWS_COLUMNS, *cells])


def pawsx_xtreme(folder: str) -> None:
    for language in SENTENCES:
        for part in ("dev", "test"):
            cells = [[*row, str(int("NS" in row))] for row in _paws_cells(language, part)]
            write_csv(f"{folder}/{part}.{language}.tsv", [[*PAWS_COLUMNS, "ns"], *cells])


def pawsx_xtreme_bare(folder: str) -> None:
    for language in SENTENCES:
        for part in ("dev", "test"):
            write_lines(f"{folder}/{part}-{language}.tsv", [row[1:] for row in _paws_cells(language, part)])


def pawsx_hub(folder: str) -> None:
    for language in SENTENCES:
        for part, name in (("dev", "validation"), ("test", "test")):
            columns = columns_of(paws_rows(language, part), PAWS_COLUMNS)
            columns |= {"id": [int(key) for key in columns["id"]], "label": [int(one) for one in columns["label"]]}
            write_parquet(f"{folder}/{language}/{name}-00000-of-00001.parquet", columns)


PAWSX: dict[str, Callable[[str], None]] = {
    "original": pawsx_original,
    "xtreme": pawsx_xtreme,
    "xtreme without names": pawsx_xtreme_bare,
    "hub": pawsx_hub,
}

# --- SIB-200 -------------------------------------------------------------------------------------------------------

TOPIC_TEXTS = {
    "eng_Latn": ['"Run," she said.', 'A tab\tand a "quote"', "Mutation adds variation."],
    "arb_Arab": ['قالت: "اركض".', "سطر\u2028آخر", "الطفرة."],
    "nqo_Nkoo": ["ߊ߬ ߞߊ߬", "ߒߞߏ", "ߓߊ߯ߙߊ"],
    "tha_Thai": ['เธอพูดว่า "วิ่ง"', "น้ำใจ", "การกลายพันธุ์"],
    "yor_Latn": ['Ó ní "sá"', "Ọ̀kan ṣọ̀", "Ìyípadà"],
}


def sib_rows(language: str) -> list[list[str]]:
    topics = ["sports", "travel", "science/technology"]
    return [[key, topic, text] for key, topic, text in zip("548", topics, TOPIC_TEXTS[language], strict=True)]


def _sib_files(folder: str) -> None:
    for language in TOPIC_TEXTS:
        for part in ("train", "dev", "test"):
            write_csv(f"{folder}/{language}/{part}.tsv", [["index_id", "category", "text"], *sib_rows(language)])


def sib_repository(folder: str) -> None:
    _sib_files(f"{folder}/data/annotated")


def sib_hub(folder: str) -> None:
    for language in TOPIC_TEXTS:
        keys, topics, texts = (list(column) for column in zip(*sib_rows(language), strict=True))
        columns = {"index_id": [int(key) for key in keys], "category": topics, "text": texts}
        write_parquet(f"{folder}/{language}/validation-00000-of-00001.parquet", columns)


SIB200: dict[str, Callable[[str], None]] = {"files": _sib_files, "repository": sib_repository, "hub": sib_hub}

# --- XCOPA ---------------------------------------------------------------------------------------------------------

CHOICES: dict[str, Any] = {
    "fields": ["premise", "question", "choice1", "choice2"],
    "template": "{premise} {question} {answer}",
    "words": {"question": {"cause": "because", "effect": "so"}},
    "labels": [0, 1],
    "candidates": ["choice1", "choice2"],
}
CAUSES = ("cause", "effect", "cause", "cause")  # as COPA asks; item 3 is asked wrong in all but English
PLOTS = {
    "en": ["It rained.", 'She said "no".', "The door\tslammed.", "He laughed."],
    "et": ["Sadas vihma.", 'Ta ütles "ei".', "Uks paugatas.", "Ta naeris."],
    "th": ["ฝนตก", "เธอพูดว่า “ไม่”", "ประตูปิดดังปัง\u2028", "เขาหัวเราะ น้ำใจ"],
    "zh": ["下雨了。", "她说“不”。", "门砰地关上了。", "他笑了𠮷。"],
    "qu": ["Parachkan.", "Manam nirqan.", "Punkum wichqakurqan.", "Asirqan."],
}


def copa_rows(language: str) -> list[dict[str, Any]]:
    """Four rows of both choices right in turn. Thai says "effect" of every item, Quechua and English rarely differ."""
    rows = []
    for number, premise in enumerate(PLOTS[language]):
        question = "effect" if language == "th" or (number == 3 and language == "zh") else CAUSES[number]
        choices = {"choice1": f"{premise} {language} a", "choice2": f"{language} b é {premise}"}
        rows.append({"premise": premise, **choices, "question": question, "label": number % 2, "idx": number})
    return rows


def _write_choices(path: str, language: str, end: str = "\r\n") -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    rows = [row | ({} if language == "en" else {"changed": False}) for row in copa_rows(language)]
    text = "".join(json.dumps(row, ensure_ascii=False) + end for row in rows)
    Path(path).write_bytes(text.encode())


def xcopa_original(folder: str) -> None:
    """The repository, with English beside it, as COPA is in XCOPA's keys."""
    for language in PLOTS:
        for part in ("val", "test"):
            if language == "en":
                _write_choices(f"{folder}-en/{part}.en.jsonl", "en", "\n")
            else:
                _write_choices(f"{folder}/data/{language}/{part}.{language}.jsonl", language)
    _write_choices(f"{folder}-en/train.en.jsonl", "en", "\n")


def xcopa_with_superglue(folder: str) -> None:
    xcopa_original(folder)
    for part in ("val", "test", "train"):
        Path(f"{folder}-en/{part}.en.jsonl").rename(f"{folder}-en/{part}.jsonl")


def xcopa_hub(folder: str) -> None:
    names = ["premise", "choice1", "choice2", "question", "label", "idx"]
    for language in PLOTS:
        base = f"{folder}-en/copa" if language == "en" else f"{folder}/{language}"
        for part in ("validation", "test", *(["train"] * (language == "en"))):
            write_parquet(f"{base}/{part}-00000-of-00001.parquet", columns_of(copa_rows(language), names))


XCOPA: dict[str, Callable[[str], None]] = {
    "original": xcopa_original,
    "with SuperGLUE": xcopa_with_superglue,
    "hub": xcopa_hub,
}

# --- GeoMLAMA ------------------------------------------------------------------------------------------------------

GAPS: dict[str, Any] = {
    "fields": ["prompt"],
    "template": "{prompt}",
    "labels": [],
    "candidates": "own",
    "gap": "<mask>",
}
PLACES = {
    "en": ("the US", "China", "India", "Iran", "Kenya"),
    "zh": ("美国", "中国", "印度", "伊朗", "肯尼亚"),
    "hi": ("अमेरिका", "चीन", "भारत", "ईरान", "केन्या"),
    "fa": ("آمریکا", "چین", "هند", "ایران", "کنیا"),
    "sw": ("Marekani", "China", "India", "Iran", "Kenya"),
}
# Concept -> language -> a sentence with the gap and a place, and its candidates in the order of the real files.
QUESTIONS: dict[int, dict[str, tuple[str, list[str]]]] = {
    0: {
        "en": ("In {} cars keep <mask>.", ["right", "left", "middle", "any"]),
        "zh": ("{}的车靠<mask>", ["右", "左", "中", "任意"]),
        "hi": ("{} में कारें <mask> चलती हैं।", ["बाएं", "दायें", "बीच", "कहीं"]),
        "fa": ("<mask> سمت رانندگی در {} است", ["راست", "چپ", "وسط", "هرجا"]),
        "sw": ("Magari ya {} huenda <mask>", ["kulia", "kushoto", "katikati", "popote"]),
    },
    1: {
        "en": ('The driver of {} sits "<mask>".', ["right", "left", "front", "back"]),
        "zh": ("{}的司机坐在<mask>边", ["右", "左", "前", "后"]),
        "hi": ("{} का चालक <mask> बैठता है।", ["बाएं", "दायें", "आगे", "पीछे"]),
        "fa": ("راننده در {} سمت <mask> می نشیند", ["راست", "چپ", "جلو", "عقب"]),
        "sw": ("Dereva wa {} huketi <mask>", ["kulia", "kushoto", "mbele", "nyuma"]),
    },
}
RIGHT = {0: [[0], [0], [1], [0, 2], [1]], 1: [[1], [1], [0], [1], [0, 3]]}  # by country, in the order of English
HINDI = [1, 0, 2, 3]


def geo_candidates(concept: int, language: str) -> list[str]:
    """In the order of English."""
    words = QUESTIONS[concept][language][1]
    return [words[place] for place in HINDI] if language == "hi" else words


def geomlama(folder: str) -> None:
    """Two concepts; CRLF, a blank line between them, columns beside, and four paraphrases of each row."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for language in PLACES:
        lines = ["\t".join(["Prompt", "Corresponding Questions", "Ans", "Candidate Ans", "Context"])]
        further = []
        for concept, questions in QUESTIONS.items():
            sentence, candidates = questions[language]
            for country, place in enumerate(PLACES[language]):
                right = ", ".join(geo_candidates(concept, language)[index] for index in RIGHT[concept][country])
                lines.append("\t".join([sentence.format(place), "?", right, ", ".join(candidates), ""]))
            lines += ["\t" * 4] * (concept == 0)
            further += [f"{sentence.format(place)} ({n})" for n in range(1, 5) for place in PLACES[language]]
        Path(f"{folder}/gd_prompt_{language}.tsv").write_bytes("\r\n".join([*lines, ""]).encode())
        Path(f"{folder}/gd_prompt_{language}_aug.tsv").write_bytes("\r\n".join(further).encode())
