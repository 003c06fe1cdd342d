// The controls of the adapter panel: one for each setting, and what a change of it asks for.
const POWERS = [1, 2, 4, 8, 16, 32, 64, 128, 256];

/** A number that is taken on Enter (which JupyterLab would swallow) and on leaving, once. */
function entry(name, step, min, onPick, onLeave) {
  const e = h("input", { type: "number", step, min, className: `qlab-number qlab-${name}` });
  e.setAttribute("aria-label", name);
  let taken = null;
  e.oninput = () => (taken = null);
  e.onchange = () => {
    if (taken === e.value) return;
    taken = e.value;
    if (e.value !== "" && Number.isFinite(+e.value)) onPick(+e.value);
  };
  e.onkeydown = (event) => {
    if (event.key !== "Enter") return;
    event.stopPropagation();
    e.onchange();
  };
  e.onblur = onLeave;
  return e;
}

/** Shows a value, unless the user is at it. */
function put(input, v) {
  if (input.getRootNode().activeElement !== input) input.value = v;
}

/** @returns {{el, paint}} the row of controls, and what shows the present adapter in it. */
function adapterControls(panel) {
  const { data, set, later } = panel;
  const kind = menu(data.kinds, (v) => set({ kind: v }));
  const init = menu(data.inits, (v) => set({ init: v }));
  const rank = stepper("rank", (v) => set({ rank: v }));
  const pickRank = (v) => set({ rank: Math.max(1, Math.round(v)) });
  const free = entry("rank-entry", 1, 1, pickRank, later);
  const scale = entry("scale", "any", 0, (v) => set({ scale: v }), later);
  const pickAlpha = (v) => set({ scale: v / rankFactor(panel.plan) });
  const alpha = entry("alpha", "any", 0, pickAlpha, later);
  const dropout = entry("dropout", 0.05, 0, (v) => set({ dropout: v }), later);
  const rslora = h("input", { type: "checkbox" });
  rslora.onchange = () => set({ rslora: rslora.checked });
  const most = Math.max(1, data.blocks);
  const last = h("input", { type: "range", min: 1, step: 1, max: most, className: "qlab-blocks" });
  last.setAttribute("aria-label", "blocks with adapters, counted from the last");
  last.oninput = () => set({ num_layers: +last.value === data.blocks ? -1 : +last.value });
  const lastText = h("output");

  const row = (...children) => h("div", { className: "qlab-row" }, ...children);
  const field = (text, ...children) =>
    h("div", { className: "qlab-field" }, h("span", {}, text), row(...children));
  const rooted = label("rsLoRA", rslora);
  rooted.title = "alpha over the root of the rank instead of the rank";
  const el = h(
    "div",
    { className: "qlab-controls" },
    label("kind", kind),
    field("rank", rank.el, free),
    field("scale · alpha", scale, h("span", {}, "·"), alpha),
    label("start", init),
    label("dropout", dropout),
    label("blocks, from the last", row(last, lastText)),
    rooted,
  );

  function paint() {
    const { data, plan, state } = panel;
    const roomy = widest(data, plan);
    const ranks = new Set([...POWERS.filter((power) => power <= roomy), plan.rank]);
    rank.set(
      [...ranks].sort((a, b) => a - b),
      plan.rank,
    );
    free.max = roomy;
    put(free, plan.rank);
    put(scale, +plan.scale.toPrecision(6));
    put(alpha, +alphaOf(plan).toPrecision(6));
    put(dropout, plan.dropout);
    kind.value = plan.kind;
    init.value = plan.init;
    rslora.checked = plan.rslora;
    for (const option of init.options)
      option.disabled = option.value !== "default" && !!state.obstacle;
    const blocks = plan.num_layers < 0 ? data.blocks : plan.num_layers;
    put(last, blocks);
    lastText.textContent = `${blocks} of ${data.blocks}`;
  }
  return { el, paint };
}
