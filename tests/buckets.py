"""A bucket on a real S3 server, and a door before it that may be shut."""

from __future__ import annotations

import socket
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest

BUCKET = "s3://runs"


@contextmanager
def served(patch: pytest.MonkeyPatch) -> Iterator[str]:
    """Serve a bucket, `s3://runs`; yields the endpoint, which the environment has, too."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    reach(patch, endpoint)
    urllib.request.urlopen(urllib.request.Request(f"{endpoint}/runs", method="PUT")).read()
    yield endpoint
    server.stop()


def reach(patch: pytest.MonkeyPatch, endpoint: str) -> None:
    """Let what is opened from here on reach the bucket at an endpoint."""
    patch.delenv("AWS_ALLOW_HTTP", raising=False)
    for name, value in {
        "AWS_ENDPOINT_URL": endpoint, "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
    }.items():  # fmt: skip
        patch.setenv(name, value)


class Door:
    """A port that leads to a server: `open`, `shut` (refuses), or `silent` (accepts, and never answers)."""

    def __init__(self, endpoint: str, mode: str = "open") -> None:
        host, port = endpoint.removeprefix("http://").split(":")
        self._server, self.mode = (host, int(port)), mode
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.asked = 0
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        """Refuse from now on."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                threading.Thread(target=self._one, args=(self._listener.accept()[0],), daemon=True).start()

    def _one(self, client: socket.socket) -> None:
        if self.mode == "shut":
            client.close()
            return
        server = socket.create_connection(self._server)
        threading.Thread(target=self._pump, args=(server, client), daemon=True).start()
        self._pump(client, server)

    def _pump(self, source: socket.socket, dest: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(2**16):
                self.asked += 1
                while self.mode == "silent":
                    time.sleep(0.02)
                if self.mode == "shut":
                    break
                dest.sendall(data)
        for one in (source, dest):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
