// The figures of the quantizer panel: pure functions of the table and the plan.
//
// data: what the kernel sent. L layers are columns and S configs are rows of its tables.
// plan: { row, overrides }, the row of most layers, and the rows of the others by layer (-1: not quantized).
const [REL, SE, MAX, KL] = [0, 1, 2, 3];
const NAMES = {
  kl_nats: ["predicted ΔKL", "nats/token"],
  relative_error: ["weight error", "‖W−Ŵ‖/‖W‖"],
};

/** Whether a row can store a layer. */
const isLegal = (data, row, layer) => data.flags[row * data.L + layer] & 1;
const isExact = (data, row, layer) => data.flags[row * data.L + layer] & 2;

/** Row that stores a layer, or -1 where it is not quantized: by choice, or because the row cannot. */
export function rowOf(data, plan, layer) {
  const row = plan.overrides[layer] ?? plan.row;
  return row >= 0 && isLegal(data, row, layer) ? row : -1;
}

/** A measure of a layer under a row; NaN if unknown. */
export const value = (data, measure, row, layer) =>
  data.values[(measure * data.S + row) * data.L + layer];

/** Bytes of a layer under a row; as it is for -1. */
const bytesOf = (data, row, layer) =>
  row < 0 ? data.layers[layer].nbytes : data.sizes[row * data.L + layer];

/** Bytes, bits per weight and predicted ΔKL of the whole model. */
export function totals(data, plan) {
  let nbytes = data.other;
  let kl = 0;
  for (let i = 0; i < data.L; i++) {
    const row = rowOf(data, plan, i);
    nbytes += bytesOf(data, row, i);
    if (row >= 0) kl += value(data, KL, row, i); // one unknown makes the sum NaN
  }
  return { nbytes, bpw: (8 * nbytes) / data.params, kl };
}

/** The layers that cost most, as `[layer, value]`. */
export function worst(data, plan, measure, count = 5) {
  const known = [];
  for (let i = 0; i < data.L; i++) {
    const row = rowOf(data, plan, i);
    const v = row < 0 ? NaN : value(data, measure, row, i);
    if (!Number.isNaN(v)) known.push([i, v]);
  }
  return known.sort((a, b) => b[1] - a[1]).slice(0, count);
}

/** Limits of the log axis in whole decades: of one plan, or the middle 98 % of all slider positions. */
export function scaleOf(data, measure, plan = null) {
  const values = plan ? ofPlan(data, measure, plan) : ofAll(data, measure);
  const known = values.filter((v) => v > 0).sort((x, y) => x - y);
  if (!known.length) return [1e-3, 1];
  const decade = (share) => Math.log10(known[Math.floor(share * (known.length - 1))]);
  const top = Math.ceil(decade(plan ? 1 : 0.99) - 1e-9);
  const bottom = Math.floor(decade(plan ? 0 : 0.01) + 1e-9);
  return [10 ** Math.max(Math.min(bottom, top - 1), top - 5), 10 ** top];
}
function ofPlan(data, measure, plan) {
  const rows = data.layers.map((_, i) => rowOf(data, plan, i));
  return rows.map((row, i) => (row < 0 ? 0 : value(data, measure, row, i)));
}
/** Every value of a measure, or 4096 of them. */
function ofAll(data, measure) {
  const n = data.S * data.L;
  const step = Math.max(1, n >> 12);
  const values = [];
  for (let k = measure * n; k < (measure + 1) * n; k += step) values.push(data.values[k]);
  return values;
}

/** Height of a bar as a share, on a log scale. */
export const height = ([low, high], v) =>
  Math.min(1, Math.max(0.04, Math.log(v / low) / Math.log(high / low)));

const labelOf = ([mode, bits, group]) => `${mode} ${bits}-bit g${group}`;
const args = ([mode, bits, group]) => `bits=${bits}, group_size=${group}, mode="${mode}"`;

/** The Python that rebuilds the plan; the same as core/config/code.py writes. */
export function codeLine(data, plan, solver = "rtn") {
  const solverText = solver === "rtn" ? "" : `, solver="${solver}"`;
  const lines = [`q = qlab.Quantizer(model, ${args(data.configs[plan.row])}${solverText})`];
  const unlike = Object.entries(plan.overrides).filter(([, row]) => row !== plan.row);
  const byPath = unlike.map(([i, row]) => [data.layers[i].path, row]);
  byPath.sort((a, b) => (a[0] < b[0] ? -1 : 1));
  for (const [path, row] of byPath) {
    const storage = row < 0 ? "bits=None" : args(data.configs[row]);
    lines.push(`q.set("${path}", ${storage})`);
  }
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

/** Why a layer is not quantized. */
function refusal(data, plan, layer) {
  const row = plan.overrides[layer] ?? plan.row;
  if (row < 0) return "by your choice";
  const { obstacle, shape } = data.layers[layer];
  return obstacle || `width ${shape.at(-1)} is not a multiple of ${data.configs[row][2]}`;
}

export function read(model) {
  const meta = model.get("meta");
  return {
    ...meta,
    L: meta.layers.length,
    S: meta.configs.length,
    values: numbers(model, "values", Float32Array),
    sizes: numbers(model, "sizes", Float64Array),
    flags: numbers(model, "flags", Uint8Array),
    kurtosis: numbers(model, "kurtosis", Float32Array),
  };
}
