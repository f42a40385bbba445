"""The page over HTTP: what is answered, to whom, and a port that is taken."""

from __future__ import annotations

import http.client
import socket
from collections.abc import Iterator

import pytest

from wan_distill.errors import UsageError
from wan_distill.system.serving import PageServer, serve_page


class Live:
    """A page that changes."""

    def __init__(self) -> None:
        self.text = "<p>one</p>"

    def page(self) -> str:
        return self.text

    def version(self) -> str:
        return str(len(self.text))


@pytest.fixture
def live() -> Live:
    return Live()


@pytest.fixture
def port(live: Live) -> Iterator[int]:
    lines = serve_page(0, live.page, live.version)
    yield int(lines[0].split(":")[3].split("/")[0])


def ask(port: int, method: str = "GET", path: str = "/", **headers: str):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request(method, path, headers=headers)
    answer = connection.getresponse()
    return answer, answer.read().decode()


def test_the_page_is_made_anew_for_each_request(live, port):
    answer, body = ask(port)
    assert (answer.status, body) == (200, "<p>one</p>")
    tag = answer.headers["ETag"]
    answer, body = ask(port, "HEAD")
    assert (answer.status, body, answer.headers["ETag"]) == (200, "", tag)
    live.text = "<p>three</p>"
    assert ask(port, "HEAD")[0].headers["ETag"] != tag and ask(port)[1] == "<p>three</p>"


@pytest.mark.parametrize("path", ["/run.json", "/../README.md", "/."])
def test_no_file_is_served(port, path):
    answer, body = ask(port, path=path)
    assert (answer.status, body) == (404, "")


def test_only_this_machine_is_answered(port):
    assert ask(port, Host="example.org")[0].status == 403
    assert ask(port, Host=f"localhost:{port}")[0].status == 200
    with PageServer(0, str, str) as server:
        assert server.server_address[0] == "127.0.0.1"


def test_where_it_is_and_how_to_reach_it_from_afar(live):
    first, second, _ = serve_page(0, live.page, live.version)
    assert first.startswith("Live page: http://127.0.0.1:")
    port = first.split(":")[3].split("/")[0]
    assert f"ssh -N -L {port}:127.0.0.1:{port} " in second and socket.gethostname() in second


def test_a_port_that_is_taken_is_refused_in_one_line(live, port):
    with pytest.raises(UsageError, match=rf"--serve {port}: cannot listen.*--serve {port + 1}"):
        serve_page(port, live.page, live.version)
