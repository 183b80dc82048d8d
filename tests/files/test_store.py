"""Datasets in stores: the same bytes in the same order as from disk, whatever fails on the way, in bounded time."""

import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec.config
import objects
import pytest
import tiny
from objects import BUCKET, Proxy
from pydantic import ValidationError

from alsace_dist.config import DataConfig
from alsace_dist.config_file import load_config
from alsace_dist.data.stream import CanonicalOrder, TrainStream
from alsace_dist.errors import NotReady, UserError
from alsace_dist.files import cache, reader, store
from alsace_dist.files.cache import Cache, cache_of
from alsace_dist.files.manifest import digest_bytes
from alsace_dist.files.shards import Dataset, ParallelGroup, open_dataset, read_shard, write_dataset
from alsace_dist.files.store import Patience

GROUPS = [ParallelGroup(f"g{i}", i % 2, {"en": {"text": f"dog {i} " * 40}, "de": {"text": "Hund"}}) for i in range(24)]
HASTY = Patience(2.0, 1.0, 1e5, num_tries=4, first_wait_seconds=0.02, most_wait_seconds=0.1)
STUBBORN = replace(HASTY, num_tries=12)  # where threads share the faults, and one file may meet them all
URL = f"s3://{BUCKET}/small"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The S3 server, with a dataset in it."""
    directory = tmp_path_factory.mktemp("store")
    write_dataset(directory / "small", GROUPS, ("good", "bad"), 4, {})
    with objects.s3_server(directory / "server") as files:
        files.put(str(directory / "small"), f"{BUCKET}/small", recursive=True)
        files.local = directory / "small"
        yield files


@pytest.fixture
def proxy(server: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A sound proxy before the server, which is what this process takes for S3; nobody waits long, nothing is said."""
    proxy = Proxy(server.port)
    for name, value in objects.environment(proxy.port).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(store, "PATIENCE", HASTY)
    monkeypatch.setattr(store, "_stores", {})
    store._has_warned.clear()
    yield proxy
    proxy.close()


def read_all(dataset: Dataset) -> list[ParallelGroup]:
    return [group for shard in dataset.shards for group in read_shard(dataset, shard)]


# --- S3 ------------------------------------------------------------------------------------------------------------


def test_a_dataset_in_s3_is_that_of_the_directory(server: Any, proxy: Proxy, capsys: Any) -> None:
    there, here = open_dataset(URL), open_dataset(server.local)
    assert replace(there, url="") == replace(here, url="")
    assert read_all(there) == GROUPS
    assert len(proxy.seen) == 2 * (1 + len(here.shards))  # a HEAD and a GET each, and nothing is asked for twice
    assert capsys.readouterr().err == ""


def test_what_passes_is_tried_again_and_said_once(server: Any, proxy: Proxy, capsys: Any) -> None:
    proxy.faults = ["503", "cut", "", "stall", "cut", "", "alter", "", "500", "429", "503", ""]
    assert read_all(open_dataset(URL)) == GROUPS
    assert proxy.faults == []
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: {URL}/manifest.json: HTTP 503: ") and "trying again" in line


@pytest.mark.parametrize("fault", ["503", "cut", "stall"])
def test_a_store_that_stays_away_is_an_error_in_bounded_time(proxy: Proxy, fault: str) -> None:
    dataset = open_dataset(URL)
    proxy.seen.clear()
    proxy.always = fault
    begin = time.monotonic()
    reason = {"503": "HTTP 503: ", "cut": "", "stall": ""}[fault]
    with pytest.raises(
        UserError, match=rf"^{URL}/000000\.tar: cannot be read \({reason}.+, tried 4 times in \d+ s\); "
    ):
        read_shard(dataset, dataset.shards[0])
    assert time.monotonic() - begin < 12  # 4 tries of 1 s each, if each stalls, and a busy machine
    assert len(proxy.seen) == (4 if fault == "503" else 8)  # a HEAD and a GET a try; the libraries try nothing again


def test_nobody_listens(proxy: Proxy) -> None:
    proxy.close()
    with pytest.raises(UserError, match=r"manifest\.json: cannot be read \(Could not connect .*tried 4 times in"):
        open_dataset(URL)


def test_what_does_not_pass_is_an_error_at_once(
    server: Any, proxy: Proxy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(NotReady, match=rf"^s3://{BUCKET}/nothing/manifest\.json: no such file; run `alsace prepare`"):
        open_dataset(f"s3://{BUCKET}/nothing")
    assert {method for method, _ in proxy.seen} == {"HEAD", "GET"} and len(proxy.seen) == 2  # the GET is a listing

    dataset = open_dataset(URL)
    gone = replace(dataset.shards[0], name="gone.tar")
    with pytest.raises(UserError, match=r"gone\.tar: missing, though the manifest lists it"):
        read_shard(dataset, gone)

    proxy.seen.clear()
    proxy.always = "403"
    with pytest.raises(UserError, match=r"manifest\.json: cannot be read \(HTTP 403: [^,]*\); correct the path or the"):
        open_dataset(URL)
    proxy.always = ""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setattr(store, "_stores", {})
    with pytest.raises(UserError, match=r"manifest\.json: cannot be read \(Unable to locate credentials\); correct"):
        open_dataset(URL)
    assert len(proxy.seen) == 1  # tried once, and without credentials not at all


def test_bytes_that_stay_other_than_the_manifest_says(server: Any, proxy: Proxy) -> None:
    server.put(str(server.local), f"{BUCKET}/changed", recursive=True)
    server.pipe_file(f"{BUCKET}/changed/000001.tar", (server.local / "000001.tar").read_bytes()[:-512])
    dataset = open_dataset(f"s3://{BUCKET}/changed")
    proxy.seen.clear()
    with pytest.raises(
        UserError, match=r"changed/000001\.tar: truncated or changed \(its sha256 is not the manifest's"
    ):
        read_shard(dataset, dataset.shards[1])
    assert [method for method, _ in proxy.seen].count("GET") == 2


def test_options_of_the_library_come_from_the_environment(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """As docs/data.md says; fsspec reads it when it is imported."""
    options: dict[str, Any] = {}
    fsspec.config.set_conf_env(options, {"FSSPEC_S3": '{"requester_pays": true}'})
    monkeypatch.setitem(fsspec.config.conf, "s3", options["s3"])
    open_dataset(URL)
    assert all(b"x-amz-request-payer: requester" in head for head in proxy.heads) and len(proxy.heads) == 2


def test_size_is_looked_at_before_contents(server: Any, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("alsace_dist.reading.MAX_TEXT_BYTES", 100)
    with pytest.raises(UserError, match=rf"^{URL}/manifest\.json: [\d,]+ bytes where at most 100 are read"):
        open_dataset(URL)
    assert [method for method, _ in proxy.seen] == ["HEAD"]


# --- fetched ahead -------------------------------------------------------------------------------------------------


def fetched(proxy: Proxy) -> list[str]:
    """Names of the files whose contents were asked for, in the order of the requests."""
    return [path.partition("?")[0].rpartition("/")[2] for method, path in proxy.seen if method == "GET"]


def settled(proxy: Proxy) -> list[str]:
    """The same when nothing more is asked for."""
    seen = -1
    while seen != len(proxy.seen):
        seen = len(proxy.seen)
        time.sleep(0.4)
    return fetched(proxy)


def test_the_next_shards_are_fetched_before_they_are_asked_for(
    server: Any, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = open_dataset(URL)
    names = [shard.name for shard in dataset.shards]
    proxy.seen.clear()
    monkeypatch.setattr(reader, "MAX_AHEAD", 3)
    dataset.expect([4, 0, 1, 0, 5, 2])
    assert sorted(settled(proxy)) == [names[0], names[1], names[4]]
    assert read_shard(dataset, dataset.shards[4]) == GROUPS[16:20]
    assert settled(proxy)[3:] == [names[0]]  # another one for the one that was taken
    assert read_shard(dataset, dataset.shards[3]) == GROUPS[12:16]  # not expected: fetched when it is asked for
    assert [read_shard(dataset, dataset.shards[number]) for number in (0, 1, 0, 5, 2)] == [
        GROUPS[4 * number : 4 * number + 4] for number in (0, 1, 0, 5, 2)
    ]
    assert sorted(settled(proxy)) == sorted([*names, names[0]])  # each as often as it was read

    proxy.seen.clear()
    monkeypatch.setattr(reader, "MAX_AHEAD_BYTES", dataset.shards[0].num_bytes + 1)
    dataset.expect(range(6))
    assert len(settled(proxy)) == 2
    assert read_shard(dataset, dataset.shards[3]) == GROUPS[12:16]  # those before it are passed over
    assert [read_shard(dataset, dataset.shards[number]) for number in (4, 5)] == [GROUPS[16:20], GROUPS[20:]]


def test_what_fails_ahead_is_said_where_it_is_asked_for(proxy: Proxy) -> None:
    dataset = open_dataset(URL)
    proxy.faults = ["403"] * 6
    dataset.expect(range(6))
    assert len(settled(proxy)) == 1 + 6
    with pytest.raises(UserError, match=r"small/000002\.tar: cannot be read \(HTTP 403: "):
        read_shard(dataset, dataset.shards[2])


@pytest.mark.parametrize("kept", [False, True])
def test_training_sees_the_same_examples_in_the_same_order_whatever_fails(
    server: Any, proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: bool
) -> None:
    """One stream keeps 4 of the 6 shards, so in four passes shards are fetched again; or come from the cache."""

    def batches(dataset: Dataset) -> list[list[tuple[str, int]]]:
        order = CanonicalOrder([shard.num_groups for shard in dataset.shards], 1, seed=5)
        load = lambda number: read_shard(dataset, dataset.shards[number])  # noqa: E731
        stream: TrainStream[ParallelGroup] = TrainStream(
            order, load, lambda group, pass_index: (group.key, pass_index), 0, 1, dataset.expect
        )
        found = list(stream.batches(0, 96, lambda step, batch: batch))
        assert len(stream.cache.opened) > 12
        return found

    monkeypatch.setattr(store, "PATIENCE", STUBBORN)
    expected = batches(open_dataset(server.local))
    dataset = open_dataset(URL, Cache(tmp_path / "cache", 10**9) if kept else None)
    proxy.seen.clear()
    proxy.faults = ["503", "cut", "", "alter", "stall", "", "", "500", "cut", "", "503"]
    assert batches(dataset) == expected
    assert proxy.faults == [] or kept
    num_fetches = len(fetched(proxy))
    assert num_fetches > 12 + 7 if not kept else num_fetches <= 6 + 7


# --- the cache of a node -------------------------------------------------------------------------------------------


def test_what_is_kept_is_not_fetched_again_unless_it_is_damaged(server: Any, proxy: Proxy, tmp_path: Path) -> None:
    dataset = open_dataset(URL, Cache(tmp_path / "cache", 10**9))
    assert read_all(dataset) == read_all(dataset) == GROUPS
    kept = {path.name for path in (tmp_path / "cache").iterdir() if not path.name.startswith(".")}
    assert kept == {shard.sha256 for shard in dataset.shards}
    assert len(fetched(proxy)) == 1 + 6
    proxy.seen.clear()
    (tmp_path / "cache" / dataset.shards[0].sha256).write_bytes(b"x" * dataset.shards[0].num_bytes)
    (tmp_path / "cache" / dataset.shards[1].sha256).unlink()
    (tmp_path / "cache" / dataset.shards[1].sha256).mkdir()  # cannot be replaced by a file
    assert read_all(open_dataset(URL, Cache(tmp_path / "cache", 10**9))) == GROUPS
    assert fetched(proxy) == ["manifest.json", "000000.tar", "000001.tar"]
    assert (tmp_path / "cache" / dataset.shards[0].sha256).read_bytes() == (server.local / "000000.tar").read_bytes()


def test_the_cache_holds_no_more_than_it_may(server: Any, proxy: Proxy, tmp_path: Path) -> None:
    sizes = [shard.num_bytes for shard in open_dataset(URL).shards]
    assert len(set(sizes)) == 1
    dataset = open_dataset(URL, Cache(tmp_path, 3 * sizes[0] + 1))
    for number in (0, 1, 2, 0, 3, 4):  # 0 was used when 1 and 2 had to go
        read_shard(dataset, dataset.shards[number])
        time.sleep(0.02)  # times of files are no finer
    (tmp_path / "fetching-left.tmp").write_bytes(b"half of a shard")  # by a process that died
    kept = {path.name for path in tmp_path.iterdir()} & {shard.sha256 for shard in dataset.shards}
    assert kept == {dataset.shards[number].sha256 for number in (0, 3, 4)}
    read_shard(dataset, dataset.shards[5])
    assert not (tmp_path / "fetching-left.tmp").exists()
    small = open_dataset(URL, Cache(tmp_path / "small", sizes[0] - 1))
    assert read_all(small) == GROUPS
    assert {path.suffix or path.name[:6] for path in (tmp_path / "small").iterdir()} == {".lock-"}


def test_of_those_who_ask_at_once_one_fetches(server: Any, proxy: Proxy, tmp_path: Path) -> None:
    datasets = [open_dataset(URL, Cache(tmp_path, 10**9)) for _ in range(5)]
    proxy.seen.clear()
    with ThreadPoolExecutor(5) as pool:
        found = list(pool.map(lambda dataset: read_shard(dataset, dataset.shards[0]), datasets))
    assert found == [GROUPS[:4]] * 5
    assert fetched(proxy) == ["000000.tar"]


def test_a_lock_dies_with_its_process_and_one_that_stays_is_not_waited_for(
    server: Any, proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = open_dataset(URL, Cache(tmp_path, 10**9))
    hold = "import fcntl, sys, time; file = open(sys.argv[1], 'w'); fcntl.flock(file, 2); print(flush=True)"
    path = tmp_path / f".lock-{dataset.shards[0].sha256[:2]}"
    with subprocess.Popen(
        [sys.executable, "-S", "-c", f"{hold}; time.sleep(60)", path], stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "\n"
        monkeypatch.setattr(cache, "LOCK_SECONDS", 0.3)
        assert read_shard(dataset, dataset.shards[0]) == GROUPS[:4]
        monkeypatch.setattr(cache, "LOCK_SECONDS", 60.0)
        (tmp_path / dataset.shards[0].sha256).unlink()
        threading.Timer(0.5, holder.kill).start()
        begin = time.monotonic()
        assert read_shard(dataset, dataset.shards[0]) == GROUPS[:4]
        assert 0.3 < time.monotonic() - begin < 30


def test_a_full_disk_and_a_place_that_cannot_be_used_are_no_errors(
    server: Any, proxy: Proxy, tmp_path: Path, capsys: Any
) -> None:
    (tmp_path / "file").write_text("in the way")
    cache._has_warned.clear()
    assert read_all(open_dataset(URL, Cache(tmp_path / "file", 10**9))) == GROUPS
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: {tmp_path}/file: not used as a cache (") and "fetched each time" in line

    cache._has_warned.clear()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # a write fails half way, as on a full disk
    try:
        assert read_all(open_dataset(URL, Cache(tmp_path / "full", 10**9))) == GROUPS
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert all(path.name.startswith(".lock-") for path in (tmp_path / "full").iterdir())
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: {tmp_path}/full: not used as a cache (File too large)")


def test_what_a_person_keeps_beside_the_cache_stays(tmp_path: Path) -> None:
    """Within the cache's folder, too, only files that the cache has named are deleted."""
    kept = cache_of(DataConfig(directory="s3://bucket/x", cache=str(tmp_path), cache_gb=1e-9))
    assert kept is not None
    folder = tmp_path / "alsace-shards"
    folder.mkdir()
    theirs = [tmp_path / "notes.tmp", tmp_path / ("a" * 64), folder / "notes.tmp", folder / "readme"]
    for path in theirs:
        path.write_text("a person's")
    (folder / "fetching-x1.tmp").write_text("left by a process that died")
    assert kept.get(digest_bytes(b"1"), lambda: b"1") == b"1" and kept.get(digest_bytes(b"2"), lambda: b"2") == b"2"
    assert all(path.read_text() == "a person's" for path in theirs)
    names = {path.name for path in folder.iterdir() if not path.name.startswith(".lock")}
    assert names == {"notes.tmp", "readme", digest_bytes(b"2")}  # a byte of room: the shard before went


def test_the_cache_of_a_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("SLURM_TMPDIR", str(tmp_path))
    config = DataConfig(directory="s3://bucket/x", cache="$SLURM_TMPDIR/shards", cache_gb=2.5)
    for one in (config, DataConfig(directory="s3://bucket/x")):
        assert DataConfig.model_validate(one.model_dump()) == one  # as the run's copy of its config
    assert cache_of(config) == Cache(tmp_path / "shards/alsace-shards", 2_500_000_000)
    monkeypatch.delenv("SLURM_TMPDIR")  # as on the login node
    cache._has_warned.clear()
    assert cache_of(config) is None
    assert "data.cache: $SLURM_TMPDIR/shards: no such variable here" in capsys.readouterr().err
    for sections, words in (
        ({"directory": "s3://bucket/x", "cache_gb": 1}, "cache_gb says how much data.cache holds"),
        ({"directory": "run/data", "cache": "/tmp/x"}, "cache keeps the shards of a store"),
        ({"directory": "file:///run/data", "cache": "/tmp/x"}, "cache keeps the shards of a store"),
    ):
        with pytest.raises(ValidationError, match=words):
            DataConfig(**sections)


# --- https ---------------------------------------------------------------------------------------------------------


class Files(SimpleHTTPRequestHandler):
    """Files of a directory, for who knows the password."""

    def do_GET(self) -> None:
        if self.headers["Authorization"] == "Basic dGVzdGVyOmh1bnRlcjItaHVudGVyMg==":
            return super().do_GET()
        return self.send_error(401)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on stderr."""


@pytest.fixture
def secure(server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """An https server for the same dataset, whose certificate this process does not trust yet: ``certificate``."""
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    kind = ["-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    name = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    command = ["openssl", "req", *kind, *name, "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Files, directory=server.local.parent)) as plain:
        threading.Thread(target=plain.serve_forever, daemon=True).start()
        proxy = Proxy(plain.server_address[1], (certificate, key))
        proxy.certificate = certificate
        (tmp_path / "netrc").write_text(f"machine localhost login {objects.KEY} password {objects.SECRET}\n")
        monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
        monkeypatch.setattr(store, "PATIENCE", HASTY)
        monkeypatch.setattr(store, "_stores", {})
        store._has_warned.clear()
        yield proxy
        proxy.close()
        plain.shutdown()


def test_https(secure: Proxy, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    import aiohttp.connector

    url = f"https://localhost:{secure.port}/small"
    with pytest.raises(UserError, match=r"manifest\.json: cannot be read \(.*CERTIFICATE_VERIFY_FAILED[^,]*\); "):
        open_dataset(url)
    # What SSL_CERT_FILE does for a process that starts with it.
    aiohttp.connector._SSL_CONTEXT_VERIFIED.load_verify_locations(secure.certificate)
    assert capsys.readouterr().err == ""
    secure.faults = ["503", "cut", "", "stall", "cut", "", "alter", "", "500", "429", "503", ""]
    secure.faults += ["garble", ""]
    dataset = open_dataset(url)
    assert read_all(dataset) == GROUPS
    assert secure.faults == [] and len(secure.seen) == len(dataset.shards) + 1 + 9
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: {url}/manifest.json: HTTP 503: ") and "trying again" in line

    with pytest.raises(NotReady, match=r"/nothing/manifest\.json: no such file; run `alsace prepare`"):
        open_dataset(f"https://localhost:{secure.port}/nothing")
    for fault, reason in (
        ("503", "HTTP 503: "),
        ("cut", "Response payload is not completed"),
        ("stall", "no answer, or a body"),
    ):
        secure.always = fault
        begin = time.monotonic()
        with pytest.raises(UserError, match=rf"000000\.tar: cannot be read \({reason}.*, tried 4 times in \d+ s\); "):
            read_shard(dataset, dataset.shards[0])
        assert time.monotonic() - begin < 12
    secure.always = ""
    secure.faults = [f"http://localhost:{secure.upstream}/small/manifest.json"]
    with pytest.raises(UserError, match=r"/small/manifest\.json: redirects to http://, which anybody may change"):
        open_dataset(url)
    monkeypatch.setenv("NETRC", os.devnull)
    secure.seen.clear()
    with pytest.raises(UserError, match=r"manifest\.json: cannot be read \(HTTP 401: [^,]*Unauthorized"):
        open_dataset(url)
    assert len(secure.seen) == 1


# --- secrets -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url", ["s3://KEY:hunter2@bucket/x", "https://me:hunter2@host/x", "https://host/x?X-Amz-Signature=hunter2"]
)
def test_a_config_holds_no_secrets(url: str, tmp_path: Path) -> None:
    path = tiny.write_config(tmp_path / "run.yaml", tiny.make_config(tmp_path, data={"directory": url}))
    there = tiny.write_config(tmp_path / "other.yaml", tiny.make_config(tmp_path, data={"directory": "s3://bucket/x"}))
    for read in (
        lambda: load_config(path),
        lambda: load_config(there, {"data.directory": url}),
        lambda: open_dataset(url),
    ):
        with pytest.raises(
            UserError, match=r"holds a (user or a password|query .*); remove it: secrets stand in"
        ) as error:
            read()
        assert "hunter2" not in str(error.value) and "\n" not in str(error.value)
