// The picture of the adapter panel: a row per role, a bar per block; its name switches the role on
// and off. It shows what `panel` says, and tells it what was pointed at or switched.

/** @returns {{svg, layout, paint, has}} the picture, what arranges it anew, what colours it, whether a layer is in it. */
function recoveryMap(panel) {
  const svg = layerMap();
  const ring = s("rect", { class: "qlab-ring", visibility: "hidden" });
  let cells = []; // by layer; layers that no kind can adapt have none
  let rows = []; // { role, list, name }

  const labelOf = (role) => {
    const roles = rows.map((row) => row.role);
    return nameOf(roles, role).replace(/^(self_attn|mlp|attention|model)\./, "");
  };

  function layout() {
    const { data } = panel;
    const width = Math.max(280, svg.parentNode.clientWidth || 640);
    const canAdapt = (layer) => data.kinds.some(([, , adapts]) => adapts.includes(layer.kind));
    rows = [...byRole(data.layers, canAdapt)].map(([role, list]) => ({ role, list }));
    const tall = rows.length > 12 ? 20 : 25;
    const left = Math.max(122, ...rows.map(({ role }) => 30 + 6.4 * labelOf(role).length));
    const step = (width - left - 4) / Math.max(1, data.blocks);
    setAll(svg, { width, height: rows.length * tall + 14 });
    svg.replaceChildren();
    cells = [];
    rows.forEach((row, r) => {
      const y = r * tall;
      const base = y + tall - 1.5;
      row.name = roleSwitch(row.list, left - 8, base - 4.5);
      svg.append(s("line", { x1: left, x2: width, y1: base, y2: base, class: "qlab-base" }));
      for (const i of row.list) {
        const { block } = data.layers[i];
        const w = block === null ? 16 : barWidth(step);
        cells[i] = cell(left + (block ?? 0) * step, y, w, tall);
        svg.append(cells[i].whole, cells[i].bar);
      }
    });
    const last = data.blocks - 1;
    const numbered = data.blocks ? [0, Math.floor(last / 2), last] : [];
    for (const b of numbered) {
      const at = { x: left + (b + 0.5) * step, y: rows.length * tall + 11 };
      write(svg, { ...at, "text-anchor": "middle", class: "qlab-axis" }, b);
    }
    svg.append(ring);
  }
  const cell = (x, y, w, H) => ({
    x,
    y,
    w,
    H,
    whole: s("rect", { x, y: y + 3, width: w, height: H - 5, class: "qlab-cell" }),
    bar: s("rect", { x, width: w, rx: w > 5 ? 1.5 : 0, class: "qlab-bar" }),
  });
  /** The name of a role, which works as a checkbox. */
  function roleSwitch(list, x, y) {
    const name = write(svg, { x, y, "text-anchor": "end", class: "qlab-role", tabindex: 0 }, "");
    setAll(name, { role: "checkbox", "data-lm-suppress-shortcuts": "true" });
    const flip = (event) => {
      event.stopPropagation();
      panel.toggle(list);
    };
    name.onclick = flip;
    name.onkeydown = (event) => {
      if (event.key !== " " && event.key !== "Enter") return;
      event.preventDefault();
      flip(event);
    };
    return name;
  }

  /** Colours every bar by a curve, marks the roles, and rings the layer that is pointed at. */
  function paint(what, marked) {
    const { data, plan } = panel;
    svg.classList.toggle("qlab-old", panel.state.stale);
    for (const { role, list, name } of rows) {
      const named = list.filter((i) => plan.on[i]).length;
      let [mark, checked] = ["☐", "false"];
      if (named === list.length) [mark, checked] = ["☑", "true"];
      else if (named) [mark, checked] = ["◪", "mixed"];
      name.textContent = `${mark} ${labelOf(role)}`;
      name.setAttribute("aria-checked", checked);
      name.classList.toggle("off", !list.some((i) => isOn(data, plan, i)));
    }
    cells.forEach((c, i) => {
      const on = isOn(data, plan, i);
      const share = reached(data, plan, what, i) || 0; // NaN: nothing measured
      const tall = Math.max(on ? 1.5 : 0, (c.H - 5) * share);
      c.whole.classList.toggle("on", on);
      c.bar.classList.toggle("off", !on);
      setAll(c.bar, { y: c.y + c.H - 2 - tall, height: tall, fill: ink(share) });
    });
    const c = cells[marked];
    if (!c) return;
    const place = { x: c.x - 1.5, y: c.y + 1, width: c.w + 3, height: c.H - 1 };
    setAll(ring, { ...place, visibility: "visible" });
  }

  function pointed(event) {
    const box = svg.getBoundingClientRect();
    const x = event.clientX - box.left;
    const y = event.clientY - box.top;
    const within = (c) => x >= c.x - 1 && x <= c.x + c.w + 1 && y >= c.y && y < c.y + c.H;
    return cells.findIndex((c) => c && within(c));
  }
  svg.onpointermove = (event) => panel.hover(pointed(event));
  svg.onpointerleave = () => panel.hover(-1);
  svg.onclick = (event) => {
    const i = pointed(event);
    if (i >= 0) panel.focus(i);
  };
  svg.onkeydown = (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -1, ArrowDown: 1 }[event.key];
    if (!step || event.target !== svg) return;
    event.preventDefault();
    const lists = rows.map((row) => row.list);
    const r = Math.max(
      0,
      lists.findIndex((list) => list.includes(panel.focused)),
    );
    const at = Math.max(0, lists[r].indexOf(panel.focused));
    const across = /Left|Right/.test(event.key);
    panel.focus(across ? beside(lists[r], at, step) : beside(beside(lists, r, step), at, 0));
  };
  return { svg, layout, paint, has: (i) => !!cells[i] };
}
