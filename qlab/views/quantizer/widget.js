// The quantizer panel. All slider positions are in the browser, so a slider never waits for the kernel.
const [REL, SE, MAX, KL] = [0, 1, 2, 3];
const NAMES = {
  kl_nats: ["predicted ΔKL", "nats/token"],
  relative_error: ["weight error", "‖W−Ŵ‖/‖W‖"],
};

// ---- pure functions
/** Row that stores a layer, or -1 where it stays as it is (by choice, or because the row cannot hold it). */
export function rowOf(data, plan, layer) {
  const row = layer in plan.overrides ? plan.overrides[layer] : plan.row;
  return row >= 0 && data.flags[row * data.L + layer] & 1 ? row : -1;
}
export const value = (data, measure, row, layer) =>
  data.values[(measure * data.S + row) * data.L + layer];

export function totals(data, plan) {
  let nbytes = data.other,
    kl = 0,
    known = true;
  for (let i = 0; i < data.L; i++) {
    const row = rowOf(data, plan, i);
    nbytes += row < 0 ? data.layers[i].nbytes : data.sizes[row * data.L + i];
    if (row >= 0) {
      const k = value(data, KL, row, i);
      if (Number.isNaN(k)) known = false;
      else kl += k;
    }
  }
  return { nbytes, bpw: (8 * nbytes) / data.params, kl: known ? kl : NaN };
}
export function worst(data, plan, measure, count = 5) {
  const found = [];
  for (let i = 0; i < data.L; i++) {
    const row = rowOf(data, plan, i),
      v = row < 0 ? NaN : value(data, measure, row, i);
    if (!Number.isNaN(v)) found.push([i, v]);
  }
  return found.sort((a, b) => b[1] - a[1]).slice(0, count);
}
/** Limits of the log axis in whole decades: the middle 98 % of all slider positions, or of one plan. */
export function scaleOf(data, measure, plan = null) {
  const seen = [],
    n = data.S * data.L;
  if (plan)
    for (let i = 0; i < data.L; i++) {
      const r = rowOf(data, plan, i);
      if (r >= 0) seen.push(value(data, measure, r, i));
    }
  else
    for (let k = measure * n, step = Math.max(1, n >> 12); k < (measure + 1) * n; k += step)
      seen.push(data.values[k]);
  const known = seen.filter((v) => v > 0).sort((x, y) => x - y),
    at = (q) => Math.log10(known[Math.floor(q * (known.length - 1))]);
  if (!known.length) return [1e-3, 1];
  const top = Math.ceil(at(plan ? 1 : 0.99) - 1e-9),
    bottom = Math.floor(at(plan ? 0 : 0.01) + 1e-9);
  return [10 ** Math.max(Math.min(bottom, top - 1), top - 5), 10 ** top];
}
const ink = (t) => `var(--k${Math.round(15 * t)})`;
export const height = ([lo, hi], v) =>
  Math.min(1, Math.max(0.04, Math.log(v / lo) / Math.log(hi / lo)));
const args = ([mode, bits, group]) => `bits=${bits}, group_size=${group}, mode="${mode}"`;
export function codeLine(data, plan, solver = "rtn") {
  const lines = [
    `q = qlab.Quantizer(model, ${args(data.configs[plan.row])}${solver === "rtn" ? "" : `, solver="${solver}"`})`,
  ];
  const own = Object.entries(plan.overrides)
    .filter(([, r]) => r !== plan.row)
    .map(([i, r]) => [data.layers[i].path, r]);
  for (const [path, r] of own.sort((a, b) => (a[0] < b[0] ? -1 : 1)))
    lines.push(`q.set("${path}", ${r < 0 ? "bits=None" : args(data.configs[r])})`);
  return lines.join("\n");
}
/** What was measured end to end, in words. */
export function judgedText({ kl_nats, perplexity, perplexity_before }) {
  if (kl_nats === undefined) return [];
  return [
    `measured: ${num(kl_nats)} nats/token`,
    `perplexity ${num(perplexity_before)} → ${num(perplexity)}`,
  ];
}
export function read(model) {
  const meta = model.get("meta"),
    view = (name, T) => {
      const v = model.get(name);
      return new T(v.buffer.slice(v.byteOffset, v.byteOffset + v.byteLength));
    };
  return {
    ...meta,
    L: meta.layers.length,
    S: meta.configs.length,
    values: view("values", Float32Array),
    sizes: view("sizes", Float64Array),
    flags: view("flags", Uint8Array),
    kurtosis: view("kurtosis", Float32Array),
  };
}

// ---- the panel
async function render({ model, el, host }) {
  let data = read(model),
    plan = { row: 0, overrides: {} },
    measure = "relative_error",
    focus = -1,
    hover = -1,
    fixed = true,
    raf = 0;
  const controls =
    host && model.get("controls") ? await host.getModel(model.get("controls")) : null;
  const rowAt = (mode, bits, group) =>
    data.configs.findIndex(([m, b, g]) => m === mode && b === bits && g === group);
  const modeOf = (name) => data.modes.find((m) => m[0] === name);

  const {
    send,
    slide: throttled,
    heard: answered,
    stop,
  } = line(controls, (on) => root.classList.toggle("qlab-stale", on));
  function slide() {
    const [mode, bits, group_size] = data.configs[plan.row];
    throttled({ op: "set", mode, bits, group_size });
  }
  function pick(mode, bits, group) {
    const m = modeOf(mode);
    plan.row = rowAt(mode, snap(m[2], bits), snap(m[3], group));
    slide();
    later();
  }
  function override(layers, row) {
    for (const i of layers)
      if (row === "default" || row === plan.row) delete plan.overrides[i];
      else plan.overrides[i] = row;
    send({
      op: "override",
      paths: layers.map((i) => data.layers[i].path),
      config: row === "default" ? row : row < 0 ? null : data.configs[row],
    });
    later();
  }

  // skeleton of the panel
  const title = h("div", { className: "qlab-title" }),
    note = h("div", { className: "qlab-note" }),
    stale = h(
      "div",
      { className: "qlab-stale-note", role: "alert" },
      "Kernel not connected: run this cell again.",
    );
  const mode = h("select", { className: "qlab-mode" }),
    solver = h("select"),
    shown = h("select", { className: "qlab-measure" });
  const bits = stepper("bits", (v) => pick(mode.value, v, data.configs[plan.row][2])),
    group = stepper("group size", (v) => pick(mode.value, data.configs[plan.row][1], v));
  mode.onchange = () => pick(mode.value, data.configs[plan.row][1], data.configs[plan.row][2]);
  solver.onchange = () => send({ op: "solver", solver: solver.value });
  shown.onchange = () => {
    measure = shown.value;
    send({ op: "measure", measure });
    later();
  };
  const free = h("button", {
    type: "button",
    className: "qlab-free",
    title: "One scale for all slider positions, or one that fits this position",
  });
  free.onclick = () => {
    fixed = !fixed;
    later();
  };
  const svg = s("svg", {
      class: "qlab-map",
      role: "img",
      tabindex: 0,
      "data-lm-suppress-shortcuts": "true",
    }),
    legend = h("span");
  const side = h("div", { className: "qlab-worst" }),
    detail = h("div", { className: "qlab-detail" }),
    memory = h("div", { className: "qlab-memory" });
  const skipped = h("details", { className: "qlab-skipped" }),
    table = h("details", { className: "qlab-table" }),
    code = h("pre"),
    copy = h("button", { type: "button" }, "copy");
  copy.onclick = () =>
    navigator.clipboard?.writeText(code.textContent).then(() => {
      copy.textContent = "copied";
      setTimeout(() => (copy.textContent = "copy"), 1200);
    });
  const status = h("div", { className: "qlab-status", role: "status", "aria-live": "polite" }),
    bar = h("progress"),
    cancel = h("button", { type: "button" }, "cancel");
  cancel.onclick = () => send({ op: "cancel" });
  const work = [
    ["exact", "measure exactly"],
    ["plan", "measure true KL"],
    ["layer_kl", "true KL of the worst"],
    ["kl", "predict ΔKL"],
  ].map(([what, text]) => {
    const b = h("button", { type: "button" }, text);
    b.onclick = () => send({ op: "compute", what });
    b.what = what;
    return b;
  });
  const root = h(
    "div",
    { className: "qlab" },
    title,
    stale,
    h(
      "div",
      { className: "qlab-controls" },
      label("mode", mode),
      label("bits", bits.el),
      label("group size", group.el),
      label("solver", solver),
      label("show", shown),
    ),
    h(
      "div",
      { className: "qlab-body" },
      h(
        "div",
        { className: "qlab-picture" },
        svg,
        h("div", { className: "qlab-legend" }, legend, free),
      ),
      side,
    ),
    detail,
    memory,
    note,
    skipped,
    table,
    h("div", { className: "qlab-code" }, code, copy),
    h("div", { className: "qlab-actions" }, ...(controls ? work : []), bar, cancel, status),
  );
  for (let k = 0; k < 16; k++) {
    const t = k / 15,
      rest = `0.12 ${255 + 130 * t}`;
    root.style.setProperty(
      `--k${k}`,
      `light-dark(oklch(${0.83 - 0.38 * t} ${rest}), oklch(${0.42 + 0.42 * t} ${rest}))`,
    );
  }
  el.replaceChildren(root);
  mode.append(...data.modes.map((m) => h("option", { value: m[0], title: m[1] }, m[0])));
  solver.append(
    ...data.solvers.map(([name, text]) => h("option", { value: name, title: text }, name)),
  );
  shown.append(...Object.entries(NAMES).map(([k, v]) => h("option", { value: k }, v[0])));
  if (!controls) solver.closest("label").hidden = true;

  // the picture: a row per role, a bar per block; layers outside the blocks share the last row
  let cells = [],
    rows = [],
    dots = [];
  function layout() {
    const W = Math.max(280, svg.parentNode.clientWidth || 640),
      roles = new Map(),
      outside = [];
    data.layers.forEach((l, i) => {
      if (l.block === null) outside.push(i);
      else (roles.get(l.role) || roles.set(l.role, []).get(l.role)).push(i);
    });
    rows = [...roles].map(([role, list]) => [
      role.replace(/^(self_attn|mlp|attention|block_sparse_moe)\./, ""),
      list,
    ]);
    if (outside.length) rows.push(["outside blocks", outside]);
    const blocks = Math.max(1, ...data.layers.map((l) => (l.block ?? 0) + 1)),
      H = rows.length > 14 ? 20 : rows.length > 9 ? 26 : 34,
      left = 104,
      step = (W - left - 4) / blocks;
    svg.setAttribute("width", W);
    svg.setAttribute("height", rows.length * H + 16);
    svg.replaceChildren();
    cells = [];
    dots = [];
    rows.forEach(([name, list], r) => {
      const text = s("text", {
        x: left - 8,
        y: r * H + H - 6,
        "text-anchor": "end",
        class: "qlab-role",
      });
      text.textContent = name;
      svg.append(text);
      svg.append(
        s("line", {
          x1: left,
          x2: W,
          y1: r * H + H - 1.5,
          y2: r * H + H - 1.5,
          class: "qlab-base",
        }),
      );
      list.forEach((i, n) => {
        const last = name === "outside blocks",
          w = last ? 16 : Math.max(1, step - (step > 6 ? 2 : step > 3 ? 1 : 0.3)),
          x = left + (last ? n * 130 : data.layers[i].block * step);
        cells[i] = {
          x,
          y: r * H,
          w,
          H,
          row: r,
          rect: s("rect", { x, width: w, rx: w > 5 ? 1.5 : 0 }),
          dot: s("circle", { cx: x + w / 2, r: Math.min(2.5, w / 2 + 0.5), class: "qlab-dot" }),
        };
        svg.append(cells[i].rect, cells[i].dot);
        if (last) {
          const t = s("text", { x: x + w + 5, y: r * H + H - 6, class: "qlab-role" });
          t.textContent = data.layers[i].path.split(".").pop();
          svg.append(t);
        }
      });
    });
    const every = [1, 2, 5, 10, 20, 50].find((k) => step * k > 22) || 50;
    for (let b = 0; b < blocks && blocks > 1 && (blocks - b) * step > 9; b += every) {
      const t = s("text", {
        x: left + (b + 0.5) * step,
        y: rows.length * H + 12,
        "text-anchor": "middle",
        class: "qlab-axis",
      });
      t.textContent = b;
      svg.append(t);
    }
    svg.append((svg.ring = s("rect", { class: "qlab-ring", rx: 2 })));
  }
  const at = (ev) => {
    const box = svg.getBoundingClientRect(),
      px = ev.clientX - box.left,
      py = ev.clientY - box.top;
    let best = -1,
      near = 14;
    cells.forEach((c, i) => {
      if (py >= c.y && py < c.y + c.H) {
        const d = Math.abs(px - c.x - c.w / 2);
        if (d < Math.max(near, c.w / 2)) {
          near = d;
          best = i;
        }
      }
    });
    return best;
  };
  svg.addEventListener("pointermove", (ev) => {
    const i = at(ev);
    if (i !== hover) {
      hover = i;
      later();
    }
  });
  svg.addEventListener("pointerleave", () => {
    hover = -1;
    later();
  });
  svg.addEventListener("click", (ev) => {
    const i = at(ev);
    if (i >= 0) {
      focus = focus === i ? -1 : i;
      later();
    }
  });
  svg.addEventListener("keydown", (ev) => {
    const list = rows[cells[focus]?.row ?? 0][1],
      n = list.indexOf(focus),
      r = cells[focus]?.row ?? 0,
      up = { ArrowUp: -1, ArrowDown: 1 }[ev.key],
      side_ = { ArrowLeft: -1, ArrowRight: 1 }[ev.key];
    if (focus < 0 && (up || side_)) focus = rows[0][1][0];
    else if (side_) focus = list[Math.min(list.length - 1, Math.max(0, n + side_))];
    else if (up) {
      const next = rows[Math.min(rows.length - 1, Math.max(0, r + up))][1];
      focus = next[Math.min(n, next.length - 1)];
    } else if (ev.key === "Escape") focus = -1;
    else return;
    ev.preventDefault();
    ev.stopPropagation();
    later();
  });

  function paint() {
    const M = measure === "kl_nats" ? KL : REL,
      [name, unit] = NAMES[measure],
      scale = fixed ? ((data.scale ??= {})[M] ??= scaleOf(data, M)) : scaleOf(data, M, plan),
      now = totals(data, plan),
      [m, b, g] = data.configs[plan.row];
    if (mode.value !== m) mode.value = m;
    bits.set(modeOf(m)[2], b);
    group.set(modeOf(m)[3], g);
    if (shown.value !== measure) shown.value = measure;
    paintTitle(now);
    paintMemory(now.nbytes);
    cells.forEach((c, i) => {
      const row = rowOf(data, plan, i),
        v = row < 0 ? NaN : value(data, M, row, i),
        kept = row < 0,
        refused = kept && !(plan.overrides[i] < 0);
      const t = Number.isNaN(v) ? (kept ? 0.04 : 0.3) : v <= 0 ? 0.04 : height(scale, v),
        tall = Math.max(1.5, t * (c.H - 6));
      const look = `${kept ? " kept" : Number.isNaN(v) ? " wait" : data.flags[row * data.L + i] & 2 ? " exact" : ""}`,
        mark = refused
          ? "refused"
          : i in plan.overrides && plan.overrides[i] !== plan.row
            ? "own"
            : "",
        now_ = `${tall.toFixed(1)}${look}${mark}`;
      if (c.was === now_) return;
      c.was = now_;
      c.rect.setAttribute("y", c.y + c.H - 2 - tall);
      c.rect.setAttribute("height", tall);
      c.rect.style.fill = ink(t);
      c.rect.setAttribute("class", `qlab-bar${look}`);
      c.dot.setAttribute("cy", Math.max(c.y + 3, c.y + c.H - 6 - tall));
      c.dot.setAttribute("class", `qlab-dot ${mark}`);
    });
    const f = hover >= 0 ? hover : focus,
      c = cells[f];
    svg.ring.style.display = c ? "" : "none";
    if (c)
      for (const [k, v] of Object.entries({
        x: c.x - 2,
        y: c.y + 1,
        width: c.w + 4,
        height: c.H - 2,
      }))
        svg.ring.setAttribute(k, v);
    const top = worst(data, plan, M),
      judged = Object.fromEntries(data.judged),
      alone = (i) => judged[data.layers[i].path];
    svg.setAttribute(
      "aria-label",
      `${name} of ${data.L} layers at ${m} ${b}-bit, group ${g}. Worst: ${top.map(([i, v]) => `${data.layers[i].path} ${num(v)}`).join(", ")}`,
    );
    swap(
      side,
      "",
      h("h4", {}, `worst five by ${name}`),
      h(
        "ol",
        {},
        ...top.map(([i, v]) =>
          h(
            "li",
            {},
            h(
              "button",
              {
                type: "button",
                onclick: () => {
                  focus = i;
                  later();
                },
              },
              short(i),
            ),
            h("b", {}, num(v)),
            ...(alone(i) ? [h("div", {}, `measured alone: ${num(alone(i))}`)] : []),
          ),
        ),
      ),
      h("p", {}, Number.isNaN(now.kl) ? "" : `all layers: ≈ ${num(now.kl)} nats/token`),
      ...judgedText(judged).map((line) => h("p", {}, line)),
    );
    paintLegend(scale, unit);
    paintDetail(f);
    paintLists();
    code.textContent = codeLine(data, plan, model.get("state").solver);
    note.textContent =
      measure === "kl_nats" && data.text
        ? `Predicted ΔKL is an estimate for rounding to nearest, from one pass over ${data.text}; it ranks layers by their effect on the output.`
        : "Weight error says how far the weights move, not what that does to the output: do not rank layers by it." +
          (data.text || !controls ? "" : " Predict ΔKL for that.");
  }
  const short = (i) =>
    data.layers[i].path
      .replace(/^model\./, "")
      .replace(/layers\./, "")
      .replace(/self_attn\./, "");
  function paintTitle(now) {
    const fits = now.nbytes < data.machine.free,
      tight = now.nbytes > 0.8 * data.machine.free;
    title.replaceChildren(
      h("strong", {}, data.name),
      h(
        "span",
        {},
        `${data.params >= 1e9 ? (data.params / 1e9).toFixed(2) + " B" : (data.params / 1e6).toFixed(1) + " M"} weights`,
      ),
      h("span", { className: "qlab-size" }, `${gb(data.before)} → `, h("b", {}, gb(now.nbytes))),
      h("span", {}, h("b", {}, now.bpw.toFixed(2)), " bits/weight"),
      h("span", {}, `${(data.before / now.nbytes).toFixed(2)}× smaller`),
      h(
        "span",
        { className: `qlab-fits ${fits ? (tight ? "tight" : "yes") : "no"}` },
        fits ? (tight ? "▲ tight" : "✓ weights fit") : "✕ does not fit",
        ` (${gb(data.machine.free)} free)`,
      ),
    );
  }
  function paintMemory(nbytes) {
    const top = Math.max(data.machine.total, nbytes, data.before),
      w = (n) => `${(100 * n) / top}%`;
    memory.replaceChildren(
      h(
        "div",
        {
          className: "qlab-track",
          role: "img",
          ariaLabel: `weights ${gb(nbytes)} of ${gb(data.machine.total)}`,
        },
        h("i", { className: "before", style: `width:${w(data.before)}` }),
        h("i", { className: "now", style: `width:${w(nbytes)}` }),
        h("i", { className: "limit", style: `left:${w(data.machine.free)}` }),
      ),
      h(
        "span",
        {},
        `memory: weights ${gb(nbytes)}, now ${gb(data.before)}; ${gb(data.machine.free)} free on ${data.machine.label}`,
      ),
    );
  }
  function paintLegend([lo, hi], unit) {
    if (legend.was === `${lo} ${hi} ${unit} ${fixed}`) return;
    legend.was = `${lo} ${hi} ${unit} ${fixed}`;
    free.textContent = fixed ? "fit scale" : "fix scale";
    legend.replaceChildren(
      h("span", {}, num(lo)),
      h(
        "span",
        { className: "qlab-ramp" },
        ...Array.from({ length: 20 }, (_, k) =>
          h("i", { style: `background:${ink(k / 19)};height:${2 + (10 * k) / 19}px` }),
        ),
      ),
      h("span", {}, `${num(hi)} ${unit}, log scale`),
      h("span", {}, "● own setting"),
      h("span", {}, "○ cannot be quantized"),
      h("span", {}, "outlined: exact"),
    );
  }
  let all = false;
  function paintDetail(i) {
    if (i < 0) {
      swap(
        detail,
        "",
        h(
          "p",
          { className: "qlab-hint" },
          "Point at a bar for its numbers; click it to give the layer its own bits.",
        ),
      );
      return;
    }
    const l = data.layers[i],
      row = rowOf(data, plan, i),
      want = plan.overrides[i] ?? plan.row,
      facts = [];
    const put = (k, v, t = "") => facts.push(h("span", { title: t }, `${k} `, h("b", {}, v)));
    if (row < 0) put("kept", refusal(i));
    else {
      const r = value(data, REL, row, i),
        se = value(data, SE, row, i),
        exact = data.flags[row * data.L + i] & 2;
      put(
        "weight error",
        Number.isNaN(r) ? "measuring…" : `${num(r)}${exact ? " exact" : ` ± ${num(se)} sampled`}`,
      );
      put("SQNR", `${(-20 * Math.log10(r)).toFixed(1)} dB`);
      put("largest", num(value(data, MAX, row, i)), "largest |W−Ŵ| seen");
      put("ΔKL", `${num(value(data, KL, row, i))} nats`);
    }
    put("kurtosis", num(data.kurtosis[i]), "3 for a Gaussian; more means outliers");
    put("size", gb(row < 0 ? l.nbytes : data.sizes[row * data.L + i]));
    const [m, , g] = data.configs[want < 0 ? plan.row : want],
      M = measure === "kl_nats" ? KL : REL,
      scale = ((data.scale ??= {})[M] ??= scaleOf(data, M));
    const peers =
      all && l.block !== null
        ? data.layers.map((x, k) => (x.role === l.role ? k : -1)).filter((k) => k >= 0)
        : [i];
    const choices = modeOf(m)[2].map((b) => {
      const r = rowAt(m, b, g),
        v = value(data, M, r, i),
        ok = data.flags[r * data.L + i] & 1;
      return h(
        "button",
        {
          type: "button",
          className: r === row ? "on" : "",
          disabled: !ok,
          title: `${m} ${b}-bit g${g}: ${num(v)}`,
          onclick: () => {
            focus = i;
            override(peers, r);
          },
        },
        h("i", {
          style: `background:${ink(v > 0 ? height(scale, v) : 0)};height:${v > 0 ? 2 + 20 * height(scale, v) : 2}px`,
        }),
        String(b),
      );
    });
    const box = h("input", {
      type: "checkbox",
      checked: all,
      onchange: () => {
        all = box.checked;
        later();
      },
    });
    swap(
      detail,
      `${[i, all]}`,
      h(
        "div",
        { className: "qlab-facts" },
        h("strong", {}, l.path),
        h(
          "span",
          {},
          `${l.shape.join(" × ")} · ${row < 0 ? l.stored || l.dtype : data.configs[row].join(" ").replace(/ (\d+) (\d+)$/, " $1-bit g$2")}`,
        ),
        ...facts,
      ),
      h(
        "div",
        { className: "qlab-choose" },
        h("span", {}, "bits"),
        ...choices,
        h(
          "button",
          {
            type: "button",
            className: want < 0 ? "on" : "",
            onclick: () => {
              focus = i;
              override(peers, -1);
            },
          },
          "keep",
        ),
        h(
          "button",
          {
            type: "button",
            disabled: !peers.some((k) => k in plan.overrides),
            onclick: () => {
              focus = i;
              override(peers, "default");
            },
          },
          "as the rest",
        ),
        ...(l.block === null ? [] : [h("label", {}, box, ` all ${l.role.split(".").pop()}`)]),
      ),
    );
  }
  const refusal = (i, l = data.layers[i], row = plan.overrides[i] ?? plan.row) =>
    row < 0
      ? "by your choice"
      : l.obstacle || `width ${l.shape.at(-1)} is not a multiple of ${data.configs[row][2]}`;
  function paintLists() {
    const out = data.layers.map((l, i) => [i, l]).filter(([i]) => rowOf(data, plan, i) < 0);
    skipped.hidden = !out.length;
    swap(
      skipped,
      "",
      h(
        "summary",
        {},
        `${out.length} of ${data.L} layers are not quantized (${gb(out.reduce((a, [, l]) => a + l.nbytes, 0))})`,
      ),
      ...(skipped.open
        ? [
            h(
              "ul",
              {},
              ...out.map(([i, l]) => h("li", {}, `${l.path} · ${refusal(i)} · ${gb(l.nbytes)}`)),
            ),
          ]
        : []),
    );
    swap(
      table,
      "",
      h("summary", {}, "all layers as a table"),
      ...(table.open
        ? [
            h(
              "table",
              {},
              h(
                "tr",
                {},
                ...["layer", "stored as", "weight error", "ΔKL nats", "size"].map((t) =>
                  h("th", {}, t),
                ),
              ),
              ...data.layers.map((l, i) => {
                const r = rowOf(data, plan, i);
                return h(
                  "tr",
                  {},
                  ...[
                    l.path,
                    r < 0
                      ? "kept"
                      : `${data.configs[r][0]} ${data.configs[r][1]}-bit g${data.configs[r][2]}`,
                    r < 0 ? "–" : num(value(data, REL, r, i)),
                    r < 0 ? "–" : num(value(data, KL, r, i)),
                    gb(r < 0 ? l.nbytes : data.sizes[r * data.L + i]),
                  ].map((t) => h("td", {}, t)),
                );
              }),
            ),
          ]
        : []),
    );
  }
  skipped.addEventListener("toggle", () => later());
  table.addEventListener("toggle", () => later());

  // kernel → browser
  function onState() {
    const st = model.get("state");
    if (answered(st.ack)) {
      plan = { row: rowAt(st.mode, st.bits, st.group_size), overrides: { ...st.overrides } };
      measure = st.measure;
    }
    if (solver.value !== st.solver) solver.value = st.solver;
    data.judged = st.totals;
    data.text = st.calibration;
    const p = st.progress;
    bar.hidden = cancel.hidden = !p;
    if (p) {
      bar.max = p[2];
      bar.value = p[1];
    }
    for (const b of work) b.hidden = b.what === "kl" && !!st.calibration;
    status.textContent = st.error || (p ? p[0] : "");
    status.classList.toggle("error", !!st.error);
    later();
  }
  const onData = () => {
    const { judged, text } = data;
    data = Object.assign(read(model), { judged, text });
    later();
  };
  const later = () => {
    raf ||= requestAnimationFrame(() => {
      raf = 0;
      paint();
    });
  };
  const heard = [
    ["state", onState],
    ["values", onData],
    ["flags", onData],
    ["kurtosis", onData],
  ];
  for (const [name, f] of heard) model.on(`change:${name}`, f);
  const sized = new ResizeObserver(() => {
    layout();
    later();
  });
  sized.observe(svg.parentNode);
  layout();
  onState();
  send({ op: "hello" });
  return () => {
    for (const [name, f] of heard) model.off(`change:${name}`, f);
    sized.disconnect();
    stop();
    cancelAnimationFrame(raf);
  };
}
export default { render };
