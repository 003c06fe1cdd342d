// The parts of the quantizer panel around the picture, each painted from `panel` alone.

function paintTitle(title, { data }, { nbytes, bpw }) {
  const { free } = data.machine;
  let fits = ["yes", "✓ weights fit"];
  if (nbytes >= free) fits = ["no", "✕ does not fit"];
  else if (nbytes > 0.8 * free) fits = ["tight", "▲ tight"];
  const params =
    data.params >= 1e9
      ? `${(data.params / 1e9).toFixed(2)} B`
      : `${(data.params / 1e6).toFixed(1)} M`;
  title.replaceChildren(
    h("strong", {}, data.name),
    h("span", {}, `${params} weights`),
    h("span", { className: "qlab-size" }, `${gb(data.before)} → `, h("b", {}, gb(nbytes))),
    h("span", {}, h("b", {}, bpw.toFixed(2)), " bits/weight"),
    h("span", {}, `${(data.before / nbytes).toFixed(2)}× smaller`),
    h("span", { className: `qlab-fits ${fits[0]}` }, fits[1], ` (${gb(free)} free)`),
  );
}

function paintMemory(memory, { data }, { nbytes }) {
  const { total, free, label: machine } = data.machine;
  const largest = Math.max(total, nbytes, data.before);
  const share = (n) => `${(100 * n) / largest}%`;
  const ariaLabel = `weights ${gb(nbytes)} of ${gb(total)}`;
  const words = `memory: weights ${gb(nbytes)}, now ${gb(data.before)}; ${gb(free)} free on ${machine}`;
  memory.replaceChildren(
    h(
      "div",
      { className: "qlab-track", role: "img", ariaLabel },
      h("i", { className: "before", style: `width:${share(data.before)}` }),
      h("i", { className: "now", style: `width:${share(nbytes)}` }),
      h("i", { className: "limit", style: `left:${share(free)}` }),
    ),
    h("span", {}, words),
  );
}

function paintLegend(legend, [low, high], unit) {
  const now = `${low} ${high} ${unit}`;
  if (legend.was === now) return;
  legend.was = now;
  const step = (_, k) =>
    h("i", { style: `background:${ink(k / 19)};height:${2 + (10 * k) / 19}px` });
  legend.replaceChildren(
    h("span", {}, num(low)),
    h("span", { className: "qlab-ramp" }, ...Array.from({ length: 20 }, step)),
    h("span", {}, `${num(high)} ${unit}, log scale`),
    h("span", {}, "● override"),
    h("span", {}, "○ cannot be quantized"),
    h("span", {}, "outlined: exact"),
  );
}

/** The layers that cost most, and what was measured of them and of the whole. */
function paintWorst(side, panel, name, top, kl) {
  const { data } = panel;
  const judged = Object.fromEntries(data.judged);
  const item = ([i, v]) => {
    const { path } = data.layers[i];
    const alone = judged[path];
    return h(
      "li",
      {},
      h("button", { type: "button", onclick: () => panel.focus(i) }, shortPath(path)),
      h("b", {}, num(v)),
      ...(alone ? [h("div", {}, `measured alone: ${num(alone)}`)] : []),
    );
  };
  swap(
    side,
    "",
    h("h4", {}, `worst five by ${name}`),
    h("ol", {}, ...top.map(item)),
    h("p", {}, Number.isNaN(kl) ? "" : `all layers: ≈ ${num(kl)} nats/token`),
    ...judgedText(judged).map((line) => h("p", {}, line)),
  );
}

/** What is known of one layer under a row, as `[name, value, explanation]`. */
function factsOf({ data, plan }, i, row) {
  const facts = [];
  if (row < 0) facts.push(["not quantized", refusal(data, plan, i)]);
  else {
    const get = (measure) => value(data, measure, row, i);
    const error = get(REL);
    const depth = isExact(data, row, i) ? " exact" : ` ± ${num(get(SE))} sampled`;
    facts.push(
      ["weight error", Number.isNaN(error) ? "measuring…" : num(error) + depth],
      ["SQNR", `${(-20 * Math.log10(error)).toFixed(1)} dB`],
      ["largest", num(get(MAX)), "largest |W−Ŵ| seen"],
      ["ΔKL", `${num(get(KL))} nats`],
    );
  }
  facts.push(
    ["kurtosis", num(data.kurtosis[i]), "3 for a Gaussian; more means outliers"],
    ["size", gb(bytesOf(data, row, i))],
  );
  return facts.map(([name, v, title = ""]) => h("span", { title }, `${name} `, h("b", {}, v)));
}

/** One layer's numbers, and the buttons that give it bits unlike the rest. */
function paintDetail(detail, panel, i) {
  const { data, plan, measure } = panel;
  if (i < 0) {
    const hint = "Point at a bar for its numbers; click it to override the layer's bits.";
    return swap(detail, "", h("p", { className: "qlab-hint" }, hint));
  }
  const layer = data.layers[i];
  const row = rowOf(data, plan, i);
  const wanted = plan.overrides[i] ?? plan.row;
  const [mode, , group] = data.configs[wanted < 0 ? plan.row : wanted];
  const sameRole = (x, k) => (x.role === layer.role ? [k] : []);
  const peers = panel.all && layer.block !== null ? data.layers.flatMap(sameRole) : [i];
  const scale = panel.scale(measure);
  const button = (props, to, ...children) => {
    const onclick = () => {
      panel.focus(i);
      panel.override(peers, to);
    };
    return h("button", { type: "button", onclick, ...props }, ...children);
  };
  const choice = (bits) => {
    const r = panel.rowAt(mode, bits, group);
    const v = value(data, measure, r, i);
    const share = v > 0 ? height(scale, v) : 0;
    const style = `background:${ink(share)};height:${2 + 20 * share}px`;
    const props = {
      className: r === row ? "on" : "",
      disabled: !isLegal(data, r, i),
      title: `${labelOf([mode, bits, group])}: ${num(v)}`,
    };
    return button(props, r, h("i", { style }), String(bits));
  };
  const box = h("input", { type: "checkbox", checked: panel.all });
  box.onchange = () => panel.takeAll(box.checked);
  const whole = h("label", {}, box, ` all ${layer.role.split(".").pop()}`);
  const storage = row < 0 ? layer.stored || layer.dtype : labelOf(data.configs[row]);
  const like = { disabled: !peers.some((k) => k in plan.overrides) };
  swap(
    detail,
    `${[i, panel.all]}`,
    h(
      "div",
      { className: "qlab-facts" },
      h("strong", {}, layer.path),
      h("span", {}, `${layer.shape.join(" × ")} · ${storage}`),
      ...factsOf(panel, i, row),
    ),
    h(
      "div",
      { className: "qlab-choose" },
      h("span", {}, "bits"),
      ...panel.modeOf(mode)[2].map(choice),
      button({ className: wanted < 0 ? "on" : "" }, -1, "unquantized"),
      button(like, "default", "as the rest"),
      ...(layer.block === null ? [] : [whole]),
    ),
  );
}

/** The layers that are not quantized, with the reason. */
function paintSkipped(node, { data, plan }) {
  const out = data.layers.flatMap((_, i) => (rowOf(data, plan, i) < 0 ? [i] : []));
  node.hidden = !out.length;
  const bytes = (i) => data.layers[i].nbytes;
  const sum = out.reduce((all, i) => all + bytes(i), 0);
  const line = (i) =>
    h("li", {}, `${data.layers[i].path} · ${refusal(data, plan, i)} · ${gb(bytes(i))}`);
  swap(
    node,
    "",
    h("summary", {}, `${out.length} of ${data.L} layers are not quantized (${gb(sum)})`),
    ...(node.open ? [h("ul", {}, ...out.map(line))] : []),
  );
}

function paintTable(node, { data, plan }) {
  foldedTable(node, ["layer", "stored as", "weight error", "ΔKL nats", "size"], () =>
    data.layers.map(({ path }, i) => {
      const row = rowOf(data, plan, i);
      const size = gb(bytesOf(data, row, i));
      if (row < 0) return [path, "not quantized", "–", "–", size];
      const get = (measure) => num(value(data, measure, row, i));
      return [path, labelOf(data.configs[row]), get(REL), get(KL), size];
    }),
  );
}
