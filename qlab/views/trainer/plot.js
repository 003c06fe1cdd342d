// The picture of a run: one time line, a lane for each measure, and the numbers of the step pointed at.
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

// `later` asks for a repaint. `paint` draws what has changed, `layout` fits the width; `newRows` and
// `newMarks` tell what the kernel has sent.
function timeline(model, later) {
  let rows = read(model);
  let st = model.get("state");
  let cursor = null; // step pointed at; null follows the newest
  let W = 0;
  let received = 0;
  const svg = s("svg", {
      class: "qlab-plot",
      role: "img",
      tabindex: 0,
      height: TALL,
      "data-lm-suppress-shortcuts": "true",
    }),
    readout = h("div", { className: "qlab-readout" });
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
    predicted = put("path", "qlab-predicted");
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
  const fields = {},
    places = [
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
      ["predicted", 288],
      ["limit", 301],
    ];
  for (const [name, y] of places) fields[name] = write(0, y, `qlab-say ${name}`);
  const say = (name, text) => {
    if (fields[name].was !== text) fields[name].textContent = fields[name].was = text;
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
    for (const [name] of places) fields[name].setAttribute("x", W - RIGHT + 8);
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
    draw(predicted, st.predicted ? `M${LEFT} ${y.memory(st.predicted).toFixed(1)}H${end}` : "");
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
    say("step", known ? `${live && !st.ended ? "now: " : ""}step ${whole(at)}` : "");
    say("epoch", known ? `epoch ${cell(i, EPOCH).toFixed(2)}` : "");
    say("loss", known ? `● ${lossText(cell(i, LOSS))} this step` : "");
    say("smooth", known ? `━ ${lossText(cell(i, SMOOTH))} smoothed` : "");
    say(
      "val",
      v >= 0
        ? `◆ ${lossText(cell(v, VAL))} val${cell(v, STEP) === at ? "" : ` at ${whole(cell(v, STEP))}`}`
        : known
          ? "◆ no validation"
          : "",
    );
    say("best", st.best ? `◇ ${lossText(st.best[1])} best at ${whole(st.best[0])}` : "");
    say("rate", known ? rateText(cell(i, RATE)) : rateText(st.rate));
    say("norm", known ? num(cell(i, NORM)) : "");
    say("speed", known && cell(i, SPEED) > 0 ? whole(cell(i, SPEED)) : "");
    say(
      "active",
      `─ now ${size(known && !live ? cell(i, ACTIVE) : st.active || (known ? cell(i, ACTIVE) : 0))}`.replace(
        "now",
        live ? "now" : "then",
      ),
    );
    say("peak", `━ peak ${known ? size(cell(i, PEAK)) : "–"}`);
    say("predicted", st.predicted ? `╌ predicted ${gb(st.predicted)}` : "");
    say("limit", st.limit ? `${limit.was ? "━" : "↑"} limit ${gb(st.limit)}` : "");
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

  return {
    svg,
    readout,
    layout,
    newRows() {
      rows = read(model);
      rows.tag = ++received;
    },
    newMarks() {
      drawn = null;
    },
    paint() {
      st = model.get("state");
      paintPlot();
      paintCursor();
    },
  };
}
