"use strict";

/* The capacity explorer: shows what the twin predicted for the setting of its form.
   Every number and name it speaks of is in EXPLORER, written by study/explorer.py. */
(() => {
  const data = EXPLORER;
  const { starvation, margin, tie, hopeless } = data.threshold;
  const form = document.getElementById("explorer");
  const part = (name) => form.querySelector(`[data-part=${name}]`);

  // ------------------------------------------------------------------------ predictions

  const unpack = (text, Kind) =>
    new Kind(Uint8Array.from(atob(text), (byte) => byte.charCodeAt(0)).buffer);
  const state = unpack(data.state, Uint8Array);
  const offered = unpack(data.offered, Float32Array);
  const met = data.met.map((row) => row.map((text) => unpack(text, Uint16Array)));
  const figures = Object.entries(data.figures).map(([name, figure]) =>
    ({ ...figure, name, values: unpack(figure.values, Float32Array) }));
  let count = 0; // only simulated runs have figures
  const place = Array.from(state, (code) => (data.states[code] === "simulated" ? count++ : -1));

  /* The runs of one setting, one for each configuration. */
  function runsOf(setting) {
    const workload = Object.entries(data.choices).reduce(
      (index, [name, values]) => index * values.length + setting[name], 0);
    return data.configurations.map(([served, slots], i) => {
      const at = workload * data.configurations.length + i;
      const run = {
        served,
        slots,
        state: data.states[state[at]],
        offered: offered[workload * data.grid.length + data.grid.indexOf(served)],
        met: met[setting.ttft_ms][setting.itl_ms][place[at]], // hundredths of a percent
      };
      for (const { name, values } of figures) run[name] = values[place[at]];
      run.share = run.total_throughput / run.offered;
      return run;
    });
  }

  /* The feasible runs, the best first, and those of them that tie with it: the rule of
     adapter_twin/plan/criterion.py. Without an SLO the percentile is null. */
  function rank(runs, percentile) {
    const feasible = runs.filter((run) =>
      run.total_throughput >= (starvation + margin) * run.offered
      && (percentile === null || run.met >= Math.round(100 * percentile)));
    const best = Math.max(...feasible.map((run) => run.total_throughput));
    const tied = feasible.filter((run) => run.total_throughput >= (1 - tie) * best);
    const rest = feasible.filter((run) => !tied.includes(run));
    tied.sort((a, b) => a.mean_ttft_ms - b.mean_ttft_ms);
    rest.sort((a, b) => b.total_throughput - a.total_throughput);
    return { ranked: [...tied, ...rest], tied };
  }

  // ------------------------------------------------------------------------------ words

  const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
  const short = new Intl.NumberFormat("en", { notation: "compact" });
  const percent = (share) => `${(100 * share).toFixed(1)} %`;
  const keeps = (run) => `${(Math.floor(run.met / 10) / 10).toFixed(1)} %`;
  const commas = (value) => value.replaceAll("-", ", ");
  const fill = (template, values) => template.replace(/{(\w+)}/g, (_, name) => values[name]);

  /* A figure with its unit; times of a second and more in s. */
  function worded({ unit }, value) {
    if (!(value >= 0)) return "–";
    if (unit !== "ms") return `${whole.format(value)} ${unit}`.trimEnd();
    const [size, of] = value < 999.5 ? [value, "ms"] : [value / 1000, "s"];
    return `${size < 99.95 ? Number(size.toPrecision(3)) : whole.format(size)} ${of}`;
  }

  /* What is to be said of one cell. */
  function verdict(run, { ranked, tied, setting }) {
    const served = `${percent(run.share)} of the load is served`;
    if (run.state === "refused") return "vLLM refuses to start: the slots leave too little KV cache.";
    if (run.state === "hopeless") return `Starves: the load is over ${hopeless} times the capacity.`;
    if (run === ranked[0]) return "Recommended.";
    if (run.share < starvation) return `Starves: ${served}.`;
    if (run.share < starvation + margin) return `Too close to starving: ${served}.`;
    if (tied.includes(run)) return `As good within ${100 * tie} %, at a longer mean TTFT.`;
    if (ranked.includes(run)) return "Serves well, at a lower throughput.";
    return `Misses the service level: ${keeps(run)} of the requests keep it.`;
  }

  /* Why nothing is recommended. */
  function excuse({ runs, setting }) {
    if (runs.every((run) => run.state === "refused")) return "vLLM starts with none of these slots.";
    if (!rank(runs, null).ranked.length) return "Every configuration of the grid starves.";
    const most = runs.reduce((a, b) => (b.met > (a.met ?? -1) ? b : a));
    return `None keeps the service level: the best one does for ${keeps(most)} of the requests, `
      + `${setting.percentile} % are asked.`;
  }

  function answer(view) {
    const { ranked, tied, setting } = view;
    const best = ranked[0];
    const lines = [element("p", {}, best
      ? `★ Serve ${best.served} adapters on ${best.slots} slots` : `Nothing to recommend. ${excuse(view)}`)];
    if (best) {
      const told = figures.map((figure) => `${figure.label} ${worded(figure, best[figure.name])}`);
      const others = { 1: "", 2: " One more configuration is as good." }[tied.length]
        ?? ` ${tied.length - 1} more configurations are as good.`;
      lines.push(element("p", {}, `${percent(best.share)} of the load served, ${told.join(", ")}.${others}`));
      const edge = best.served === data.grid.at(-1);
      if (edge) lines.push(element("p", { class: "note" }, "The grid ends here: more adapters might be served."));
    }
    const slo = setting.percentile === null ? "plain" : "slo";
    const limits = Object.entries(data.limits).map(([name, menu]) => [name, menu[setting[name]]])
      .filter(([, ms]) => ms !== null)
      .map(([name, ms]) => `${name.slice(0, -3).toUpperCase()} ${whole.format(ms)} ms`).join(", ");
    lines.push(element("p", { class: "note" },
      `Rule: ${fill(data.criterion[slo], { ...setting, limits })}.`));
    const { ranks, lengths } = data.choices;
    const beyond = data.extrapolations[
      (setting.model * ranks.length + setting.ranks) * lengths.length + setting.lengths];
    if (beyond.length) {
      lines.push(element("details", { class: "note" }, element("summary", {}, "Beyond what was measured"),
        ...beyond.map((warning) => element("div", {}, `${warning}.`))));
    }
    return lines;
  }

  // --------------------------------------------------------------------------- elements

  function dress(node, attributes, children) {
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    node.append(...children);
    return node;
  }
  const element = (tag, attributes, ...children) =>
    dress(document.createElement(tag), attributes, children);
  const svg = (tag, attributes, ...children) =>
    dress(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
  const text = (x, y, words, anchor = "middle", kind = "") =>
    svg("text", { x, y, "text-anchor": anchor, class: kind }, words);

  function star(x, y, radius) {
    const corner = (_, i) => {
      const r = i % 2 ? 0.42 * radius : radius;
      return `${x + r * Math.sin((i * Math.PI) / 5)},${y - r * Math.cos((i * Math.PI) / 5)}`;
    };
    return svg("polygon", { class: "star", points: Array.from({ length: 10 }, corner).join(" ") });
  }

  const patterns = () => svg("defs", {},
    svg("pattern", { id: "refused", width: 6, height: 6, patternUnits: "userSpaceOnUse",
      patternTransform: "rotate(45)" }, svg("path", { d: "M0 0V6" })),
    svg("pattern", { id: "hopeless", width: 7, height: 7, patternUnits: "userSpaceOnUse" },
      svg("circle", { cx: 3.5, cy: 3.5, r: 1 })));

  // ------------------------------------------------------------------------------ chart

  /* Where things are, in pixels: the curve above, the map below, over one axis. */
  function layout(width) {
    const [left, top, curve, gap] = [42, 24, 90, 36];
    const step = (width - left - 2) / data.grid.length;
    const rise = Math.min(step, 42);
    const map = top + curve + gap;
    const bottom = map + rise * data.grid.length;
    const at = {
      width, left, top, curve, step, rise, map, bottom, height: bottom + 40,
      x: (served) => left + step * data.grid.indexOf(served),
      y: (slots) => bottom - rise * (data.grid.indexOf(slots) + 1),
    };
    at.middle = (run) => [at.x(run.served) + step / 2, at.y(run.slots) + rise / 2];
    return at;
  }

  /* How good a value is on the map, from 0 to 1, and the ends of the scale. */
  function scaleOf({ name, unit }, runs) {
    const values = runs.map((run) => run[name]).filter((value) => value >= 0);
    const [low, high] = [Math.min(...values), Math.max(...values)];
    if (unit !== "ms") return { from: 0, to: high, good: (value) => value / high };
    const good = (value) => (low < high ? Math.log(high / value) / Math.log(high / low) : 1);
    return { from: low, to: high, good };
  }
  const colour = (good) => data.colours[Math.round(good * (data.colours.length - 1))];

  function drawBar({ runs, setting }) {
    const { from, to } = scaleOf(setting.show, runs);
    const colours = from ? data.colours.toReversed() : data.colours; // short times are good
    const gradient = element("i", { style: `background: linear-gradient(to right, ${colours})` });
    const ends = Number.isFinite(to) ? [from, to].map((value) => worded(setting.show, value)) : ["–", "–"];
    part("bar").replaceChildren(ends[0], gradient, ends[1]);
  }

  /* The edges between neighbouring cells of which one holds something and the other does not. */
  function border(at, runs, holds) {
    const find = (served, slots) => runs.find((run) => run.served === served && run.slots === slots);
    const next = (value) => data.grid[data.grid.indexOf(value) + 1];
    const parted = (a, b) => b && ![a.state, b.state].includes("refused") && holds(a) !== holds(b);
    return runs.map((run) => {
      const [x, y] = [at.x(run.served), at.y(run.slots)];
      const right = parted(run, find(next(run.served), run.slots)) ? `M${x + at.step} ${y}v${at.rise}` : "";
      return right + (parted(run, find(run.served, next(run.slots))) ? `M${x} ${y}h${at.step}` : "");
    }).join("");
  }

  function drawCell(at, run, good, view) {
    const { show } = view.setting;
    const value = run.state === "simulated" ? `${show.label} ${worded(show, run[show.name])}. ` : "";
    run.cell = svg("rect", {
      role: "gridcell", tabindex: -1, class: run.state, rx: 2,
      x: at.x(run.served) + 0.5, y: at.y(run.slots) + 0.5, width: at.step - 1, height: at.rise - 1,
      "data-served": run.served, "data-slots": run.slots,
      "aria-label": `${run.served} adapters, ${run.slots} slots: ${value}${verdict(run, view)}`,
    });
    if (run.state === "simulated") run.cell.setAttribute("fill", colour(good(run[show.name])));
    return run.cell;
  }

  function drawMap(at, view) {
    const { runs, ranked, tied, setting } = view;
    const { good } = scaleOf(setting.show, runs);
    const rows = data.grid.toReversed().map((slots) => svg("g", { role: "row" },
      ...runs.filter((run) => run.slots === slots).map((run) => drawCell(at, run, good, view))));
    const frontier = border(at, runs, (run) => run.share >= starvation);
    const kept = setting.percentile === null ? "" : border(at, runs, (run) => ranked.includes(run));
    const marks = tied.map((run, i) => (i === 0 ? star(...at.middle(run), at.rise / 2.6)
      : svg("circle", { class: "tie", cx: at.middle(run)[0], cy: at.middle(run)[1], r: at.rise / 9 })));
    return [
      ...data.grid.flatMap((value) => [
        text(at.x(value) + at.step / 2, at.bottom + 16, value),
        text(at.left - 6, at.y(value) + at.rise / 2 + 4, value, "end")]),
      text(at.left + (at.width - at.left) / 2, at.bottom + 35, "served adapters N", "middle", "title"),
      text(0, at.map - 8, "adapter slots G", "start", "title"),
      svg("g", { role: "grid", "aria-label": `${setting.show.label} by served adapters and slots` }, ...rows),
      svg("g", { "pointer-events": "none" },
        svg("path", { class: "halo", d: frontier }), svg("path", { class: "frontier", d: frontier }),
        svg("path", { class: "frontier", d: kept }), svg("path", { class: "kept", d: kept }),
        ...marks, svg("rect", { class: "active", rx: 2, width: at.step, height: at.rise })),
    ];
  }

  /* The best run of each number of adapters: by the rule, or by throughput where none is feasible. */
  function bestOfEach({ runs, setting }) {
    return data.grid.map((served) => {
      const own = runs.filter((run) => run.served === served && run.state === "simulated");
      own.sort((a, b) => b.total_throughput - a.total_throughput);
      return rank(own, setting.percentile).ranked[0] ?? own[0];
    }).filter(Boolean);
  }

  function drawCurve(at, view) {
    const [{ name, label, unit }] = figures;
    const best = bestOfEach(view);
    const high = 1.15 * Math.max(1, ...best.map((run) => run[name]));
    const power = 10 ** Math.floor(Math.log10(high));
    const top = [5, 2, 1].map((n) => n * power).find((value) => value <= high);
    const y = (value) => at.top + at.curve * (1 - value / high);
    const line = (runs, of) =>
      runs.map((run, i) => `${i ? "L" : "M"}${at.middle(run)[0]} ${y(of(run))}`).join("");
    const loads = view.runs.filter((run) => run.slots === data.grid[0]);
    const mark = (run) => (run === view.ranked[0] ? star(at.middle(run)[0], y(run[name]), 9)
      : svg("circle", { cx: at.middle(run)[0], cy: y(run[name]), r: 3.5,
        class: view.ranked.includes(run) ? "dot" : "dot failing" }));
    const told = best.map((run) => `${run.served}: ${whole.format(run[name])}`).join(", ");
    return svg("g", { role: "img", "aria-label": `${label} by served adapters, ${unit}: ${told}` },
      svg("clipPath", { id: "panel" },
        svg("rect", { x: at.left, y: at.top, width: at.width - at.left, height: at.curve })),
      text(0, 13, `${label} on the best slots, ${unit}`, "start", "title"),
      svg("path", { class: "axis", d: `M${at.left} ${y(0)}H${at.width}M${at.left} ${y(top)}H${at.width}` }),
      ...[0, top].map((value) => text(at.left - 6, y(value) + 4, short.format(value), "end")),
      svg("path", { class: "offered", "clip-path": "url(#panel)", d: line(loads, (run) => run.offered) }),
      svg("path", { class: "served", d: line(best, (run) => run[name]) }),
      ...best.map(mark));
  }

  const drawn = (...kinds) => kinds.map((kind) => svg("path", { class: kind, d: "M3 6H19" }));
  const block = (kind) => [svg("rect", { class: kind, x: 3, width: 16, height: 12 })];
  const point = (kind) => [svg("circle", { class: kind, cx: 11, cy: 6, r: 3.5 })];
  const KEY = [
    ["recommended", () => [star(11, 6, 7)]],
    [`as good, within ${100 * tie} %`, () => point("tie")],
    [`starves: under ${100 * starvation} % served`, () => drawn("halo", "frontier")],
    ["hopeless, not simulated", () => block("hopeless")],
    ["service level kept", () => drawn("frontier", "kept")],
    ["start refused", () => block("refused")],
    ["offered load", () => drawn("offered")],
    ["fails the rule", () => point("dot failing")],
  ];

  function drawChart(view) {
    const chart = part("chart");
    const at = layout(chart.parentElement.clientWidth);
    chart.setAttribute("height", at.height);
    chart.replaceChildren(patterns(), drawCurve(at, view), ...drawMap(at, view));
    part("key").style.top = `${at.map}px`;
  }

  // ------------------------------------------------------------------------ interaction

  const menus = { ...data.choices, ...data.limits };
  const code = (value) => String(value ?? "none");
  const limit = (value) => (value === null ? "none" : worded({ unit: "ms" }, value));
  const texts = {
    rates_per_adapter: commas, ranks: commas, ttft_ms: limit, itl_ms: limit,
    lengths: ([input, output]) => `${input} in, ${output} out`,
  };
  let view; // what is on the page: setting, runs, ranked, tied
  let pinned; // the cell that stays shown, as [served, slots]

  function buildForm() {
    for (const [name, values] of Object.entries(menus)) {
      form.elements[name].append(...values.map((value) =>
        new Option((texts[name] ?? code)(value), code(value))));
      form.elements[name].value = code(data.start[name]);
    }
    form.elements.percentile.value = data.start.percentile;
    for (const { name, label } of figures) {
      const radio = element("input", { type: "radio", name: "show", value: name });
      part("show").append(element("label", {}, radio, label));
    }
    form.elements.show.value = figures[0].name;
    part("key").append(...KEY.map(([words, draw]) => element("li", {}, svg("svg", { "aria-hidden": true }, ...draw()), words)));
    part("about").textContent = `Predicted by adapter-twin ${data.version}: windows of `
      + `${data.window_s} s, seed ${data.seed}, ${Object.values(data.calibrations).join(" and ")}.`;
  }

  /* The place of each choice in its menu; the percentile is null without an SLO. */
  function readForm() {
    const chosen = (name) => form.elements[name].selectedIndex;
    const setting = Object.fromEntries(Object.keys(menus).map((name) => [name, chosen(name)]));
    const limited = Object.keys(data.limits).some((name) => menus[name][setting[name]] !== null);
    form.elements.percentile.disabled = !limited;
    setting.percentile = limited ? Number(form.elements.percentile.value) : null;
    setting.show = figures.find(({ name }) => name === form.elements.show.value);
    return setting;
  }

  /* Take a setting over from the part of the address after #, but for what makes no sense. */
  function readAddress() {
    const address = new URLSearchParams(location.hash.slice(1));
    for (const name of [...Object.keys(menus), "percentile", "show"]) {
      const field = form.elements[name];
      const before = field.value;
      field.value = address.get(name) ?? before;
      if (!field.value || field.validity?.valid === false) field.value = before;
    }
  }

  function writeCommands({ ranked: [best], setting }) {
    const value = (name) => menus[name][setting[name]];
    const [mean_input_tokens, mean_output_tokens] = value("lengths");
    const names = ["model", "rates_per_adapter", "ranks"].map((name) => [name, value(name)]);
    const optimum = fill(data.optimum,
      { ...Object.fromEntries(names), mean_input_tokens, mean_output_tokens });
    const limits = Object.keys(data.limits).filter((name) => value(name) !== null)
      .map((name) => `${name}: ${value(name)}`);
    const slo = `{${[...limits, `percentile: ${setting.percentile}`].join(", ")}}`;
    part("optimum").textContent = limits.length
      ? fill(data.with_slo, { optimum, slo })
      : fill(data.without_slo, { optimum });
    part("run").hidden = !best;
    part("vllm").textContent = best ? fill(data.vllm, { served_adapters: best.served,
      adapter_slots: best.slots, max_lora_rank: data.max_lora_rank[setting.ranks],
      max_model_len: data.max_model_len[setting.model] }) : "";
  }

  /* The figures of the recommended cell and of another one. */
  function show(run) {
    const best = view.ranked[0];
    const columns = [best, run === best ? undefined : run];
    const row = (kind, head, of) => element("tr", {}, element("th", { scope: "row" }, head),
      ...columns.map((each) => element(kind, kind === "th" ? { scope: "col" } : {}, each ? of(each) : "–")));
    const kept = view.setting.percentile === null ? []
      : [row("td", "service level kept by", (each) => (each.met >= 0 ? keeps(each) : "–"))];
    part("figures").replaceChildren(
      element("caption", {}, "★ recommended, and the cell you point at"),
      row("th", "adapters N", (each) => (each === best ? `★ ${each.served}` : each.served)),
      row("th", "slots G", (each) => each.slots),
      row("td", "load served", (each) => (each.share >= 0 ? percent(each.share) : "–")),
      ...figures.map((figure) => row("td", figure.unit === "ms" ? figure.label : `${figure.label}, ${figure.unit}`,
        (each) => worded({ unit: figure.unit === "ms" ? "ms" : "" }, each[figure.name]))),
      ...kept);
    part("verdict").textContent = run ? verdict(run, view) : "";
    const frame = form.querySelector(".active");
    frame.style.display = run ? "" : "none";
    if (run) for (const name of ["x", "y"]) frame.setAttribute(name, run.cell.getAttribute(name) - 0.5);
  }

  const runAt = (served, slots) => view.runs.find((run) => run.served === served && run.slots === slots);
  const runOf = (event) => view.runs.find((run) => run.cell === event.target);
  const rest = () => show(pinned && runAt(...pinned));

  function render() {
    const setting = readForm(); // asks for a percentile only where there is a limit
    if (!form.checkValidity()) return;
    const runs = runsOf(setting);
    view = { setting, runs, ...rank(runs, setting.percentile) };
    drawBar(view);
    drawChart(view);
    (view.ranked[0] ?? runs[0]).cell.setAttribute("tabindex", 0);
    writeCommands(view);
    rest();
  }

  function change() {
    render();
    form.reportValidity();
    part("answer").replaceChildren(...answer(view));
    history.replaceState(null, "", `#${new URLSearchParams(new FormData(form))}`);
  }

  function walk(event) {
    const run = runOf(event);
    const steps = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] };
    if (!run || !steps[event.key]) return;
    event.preventDefault();
    const move = (value, by) => data.grid[data.grid.indexOf(value) + by];
    runAt(move(run.served, steps[event.key][0]), move(run.slots, steps[event.key][1]))?.cell.focus();
  }

  buildForm();
  readAddress();
  form.hidden = false;
  document.getElementById("explorer-missing").remove();
  const chart = part("chart");
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("change", change);
  chart.addEventListener("pointerover", (event) => (runOf(event) ? show(runOf(event)) : rest()));
  chart.addEventListener("pointerleave", rest);
  chart.addEventListener("focusin", (event) => { show(runOf(event)); });
  chart.addEventListener("focusout", rest);
  chart.addEventListener("keydown", walk);
  chart.addEventListener("click", (event) => {
    const run = runOf(event);
    pinned = run && [run.served, run.slots];
    rest();
  });
  addEventListener("resize", render);
  addEventListener("hashchange", () => { readAddress(); change(); });
  change();
})();
