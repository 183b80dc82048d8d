"""WebDataset shards of parallel groups: schema, deterministic writer, verified reader.

A dataset is a directory (or an fsspec URL) of tars and a ``manifest.json``. A shard holds one member per parallel
group, ``<key>.json``: ``{"label": 0 | [0, 2] | null, "texts": {"en": {"premise": ..., "hypothesis": ...}, "de": {}}}``,
and ``"candidates": {"en": [...], "de": [...]}``, ``"apart"`` and ``"category"`` where groups have such.
"""

import io
import json
import tarfile
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, TypeVar
from urllib.parse import quote, unquote

from pydantic import ConfigDict, Field

from alsace_dist import reading
from alsace_dist.config import Config, Section
from alsace_dist.config_file import validate
from alsace_dist.errors import NotReady, UserError
from alsace_dist.files import store
from alsace_dist.files.cache import Cache, cache_of
from alsace_dist.files.layout import data_url
from alsace_dist.files.manifest import (
    FORMAT_VERSION,
    MANIFEST,
    Manifest,
    atomic_path,
    digest_bytes,
    parse_manifest,
    write_manifest,
)
from alsace_dist.files.reader import ShardInfo, ShardReader

KIND = "dataset"


Value = TypeVar("Value")
Label = int | tuple[int, ...] | None  # which candidate is right, or which several are; None: nobody says


@dataclass(frozen=True)
class ParallelGroup:
    """One example in several languages.

    ``label``: index into the task's labels, or into the group's own candidates. ``texts``: language -> field -> text.
    ``candidates``: language -> the group's own candidates, in an order that is the same in all languages but those in
    ``apart``: their candidates correspond to nobody else's, and they have labels of their own. ``category``: by what
    results are shown beside language, such as the country that is asked about.
    """

    key: str
    label: Label
    texts: dict[str, dict[str, str]]
    candidates: dict[str, tuple[str, ...]] = field(default_factory=dict)
    apart: dict[str, Label] = field(default_factory=dict)
    category: str = ""

    def label_of(self, language: str) -> Label:
        """The label in the order that a language has the candidates in."""
        return self.apart.get(language, self.label)

    def without_labels(self) -> "ParallelGroup":
        """The same with nobody saying what is right."""
        return replace(self, label=None, apart=dict.fromkeys(self.apart))

    def in_languages(self, languages: Collection[str]) -> "ParallelGroup":
        """The same in these languages alone."""
        return replace(
            self,
            texts=_in(self.texts, languages),
            candidates=_in(self.candidates, languages),
            apart=_in(self.apart, languages),
        )


def _in(values: Mapping[str, Value], languages: Collection[str]) -> dict[str, Value]:
    return {language: value for language, value in values.items() if language in languages}


def golds(label: Label) -> tuple[int, ...]:
    """The right candidates of a label; none without one."""
    return () if label is None else (label,) if isinstance(label, int) else label


@dataclass(frozen=True)
class Dataset:
    """An opened dataset: where it is, its shards in order, its languages (sorted), its identity, and what reads it."""

    url: str
    shards: tuple[ShardInfo, ...]
    languages: tuple[str, ...]
    labels: tuple[str, ...]
    digest: str
    reader: ShardReader = field(compare=False, repr=False)

    def expect(self, shards: Iterable[int]) -> None:
        """Say which shards will be read next, by number: of a store the first of them are fetched at once."""
        self.reader.expect(self.shards[shard] for shard in shards)

    @property
    def num_groups(self) -> int:
        """Groups over all shards."""
        return sum(shard.num_groups for shard in self.shards)


Number = Annotated[int, Field(ge=0)]


class _ShardRow(Section):
    name: Annotated[str, Field(pattern=r"^[^/]+\.tar$")]  # later stages name files after the stem
    num_groups: Number
    num_examples: dict[str, Number]


class SplitCounts(Section):
    """What a split holds. ``languages_per_group``: number of languages -> groups; ``rows``: language -> rows;
    ``labels``: language -> label -> rows, where groups have labels; ``apart``: language -> rows whose candidates
    correspond to no other language's."""

    num_groups: Number
    languages_per_group: dict[Annotated[str, Field(pattern="^[0-9]+$")], Number]
    rows: dict[str, Number]
    labels: dict[str, dict[str, Number]]
    apart: dict[str, Number] = {}


class Audit(Section):
    """The audit of prepared data: split -> counts, and languages that only one of the splits has."""

    splits: dict[str, SplitCounts] = {}
    only_in_one_split: dict[str, str] = {}


class DataDetails(Section):
    """The ``details`` of the manifest over all prepared splits, as far as this program reads them. ``bad_records``:
    kind -> records left out; ``num_missing``: language -> texts that say that there is no translation; ``num_changed``:
    language -> rows in which a field was corrected that all languages share."""

    model_config = ConfigDict(extra="ignore")

    audit: Audit = Audit()
    bad_records: dict[str, Number] = {}
    num_missing: dict[str, Number] = {}
    num_changed: dict[str, Number] = {}


class DatasetDetails(Section):
    """The ``details`` of a dataset's manifest, as far as this program reads them."""

    model_config = ConfigDict(extra="ignore")

    shards: list[_ShardRow]
    labels: list[str]


def write_dataset(
    directory: Path,
    groups: Iterable[ParallelGroup],
    labels: tuple[str, ...],
    groups_per_shard: int,
    fingerprint: dict[str, Any],
    details: dict[str, Any] | None = None,
) -> Dataset:
    """Write groups, in their order, as shards of ``groups_per_shard`` and a manifest.

    The bytes depend on nothing but the arguments. ``labels``: the task's label names, which
    ``ParallelGroup.label`` indexes.
    """
    shards: list[dict[str, Any]] = []
    paths: list[Path] = []
    remaining = iter(groups)
    while chunk := list(islice(remaining, groups_per_shard)):
        path = directory / f"{len(shards):06d}.tar"
        with atomic_path(path) as temporary:
            _write_tar(temporary, chunk)
        num_examples = Counter(language for group in chunk for language in group.texts)
        shards.append({"name": path.name, "num_groups": len(chunk), "num_examples": dict(sorted(num_examples.items()))})
        paths.append(path)
    manifest = write_manifest(
        directory, KIND, fingerprint, paths, {"shards": shards, "labels": list(labels), **(details or {})}
    )
    return _dataset(str(directory), manifest)


def _write_tar(path: Path, groups: Iterable[ParallelGroup]) -> None:
    import webdataset  # webdataset imports torch

    with (
        path.open("wb") as file,
        webdataset.TarWriter(
            file, user="alsace", group="alsace", mode=0o644, mtime=0, encoder=False, format="PAX_FORMAT"
        ) as writer,
    ):
        for group in groups:
            more = {"candidates": group.candidates, "apart": group.apart, "category": group.category}
            record = {"label": group.label, "texts": group.texts} | {key: one for key, one in more.items() if one}
            data = json.dumps(record, sort_keys=True, ensure_ascii=False).encode()
            writer.write({"__key__": _encode_key(group.key), "json": data})


def _encode_key(key: str) -> str:
    """A group's id as a WebDataset key: dots, slashes and a leading underscore have meanings of their own there."""
    encoded = quote(key, safe="").replace(".", "%2E")
    return "%5F" + encoded[1:] if encoded.startswith("_") else encoded


def open_split(config: Config, split: str) -> Dataset:
    """Open a split's dataset, to read its shards. Raises as ``open_dataset``."""
    return open_dataset(data_url(config, split), cache_of(config.data))


def open_dataset(url: str | Path, cache: Cache | None = None, patience: store.Patience | None = None) -> Dataset:
    """Open a dataset by directory or fsspec URL. Its manifest is read each time, and a process that has read the same
    bytes before does not parse them again: those of 10^5 shards take seconds.

    ``cache``: where shards of a store are kept on this node; ``patience``: how long to wait for the manifest.

    Raises ``NotReady`` if there is no manifest, ``UserError`` if it is broken or of another kind, or if the URL's
    scheme is not allowed.
    """
    location = str(url).rstrip("/")
    path = f"{location}/{MANIFEST}"
    try:
        data = store.read(path, reading.MAX_TEXT_BYTES, patience=patience)
    except FileNotFoundError:
        raise NotReady(f"{path}: no such file; run `alsace prepare`, or name a prepared dataset") from None
    known = location, digest_bytes(data)
    opened = _OPENED.get(known)
    if opened is None:
        remedy = f"delete {location} and run `alsace prepare` again"
        value = reading.parse_json(data, f"{path}: ", remedy)
        if not isinstance(value, dict) or value.get("kind") != KIND or value.get("format_version") != FORMAT_VERSION:
            raise UserError(f"{path}: not the manifest of a dataset; name a directory that `alsace prepare` wrote")
        opened = _dataset(location, parse_manifest(value, KIND, path, remedy))
        if len(_OPENED) == MAX_OPENED:
            _OPENED.clear()
        _OPENED[known] = opened
    return replace(opened, reader=ShardReader(location, cache))


MAX_OPENED = 8  # a run has four splits
_OPENED: dict[tuple[str, str], Dataset] = {}  # by URL and by the sha256 of the manifest


def _dataset(url: str, manifest: Manifest) -> Dataset:
    details = read_details(manifest, url)
    alike: dict[tuple[tuple[str, int], ...], dict[str, int]] = {}  # most shards have the same counts: one object
    shards = tuple(
        ShardInfo(
            row.name,
            entry["sha256"],
            entry["bytes"],
            row.num_groups,
            alike.setdefault(tuple(row.num_examples.items()), row.num_examples),
        )
        for row in details.shards
        for entry in [manifest.files[row.name]]
    )
    languages = sorted({language for counts in alike.values() for language in counts})
    return Dataset(url, shards, tuple(languages), tuple(details.labels), manifest.digest, ShardReader(url))


def read_details(manifest: Manifest, url: str | Path) -> "DatasetDetails":
    """What a dataset's manifest says of it. Raises ``UserError`` that names the manifest if that is not what
    ``write_dataset`` writes."""
    remedy = f"delete {url} and run `alsace prepare` again"
    details = validate(DatasetDetails, manifest.details, f"{url}/{MANIFEST}: details.", remedy)
    listed = [row.name for row in details.shards]
    if sorted(listed) != sorted(manifest.files):  # one that is listed twice, or not at all
        odd = next(name for name in (*listed, *manifest.files) if listed.count(name) != 1 or name not in manifest.files)
        raise UserError(f"{url}/{MANIFEST}: lists the shard {odd!r} in one place and not in the other; {remedy}")
    return details


def read_shards(dataset: Dataset) -> Iterator[list[ParallelGroup]]:
    """All shards, one after another. Raises as ``read_shard``."""
    dataset.expect(range(len(dataset.shards)))
    for shard in dataset.shards:
        yield read_shard(dataset, shard)


def read_shard(dataset: Dataset, shard: ShardInfo) -> list[ParallelGroup]:
    """Read one shard whole and check it against the manifest: sha256, members, schema, counts per language.

    Raises ``UserError`` naming the shard and, where it can, the member.
    """
    url = f"{dataset.url}/{shard.name}"
    remedy = "restore the file, or delete the dataset and run `alsace prepare` again"
    try:
        data = dataset.reader.read(shard)
    except FileNotFoundError:
        raise UserError(f"{url}: missing, though the manifest lists it; {remedy}") from None
    try:
        groups = list(_parse_tar(url, data))
    except tarfile.TarError as error:
        reason = str(error).partition(" @ ")[0]  # webdataset adds what it was reading from: an object in memory
        raise UserError(f"{url}: not a readable tar ({reason}); {remedy}") from None
    found = Counter(language for group in groups for language in group.texts)
    if len(groups) != shard.num_groups or found != Counter(shard.num_examples):
        raise UserError(
            f"{url}: holds {len(groups)} groups with {dict(sorted(found.items()))} where the manifest says "
            f"{shard.num_groups} with {shard.num_examples}; {remedy}"
        )
    if len({group.key for group in groups}) != len(groups):
        raise UserError(f"{url}: holds a key twice; {remedy}")
    for group in groups:
        for language in group.texts:
            number = len(group.candidates[language]) if group.candidates else len(dataset.labels)
            if any(index not in range(number) for index in golds(group.label_of(language))):
                raise UserError(f"{url}: the label of {group.key!r} is not one of {number} labels; {remedy}")
    return groups


def _parse_tar(url: str, data: bytes) -> Iterator[ParallelGroup]:
    from webdataset.tariterators import tar_file_iterator

    for member in tar_file_iterator(io.BytesIO(data), skip_meta=None):
        name = member["fname"]
        if not name.endswith(".json"):
            raise UserError(f"{url}: member {name!r} is not .json; other members are never read: remove it")
        record = reading.parse_json(member["data"], f"{url}: member {name!r}: ", "prepare it again")
        try:
            yield _parse_group(unquote(name.removesuffix(".json")), record)
        except ValueError as error:
            raise UserError(f"{url}: member {name!r} is not a parallel group ({error}); prepare it again") from None


# What a group may have beside label and texts, and of which kind it is.
_FURTHER: dict[str, type] = {"candidates": dict, "apart": dict, "category": str}


def _parse_group(key: str, record: Any) -> ParallelGroup:
    """Raises ``ValueError`` for a record that `prepare` does not write."""
    if not isinstance(record, dict) or "label" not in record or not isinstance(record.get("texts"), dict):
        raise ValueError("it must map label and texts to their values")
    label, texts = _parse_label(record["label"]), record["texts"]
    candidates, apart, category = (record.get(name, kind()) for name, kind in _FURTHER.items())
    for name, kind in _FURTHER.items():
        if not isinstance(record.get(name, kind()), kind):
            raise ValueError(f"{name} is of another kind")
    if not key.strip():
        raise ValueError("its name holds no id")
    for language, fields in texts.items():
        is_mapping = isinstance(fields, dict) and len(fields) > 0
        if not is_mapping or not all(isinstance(text, str) and text.strip() for text in fields.values()):
            raise ValueError(f"language {language!r} lacks fields of text")
    if not all(isinstance(own, list) for own in candidates.values()):
        raise ValueError("its candidates are no lists")
    if candidates and candidates.keys() != texts.keys():
        raise ValueError("its candidates and its texts are in different languages")
    for language, own in candidates.items():
        if len(own) < 2 or not all(isinstance(text, str) and text.strip() for text in own):
            raise ValueError(f"language {language!r} lacks candidates of text")
    if not apart.keys() <= candidates.keys():
        raise ValueError("languages stand apart that have no candidates")
    if len({len(own) for language, own in candidates.items() if language not in apart}) > 1:
        raise ValueError("candidates that correspond are not equally many")
    labels = {language: _parse_label(own) for language, own in apart.items()}
    own_candidates = {language: tuple(own) for language, own in candidates.items()}
    return ParallelGroup(key, label, texts, own_candidates, labels, category)


def _parse_label(value: Any) -> Label:
    several = value if isinstance(value, list) and value else [] if value is None else [value]
    if not all(type(one) is int for one in several) or len(set(several)) != len(several):
        raise ValueError(f"label {value!r} is neither a number nor null, nor a list of different numbers")
    return tuple(value) if isinstance(value, list) else value
