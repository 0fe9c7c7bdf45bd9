// What is under the pointer, told beside it. The page is whole without this.
"use strict";
for (const svg of document.querySelectorAll("svg[data-chart]")) {
  const chart = JSON.parse(svg.dataset.chart), box = svg.parentElement;
  const [x0, x1, left, right] = chart.x, [y0, y1, bottom, top, log] = chart.y;
  const place = (x) => left + (x - x0) / (x1 - x0 || 1) * (right - left);
  const height = (y) => {
    const f = log ? Math.log10 : (v) => v;
    return bottom + (f(y) - f(y0)) / (f(y1) - f(y0) || 1) * (top - bottom);
  };
  const nearest = (xs, x) => {
    let low = 0, high = xs.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (xs[middle] < x) low = middle; else high = middle;
    }
    return Math.abs(xs[low] - x) <= Math.abs(xs[high] - x) ? low : high;
  };
  const add = (parent, name, text, kind) => {
    const node = parent.appendChild(document.createElement(name));
    if (text) node.textContent = text;
    if (kind) node.className = kind;
    return node;
  };
  let mark = null, tip = null;
  const clear = () => {
    if (mark) mark.remove();
    if (tip) tip.remove();
    mark = tip = null;
  };
  const show = (event) => {
    clear();
    const frame = svg.getBoundingClientRect(), unit = chart.width / frame.width;
    const at = (event.clientX - frame.left) * unit;
    if (at < left - 4 || at > right + 4) return;
    const x = x0 + (at - left) / (right - left) * (x1 - x0);
    const found = chart.lines.map((line) => ({ line, i: nearest(line.x, x) }));
    const first = found.reduce((a, b) =>
      Math.abs(a.line.x[a.i] - x) <= Math.abs(b.line.x[b.i] - x) ? a : b);
    const snapped = first.line.x[first.i], space = "http://www.w3.org/2000/svg";
    mark = svg.appendChild(document.createElementNS(space, "g"));
    const cursor = mark.appendChild(document.createElementNS(space, "path"));
    cursor.setAttribute("class", "cursor");
    cursor.setAttribute("d", `M${place(snapped)} ${top}V${bottom}`);
    tip = add(box, "div", "", "tip");
    add(tip, "div", `${chart.xLabel} ${snapped.toLocaleString("en")}`);
    for (const { line, i } of found) {
      const row = add(tip, "div");
      add(row, "i", "", line.color);
      row.append(found.length > 1 ? `${line.label} ${line.y[i]}` : `${line.y[i]}`);
      if (chart.stacked) continue;
      const dot = mark.appendChild(document.createElementNS(space, "circle"));
      dot.setAttribute("class", `dot ${line.color}`);
      dot.setAttribute("r", 3.2);
      dot.setAttribute("cx", place(line.x[i]));
      dot.setAttribute("cy", height(line.y[i]));
    }
    const around = box.getBoundingClientRect(), from = frame.left - around.left + place(snapped) / unit;
    const leftOf = from + tip.offsetWidth + 16 > around.width;
    tip.style.left = `${Math.max(2, leftOf ? from - tip.offsetWidth - 10 : from + 10)}px`;
    tip.style.top = `${frame.top - around.top + 8}px`;
  };
  svg.addEventListener("pointermove", show);
  svg.addEventListener("pointerdown", show);
  svg.addEventListener("pointerleave", clear);
}
