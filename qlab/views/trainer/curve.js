// What the trainer panel draws from: rows of numbers, one a step, as bytes; and pure functions of them.
const WIDTH = 10,
  [STEP, LOSS, SMOOTH, VAL, RATE, NORM, SPEED, ACTIVE, PEAK, EPOCH] = Array(WIDTH).keys();

/** Sign and word of each kind of mark on the time line. */
const WORDS = {
  checkpoint: ["▪", "saved"],
  best: ["★", "best"],
  learning_rate: ["↯", "rate"],
  skipped: ["✕", "skipped"],
  early_stop: ["■", "early stop"],
  guard: ["▲", "memory guard"],
};
// marks that get their word first
const LOUD = ["guard", "skipped", "early_stop", "learning_rate", "best", "checkpoint"];

export const lossText = (x) => (Number.isFinite(x) ? x.toFixed(Math.abs(x) < 1 ? 3 : 2) : "–");
export const whole = (x) =>
  Number.isFinite(x)
    ? Math.round(x)
        .toString()
        .replace(/\B(?=(\d{3})+$)/g, "\u202f")
    : "–";
export const rateText = (x) =>
  !(x > 0)
    ? "–"
    : x >= 0.01
      ? String(+x.toPrecision(3))
      : x.toExponential(2).replace(/\.?0+e/, "e");
/** A learning rate as typed, or NaN. */
export const parseRate = (text) => {
  const x = /\d/.test(text) ? Number(text.trim().replace(",", ".")) : NaN;
  return x > 0 && x < Infinity ? x : NaN;
};
/** About `count` round numbers between two values. */
export function ticks(lo, hi, count = 4) {
  if (!(hi > lo)) return [lo];
  const rough = (hi - lo) / count,
    power = 10 ** Math.floor(Math.log10(rough)),
    step = power * [1, 2, 5, 10].find((m) => power * m >= rough * (1 - 1e-9)),
    found = [];
  for (let k = Math.ceil(lo / step - 1e-9); k <= hi / step + 1e-9; k++)
    found.push(+(k * step).toPrecision(12));
  return found;
}
export const column = (rows, c) => {
  const out = [];
  for (let i = c; i < rows.length; i += WIDTH) if (Number.isFinite(rows[i])) out.push(rows[i]);
  return out;
};
/** Limits of the loss axis: single spikes of single steps may leave it, the smoothed curve and validations may not. */
export function lossRange(rows) {
  const at = (a, q) => a[Math.round(q * (a.length - 1))],
    loss = column(rows, LOSS).sort((a, b) => a - b),
    sure = [...column(rows, SMOOTH), ...column(rows, VAL)];
  if (!loss.length && !sure.length) return [0, 1];
  const lo = Math.min(...sure, at(loss, 0.01) ?? Infinity),
    hi = Math.max(...sure, at(loss, 0.98) ?? -Infinity),
    room = (hi - lo) * 0.06 || Math.abs(hi) * 0.05 || 0.01;
  return [Math.max(0, lo - room), hi + room];
}
/** Limits of a log axis, at least a factor of two apart; null without a positive value. */
export function logRange(values) {
  let lo = Infinity,
    hi = 0;
  for (const v of values)
    if (v > 0) {
      lo = Math.min(lo, v);
      hi = Math.max(hi, v);
    }
  if (!hi) return null;
  const room = Math.max(0.04 * Math.log(hi / lo), (Math.log(2) - Math.log(hi / lo)) / 2);
  return [lo * Math.exp(-room), hi * Math.exp(room)];
}
/** Row whose step is nearest. */
export function nearest(rows, step) {
  let a = 0,
    b = rows.length / WIDTH - 1;
  while (b - a > 1) {
    const m = (a + b) >> 1;
    if (rows[m * WIDTH + STEP] < step) a = m;
    else b = m;
  }
  return b >= 0 && Math.abs(rows[b * WIDTH + STEP] - step) < Math.abs(rows[a * WIDTH + STEP] - step)
    ? b
    : Math.max(a, 0);
}
/** Path of one column; breaks where nothing is, unless bridged. */
export function trace(rows, c, x, y, bridged = false) {
  let d = "",
    pen = "M";
  for (let i = 0; i < rows.length; i += WIDTH) {
    const v = rows[i + c];
    if (Number.isFinite(v)) {
      d += `${pen}${Math.round(x(rows[i]) * 10) / 10} ${Math.round(y(v) * 10) / 10}`;
      pen = "L";
    } else if (!bridged) pen = "M";
  }
  return d;
}
/** Which marks get their word, only their sign, or only a tick: the loud ones first, none over another. */
export function placed(marks, x, lo = -Infinity, hi = Infinity) {
  const taken = [],
    free = (a, b) => taken.every(([c, d]) => b < c || a > d),
    out = [],
    seen = {};
  for (const m of marks) if (m[1] === "best") seen.best = m;
  const order = marks
    .filter((m) => m[1] !== "best" || m === seen.best)
    .sort((a, b) => LOUD.indexOf(a[1]) - LOUD.indexOf(b[1]) || b[0] - a[0]);
  for (const m of order.slice(0, 400)) {
    const [sign, word] = WORDS[m[1]] ?? ["•", m[1]],
      px = x(m[0]),
      text = `${sign} ${word}`,
      wide = 3.2 * text.length + 4;
    const mid = Math.min(hi - wide, Math.max(lo + wide, px)),
      full = !seen[`word ${word}`] && free(mid - wide, mid + wide),
      at = full ? mid : px,
      half = full ? wide : 6;
    if (full || free(px - 6, px + 6)) {
      taken.push([at - half, at + half]);
      out.push([at, full ? text : sign, m]);
      if (full) seen[`word ${word}`] = true;
    }
  }
  return out;
}
export function read(model) {
  const parts = ["curve", "newest"].map((name) => {
    const v = model.get(name);
    return new Float32Array(v.buffer.slice(v.byteOffset, v.byteOffset + v.byteLength));
  });
  const rows = new Float32Array(parts[0].length + parts[1].length);
  rows.set(parts[0]);
  rows.set(parts[1], parts[0].length);
  return rows;
}
