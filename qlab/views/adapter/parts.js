// The parts of the adapter panel around its pictures, each painted from `panel` alone.
const NOTES = {
  weight:
    "Without data, recovered weight error near the noise curve is no structure, and says little about the output.",
  output:
    "Output error is measured on text that the initialization has not seen; layers count alone, not their sum.",
};

function statusText({ error, progress, origin }) {
  if (error) return `✕ ${error}`;
  if (progress) return progress[0];
  return origin ? `trained: ${origin}` : "";
}

function paintTitle(title, { data, plan, state }) {
  const { size, share, layers } = totals(data, plan);
  const [optimizer, perParameter] = state.optimizer;
  const bytes = size * state.itemsize;
  const moments = size * perParameter;
  const adapter = gb(bytes);
  const parts = `adapter ${adapter} + gradients ${adapter} + ${optimizer} ${gb(moments)} = `;
  const explained = `adapter ${adapter}, gradients ${adapter}, ${optimizer} ${gb(moments)}`;
  title.replaceChildren(
    h("strong", {}, data.name),
    h("span", {}, state.storage),
    h("span", { className: "qlab-size" }, h("b", {}, count(size)), " trainable"),
    h("span", {}, `${(100 * share).toFixed(2)} % of the model`),
    h("span", {}, `${layers} layers`),
    h("span", { title: explained }, parts, h("b", {}, gb(2 * bytes + moments))),
  );
}

/** Says the median of the bars, and what can be done with them. */
function paintLegend(legend, svg, { data, plan, state }, what) {
  const shares = adapted(data, plan).map((i) => reached(data, plan, what, i));
  const known = shares.filter(Number.isFinite).sort((a, b) => a - b);
  const middle = percent(known[Math.floor(known.length / 2)]);
  const median = `median ${middle} of ${known.length} layers`;
  svg.setAttribute("aria-label", `${SHOWN[what]} at rank ${plan.rank}: ${median}`);
  const hints = ["click a name to switch the role"];
  if (known.length) hints.unshift(`rank ${plan.rank}: ${median}; a full bar is 100 %`);
  else hints.unshift("outlined: has an adapter");
  if (state.stale) hints.push("dimmed: measured for another storage");
  legend.replaceChildren(h("span", {}, ...hints.map((text) => h("span", {}, text))));
}

/** One layer's numbers, and the button that gives it an adapter or takes it away. */
function paintDetail(detail, panel, i) {
  const { data, plan, state } = panel;
  if (i < 0)
    return swap(detail, "", h("p", { className: "qlab-hint" }, "No layer has an adapter."));
  const layer = data.layers[i];
  const on = isOn(data, plan, i);
  const size = sizeOf(data, plan, i);
  const fact = (name, v) => h("span", {}, `${name} `, h("b", {}, v));
  const [, , adapts] = data.kinds.find(([name]) => name === plan.kind);
  const onclick = () => {
    panel.focus(i);
    panel.toggle([i]);
  };
  const props = { type: "button", disabled: !adapts.includes(layer.kind), onclick };
  const flip = h("button", props, plan.on[i] ? "take this layer out" : "adapt this layer");
  const parameters = `${count(size)} parameters, ${gb(size * state.itemsize)}`;
  swap(
    detail,
    `${i} ${on}`,
    h(
      "div",
      { className: "qlab-facts" },
      h("strong", {}, layer.path),
      h("span", {}, layer.shape.join(" × ")),
      fact("adapter", on ? parameters : "none"),
      fact("weight error", num(data.errors[i])),
      ...(layer.tied ? [h("span", {}, "also the output head")] : []),
      flip,
    ),
  );
}

function paintTable(node, { data, plan }) {
  const head = ["layer", "adapter", "weight error", "recovered, no data", "noise", "output, qera"];
  foldedTable(node, head, () =>
    data.layers.map(({ path }, i) => [
      path,
      isOn(data, plan, i) ? count(sizeOf(data, plan, i)) : "–",
      num(data.errors[i]),
      percent(reached(data, plan, "weight", i)),
      percent(atRank(data.grid, noiseOf(data, i)[1], plan.rank)),
      percent(reached(data, plan, "qera", i)),
    ]),
  );
}
