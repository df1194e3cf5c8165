"use strict";
// Values under the pointer.
const tip = document.getElementById("tip");

function show(value) {
  return Math.abs(value) >= 10000 ? Math.round(value).toLocaleString("en") : String(Number(value.toPrecision(4)));
}

function nearest(xs, x) {
  let low = 0, high = xs.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (xs[middle] < x) low = middle; else high = middle;
  }
  return Math.abs(xs[low] - x) <= Math.abs(xs[high] - x) ? low : high;
}

for (const chart of document.querySelectorAll("svg.chart")) {
  const data = JSON.parse(chart.dataset.chart);
  const cursor = chart.querySelector(".cursor");
  const [low, high, start, end] = data.xAxis;
  chart.addEventListener("pointermove", (event) => {
    const box = chart.getBoundingClientRect();
    const at = (event.clientX - box.left) / box.width * chart.viewBox.baseVal.width;
    const x = low + (at - start) / (end - start) * (high - low);
    const first = data.curves[0];
    const lead = first.x[nearest(first.x, x)];
    const place = start + (lead - low) / (high - low) * (end - start);
    cursor.setAttribute("x1", place);
    cursor.setAttribute("x2", place);
    cursor.removeAttribute("hidden");
    const lines = [`${data.name} ${show(lead)}`];
    for (const curve of data.curves) {
      const index = nearest(curve.x, x);
      lines.push(`${curve.label} ${show(curve.y[index])} ${curve.note ? curve.note[index] : ""}`.trim());
    }
    tip.textContent = lines.join("\n");
    tip.hidden = false;
    const right = event.clientX + 16 + tip.offsetWidth > document.documentElement.clientWidth;
    tip.style.left = `${Math.max(4, right ? event.clientX - 16 - tip.offsetWidth : event.clientX + 16)}px`;
    tip.style.top = `${Math.max(4, event.clientY - tip.offsetHeight - 10)}px`;
  });
  chart.addEventListener("pointerleave", () => {
    cursor.setAttribute("hidden", "");
    tip.hidden = true;
  });
}

// A click enlarges a picture.
const large = document.getElementById("large");
for (const image of document.querySelectorAll("main img")) {
  image.addEventListener("click", () => {
    const picture = large.querySelector("img");
    picture.src = image.src;
    picture.alt = image.alt;
    picture.className = image.className === "exact" ? "exact" : "";
    large.querySelector("p").textContent = image.alt;
    large.showModal();
  });
}
large.addEventListener("click", () => large.close());

// The section that is being read.
const links = new Map([...document.querySelectorAll("nav a")].map((link) => [link.hash.slice(1), link]));
const seen = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    if (!entry.isIntersecting) continue;
    for (const link of links.values()) link.classList.remove("here");
    links.get(entry.target.id).classList.add("here");
  }
}, { rootMargin: "-15% 0px -75% 0px" });
for (const section of document.querySelectorAll("main section")) seen.observe(section);
