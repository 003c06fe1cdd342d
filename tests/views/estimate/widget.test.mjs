// Pure functions of the estimate panel, against what Python says: node --test
import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import test from "node:test";
import { axis, codeOf, ends, estimate, most, read, sizes, sizeText, verdict } from "./widget.mjs";

const { traits, cases, inverse, codes } = JSON.parse(readFileSync("cases.json", "utf8"));
const bytes = (text) => new DataView(Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer);
const data = read({
  get: (k) => (traits[k]?.base64 !== undefined ? bytes(traits[k].base64) : traits[k]),
});

test("every case is one that the browser can answer", () => {
  assert.ok(cases.length >= 15);
  for (const x of cases) assert.ok(estimate(data, x.choice), JSON.stringify(x.choice));
});
test("the bytes of every part are Python's", () => {
  for (const x of cases) {
    const e = estimate(data, x.choice);
    e.parts.forEach((n, i) =>
      assert.ok(
        Math.abs(n - x.parts[i]) <= 1 + 1e-9 * x.parts[i],
        `${JSON.stringify(x.choice)} ${data.parts[i][0]}: ${n} is not ${x.parts[i]}`,
      ),
    );
    assert.equal(e.moment, x.moment);
  }
});
test("the band is Python's", () => {
  for (const x of cases) {
    const { low, high } = ends(data, estimate(data, x.choice));
    assert.ok(Math.abs(low - x.low) <= 8 && Math.abs(high - x.high) <= 8);
  }
});
test("the verdict is Python's, word and reason", () => {
  for (const x of cases)
    for (const [place, word, reason] of x.verdicts)
      assert.deepEqual(verdict(data, estimate(data, x.choice), place), { word, reason });
});
test("the largest value that fits is Python's", () => {
  for (const [choice, name, free, value] of inverse)
    assert.equal(most(data, choice, name, free), value);
});
test("the code is Python's", () => {
  for (const [choice, code] of codes) assert.equal(codeOf(data, choice), code);
});
test("what has not been read is not guessed", () => {
  assert.equal(estimate(data, { ...cases[0].choice, rank: 7 }), null);
  assert.equal(estimate(data, { ...cases[0].choice, max_seq_length: data.context + 1 }), null);
  assert.equal(estimate({ ...data, formulas: {} }, cases[0].choice), null);
  assert.equal(most({ ...data, formulas: {} }, cases[0].choice, "batch_size", 1e12), null);
});
test("a setting of which not even the least fits has no largest value", () =>
  assert.equal(most(data, cases[0].choice, "max_seq_length", 1), 0));
test("the last chunk of a loss may be shorter", () =>
  assert.deepEqual(
    sizes({ batch_size: 3, max_seq_length: 101, rank: 8, loss_chunk: 128 }),
    [3, 100, 101, 8, 128, 44],
  ));
test("a loss made at once has no chunk", () =>
  assert.deepEqual(
    sizes({ batch_size: 1, max_seq_length: 101, rank: 8, loss_chunk: 0 }).slice(4),
    [1, 1],
  ));
test("the axis ends at the limit if that is near, and has few marks", () => {
  assert.ok(axis(30e9, 20e9).top > 30e9);
  assert.ok(axis(5e9, 20e9).top > 20e9);
  assert.ok(axis(5e8, 20e9).top < 1e9);
  for (const high of [3e6, 7e8, 4e10, 5e11]) {
    const { top, step } = axis(high, 2e10);
    assert.ok(top / step <= 7.001 && top / step > 2);
  }
});
test("sizes carry their unit", () => {
  assert.equal(sizeText(4.2e9), "4.20 GB");
  assert.equal(sizeText(3.04e6), "3.0 MB");
});
