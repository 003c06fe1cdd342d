// The adapter panel. What every rank recovers is in the browser, so the rank slider never waits for the kernel.
const SETTINGS = ["kind", "rank", "scale", "dropout", "num_layers", "init", "rslora", "keys"];
const pick = (from) => Object.fromEntries(SETTINGS.map((name) => [name, from[name]]));

async function render({ model, el, host }) {
  const controls =
    host && model.get("controls") ? await host.getModel(model.get("controls")) : null;
  const kernel = line(controls, (on) => root.classList.toggle("qlab-stale", on));
  let measure = ""; // a name of SHOWN, once one was chosen
  let pointed = -1;
  let frame = 0;

  // what the parts see
  const panel = {
    data: read(model),
    state: model.get("state"),
    plan: {},
    focused: -1,
    /** Changes the adapter here at once, and in the kernel soon. */
    set(change) {
      Object.assign(panel.plan, change);
      panel.state = { ...panel.state, error: "" };
      kernel.slide({ op: "set", config: pick(panel.plan) });
      later();
    },
    /** Switches layers on; off if all of them are on. One layer at least stays. */
    toggle(list) {
      const on = [...panel.plan.on];
      const wanted = !list.every((i) => on[i]);
      for (const i of list) on[i] = wanted;
      if (on.some(Boolean)) panel.set({ on, keys: keysOf(panel.data, on) });
    },
    hover(i) {
      if (i === pointed) return;
      pointed = i;
      later();
    },
    focus(i) {
      panel.focused = i;
      later();
    },
    later: () => later(),
  };
  const later = () => {
    frame ||= requestAnimationFrame(() => {
      frame = 0;
      paint();
    });
  };
  function adopt() {
    const { on, dtype } = panel.state;
    panel.plan = { ...pick(panel.state), on: [...on], dtype };
  }
  adopt();

  // skeleton of the panel
  const box = (name, ...children) => h("div", { className: `qlab-${name}` }, ...children);
  const settings = adapterControls(panel);
  const map = recoveryMap(panel);
  const plot = s("svg", { class: "qlab-spectrum", role: "img" });
  const words = box("words");
  const measures = Object.entries(SHOWN).map(([k, v]) => h("option", { value: k }, v));
  const shown = h("select", { className: "qlab-measure" }, ...measures);
  shown.onchange = () => {
    measure = shown.value;
    later();
  };
  const shownField = label("bars show", shown);
  const side = box("side", plot, words);
  const title = box("title");
  const legend = box("legend");
  const detail = box("detail");
  const note = box("note");
  const table = h("details", { className: "qlab-table", ontoggle: later });
  const { code, el: codeBox } = codeBlock();
  const status = statusLine();
  const bar = h("progress");
  const button = (text, op) =>
    h("button", { type: "button", onclick: () => kernel.send({ op }) }, text);
  const work = button("measure starts on text", "measure");
  const cancel = button("cancel", "cancel");
  const reset = button("reset to the start", "reset");
  const root = h(
    "div",
    { className: "qlab qlab-adapter" },
    title,
    staleNote(),
    settings.el,
    box("body", box("picture", shownField, map.svg, legend), side),
    detail,
    note,
    table,
    codeBox,
    box("actions", ...(controls ? [work, reset] : []), bar, cancel, status),
  );
  setRamp(root);
  el.replaceChildren(root);

  /** The curve that the bars show: the chosen one, else the best that is known. */
  function usable() {
    const { data, state } = panel;
    if (measure) return measure;
    if (state.init !== "default" && isMeasured(data, state.init)) return state.init;
    return isMeasured(data, "qera") ? "qera" : "weight";
  }
  /** The layer whose details are shown. */
  function marked() {
    const { data, plan, focused } = panel;
    if (pointed >= 0) return pointed;
    if (focused >= 0) return focused;
    return data.layers.findIndex((_, i) => isOn(data, plan, i) && map.has(i));
  }
  function paint() {
    const { data, plan, state } = panel;
    const what = usable();
    const layer = marked();
    paintTitle(title, panel);
    settings.paint();
    shown.value = what;
    side.hidden = shownField.hidden = !!state.obstacle;
    map.paint(what, layer);
    paintLegend(legend, map.svg, panel, what);
    paintSpectrum(plot, words, panel, layer);
    paintDetail(detail, panel, layer);
    paintTable(table, panel);
    code.textContent = codeLine(data, plan);
    note.textContent = state.obstacle || NOTES[what === "weight" ? "weight" : "output"];
    work.hidden = !!state.obstacle || isMeasured(data, "qera");
    reset.hidden = !state.origin;
    showProgress(bar, cancel, controls && state.progress);
    status.textContent = statusText(state);
    status.classList.toggle("error", !!state.error);
  }

  // kernel → browser
  function onState() {
    panel.state = model.get("state");
    if (kernel.isAnswered(panel.state.ack)) adopt();
    later();
  }
  function onData() {
    panel.data = read(model);
    later();
  }
  const listeners = { state: onState, curves: onData, errors: onData };
  for (const [name, f] of Object.entries(listeners)) model.on(`change:${name}`, f);
  const sized = new ResizeObserver(() => {
    map.layout();
    later();
  });
  sized.observe(map.svg.parentNode);
  sized.observe(plot.parentNode);
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
