// Pure functions of the adapter panel, against what Python says: node --test
import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import test from "node:test";
import {
  alphaOf,
  atRank,
  codeLine,
  count,
  curve,
  isOn,
  keysOf,
  percent,
  sizeOf,
  totals,
  widest,
} from "./widget.mjs";

const { meta, state, curves } = JSON.parse(readFileSync("sent.json")),
  expected = JSON.parse(readFileSync("expected.json"));
const data = { ...meta, curves, blocks: 3 },
  plan = { ...state };
const close = (a, b) => assert.ok(Math.abs(a - b) < 1e-4, `${a} is not ${b}`);

test("sums are those of Python", () => {
  assert.equal(totals(data, plan).size, expected.size);
  close(totals(data, plan).share, expected.share);
});
test("code is that of Python", () => assert.equal(codeLine(data, plan), expected.code));
test("keys and switches stand in the code as Python spells them", () =>
  assert.match(
    codeLine(data, { ...plan, keys: ["q_proj", "a.b"], rslora: true }),
    /keys=\["q_proj", "a\.b"\].*rslora=True/,
  ));
test("shares between the ranks of the grid are those of Python", () =>
  [1, 8, 20, 32, 500].forEach((rank, k) =>
    close(atRank(data.grid, curve(data, "qera", 1), rank), expected.shares[k]),
  ));
test("what is not known is not a number", () => {
  assert.ok(Number.isNaN(atRank(data.grid, curve(data, "qera", 0), 4)));
  assert.ok(Number.isNaN(atRank(data.grid, [], 4)));
});
test("only the last blocks get adapters", () =>
  assert.deepEqual(
    data.layers.map((_, i) => isOn(data, plan, i)),
    [false, false, false, true, true, true, true],
  ));
test("the rank is limited by the narrowest adapted layer", () =>
  assert.equal(widest(data, plan), 32));
test("keys name whole roles shortly, single layers by path, and all linear layers not at all", () => {
  const on = data.layers.map((l) => l.kind === "linear");
  assert.equal(keysOf(data, on), null);
  assert.deepEqual(
    keysOf(
      data,
      on.map((v, i) => v && i !== 2),
    ),
    ["q_proj", "model.layers.1.mlp.up_proj", "model.layers.2.mlp.up_proj"],
  );
  assert.deepEqual(
    keysOf(
      data,
      on.map(() => true),
    ),
    ["embed_tokens", "q_proj", "up_proj"],
  );
});
test("the experts of a mixture are among all linear layers", () => {
  const mixture = {
    ...data,
    layers: [
      ...data.layers,
      {
        kind: "switch",
        block: 0,
        role: "mlp.experts.up_proj",
        path: "model.layers.0.mlp.experts.up_proj",
        shape: [4, 32, 64],
      },
    ],
  };
  const on = mixture.layers.map((l) => l.kind !== "embedding");
  assert.equal(keysOf(mixture, on), null);
  assert.deepEqual(
    keysOf(
      mixture,
      on.map((v, i) => v && i < data.layers.length),
    ),
    ["q_proj", "mlp.up_proj"],
  );
});
test("alpha follows scale and rank", () => {
  assert.equal(alphaOf({ scale: 2, rank: 16 }), 32);
  assert.equal(alphaOf({ scale: 2, rank: 16, rslora: true }), 8);
});
test("numbers are short", () => {
  assert.equal(percent(0.0123), "1.2 %");
  assert.equal(percent(NaN), "–");
  assert.equal(count(262144), "262.1 k");
  assert.equal(sizeOf(data, { kind: "lora", rank: 2 }, 1), 2 * 96);
});
