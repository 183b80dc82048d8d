"""Shards: what is written comes back, in the same bytes; what is damaged or foreign is refused, and never executed."""

import bz2
import gzip
import io
import json
import lzma
import pickle
import re
import tarfile
from pathlib import Path
from typing import Any

import fsspec
import pytest

from alsace_dist.errors import NotReady, UserError
from alsace_dist.files.manifest import MANIFEST, digest_file, load_manifest, verify_files, write_manifest
from alsace_dist.files.shards import Dataset, ParallelGroup, open_dataset, read_shard, write_dataset

LABELS = ("good", "bad")
GROUPS = [
    ParallelGroup(f"g{i}", i % 2, {"en": {"text": f"dog {i}"}, **({"de": {"text": f"Hund {i}"}} if i % 3 else {})})
    for i in range(10)
]
BLOCK = 512


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    write_dataset(tmp_path / "data", GROUPS, LABELS, 4, {"seed": 1})
    return tmp_path / "data"


def sign_anew(directory: Path) -> Dataset:
    """Make the manifest's hashes those of the files as they are, so that only the content can give damage away."""
    path = directory / MANIFEST
    manifest = json.loads(path.read_text(encoding="utf-8"))
    for name in manifest["files"]:
        size = (directory / name).stat().st_size
        manifest["files"][name] = {"bytes": size, "sha256": digest_file(directory / name)}
    path.write_text(json.dumps(manifest), encoding="utf-8")
    return open_dataset(directory)


def write_members(path: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def read_members(path: Path) -> list[tuple[str, bytes]]:
    with tarfile.open(path) as tar:
        return [(member.name, tar.extractfile(member).read()) for member in tar]  # type: ignore[union-attr]


def read_first(directory: Path) -> list[ParallelGroup]:
    dataset = open_dataset(directory)
    return read_shard(dataset, dataset.shards[0])


# --- a manifest that was read before -------------------------------------------------------------------------------


def test_a_manifest_that_has_changed_is_not_taken_for_the_one_that_was_read_before(directory: Path) -> None:
    first, path = open_dataset(directory), directory / MANIFEST
    whole = path.read_bytes()
    assert open_dataset(directory) == first
    assert open_dataset(directory).reader is not first.reader
    path.write_bytes(whole.replace(b'"good"', b'"fine"'))
    changed = open_dataset(directory)
    assert changed.labels == ("fine", "bad") and changed.digest != first.digest
    path.write_bytes(whole[:-20])
    with pytest.raises(UserError, match="not readable as JSON"):
        open_dataset(directory)
    path.write_bytes(whole)
    assert open_dataset(directory) == first
    path.unlink()
    with pytest.raises(NotReady):
        open_dataset(directory)


# --- what is whole -------------------------------------------------------------------------------------------------


def test_round_trip(directory: Path) -> None:
    dataset = open_dataset(directory)
    assert [group for shard in dataset.shards for group in read_shard(dataset, shard)] == GROUPS
    assert (dataset.languages, dataset.labels, dataset.num_groups) == (("de", "en"), LABELS, 10)
    assert [shard.stem for shard in dataset.shards] == ["000000", "000001", "000002"]
    assert [(shard.num_groups, shard.num_examples) for shard in dataset.shards] == [
        (4, {"de": 2, "en": 4}),
        (4, {"de": 3, "en": 4}),
        (2, {"de": 1, "en": 2}),
    ]
    verify_files(directory, load_manifest(directory, "dataset"))


def test_a_member_is_json_named_by_its_key(directory: Path) -> None:
    name, data = read_members(directory / "000000.tar")[1]
    assert name == "g1.json"
    assert json.loads(data) == {"label": 1, "texts": {"en": {"text": "dog 1"}, "de": {"text": "Hund 1"}}}


def test_same_groups_give_same_bytes(directory: Path, tmp_path: Path) -> None:
    shuffled_languages = [ParallelGroup(g.key, g.label, dict(reversed(g.texts.items()))) for g in GROUPS]
    other = write_dataset(tmp_path / "other", iter(shuffled_languages), LABELS, 4, {"seed": 1})
    assert other.digest == open_dataset(directory).digest
    for path in sorted(directory.iterdir()):
        assert path.read_bytes() == (tmp_path / "other" / path.name).read_bytes()
    assert write_dataset(tmp_path / "third", GROUPS[:-1], LABELS, 4, {"seed": 1}).digest != other.digest
    with tarfile.open(directory / "000000.tar") as tar:
        assert {(m.mtime, m.uid, m.uname, m.mode) for m in tar} == {(0, 0, "alsace", 0o644)}


KEYS = [
    *("a.b", "a/b", "../../etc/passwd", "/absolute", ".hidden", ".", "..", ".json", "x.json", "x.json.json"),
    *("_x", "__x__", "__key__", "_", "%2E", "a%b", "a b\n\t", "\x00", "a:b", "pipe:ls", "A", "a", "-", "~"),
    *("Größe", "ключ", "文字", "🙂", "x" * 200, "文" * 200, "a." * 100),
]


def test_any_key_comes_back(tmp_path: Path) -> None:
    groups = [ParallelGroup(key, None, {"en": {"text": key}}) for key in KEYS]
    dataset = write_dataset(tmp_path / "data", groups, LABELS, 1000, {})
    assert read_shard(dataset, dataset.shards[0]) == groups
    names = [name for name, _ in read_members(tmp_path / "data/000000.tar")]
    assert all("/" not in name and name.count(".") == 1 and not name.startswith((".", "_")) for name in names)


def test_webdataset_itself_reads_the_shards(directory: Path) -> None:
    import webdataset

    samples = list(webdataset.WebDataset(str(directory / "000000.tar"), shardshuffle=False).decode())
    assert [(sample["__key__"], sample["json"]["texts"]) for sample in samples] == [
        (g.key, g.texts) for g in GROUPS[:4]
    ]


@pytest.mark.parametrize("scheme", ["file", "memory"])
def test_reads_through_allowed_urls(directory: Path, scheme: str) -> None:
    url = f"{scheme}://{directory}/"
    if scheme == "memory":
        fsspec.filesystem("memory").put(str(directory), str(directory), recursive=True)
    dataset = open_dataset(url)
    assert read_shard(dataset, dataset.shards[2]) == GROUPS[8:]
    assert dataset.digest == open_dataset(directory).digest


# --- what is damaged -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("signed", [False, True])
def test_truncated_on_a_member_boundary(directory: Path, signed: bool) -> None:
    """Such a tar reads to its end without an error; only the hash or the count says that it is short."""
    path = directory / "000000.tar"
    with tarfile.open(path) as tar:
        boundary = tar.getmembers()[2].offset
    path.write_bytes(path.read_bytes()[:boundary])
    assert len(read_members(path)) == 2
    if signed:
        sign_anew(directory)
    message = "holds 2 groups with .* where the manifest says 4" if signed else "truncated or changed"
    with pytest.raises(UserError, match=rf"data/000000\.tar: {message}.*restore the file"):
        read_first(directory)


def test_truncated_within_a_member(directory: Path) -> None:
    path = directory / "000000.tar"
    path.write_bytes(path.read_bytes()[: 3 * BLOCK])  # member 0 is two blocks: the header of member 1 has no content
    sign_anew(directory)
    with pytest.raises(UserError, match=r"data/000000\.tar: not a readable tar"):
        read_first(directory)


@pytest.mark.parametrize("offset", [0, 3, BLOCK + 10, -1])
def test_flipped_byte(directory: Path, offset: int) -> None:
    path = directory / "000001.tar"
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)
    dataset = open_dataset(directory)
    assert read_shard(dataset, dataset.shards[0]) == GROUPS[:4]
    with pytest.raises(UserError, match=r"data/000001\.tar: truncated or changed \(its sha256 is not the manifest's\)"):
        read_shard(dataset, dataset.shards[1])


def test_missing_member(directory: Path) -> None:
    members = read_members(directory / "000000.tar")
    write_members(directory / "000000.tar", [members[0], *members[2:]])
    sign_anew(directory)
    with pytest.raises(UserError, match=r"holds 3 groups .* where the manifest says 4"):
        read_first(directory)


def test_missing_language_in_a_member(directory: Path) -> None:
    members = read_members(directory / "000000.tar")
    members[1] = (members[1][0], b'{"label": 1, "texts": {"en": {"text": "x"}}}')
    write_members(directory / "000000.tar", members)
    sign_anew(directory)
    with pytest.raises(UserError, match=r"holds 4 groups with \{'de': 1, 'en': 4\} where the manifest says 4 with"):
        read_first(directory)


def test_duplicate_key(directory: Path) -> None:
    members = read_members(directory / "000000.tar")
    members[1] = (members[2][0], members[1][1])
    write_members(directory / "000000.tar", members)
    sign_anew(directory)
    with pytest.raises(UserError, match=r"data/000000\.tar: holds a key twice"):
        read_first(directory)


def test_missing_shard(directory: Path) -> None:
    (directory / "000000.tar").unlink()
    with pytest.raises(UserError, match=r"data/000000\.tar: missing, though the manifest lists it"):
        read_first(directory)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b'{"label": 0',
        b'{"texts": {"en": {"text": "x"}}}',
        b'{"label": "good", "texts": {"en": {"text": "x"}}}',
        b'{"label": true, "texts": {"en": {"text": "x"}}}',
        b'{"label": 0, "texts": {"en": "x"}}',
        b'{"label": 0, "texts": {"en": {}}}',
        b'{"label": 0, "texts": {"en": {"text": 5}}}',
        b'{"label": 0, "texts": {"en": {"text": " \\n"}}}',
        b'{"label": 0, "texts": {"en": {"text": "caf\xe9"}}}',
    ],
)
def test_a_member_of_another_schema_is_named(directory: Path, data: bytes) -> None:
    members = read_members(directory / "000000.tar")
    write_members(directory / "000000.tar", [("g0.json", data), *members[1:]])
    sign_anew(directory)
    with pytest.raises(
        UserError, match=r"data/000000\.tar: member 'g0\.json'(:| is) not (readable as JSON|a parallel group)"
    ):
        read_first(directory)


@pytest.mark.parametrize("name", [".json", "%20.json"])
def test_a_member_without_an_id_is_named(directory: Path, name: str) -> None:
    members = read_members(directory / "000000.tar")
    write_members(directory / "000000.tar", [(name, members[0][1]), *members[1:]])
    sign_anew(directory)
    with pytest.raises(UserError, match=rf"member '{name}' is not a parallel group .*its name holds no id"):
        read_first(directory)


# --- what is foreign -----------------------------------------------------------------------------------------------


class TouchesFile:
    """A pickle of this creates a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("name", ["g0.pkl", "g0.pickle", "g0.pyd", "g0.pth", "g0.json.pkl", "g0.json"])
def test_pickles_are_never_loaded(directory: Path, tmp_path: Path, name: str) -> None:
    payload = pickle.dumps(TouchesFile(tmp_path / "executed"))
    members = read_members(directory / "000000.tar")
    write_members(directory / "000000.tar", [(name, payload), *members])
    sign_anew(directory)
    reason = ": not readable as JSON" if name == "g0.json" else r" is not \.json; other members are never read"
    with pytest.raises(UserError, match=rf"member '{name}'{reason}"):
        read_first(directory)
    assert not (tmp_path / "executed").exists()
    pickle.loads(payload)
    assert (tmp_path / "executed").exists()  # the payload would have worked


@pytest.mark.parametrize(
    "url",
    [
        "pipe://touch executed",
        "simplecache::file://{directory}",
        "file://{directory}::",
        "{directory}::memory://x",
        "zip://x::{directory}",
        "http://localhost/data",
        "reference://{directory}",
        "ssh://localhost/data",
        "local://{directory}",
    ],
)
def test_other_schemes_are_refused(directory: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    monkeypatch.setattr("fsspec.core.url_to_fs", lambda url, **options: opened.append(url))
    with pytest.raises(UserError, match=r"scheme '.*' is not allowed; use one of file, s3"):
        open_dataset(url.format(directory=directory))
    assert not opened


def test_pipe_is_a_file_name_at_most(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(directory)
    with pytest.raises(UserError, match="no such file"):
        open_dataset("pipe:touch executed; true ")
    assert not (directory / "executed").exists()


def test_shards_named_by_a_chained_url_are_refused(directory: Path) -> None:
    path = directory / MANIFEST
    path.write_text(path.read_text(encoding="utf-8").replace("000000.tar", "::memory://x"), encoding="utf-8")
    with pytest.raises(UserError, match=r"details\.shards\.0\.name: String should match"):
        read_first(directory)


def test_manifest_of_another_kind(tmp_path: Path) -> None:
    write_manifest(tmp_path, "scores", {}, [])
    with pytest.raises(UserError, match=r"manifest\.json: not the manifest of a dataset; name a directory"):
        open_dataset(tmp_path)


def test_manifest_of_another_dataset(directory: Path, tmp_path: Path) -> None:
    write_dataset(tmp_path / "other", GROUPS[::-1], LABELS, 4, {"seed": 1})
    (directory / MANIFEST).write_bytes((tmp_path / "other" / MANIFEST).read_bytes())
    with pytest.raises(UserError, match=r"data/000000\.tar: truncated or changed"):
        read_first(directory)


@pytest.mark.parametrize("data", [b"", b"[1]", b'{"kind": "dataset"', b"\xff\xfe{"])
def test_broken_manifest(directory: Path, data: bytes) -> None:
    (directory / MANIFEST).write_bytes(data)
    with pytest.raises(UserError, match=r"data/manifest\.json: (broken|not readable as JSON|not the manifest)"):
        open_dataset(directory)


def test_missing_manifest(tmp_path: Path) -> None:
    with pytest.raises(NotReady, match=r"manifest\.json: no such file; run `alsace prepare`"):
        open_dataset(tmp_path)


# --- manifests and files of another shape --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m.pop("fingerprint"), "fingerprint: is needed and missing"),
        (lambda m: m.update(extra=1), "extra: unknown key"),
        (lambda m: m.update(format_version=2), "not the manifest of a dataset"),
        (lambda m: m["files"].clear(), "lists the shard '000000.tar' in one place and not in the other"),
        (lambda m: m["files"].update({"../x.tar": m["files"]["000000.tar"]}), "'../x.tar' does not name a file of the"),
        (lambda m: m["files"]["000000.tar"].update(bytes=-1), "files.000000.tar.bytes: Input should be greater"),
        (lambda m: m["files"]["000000.tar"].update(sha256="x"), "files.000000.tar.sha256: String should match"),
        (lambda m: m["details"].pop("labels"), "details.labels: is needed and missing"),
        (lambda m: m["details"].update(labels="abc"), "details.labels: Input should be a valid list"),
        (lambda m: m["details"]["shards"][0].update(name="../data/000000.tar"), "details.shards.0.name: String should"),
        (lambda m: m["details"]["shards"].append(m["details"]["shards"][0]), "lists the shard '000000.tar' in one"),
        (
            lambda m: m["details"]["shards"][0].update(num_examples="x"),
            "shards.0.num_examples: must be a mapping",
        ),
        (lambda m: m["details"].update(shards=None), "details.shards: Input should be a valid list"),
        (lambda m: m.update(details=[]), "details: must be a mapping"),
    ],
)
def test_manifest_of_another_shape(directory: Path, change: Any, words: str) -> None:
    path = directory / MANIFEST
    manifest = json.loads(path.read_text(encoding="utf-8"))
    change(manifest)
    path.write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(UserError, match=rf"data/manifest\.json: .*{re.escape(words)}.*; (delete|name)"):
        open_dataset(directory)


def test_a_file_where_a_dataset_is_needed(directory: Path) -> None:
    with pytest.raises(UserError, match=r"cannot be read .*; correct the path"):
        open_dataset(directory / "000000.tar")
    with pytest.raises(UserError, match=r"gs://bucket/x/manifest\.json: cannot be read \(Please install gcsfs"):
        open_dataset("gs://bucket/x")


def test_label_out_of_range_and_bottomless_json(directory: Path) -> None:
    members = read_members(directory / "000000.tar")
    for data, message in (
        (b'{"label": 2, "texts": {"en": {"text": "x"}}}', "label"),
        (b"[" * 100_000, "nested too deeply"),
    ):
        write_members(directory / "000000.tar", [("g0.json", data), *members[1:]])
        sign_anew(directory)
        with pytest.raises(UserError, match=message):
            read_first(directory)


@pytest.mark.parametrize("compress", [gzip.compress, lzma.compress, bz2.compress])
def test_truncated_compressed_tar(directory: Path, compress: Any) -> None:
    data = compress((directory / "000000.tar").read_bytes())
    (directory / "000000.tar").write_bytes(data[: len(data) // 2])
    sign_anew(directory)
    with pytest.raises(UserError, match="not a readable tar"):
        read_first(directory)
