"use strict";
// ------------------------------------------------------------------- clips, all in step
const still = matchMedia("(prefers-reduced-motion: reduce)");
let playing = !still.matches, began = performance.now(), stoppedAt = 0;
const onScreen = new Set();
const watcher = new IntersectionObserver(entries => entries.forEach(e => {
  e.isIntersecting ? onScreen.add(e.target) : onScreen.delete(e.target);
  run(e.target);
}), { rootMargin: "120px" });

const clock = () => playing ? (performance.now() - began) / 1000 : stoppedAt;

function run(video) {
  if (!playing || !onScreen.has(video)) return video.pause();
  if (video.readyState > 0) align(video);
  video.play().catch(() => setPlaying(false));  // a browser that lets nothing play by itself
}

function align(video) {
  const length = video.duration || 1, due = clock() % length;
  const apart = Math.abs(video.currentTime - due);
  if (Math.min(apart, length - apart) > 0.08) video.currentTime = due;
}

function setPlaying(wanted) {
  if (wanted === playing) return;
  stoppedAt = clock();
  began = performance.now() - 1000 * stoppedAt;
  playing = wanted;
  onScreen.forEach(video => { run(video); align(video) });
  label();
}

function label() {
  document.querySelectorAll(".play").forEach(b => { b.textContent = playing ? "Pause" : "Play" });
}

setInterval(() => { if (playing) onScreen.forEach(align) }, 500);

// ------------------------------------------------------------------- tabs and training time
function arrange() {
  const chosen = document.querySelector("input[name=expert]:checked");
  document.querySelectorAll(".phase").forEach(phase => {
    phase.hidden = Boolean(chosen) && phase.dataset.expert !== chosen.value;
    const slider = phase.querySelector("input[type=range]");
    if (!slider) return;
    phase.querySelector("output").textContent = JSON.parse(slider.dataset.stops)[slider.value];
    phase.querySelectorAll("[data-stop]").forEach(v => { v.hidden = v.dataset.stop !== slider.value });
  });
}

// ------------------------------------------------------------------- values under the pointer
function point(chart, index) {
  const points = JSON.parse(chart.dataset.points);
  if (!points.length) return;
  index = Math.max(0, Math.min(points.length - 1, index));
  const [x, y, words] = points[index], svg = chart.querySelector("svg");
  const line = svg.querySelector("line.here"), dot = svg.querySelector("circle.here");
  line.setAttribute("x1", x), line.setAttribute("x2", x);
  dot.setAttribute("cx", x), dot.setAttribute("cy", y);
  [line, dot].forEach(e => e.setAttribute("visibility", "visible"));
  chart.querySelector(".value").textContent = words;
  chart.dataset.index = index;
}

document.addEventListener("pointermove", event => {
  const chart = event.target.closest?.(".chart"), svg = chart?.querySelector("svg");
  if (!svg) return;
  const box = svg.getBoundingClientRect();
  const x = (event.clientX - box.left) / box.width * svg.viewBox.baseVal.width;
  const away = JSON.parse(chart.dataset.points).map(p => Math.abs(p[0] - x));
  point(chart, away.indexOf(Math.min(...away)));
});

document.addEventListener("keydown", event => {
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  const chart = document.activeElement.closest?.(".chart");
  if (!step || !chart) return;
  point(chart, Number(chart.dataset.index ?? (step > 0 ? -1 : 1e9)) + step);
  event.preventDefault();
});

// ------------------------------------------------------------------- buttons
async function copy(button) {
  const code = button.parentElement.querySelector("pre");
  try { await navigator.clipboard.writeText(code.textContent) }
  catch {  // a page opened from a file has no clipboard
    getSelection().selectAllChildren(code);
    document.execCommand("copy");
  }
  button.textContent = "Copied";
}

document.addEventListener("click", event => {
  if (event.target.matches(".play")) setPlaying(!playing);
  if (event.target.matches(".copy")) copy(event.target);
});
document.addEventListener("input", arrange);

function prepare() {
  watcher.disconnect();
  onScreen.clear();
  document.querySelectorAll("video").forEach(video => {
    video.onloadeddata = () => align(video);
    watcher.observe(video);
  });
  arrange();
  label();
}
prepare();

// ------------------------------------------------------------------- live: only what changed
function keep(root) {  // what the reader has set, by id
  const set = {};
  root.querySelectorAll("input[id], details[id]").forEach(e => {
    set[e.id] = { value: e.value, checked: e.checked, open: e.open, last: e.value === e.defaultValue };
  });
  return set;
}

function restore(root, set) {
  root.querySelectorAll("input[id], details[id]").forEach(e => {
    const was = set[e.id];
    if (!was) return;
    if (e.type === "range") e.value = was.last ? e.defaultValue : was.value;
    e.checked = was.checked;
    if (was.open) e.open = true;
  });
}

function replaceChanged(fresh) {
  const main = document.querySelector("main"), set = keep(main);
  const sections = [...main.children];
  const anchor = sections.find(s => s.getBoundingClientRect().bottom > 0) ?? sections[0];
  const before = anchor.getBoundingClientRect().top, name = anchor.id;
  const old = new Map(sections.map(s => [s.id, s]));
  const wanted = [...fresh.querySelector("main").children].map(section => {
    const own = old.get(section.id);
    return own && own.dataset.digest === section.dataset.digest ? own : section;
  });
  main.replaceChildren(...wanted);
  restore(main, set);
  document.title = fresh.title;
  prepare();
  const now = document.getElementById(name);
  if (now && scrollY > 0) scrollBy(0, now.getBoundingClientRect().top - before);
}

let version = null;
async function refresh() {
  const lost = document.getElementById("lost");
  try {
    const tag = (await fetch("/", { method: "HEAD", cache: "no-store" })).headers.get("ETag");
    lost.hidden = true;
    if (version !== null && tag !== version) {
      const text = await (await fetch("/", { cache: "no-store" })).text();
      replaceChanged(new DOMParser().parseFromString(text, "text/html"));
    }
    version = tag;
  } catch { lost.hidden = false }
}
if (location.protocol === "http:" && ["127.0.0.1", "localhost"].includes(location.hostname)) {
  refresh();
  setInterval(refresh, 5000);
}
