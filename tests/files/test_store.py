"""Datasets in stores: the same bytes in the same order as from disk, whatever fails on the way, in bounded time."""

import os
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import objects
import pytest
import tiny
from objects import BUCKET, Proxy

from alsace_dist.config_file import load_config
from alsace_dist.errors import NotReady, UserError
from alsace_dist.files import store
from alsace_dist.files.shards import Dataset, ParallelGroup, open_dataset, read_shard, write_dataset
from alsace_dist.files.store import Patience

GROUPS = [ParallelGroup(f"g{i}", i % 2, {"en": {"text": f"dog {i} " * 40}, "de": {"text": "Hund"}}) for i in range(24)]
HASTY = Patience(2.0, 1.0, 1e5, num_tries=4, first_wait_seconds=0.02, most_wait_seconds=0.1)
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
    proxy.always = fault
    begin = time.monotonic()
    reason = {"503": "HTTP 503: ", "cut": "", "stall": ""}[fault]
    with pytest.raises(
        UserError, match=rf"^{URL}/000000\.tar: cannot be read \({reason}.+, tried 4 times in \d+ s\); "
    ):
        read_shard(dataset, dataset.shards[0])
    assert time.monotonic() - begin < 12  # 4 tries of 1 s each, if each stalls, and a busy machine


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


def test_size_is_looked_at_before_contents(server: Any, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("alsace_dist.reading.MAX_TEXT_BYTES", 100)
    with pytest.raises(UserError, match=rf"^{URL}/manifest\.json: [\d,]+ bytes where at most 100 are read"):
        open_dataset(URL)
    assert [method for method, _ in proxy.seen] == ["HEAD"]


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
    dataset = open_dataset(url)
    assert read_all(dataset) == GROUPS
    assert secure.faults == [] and len(secure.seen) == len(dataset.shards) + 1 + 8
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
