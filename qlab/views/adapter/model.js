// The figures of the adapter panel: pure functions of what was measured and of the adapter.
//
// data: what the kernel sent. For each layer, `curves` holds a share for every rank of `data.grid`.
// plan: the adapter: { kind, rank, scale, …, on }, `on` saying of each layer whether its key is named.
const CURVES = ["singular", "weight", "residual", "diagonal", "qera"];
const UNKNOWN = 65535; // shares are sent as whole numbers from 0 to 65534
const SHOWN = {
  weight: "weight error recovered, without data",
  residual: "output error recovered by residual",
  diagonal: "output error recovered by diagonal",
  qera: "output error recovered by qera",
};

/** A curve of a layer, as shares; NaN where nothing is known. */
export function curve(data, name, layer) {
  const ranks = data.grid.length;
  const start = (CURVES.indexOf(name) * data.layers.length + layer) * ranks;
  const codes = [...data.curves.slice(start, start + ranks)];
  return codes.map((code) => (code === UNKNOWN ? NaN : code / (UNKNOWN - 1)));
}

/** The value at a rank, between the ranks of the grid by interpolation; the last known one above. */
export function atRank(grid, values, rank) {
  const isKnown = (k) => k < grid.length && Number.isFinite(values[k]);
  if (!isKnown(0)) return NaN;
  let k = 0;
  while (isKnown(k + 1) && grid[k + 1] <= rank) k++;
  if (grid[k] >= rank || !isKnown(k + 1)) return values[k];
  const share = (rank - grid[k]) / (grid[k + 1] - grid[k]);
  return values[k] + (values[k + 1] - values[k]) * share;
}

/** What the plan's rank reaches on a curve of a layer. */
const reached = (data, plan, name, layer) =>
  atRank(data.grid, curve(data, name, layer), plan.rank);

/** Singular values, and shares by rank, that white noise of the layer's shape would have. */
const noiseOf = (data, layer) =>
  data.noise[data.layers[layer].shape.slice(-2).join(" ")] ?? [[], []];

/** Whether a curve is known of any layer. */
const isMeasured = (data, name) =>
  data.layers.some((_, i) => Number.isFinite(curve(data, name, i)[0]));

/** Whether a layer has an adapter: named by the keys, and in one of the last blocks. */
export function isOn(data, plan, layer) {
  const { block } = data.layers[layer];
  const everywhere = block === null || plan.num_layers < 0;
  return plan.on[layer] && (everywhere || block >= data.blocks - plan.num_layers);
}

/** Trainable parameters on a layer. */
export const sizeOf = (data, plan, layer) => {
  const [fixed, slope] = data.sizes[plan.kind][layer];
  return fixed + slope * plan.rank;
};

/** Numbers of the adapted layers. */
const adapted = (data, plan) => data.layers.flatMap((_, i) => (isOn(data, plan, i) ? [i] : []));

export function totals(data, plan) {
  const layers = adapted(data, plan);
  const size = layers.reduce((sum, i) => sum + sizeOf(data, plan, i), 0);
  return { size, layers: layers.length, share: size / data.params };
}

/** The largest rank that every adapted layer has room for. */
export const widest = (data, plan) =>
  Math.min(...adapted(data, plan).flatMap((i) => data.layers[i].shape.slice(-2)));

/** Alpha over scale: the rank, with rsLoRA its root. */
const rankFactor = (plan) => (plan.rslora ? Math.sqrt(plan.rank) : plan.rank);
export const alphaOf = (plan) => plan.scale * rankFactor(plan);

/** The shortest name of a role: the end of its path, or the whole if another one ends alike. */
const nameOf = (roles, role) => {
  const last = (path) => path.split(".").pop();
  const alike = roles.filter((other) => last(other) === last(role));
  return alike.length > 1 ? role : last(role);
};

/** The keys that name a set of layers: null for all linear layers and experts in the blocks, else ends of paths. */
export function keysOf(data, on) {
  const isUsual = (layer) => layer.kind !== "embedding" && layer.block !== null;
  if (data.layers.every((layer, i) => on[i] === isUsual(layer))) return null;
  const roles = byRole(data.layers);
  const names = [...roles.keys()];
  return [...roles].flatMap(([role, list]) => {
    if (list.every((i) => on[i])) return [nameOf(names, role)];
    return list.filter((i) => on[i]).map((i) => data.layers[i].path);
  });
}

/** A value as Python writes it. */
function quoted(v) {
  if (Array.isArray(v)) return `[${v.map(quoted).join(", ")}]`;
  if (typeof v === "boolean") return v ? "True" : "False";
  return typeof v === "number" ? String(v) : `"${v}"`;
}

/** The Python that rebuilds the adapter; the same as core/config/code.py writes. */
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
  const isUnlike = (name) => JSON.stringify(plan[name]) !== JSON.stringify(usual[name]);
  const settings = Object.keys(usual).filter(isUnlike);
  const text = settings.map((name) => `, ${name}=${quoted(plan[name])}`).join("");
  return `a = qlab.Adapter(${data.source}, rank=${plan.rank}${text})`;
}

export function percent(x) {
  if (!Number.isFinite(x)) return "–";
  return `${(100 * x).toFixed(x < 0.0995 ? 1 : 0)} %`;
}

export function count(n) {
  if (n >= 1e9) return `${(n / 1e9).toFixed(2)} B`;
  if (n >= 1e6) return `${(n / 1e6).toFixed(2)} M`;
  return n >= 1e3 ? `${(n / 1e3).toFixed(1)} k` : String(n);
}

export function read(model) {
  const meta = model.get("meta");
  return {
    ...meta,
    blocks: Math.max(0, ...meta.layers.map((layer) => (layer.block ?? -1) + 1)),
    curves: numbers(model, "curves", Uint16Array),
    errors: numbers(model, "errors", Float32Array),
  };
}
