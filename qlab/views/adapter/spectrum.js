// The spectrum of one layer's quantization error: its singular values, those of white noise, and the rank.
const PLOT = { height: 150, left: 34, right: 6, top: 8, base: 132 };

/** Draws the spectrum of a layer into `plot`, and says it in `words`. */
function paintSpectrum(plot, words, panel, i) {
  const { data, plan, state } = panel;
  const width = Math.max(220, plot.parentNode.clientWidth || 300);
  setAll(plot, { width, height: PLOT.height });
  plot.replaceChildren();
  plot.classList.toggle("qlab-old", state.stale);
  const singular = i < 0 ? [] : curve(data, "singular", i).filter(Number.isFinite);
  if (!singular.length) {
    let text = "no quantization error measured in this layer";
    if (state.progress) text = "measuring…";
    else if (state.obstacle) text = "";
    words.textContent = text;
    plot.setAttribute("aria-label", "no spectrum");
    return;
  }
  drawSpectrum(plot, width, data.grid, singular, noiseOf(data, i)[0], plan.rank);
  const share = (name) => percent(reached(data, plan, name, i));
  const white = percent(atRank(data.grid, noiseOf(data, i)[1], plan.rank));
  const { path, kind } = data.layers[i];
  plot.setAttribute(
    "aria-label",
    `singular values of the error of ${path}; rank ${plan.rank} takes ${share("weight")} of its square, white noise ${white}`,
  );
  const expert = kind === "switch" ? ", of a typical expert" : "";
  const bold = (text) => h("b", {}, text);
  const lines = [
    [bold(shortPath(path)), `: singular values of W−Ŵ, over ‖W−Ŵ‖${expert}`],
    [
      `rank ${plan.rank} takes `,
      bold(share("weight")),
      ` of the squared weight error; white noise would give ${white}`,
    ],
  ];
  const outputs = ["residual", "diagonal", "qera"].filter((name) => share(name) !== "–");
  if (outputs.length) {
    const shares = outputs.flatMap((name) => [" · ", `${name} `, bold(share(name))]);
    lines.push(["of the output error, held out: ", ...shares.slice(1)]);
  }
  swap(words, "", ...lines.map((line) => h("div", {}, ...line)));
}

/** Draws curves over the ranks of a grid, on a log axis. */
function drawSpectrum(plot, width, grid, singular, noise, rank) {
  const { left, right, top, base, height } = PLOT;
  const end = grid[singular.length - 1];
  const highest = Math.max(singular[0], noise[0] ?? 0) * 1.05;
  const room = width - left - right;
  const X = (r) => left + (room * Math.log2(r)) / Math.log2(Math.max(2, end));
  const Y = (v) => base - ((base - top) * v) / highest;
  const path = (values) => {
    const points = values.map((v, k) => `${X(grid[k]).toFixed(1)},${Y(v).toFixed(1)}`);
    return points.length ? `M${points.join("L")}` : "";
  };
  const cut = X(Math.min(end, rank));
  const draw = (tag, attributes) => plot.append(s(tag, attributes));
  const text = (x, y, words, anchor = "start") =>
    write(plot, { x, y, "text-anchor": anchor, class: "qlab-axis" }, words);
  const taken = { x: left, y: top, width: Math.max(0, cut - left), height: base - top };
  draw("rect", { ...taken, class: "qlab-cut" });
  draw("path", { d: `${path(singular)}L${X(end)},${base}L${left},${base}Z`, class: "qlab-area" });
  draw("path", { d: path(noise.slice(0, singular.length)), class: "qlab-noise" });
  draw("path", { d: path(singular), class: "qlab-line" });
  draw("line", { x1: cut, x2: cut, y1: top, y2: base, class: "qlab-cutline" });
  draw("line", { x1: left, x2: width - right, y1: base, y2: base, class: "qlab-base" });
  const every = end < 64 ? 1 : 2; // powers of two, or of four
  for (const r of grid.filter((r) => r <= end && Math.log2(r) % every === 0))
    text(X(r), height - 5, r, X(r) > width - 20 ? "end" : "middle");
  text(2, top + 8, num(singular[0]));
  text(Math.min(cut + 4, width - 50), top + 9, `rank ${rank}`);
  const late = singular[Math.floor(singular.length * 0.55)];
  text(width - 8, Math.max(top + 22, Y(late) - 8), "dashed: white noise", "end");
}
