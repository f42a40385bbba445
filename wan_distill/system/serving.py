"""One page over HTTP while a run goes on: to this machine only, read only."""

from __future__ import annotations

import getpass
import socket
import threading
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from wan_distill.errors import UsageError

LOOPBACK = "127.0.0.1"
OWN_NAMES = (LOOPBACK, "localhost")


class PageServer(ThreadingHTTPServer):
    """Serves one page at `/`.

    Args:
        port: 0 for any that is free; `server_port` then says which.
        page: makes the page as it is now. It is called in threads of the server.
        version: changes whenever the page may have changed; cheap.
    """

    daemon_threads = True
    allow_reuse_address = False  # on Windows it would let two servers have one port

    def __init__(self, port: int, page: Callable[[], str], version: Callable[[], str]):
        super().__init__((LOOPBACK, port), _Handler)
        self.page = page
        self.version = version


class _Handler(BaseHTTPRequestHandler):
    server: PageServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def _answer(self, with_body: bool) -> None:
        # A page of somebody else's that resolves its own name to this machine learns nothing.
        host = (self.headers["Host"] or "").rpartition(":")[0] or self.headers["Host"]
        if host not in OWN_NAMES:
            self._send(HTTPStatus.FORBIDDEN, b"", with_body)
        elif self.path.split("?")[0] != "/":
            self._send(HTTPStatus.NOT_FOUND, b"", with_body)
        else:
            tag = f'"{self.server.version()}"'
            body = self.server.page().encode() if with_body else b""
            self._send(HTTPStatus.OK, body, with_body, tag)

    def _send(self, status: HTTPStatus, body: bytes, with_body: bool, tag: str = "") -> None:
        self.send_response(status)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Cache-Control", "no-cache")
        if tag:
            self.send_header("ETag", tag)
        if with_body:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Says nothing: the terminal is the run's."""


def serve_page(port: int, page: Callable[[], str], version: Callable[[], str]) -> list[str]:
    """Serves a page from a thread of this process until it ends. Returns where, in lines.

    Arguments as of `PageServer`. Raises UsageError where the port cannot be had.
    """
    try:
        server = PageServer(port, page, version)
    except OSError as error:
        raise UsageError(
            f"--serve {port}: cannot listen there ({error.strerror}); give another port, such as "
            f"--serve {port + 1}"
        ) from error
    threading.Thread(target=server.serve_forever, daemon=True).start()
    port = server.server_port
    return [
        f"Live page: http://{LOOPBACK}:{port}/ while this run goes on",
        f"  from your own machine: ssh -N -L {port}:{LOOPBACK}:{port} {_login()}, then open it",
        "",
    ]


def _login() -> str:
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        user = "USER"
    return f"{user}@{socket.gethostname()}"
