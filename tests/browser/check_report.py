"""Opens a run's report.html in headless Chromium and checks what a user would notice.

    python tests/browser/check_report.py OUTPUT_DIR

Fails on any script error, on a video that does not play or is out of step with the others, on a
missing chart, on words of a chart that are cut, and on a page wider than a phone. Writes
screenshots (desk, dark, phone) beside the report, for people to judge. Needs Chromium:
apt-get install chromium, or set CHROMIUM to its path.
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
from html import unescape
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

WIDTHS = (1200, 360)  # pixels: a desk and a phone
PLAYING = 7.0  # seconds for which the page plays before it is read
OUT_OF_STEP = 0.3  # seconds that videos may be apart

PROBE = """<script>
const errors = [];
addEventListener("error", e => errors.push(e.message));
addEventListener("unhandledrejection", e => errors.push(String(e.reason)));
console.error = (...a) => errors.push(a.join(" "));

function isCut(text) {
  const word = text.getBoundingClientRect(), chart = text.ownerSVGElement.getBoundingClientRect();
  return word.left < chart.left || word.right > chart.right;
}

setTimeout(() => {
  document.getElementById("copy").click();
  setTimeout(() => {
    const videos = [...document.querySelectorAll("video")];
    const ahead = videos.map(v => Math.abs(v.currentTime - videos[0].currentTime));
    const facts = {
      errors,
      videos: videos.length,
      playing: videos.filter(v => !v.paused && v.videoWidth > 0 && v.readyState > 1).length,
      spread: Math.max(0, ...ahead.map((t, i) => Math.min(t, videos[i].duration - t))),
      charts: document.querySelectorAll("svg polyline").length,
      cut: [...document.querySelectorAll("svg text")].filter(isCut).map(t => t.textContent),
      copied: document.getElementById("copy").textContent,
      scroll: document.documentElement.scrollWidth,
      client: document.documentElement.clientWidth,
    };
    document.documentElement.setAttribute("data-facts", JSON.stringify(facts));
  }, 200);
}, 2500);
</script>"""

# Windows narrower than 500 pixels do not exist, frames do.
FRAME = """<iframe id="f" src="page.html" width="{width}" height="900"></iframe>
<img src="{slow_picture}"><script>
setTimeout(() => document.documentElement.setAttribute("data-facts",
  document.getElementById("f").contentDocument.documentElement.dataset.facts), 6000)</script>"""


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
        "--autoplay-policy=no-user-gesture-required",
        *arguments,
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


class SlowPicture(BaseHTTPRequestHandler):
    """A picture that arrives after `PLAYING` seconds.

    Chromium prints a page once everything on it has loaded: the picture is what it waits for.
    """

    def do_GET(self) -> None:
        time.sleep(PLAYING)
        self.send_response(204)
        self.end_headers()

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


def read_page(page: Path, width: int) -> dict[str, Any]:
    """What `PROBE` finds in a frame `width` pixels wide after some seconds of play."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), SlowPicture)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with tempfile.TemporaryDirectory() as folder:
        text = page.read_text(encoding="utf-8").replace("<body>", "<body>" + PROBE, 1)
        (Path(folder) / "page.html").write_text(text, encoding="utf-8")
        frame = Path(folder) / "frame.html"
        address = f"http://127.0.0.1:{server.server_port}/"
        frame.write_text(FRAME.format(width=width, slow_picture=address), encoding="utf-8")
        printed = chromium("--allow-file-access-from-files", "--dump-dom", frame.as_uri())
    server.shutdown()
    facts = re.search(r'data-facts="([^"]*)"', printed)
    assert facts, "the page's scripts did not run to their end"
    return json.loads(unescape(facts[1]))


def check(page: Path) -> None:
    """Raises AssertionError with the first thing that is wrong."""
    for width in WIDTHS:
        facts = read_page(page, width)
        print(width, facts)
        assert not facts["errors"], facts["errors"]
        assert facts["charts"] > 0, "no charts"
        assert not facts["cut"], f"words of charts are cut: {facts['cut']}"
        assert facts["videos"] > 0, "no videos"
        assert facts["playing"] == facts["videos"], "videos that do not play"
        assert facts["spread"] < OUT_OF_STEP, f"videos {facts['spread']:.2f} s out of step"
        assert facts["copied"] == "Copied", "the copy button did nothing"
        assert facts["scroll"] <= facts["client"], (
            f"{facts['scroll']} pixels wide on a screen of {facts['client']}"
        )


def take_screenshots(page: Path) -> None:
    """Writes report-desk.png, report-phone.png and report-dark.png beside the page."""
    for name, flags in dict(
        desk=["--window-size=1200,2600"],
        phone=["--window-size=500,2600"],
        dark=["--window-size=1200,2600", "--blink-settings=preferredColorScheme=0"],
    ).items():
        picture = page.with_name(f"report-{name}.png")
        flags += [f"--screenshot={picture}", "--virtual-time-budget=3000"]
        chromium(*flags, page.resolve().as_uri())
        print(f"wrote {picture}")


if __name__ == "__main__":
    report = Path(sys.argv[1]) / "report.html"
    check(report)
    take_screenshots(report)
