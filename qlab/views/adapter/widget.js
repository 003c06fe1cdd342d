// The adapter panel. What every rank recovers is in the browser, so the rank slider never waits for the kernel.
const CURVES = ["singular", "weight", "residual", "diagonal", "qera"],
  POWERS = [1, 2, 4, 8, 16, 32, 64, 128, 256];
const SHOWN = {
  weight: "weight error recovered, without data",
  residual: "output error recovered by residual",
  diagonal: "output error recovered by diagonal",
  qera: "output error recovered by qera",
};

// ---- pure functions
/** A curve of a layer, as shares; NaN where nothing is known. */
export function curve(data, name, layer) {
  const G = data.grid.length,
    at = (CURVES.indexOf(name) * data.layers.length + layer) * G,
    found = [];
  for (let k = 0; k < G; k++)
    found.push(data.curves[at + k] === 65535 ? NaN : data.curves[at + k] / 65534);
  return found;
}
/** The value at a rank, between the ranks of the grid by interpolation; the last known one above. */
export function atRank(grid, values, rank) {
  let k = 0;
  if (!(values.length && Number.isFinite(values[0]))) return NaN;
  while (k + 1 < grid.length && grid[k + 1] <= rank && Number.isFinite(values[k + 1] ?? NaN)) k++;
  const next = values[k + 1];
  if (grid[k] >= rank || !Number.isFinite(next ?? NaN)) return values[k];
  return values[k] + ((next - values[k]) * (rank - grid[k])) / (grid[k + 1] - grid[k]);
}
/** Whether a layer has an adapter: named by the keys, and in one of the last blocks. */
export function isOn(data, plan, layer) {
  const { block } = data.layers[layer];
  return (
    plan.on[layer] &&
    (block === null || plan.num_layers < 0 || block >= data.blocks - plan.num_layers)
  );
}
export const sizeOf = (data, plan, layer) => {
  const [fixed, slope] = data.sizes[plan.kind][layer];
  return fixed + slope * plan.rank;
};
export function totals(data, plan) {
  let size = 0,
    layers = 0;
  data.layers.forEach((_, i) => {
    if (isOn(data, plan, i)) {
      layers++;
      size += sizeOf(data, plan, i);
    }
  });
  return { size, layers, share: size / data.params };
}
/** The largest rank that every adapted layer has room for. */
export const widest = (data, plan) =>
  Math.min(
    ...data.layers.flatMap((l, i) => (isOn(data, plan, i) ? [Math.min(...l.shape.slice(-2))] : [])),
  );
export const alphaOf = (plan) => plan.scale * (plan.rslora ? Math.sqrt(plan.rank) : plan.rank);
/** The shortest name of a role: the end of its path, or the whole if another one ends alike. */
const nameOf = (roles, role) => {
  const end = role.split(".").pop();
  return roles.filter((r) => r.split(".").pop() === end).length > 1 ? role : end;
};
/** The keys that name a set of layers: null for all linear layers in the blocks and all experts, else ends of paths. */
export function keysOf(data, on) {
  const plain = data.layers.every((l, i) => on[i] === (l.kind !== "embedding" && l.block !== null));
  if (plain) return null;
  const roles = new Map();
  data.layers.forEach((l, i) => (roles.get(l.role) || roles.set(l.role, []).get(l.role)).push(i));
  return [...roles].flatMap(([role, list]) =>
    list.every((i) => on[i])
      ? [nameOf([...roles.keys()], role)]
      : list.filter((i) => on[i]).map((i) => data.layers[i].path),
  );
}
const quoted = (v) =>
  typeof v === "boolean"
    ? v
      ? "True"
      : "False"
    : typeof v === "number"
      ? String(v)
      : Array.isArray(v)
        ? `[${v.map(quoted).join(", ")}]`
        : `"${v}"`;
export function codeLine(data, plan) {
  const usual = {
    kind: "lora",
    scale: 2,
    dropout: 0,
    keys: null,
    num_layers: -1,
    init: "default",
    rslora: false,
    dtype: "float32",
  };
  const own = Object.keys(usual)
    .filter((k) => JSON.stringify(plan[k]) !== JSON.stringify(usual[k]))
    .map((k) => `, ${k}=${quoted(plan[k])}`);
  return `a = qlab.Adapter(${data.source}, rank=${plan.rank}${own.join("")})`;
}
export const percent = (x) =>
  Number.isFinite(x) ? `${(100 * x).toFixed(x < 0.0995 ? 1 : 0)} %` : "–";
export const count = (n) =>
  n >= 1e9
    ? `${(n / 1e9).toFixed(2)} B`
    : n >= 1e6
      ? `${(n / 1e6).toFixed(2)} M`
      : n >= 1e3
        ? `${(n / 1e3).toFixed(1)} k`
        : String(n);
export function read(model) {
  const meta = model.get("meta"),
    view = (name, T) => {
      const v = model.get(name);
      return new T(v.buffer.slice(v.byteOffset, v.byteOffset + v.byteLength));
    };
  return {
    ...meta,
    blocks: Math.max(0, ...meta.layers.map((l) => (l.block ?? -1) + 1)),
    curves: view("curves", Uint16Array),
    errors: view("errors", Float32Array),
  };
}

// ---- the panel
async function render({ model, el, host }) {
  let data = read(model),
    st = model.get("state"),
    plan = {},
    focus = -1,
    hover = -1,
    measure = "",
    raf = 0;
  const controls =
    host && model.get("controls") ? await host.getModel(model.get("controls")) : null;
  const { send, slide, heard, stop } = line(controls, (on) =>
    root.classList.toggle("qlab-stale", on),
  );
  const names = ["kind", "rank", "scale", "dropout", "num_layers", "init", "rslora", "keys"];
  const adopt = () => {
    plan = { ...Object.fromEntries(names.map((k) => [k, st[k]])), on: [...st.on], dtype: st.dtype };
  };
  adopt();
  /** Changes the adapter here at once, and in the kernel soon. */
  function set(change) {
    Object.assign(plan, change);
    st = { ...st, error: "" };
    slide({ op: "set", config: Object.fromEntries(names.map((k) => [k, plan[k]])) });
    later();
  }
  function toggle(list) {
    const on = [...plan.on],
      to = !list.every((i) => on[i]);
    for (const i of list) on[i] = to;
    if (on.some(Boolean)) set({ on, keys: keysOf(data, on) });
  }

  // skeleton of the panel
  const title = h("div", { className: "qlab-title" }),
    note = h("div", { className: "qlab-note" }),
    stale = h(
      "div",
      { className: "qlab-stale-note", role: "alert" },
      "Kernel not connected: run this cell again.",
    );
  /** A number that is taken on Enter (which JupyterLab would swallow) and on leaving, once. */
  function number(name, step, min, pick) {
    const e = h("input", { type: "number", step, min, className: `qlab-number qlab-${name}` });
    e.setAttribute("aria-label", name);
    e.oninput = () => {
      e.taken = null;
    };
    e.onchange = () => {
      if (e.taken === e.value) return;
      e.taken = e.value;
      if (e.value !== "" && Number.isFinite(+e.value)) pick(+e.value);
    };
    e.onkeydown = (key) => {
      if (key.key === "Enter") {
        key.stopPropagation();
        e.onchange();
      }
    };
    e.onblur = () => later();
    return e;
  }
  const choose = (list, pick) => {
    const e = h(
      "select",
      {},
      ...list.map(([name, text]) => h("option", { value: name, title: text }, name)),
    );
    e.onchange = () => pick(e.value);
    return e;
  };
  const kind = choose(data.kinds, (v) => set({ kind: v })),
    init = choose(data.inits, (v) => set({ init: v }));
  const rank = stepper("rank", (v) => set({ rank: v })),
    free = number("rank-entry", 1, 1, (v) => set({ rank: Math.max(1, Math.round(v)) }));
  const scale = number("scale", "any", 0, (v) => set({ scale: v })),
    alpha = number("alpha", "any", 0, (v) =>
      set({ scale: v / (plan.rslora ? Math.sqrt(plan.rank) : plan.rank) }),
    );
  const dropout = number("dropout", 0.05, 0, (v) => set({ dropout: v })),
    rslora = h("input", { type: "checkbox", onchange: () => set({ rslora: rslora.checked }) });
  const last = h("input", {
      type: "range",
      min: 1,
      step: 1,
      max: Math.max(1, data.blocks),
      className: "qlab-blocks",
    }),
    lastText = h("output");
  last.setAttribute("aria-label", "blocks with adapters, counted from the last");
  last.oninput = () => set({ num_layers: +last.value === data.blocks ? -1 : +last.value });
  const shown = h(
    "select",
    { className: "qlab-measure" },
    ...Object.entries(SHOWN).map(([k, v]) => h("option", { value: k }, v)),
  );
  shown.onchange = () => {
    measure = shown.value;
    later();
  };
  const svg = s("svg", {
      class: "qlab-map",
      role: "img",
      tabindex: 0,
      "data-lm-suppress-shortcuts": "true",
    }),
    plot = s("svg", { class: "qlab-spectrum", role: "img" }),
    words = h("div", { className: "qlab-words" });
  const legend = h("div", { className: "qlab-legend" }),
    detail = h("div", { className: "qlab-detail" }),
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
    button = (text, op) => h("button", { type: "button", onclick: () => send({ op }) }, text);
  const work = button("measure starts on text", "measure"),
    cancel = button("cancel", "cancel"),
    reset = button("reset to the start", "reset");
  const root = h(
    "div",
    { className: "qlab qlab-adapter" },
    title,
    stale,
    h(
      "div",
      { className: "qlab-controls" },
      label("kind", kind),
      h(
        "div",
        { className: "qlab-field" },
        h("span", {}, "rank"),
        h("div", { className: "qlab-row" }, rank.el, free),
      ),
      h(
        "div",
        { className: "qlab-field" },
        h("span", {}, "scale · alpha"),
        h("div", { className: "qlab-row" }, scale, h("span", {}, "·"), alpha),
      ),
      label("start", init),
      label("dropout", dropout),
      h(
        "label",
        { className: "qlab-field" },
        h("span", {}, "blocks, from the last"),
        h("div", { className: "qlab-row" }, last, lastText),
      ),
      h(
        "label",
        { className: "qlab-field", title: "alpha over the root of the rank instead of the rank" },
        h("span", {}, "rsLoRA"),
        rslora,
      ),
    ),
    h(
      "div",
      { className: "qlab-body" },
      h("div", { className: "qlab-picture" }, label("bars show", shown), svg, legend),
      h("div", { className: "qlab-side" }, plot, words),
    ),
    detail,
    note,
    table,
    h("div", { className: "qlab-code" }, code, copy),
    h(
      "div",
      { className: "qlab-actions" },
      ...(controls ? [work, reset] : []),
      bar,
      cancel,
      status,
    ),
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

  // the map: a row per role, a bar per block; its name switches the role on and off
  let cells = [],
    rows = [];
  const labelOf = (role) =>
    nameOf(
      rows.map(([r]) => r),
      role,
    ).replace(/^(self_attn|mlp|attention|model)\./, "");
  function layout() {
    const W = Math.max(280, svg.parentNode.clientWidth || 640),
      roles = new Map();
    data.layers.forEach((l, i) => {
      if (data.kinds.some((k) => k[2].includes(l.kind)))
        (roles.get(l.role) || roles.set(l.role, []).get(l.role)).push(i);
    });
    rows = [...roles];
    const H = rows.length > 12 ? 20 : 25,
      left = Math.max(122, ...rows.map(([role]) => 30 + 6.4 * labelOf(role).length)),
      step = (W - left - 4) / Math.max(1, data.blocks);
    svg.setAttribute("width", W);
    svg.setAttribute("height", rows.length * H + 14);
    svg.replaceChildren();
    cells = [];
    rows.forEach(([role, list], r) => {
      const name = s("text", {
        x: left - 8,
        y: r * H + H - 6,
        "text-anchor": "end",
        class: "qlab-role",
        tabindex: 0,
        role: "checkbox",
        "data-lm-suppress-shortcuts": "true",
      });
      const flip = (e) => {
        e.stopPropagation();
        toggle(list);
      };
      name.onclick = flip;
      name.onkeydown = (e) => {
        if (e.key === " " || e.key === "Enter") {
          e.preventDefault();
          flip(e);
        }
      };
      svg.append(
        name,
        s("line", {
          x1: left,
          x2: W,
          y1: r * H + H - 1.5,
          y2: r * H + H - 1.5,
          class: "qlab-base",
        }),
      );
      rows[r].name = name;
      for (const i of list) {
        const outside = data.layers[i].block === null,
          w = outside ? 16 : Math.max(1, step - (step > 6 ? 2 : step > 3 ? 1 : 0.3)),
          x = left + (outside ? 0 : data.layers[i].block * step);
        cells[i] = {
          x,
          y: r * H,
          w,
          H,
          whole: s("rect", { x, y: r * H + 3, width: w, height: H - 5, class: "qlab-cell" }),
          rect: s("rect", { x, width: w, rx: w > 5 ? 1.5 : 0, class: "qlab-bar" }),
        };
        svg.append(cells[i].whole, cells[i].rect);
      }
    });
    if (data.blocks)
      for (const b of [0, Math.floor((data.blocks - 1) / 2), data.blocks - 1]) {
        const t = s("text", {
          x: left + (b + 0.5) * step,
          y: rows.length * H + 11,
          "text-anchor": "middle",
          class: "qlab-axis",
        });
        t.textContent = b;
        svg.append(t);
      }
    svg.append((ring = s("rect", { class: "qlab-ring", visibility: "hidden" })));
  }
  let ring;
  const pointed = (e) => {
    const box = svg.getBoundingClientRect(),
      x = e.clientX - box.left,
      y = e.clientY - box.top;
    return cells.findIndex(
      (c) => c && x >= c.x - 1 && x <= c.x + c.w + 1 && y >= c.y && y < c.y + c.H,
    );
  };
  svg.onpointermove = (e) => {
    const i = pointed(e);
    if (i !== hover) {
      hover = i;
      later();
    }
  };
  svg.onpointerleave = () => {
    hover = -1;
    later();
  };
  svg.onclick = (e) => {
    const i = pointed(e);
    if (i >= 0) {
      focus = i;
      later();
    }
  };
  svg.addEventListener("keydown", (e) => {
    const d = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -1, ArrowDown: 1 }[e.key];
    if (!d || e.target !== svg) return;
    e.preventDefault();
    const r = Math.max(
        0,
        rows.findIndex(([, l]) => l.includes(focus)),
      ),
      list = rows[r][1],
      n = Math.max(0, list.indexOf(focus));
    if (/Left|Right/.test(e.key)) focus = list[Math.min(list.length - 1, Math.max(0, n + d))];
    else {
      const other = rows[Math.min(rows.length - 1, Math.max(0, r + d))][1];
      focus = other[Math.min(n, other.length - 1)];
    }
    later();
  });

  // painting
  const usable = () =>
    measure
      ? measure
      : st.init !== "default" && known(st.init)
        ? st.init
        : known("qera")
          ? "qera"
          : "weight";
  const known = (name) => data.layers.some((_, i) => Number.isFinite(curve(data, name, i)[0]));
  const short = (i) =>
    data.layers[i].path
      .replace(/^model\./, "")
      .replace(/layers\./, "")
      .replace(/self_attn\./, "");
  const noiseOf = (i) => data.noise[data.layers[i].shape.slice(-2).join(" ")] ?? [[], []];
  function paint() {
    const now = totals(data, plan),
      what = usable(),
      most = widest(data, plan),
      bytes = now.size * st.itemsize,
      state = now.size * st.optimizer[1];
    title.replaceChildren(
      h("strong", {}, data.name),
      h("span", {}, st.storage),
      h("span", { className: "qlab-size" }, h("b", {}, count(now.size)), " trainable"),
      h("span", {}, `${(100 * now.share).toFixed(2)} % of the model`),
      h("span", {}, `${now.layers} layers`),
      h(
        "span",
        { title: `adapter ${gb(bytes)}, gradients ${gb(bytes)}, ${st.optimizer[0]} ${gb(state)}` },
        `adapter ${gb(bytes)} + gradients ${gb(bytes)} + ${st.optimizer[0]} ${gb(state)} = `,
        h("b", {}, gb(2 * bytes + state)),
      ),
    );
    rank.set(
      [...new Set([...POWERS.filter((p) => p <= most), plan.rank])].sort((a, b) => a - b),
      plan.rank,
    );
    const put = (e, v) => {
      if (e.getRootNode().activeElement !== e) e.value = v;
    };
    free.max = most;
    put(free, plan.rank);
    put(scale, +plan.scale.toPrecision(6));
    put(alpha, +alphaOf(plan).toPrecision(6));
    put(dropout, plan.dropout);
    kind.value = plan.kind;
    init.value = plan.init;
    rslora.checked = plan.rslora;
    shown.value = what;
    [...init.options].forEach((o) => (o.disabled = o.value !== "default" && !!st.obstacle));
    put(last, plan.num_layers < 0 ? data.blocks : plan.num_layers);
    lastText.textContent = `${plan.num_layers < 0 ? data.blocks : plan.num_layers} of ${data.blocks}`;
    svg.classList.toggle("qlab-old", st.stale);
    plot.classList.toggle("qlab-old", st.stale);
    plot.parentNode.hidden = shown.closest("label").hidden = !!st.obstacle;
    rows.forEach(({ 0: role, 1: list, name }) => {
      const n = list.filter((i) => isOn(data, plan, i)).length,
        named = list.every((i) => plan.on[i]),
        mark = named ? "☑" : list.some((i) => plan.on[i]) ? "◪" : "☐";
      name.textContent = `${mark} ${labelOf(role)}`;
      name.setAttribute("aria-checked", named ? "true" : mark === "◪" ? "mixed" : "false");
      name.classList.toggle("off", !n);
    });
    data.layers.forEach((_, i) => {
      const c = cells[i];
      if (!c) return;
      const v = atRank(data.grid, curve(data, what, i), plan.rank),
        on = isOn(data, plan, i),
        t = Number.isFinite(v) ? v : 0,
        tall = Math.max(on ? 1.5 : 0, (c.H - 5) * t);
      c.whole.classList.toggle("on", on);
      c.rect.classList.toggle("off", !on);
      c.rect.setAttribute("y", c.y + c.H - 2 - tall);
      c.rect.setAttribute("height", tall);
      c.rect.setAttribute("fill", `var(--k${Math.round(15 * t)})`);
    });
    const f =
      hover >= 0
        ? hover
        : focus >= 0
          ? focus
          : data.layers.findIndex((_, i) => isOn(data, plan, i) && cells[i]);
    if (f >= 0 && cells[f]) {
      const c = cells[f];
      for (const [k, v] of Object.entries({
        x: c.x - 1.5,
        y: c.y + 1,
        width: c.w + 3,
        height: c.H - 1,
        visibility: "visible",
      }))
        ring.setAttribute(k, v);
    }
    const shares = data.layers
      .flatMap((_, i) =>
        isOn(data, plan, i) ? [atRank(data.grid, curve(data, what, i), plan.rank)] : [],
      )
      .filter(Number.isFinite)
      .sort((a, b) => a - b);
    const middle = shares.length ? shares[Math.floor(shares.length / 2)] : NaN;
    svg.setAttribute(
      "aria-label",
      `${SHOWN[what]} at rank ${plan.rank}: median ${percent(middle)} of ${shares.length} layers`,
    );
    const hints = [
      shares.length
        ? `rank ${plan.rank}: median ${percent(middle)} of ${shares.length} layers; a full bar is 100 %`
        : "outlined: has an adapter",
      "click a name to switch the role",
      ...(st.stale ? ["dimmed: measured for another storage"] : []),
    ];
    legend.replaceChildren(h("span", {}, ...hints.map((t) => h("span", {}, t))));
    paintSpectrum(f);
    paintDetail(f);
    paintTable(what);
    code.textContent = codeLine(data, plan);
    note.textContent =
      st.obstacle ||
      (what === "weight"
        ? "Without data, recovered weight error near the noise curve is no structure, and says little about the output."
        : "Output error is judged on text that the start has not seen; layers count alone, not their sum.");
    work.hidden = !!st.obstacle || known("qera");
    reset.hidden = !st.origin;
    const p = st.progress;
    bar.hidden = cancel.hidden = !p || !controls;
    if (p) {
      bar.max = p[2];
      bar.value = p[1];
    }
    status.textContent = st.error
      ? `✕ ${st.error}`
      : p
        ? p[0]
        : st.origin
          ? `trained: ${st.origin}`
          : "";
    status.classList.toggle("error", !!st.error);
  }
  function paintSpectrum(i) {
    const W = Math.max(220, plot.parentNode.clientWidth || 300),
      H = 150,
      left = 34,
      base = H - 18,
      top = 8;
    plot.setAttribute("width", W);
    plot.setAttribute("height", H);
    plot.replaceChildren();
    const found = i < 0 ? [] : curve(data, "singular", i).filter(Number.isFinite),
      noise = i < 0 ? [] : noiseOf(i)[0];
    if (!found.length) {
      words.textContent = st.progress
        ? "measuring…"
        : st.obstacle
          ? ""
          : "no quantization error measured in this layer";
      plot.setAttribute("aria-label", "no spectrum");
      return;
    }
    const end = data.grid[found.length - 1],
      high = Math.max(found[0], noise[0] ?? 0) * 1.05,
      X = (r) => left + ((W - left - 6) * Math.log2(r)) / Math.log2(Math.max(2, end)),
      Y = (v) => base - ((base - top) * v) / high;
    const path = (values, n = values.length) =>
      values
        .slice(0, n)
        .map((v, k) => `${k ? "L" : "M"}${X(data.grid[k]).toFixed(1)},${Y(v).toFixed(1)}`)
        .join("");
    const cut = X(Math.min(end, plan.rank)),
      put = (tag, attrs, text) => {
        const e = s(tag, attrs);
        if (text) e.textContent = text;
        plot.append(e);
      };
    put("rect", {
      x: left,
      y: top,
      width: Math.max(0, cut - left),
      height: base - top,
      class: "qlab-cut",
    });
    put("path", { d: `${path(found)}L${X(end)},${base}L${left},${base}Z`, class: "qlab-area" });
    put("path", { d: path(noise, found.length), class: "qlab-noise" });
    put("path", { d: path(found), class: "qlab-line" });
    put("line", { x1: cut, x2: cut, y1: top, y2: base, class: "qlab-cutline" });
    put("line", { x1: left, x2: W - 6, y1: base, y2: base, class: "qlab-base" });
    for (const r of data.grid.filter(
      (r) => Number.isInteger(Math.log2(r)) && r <= end && (end < 64 || Math.log2(r) % 2 === 0),
    ))
      put(
        "text",
        { x: X(r), y: H - 5, "text-anchor": X(r) > W - 20 ? "end" : "middle", class: "qlab-axis" },
        r,
      );
    put("text", { x: 2, y: top + 8, class: "qlab-axis" }, num(found[0]));
    put(
      "text",
      { x: Math.min(cut + 4, W - 50), y: top + 9, class: "qlab-axis" },
      `rank ${plan.rank}`,
    );
    put(
      "text",
      {
        x: W - 8,
        y: Math.max(top + 22, Y(found[Math.floor(found.length * 0.55)]) - 8),
        "text-anchor": "end",
        class: "qlab-axis",
      },
      "dashed: white noise",
    );
    const share = (name) => atRank(data.grid, curve(data, name, i), plan.rank),
      white = atRank(data.grid, noiseOf(i)[1], plan.rank);
    const outputs = ["residual", "diagonal", "qera"].filter((n) => Number.isFinite(share(n)));
    plot.setAttribute(
      "aria-label",
      `singular values of the error of ${data.layers[i].path}; rank ${plan.rank} takes ${percent(share("weight"))} of its square, white noise ${percent(white)}`,
    );
    swap(
      words,
      "",
      h(
        "div",
        {},
        h("b", {}, short(i)),
        `: singular values of W−Ŵ, over ‖W−Ŵ‖${data.layers[i].kind === "switch" ? ", of a typical expert" : ""}`,
      ),
      h(
        "div",
        {},
        `rank ${plan.rank} takes `,
        h("b", {}, percent(share("weight"))),
        ` of the squared weight error; white noise would give ${percent(white)}`,
      ),
      ...(outputs.length
        ? [
            h(
              "div",
              {},
              "of the output error, held out: ",
              ...outputs.flatMap((n, k) => [
                k ? " · " : "",
                `${n} `,
                h("b", {}, percent(share(n))),
              ]),
            ),
          ]
        : []),
    );
  }
  function paintDetail(i) {
    if (i < 0) {
      swap(detail, "", h("p", { className: "qlab-hint" }, "No layer has an adapter."));
      return;
    }
    const l = data.layers[i],
      on = isOn(data, plan, i),
      size = sizeOf(data, plan, i),
      fact = (k, v) => h("span", {}, `${k} `, h("b", {}, v));
    const flip = h(
      "button",
      {
        type: "button",
        disabled: !data.kinds.find((k) => k[0] === plan.kind)[2].includes(l.kind),
        onclick: () => {
          focus = i;
          toggle([i]);
        },
      },
      plan.on[i] ? "take this layer out" : "adapt this layer",
    );
    swap(
      detail,
      `${i} ${on}`,
      h(
        "div",
        { className: "qlab-facts" },
        h("strong", {}, l.path),
        h("span", {}, l.shape.join(" × ")),
        fact("adapter", on ? `${count(size)} numbers, ${gb(size * st.itemsize)}` : "none"),
        fact("weight error", num(data.errors[i])),
        ...(l.tied ? [h("span", {}, "also the output head")] : []),
        flip,
      ),
    );
  }
  function paintTable(what) {
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
                ...[
                  "layer",
                  "adapter",
                  "weight error",
                  "recovered, no data",
                  "noise",
                  "output, qera",
                ].map((t) => h("th", {}, t)),
              ),
              ...data.layers.map((l, i) =>
                h(
                  "tr",
                  {},
                  ...[
                    l.path,
                    isOn(data, plan, i) ? count(sizeOf(data, plan, i)) : "–",
                    num(data.errors[i]),
                    percent(atRank(data.grid, curve(data, "weight", i), plan.rank)),
                    percent(atRank(data.grid, noiseOf(i)[1], plan.rank)),
                    percent(atRank(data.grid, curve(data, "qera", i), plan.rank)),
                  ].map((t) => h("td", {}, t)),
                ),
              ),
            ),
          ]
        : []),
    );
  }
  table.addEventListener("toggle", () => later());

  // kernel → browser
  function onState() {
    const next = model.get("state"),
      all = heard(next.ack);
    st = next;
    if (all) adopt();
    later();
  }
  const onData = () => {
    data = read(model);
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
    ["curves", onData],
    ["errors", onData],
  ];
  for (const [name, f] of hears) model.on(`change:${name}`, f);
  const sized = new ResizeObserver(() => {
    layout();
    later();
  });
  sized.observe(svg.parentNode);
  sized.observe(plot.parentNode);
  layout();
  onState();
  send({ op: "hello" });
  return () => {
    for (const [name, f] of hears) model.off(`change:${name}`, f);
    sized.disconnect();
    stop();
    cancelAnimationFrame(raf);
  };
}
export default { render };
