// The estimate panel: its controls, and what is sent to the kernel and shown. Formulas of the step
// are in the browser (answers.js), so a slider never waits for the kernel.
const LENGTHS = [
  64, 128, 256, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 16384, 32768, 65536, 131072,
];
const ROWS = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64];
const CHUNKS = [0, 128, 256, 512, 1024, 2048];

// Makes the controls. Each calls `on` with what a user wants.
function makeControls(on) {
  const element = (tag, name, more = {}) => h(tag, { className: `qlab-${name}`, ...more });
  const controls = {
    mode: element("select", "mode"),
    bits: stepper("bits", (v) => on.storage({ bits: v })),
    group: stepper("group size", (v) => on.storage({ group_size: v })),
    rank: dial("rank", (v) => on.set({ rank: v })),
    layers: dial("num_layers", (v) => on.set({ num_layers: v })),
    rows: dial("batch_size", (v) => on.set({ batch_size: v })),
    length: dial("max_seq_length", (v) => on.set({ max_seq_length: v })),
    checkpoint: element("input", "checkpoint", { type: "checkbox" }),
    chunk: element("select", "chunk"),
    optimizer: element("select", "optimizer"),
    place: element("select", "budget"),
    other: element("input", "other", {
      type: "text",
      size: 9,
      placeholder: "20 GB card",
      hidden: true,
    }),
  };
  const { mode, checkpoint, chunk, optimizer, place, other, rank } = controls;
  mode.onchange = () => on.storage({ mode: mode.value });
  checkpoint.onchange = () => on.set({ grad_checkpoint: checkpoint.checked });
  chunk.onchange = () => on.set({ loss_chunk: +chunk.value });
  optimizer.onchange = () => on.set({ optimizer: optimizer.value });
  place.onchange = () => on.place(place.value);
  other.onchange = () => {
    if (other.value.trim()) on.budget(other.value.trim());
  };
  // what is typed must not move the notebook's cells
  for (const e of [other, rank.el.lastChild])
    e.addEventListener("keydown", (event) => event.stopPropagation());
  return controls;
}

function layControls(x) {
  const field = (text, node, more = "") => {
    const made = label(text, node);
    made.className += more;
    return made;
  };
  return h(
    "div",
    { className: "qlab-controls" },
    label("weights as", x.mode),
    field("bits", x.bits.el, " qlab-if"),
    field("group size", x.group.el, " qlab-if"),
    label("rank", x.rank.el),
    label("adapted blocks", x.layers.el),
    label("batch_size", x.rows.el),
    label("max_seq_length", x.length.el),
    label("checkpoints", x.checkpoint),
    label("loss_chunk", x.chunk),
    label("optimizer", x.optimizer),
    label("judged by", h("div", {}, x.place, x.other)),
  );
}

// Makes the parts that are only shown, and the buttons under them.
function makeOutput(send) {
  const button = (text, more = {}) => h("button", { type: "button", ...more }, text);
  const out = {
    title: h("div", { className: "qlab-title" }),
    stale: h(
      "div",
      { className: "qlab-stale-note", role: "alert" },
      "Kernel not connected: run this cell again.",
    ),
    bar: h("div", { className: "qlab-stack", role: "img" }),
    ticks: h("div", { className: "qlab-scale" }),
    legend: h("div", { className: "qlab-parts" }),
    ways: h("div", { className: "qlab-ways" }),
    notes: h("div", { className: "qlab-note" }),
    code: h("pre"),
    copy: button("copy"),
    status: h("div", { className: "qlab-status", role: "status", "aria-live": "polite" }),
    meter: h("progress"),
    cancel: button("cancel"),
    probe: button("run one step", {
      className: "qlab-probe",
      title: "Runs one real training step of these settings and measures its peak",
    }),
  };
  out.copy.onclick = () =>
    navigator.clipboard?.writeText(out.code.textContent).then(() => {
      out.copy.textContent = "copied";
      setTimeout(() => (out.copy.textContent = "copy"), 1200);
    });
  out.cancel.onclick = () => send({ op: "cancel" });
  out.probe.onclick = () => send({ op: "measure" });
  return out;
}

async function render({ model, el, host }) {
  let data = read(model);
  let state = model.get("state");
  let choice = { ...state.choice };
  let budget = state.budget;
  let lastEstimate = null;
  let frame = 0;
  const kernel = host && model.get("controls") ? await host.getModel(model.get("controls")) : null;
  const { send, slide, isAnswered, stop } = line(kernel, (on) =>
    root.classList.toggle("qlab-stale", on),
  );
  const same = (a, b) => Object.keys(a).every((key) => a[key] === b[key]);
  const modeOf = (name) => data.modes.find((mode) => mode[0] === name);

  // ---- what a user wants
  const set = (change) => {
    choice = { ...choice, ...change };
    slide({ op: "set", choice });
    paintSoon();
  };
  // Another storage; bits and group size move to the nearest that its mode has.
  const setStorage = (change) => {
    const wanted = { ...choice, ...change };
    const mode = modeOf(wanted.mode);
    if (!mode) return set({ mode: "", bits: 0, group_size: 0 });
    const [name, , bits, groups, usualBits, usualGroup] = mode;
    set({
      mode: name,
      bits: snap(bits, wanted.bits || usualBits),
      group_size: snap(groups, wanted.group_size || usualGroup),
    });
  };
  // A budget of the menu, or the field for any other.
  const setPlace = (name) => {
    const offered = state.budgets.find((b) => b[0] === name);
    controls.other.hidden = !!offered;
    if (!offered) return controls.other.focus();
    budget = offered;
    send({ op: "budget", name });
    paintSoon();
  };
  const controls = makeControls({
    set,
    storage: setStorage,
    place: setPlace,
    budget: (name) => send({ op: "budget", name }),
  });
  const out = makeOutput(send);
  const probe = kernel && data.loaded ? [out.probe] : [];
  const root = h(
    "div",
    { className: "qlab qlab-estimate" },
    out.title,
    out.stale,
    layControls(controls),
    out.bar,
    out.ticks,
    out.legend,
    out.ways,
    out.notes,
    h("div", { className: "qlab-code" }, out.code, out.copy),
    h("div", { className: "qlab-actions" }, ...probe, out.meter, out.cancel, out.status),
  );
  el.replaceChildren(root);
  if (!kernel) controls.other.remove();

  // ---- what is shown
  function paint() {
    const known = state.known && same(choice, state.choice);
    const now = known ? state.known : estimate(data, choice);
    paintStorage();
    paintSettings();
    root.classList.toggle("qlab-wait", !now);
    out.code.textContent = codeOf(data, choice);
    lastEstimate = now || lastEstimate;
    if (lastEstimate) paintEstimate(lastEstimate, now);
    else out.title.replaceChildren(h("strong", {}, data.name));
    paintStatus(now);
  }
  function paintStorage() {
    const { mode, bits, group } = controls;
    const asIs = ["", data.stored ? "as stored" : "16 bits, as they are"];
    fill(mode, [
      ...(data.linked === "quantizer" ? [] : [asIs]),
      ...(data.stored ? [] : data.modes.map(([name, title]) => [name, name, title])),
    ]);
    mode.value = choice.mode;
    const found = modeOf(choice.mode);
    for (const field of root.querySelectorAll(".qlab-if")) field.hidden = !found;
    if (found) {
      bits.set(found[2], choice.bits);
      group.set(found[3], choice.group_size);
    }
  }
  function paintSettings() {
    const { rank, layers, rows, length, checkpoint, chunk, optimizer, place, other } = controls;
    const longest = data.context || MOST.max_seq_length;
    const lengths = [...LENGTHS.filter((n) => n < longest), longest];
    const blocks = Array.from({ length: data.blocks }, (_, i) => i + 1);
    rank.set(data.ranks, choice.rank, 1, 4096);
    layers.set(blocks, choice.num_layers, 1, data.blocks);
    rows.set(ROWS, choice.batch_size, 1, MOST.batch_size);
    length.set(lengths, choice.max_seq_length, 2, longest);
    checkpoint.checked = choice.grad_checkpoint;
    const chunks = [...new Set([...CHUNKS, choice.loss_chunk])].sort((a, b) => a - b);
    fill(
      chunk,
      chunks.map((n) => [n, n ? `${n} tokens` : "all at once"]),
    );
    chunk.value = choice.loss_chunk;
    fill(
      optimizer,
      data.optimizers.map((name) => [name, name]),
    );
    optimizer.value = choice.optimizer;
    const offered = state.budgets.map(([name]) => [name, name]);
    fill(place, [...offered, ...(kernel ? [["", "other…"]] : [])]);
    place.value = kernel && !other.hidden ? "" : budget[0];
  }
  function paintEstimate(e, known) {
    const free = budget[1];
    const { total, high } = ends(data, e);
    const { top, step } = axis(Math.min(high, 2 * total), free);
    const tracing = state.progress?.[0] === "tracing" && same(choice, state.choice);
    swap(out.title, "", ...headline(data, e, budget, { known, tracing }));
    out.bar.setAttribute("aria-label", barText(data, e, free));
    out.bar.replaceChildren(...barNodes(data, e, free, top));
    swap(out.ticks, "", ...axisNodes(free, top, step));
    swap(out.legend, "", ...legendNodes(data, e));
    paintWays(verdict(data, e, budget), free, known);
  }
  function paintWays(judged, free, known) {
    const current = same(choice, state.choice) && budget[1] === state.budget[1];
    const changes = current && judged.word === "does not fit" ? state.changes : null;
    swap(
      out.ways,
      "",
      verdictNode(judged),
      ...(changes ? changeNodes(changes, set) : []),
      ...(known ? largestNodes(data, choice, free, set) : []),
    );
  }
  function paintStatus(now) {
    const [what, done, total] = state.progress ?? [];
    const working = !!state.progress;
    out.meter.hidden = out.cancel.hidden = !working || !kernel;
    if (working) {
      out.meter.max = total;
      if (done) out.meter.value = done;
      else out.meter.removeAttribute("value");
    }
    out.probe.disabled = what === "running one step";
    const waiting = kernel
      ? "reading this kind of step…"
      : "This page has no formula for these settings; open it in a notebook.";
    const busy = working ? `${what}…` : "";
    out.status.textContent = state.error || (now ? busy : waiting);
    out.status.classList.toggle("error", !!state.error);
    out.notes.textContent = state.notes.join(" ");
    out.notes.hidden = !state.notes.length;
  }
  const paintSoon = () => {
    frame ||= requestAnimationFrame(() => {
      frame = 0;
      paint();
    });
  };

  // ---- what the kernel says
  const onState = () => {
    const { other } = controls;
    state = model.get("state");
    data = read(model);
    // an older answer must not move a slider back that a user is moving
    if (isAnswered(state.ack)) {
      choice = { ...state.choice };
      budget = state.budget;
      if (other.value.trim() === budget[0]) {
        other.hidden = true;
        other.value = "";
      }
    }
    paintSoon();
  };
  const onData = () => {
    data = read(model);
    paintSoon();
  };
  const listeners = [
    ["state", onState],
    ["formulas", onData],
    ["tables", onData],
    ["states", onData],
    ["adapters", onData],
  ];
  for (const [name, listener] of listeners) model.on(`change:${name}`, listener);
  paint();
  send({ op: "hello" });
  return () => {
    send({ op: "bye" });
    for (const [name, listener] of listeners) model.off(`change:${name}`, listener);
    stop();
    cancelAnimationFrame(frame);
  };
}
export default { render };
