"""Opens a run's report.html in headless Chromium, as a user would: python
tests/browser/check_report.py OUTPUT_DIR

Fails on any script error, on a video that does not play or is out of step, on a missing chart, and
on a page wider than a phone. Writes screenshots (desk, dark, phone) beside the report for a look
with the eyes. Needs Chromium: apt-get install chromium, or set CHROMIUM to its path.
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

WATCHED = 7.0  # seconds that the page is left to play

PROBE = """<script>
const errors = [];
addEventListener("error", e => errors.push(e.message));
addEventListener("unhandledrejection", e => errors.push(String(e.reason)));
console.error = (...a) => errors.push(a.join(" "));
setTimeout(() => {
  document.getElementById("copy").click();
  setTimeout(() => {
    const videos = [...document.querySelectorAll("video")];
    const ahead = videos.map(v => Math.abs(v.currentTime - videos[0].currentTime));
    const facts = { errors, videos: videos.length, charts: document.querySelectorAll("svg polyline").length,
      playing: videos.filter(v => !v.paused && v.videoWidth > 0 && v.readyState > 1).length,
      spread: Math.max(0, ...ahead.map((t, i) => Math.min(t, videos[i].duration - t))),
      copied: document.getElementById("copy").textContent, scroll: document.documentElement.scrollWidth,
      client: document.documentElement.clientWidth };
    document.documentElement.setAttribute("data-facts", JSON.stringify(facts));
  }, 200);
}, 2500);
</script>"""


def chromium(*arguments: str) -> str:
    program = (
        os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    )
    if not program:
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


class Slow(BaseHTTPRequestHandler):
    """A picture that takes its time: Chromium dumps a page when everything on it has loaded, and
    not before.
    """

    def do_GET(self) -> None:
        time.sleep(WATCHED)
        self.send_response(204)
        self.end_headers()

    def log_message(self, *line) -> None:
        pass


def facts(page: Path, width: int) -> dict:
    """What a probe inside the page saw after it had played for a while, in a frame `width` pixels
    wide.
    """
    server = ThreadingHTTPServer(("127.0.0.1", 0), Slow)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with tempfile.TemporaryDirectory() as folder:
        probed = Path(folder) / "page.html"
        probed.write_text(
            page.read_text(encoding="utf-8").replace("<body>", "<body>" + PROBE, 1),
            encoding="utf-8",
        )
        # Windows narrower than 500 pixels do not exist, frames do.
        frame = Path(folder) / "frame.html"
        frame.write_text(f"""<iframe id="f" src="page.html" width="{width}" height="900"></iframe>
            <img src="http://127.0.0.1:{server.server_port}/"><script>
            setTimeout(() => document.documentElement.setAttribute("data-facts",
            document.getElementById("f").contentDocument.documentElement.dataset.facts), 6000)</script>""")
        dom = chromium("--allow-file-access-from-files", "--dump-dom", frame.as_uri())
    server.shutdown()
    return json.loads(unescape(re.search(r'data-facts="([^"]*)"', dom)[1]))


def check(page: Path) -> None:
    for width in (1200, 360):
        seen = facts(page, width)
        print(width, seen)
        assert not seen["errors"], seen["errors"]
        assert seen["charts"] > 0, "no charts"
        assert seen["videos"] > 0 and seen["playing"] == seen["videos"], "videos that do not play"
        assert seen["spread"] < 0.3, f"videos {seen['spread']:.2f} s out of step"
        assert seen["copied"] == "Copied", "the copy button did nothing"
        assert seen["scroll"] <= seen["client"], (
            f"{seen['scroll']} pixels wide on a screen of {seen['client']}"
        )
    for name, flags in dict(
        desk=["--window-size=1200,2600"],
        phone=["--window-size=500,2600"],
        dark=["--window-size=1200,2600", "--blink-settings=preferredColorScheme=0"],
    ).items():
        picture = page.with_name(f"report-{name}.png")
        chromium(
            f"--screenshot={picture}", "--virtual-time-budget=3000", *flags, page.resolve().as_uri()
        )
        print(f"look at {picture}")


if __name__ == "__main__":
    check(Path(sys.argv[1]) / "report.html")
