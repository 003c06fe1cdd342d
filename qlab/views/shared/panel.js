// What every panel is made of: text, DOM, sliders, and the way to the kernel. A panel's own script follows in the same module.
const NS = "http://www.w3.org/2000/svg";

export const snap = (legal, value) =>
  legal.reduce((a, b) => (Math.abs(b - value) < Math.abs(a - value) ? b : a));
export const gb = (n) =>
  n >= 1e9
    ? `${(n / 1e9).toFixed(2)} GB`
    : n >= 1e6
      ? `${(n / 1e6).toFixed(1)} MB`
      : `${(n / 1e3).toFixed(0)} kB`;
export const num = (x) =>
  !Number.isFinite(x)
    ? "–"
    : x === 0
      ? "0"
      : x >= 0.001 && x < 1000
        ? String(+x.toPrecision(3))
        : x.toExponential(1).replace(".0", "");

// ---- small DOM helpers
function h(tag, props = {}, ...children) {
  const e = document.createElement(tag);
  for (const [k, v] of Object.entries(props))
    k in e && k !== "list" ? (e[k] = v) : e.setAttribute(k, v);
  if (/^(button|input|select|summary)$/.test(tag))
    e.setAttribute("data-lm-suppress-shortcuts", "true");
  e.append(...children);
  return e;
}
function s(tag, attrs = {}) {
  const e = document.createElementNS(NS, tag);
  for (const [k, v] of Object.entries(attrs)) e.setAttribute(k, v);
  return e;
}
/** Replaces children only if they differ and keeps the keyboard's place: a job repaints ten times a second. */
function swap(node, key, ...children) {
  const next = h("div", {}, ...children),
    now = key + next.innerHTML,
    stops = "button,input,summary";
  if (node.was === now) return;
  const at = [...node.querySelectorAll(stops)].indexOf(node.getRootNode().activeElement);
  node.was = now;
  node.replaceChildren(...next.childNodes);
  node.querySelectorAll(stops)[at]?.focus();
}
const label = (text, control) =>
  h("label", { className: "qlab-field" }, h("span", {}, text), control);

/** A slider over a few legal values, with the values written under it. */
function stepper(name, onPick) {
  const input = h("input", { type: "range", min: 0, step: 1 }),
    ticks = h("div", { className: "qlab-ticks" });
  input.setAttribute("aria-label", name);
  input.classList.add(`qlab-${name.replace(/\W/g, "-")}`);
  let legal = [];
  input.addEventListener("input", () => {
    mark();
    onPick(legal[+input.value]);
  });
  const mark = () => {
    [...ticks.children].forEach((t, i) => t.classList.toggle("on", i === +input.value));
    input.setAttribute("aria-valuetext", `${legal[+input.value]}`);
  };
  return {
    el: h("div", { className: "qlab-step" }, input, ticks),
    set(values, now) {
      if (String(values) !== String(legal)) {
        legal = values;
        input.max = values.length - 1;
        input.disabled = values.length < 2;
        ticks.replaceChildren(
          ...values.map((v) => {
            const t = h("span", {}, String(v));
            t.onclick = () => {
              if (!input.disabled) {
                input.value = legal.indexOf(v);
                mark();
                onPick(v);
              }
            };
            return t;
          }),
        );
        ticks.classList.toggle("one", values.length < 2);
      }
      if (+input.value !== legal.indexOf(now)) input.value = legal.indexOf(now);
      mark();
    },
  };
}

/** The way to the kernel: the newest slider position at most every 100 ms, the last one always, and nothing overtakes it; told when nobody answers. */
function line(controls, stale) {
  let seq = 0,
    timer = 0,
    late = 0,
    pending = null;
  const post = (intent) => {
    if (!controls) return;
    controls.set("intent", { ...intent, seq: (seq = Math.max(Date.now(), seq + 1)) });
    controls.save_changes();
    clearTimeout(late);
    late = setTimeout(() => {
      if (!document.hidden) stale(true);
    }, 4000);
  };
  const flush = () => {
    clearTimeout(timer);
    timer = 0;
    if (pending) post(pending);
    pending = null;
  };
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
    heard(ack) {
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
