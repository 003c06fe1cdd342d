// The trainer panel. The whole run is in the browser: pointing at a step never waits for the kernel.
const REST = ["training loss", "best validation", "tokens", "peak memory", "folder"]; // of the summary: what the headline does not say

async function render({ model, el, host }) {
  let st = model.get("state");
  let raf = 0;
  let asked = null; // what the user has asked for: operation, and what the kernel had before
  let wanted = null; // learning rate that was sent and not yet answered
  let announced = 0; // when the last words for ears were said
  let announcing = 0;
  let came = 0; // when the kernel last sent something
  let sent = 0; // when the user last did
  let chosen = false; // whether the user has picked the prompt whose answers are shown
  const plot = timeline(model, later);
  const controls =
    host && model.get("controls") ? await host.getModel(model.get("controls")) : null;
  const stale = h("div", { className: "qlab-stale-note", role: "alert" });
  const {
    send: pass,
    isAnswered,
    stop,
  } = line(controls, (on) => {
    stale.textContent =
      came > sent
        ? "The kernel is busy with a cell: it answers when the cell lets it."
        : "Kernel not connected: run this cell again.";
    root.classList.toggle("qlab-stale", on);
  });
  const send = (intent) => {
    sent = performance.now();
    pass(intent);
  };

  // skeleton
  const title = h("div", { className: "qlab-title" }),
    bar = h("i"),
    button = (text, f) => h("button", { type: "button", onclick: f }, text);
  const go = button("start", () => ask(go.op)),
    halt = button("■ stop", () => ask("stop"));
  const ask = (op) => {
    asked = { op, was: st.status };
    send({ op });
    later();
  };
  const rate = h("input", {
      type: "text",
      inputMode: "decimal",
      size: 9,
      className: "qlab-rate",
      title: "Takes effect with the next step. Enter applies, Escape takes back.",
    }),
    pending = h("span", { className: "qlab-pending" });
  rate.setAttribute("aria-label", "learning rate");
  const setRate = () => {
    const value = parseRate(rate.value);
    if (rate.value === rateText(wanted ?? st.rate)) {
      pending.textContent = "";
      return;
    }
    rate.setAttribute("aria-invalid", Number.isNaN(value));
    if (Number.isNaN(value)) {
      pending.textContent = "✕ must be a number above 0, such as 2e-4";
      return;
    }
    if (value === (wanted ?? st.rate)) {
      rate.value = rateText(value);
      return;
    }
    wanted = value;
    pending.textContent = "… sent";
    send({ op: "learning_rate", value });
    later();
  };
  rate.addEventListener("change", setRate);
  rate.addEventListener("keydown", (ev) => {
    if (ev.key === "Enter") setRate();
    if (ev.key === "Escape") {
      rate.value = rateText(st.rate);
      rate.removeAttribute("aria-invalid");
      pending.textContent = "";
    }
  });
  const prompt = h("input", { type: "text", className: "qlab-prompt", placeholder: "a prompt" }),
    say = button("generate", () => speak());
  prompt.setAttribute("aria-label", "prompt");
  const speak = () => {
    if (prompt.value.trim() && !say.disabled) {
      asked = { op: "generate", was: st.answers };
      send({ op: "generate", prompt: prompt.value });
      later();
    }
  };
  prompt.addEventListener("keydown", (ev) => {
    if (ev.key === "Enter") speak();
  });
  const keys = h("div", { className: "qlab-run-keys" }, go, halt),
    field = h("label", { className: "qlab-inline" }, "learning rate ", rate),
    speech = h("span", { className: "qlab-inline qlab-speech" }, prompt, say);
  const row = h("div", { className: "qlab-run-row" }, keys, field, pending, speech),
    report = h("div", { className: "qlab-summary" });
  const which = h("select", { className: "qlab-which" }),
    generations = h("div", { className: "qlab-generations" });
  which.setAttribute("aria-label", "prompt whose answers are shown");
  which.onchange = () => {
    chosen = true;
    later();
  };
  const data = h("div", { className: "qlab-note" }),
    error = h("div", { className: "qlab-status error", role: "alert" }),
    quiet = h("div", { className: "qlab-quiet", role: "status", "aria-live": "polite" });
  const code = h("pre"),
    copy = button("copy", () =>
      navigator.clipboard?.writeText(code.textContent).then(() => {
        copy.textContent = "copied";
        setTimeout(() => (copy.textContent = "copy"), 1200);
      }),
    );
  const root = h(
    "div",
    { className: "qlab qlab-run" },
    title,
    h("div", { className: "qlab-far" }, bar),
    stale,
    row,
    error,
    report,
    h("div", { className: "qlab-stage" }, plot.svg),
    plot.readout,
    h("div", { className: "qlab-talk" }, which, generations),
    data,
    h("div", { className: "qlab-code" }, code, copy),
    quiet,
  );
  el.replaceChildren(root);
  if (!controls) row.hidden = true;

  function paintTop() {
    swap(
      title,
      "",
      h("strong", {}, st.setup.join(" · ")),
      h("span", { className: `qlab-word ${st.status}` }, `${st.icon} ${st.word}`),
      h("span", { className: "qlab-headline" }, st.headline),
    );
    bar.style.width = `${(100 * Math.min(1, st.steps / Math.max(1, st.iters))).toFixed(1)}%`;
    bar.className = st.status;
    const can = (op) => st.allowed.includes(op),
      busy = asked !== null;
    go.op = ["start", "pause", "resume"].find(can);
    go.hidden = !go.op;
    halt.hidden = !can("stop");
    field.hidden = !can("learning_rate");
    const texts = { start: st.steps ? "▶ go on" : "▶ start", pause: "‖ pause", resume: "▶ resume" },
      doing = { start: "starting …", pause: "pausing …", resume: "resuming …" };
    go.textContent =
      busy && asked.op !== "generate" && asked.op !== "stop"
        ? doing[asked.op]
        : (texts[go.op] ?? "");
    halt.textContent = busy && asked.op === "stop" ? "stopping …" : "■ stop";
    go.disabled = halt.disabled = busy && asked.op !== "generate";
    say.hidden = prompt.hidden = !can("generate");
    say.disabled = busy && asked.op === "generate";
    say.textContent = say.disabled ? "generating …" : "generate";
    if (
      root.getRootNode().activeElement !== rate &&
      wanted === null &&
      rate.getAttribute("aria-invalid") !== "true"
    )
      rate.value = rateText(st.rate);
    error.hidden = !st.error;
    if (error.textContent !== `✕ ${st.error}`) error.textContent = `✕ ${st.error}`;
    report.hidden = !st.ended;
    if (st.ended)
      swap(
        report,
        "",
        h(
          "div",
          { className: "qlab-facts-grid" },
          ...st.summary
            .filter(([k]) => REST.includes(k))
            .map(([k, v]) => h("div", {}, h("span", {}, k), h("b", { title: v }, v))),
        ),
        ...(st.notes.length
          ? [h("p", { className: "qlab-note qlab-notes" }, st.notes.join(" · "))]
          : []),
      );
  }
  function paintTalk() {
    const list = model.get("generations"),
      known = [...which.options].map((o) => o.value).join("\n");
    generations.parentNode.hidden = !list.length;
    if (known !== list.map((v) => v[0]).join("\n")) {
      const kept = which.value;
      which.replaceChildren(
        ...list.map(([p]) => h("option", { value: p }, p.length > 60 ? `${p.slice(0, 59)}…` : p)),
      );
      which.value = chosen && list.some((v) => v[0] === kept) ? kept : list.at(-1)?.[0];
    }
    which.hidden = list.length < 2;
    const shown = list.find((v) => v[0] === which.value);
    if (!shown) return;
    const [asking, first, now] = shown,
      one = String(first) === String(now),
      said = (head, [step, text]) =>
        h(
          "div",
          {},
          h("span", {}, `${head}, step ${whole(step)}`),
          h("p", {}, text || "(nothing)"),
        );
    swap(
      generations,
      which.value,
      said(`${which.hidden ? `“${asking}” ` : ""}${one ? "answer" : "before"}`, first),
      ...(one ? [] : [said("now", now)]),
    );
  }
  /** For ears: changes of state and of the best validation, at most one a second. */
  function announce() {
    const text = st.error
      ? `error: ${st.error}`
      : `${st.word}${st.best ? `, best validation loss ${lossText(st.best[1])}` : ""}${st.ended ? `, ${st.headline}` : ""}`;
    if (text === quiet.textContent) return;
    const wait = announced + 1000 - performance.now();
    clearTimeout(announcing);
    if (wait > 0) {
      announcing = setTimeout(announce, wait);
      return;
    }
    announced = performance.now();
    quiet.textContent = text;
  }
  function paint() {
    paintTop();
    plot.paint();
    paintTalk();
    announce();
    plot.svg.setAttribute(
      "aria-label",
      `Loss of a training run. ${st.headline}. ${st.best ? `Best validation ${lossText(st.best[1])} at step ${st.best[0]}.` : ""}`,
    );
    if (data.textContent !== st.data) data.textContent = st.data;
    if (code.textContent !== st.code) code.textContent = st.code;
  }

  // kernel → browser
  function onState() {
    st = model.get("state");
    came = performance.now();
    const all = isAnswered(st.ack);
    if (
      asked &&
      ((all && st.error) ||
        (asked.op === "generate" ? st.answers !== asked.was : st.status !== asked.was))
    )
      asked = null;
    if (all && wanted !== null) {
      wanted = null;
      pending.textContent = st.error ? "" : "✓ applied";
    }
    later();
  }
  const onCurve = () => {
    plot.newRows();
    came = performance.now();
    later();
  };
  const onMarks = () => {
    plot.newMarks();
    later();
  };
  function later() {
    raf ||= requestAnimationFrame(() => {
      raf = 0;
      paint();
    });
  }
  const handlers = [
    ["state", onState],
    ["curve", onCurve],
    ["newest", onCurve],
    ["marks", onMarks],
    ["generations", later],
  ];
  for (const [name, f] of handlers) model.on(`change:${name}`, f);
  const sized = new ResizeObserver(() => {
    plot.layout();
    later();
  });
  sized.observe(plot.svg.parentNode);
  plot.layout();
  onState();
  came = 0;
  send({ op: "hello" });
  return () => {
    for (const [name, f] of handlers) model.off(`change:${name}`, f);
    sized.disconnect();
    stop();
    clearTimeout(announcing);
    cancelAnimationFrame(raf);
  };
}
export default { render };
