// The picture of the quantizer panel: a row per role, a bar per block; layers outside the blocks
// share the last row. It shows what `panel` says, and tells it which layer was pointed at.
const LEFT = 104; // pixels for the names of the roles

/** @returns {{svg, layout, paint}} the picture, what arranges it anew, and what colours it. */
function errorMap(panel) {
  const svg = layerMap();
  const ring = s("rect", { class: "qlab-ring", rx: 2 });
  let cells = []; // by layer
  let rows = []; // [name, layers]

  function layout() {
    const { layers } = panel.data;
    const width = Math.max(280, svg.parentNode.clientWidth || 640);
    const roles = byRole(layers, (layer) => layer.block !== null);
    const outside = layers.flatMap((layer, i) => (layer.block === null ? [i] : []));
    const prefix = /^(self_attn|mlp|attention|block_sparse_moe)\./;
    rows = [...roles].map(([role, list]) => [role.replace(prefix, ""), list]);
    const inBlocks = rows.length;
    if (outside.length) rows.push(["outside blocks", outside]);
    const blocks = Math.max(1, ...layers.map((layer) => (layer.block ?? 0) + 1));
    const step = (width - LEFT - 4) / blocks;
    const tall = rows.length > 14 ? 20 : rows.length > 9 ? 26 : 34;
    setAll(svg, { width, height: rows.length * tall + 16 });
    svg.replaceChildren();
    cells = [];
    rows.forEach(([name, list], r) => {
      const y = r * tall;
      const base = y + tall - 1.5;
      write(svg, { x: LEFT - 8, y: base - 4.5, "text-anchor": "end", class: "qlab-role" }, name);
      svg.append(s("line", { x1: LEFT, x2: width, y1: base, y2: base, class: "qlab-base" }));
      list.forEach((i, n) => {
        const [left, w] =
          r < inBlocks ? [layers[i].block * step, barWidth(step)] : [n * 130, 16];
        const x = LEFT + left;
        cells[i] = cell(x, y, w, tall, r);
        svg.append(cells[i].bar, cells[i].dot);
        if (r < inBlocks) return;
        const end = layers[i].path.split(".").pop();
        write(svg, { x: x + w + 5, y: base - 4.5, class: "qlab-role" }, end);
      });
    });
    numberBlocks(blocks, step, rows.length * tall + 12);
    svg.append(ring);
  }
  const cell = (x, y, w, H, row) => ({
    x,
    y,
    w,
    H,
    row,
    bar: s("rect", { x, width: w, rx: w > 5 ? 1.5 : 0 }),
    dot: s("circle", { cx: x + w / 2, r: Math.min(2.5, w / 2 + 0.5), class: "qlab-dot" }),
  });
  function numberBlocks(blocks, step, y) {
    if (blocks < 2) return;
    const every = [1, 2, 5, 10, 20, 50].find((k) => step * k > 22) || 50;
    for (let b = 0; b < blocks && (blocks - b) * step > 9; b += every) {
      const x = LEFT + (b + 0.5) * step;
      write(svg, { x, y, "text-anchor": "middle", class: "qlab-axis" }, b);
    }
  }

  /** Colours every bar, and rings the layer that is pointed at. */
  function paint(measure, scale, marked) {
    const { data, plan } = panel;
    cells.forEach((c, i) => {
      const row = rowOf(data, plan, i);
      const v = row < 0 ? 0 : value(data, measure, row, i);
      const known = !Number.isNaN(v);
      let share = known ? 0.04 : 0.3;
      if (v > 0) share = height(scale, v);
      const tall = Math.max(1.5, share * (c.H - 6));
      let look = "";
      if (row < 0) look = " kept";
      else if (!known) look = " wait";
      else if (isExact(data, row, i)) look = " exact";
      const own = plan.overrides[i];
      let mark = "";
      if (row < 0 && !(own < 0)) mark = "refused";
      else if (own !== undefined && own !== plan.row) mark = "own";
      const now = tall.toFixed(1) + look + mark;
      if (c.was === now) return;
      c.was = now;
      const top = c.y + c.H - tall;
      setAll(c.bar, { y: top - 2, height: tall, class: `qlab-bar${look}` });
      c.bar.style.fill = ink(share);
      setAll(c.dot, { cy: Math.max(c.y + 3, top - 6), class: `qlab-dot ${mark}` });
    });
    const c = cells[marked];
    ring.style.display = c ? "" : "none";
    if (c) setAll(ring, { x: c.x - 2, y: c.y + 1, width: c.w + 4, height: c.H - 2 });
  }

  /** The layer whose bar is nearest to the pointer, within 14 pixels; -1 if none is. */
  function pointed(event) {
    const box = svg.getBoundingClientRect();
    const x = event.clientX - box.left;
    const y = event.clientY - box.top;
    let best = -1;
    let near = 14;
    cells.forEach((c, i) => {
      if (y < c.y || y >= c.y + c.H) return;
      const distance = Math.abs(x - c.x - c.w / 2);
      if (distance < Math.max(near, c.w / 2)) {
        near = distance;
        best = i;
      }
    });
    return best;
  }
  svg.onpointermove = (event) => panel.hover(pointed(event));
  svg.onpointerleave = () => panel.hover(-1);
  svg.onclick = (event) => {
    const i = pointed(event);
    if (i >= 0) panel.focus(i === panel.focused ? -1 : i);
  };
  /** The layer that an arrow key leads to; Escape leads to none. */
  function next(key, from) {
    if (key === "Escape") return -1;
    const up = { ArrowUp: -1, ArrowDown: 1 }[key];
    const across = { ArrowLeft: -1, ArrowRight: 1 }[key];
    if (!up && !across) return undefined;
    if (from < 0) return rows[0][1][0];
    const { row } = cells[from];
    const at = rows[row][1].indexOf(from);
    if (across) return beside(rows[row][1], at, across);
    return beside(beside(rows, row, up)[1], at, 0);
  }
  svg.onkeydown = (event) => {
    const i = next(event.key, panel.focused);
    if (i === undefined) return;
    event.preventDefault();
    event.stopPropagation();
    panel.focus(i);
  };
  return { svg, layout, paint };
}
