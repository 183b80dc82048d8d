"""WebDataset shards of parallel groups: schema, deterministic writer, verified reader.

A dataset is a directory (or an fsspec URL) of tars and a ``manifest.json``. A shard holds one member per parallel
group, ``<key>.json``: ``{"label": 0 | null, "texts": {"en": {"premise": ..., "hypothesis": ...}, "de": {...}}}``.
"""

import io
import json
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import fsspec
from fsspec.core import split_protocol

from alsace_dist import reading
from alsace_dist.errors import NotReady, UserError
from alsace_dist.files.manifest import FORMAT_VERSION, MANIFEST, Manifest, atomic_path, digest_bytes, write_manifest

KIND = "dataset"
MAX_SHARD_BYTES = 8 << 30  # a shard is held in memory whole
# fsspec has handlers that run code or reach into other files (chained "::" URLs); only plain stores are read.
ALLOWED_SCHEMES = ("file", "s3", "gs", "gcs", "abfs", "az", "hdfs", "https", "memory")


@dataclass(frozen=True)
class ParallelGroup:
    """One example in several languages.

    ``label``: index into the task's labels, or None. ``texts``: language -> field -> text.
    """

    key: str
    label: int | None
    texts: dict[str, dict[str, str]]


@dataclass(frozen=True)
class ShardInfo:
    """A shard as the dataset's manifest lists it; ``num_examples``: language -> number of groups that have it."""

    name: str
    sha256: str
    num_groups: int
    num_examples: dict[str, int]

    @property
    def stem(self) -> str:
        """File name without suffix: joins a shard with its scores."""
        return self.name.removesuffix(".tar")


@dataclass(frozen=True)
class Dataset:
    """An opened dataset: where it is, its shards in order, its languages (sorted) and its identity."""

    url: str
    shards: tuple[ShardInfo, ...]
    languages: tuple[str, ...]
    labels: tuple[str, ...]
    digest: str

    @property
    def num_groups(self) -> int:
        """Groups over all shards."""
        return sum(shard.num_groups for shard in self.shards)


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
            record = {"label": group.label, "texts": group.texts}
            data = json.dumps(record, sort_keys=True, ensure_ascii=False).encode()
            writer.write({"__key__": _encode_key(group.key), "json": data})


def _encode_key(key: str) -> str:
    """A group's id as a WebDataset key: dots, slashes and a leading underscore have meanings of their own there."""
    encoded = quote(key, safe="").replace(".", "%2E")
    return "%5F" + encoded[1:] if encoded.startswith("_") else encoded


def open_dataset(url: str | Path) -> Dataset:
    """Open a dataset by directory or fsspec URL.

    Raises ``NotReady`` if there is no manifest, ``UserError`` if it is broken or of another kind, or if the URL's
    scheme is not allowed.
    """
    location = str(url).rstrip("/")
    path = f"{location}/{MANIFEST}"
    try:
        value = json.loads(_read_bytes(path))
    except FileNotFoundError:
        raise NotReady(f"{path}: no such file; run `alsace prepare`, or name a prepared dataset") from None
    except ValueError as error:
        raise UserError(f"{path}: broken ({error}); delete {location} and run `alsace prepare` again") from None
    if not isinstance(value, dict) or value.get("kind") != KIND or value.get("format_version") != FORMAT_VERSION:
        raise UserError(f"{path}: not the manifest of a dataset; name a directory that `alsace prepare` wrote")
    try:
        return _dataset(location, Manifest(**value))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: broken ({error!r}); delete {location} and run `alsace prepare` again") from None


def _dataset(url: str, manifest: Manifest) -> Dataset:
    shards = tuple(
        ShardInfo(row["name"], manifest.files[row["name"]]["sha256"], row["num_groups"], row["num_examples"])
        for row in manifest.details["shards"]
    )
    for shard in shards:
        if "/" in shard.name or not shard.name.endswith(".tar"):  # later stages name files after the stem
            raise ValueError(f"{shard.name!r} is not the name of a shard")
    languages = sorted({language for shard in shards for language in shard.num_examples})
    return Dataset(url, shards, tuple(languages), tuple(manifest.details["labels"]), manifest.digest)


def _read_bytes(url: str) -> bytes:
    protocol, path = split_protocol(url)  # as fsspec itself will read it: "data:..." is a URL, too
    scheme = protocol or "file"
    if scheme not in ALLOWED_SCHEMES or "::" in url:
        raise UserError(f"{url}: scheme {scheme!r} is not allowed; use one of {', '.join(ALLOWED_SCHEMES)}")
    try:
        if scheme == "file":
            reading.check_regular(Path(path), "name a prepared dataset, or restore the file", MAX_SHARD_BYTES)
        with fsspec.open(url, "rb") as file:
            data: bytes = file.read()
    except FileNotFoundError:
        raise
    except (OSError, ImportError) as error:  # permission, a directory, the network, a missing driver
        raise UserError(f"{url}: cannot be read ({error}); correct the path or the access to it") from None
    return data


def read_shard(dataset: Dataset, shard: ShardInfo) -> list[ParallelGroup]:
    """Read one shard whole and check it against the manifest: sha256, members, schema, counts per language.

    Raises ``UserError`` naming the shard and, where it can, the member.
    """
    url = f"{dataset.url}/{shard.name}"
    remedy = "restore the file, or delete the dataset and run `alsace prepare` again"
    try:
        data = _read_bytes(url)
    except FileNotFoundError:
        raise UserError(f"{url}: missing, though the manifest lists it; {remedy}") from None
    if digest_bytes(data) != shard.sha256:
        raise UserError(f"{url}: truncated or changed (its sha256 is not the manifest's); {remedy}")
    try:
        groups = list(_parse_tar(url, data))
    except tarfile.TarError as error:
        raise UserError(f"{url}: not a readable tar ({error}); {remedy}") from None
    indices = range(len(dataset.labels))
    found = Counter(language for group in groups for language in group.texts)
    if len(groups) != shard.num_groups or found != Counter(shard.num_examples):
        raise UserError(
            f"{url}: holds {len(groups)} groups with {dict(sorted(found.items()))} where the manifest says "
            f"{shard.num_groups} with {shard.num_examples}; {remedy}"
        )
    if len({group.key for group in groups}) != len(groups):
        raise UserError(f"{url}: holds a key twice; {remedy}")
    if bad := [group.key for group in groups if group.label is not None and group.label not in indices]:
        raise UserError(f"{url}: the label of {bad[0]!r} is not one of {len(indices)} labels; {remedy}")
    return groups


def _parse_tar(url: str, data: bytes) -> Iterator[ParallelGroup]:
    from webdataset.tariterators import tar_file_iterator

    for member in tar_file_iterator(io.BytesIO(data), skip_meta=None):
        name = member["fname"]
        if not name.endswith(".json"):
            raise UserError(f"{url}: member {name!r} is not .json; other members are never read: remove it")
        try:
            yield _parse_group(unquote(name.removesuffix(".json")), json.loads(member["data"]))
        except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
            raise UserError(f"{url}: member {name!r} is not a parallel group ({error!r}); prepare it again") from None


def _parse_group(key: str, record: dict[str, Any]) -> ParallelGroup:
    label, texts = record["label"], record["texts"]
    if not (label is None or type(label) is int):
        raise ValueError(f"label {label!r} is neither a number nor null")
    for language, fields in texts.items():
        if not fields or not all(isinstance(text, str) for text in fields.values()):
            raise ValueError(f"language {language!r} lacks fields of text")
    return ParallelGroup(key, label, texts)
