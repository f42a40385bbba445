"""Opens a run's report.html in headless Chromium and checks what a user would notice.

    python tests/browser/check_report.py OUTPUT_DIR [PICTURES]

At two widths, light and dark: no script error, videos that play in step, charts with their words
whole and values under the pointer, controls that work, text that can be read, nothing wider than
the screen, clips and the four numbers on the first screen; nothing moves where the system asks for
that; and a page that is served changes without losing the reader's place. Writes screenshots into
PICTURES (default: beside the report), for people to judge. Needs Chromium: apt-get install
chromium, or set CHROMIUM to its path.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from html import unescape
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

SCREENS = {1280: 800, 390: 844}  # pixels: a desk and a phone
SCHEMES = {"light": "1", "dark": "0"}
LONGEST = 90.0  # seconds that a page may take
OUT_OF_STEP = 0.3  # seconds that videos may be apart
READABLE = 4.5  # contrast of text, WCAG 2.2 AA
LARGEST = 2_000_000  # bytes, of the embedded run's page

PROBE = (Path(__file__).parent / "probe.js").read_text(encoding="utf-8")

# Windows narrower than 500 pixels do not exist, frames do.
FRAME = """<body style="margin:0"><iframe id="f" src="{address}" style="border:0" width="{width}"
height="{height}"></iframe>
<img src="{slow_picture}"><script>
setInterval(() => document.documentElement.setAttribute("data-facts",
  document.getElementById("f").contentDocument?.documentElement.dataset.facts ?? ""), 200)
</script>"""


def chromium(*arguments: str) -> str:
    """Runs headless Chromium and returns what it prints. Exits where it is not installed."""
    names = (os.environ.get("CHROMIUM"), shutil.which("chromium"), shutil.which("google-chrome"))
    program = next(filter(None, names), None)
    if program is None:
        sys.exit("Chromium is not installed: apt-get install chromium, or set CHROMIUM")
    command = [
        program,
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--allow-file-access-from-files",
        "--autoplay-policy=no-user-gesture-required",
        *arguments,
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout


class Pages(BaseHTTPRequestHandler):
    """Serves the pages of `texts` by path, and `/wait`, which arrives after `/done` was asked for.

    Chromium prints a page once everything on it has loaded: that is what it waits for.
    """

    texts: dict[str, Callable[[], str]]
    done: threading.Event

    def do_GET(self) -> None:
        if self.path not in self.texts:
            if self.path == "/done":
                self.done.set()
            if self.path == "/wait":
                self.done.wait(LONGEST)
                time.sleep(0.5)  # until the frame has read it
            self.send_response(404)
            self.end_headers()
            return
        body = self.texts[self.path]().encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("ETag", f'"{hash(body)}"')
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


def read_page(
    text: Callable[[], str], width: int, *flags: str, live: bool = False
) -> dict[str, Any]:
    """What the probe finds on a page in a frame `width` pixels wide.

    Args:
        text: makes the page for each request.
        live: whether to wait until it has refreshed itself.
    """
    handler = type("Handler", (Pages,), dict(done=threading.Event()))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    address = f"http://127.0.0.1:{server.server_port}"
    size = dict(width=width, height=SCREENS[width])
    frame = FRAME.format(address="/", slow_picture="/wait", **size)
    probe = f"<body><script>const LIVE = {str(live).lower()};{PROBE}</script>"
    handler.texts = {
        "/": lambda: re.sub("<body[^>]*>", lambda _: probe, text(), count=1),
        "/frame": lambda: frame,
    }
    threading.Thread(target=server.serve_forever, daemon=True).start()
    window = f"--window-size={max(500, width)},{SCREENS[width]}"
    printed = chromium(window, *flags, "--dump-dom", f"{address}/frame")
    server.shutdown()
    facts = re.search(r'data-facts="([^"]+)"', printed)
    assert facts, "the page's scripts did not run to their end"
    return json.loads(unescape(facts[1]))


def check(page: str, width: int, scheme: str) -> None:
    """Raises AssertionError with the first thing that is wrong."""
    dark = f"--blink-settings=preferredColorScheme={SCHEMES[scheme]}"
    facts = read_page(lambda: page, width, dark)
    print(width, scheme, facts)
    assert not facts["errors"], facts["errors"]
    assert facts["scroll"] <= facts["client"], f"{facts['scroll']} pixels wide"
    assert facts["videos"] > 0 and facts["playing"] == facts["videos"], "videos that do not play"
    assert facts["spread"] < OUT_OF_STEP, f"videos {facts['spread']:.2f} s out of step"
    assert facts["tiles"] == 4 and facts["firstScreen"] <= SCREENS[width], (
        f"the four numbers end {facts['firstScreen']} pixels down"
    )
    assert facts["charts"] > 0, "no charts"
    assert not facts["cut"], f"words of charts are cut: {facts['cut']}"
    assert facts["hover"] and facts["keyboard"] and facts["hover"] != facts["keyboard"], (
        "no values under the pointer or by the arrow keys"
    )
    assert facts["slider"], "the slider over training time does nothing"
    assert facts["contrast"] >= READABLE, f"text with a contrast of {facts['contrast']}"
    assert facts["copied"] == "Copied", "the copy button did nothing"
    is_dark = facts["background"] < 0.2
    assert is_dark == (scheme == "dark"), "the page does not follow the system's colours"


def check_still(page: str) -> None:
    """Nothing moves by itself where the system asks for that."""
    facts = read_page(lambda: page, 1280, "--force-prefers-reduced-motion")
    assert facts["playing"] == 0 and not facts["errors"], facts


def check_live(page: str) -> None:
    """What changed appears, and what the reader has set stays."""
    lead = re.search(r'<p class="lead">', page)
    assert lead, "no sentence"
    requests = []

    def growing() -> str:
        requests.append(1)
        return (
            page
            if len(requests) < 3
            else page.replace(lead[0], f"{lead[0]}NEW ", 1).replace(
                'data-digest="', 'data-digest="x', 1
            )
        )

    facts = read_page(growing, 1280, live=True)
    assert facts["lead"].startswith("NEW"), "the page did not refresh itself"
    assert facts["kept"], "the slider lost its place"


def take_screenshots(page: Path, folder: Path) -> None:
    """Writes report-<width>-<scheme>.png, the whole page, into `folder`."""
    for width in SCREENS:
        for scheme, value in SCHEMES.items():
            picture = folder / f"report-{width}-{scheme}.png"
            height = 5200 if width > 500 else 8200
            with tempfile.NamedTemporaryFile("w", suffix=".html", delete=False) as frame:
                size = dict(width=width, height=height)
                frame.write(FRAME.format(address=page.resolve().as_uri(), slow_picture="", **size))
            chromium(
                f"--window-size={max(500, width)},{height}",
                f"--blink-settings=preferredColorScheme={value}",
                "--virtual-time-budget=3000",
                f"--screenshot={picture}",
                Path(frame.name).as_uri(),
            )
            Path(frame.name).unlink()
            print(f"wrote {picture}")


def main(arguments: list[str]) -> None:
    """Checks the page of an output folder."""
    report = Path(arguments[0]) / "report.html"
    page = report.read_text(encoding="utf-8")
    assert len(page) < LARGEST, f"{len(page)} bytes"
    for width in SCREENS:
        for scheme in SCHEMES:
            check(page, width, scheme)
    check_still(page)
    check_live(page)
    take_screenshots(report, Path(arguments[1]) if len(arguments) > 1 else report.parent)


if __name__ == "__main__":
    main(sys.argv[1:])
