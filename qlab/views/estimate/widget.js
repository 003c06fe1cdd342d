// The estimate panel. Formulas of the step are in the browser, so a slider never waits for the kernel.
const LENGTHS = [
  64, 128, 256, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 16384, 32768, 65536, 131072,
];
const ROWS = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64],
  CHUNK = [0, 128, 256, 512, 1024, 2048];
const MOST = { max_seq_length: 131072, batch_size: 4096 };
/** A word for the eye and a mark that does not need colour. */
const WORDS = {
  fits: ["yes", "✓ fits"],
  tight: ["tight", "▲ tight"],
  "does not fit": ["no", "✕ does not fit"],
};

// ---- pure functions; each says what core/graph/formula.py, core/memory/estimate.py, core/machine.py and core/config/code.py say in Python
export const sizeText = (n) =>
  Math.abs(n) >= 1e9 ? `${(n / 1e9).toFixed(2)} GB` : `${(n / 1e6).toFixed(1)} MB`;
const sum = (list) => list.reduce((a, b) => a + b, 0);

/** Rows, positions with a target, positions, rank, tokens in a chunk of the loss, tokens in its last chunk. */
export function sizes(c) {
  const every = c.batch_size * (c.max_seq_length - 1),
    whole = !c.loss_chunk || c.loss_chunk >= every;
  return [
    c.batch_size,
    c.max_seq_length - 1,
    c.max_seq_length,
    c.rank,
    whole ? 1 : c.loss_chunk,
    whole ? 1 : ((every - 1) % c.loss_chunk) + 1,
  ];
}
/** The moment of the peak and the bytes of every part then, without the inputs. */
export function peak(f, values, counts, phases) {
  const terms = f.products.map((row) => row.reduce((a, e, i) => a * values[i] ** e, 1));
  const dot = (row) => {
    let a = 0;
    for (let i = 0; i < row.length; i++) a += row[i] * terms[i];
    return a;
  };
  let most = -1,
    best = null;
  phases.forEach((moment, i) => {
    const more = f.slopes.map((kind, k) =>
      kind[i].map((row) => (counts[k] - f.blocks[k]) * dot(row)),
    );
    for (const rows of f.phases[i]) {
      const parts = rows.map((row, p) => dot(row) + sum(more.map((m) => m[p]))),
        total = sum(parts);
      if (total > most) {
        most = total;
        best = { moment, parts: parts.map((n) => Math.max(n, 0)) };
      }
    }
  });
  return best;
}
const rowOf = (data, c) =>
  data.configs.findIndex(([m, b, g]) => m === c.mode && b === c.bits && g === c.group_size);
/** What a choice needs, or null where its kind of step has not been read. */
export function estimate(data, c) {
  const row = rowOf(data, c),
    kind = data.kinds[row]?.[c.num_layers - 1],
    r = data.ranks.indexOf(c.rank),
    o = data.optimizers.indexOf(c.optimizer);
  const several = c.loss_chunk
    ? Math.min(Math.ceil((c.batch_size * (c.max_seq_length - 1)) / c.loss_chunk), data.chunks)
    : 0;
  const f =
    kind &&
    data.formulas[
      `${kind[0]} ${c.optimizer} ${+c.grad_checkpoint} ${several} ${+(c.grad_accumulation_steps > 1)}`
    ];
  if (!f || r < 0 || (data.context && c.max_seq_length > data.context)) return null;
  const { moment, parts } = peak(f, sizes(c), kind[1], data.phases),
    at = r * data.blocks + c.num_layers - 1;
  parts.splice(
    0,
    3,
    data.weights[row],
    data.adapters[at],
    data.states[o * data.ranks.length * data.blocks + at],
  );
  return { level: "formula", moment, band: data.band, parts: parts.map(Math.round) };
}
/** Total, and both ends of the band: it counts for what is not exact. */
export function ends(data, e) {
  const total = sum(e.parts),
    exact = sum(e.parts.filter((_, i) => data.parts[i][2])),
    end = (k) => Math.round(exact + k * (total - exact));
  return { total, low: end(e.band[0]), high: end(e.band[1]) };
}
export function verdict(data, e, [label, free, whole]) {
  const { total, high } = ends(data, e),
    margin = free - total,
    largest = data.parts[e.parts.indexOf(Math.max(...e.parts))][1],
    of = `${sizeText(total)} of ${sizeText(free)}`;
  if (high <= free) return { word: "fits", reason: `${of}, ${sizeText(margin)} to spare.` };
  if (total <= free)
    return { word: "tight", reason: `${of}, but it may take up to ${sizeText(high)}.` };
  const busy =
    total <= whole
      ? ` It would fit if other programs left the ${sizeText(whole)} of ${label} free.`
      : "";
  return {
    word: "does not fit",
    reason: `${sizeText(total)} are ${sizeText(-margin)} more than the ${sizeText(free)} at hand; most of it is ${largest}.${busy}`,
  };
}
/** The largest value of a setting that fits; 0 if none does, null if that is not known here. */
export function most(data, c, name, free) {
  const list = name === "rank" ? data.ranks : null,
    first = name === "max_seq_length" ? 2 : 1;
  const last = list
    ? list.length
    : name === "num_layers"
      ? data.blocks
      : name === "max_seq_length"
        ? data.context || MOST[name]
        : MOST[name];
  const at = (i) => (list ? list[i] : first + i),
    fits = (i) => {
      const e = estimate(data, { ...c, [name]: at(i) });
      return e ? sum(e.parts) <= free : null;
    };
  let low = 0,
    high = list ? last : last - first + 1;
  for (let ok = fits(0); ok !== true;) return ok === false ? 0 : null;
  while (high - low > 1) {
    const mid = (low + high) >> 1,
      ok = fits(mid);
    if (ok === null) return null;
    ok ? (low = mid) : (high = mid);
  }
  return at(low);
}
const py = (v) =>
  v === true ? "True" : v === false ? "False" : typeof v === "string" ? `'${v}'` : String(v);
const call = (name, fields, set) =>
  `qlab.${name}(${fields
    .map(([k, now, usual]) => [k, set[k] ?? now, usual])
    .filter(([, v, usual]) => v !== usual)
    .map(([k, v]) => `${k}=${v}`)
    .join(", ")})`;
export function codeOf(data, c) {
  const q = ([m, b, g]) => (m ? `qlab.QuantConfig("${m}", bits=${b}, group_size=${g})` : "None"),
    plain = q([c.mode, c.bits, c.group_size]);
  const own = data.own.map(([path, config]) => `"${path}": ${q(config ?? [""])}`).join(", "),
    width = data.rslora ? Math.sqrt : Number;
  const scale =
    c.rank === data.at.rank ? data.scale : (data.scale * width(data.at.rank)) / width(c.rank);
  const lora = {
    rank: py(c.rank),
    scale: Number.isInteger(scale) ? `${scale}.0` : String(scale),
    num_layers: c.num_layers === data.blocks ? "-1" : py(c.num_layers),
  };
  const train = Object.fromEntries(Object.entries(c).map(([k, v]) => [k, py(v)]));
  return [
    `quant = ${c.mode && own ? `qlab.QuantPlan(${plain}, {${own}})` : plain}`,
    `adapter = ${call("LoRAConfig", data.adapter, lora)}`,
    `train = ${call("TrainConfig", data.train, train)}`,
    "est = qlab.estimate(model, quant, adapter, train)",
  ].join("\n");
}
/** Right end of the axis and its step: the limit where it is near, else a round number above the peak. */
export function axis(high, free) {
  const top = high > free / 5 ? Math.max(high, free) * 1.03 : high * 1.25,
    ten = 10 ** Math.floor(Math.log10(top / 4));
  return { top, step: [1, 2, 5, 10].map((k) => k * ten).find((k) => top / k <= 7) };
}
export function read(model) {
  const view = (name) => {
      const v = model.get(name);
      return new Float64Array(v.buffer.slice(v.byteOffset, v.byteOffset + v.byteLength));
    },
    st = model.get("state");
  return {
    ...model.get("meta"),
    ...model.get("tables"),
    adapters: view("adapters"),
    states: view("states"),
    formulas: model.get("formulas"),
    band: st.band,
    own: st.own,
    scale: st.scale,
    at: st.choice,
  };
}

// ---- the panel
/** A slider over a few stops, with a field for any other whole number. */
function dial(name, onPick) {
  const input = h("input", { type: "range", min: 0, step: 1 }),
    field = h("input", { type: "number", step: 1 });
  input.setAttribute("aria-label", name);
  field.setAttribute("aria-label", `${name}, as a number`);
  input.classList.add(`qlab-${name.replace(/\W/g, "-")}`);
  let stops = [];
  input.oninput = () => {
    field.value = stops[+input.value];
    onPick(stops[+input.value]);
  };
  field.onchange = () => {
    const v = Math.min(+field.max, Math.max(+field.min, Math.round(+field.value) || 0));
    field.value = v;
    onPick(v);
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
      if (field.getRootNode().activeElement !== field && field.value !== String(now))
        field.value = now;
    },
  };
}

async function render({ model, el, host }) {
  let data = read(model),
    st = model.get("state"),
    c = { ...st.choice },
    budget = st.budget,
    shown = null,
    raf = 0;
  const controls =
    host && model.get("controls") ? await host.getModel(model.get("controls")) : null;
  const { send, slide, heard, stop } = line(controls, (on) =>
    root.classList.toggle("qlab-stale", on),
  );
  const same = (a, b) => Object.keys(a).every((k) => a[k] === b[k]),
    modeOf = (name) => data.modes.find((m) => m[0] === name);
  const set = (change) => {
    c = { ...c, ...change };
    slide({ op: "set", choice: c });
    later();
  };
  const storage = (mode, bits, group) => {
    const m = modeOf(mode);
    set(
      m
        ? { mode, bits: snap(m[2], bits || m[4]), group_size: snap(m[3], group || m[5]) }
        : { mode: "", bits: 0, group_size: 0 },
    );
  };

  const title = h("div", { className: "qlab-title" }),
    stale = h(
      "div",
      { className: "qlab-stale-note", role: "alert" },
      "Kernel not connected: run this cell again.",
    );
  const mode = h("select", { className: "qlab-mode" }),
    bits = stepper("bits", (v) => storage(c.mode, v, c.group_size)),
    group = stepper("group size", (v) => storage(c.mode, c.bits, v));
  const rank = dial("rank", (v) => set({ rank: v })),
    layers = dial("num_layers", (v) => set({ num_layers: v })),
    rows = dial("batch_size", (v) => set({ batch_size: v })),
    length = dial("max_seq_length", (v) => set({ max_seq_length: v }));
  const again = h("input", { type: "checkbox", className: "qlab-checkpoint" }),
    chunk = h("select", { className: "qlab-chunk" }),
    optimizer = h("select", { className: "qlab-optimizer" }),
    place = h("select", { className: "qlab-budget" }),
    other = h("input", {
      type: "text",
      size: 9,
      placeholder: "20 GB card",
      hidden: true,
      className: "qlab-other",
    });
  mode.onchange = () => storage(mode.value, c.bits, c.group_size);
  again.onchange = () => set({ grad_checkpoint: again.checked });
  chunk.onchange = () => set({ loss_chunk: +chunk.value });
  optimizer.onchange = () => set({ optimizer: optimizer.value });
  place.onchange = () => {
    const found = st.budgets.find((b) => b[0] === place.value);
    other.hidden = !!found;
    if (!found) return other.focus();
    budget = found;
    send({ op: "budget", name: found[0] });
    later();
  };
  other.onchange = () => {
    if (other.value.trim()) send({ op: "budget", name: other.value.trim() });
  };
  for (const e of [other, rank.el.lastChild])
    e.addEventListener("keydown", (ev) => ev.stopPropagation());

  const bar = h("div", { className: "qlab-stack", role: "img" }),
    ticks = h("div", { className: "qlab-scale" }),
    legend = h("div", { className: "qlab-parts" }),
    ways = h("div", { className: "qlab-ways" }),
    notes = h("div", { className: "qlab-note" });
  const code = h("pre"),
    copy = h("button", { type: "button" }, "copy"),
    status = h("div", { className: "qlab-status", role: "status", "aria-live": "polite" }),
    meter = h("progress"),
    cancel = h("button", { type: "button" }, "cancel"),
    probe = h(
      "button",
      {
        type: "button",
        className: "qlab-probe",
        title: "Runs one real training step of these settings and measures its peak",
      },
      "run one step",
    );
  copy.onclick = () =>
    navigator.clipboard?.writeText(code.textContent).then(() => {
      copy.textContent = "copied";
      setTimeout(() => (copy.textContent = "copy"), 1200);
    });
  cancel.onclick = () => send({ op: "cancel" });
  probe.onclick = () => send({ op: "measure" });
  const field = (text, node, cls = "") => {
    const f = label(text, node);
    f.className += cls;
    return f;
  };
  const root = h(
    "div",
    { className: "qlab qlab-estimate" },
    title,
    stale,
    h(
      "div",
      { className: "qlab-controls" },
      label("weights as", mode),
      field("bits", bits.el, " qlab-if"),
      field("group size", group.el, " qlab-if"),
      label("rank", rank.el),
      label("adapted blocks", layers.el),
      label("batch_size", rows.el),
      label("max_seq_length", length.el),
      label("checkpoints", again),
      label("loss_chunk", chunk),
      label("optimizer", optimizer),
      field("judged by", h("div", {}, place, other)),
    ),
    bar,
    ticks,
    legend,
    ways,
    notes,
    h("div", { className: "qlab-code" }, code, copy),
    h(
      "div",
      { className: "qlab-actions" },
      ...(controls && data.loaded ? [probe] : []),
      meter,
      cancel,
      status,
    ),
  );
  el.replaceChildren(root);
  const fill = (select, list) => {
    const now = JSON.stringify(list);
    if (select.was !== now) {
      select.was = now;
      select.replaceChildren(
        ...list.map(([v, text, tip]) => h("option", { value: v, title: tip || "" }, text)),
      );
    }
  };
  const modes = [
    ...(data.linked === "quantizer"
      ? []
      : [["", data.stored ? "as stored" : "16 bits, as they are"]]),
    ...(data.stored ? [] : data.modes.map((m) => [m[0], m[0], m[1]])),
  ];
  if (!controls) other.remove();

  function paint() {
    const now = st.known && same(c, st.choice) ? st.known : estimate(data, c),
      e = now || shown;
    fill(mode, modes);
    mode.value = c.mode;
    const m = modeOf(c.mode);
    for (const f of root.querySelectorAll(".qlab-if")) f.hidden = !m;
    if (m) {
      bits.set(m[2], c.bits);
      group.set(m[3], c.group_size);
    }
    const upTo = data.context || MOST.max_seq_length,
      lengths = LENGTHS.filter((n) => n < upTo);
    rank.set(data.ranks, c.rank, 1, 4096);
    layers.set(
      Array.from({ length: data.blocks }, (_, i) => i + 1),
      c.num_layers,
      1,
      data.blocks,
    );
    rows.set(ROWS, c.batch_size, 1, MOST.batch_size);
    length.set([...lengths, upTo], c.max_seq_length, 2, upTo);
    again.checked = c.grad_checkpoint;
    fill(
      chunk,
      [...new Set([...CHUNK, c.loss_chunk])]
        .sort((a, b) => a - b)
        .map((n) => [n, n ? `${n} tokens` : "all at once"]),
    );
    chunk.value = c.loss_chunk;
    fill(
      optimizer,
      data.optimizers.map((name) => [name, name]),
    );
    optimizer.value = c.optimizer;
    fill(place, [
      ...st.budgets.map(([name]) => [name, name]),
      ...(controls ? [["", "other…"]] : []),
    ]);
    place.value = controls && !other.hidden ? "" : budget[0];
    root.classList.toggle("qlab-wait", !now);
    code.textContent = codeOf(data, c);
    if (e) {
      shown = e;
      paintEstimate(e, now);
    } else title.replaceChildren(h("strong", {}, data.name));
    paintStatus(now);
  }
  function paintEstimate(e, known) {
    const { total, low, high } = ends(data, e),
      [name, free] = budget,
      v = verdict(data, e, budget),
      { top, step } = axis(Math.min(high, 2 * total), free),
      at = (n) => `${(100 * n) / top}%`;
    const [cls, word] = WORDS[v.word],
      sure = e.level === "measured",
      solid = (i) => sure || data.parts[i][2];
    const size =
        data.params >= 1e9
          ? `${(data.params / 1e9).toFixed(2)} B`
          : `${(data.params / 1e6).toFixed(1)} M`,
      tracing = st.progress?.[0] === "tracing" && same(c, st.choice);
    swap(
      title,
      "",
      h("strong", {}, data.name),
      h("span", {}, `${size} weights`),
      h(
        "span",
        { className: "qlab-size" },
        h("b", {}, sizeText(total)),
        " ",
        h(
          "span",
          { className: `qlab-level ${e.level}` },
          tracing ? `${e.level}, tracing…` : e.level,
        ),
      ),
      h(
        "span",
        {},
        sure ? `peak of a real step` : `${sizeText(low)} … ${sizeText(high)}, peak in ${e.moment}`,
      ),
      h("span", { className: `qlab-fits ${cls}` }, known ? word : "…", ` · ${name}`),
    );
    bar.setAttribute(
      "aria-label",
      `${sizeText(total)} of ${sizeText(free)}: ${data.parts.map(([n], i) => `${n} ${sizeText(e.parts[i])}`).join(", ")}`,
    );
    bar.replaceChildren(
      ...data.parts.map(([n, text], i) =>
        h(
          "i",
          {
            className: `qlab-part p${i}${solid(i) ? "" : " about"}`,
            title: `${n}: ${sizeText(e.parts[i])}, ${text}`,
            style: `left:${at(sum(e.parts.slice(0, i)))};width:${at(e.parts[i])}`,
          },
          e.parts[i] > 0.11 * top ? h("span", {}, n.replace("_", " ")) : "",
        ),
      ),
      ...(high > low
        ? [
            h("i", {
              className: "qlab-whisker",
              title: `between ${sizeText(low)} and ${sizeText(high)}`,
              style: `left:${at(low)};width:${at(Math.min(high, top) - low)}`,
            }),
          ]
        : []),
      ...(free <= top ? [h("i", { className: "qlab-limit", style: `left:${at(free)}` })] : []),
    );
    const marks = Array.from({ length: Math.floor(top / step) + 1 }, (_, k) => k * step),
      text = (n) =>
        step >= 1e9 || top >= 1e10 ? `${+(n / 1e9).toFixed(1)} GB` : `${Math.round(n / 1e6)} MB`;
    swap(
      ticks,
      "",
      ...marks.map((n) => h("span", { style: `left:${at(n)}` }, text(n))),
      free <= top
        ? h(
            "b",
            {
              className: free > 0.6 * top ? "left" : "",
              style: free > 0.6 * top ? `right:calc(100% - ${at(free)})` : `left:${at(free)}`,
            },
            `limit ${sizeText(free)}`,
          )
        : h("b", { style: "right:0" }, `limit ${sizeText(free)} →`),
    );
    swap(
      legend,
      "",
      ...data.parts.map(([n, about], i) =>
        h(
          "span",
          { title: about, className: e.parts[i] ? "" : "none" },
          h("i", { className: `qlab-part p${i}${solid(i) ? "" : " about"}` }),
          `${n.replace("_", " ")} `,
          h("b", {}, sizeText(e.parts[i])),
        ),
      ),
      h("em", {}, sure ? "solid: exact or measured" : "solid: exact · hatched: estimated"),
    );
    paintWays(v, free, known);
  }
  function paintWays(v, free, known) {
    const list =
        same(c, st.choice) && budget[1] === st.budget[1] && v.word === "does not fit"
          ? st.changes
          : null,
      out = [h("p", {}, h("b", {}, `${WORDS[v.word][1]}: `), v.reason)];
    if (list)
      out.push(
        h(
          "h4",
          {},
          list.length
            ? "what would make it fit, cheapest first"
            : "no single change makes it fit: combine some, or take a smaller model",
        ),
        h(
          "ol",
          {},
          ...list.map((x) =>
            h(
              "li",
              {},
              h(
                "button",
                { type: "button", className: "qlab-change", onclick: () => set(x.choice) },
                `${x.name} ${x.now} → ${x.then}`,
              ),
              ` ${sizeText(x.total)} · cost to quality: ${x.quality} · ${x.remark}`,
            ),
          ),
        ),
      );
    const found = known
      ? [
          ["max_seq_length", "max_seq_length"],
          ["batch_size", "batch_size"],
          ["rank", "rank"],
          ["num_layers", "adapted blocks"],
        ]
          .map(([k, text]) => [k, text, most(data, c, k, free)])
          .filter(([, , n]) => n)
      : [];
    if (found.length)
      out.push(
        h(
          "div",
          { className: "qlab-most" },
          h("span", {}, "largest that fits, all else as it is: "),
          ...found.map(([k, text, n]) =>
            h(
              "button",
              { type: "button", disabled: n === c[k], onclick: () => set({ [k]: n }) },
              `${text} ${n.toLocaleString("en").replace(/,/g, " ")}`,
            ),
          ),
        ),
      );
    swap(ways, "", ...out);
  }
  function paintStatus(now) {
    const p = st.progress,
      waiting =
        !now && !st.error
          ? controls
            ? "reading this kind of step…"
            : "This page has no formula for these settings; open it in a notebook."
          : "";
    meter.hidden = cancel.hidden = !p || !controls;
    if (p) {
      meter.max = p[2];
      if (p[1]) meter.value = p[1];
      else meter.removeAttribute("value");
    }
    probe.disabled = !!p && p[0] === "running one step";
    status.textContent = st.error || waiting || (p ? `${p[0]}…` : "");
    status.classList.toggle("error", !!st.error);
    notes.textContent = st.notes.join(" ");
    notes.hidden = !st.notes.length;
  }
  const onState = () => {
    st = model.get("state");
    data = read(model);
    if (heard(st.ack)) {
      c = { ...st.choice };
      budget = st.budget;
      if (other.value.trim() === budget[0]) {
        other.hidden = true;
        other.value = "";
      }
    }
    later();
  };
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
  const told = [
    ["state", onState],
    ["formulas", onData],
    ["tables", onData],
    ["states", onData],
    ["adapters", onData],
  ];
  for (const [name, f] of told) model.on(`change:${name}`, f);
  paint();
  send({ op: "hello" });
  return () => {
    send({ op: "bye" });
    for (const [name, f] of told) model.off(`change:${name}`, f);
    stop();
    cancelAnimationFrame(raf);
  };
}
export default { render };
