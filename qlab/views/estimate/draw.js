// How an estimate is drawn: functions that turn values into nodes. None of them keeps a state.

// a class for the eye, and a word with a mark that does not need colour
const WORDS = {
  fits: ["yes", "✓ fits"],
  tight: ["tight", "▲ tight"],
  "does not fit": ["no", "✕ does not fit"],
};
// settings whose largest value is offered, and what they are called
const SOLVED = [
  ["max_seq_length", "max_seq_length"],
  ["batch_size", "batch_size"],
  ["rank", "rank"],
  ["num_layers", "adapted blocks"],
];

// A slider over a few stops, with a field for any other whole number.
function dial(name, onPick) {
  const input = h("input", { type: "range", min: 0, step: 1 });
  const field = h("input", { type: "number", step: 1 });
  input.setAttribute("aria-label", name);
  field.setAttribute("aria-label", `${name}, as a number`);
  input.classList.add(`qlab-${name.replace(/\W/g, "-")}`);
  let stops = [];
  input.oninput = () => {
    field.value = stops[+input.value];
    onPick(stops[+input.value]);
  };
  field.onchange = () => {
    const whole = Math.round(+field.value) || 0;
    const legal = Math.min(+field.max, Math.max(+field.min, whole));
    field.value = legal;
    onPick(legal);
  };
  return {
    el: h("div", { className: "qlab-dial" }, input, field),
    set(list, now, min, max) {
      stops = list;
      input.max = list.length - 1;
      field.min = min;
      field.max = max;
      input.disabled = list.length < 2;
      const i = list.findIndex((v) => v >= now);
      if (+input.value !== i) input.value = i < 0 ? list.length - 1 : i;
      input.setAttribute("aria-valuetext", now);
      const typing = field.getRootNode().activeElement === field;
      if (!typing && field.value !== String(now)) field.value = now;
    },
  };
}

// Replaces the options of a menu if they differ: value, text and tooltip of each.
function fill(select, list) {
  const now = JSON.stringify(list);
  if (select.was === now) return;
  select.was = now;
  const options = list.map(([value, text, tip]) => h("option", { value, title: tip || "" }, text));
  select.replaceChildren(...options);
}

// Whether a part's bytes are exact or measured, and not estimated.
const isSolid = (data, e, i) => e.level === "measured" || data.parts[i][2];
const partClass = (data, e, i) => `qlab-part p${i}${isSolid(data, e, i) ? "" : " about"}`;

// The headline. known: whether the estimate is that of the present choice, or still the last one.
function headline(data, e, budget, { known, tracing }) {
  const { total, low, high } = ends(data, e);
  const [style, word] = WORDS[verdict(data, e, budget).word];
  const count =
    data.params >= 1e9
      ? `${(data.params / 1e9).toFixed(2)} B`
      : `${(data.params / 1e6).toFixed(1)} M`;
  const level = h(
    "span",
    { className: `qlab-level ${e.level}` },
    tracing ? `${e.level}, tracing…` : e.level,
  );
  const range =
    e.level === "measured"
      ? "peak of a real step"
      : `${sizeText(low)} … ${sizeText(high)}, peak in ${e.moment}`;
  return [
    h("strong", {}, data.name),
    h("span", {}, `${count} weights`),
    h("span", { className: "qlab-size" }, h("b", {}, sizeText(total)), " ", level),
    h("span", {}, range),
    h("span", { className: `qlab-fits ${style}` }, known ? word : "…", ` · ${budget[0]}`),
  ];
}

// The bar in words, for who cannot see it.
function barText(data, e, free) {
  const parts = data.parts.map(([name], i) => `${name} ${sizeText(e.parts[i])}`);
  return `${sizeText(ends(data, e).total)} of ${sizeText(free)}: ${parts.join(", ")}`;
}

// The parts side by side, the band's whisker and the limit. top: right end of the axis in bytes.
function barNodes(data, e, free, top) {
  const { low, high } = ends(data, e);
  const percent = (n) => `${(100 * n) / top}%`;
  const nodes = data.parts.map(([name, text], i) => {
    const start = sum(e.parts.slice(0, i));
    const title = `${name}: ${sizeText(e.parts[i])}, ${text}`;
    const style = `left:${percent(start)};width:${percent(e.parts[i])}`;
    const fitsName = e.parts[i] > 0.11 * top;
    const inner = fitsName ? h("span", {}, name.replace("_", " ")) : "";
    return h("i", { className: partClass(data, e, i), title, style }, inner);
  });
  if (high > low) {
    const title = `between ${sizeText(low)} and ${sizeText(high)}`;
    const style = `left:${percent(low)};width:${percent(Math.min(high, top) - low)}`;
    nodes.push(h("i", { className: "qlab-whisker", title, style }));
  }
  if (free <= top) nodes.push(h("i", { className: "qlab-limit", style: `left:${percent(free)}` }));
  return nodes;
}

// The axis under the bar, with the limit's label.
function axisNodes(free, top, step) {
  const percent = (n) => `${(100 * n) / top}%`;
  const inGb = step >= 1e9 || top >= 1e10;
  const text = (n) => (inGb ? `${+(n / 1e9).toFixed(1)} GB` : `${Math.round(n / 1e6)} MB`);
  const marks = Array.from({ length: Math.floor(top / step) + 1 }, (_, k) => k * step);
  const nodes = marks.map((n) => h("span", { style: `left:${percent(n)}` }, text(n)));
  const limit = `limit ${sizeText(free)}`;
  if (free > top) return [...nodes, h("b", { style: "right:0" }, `${limit} →`)];
  // a label near the right end stands on the left of its mark
  const left = free > 0.6 * top;
  const style = left ? `right:calc(100% - ${percent(free)})` : `left:${percent(free)}`;
  return [...nodes, h("b", { className: left ? "left" : "", style }, limit)];
}

function legendNodes(data, e) {
  const parts = data.parts.map(([name, about], i) =>
    h(
      "span",
      { title: about, className: e.parts[i] ? "" : "none" },
      h("i", { className: partClass(data, e, i) }),
      `${name.replace("_", " ")} `,
      h("b", {}, sizeText(e.parts[i])),
    ),
  );
  const measured = e.level === "measured";
  const key = measured ? "solid: exact or measured" : "solid: exact · hatched: estimated";
  return [...parts, h("em", {}, key)];
}

// The verdict in words.
const verdictNode = ({ word, reason }) => h("p", {}, h("b", {}, `${WORDS[word][1]}: `), reason);

// Single changes that would make it fit; onPick gets the choice of one.
function changeNodes(list, onPick) {
  const none = "no single change makes it fit: combine some, or take a smaller model";
  const title = list.length ? "what would make it fit, cheapest first" : none;
  const items = list.map((x) => {
    const props = { type: "button", className: "qlab-change", onclick: () => onPick(x.choice) };
    const button = h("button", props, `${x.name} ${x.now} → ${x.then}`);
    const cost = `cost to quality: ${x.quality} · ${x.remark}`;
    return h("li", {}, button, ` ${sizeText(x.total)} · ${cost}`);
  });
  return [h("h4", {}, title), h("ol", {}, ...items)];
}

// The largest value of each setting that fits, all else as it is; onPick gets the setting.
function largestNodes(data, c, free, onPick) {
  const largest = SOLVED.map(([key, text]) => [key, text, most(data, c, key, free)]);
  const known = largest.filter(([, , n]) => n);
  if (!known.length) return [];
  const buttons = known.map(([key, text, n]) => {
    const onclick = () => onPick({ [key]: n });
    const number = n.toLocaleString("en").replace(/,/g, " ");
    return h("button", { type: "button", disabled: n === c[key], onclick }, `${text} ${number}`);
  });
  const title = h("span", {}, "largest that fits, all else as it is: ");
  return [h("div", { className: "qlab-most" }, title, ...buttons)];
}
