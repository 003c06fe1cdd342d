// What the panels that draw a model's layers share: colours, names, tables, bytes as numbers.

/** A trait of raw bytes as a typed array. */
function numbers(model, name, Kind) {
  const v = model.get(name);
  return new Kind(v.buffer.slice(v.byteOffset, v.byteOffset + v.byteLength));
}

/** Sixteen colours, from faint to strong, as variables of the panel's style. */
function setRamp(root) {
  for (let k = 0; k < 16; k++) {
    const t = k / 15;
    const rest = `0.12 ${255 + 130 * t}`;
    const light = `oklch(${0.83 - 0.38 * t} ${rest})`;
    const dark = `oklch(${0.42 + 0.42 * t} ${rest})`;
    root.style.setProperty(`--k${k}`, `light-dark(${light}, ${dark})`);
  }
}
const ink = (share) => `var(--k${Math.round(15 * share)})`;

/** A layer's path without what all paths have in common. */
const shortPath = (path) => path.replace(/^model\.|layers\.|self_attn\./g, "");

/** Numbers of the layers of each role, in model order. */
function byRole(layers, wanted = () => true) {
  const roles = new Map();
  layers.forEach((layer, i) => {
    if (!wanted(layer)) return;
    if (!roles.has(layer.role)) roles.set(layer.role, []);
    roles.get(layer.role).push(i);
  });
  return roles;
}

/** Width of a bar where blocks are `step` pixels apart: narrow ones leave less of a gap. */
function barWidth(step) {
  const gap = step > 6 ? 2 : step > 3 ? 1 : 0.3;
  return Math.max(1, step - gap);
}

function setAll(node, attributes) {
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
}

/** Text in a picture. */
function write(svg, attributes, text) {
  const node = s("text", attributes);
  node.textContent = text;
  svg.append(node);
  return node;
}

/** A menu of `[name, title]`. */
function menu(options, onPick, attributes = {}) {
  const entries = options.map(([name, title]) => h("option", { value: name, title }, name));
  const node = h("select", attributes, ...entries);
  node.onchange = () => onPick(node.value);
  return node;
}

/** A table that is built only while it is unfolded. */
function foldedTable(node, head, rows) {
  const title = h("summary", {}, "all layers as a table");
  if (!node.open) return swap(node, "", title);
  const row = (tag, texts) => h("tr", {}, ...texts.map((text) => h(tag, {}, text)));
  const body = rows().map((texts) => row("td", texts));
  swap(node, "", title, h("table", {}, row("th", head), ...body));
}

/** The line of Python, and a button that copies it. */
function codeBlock() {
  const code = h("pre");
  const copy = h("button", { type: "button" }, "copy");
  const shown = () => {
    copy.textContent = "copied";
    setTimeout(() => (copy.textContent = "copy"), 1200);
  };
  copy.onclick = () => navigator.clipboard?.writeText(code.textContent).then(shown);
  return { code, el: h("div", { className: "qlab-code" }, code, copy) };
}

const staleNote = () =>
  h(
    "div",
    { className: "qlab-stale-note", role: "alert" },
    "Kernel not connected: run this cell again.",
  );

const statusLine = () =>
  h("div", { className: "qlab-status", role: "status", "aria-live": "polite" });

/** An empty picture of layers that takes the keyboard. */
const layerMap = () =>
  s("svg", {
    class: "qlab-map",
    role: "img",
    tabindex: 0,
    "data-lm-suppress-shortcuts": "true",
  });

/** The number next to one in a list, a step before or after, without leaving it. */
const beside = (list, at, step) => list[Math.min(list.length - 1, Math.max(0, at + step))];

/** Shows `[what, done, steps]` of a running job, or nothing. */
function showProgress(bar, cancel, progress) {
  bar.hidden = cancel.hidden = !progress;
  if (!progress) return;
  bar.max = progress[2];
  bar.value = progress[1];
}
