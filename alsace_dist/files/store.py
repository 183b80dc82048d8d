"""Bytes of a file by its place: a path, or the URL of an object store.

Stores fail for a while: they answer 503, cut connections, fall silent. What may pass is tried again, after waits that
grow, and every attempt ends in bounded time; what will not pass (403, 404, no driver, no credentials) is an error at
once. The libraries below fsspec try again by themselves, each in a way of its own; here that is switched off where it
can be, so that there is one place that counts.
"""

import asyncio
import itertools
import os
import random
import ssl
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alsace_dist import reading
from alsace_dist.errors import UserError, warn
from alsace_dist.files.manifest import digest_bytes

# fsspec has handlers that run code or reach into other files (chained "::" URLs); only plain stores are read.
ALLOWED_SCHEMES = ("file", "s3", "gs", "gcs", "abfs", "az", "hdfs", "https", "memory")
REMEDY = "correct the path or the access to it"


@dataclass(frozen=True)
class Patience:
    """How long to wait for a store, and how often to try.

    ``stall_seconds``: most between two pieces of an answer. An attempt at N bytes ends after ``stall_seconds`` + N /
    ``bytes_per_second``, whatever arrives. Before try n + 1 there is a wait of half to all of ``first_wait_seconds`` *
    2^(n - 1), at most ``most_wait_seconds``: ranks that failed together do not come back together.
    """

    connect_seconds: float = 10.0
    stall_seconds: float = 30.0
    bytes_per_second: float = 1e5
    num_tries: int = 7
    first_wait_seconds: float = 1.0
    most_wait_seconds: float = 30.0


PATIENCE = Patience()
ONE_LOOK = Patience(num_tries=2)  # where a person waits for the answer, and a store that is away is the answer
_JITTER = random.Random()  # of its own: the state of the module's generator belongs to whoever has seeded it
_stores: dict[tuple[int, str, Patience], Any] = {}
_stores_lock = threading.Lock()
_has_warned = threading.Event()


def is_remote(url: str) -> bool:
    """Whether a place is in a store, and not on a disk of this machine."""
    return _scheme_and_path(url)[0] != "file"


def read(url: str, most_bytes: int, sha256: str | None = None, patience: Patience | None = None) -> bytes:
    """The bytes at a path or URL: all of them, at most ``most_bytes``, with this sha256.

    Raises ``FileNotFoundError``, and ``UserError`` if the scheme is not allowed, or if the file cannot be read, is
    larger, or has another sha256. No message holds a user, a password or a query.
    """
    scheme, path = _scheme_and_path(url)
    if scheme != "file":
        return _read_remote(url, most_bytes, sha256, patience or PATIENCE)
    try:
        reading.check_regular(Path(path), "name a prepared dataset, or restore the file", most_bytes)
        data = Path(path).read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:  # permission, a path through a file, a network file system
        raise UserError(f"{url}: cannot be read ({error}); {REMEDY}") from None
    if sha256 is not None and digest_bytes(data) != sha256:
        raise _changed(url)
    return data


def _scheme_and_path(url: str) -> tuple[str, str]:
    from fsspec.core import split_protocol  # stages that read no dataset start without fsspec

    protocol, path = split_protocol(url)  # as fsspec itself will read it: "data:..." is a URL, too
    scheme = protocol or "file"
    if scheme not in ALLOWED_SCHEMES or "::" in url:
        shown = reading.without_secrets(url)
        raise UserError(f"{shown}: scheme {scheme!r} is not allowed; use one of {', '.join(ALLOWED_SCHEMES)}")
    if secret := reading.secret_in(url):
        raise UserError(f"{reading.without_secrets(url)}: holds {secret}; {reading.WHERE_SECRETS_GO}")
    return scheme, path


def _changed(url: str) -> UserError:
    remedy = "restore the file, or delete the dataset and run `alsace prepare` again"
    return UserError(f"{url}: truncated or changed (its sha256 is not the manifest's); {remedy}")


# --- tries ---------------------------------------------------------------------------------------------------------


def _read_remote(url: str, most_bytes: int, sha256: str | None, patience: Patience) -> bytes:
    begin, num_changed = time.monotonic(), 0
    for number in itertools.count(1):
        try:
            data = _attempt(url, most_bytes, patience)
        except (FileNotFoundError, UserError):
            raise
        except Exception as error:  # whatever the libraries below fsspec raise, which have no common base
            reason = _reason(error, patience)
            if number >= patience.num_tries or not _may_pass(error):
                tried = f", tried {number} times in {time.monotonic() - begin:.0f} s" if number > 1 else ""
                raise UserError(f"{url}: cannot be read ({reason}{tried}); {REMEDY}") from None
        else:
            if sha256 is None or digest_bytes(data) == sha256:
                return data
            reason, num_changed = "its sha256 is not the manifest's", num_changed + 1
            if num_changed == 2:  # a second time is no accident of the network
                raise _changed(url)
        if not _has_warned.is_set():
            _has_warned.set()
            warn(f"{url}: {reason}; trying again, and not saying so for later files")
        wait = min(patience.first_wait_seconds * 2 ** (number - 1), patience.most_wait_seconds)
        time.sleep(wait * _JITTER.uniform(0.5, 1.0))
    raise AssertionError("the loop ends above")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what it was raised from."""
    while error is not None:
        yield error
        error = error.__cause__


def _status(error: Exception) -> int | None:
    """The HTTP status of an answer, as the libraries keep it: aiohttp, Azure's, Google's, botocore."""
    kinds = _network_errors()
    if any(isinstance(one, kinds) for one in _chain(error)):  # of half an answer aiohttp says 400, which is nobody's
        return None
    for one in _chain(error):
        response = getattr(one, "response", None)
        if isinstance(response, dict) and "HTTPStatusCode" in response.get("ResponseMetadata", {}):
            return int(response["ResponseMetadata"]["HTTPStatusCode"])
        for name in ("status", "status_code", "code"):
            if str(status := getattr(one, name, "")).isdigit():
                return int(status)
    return None


def _may_pass(error: Exception) -> bool:
    """Whether the same request may succeed a little later."""
    if any(isinstance(one, PermissionError | ssl.SSLCertVerificationError) for one in _chain(error)):
        return False
    status = _status(error)
    if status is not None:
        return status >= 500 or status in (408, 425, 429)
    kinds: tuple[type[BaseException], ...] = (OSError, EOFError, *_network_errors())
    return any(isinstance(one, kinds) for one in _chain(error))


def _network_errors() -> tuple[type[Exception], ...]:
    """What the libraries raise for connections that fail, where that is no ``OSError``."""
    kinds: list[type[Exception]] = []
    try:
        from botocore import exceptions

        kinds += [exceptions.ConnectionError, exceptions.HTTPClientError, exceptions.IncompleteReadError]
        kinds += [exceptions.FlexibleChecksumError]  # the store's own checksum is not that of what arrived
    except ImportError:
        pass
    try:
        import aiohttp

        kinds += [aiohttp.ClientConnectionError, aiohttp.ClientPayloadError]
        kinds += [aiohttp.http_exceptions.HttpProcessingError]  # an answer that is none; aiohttp calls it a 400
    except ImportError:
        pass
    return tuple(kinds)


def _reason(error: Exception, patience: Patience) -> str:
    """What an error says, for people."""
    if isinstance(error, TimeoutError):
        return f"no answer, or a body that stalls, for {patience.stall_seconds:.0f} s or more"
    status = _status(error)
    said = getattr(error, "message", None) or (status and getattr(error, "strerror", None)) or str(error)
    text = reading.shorten(reading.without_secrets(said)) or type(error).__name__
    return text if status is None else f"HTTP {status}: {text}"


# --- one try -------------------------------------------------------------------------------------------------------


def _attempt(url: str, most_bytes: int, patience: Patience) -> bytes:
    from fsspec.asyn import AsyncFileSystem, sync

    store = _open_store(url, patience)
    if isinstance(store, AsyncFileSystem):
        fetch = _fetch_https if url.startswith("https:") else _fetch
        data: bytes = sync(store.loop, fetch, store, url, most_bytes, patience)
    else:  # Hadoop, whose time-outs are those of its own client
        path = store._strip_protocol(url)
        _check_size(url, store.info(path)["size"], most_bytes)
        data = store.cat_file(path)
    return data


async def _fetch(store: Any, url: str, most_bytes: int, patience: Patience) -> bytes:
    path = store._strip_protocol(url)
    async with asyncio.timeout(patience.connect_seconds + patience.stall_seconds):
        size = (await store._info(path))["size"]
    _check_size(url, size, most_bytes)
    async with asyncio.timeout(patience.stall_seconds + size / patience.bytes_per_second):
        data: bytes = await store._cat_file(path)
    return data


async def _fetch_https(store: Any, url: str, most_bytes: int, patience: Patience) -> bytes:
    """Without fsspec's own ``info``, which takes a server that answers 503 for one that has no such file."""
    session = await store.set_session()
    data = bytearray()
    async with asyncio.timeout(patience.connect_seconds + patience.stall_seconds) as limit:
        async with session.get(store.encode_url(url)) as response:
            if response.status in (404, 410):
                raise FileNotFoundError(url)
            response.raise_for_status()
            if response.url.scheme != "https":
                raise UserError(f"{url}: redirects to {response.url.scheme}://, which anybody may change; name https")
            size = response.content_length or most_bytes
            _check_size(url, size, most_bytes)
            seconds = patience.stall_seconds + size / patience.bytes_per_second
            limit.reschedule(asyncio.get_running_loop().time() + seconds)
            async for piece in response.content.iter_any():
                data += piece
                _check_size(url, len(data), most_bytes)
    return bytes(data)


def _check_size(url: str, size: int, most_bytes: int) -> None:
    if size > most_bytes:
        raise UserError(f"{url}: {size:,} bytes where at most {most_bytes:,} are read; name a prepared dataset")


def _open_store(url: str, patience: Patience) -> Any:
    """The fsspec filesystem of a URL: one for each bucket or host, shared by all threads.

    fsspec's own cache keeps one for each thread, for ever, and its caches of listings know nothing of what other
    machines write: both are left out.
    """
    from fsspec.core import url_to_fs

    scheme, _, rest = url.partition("://")
    key = (os.getpid(), f"{scheme}://{rest.partition('/')[0]}", patience)
    with _stores_lock:
        if key not in _stores:
            store, _ = url_to_fs(url, skip_instance_cache=True, **_options(scheme, patience))
            if scheme == "s3":
                store.retries = 1
            _stores[key] = store
        return _stores[key]


def _options(scheme: str, patience: Patience) -> dict[str, Any]:
    """Time-outs, and no tries of its own, for a store's library. What else people need of it comes from the library's
    own files and environment."""
    if scheme == "s3":
        config = {"connect_timeout": patience.connect_seconds, "read_timeout": patience.stall_seconds}
        # Parts that come side by side are for files of gigabytes; without them one request brings the whole.
        return {
            "config_kwargs": config | {"retries": {"total_max_attempts": 1}},
            "max_concurrency": 1,
            "use_listings_cache": False,
        }
    if scheme == "https":
        import aiohttp

        limits = aiohttp.ClientTimeout(
            total=None, sock_connect=patience.connect_seconds, sock_read=patience.stall_seconds
        )
        return {"client_kwargs": {"timeout": limits, "trust_env": True}}  # its environment: proxies, and ~/.netrc
    return {"use_listings_cache": False} if scheme in ("gs", "gcs", "abfs", "az") else {}
