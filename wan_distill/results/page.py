"""report.html: the whole run on one self-contained page, made from what lies in the output folder.

Charts are SVG drawn here; videos and pictures are embedded, so the page opens offline and can be
sent as one file.
"""

from __future__ import annotations

import base64
import json
import platform
import re
from html import escape
from importlib.metadata import version
from pathlib import Path

from wan_distill import layout
from wan_distill.results import export
from wan_distill.results.evaluation import COLUMNS
from wan_distill.settings.config import Config
from wan_distill.settings.description import TeacherInfo
from wan_distill.system.files import write_atomically
from wan_distill.training.metrics import read_lines

PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft", "safetensors")
NOT_CHARTED = {"expert", "step", "seconds"}
WIDE, TALL, LEFT, LOW = 320, 150, 44, 18  # a chart, and its margins for numbers
EXPERT_COLOURS = {"high": "var(--high)", "low": "var(--low)"}


def write_page(folder: Path, config: Config, info: TeacherInfo) -> None:
    """Writes `folder/report.html`; anything that is not there yet is left out, so it can be called
    at any time.
    """
    lines = read_lines(folder / "metrics.jsonl")
    evaluation = json.loads(_read(folder / "evaluation.json") or "null")
    parts = [
        f"<h1>{escape(info.name)}, distilled to {' or '.join(map(str, config.sampling_steps))} "
        "steps</h1>",
        _summary(config, info, lines, evaluation),
        _section("Teacher beside student", _videos(folder, config)),
        _section("Comparison", _picture(folder / "comparison.png")),
        _section("Measured", _table(evaluation) if evaluation else ""),
        _section("Curves", _charts(lines)),
        _section("Use it", _snippet(export.snippet(config, info, _exported(folder)))),
        _section(
            "Plan",
            f"<pre>{escape(_read(folder / 'plan.txt'))}</pre>"
            if (folder / "plan.txt").exists()
            else "",
        ),
        _section("Versions", _versions()),
    ]
    page = TEMPLATE.replace("TITLE", escape(info.name)).replace(
        "BODY", "\n".join(filter(None, parts))
    )
    write_atomically(folder / "report.html", page.encode())


def _read(file: Path) -> str:
    return file.read_text(encoding="utf-8") if file.exists() else ""


def _exported(folder: Path) -> tuple[str, ...]:
    return tuple(e for e in layout.LORA_FILE if layout.student_file(folder, e).exists())


def _section(title: str, content: str) -> str:
    return f"<section><h2>{title}</h2>{content}</section>" if content else ""


def _summary(config: Config, info: TeacherInfo, lines: list[dict], evaluation: dict | None) -> str:
    """What was distilled, from what, how far it is, how good, and whether it is healthy."""
    steps = " or ".join(map(str, config.sampling_steps))
    said = [
        f"A student of <b>{escape(info.source)}</b> that makes a clip in {steps} steps without "
        "guidance, "
        f"instead of {config.teacher_steps} guided ones. Method: {escape(config.method)}."
    ]
    done = {line["expert"]: line["step"] for line in lines}
    if done:
        said.append(
            "Trained so far: " + ", ".join(f"{e} expert {n} updates" for e, n in done.items()) + "."
        )
    if evaluation:
        rows = {row["sampler"]: row for row in evaluation["rows"]}
        student, teacher = rows[f"student {config.grid_steps}"], evaluation["rows"][0]
        speedup = teacher["seconds_per_sample"] / student["seconds_per_sample"]
        said.append(
            f"It closed <b>{evaluation['gap_closed']:.0%}</b> of the gap between its teacher's own "
            "few unguided "
            f"steps and its full sampling, and is <b>{speedup:.1f} times</b> as fast "
            f"({student['seconds_per_sample']:.3g} s instead of "
            f"{teacher['seconds_per_sample']:.3g} s a clip)."
        )
    return "".join(f"<p>{sentence}</p>" for sentence in [*said, _health(lines)])


def _health(lines: list[dict]) -> str:
    from wan_distill.training.monitor import warnings

    looks = [
        {k.removeprefix("monitor_"): v for k, v in line.items() if k.startswith("monitor_")}
        for line in lines
    ]
    looks = [look for look in looks if "luminance" in look]
    if not looks:
        return "Health: nothing was looked at yet."
    found = warnings(looks[-1])
    if found:
        return f'<span class="bad">Health: {escape(" ".join(found))}</span>'
    return '<span class="good">Health: at the last look motion, exposure and diversity were near the teacher\'s.</span>'


def _table(evaluation: dict) -> str:
    head = "".join(f"<th>{title}</th>" for title, _ in COLUMNS.values())
    rows = "".join(
        "<tr>"
        + "".join(f"<td>{escape(form.format(row[key]))}</td>" for key, (_, form) in COLUMNS.items())
        + "</tr>"
        for row in evaluation["rows"]
    )
    return (
        f'<div class="wide"><table><tr>{head}</tr>{rows}</table></div><p>Fréchet and paired distance: lower is '
        f"closer to the teacher. Motion and diversity: 1 is the teacher's. {evaluation['samples']} "
        "samples a side, "
        "on prompts that were not trained on.</p>"
    )


def _versions() -> str:
    used = [f"{name} {version(name)}" for name in PACKAGES]
    return f"<p>{escape(', '.join([f'Python {platform.python_version()}', *used]))}; {escape(platform.platform())}</p>"


def _snippet(code: str) -> str:
    return f'<p><button id="copy">Copy</button></p><pre id="code">{escape(code)}</pre>'


def _embedded(file: Path, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(file.read_bytes()).decode()}"


def _picture(file: Path) -> str:
    if not file.exists():
        return ""
    return f'<img alt="teacher and student, frame by frame" src="{_embedded(file, "image/png")}">'


def _videos(folder: Path, config: Config) -> str:
    """For each expert and prompt: the teacher, the student at first and the student now; they play
    in step.
    """
    blocks, prompts = [], json.loads(_read(folder / "previews" / "prompts.json") or "[]")
    for expert in ("high", "low"):
        found = [
            re.fullmatch(rf"{expert}-(\d+)-(\d+)", f.stem)
            for f in (folder / "previews").glob(f"{expert}-*.mp4")
        ]
        updates = sorted({match[1] for match in found if match})
        shown = ["teacher", *dict.fromkeys([*updates[:1], *updates[-1:]])]
        for prompt in sorted({match[2] for match in found if match}):
            row = "".join(
                _video(folder / "previews" / f"{expert}-{who}-{prompt}.mp4", who) for who in shown
            )
            said = f"<p>{escape(prompts[int(prompt)])}</p>" if int(prompt) < len(prompts) else ""
            blocks.append(f'{said}<div class="row">{row}</div>')
        if updates:
            title = (
                "high-noise expert: what its steps head for, blurred by nature"
                if expert == "high"
                else "low-noise expert: finished clips"
            )
            blocks.insert(len(blocks) - len({m[2] for m in found if m}), f"<h3>{title}</h3>")
    return '<p><button id="play">Pause</button></p>' + "".join(blocks) if blocks else ""


def _video(file: Path, who: str) -> str:
    if not file.exists():
        return ""
    label = "teacher" if who == "teacher" else f"student after {int(who)} updates"
    return (
        f'<figure><video muted loop playsinline src="{_embedded(file, "video/mp4")}"></video>'
        f"<figcaption>{label}</figcaption></figure>"
    )


def _charts(lines: list[dict]) -> str:
    names = sorted(
        {name for line in lines for name in line} - NOT_CHARTED,
        key=lambda name: (not name.endswith("_loss"), not name.startswith("monitor"), name),
    )
    return (
        f'<div class="charts">{"".join(_chart(name, lines) for name in names)}</div>'
        if lines
        else ""
    )


def _chart(name: str, lines: list[dict]) -> str:
    """One quantity over the updates of all experts, one phase after the other, each in its colour."""
    offset, ends = 0, {}
    for expert in dict.fromkeys(line["expert"] for line in lines):
        ends[expert] = offset
        offset += max(line["step"] for line in lines if line["expert"] == expert)
    points = [
        (line["expert"], ends[line["expert"]] + line["step"], line[name])
        for line in lines
        if name in line
    ]
    low, high = min(p[2] for p in points), max(p[2] for p in points)
    span = (high - low) or 1.0

    def place(x: float, y: float) -> str:
        return f"{LEFT + (WIDE - LEFT - 6) * x / offset:.1f},{TALL - LOW - (TALL - LOW - 8) * (y - low) / span:.1f}"

    curves = []
    for expert, start in ends.items():
        path = " ".join(place(x, y) for e, x, y in points if e == expert)
        x = place(start, low).split(",")[0]
        curves.append(
            f'<polyline points="{path}" style="stroke:{EXPERT_COLOURS[expert]}"/>'
            f'<line x1="{x}" x2="{x}" y1="8" y2="{TALL - LOW}"/>'
            f'<text x="{float(x) + 3}" y="16">{expert}</text>'
        )
    return (
        f"<figure><figcaption>{escape(name.replace('_', ' '))}</figcaption>"
        f'<svg viewBox="0 0 {WIDE} {TALL}" role="img" aria-label="{escape(name)}">{"".join(curves)}'
        f'<text x="2" y="14">{high:.3g}</text><text x="2" y="{TALL - LOW}">{low:.3g}</text>'
        f'<text x="{WIDE - 60}" y="{TALL - 4}">{offset} updates</text></svg></figure>'
    )


TEMPLATE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,"><title>TITLE</title>
<style>
:root { --ink: #1c1e21; --paper: #fff; --soft: #f1f3f5; --line: #c9ced3; --high: #b4530a; --low: #1864ab;
  --good: #23702e; --bad: #b02525 }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8ea; --paper: #15171a; --soft: #22262a; --line: #474d54;
  --high: #ffa94d; --low: #74c0fc; --good: #8ce99a; --bad: #ff8787 } }
body { color: var(--ink); background: var(--paper); font: 16px/1.5 system-ui, sans-serif; max-width: 1080px;
  margin: 0 auto; padding: 12px 16px }
h1 { font-size: 1.6rem; line-height: 1.2; overflow-wrap: anywhere } h2 { font-size: 1.2rem; margin-top: 2rem }
h3 { font-size: 1rem } p { overflow-wrap: anywhere } .good { color: var(--good) } .bad { color: var(--bad) }
.row { display: flex; flex-wrap: wrap; gap: 10px; margin-bottom: 12px } figure { margin: 0 }
.row figure { flex: 1 1 96px; max-width: 420px } video, img { width: 100%; image-rendering: auto }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(260px, 1fr)); gap: 14px }
figcaption { font-size: .85rem } svg { width: 100%; background: var(--soft); border-radius: 6px }
polyline { fill: none; stroke-width: 1.6 } svg line { stroke: var(--line); stroke-dasharray: 3 3 }
svg text { font-size: 10px; fill: var(--ink) } .wide { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: 4px 10px; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap }
th:first-child, td:first-child { text-align: left }
pre { background: var(--soft); padding: 12px; overflow-x: auto; border-radius: 6px; font-size: .85rem }
button { font: inherit; padding: 4px 14px; color: inherit; background: var(--soft); border: 1px solid var(--line);
  border-radius: 6px }
</style>
<body>
BODY
<script>
const videos = [...document.querySelectorAll("video")], play = document.getElementById("play");
function all(action) { videos.forEach(v => { v.currentTime = videos[0].currentTime; action(v) }) }
if (play) {
  const start = () => all(v => v.play().catch(() => { play.textContent = "Play" }));
  const ready = v => v.readyState > 1 ? 0 : new Promise(done => v.addEventListener("loadeddata", done));
  Promise.all(videos.map(ready)).then(start);
  const apart = v => { const t = Math.abs(v.currentTime - videos[0].currentTime); return Math.min(t, v.duration - t) };
  setInterval(() => videos.forEach(v => { if (apart(v) > 0.08) v.currentTime = videos[0].currentTime }), 500);
  play.onclick = () => { const stop = play.textContent === "Pause"; play.textContent = stop ? "Play" : "Pause";
    stop ? all(v => v.pause()) : start() };
}
const copy = document.getElementById("copy"), code = document.getElementById("code");
copy.onclick = async () => {
  try { await navigator.clipboard.writeText(code.textContent) }
  catch { getSelection().selectAllChildren(code); document.execCommand("copy") }  // no clipboard from a local file
  copy.textContent = "Copied";
};
</script></body></html>
"""
