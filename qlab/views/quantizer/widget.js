// The quantizer panel. All slider positions are in the browser, so a slider never waits for the kernel.
async function render({ model, el, host }) {
  const controls =
    host && model.get("controls") ? await host.getModel(model.get("controls")) : null;
  const kernel = line(controls, (on) => root.classList.toggle("qlab-stale", on));
  let shownAs = "relative_error"; // a name of NAMES
  let fixed = true; // one scale for all slider positions
  let pointed = -1;
  let frame = 0;

  // what the parts see
  const panel = {
    data: read(model),
    plan: { row: 0, overrides: {} },
    focused: -1,
    all: false, // whether an override goes to all layers of the role
    get measure() {
      return shownAs === "kl_nats" ? KL : REL;
    },
    rowAt: (mode, bits, group) =>
      panel.data.configs.findIndex(([m, b, g]) => m === mode && b === bits && g === group),
    modeOf: (name) => panel.data.modes.find((mode) => mode[0] === name),
    scale: (measure) =>
      ((panel.data.scales ??= {})[measure] ??= scaleOf(panel.data, measure)),
    hover(i) {
      if (i !== pointed) change(() => (pointed = i));
    },
    focus: (i) => change(() => (panel.focused = i)),
    takeAll: (on) => change(() => (panel.all = on)),
    override(layers, row) {
      const { data, plan } = panel;
      const same = row === "default" || row === plan.row;
      for (const i of layers)
        if (same) delete plan.overrides[i];
        else plan.overrides[i] = row;
      const paths = layers.map((i) => data.layers[i].path);
      const config = row < 0 ? null : (data.configs[row] ?? row);
      kernel.send({ op: "override", paths, config });
      later();
    },
  };
  const change = (what) => {
    what();
    later();
  };
  const later = () => {
    frame ||= requestAnimationFrame(() => {
      frame = 0;
      paint();
    });
  };
  function pick(mode, bits, group) {
    const [, , allBits, groups] = panel.modeOf(mode);
    const row = panel.rowAt(mode, snap(allBits, bits), snap(groups, group));
    panel.plan.row = row;
    const [m, b, group_size] = panel.data.configs[row];
    kernel.slide({ op: "set", mode: m, bits: b, group_size });
    later();
  }
  const config = () => panel.data.configs[panel.plan.row];

  // skeleton of the panel
  const { data } = panel;
  const mode = menu(data.modes, (name) => pick(name, config()[1], config()[2]), {
    className: "qlab-mode",
  });
  const bits = stepper("bits", (v) => pick(mode.value, v, config()[2]));
  const group = stepper("group size", (v) => pick(mode.value, config()[1], v));
  const solver = menu(data.solvers, (name) => kernel.send({ op: "solver", solver: name }));
  const measures = Object.entries(NAMES).map(([k, v]) => h("option", { value: k }, v[0]));
  const shown = h("select", { className: "qlab-measure" }, ...measures);
  shown.onchange = () => {
    shownAs = shown.value;
    kernel.send({ op: "measure", measure: shownAs });
    later();
  };
  const free = h("button", {
    type: "button",
    className: "qlab-free",
    title: "One scale for all slider positions, or one that fits this position",
    onclick: () => change(() => (fixed = !fixed)),
  });
  const box = (name, ...children) => h("div", { className: `qlab-${name}` }, ...children);
  const map = errorMap(panel);
  const legend = h("span");
  const title = box("title");
  const side = box("worst");
  const detail = box("detail");
  const memory = box("memory");
  const note = box("note");
  const skipped = h("details", { className: "qlab-skipped", ontoggle: () => later() });
  const table = h("details", { className: "qlab-table", ontoggle: () => later() });
  const { code, el: codeBox } = codeBlock();
  const status = statusLine();
  const bar = h("progress");
  const button = (text, intent) =>
    h("button", { type: "button", onclick: () => kernel.send(intent) }, text);
  const compute = (what, text) => button(text, { op: "compute", what });
  const cancel = button("cancel", { op: "cancel" });
  const predict = compute("kl", "predict ΔKL");
  const work = [
    compute("exact", "measure exactly"),
    compute("plan", "measure true KL"),
    compute("layer_kl", "true KL of the worst"),
    predict,
  ];
  const fields = [
    label("mode", mode),
    label("bits", bits.el),
    label("group size", group.el),
    label("solver", solver),
    label("show", shown),
  ];
  const root = h(
    "div",
    { className: "qlab" },
    title,
    staleNote(),
    box("controls", ...fields),
    box("body", box("picture", map.svg, box("legend", legend, free)), side),
    detail,
    memory,
    note,
    skipped,
    table,
    codeBox,
    box("actions", ...(controls ? work : []), bar, cancel, status),
  );
  setRamp(root);
  el.replaceChildren(root);
  if (!controls) solver.closest("label").hidden = true;

  function paint() {
    const { data, plan, measure } = panel;
    const [name, unit] = NAMES[shownAs];
    const scale = fixed ? panel.scale(measure) : scaleOf(data, measure, plan);
    const now = totals(data, plan);
    const [m, b, g] = config();
    const [, , allBits, groups] = panel.modeOf(m);
    if (mode.value !== m) mode.value = m;
    bits.set(allBits, b);
    group.set(groups, g);
    if (shown.value !== shownAs) shown.value = shownAs;
    paintTitle(title, panel, now);
    paintMemory(memory, panel, now);
    const marked = pointed >= 0 ? pointed : panel.focused;
    map.paint(measure, scale, marked);
    const top = worst(data, plan, measure);
    const worstText = top.map(([i, v]) => `${data.layers[i].path} ${num(v)}`).join(", ");
    map.svg.setAttribute(
      "aria-label",
      `${name} of ${data.L} layers at ${m} ${b}-bit, group ${g}. Worst: ${worstText}`,
    );
    paintWorst(side, panel, name, top, now.kl);
    free.textContent = fixed ? "fit scale" : "fix scale";
    paintLegend(legend, scale, unit);
    paintDetail(detail, panel, marked);
    paintSkipped(skipped, panel);
    paintTable(table, panel);
    code.textContent = codeLine(data, plan, model.get("state").solver);
    note.textContent = noteText();
  }
  function noteText() {
    const { text } = panel.data;
    if (shownAs === "kl_nats" && text)
      return `Predicted ΔKL is an estimate for rounding to nearest, from one pass over ${text}; it ranks layers by their effect on the output.`;
    const hint = text || !controls ? "" : " Predict ΔKL for that.";
    return `Weight error says how far the weights move, not what that does to the output: do not rank layers by it.${hint}`;
  }

  // kernel → browser
  function onState() {
    const state = model.get("state");
    if (kernel.isAnswered(state.ack)) {
      const row = panel.rowAt(state.mode, state.bits, state.group_size);
      panel.plan = { row, overrides: { ...state.overrides } };
      shownAs = state.measure;
    }
    if (solver.value !== state.solver) solver.value = state.solver;
    panel.data.judged = state.totals;
    panel.data.text = state.calibration;
    showProgress(bar, cancel, state.progress);
    predict.hidden = !!state.calibration;
    status.textContent = state.error || (state.progress ? state.progress[0] : "");
    status.classList.toggle("error", !!state.error);
    later();
  }
  function onData() {
    const { judged, text } = panel.data;
    panel.data = { ...read(model), judged, text };
    later();
  }
  const listeners = { state: onState, values: onData, flags: onData, kurtosis: onData };
  for (const [name, f] of Object.entries(listeners)) model.on(`change:${name}`, f);
  const sized = new ResizeObserver(() => change(map.layout));
  sized.observe(map.svg.parentNode);
  map.layout();
  onState();
  kernel.send({ op: "hello" });
  return () => {
    for (const [name, f] of Object.entries(listeners)) model.off(`change:${name}`, f);
    sized.disconnect();
    kernel.stop();
    cancelAnimationFrame(frame);
  };
}
export default { render };
