// What the estimate panel answers without the kernel: pure functions, tested beside Python's.
// Each says in JavaScript what core/graph/formula.py, core/memory, core/machine.py and
// core/config/code.py say in Python.

// largest values that are tried where the model does not say one
const MOST = { max_seq_length: 131072, batch_size: 4096 };

export const sizeText = (n) =>
  Math.abs(n) >= 1e9 ? `${(n / 1e9).toFixed(2)} GB` : `${(n / 1e6).toFixed(1)} MB`;
const sum = (list) => list.reduce((a, b) => a + b, 0);

// ---- the peak of a step

// The quantities of a formula: rows, positions with a target, positions, rank, tokens in a chunk of
// the loss, tokens in its last chunk.
export function sizes(c) {
  const targets = c.batch_size * (c.max_seq_length - 1);
  const atOnce = !c.loss_chunk || c.loss_chunk >= targets;
  const chunk = atOnce ? 1 : c.loss_chunk;
  const last = atOnce ? 1 : ((targets - 1) % c.loss_chunk) + 1;
  return [c.batch_size, c.max_seq_length - 1, c.max_seq_length, c.rank, chunk, last];
}

// The moment of the peak and the bytes of every part then, without the inputs.
// values: what `sizes` returns; counts: blocks of each kind; phases: their names.
export function peak(formula, values, counts, phases) {
  const terms = formula.products.map((row) =>
    row.reduce((product, exponent, i) => product * values[i] ** exponent, 1),
  );
  const dot = (row) => {
    let total = 0;
    for (let i = 0; i < row.length; i++) total += row[i] * terms[i];
    return total;
  };
  let highest = -1;
  let best = null;
  phases.forEach((moment, i) => {
    // what the blocks add that the step of few blocks did not have
    const added = formula.slopes.map((kind, k) =>
      kind[i].map((row) => (counts[k] - formula.blocks[k]) * dot(row)),
    );
    for (const rows of formula.phases[i]) {
      const parts = rows.map((row, part) => dot(row) + sum(added.map((kind) => kind[part])));
      const total = sum(parts);
      if (total > highest) {
        highest = total;
        best = { moment, parts: parts.map((n) => Math.max(n, 0)) };
      }
    }
  });
  return best;
}

// The name under which Python sent a formula: `step_name` in core/panels/estimate.py.
function stepName(data, kind, c) {
  const targets = c.batch_size * (c.max_seq_length - 1);
  const chunks = c.loss_chunk ? Math.min(Math.ceil(targets / c.loss_chunk), data.chunks) : 0;
  const accumulates = +(c.grad_accumulation_steps > 1);
  return `${kind} ${c.optimizer} ${+c.grad_checkpoint} ${chunks} ${accumulates}`;
}

// What a choice needs, or null where its kind of step has not been read.
export function estimate(data, c) {
  const row = data.configs.findIndex(
    ([mode, bits, group]) => mode === c.mode && bits === c.bits && group === c.group_size,
  );
  const kind = data.kinds[row]?.[c.num_layers - 1];
  const rank = data.ranks.indexOf(c.rank);
  const optimizer = data.optimizers.indexOf(c.optimizer);
  const formula = kind && data.formulas[stepName(data, kind[0], c)];
  const tooLong = data.context && c.max_seq_length > data.context;
  if (!formula || rank < 0 || tooLong) return null;
  const { moment, parts } = peak(formula, sizes(c), kind[1], data.phases);
  // adapters is (ranks, blocks), states is (optimizers, ranks, blocks)
  const at = rank * data.blocks + c.num_layers - 1;
  const state = optimizer * data.ranks.length * data.blocks + at;
  parts.splice(0, 3, data.weights[row], data.adapters[at], data.states[state]);
  return { level: "formula", moment, band: data.band, parts: parts.map(Math.round) };
}

// Total, and both ends of the band, which counts for what is not exact.
export function ends(data, e) {
  const total = sum(e.parts);
  const exact = sum(e.parts.filter((_, i) => data.parts[i][2]));
  const end = (factor) => Math.round(exact + factor * (total - exact));
  return { total, low: end(e.band[0]), high: end(e.band[1]) };
}

export function verdict(data, e, [label, free, whole]) {
  const { total, high } = ends(data, e);
  const margin = free - total;
  const used = `${sizeText(total)} of ${sizeText(free)}`;
  if (high <= free) return { word: "fits", reason: `${used}, ${sizeText(margin)} to spare.` };
  if (total <= free)
    return { word: "tight", reason: `${used}, but it may take up to ${sizeText(high)}.` };
  const largest = data.parts[e.parts.indexOf(Math.max(...e.parts))][1];
  const excess = `${sizeText(-margin)} more than the ${sizeText(free)} at hand`;
  let reason = `${sizeText(total)} are ${excess}; most of it is ${largest}.`;
  if (total <= whole)
    reason += ` It would fit if other programs left the ${sizeText(whole)} of ${label} free.`;
  return { word: "does not fit", reason };
}

// The largest value of a setting that fits; 0 if none does, null if that is not known here.
export function most(data, c, name, free) {
  const values = legalValues(data, name);
  const fits = (i) => {
    const e = estimate(data, { ...c, [name]: values.at(i) });
    return e ? sum(e.parts) <= free : null;
  };
  const least = fits(0);
  if (least === null) return null;
  if (!least) return 0;
  let low = 0;
  let high = values.count;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    const ok = fits(middle);
    if (ok === null) return null;
    if (ok) low = middle;
    else high = middle;
  }
  return values.at(low);
}

// The values that a setting may have, ascending: how many, and which stands at an index.
function legalValues(data, name) {
  if (name === "rank") return { count: data.ranks.length, at: (i) => data.ranks[i] };
  // a row needs two tokens: one to read and one to predict
  const first = name === "max_seq_length" ? 2 : 1;
  const last = { ...MOST, num_layers: data.blocks }[name];
  const limit = (name === "max_seq_length" && data.context) || last;
  return { count: limit - first + 1, at: (i) => first + i };
}

// ---- the code that makes the estimate

function py(value) {
  if (value === true) return "True";
  if (value === false) return "False";
  return typeof value === "string" ? `'${value}'` : String(value);
}

// A constructor's call with only what differs from its defaults.
// fields: name, present value and default, as Python writes them; set: values that were moved.
function call(name, fields, set) {
  const shown = fields
    .map(([key, now, usual]) => [key, set[key] ?? now, usual])
    .filter(([, value, usual]) => value !== usual)
    .map(([key, value]) => `${key}=${value}`);
  return `qlab.${name}(${shown.join(", ")})`;
}

const quantConfig = ([mode, bits, group]) =>
  mode ? `qlab.QuantConfig("${mode}", bits=${bits}, group_size=${group})` : "None";

// The scale that leaves alpha as it is while the rank moves.
function scaleAt(data, rank) {
  if (rank === data.at.rank) return data.scale;
  const width = data.rslora ? Math.sqrt : Number;
  return (data.scale * width(data.at.rank)) / width(rank);
}

export function codeOf(data, c) {
  const plain = quantConfig([c.mode, c.bits, c.group_size]);
  const overrides = data.own
    .map(([path, config]) => `"${path}": ${quantConfig(config ?? [""])}`)
    .join(", ");
  const scale = scaleAt(data, c.rank);
  const lora = {
    rank: py(c.rank),
    scale: Number.isInteger(scale) ? `${scale}.0` : String(scale),
    num_layers: c.num_layers === data.blocks ? "-1" : py(c.num_layers),
  };
  const train = Object.fromEntries(Object.entries(c).map(([key, value]) => [key, py(value)]));
  const quant = c.mode && overrides ? `qlab.QuantPlan(${plain}, {${overrides}})` : plain;
  return [
    `quant = ${quant}`,
    `adapter = ${call("LoRAConfig", data.adapter, lora)}`,
    `train = ${call("TrainConfig", data.train, train)}`,
    "est = qlab.estimate(model, quant, adapter, train)",
  ].join("\n");
}

// ---- what is drawn

// Right end of the axis and its step: the limit where it is near, else a round number above.
export function axis(high, free) {
  const top = high > free / 5 ? Math.max(high, free) * 1.03 : high * 1.25;
  const power = 10 ** Math.floor(Math.log10(top / 4));
  const step = [1, 2, 5, 10].map((k) => k * power).find((size) => top / size <= 7);
  return { top, step };
}

// All that the functions above ask, read off the widget's traits.
export function read(model) {
  const floats = (name) => {
    const view = model.get(name);
    return new Float64Array(view.buffer.slice(view.byteOffset, view.byteOffset + view.byteLength));
  };
  const state = model.get("state");
  return {
    ...model.get("meta"),
    ...model.get("tables"),
    adapters: floats("adapters"),
    states: floats("states"),
    formulas: model.get("formulas"),
    band: state.band,
    own: state.own,
    scale: state.scale,
    at: state.choice,
  };
}
