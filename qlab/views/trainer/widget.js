// The trainer panel. The whole run is in the browser: pointing at a step never waits for the kernel.
const WIDTH = 10,
  [STEP, LOSS, SMOOTH, VAL, RATE, NORM, SPEED, ACTIVE, PEAK, EPOCH] = Array(WIDTH).keys();
const WORDS = {
  checkpoint: ["▪", "saved"],
  best: ["★", "best"],
  learning_rate: ["↯", "rate"],
  skipped: ["✕", "skipped"],
  early_stop: ["■", "early stop"],
  guard: ["▲", "memory guard"],
  resumed: ["↻", "resumed"],
};
const REST = ["training loss", "best validation", "tokens", "peak memory", "folder"]; // of the summary: what the headline does not say
const LOUD = ["guard", "skipped", "early_stop", "resumed", "learning_rate", "best", "checkpoint"];

// ---- pure functions
export const lossText = (x) => (Number.isFinite(x) ? x.toFixed(Math.abs(x) < 1 ? 3 : 2) : "–");
export const whole = (x) =>
  Number.isFinite(x)
    ? Math.round(x)
        .toString()
        .replace(/\B(?=(\d{3})+$)/g, "\u202f")
    : "–";
export const rateText = (x) =>
  !(x > 0)
    ? "–"
    : x >= 0.01
      ? String(+x.toPrecision(3))
      : x.toExponential(2).replace(/\.?0+e/, "e");
/** A learning rate as typed, or NaN. */
export const parseRate = (text) => {
  const x = /\d/.test(text) ? Number(text.trim().replace(",", ".")) : NaN;
  return x > 0 && x < Infinity ? x : NaN;
};
/** About `count` round numbers between two values. */
export function ticks(lo, hi, count = 4) {
  if (!(hi > lo)) return [lo];
  const rough = (hi - lo) / count,
    power = 10 ** Math.floor(Math.log10(rough)),
    step = power * [1, 2, 5, 10].find((m) => power * m >= rough * (1 - 1e-9)),
    found = [];
  for (let k = Math.ceil(lo / step - 1e-9); k <= hi / step + 1e-9; k++)
    found.push(+(k * step).toPrecision(12));
  return found;
}
export const column = (rows, c) => {
  const out = [];
  for (let i = c; i < rows.length; i += WIDTH) if (Number.isFinite(rows[i])) out.push(rows[i]);
  return out;
};
/** Limits of the loss axis: single spikes of single steps may leave it, the smoothed curve and validations may not. */
export function lossRange(rows) {
  const at = (a, q) => a[Math.round(q * (a.length - 1))],
    loss = column(rows, LOSS).sort((a, b) => a - b),
    sure = [...column(rows, SMOOTH), ...column(rows, VAL)];
  if (!loss.length && !sure.length) return [0, 1];
  const lo = Math.min(...sure, at(loss, 0.01) ?? Infinity),
    hi = Math.max(...sure, at(loss, 0.98) ?? -Infinity),
    room = (hi - lo) * 0.06 || Math.abs(hi) * 0.05 || 0.01;
  return [Math.max(0, lo - room), hi + room];
}
/** Limits of a log axis, at least a factor of two apart; null without a positive value. */
export function logRange(values) {
  let lo = Infinity,
    hi = 0;
  for (const v of values)
    if (v > 0) {
      lo = Math.min(lo, v);
      hi = Math.max(hi, v);
    }
  if (!hi) return null;
  const room = Math.max(0.04 * Math.log(hi / lo), (Math.log(2) - Math.log(hi / lo)) / 2);
  return [lo * Math.exp(-room), hi * Math.exp(room)];
}
/** Row whose step is nearest. */
export function nearest(rows, step) {
  let a = 0,
    b = rows.length / WIDTH - 1;
  while (b - a > 1) {
    const m = (a + b) >> 1;
    if (rows[m * WIDTH + STEP] < step) a = m;
    else b = m;
  }
  return b >= 0 && Math.abs(rows[b * WIDTH + STEP] - step) < Math.abs(rows[a * WIDTH + STEP] - step)
    ? b
    : Math.max(a, 0);
}
/** Path of one column; breaks where nothing is, unless bridged. */
export function trace(rows, c, x, y, bridged = false) {
  let d = "",
    pen = "M";
  for (let i = 0; i < rows.length; i += WIDTH) {
    const v = rows[i + c];
    if (Number.isFinite(v)) {
      d += `${pen}${Math.round(x(rows[i]) * 10) / 10} ${Math.round(y(v) * 10) / 10}`;
      pen = "L";
    } else if (!bridged) pen = "M";
  }
  return d;
}
/** Which marks get their word, only their sign, or only a tick: the loud ones first, none over another. */
export function placed(marks, x, lo = -Infinity, hi = Infinity) {
  const taken = [],
    free = (a, b) => taken.every(([c, d]) => b < c || a > d),
    out = [],
    seen = {};
  for (const m of marks) if (m[1] === "best") seen.best = m;
  const order = marks
    .filter((m) => m[1] !== "best" || m === seen.best)
    .sort((a, b) => LOUD.indexOf(a[1]) - LOUD.indexOf(b[1]) || b[0] - a[0]);
  for (const m of order.slice(0, 400)) {
    const [sign, word] = WORDS[m[1]] ?? ["•", m[1]],
      px = x(m[0]),
      text = `${sign} ${word}`,
      wide = 3.2 * text.length + 4;
    const mid = Math.min(hi - wide, Math.max(lo + wide, px)),
      full = !seen[`word ${word}`] && free(mid - wide, mid + wide),
      at = full ? mid : px,
      half = full ? wide : 6;
    if (full || free(px - 6, px + 6)) {
      taken.push([at - half, at + half]);
      out.push([at, full ? text : sign, m]);
      if (full) seen[`word ${word}`] = true;
    }
  }
  return out;
}
export function read(model) {
  const parts = ["curve", "newest"].map((name) => {
    const v = model.get(name);
    return new Float32Array(v.buffer.slice(v.byteOffset, v.byteOffset + v.byteLength));
  });
  const rows = new Float32Array(parts[0].length + parts[1].length);
  rows.set(parts[0]);
  rows.set(parts[1], parts[0].length);
  return rows;
}

// ---- the panel
const LEFT = 92,
  RIGHT = 126,
  LANES = {
    loss: [4, 136],
    marks: [142, 16],
    rate: [164, 24],
    norm: [193, 24],
    speed: [222, 24],
    memory: [252, 48],
  },
  TALL = 318;

async function render({ model, el, host }) {
  let rows = read(model),
    st = model.get("state"),
    cursor = null,
    raf = 0,
    asked = null,
    wanted = null,
    told = 0,
    telling = 0,
    came = 0,
    sent = 0,
    W = 0,
    hold = false;
  const controls =
    host && model.get("controls") ? await host.getModel(model.get("controls")) : null;
  const stale = h("div", { className: "qlab-stale-note", role: "alert" });
  const {
    send: pass,
    heard: answered,
    stop,
  } = line(controls, (on) => {
    stale.textContent =
      came > sent
        ? "The kernel is busy with a cell: it answers when the cell lets it."
        : "Kernel not connected: run this cell again.";
    root.classList.toggle("qlab-stale", on);
  });
  const send = (intent) => {
    sent = performance.now();
    pass(intent);
  };

  // skeleton
  const title = h("div", { className: "qlab-title" }),
    bar = h("i"),
    button = (text, f) => h("button", { type: "button", onclick: f }, text);
  const go = button("start", () => ask(go.op)),
    halt = button("■ stop", () => ask("stop"));
  const ask = (op) => {
    asked = { op, was: st.status };
    send({ op });
    later();
  };
  const rate = h("input", {
      type: "text",
      inputMode: "decimal",
      size: 9,
      className: "qlab-rate",
      title: "Takes effect with the next step. Enter applies, Escape takes back.",
    }),
    pending = h("span", { className: "qlab-pending" });
  rate.setAttribute("aria-label", "learning rate");
  const setRate = () => {
    const value = parseRate(rate.value);
    if (rate.value === rateText(wanted ?? st.rate)) {
      pending.textContent = "";
      return;
    }
    rate.setAttribute("aria-invalid", Number.isNaN(value));
    if (Number.isNaN(value)) {
      pending.textContent = "✕ must be a number above 0, such as 2e-4";
      return;
    }
    if (value === (wanted ?? st.rate)) {
      rate.value = rateText(value);
      return;
    }
    wanted = value;
    pending.textContent = "… sent";
    send({ op: "learning_rate", value });
    later();
  };
  rate.addEventListener("change", setRate);
  rate.addEventListener("keydown", (ev) => {
    if (ev.key === "Enter") setRate();
    if (ev.key === "Escape") {
      rate.value = rateText(st.rate);
      rate.removeAttribute("aria-invalid");
      pending.textContent = "";
    }
  });
  const prompt = h("input", { type: "text", className: "qlab-prompt", placeholder: "a prompt" }),
    say = button("generate", () => speak());
  prompt.setAttribute("aria-label", "prompt");
  const speak = () => {
    if (prompt.value.trim() && !say.disabled) {
      asked = { op: "generate", was: st.answers };
      send({ op: "generate", prompt: prompt.value });
      later();
    }
  };
  prompt.addEventListener("keydown", (ev) => {
    if (ev.key === "Enter") speak();
  });
  const keys = h("div", { className: "qlab-run-keys" }, go, halt),
    field = h("label", { className: "qlab-inline" }, "learning rate ", rate),
    speech = h("span", { className: "qlab-inline qlab-speech" }, prompt, say);
  const row = h("div", { className: "qlab-run-row" }, keys, field, pending, speech),
    report = h("div", { className: "qlab-summary" });
  const svg = s("svg", {
      class: "qlab-plot",
      role: "img",
      tabindex: 0,
      height: TALL,
      "data-lm-suppress-shortcuts": "true",
    }),
    readout = h("div", { className: "qlab-readout" });
  const which = h("select", { className: "qlab-which" }),
    voices = h("div", { className: "qlab-generations" });
  which.setAttribute("aria-label", "prompt whose answers are shown");
  which.onchange = () => {
    hold = true;
    later();
  };
  const data = h("div", { className: "qlab-note" }),
    error = h("div", { className: "qlab-status error", role: "alert" }),
    quiet = h("div", { className: "qlab-quiet", role: "status", "aria-live": "polite" });
  const code = h("pre"),
    copy = button("copy", () =>
      navigator.clipboard?.writeText(code.textContent).then(() => {
        copy.textContent = "copied";
        setTimeout(() => (copy.textContent = "copy"), 1200);
      }),
    );
  const root = h(
    "div",
    { className: "qlab qlab-run" },
    title,
    h("div", { className: "qlab-far" }, bar),
    stale,
    row,
    error,
    report,
    h("div", { className: "qlab-stage" }, svg),
    readout,
    h("div", { className: "qlab-talk" }, which, voices),
    data,
    h("div", { className: "qlab-code" }, code, copy),
    quiet,
  );
  el.replaceChildren(root);
  if (!controls) row.hidden = true;

  // the picture: one time line, a lane for each measure
  const put = (tag, cls, at = {}) => {
    const e = s(tag, { class: cls, ...at });
    svg.append(e);
    return e;
  };
  const write = (x, y, cls, text = "", anchor = "start") => {
    const e = put("text", cls, { x, y, "text-anchor": anchor });
    e.textContent = text;
    return e;
  };
  const grid = put("path", "qlab-grid"),
    axis = put("g", "qlab-mute"),
    dots = put("path", "qlab-dots"),
    limit = put("path", "qlab-limit"),
    foreseen = put("path", "qlab-foreseen");
  const lines = {
    smooth: put("path", "qlab-line thick"),
    val: put("path", "qlab-line val"),
    rate: put("path", "qlab-line"),
    norm: put("path", "qlab-line"),
    speed: put("path", "qlab-line"),
    active: put("path", "qlab-line thin"),
    peak: put("path", "qlab-line"),
  };
  const diamonds = put("path", "qlab-diamonds"),
    star = put("path", "qlab-star"),
    flags = put("g", "qlab-flags"),
    hair = put("path", "qlab-hair"),
    spots = put("path", "qlab-spots"),
    hint = write(0, 84, "qlab-mute", "", "middle");
  for (const [name, text] of Object.entries({
    loss: "loss",
    rate: "learning rate",
    norm: "gradient norm",
    speed: "tokens/s",
    memory: "memory",
  }))
    write(
      LEFT - 8,
      LANES[name][0] + (name === "loss" ? 8 : name === "memory" ? 28 : 16),
      "qlab-mute",
      text,
      "end",
    );
  const says = {},
    texts = [
      ["step", 12],
      ["epoch", 27],
      ["loss", 46],
      ["smooth", 61],
      ["val", 80],
      ["best", 99],
      ["rate", 180],
      ["norm", 209],
      ["speed", 238],
      ["active", 262],
      ["peak", 275],
      ["foreseen", 288],
      ["limit", 301],
    ];
  for (const [name, y] of texts) says[name] = write(0, y, `qlab-say ${name}`);
  const tell = (name, text) => {
    if (says[name].was !== text) says[name].textContent = says[name].was = text;
  };
  const draw = (e, d) => {
    if (e.was !== d) e.setAttribute("d", (e.was = d));
  };
  let x = (v) => v,
    span = [0, 1],
    drawn = null;

  function layout() {
    const wide = Math.max(360, svg.parentNode.clientWidth || 700);
    if (wide === W) return;
    W = wide;
    svg.setAttribute("width", W);
    drawn = null;
    for (const [name] of texts) says[name].setAttribute("x", W - RIGHT + 8);
    hint.setAttribute("x", (LEFT + W - RIGHT) / 2);
  }
  const lane = (name, lo, hi, log) => {
    const [top, tall] = LANES[name],
      f = log ? Math.log : (v) => v,
      k = tall / (f(hi) - f(lo) || 1);
    return (v) => Math.min(top + tall, Math.max(top, top + (f(hi) - f(v)) * k));
  };
  const last = () => rows.length / WIDTH - 1,
    cell = (i, c) => rows[i * WIDTH + c];

  function paintPlot() {
    const key = [
      rows.length,
      rows[rows.length - WIDTH],
      rows.tag,
      W,
      st.iters,
      st.ended,
      st.predicted,
      st.limit,
      st.best,
    ].join();
    if (key === drawn) return;
    drawn = key;
    const n = last(),
      first = n < 0 ? 0 : rows[0],
      from = first <= 1 ? 0 : first,
      to = Math.max(
        from + 1,
        st.ended && n >= 0 ? cell(n, STEP) : st.iters,
        n < 0 ? 0 : cell(n, STEP),
      ),
      end = W - RIGHT;
    span = [from, to];
    x = (v) => LEFT + ((v - from) / (to - from)) * (end - LEFT);
    const [lo, hi] = lossRange(rows),
      y = { loss: lane("loss", lo, hi) },
      marks = ticks(lo, hi, 5),
      steps = ticks(from, to, Math.max(2, Math.round((end - LEFT) / 90)));
    for (const [name, c] of [
      ["rate", RATE],
      ["norm", NORM],
    ]) {
      const r = logRange(column(rows, c)) ?? [0.1, 1];
      y[name] = lane(name, ...r, true);
    }
    const top = Math.max(1, ...column(rows, SPEED)) * 1.08;
    y.speed = lane("speed", 0, top);
    const most =
        Math.max(1, n < 0 ? 0 : cell(n, PEAK), ...column(rows, ACTIVE), st.predicted) * 1.12,
      roof = st.limit && st.limit < 2 * most ? Math.max(most, st.limit * 1.06) : most;
    y.memory = lane("memory", 0, roof);
    rows.y = y;
    draw(
      grid,
      (n < 0 ? [] : marks).map((v) => `M${LEFT} ${y.loss(v).toFixed(1)}H${end}`).join("") +
        ["rate", "norm", "speed", "memory"]
          .map((name) => `M${LEFT} ${LANES[name][0] + LANES[name][1] + 0.5}H${end}`)
          .join(""),
    );
    const label = (px, py, text, anchor) => {
      const e = s("text", { x: px, y: py, "text-anchor": anchor });
      e.textContent = text;
      return e;
    };
    axis.replaceChildren(
      ...(n < 0
        ? []
        : marks
            .filter((v) => y.loss(v) > 22)
            .map((v) => label(LEFT - 8, y.loss(v) + 4, String(v), "end"))),
      ...steps.map((v) => label(x(v), TALL - 4, whole(v), "middle")),
      label(LEFT - 26, TALL - 4, "step", "end"),
    );
    let d = "",
      gems = "";
    for (let i = 0; i <= n; i++) {
      const px = Math.round(x(cell(i, STEP)) * 10) / 10,
        v = cell(i, VAL);
      if (Number.isFinite(cell(i, LOSS)))
        d += `M${px} ${Math.round(y.loss(cell(i, LOSS)) * 10) / 10}h0`;
      if (Number.isFinite(v))
        gems += `M${px} ${(y.loss(v) - 3.5).toFixed(1)}l3.5 3.5-3.5 3.5-3.5-3.5z`;
    }
    draw(dots, d);
    dots.style.strokeOpacity = n > 600 ? 0.22 : 0.4;
    draw(diamonds, gems.length > 12000 ? "" : gems);
    draw(lines.smooth, trace(rows, SMOOTH, x, y.loss));
    draw(lines.val, trace(rows, VAL, x, y.loss, true));
    draw(
      lines.rate,
      trace(rows, RATE, x, (v) => y.rate(v || 1e-30)),
    );
    draw(
      lines.norm,
      trace(rows, NORM, x, (v) => y.norm(v || 1e-30)),
    );
    draw(lines.speed, trace(rows, SPEED, x, y.speed));
    draw(lines.active, trace(rows, ACTIVE, x, y.memory));
    draw(lines.peak, trace(rows, PEAK, x, y.memory));
    draw(foreseen, st.predicted ? `M${LEFT} ${y.memory(st.predicted).toFixed(1)}H${end}` : "");
    draw(
      limit,
      st.limit && st.limit <= roof ? `M${LEFT} ${y.memory(st.limit).toFixed(1)}H${end}` : "",
    );
    draw(
      star,
      st.best
        ? `M${x(st.best[0]).toFixed(1)} ${(y.loss(st.best[1]) - 7).toFixed(1)}l7 7-7 7-7-7z`
        : "",
    );
    hint.textContent =
      n >= 0
        ? ""
        : st.status === "idle"
          ? "Press start: loss, rate, gradient, speed and memory appear here."
          : st.error
            ? ""
            : "No step yet …";
    paintFlags();
  }
  function paintFlags() {
    const marks = model.get("marks"),
      [top, tall] = LANES.marks;
    const ticked = marks.map((m) => `M${x(m[0]).toFixed(1)} ${top - 4}v4`).join("");
    flags.replaceChildren(
      s("path", { d: ticked }),
      ...placed(marks, x, LEFT - 8, W - RIGHT + 6).map(([px, text, m]) => {
        const e = s("text", {
            x: px,
            y: top + tall - 4,
            class: /guard|skipped/.test(m[1]) ? "bad" : "",
            "text-anchor": "middle",
          }),
          tip = s("title");
        tip.textContent = `step ${m[0]}: ${m[2]}`;
        e.textContent = text;
        e.append(tip);
        return e;
      }),
    );
  }
  function paintCursor() {
    const n = last(),
      i = n < 0 ? -1 : cursor === null ? n : nearest(rows, cursor),
      live = cursor === null,
      at = i < 0 ? 0 : cell(i, STEP),
      y = rows.y;
    let v = i;
    while (v >= 0 && !Number.isFinite(cell(v, VAL))) v--;
    const known = i >= 0,
      size = (b) => (b > 0 ? gb(b) : "–");
    tell("step", known ? `${live && !st.ended ? "now: " : ""}step ${whole(at)}` : "");
    tell("epoch", known ? `epoch ${cell(i, EPOCH).toFixed(2)}` : "");
    tell("loss", known ? `● ${lossText(cell(i, LOSS))} this step` : "");
    tell("smooth", known ? `━ ${lossText(cell(i, SMOOTH))} smoothed` : "");
    tell(
      "val",
      v >= 0
        ? `◆ ${lossText(cell(v, VAL))} val${cell(v, STEP) === at ? "" : ` at ${whole(cell(v, STEP))}`}`
        : known
          ? "◆ no validation"
          : "",
    );
    tell("best", st.best ? `◇ ${lossText(st.best[1])} best at ${whole(st.best[0])}` : "");
    tell("rate", known ? rateText(cell(i, RATE)) : rateText(st.rate));
    tell("norm", known ? num(cell(i, NORM)) : "");
    tell("speed", known && cell(i, SPEED) > 0 ? whole(cell(i, SPEED)) : "");
    tell(
      "active",
      `─ now ${size(known && !live ? cell(i, ACTIVE) : st.active || (known ? cell(i, ACTIVE) : 0))}`.replace(
        "now",
        live ? "now" : "then",
      ),
    );
    tell("peak", `━ peak ${known ? size(cell(i, PEAK)) : "–"}`);
    tell("foreseen", st.predicted ? `╌ predicted ${gb(st.predicted)}` : "");
    tell("limit", st.limit ? `${limit.was ? "━" : "↑"} limit ${gb(st.limit)}` : "");
    const px = known ? Math.round(x(at) * 10) / 10 : 0;
    draw(hair, known && !live ? `M${px} 4V${TALL - 16}` : "");
    draw(
      spots,
      known && y
        ? [
            [LOSS, "loss"],
            [RATE, "rate"],
            [NORM, "norm"],
            [SPEED, "speed"],
            [PEAK, "memory"],
          ]
            .map(([c, name]) =>
              Number.isFinite(cell(i, c))
                ? `M${px} ${y[name](cell(i, c) || 1e-30).toFixed(1)}h0`
                : "",
            )
            .join("")
        : "",
    );
    const marks = model.get("marks"),
      reach = (5 * (span[1] - span[0])) / Math.max(1, W - LEFT - RIGHT),
      near = live
        ? marks.slice(-1)
        : marks.filter((m) => Math.abs(m[0] - cursor) <= reach || m[0] === at);
    const text =
      near
        .slice(-3)
        .map((m) => `${(WORDS[m[1]] ?? ["•"])[0]} step ${whole(m[0])}: ${m[2]}`)
        .join("   ") ||
      (known && live
        ? "Point at the curves, or use the arrow keys, for the numbers of a step."
        : "");
    if (readout.textContent !== text) readout.textContent = text;
  }
  const stepAt = (ev) => {
    const px = ev.clientX - svg.getBoundingClientRect().left;
    return (
      span[0] +
      ((Math.min(W - RIGHT, Math.max(LEFT, px)) - LEFT) / (W - RIGHT - LEFT)) * (span[1] - span[0])
    );
  };
  svg.addEventListener("pointermove", (ev) => {
    cursor = stepAt(ev);
    later();
  });
  svg.addEventListener("pointerleave", () => {
    cursor = null;
    later();
  });
  svg.addEventListener("blur", () => {
    cursor = null;
    later();
  });
  svg.addEventListener("keydown", (ev) => {
    const n = last(),
      i = cursor === null ? n : nearest(rows, cursor),
      by = { ArrowLeft: -1, ArrowRight: 1, PageUp: -20, PageDown: 20, Home: -n, End: n }[ev.key];
    if (ev.key === "Escape") cursor = null;
    else if (by !== undefined && n >= 0) cursor = cell(Math.min(n, Math.max(0, i + by)), STEP);
    else return;
    ev.preventDefault();
    ev.stopPropagation();
    later();
  });

  function paintTop() {
    swap(
      title,
      "",
      h("strong", {}, st.setup.join(" · ")),
      h("span", { className: `qlab-word ${st.status}` }, `${st.icon} ${st.word}`),
      h("span", { className: "qlab-headline" }, st.headline),
    );
    bar.style.width = `${(100 * Math.min(1, st.steps / Math.max(1, st.iters))).toFixed(1)}%`;
    bar.className = st.status;
    const can = (op) => st.allowed.includes(op),
      busy = asked !== null;
    go.op = ["start", "pause", "resume"].find(can);
    go.hidden = !go.op;
    halt.hidden = !can("stop");
    field.hidden = !can("learning_rate");
    const texts = { start: st.steps ? "▶ go on" : "▶ start", pause: "‖ pause", resume: "▶ resume" },
      doing = { start: "starting …", pause: "pausing …", resume: "resuming …" };
    go.textContent =
      busy && asked.op !== "generate" && asked.op !== "stop"
        ? doing[asked.op]
        : (texts[go.op] ?? "");
    halt.textContent = busy && asked.op === "stop" ? "stopping …" : "■ stop";
    go.disabled = halt.disabled = busy && asked.op !== "generate";
    say.hidden = prompt.hidden = !can("generate");
    say.disabled = busy && asked.op === "generate";
    say.textContent = say.disabled ? "generating …" : "generate";
    if (
      root.getRootNode().activeElement !== rate &&
      wanted === null &&
      rate.getAttribute("aria-invalid") !== "true"
    )
      rate.value = rateText(st.rate);
    error.hidden = !st.error;
    if (error.textContent !== `✕ ${st.error}`) error.textContent = `✕ ${st.error}`;
    report.hidden = !st.ended;
    if (st.ended)
      swap(
        report,
        "",
        h(
          "div",
          { className: "qlab-facts-grid" },
          ...st.summary
            .filter(([k]) => REST.includes(k))
            .map(([k, v]) => h("div", {}, h("span", {}, k), h("b", { title: v }, v))),
        ),
        ...(st.notes.length
          ? [h("p", { className: "qlab-note qlab-notes" }, st.notes.join(" · "))]
          : []),
      );
  }
  function paintTalk() {
    const list = model.get("generations"),
      known = [...which.options].map((o) => o.value).join("\n");
    voices.parentNode.hidden = !list.length;
    if (known !== list.map((v) => v[0]).join("\n")) {
      const kept = which.value;
      which.replaceChildren(
        ...list.map(([p]) => h("option", { value: p }, p.length > 60 ? `${p.slice(0, 59)}…` : p)),
      );
      which.value = hold && list.some((v) => v[0] === kept) ? kept : list.at(-1)?.[0];
    }
    which.hidden = list.length < 2;
    const shown = list.find((v) => v[0] === which.value);
    if (!shown) return;
    const [asking, first, now] = shown,
      one = String(first) === String(now),
      said = (head, [step, text]) =>
        h(
          "div",
          {},
          h("span", {}, `${head}, step ${whole(step)}`),
          h("p", {}, text || "(nothing)"),
        );
    swap(
      voices,
      which.value,
      said(`${which.hidden ? `“${asking}” ` : ""}${one ? "answer" : "before"}`, first),
      ...(one ? [] : [said("now", now)]),
    );
  }
  /** For ears: changes of state and of the best validation, at most one a second. */
  function announce() {
    const text = st.error
      ? `error: ${st.error}`
      : `${st.word}${st.best ? `, best validation loss ${lossText(st.best[1])}` : ""}${st.ended ? `, ${st.headline}` : ""}`;
    if (text === quiet.textContent) return;
    const wait = told + 1000 - performance.now();
    clearTimeout(telling);
    if (wait > 0) {
      telling = setTimeout(announce, wait);
      return;
    }
    told = performance.now();
    quiet.textContent = text;
  }
  function paint() {
    paintTop();
    paintPlot();
    paintCursor();
    paintTalk();
    announce();
    svg.setAttribute(
      "aria-label",
      `Loss of a training run. ${st.headline}. ${st.best ? `Best validation ${lossText(st.best[1])} at step ${st.best[0]}.` : ""}`,
    );
    if (data.textContent !== st.data) data.textContent = st.data;
    if (code.textContent !== st.code) code.textContent = st.code;
  }

  // kernel → browser
  function onState() {
    st = model.get("state");
    came = performance.now();
    const all = answered(st.ack);
    if (
      asked &&
      ((all && st.error) ||
        (asked.op === "generate" ? st.answers !== asked.was : st.status !== asked.was))
    )
      asked = null;
    if (all && wanted !== null) {
      wanted = null;
      pending.textContent = st.error ? "" : "✓ applied";
    }
    later();
  }
  const onCurve = () => {
    rows = read(model);
    rows.tag = ++onCurve.count;
    came = performance.now();
    later();
  };
  onCurve.count = 0;
  const onMarks = () => {
    drawn = null;
    later();
  };
  const later = () => {
    raf ||= requestAnimationFrame(() => {
      raf = 0;
      paint();
    });
  };
  const hears = [
    ["state", onState],
    ["curve", onCurve],
    ["newest", onCurve],
    ["marks", onMarks],
    ["generations", later],
  ];
  for (const [name, f] of hears) model.on(`change:${name}`, f);
  const sized = new ResizeObserver(() => {
    layout();
    later();
  });
  sized.observe(svg.parentNode);
  layout();
  onState();
  came = 0;
  send({ op: "hello" });
  return () => {
    for (const [name, f] of hears) model.off(`change:${name}`, f);
    sized.disconnect();
    stop();
    clearTimeout(telling);
    cancelAnimationFrame(raf);
  };
}
export default { render };
