const errors = [];
addEventListener("error", e => errors.push(e.message));
addEventListener("unhandledrejection", e => errors.push(String(e.reason)));
console.error = (...a) => errors.push(a.join(" "));

const all = what => [...document.querySelectorAll(what)];
const wait = milliseconds => new Promise(done => setTimeout(done, milliseconds));

function isCut(text) {
  const word = text.getBoundingClientRect(), chart = text.ownerSVGElement.getBoundingClientRect();
  return word.width > 0 && (word.left < chart.left - 1 || word.right > chart.right + 1);
}

// ------------------------------------------------------------------- colours
const paint = document.createElement("canvas").getContext("2d", { willReadFrequently: true });

function luminance(colour) {  // WCAG 2.2, of any CSS colour on the page's background
  paint.fillStyle = getComputedStyle(document.body).backgroundColor;
  paint.fillRect(0, 0, 1, 1);
  paint.fillStyle = colour;
  paint.fillRect(0, 0, 1, 1);
  const [r, g, b] = [...paint.getImageData(0, 0, 1, 1).data].map(v => {
    v /= 255;
    return v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  });
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}

function contrast(element) {
  let behind = element;
  while (behind && getComputedStyle(behind).backgroundColor === "rgba(0, 0, 0, 0)") {
    behind = behind.parentElement;
  }
  const pair = [luminance(getComputedStyle(element).color),
    luminance(getComputedStyle(behind ?? document.body).backgroundColor)];
  return (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
}

// ------------------------------------------------------------------- what a user does
function hover() {
  const chart = document.querySelector(".chart"), svg = chart.querySelector("svg");
  const box = svg.getBoundingClientRect();
  const at = { clientX: box.left + box.width / 2, clientY: box.top + 50, bubbles: true };
  svg.dispatchEvent(new PointerEvent("pointermove", at));
  const first = chart.querySelector(".value").textContent.trim();
  chart.focus();
  const key = { key: "ArrowRight", bubbles: true, cancelable: true };
  document.dispatchEvent(new KeyboardEvent("keydown", key));
  return [first, chart.querySelector(".value").textContent.trim()];
}

function slide() {
  const slider = document.querySelector(".phase input[type=range]");
  if (!slider) return false;
  const shown = () => all(".phase:not([hidden]) [data-stop]:not([hidden])").map(v => v.dataset.stop);
  const before = new Set(shown());
  slider.value = 0;
  slider.dispatchEvent(new Event("input", { bubbles: true }));
  const after = new Set(shown());
  return before.has(slider.defaultValue) && after.size === 1 && after.has("0");
}

const plays = v => !v.paused && v.videoWidth > 0 && v.readyState > 1;

async function until(true_, milliseconds) {  // a loaded machine takes its time
  for (const end = performance.now() + milliseconds; !true_() && performance.now() < end;) {
    await wait(100);
  }
}

async function probe() {
  // Those on the first screen: others rest until they are scrolled to.
  const videos = all("video").filter(v => {
    const box = v.getBoundingClientRect();
    return box.width && box.top < innerHeight && box.left < innerWidth;
  });
  const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
  await until(() => !still && videos.every(plays), still ? 3000 : 20000);
  await wait(1500);
  const ahead = videos.map(v => Math.abs(v.currentTime - videos[0].currentTime));
  const tiles = document.getElementById("tiles").getBoundingClientRect();
  const facts = {
    videos: videos.length,
    playing: videos.filter(plays).length,
    spread: Math.max(0, ...ahead.map((t, i) => Math.min(t, videos[i].duration - t))),
    tiles: all(".tile").length,
    firstScreen: Math.round(tiles.bottom + scrollY),
    charts: all("svg polyline").length,
    cut: all("svg text").filter(isCut).map(t => t.textContent),
    contrast: Math.min(...all("p, figcaption, td, th, dd, dt, pre, summary, button, li, a")
      .filter(e => e.offsetParent && e.textContent.trim()).map(contrast)),
    background: luminance(getComputedStyle(document.body).backgroundColor),
    scroll: document.documentElement.scrollWidth,
    client: document.documentElement.clientWidth,
    slider: slide(),
  };
  [facts.hover, facts.keyboard] = hover();
  document.querySelector(".copy").click();
  await wait(200);
  facts.copied = document.querySelector(".copy").textContent;
  const lead = () => document.querySelector(".lead").textContent;
  if (LIVE) await until(() => lead().startsWith("NEW"), 30000);
  facts.lead = lead();
  facts.kept = document.querySelector(".phase input[type=range]")?.value === "0";
  document.documentElement.setAttribute("data-facts", JSON.stringify({ ...facts, errors }));
  fetch("/done");
}
addEventListener("load", probe);
