// Pure functions of the trainer panel: node --test
import assert from "node:assert/strict";
import test from "node:test";
import {
  column,
  logRange,
  lossRange,
  lossText,
  nearest,
  parseRate,
  placed,
  rateText,
  ticks,
  trace,
  whole,
} from "./widget.mjs";

// step, loss, smooth, val, rate, norm, speed, active, peak, epoch
const rows = (...points) =>
  new Float32Array(
    points.flatMap(([step, loss, val = NaN]) => [step, loss, loss, val, 1e-4, 1, 100, 1e9, 2e9, 0]),
  );

test("a loss keeps its width while it falls", () => {
  assert.equal(lossText(2.314), "2.31");
  assert.equal(lossText(0.5), "0.500");
  assert.equal(lossText(NaN), "–");
});
test("whole numbers come in groups of three", () => {
  assert.equal(whole(1240), "1\u202f240");
  assert.equal(whole(12), "12");
  assert.equal(whole(1234567), "1\u202f234\u202f567");
});
test("a learning rate is written as people type it", () => {
  assert.equal(rateText(2e-4), "2e-4");
  assert.equal(rateText(1.5e-5), "1.5e-5");
  assert.equal(rateText(0.05), "0.05");
  assert.equal(rateText(1e-10), "1e-10");
  assert.equal(rateText(0), "–");
});
test("a learning rate is read back from what is written", () => {
  for (const x of [2e-4, 1.5e-5, 0.05, 3.25e-6]) assert.equal(parseRate(rateText(x)), x);
});
test("a decimal comma is understood", () => assert.equal(parseRate(" 0,001 "), 0.001));
test("what is no learning rate is refused", () => {
  for (const text of ["", "abc", "-1", "0", "1e999", "1 2", "2e-4x"])
    assert.ok(Number.isNaN(parseRate(text)), text);
});
test("ticks are round and inside", () => {
  assert.deepEqual(ticks(0, 400, 4), [0, 100, 200, 300, 400]);
  assert.deepEqual(ticks(1.93, 2.41, 4), [2, 2.2, 2.4]);
  assert.deepEqual(ticks(5, 5), [5]);
});
test("a spike of one step may leave the loss axis, a validation may not", () => {
  const points = Array.from({ length: 200 }, (_, i) => [i, 2 + (i % 2) * 0.1]);
  points[50][1] = 90;
  const spiky = rows(...points);
  spiky[502] = 2; // its smoothed value
  assert.ok(lossRange(spiky)[1] < 3);
  points[60][2] = 7;
  const judged = rows(...points);
  judged[502] = 2;
  assert.ok(lossRange(judged)[1] > 7);
});
test("an empty run has an axis", () => assert.deepEqual(lossRange(rows()), [0, 1]));
test("a constant has room on a log axis, zeros and nothing are left out", () => {
  const [lo, hi] = logRange([2e-4, 2e-4, 0]);
  assert.ok(lo < 2e-4 && hi > 2e-4 && hi / lo > 1.9);
  assert.equal(logRange([0, NaN]), null);
});
test("the nearest step is found", () => {
  const r = rows([0, 1], [5, 1], [6, 1], [90, 1]);
  assert.deepEqual(
    [-3, 2, 3, 5.6, 40, 60, 500].map((x) => nearest(r, x)),
    [0, 0, 1, 2, 2, 3, 3],
  );
  assert.equal(nearest(rows([4, 1]), 9), 0);
});
test("a step without a loss breaks the line, a step without validation does not", () => {
  const r = rows([0, 1, 5], [1, NaN], [2, 3, 6]),
    same = (v) => v;
  assert.equal(trace(r, 1, same, same), "M0 1M2 3");
  assert.equal(trace(r, 3, same, same, true), "M0 5L2 6");
});
test("a column leaves out what is no number", () =>
  assert.deepEqual(column(rows([0, 1], [1, NaN], [2, 3]), 1), [1, 3]));
test("marks do not lie on each other; trouble comes first; only the last best is named", () => {
  const shown = placed(
    [
      [1, "best", "a"],
      [2, "best", "b"],
      [100, "checkpoint", "c"],
      [101, "skipped", "d"],
      [102, "checkpoint", "e"],
      [300, "new kind", "f"],
    ],
    (v) => v,
    0,
    400,
  );
  assert.deepEqual(
    shown.map(([, text, m]) => [text, m[2]]).sort(),
    [
      ["★ best", "b"],
      ["✕ skipped", "d"],
      ["• new kind", "f"],
    ].sort(),
  );
  const spans = shown
    .map(([at, text]) => [at - 3.2 * text.length, at + 3.2 * text.length])
    .sort((a, b) => a[0] - b[0]);
  assert.ok(spans.every(([a], i) => a >= 0 && (i === 0 || a > spans[i - 1][1])));
});
test("ten thousand marks are placed quickly", () => {
  const many = Array.from({ length: 10000 }, (_, i) => [i, "checkpoint", ""]),
    t = performance.now();
  placed(many, (v) => v / 20, 0, 500);
  assert.ok(performance.now() - t < 200);
});
