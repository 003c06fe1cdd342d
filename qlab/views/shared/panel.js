// What every panel is made of: text, DOM, sliders, and the connection to the kernel. A panel's own scripts follow in the same module.
const NS = "http://www.w3.org/2000/svg";

/** The legal value nearest to one. */
export const snap = (legal, value) =>
  legal.reduce((a, b) => (Math.abs(b - value) < Math.abs(a - value) ? b : a));

/** A size with its unit; GB = 1e9 bytes. */
export function gb(n) {
  if (n >= 1e9) return `${(n / 1e9).toFixed(2)} GB`;
  return n >= 1e6 ? `${(n / 1e6).toFixed(1)} MB` : `${(n / 1e3).toFixed(0)} kB`;
}

/** A number with three digits. */
export function num(x) {
  if (!Number.isFinite(x)) return "–";
  const plain = x === 0 || (x >= 0.001 && x < 1000);
  return plain ? String(+x.toPrecision(3)) : x.toExponential(1).replace(".0", "");
}

/** An HTML element; what is no property of it becomes an attribute. */
function h(tag, props = {}, ...children) {
  const e = document.createElement(tag);
  for (const [k, v] of Object.entries(props))
    if (k in e && k !== "list") e[k] = v;
    else e.setAttribute(k, v);
  // JupyterLab's shortcuts would take the keys that these need
  if (/^(button|input|select|summary)$/.test(tag))
    e.setAttribute("data-lm-suppress-shortcuts", "true");
  e.append(...children);
  return e;
}

/** An SVG element. */
function s(tag, attrs = {}) {
  const e = document.createElementNS(NS, tag);
  for (const [k, v] of Object.entries(attrs)) e.setAttribute(k, v);
  return e;
}

/** Replaces children only if they differ and keeps the keyboard's place: a job repaints ten times a second. */
function swap(node, key, ...children) {
  const next = h("div", {}, ...children);
  const now = key + next.innerHTML;
  if (node.was === now) return;
  node.was = now;
  const stops = () => [...node.querySelectorAll("button,input,summary")];
  const at = stops().indexOf(node.getRootNode().activeElement);
  node.replaceChildren(...next.childNodes);
  stops()[at]?.focus();
}

const label = (text, control) =>
  h("label", { className: "qlab-field" }, h("span", {}, text), control);

/** A slider over a few legal values, with the values written under it. */
function stepper(name, onPick) {
  const input = h("input", { type: "range", min: 0, step: 1 });
  const ticks = h("div", { className: "qlab-ticks" });
  input.setAttribute("aria-label", name);
  input.classList.add(`qlab-${name.replace(/\W/g, "-")}`);
  let legal = [];
  /** Shows where the slider stands. */
  function mark() {
    const now = +input.value;
    [...ticks.children].forEach((tick, i) => tick.classList.toggle("on", i === now));
    input.setAttribute("aria-valuetext", `${legal[now]}`);
  }
  input.oninput = () => {
    mark();
    onPick(legal[+input.value]);
  };
  function tick(value, i) {
    const onclick = () => {
      if (input.disabled) return;
      input.value = i;
      input.oninput();
    };
    return h("span", { onclick }, String(value));
  }
  function offer(values) {
    legal = values;
    const single = values.length < 2;
    input.max = values.length - 1;
    input.disabled = single;
    ticks.replaceChildren(...values.map(tick));
    ticks.classList.toggle("one", single);
  }
  return {
    el: h("div", { className: "qlab-step" }, input, ticks),
    set(values, now) {
      if (String(values) !== String(legal)) offer(values);
      const at = legal.indexOf(now);
      if (+input.value !== at) input.value = at;
      mark();
    },
  };
}

/** Sends intents to the kernel: the newest slider position at most every 100 ms, the last one always, in the order in which they were made; `stale` is called when no answer comes. */
function line(controls, stale) {
  let seq = 0; // number of the last intent that was sent
  let timer = 0;
  let late = 0;
  let pending = null; // the newest slider position, not yet sent
  function post(intent) {
    if (!controls) return;
    seq = Math.max(Date.now(), seq + 1);
    controls.set("intent", { ...intent, seq });
    controls.save_changes();
    clearTimeout(late);
    late = setTimeout(() => {
      if (!document.hidden) stale(true);
    }, 4000);
  }
  function flush() {
    clearTimeout(timer);
    timer = 0;
    if (pending) post(pending);
    pending = null;
  }
  return {
    send(intent) {
      flush();
      post(intent);
    },
    slide(intent) {
      pending = intent;
      timer ||= setTimeout(flush, 100);
    },
    /** Whether a state that answers intents up to `ack` is newer than what the user did. */
    isAnswered(ack) {
      const all = (ack ?? 0) >= seq;
      if (all) {
        clearTimeout(late);
        stale(false);
      }
      return all && !pending;
    },
    stop() {
      clearTimeout(timer);
      clearTimeout(late);
    },
  };
}
