// Pure functions of the panel: node --test
import assert from "node:assert/strict";
import test from "node:test";
import {
  codeLine,
  gb,
  height,
  judgedText,
  num,
  rowOf,
  scaleOf,
  snap,
  totals,
  worst,
} from "./widget.mjs";

const data = {
  L: 3,
  S: 2,
  other: 10,
  params: 100,
  layers: [
    { path: "a", nbytes: 100 },
    { path: "b", nbytes: 200 },
    { path: "c", nbytes: 300 },
  ],
  configs: [
    ["affine", 4, 64],
    ["affine", 8, 64],
  ],
  sizes: [25, 50, 300, 50, 100, 300],
  flags: [1, 1, 0, 1, 1, 0],
  values: new Float32Array([
    0.1,
    0.2,
    NaN,
    0.01,
    0.02,
    NaN,
    0,
    0,
    NaN,
    0,
    0,
    NaN,
    0,
    0,
    NaN,
    0,
    0,
    NaN,
    1,
    2,
    NaN,
    0.1,
    0.2,
    NaN,
  ]),
};
const plan = (row, overrides = {}) => ({ row, overrides });

test("values snap to the nearest legal one", () => {
  assert.equal(snap([1, 2, 3, 4, 5, 6, 8], 7), 6);
  assert.equal(snap([32], 128), 32);
});
test("a row that cannot hold a layer leaves it as it is", () => {
  assert.equal(rowOf(data, plan(0), 2), -1);
  assert.equal(rowOf(data, plan(0, { 1: -1 }), 1), -1);
  assert.equal(rowOf(data, plan(0, { 1: 1 }), 1), 1);
});
test("totals add kept layers at their present size", () => {
  const t = totals(data, plan(0));
  assert.equal(t.nbytes, 10 + 25 + 50 + 300);
  assert.equal(t.kl, 3);
  assert.equal(t.bpw, (8 * 385) / 100);
  assert.equal(totals(data, plan(0, { 0: -1 })).nbytes, 10 + 100 + 50 + 300);
});
test("worst is sorted and leaves out what is not quantized", () =>
  assert.deepEqual(
    worst(data, plan(0), 3).map(([i]) => i),
    [1, 0],
  ));
test("the scale spans all slider positions in whole decades", () => {
  assert.deepEqual(scaleOf(data, 3), [0.1, 1]);
  assert.equal(height([0.1, 10], 1), 0.5);
  assert.ok(height([0.1, 10], 0.001) > 0);
});
test("code rebuilds the plan, overrides sorted by path", () =>
  assert.equal(
    codeLine(data, plan(0, { 1: -1, 0: 1 })),
    'q = qlab.Quantizer(model, bits=4, group_size=64, mode="affine")\nq.set("a", bits=8, group_size=64, mode="affine")\nq.set("b", bits=None)',
  ));
test("numbers carry their unit", () => {
  assert.equal(gb(4.2e9), "4.20 GB");
  assert.equal(gb(3.04e6), "3.0 MB");
  assert.equal(num(NaN), "–");
});
test("code names a solver that is not the default", () =>
  assert.match(codeLine(data, plan(0), "searched"), /mode="affine", solver="searched"\)$/));
test("end-to-end numbers are told in words", () => {
  assert.deepEqual(judgedText({}), []);
  assert.deepEqual(judgedText({ kl_nats: 0.4, perplexity: 31, perplexity_before: 28 }), [
    "measured: 0.4 nats/token",
    "perplexity 28 → 31",
  ]);
});
