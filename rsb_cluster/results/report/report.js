"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const { groups, runs } = data;
  const byId = (id) => document.getElementById(id);
  const COLOURS = ["#4c83c3", "#e8852b", "#3f9e5a", "#d6515b", "#8d6cc0", "#a0745a", "#d074b0", "#7f8894", "#a8a432", "#35a6b5"];
  const DASHES = ["solid", "dot", "dash", "dashdot"];
  const SIGNS = ["circle", "square", "triangle-up", "pentagon", "star"];
  const ENDS = {
    finished: "#3f9e5a", preempted: "#e8a33b", "timed out": "#c9a227", killed: "#d6515b", crashed: "#b8323c", failed: "#8c1d28",
    "lost peer": "#d0708f", stopped: "#7f8894", running: "#4c83c3",
  };
  const QUEUED = "rgba(127,136,148,.35)";
  const OTHER = "#7f8894";
  const colour = (group) => (group === null ? OTHER : COLOURS[group % COLOURS.length]);
  const dash = (group) => DASHES[Math.floor((group ?? 0) / COLOURS.length) % DASHES.length];
  const sign = (group) => SIGNS[Math.floor((group ?? 0) / COLOURS.length) % SIGNS.length];
  let shown = runs.map((_, index) => index);

  // ---- charts ----------------------------------------------------------------------------------------------------

  // A printed page is drawn before it is laid out: charts get the size of paper, A4 landscape between its margins, px.
  const paper = matchMedia("print");
  const PAPER = { whole: 1020, half: 498, height: 520 };
  const rowHeight = (wished, rows) => (paper.matches ? Math.min(wished, PAPER.height / Math.max(1, rows)) : wished);
  // Plotly measures labels only on a screen without endless redraws; on paper they have the width of their letters.
  const labelMargin = (labels) => (paper.matches ? 24 + 7 * Math.max(5, ...labels.map((label) => label.length)) : 60);
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const config = { displaylogo: false, responsive: true, modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"] };

  function layout(extra) {
    const axis = { gridcolor: css("--line"), linecolor: css("--line"), zeroline: false, automargin: !paper.matches };
    const { xaxis, yaxis, ...rest } = extra;
    return {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { family: "inherit", size: 12, color: css("--ink") },
      margin: { l: 56, r: 14, t: 34, b: 46 }, height: 360, hovermode: "closest", showlegend: false, dragmode: "zoom",
      hoverlabel: { bgcolor: css("--paper"), bordercolor: css("--line"), font: { color: css("--ink") }, namelength: -1 },
      xaxis: { ...axis, ...xaxis }, yaxis: { ...axis, ...yaxis }, ...rest,
    };
  }

  const heading = (text) => ({ text, font: { size: 13 }, x: 0, xref: "paper", xanchor: "left", y: 0.985, yanchor: "top" });
  const byGroup = () => {
    const found = new Map();
    for (const index of shown) {
      const group = runs[index].group;
      found.set(group, [...(found.get(group) ?? []), runs[index]]);
    }
    return found;
  };
  const name = (group) => (group === null ? "no group" : groups[group].label);

  function draw(id, traces, extra) {
    const figure = byId(id);
    if (!traces.length) {
      if (figure.data) Plotly.purge(figure);
      figure.innerHTML = '<p class="empty">Nothing to draw for the runs shown.</p>';
      return;
    }
    figure.querySelector(".empty")?.remove();
    const width = figure.closest(".pair") ? PAPER.half : PAPER.whole;
    Plotly.react(figure, traces, { ...layout(extra), ...(paper.matches ? { width } : { autosize: true }) }, config);
  }

  // One trace per group, with gaps between the curves of its runs, as a thousand traces would be slow.
  function curves(id, key, title, ytitle, log) {
    const traces = [], crosses = { x: [], y: [], text: [] }, form = key === "scores" ? ":.2f" : ":.4g";
    const faint = shown.length > 60;
    for (const [group, members] of byGroup()) {
      const x = [], y = [], text = [], single = { x: [], y: [], text: [] };
      for (const run of members) {
        const [epochs, values] = run[key];
        if (!epochs.length) continue;
        if (epochs.length === 1) { single.x.push(epochs[0]); single.y.push(values[0]); single.text.push(run.id); }
        epochs.forEach((epoch, i) => { x.push(epoch); y.push(values[i]); text.push(run.id); });
        x.push(null); y.push(null); text.push("");
        for (const span of run.spans.slice(1)) {
          const at = epochs.findIndex((epoch) => epoch >= span.epoch);
          if (at < 0) continue;
          crosses.x.push(epochs[at]); crosses.y.push(values[at]);
          crosses.text.push(`${run.id}<br>attempt ${span.number} resumes at step ${span.steps[0]}`);
        }
      }
      if (!x.length) continue;
      traces.push({
        type: "scatter", mode: "lines", x, y, text, name: name(group), connectgaps: false, opacity: faint ? 0.45 : 0.9,
        line: { color: colour(group), width: faint ? 1 : 1.7, dash: dash(group) },
        hovertemplate: `<b>%{text}</b><br>epoch %{x:.4~g}<br>${ytitle} %{y${form}}<extra></extra>`,
      });
      if (single.x.length) traces.push({  // a line of one point is no line
        type: "scatter", mode: "markers", ...single, name: name(group), marker: { color: colour(group), size: 7, symbol: sign(group) },
        hovertemplate: `<b>%{text}</b><br>epoch %{x:.4~g}<br>${ytitle} %{y${form}}<extra></extra>`,
      });
    }
    if (crosses.x.length && traces.length) traces.push({
      type: "scatter", mode: "markers", ...crosses, hovertemplate: "%{text}<extra></extra>",
      marker: { symbol: "x-thin-open", size: faint ? 4 : 8, opacity: faint ? 0.35 : 1, color: css(faint ? "--soft" : "--ink"), line: { width: 1.2 } },
    });
    draw(id, traces, {
      title: heading(title), xaxis: { title: { text: "epoch" } }, yaxis: { title: { text: ytitle }, type: log ? "log" : "linear" },
    });
  }

  function points(id, x, y, extra, also = []) {
    const traces = [];
    for (const [group, members] of byGroup()) {
      const having = members.filter((run) => x(run) !== null && y(run) !== null);
      if (!having.length) continue;
      traces.push({
        type: "scatter", mode: "markers", x: having.map(x), y: having.map(y), name: name(group), text: having.map((run) => run.id),
        marker: {
          color: colour(group), size: 9, opacity: having.length > 60 ? 0.6 : 0.9,
          symbol: having.map((run) => sign(group) + (run.counted ? "" : "-open")),
        },
        hovertemplate: `<b>%{text}</b><br>${extra.xaxis.title.text} %{x:,.4~g}<br>${extra.yaxis.title.text} %{y:.2f}<extra>${name(group)}</extra>`,
      });
    }
    draw(id, traces.length ? [...traces, ...also] : [], extra);
  }

  function cost() {
    const papers = [...byGroup().keys()].map((g) => groups[g]).filter((g) => g?.paper_hours && data.hours === "GPU-hours");
    const also = papers.length ? [{
      type: "scatter", mode: "markers", x: papers.map((g) => g.paper_hours), y: papers.map((g) => g.paper.top1),
      text: papers.map((g) => g.label), marker: { symbol: "diamond-open", size: 11, color: css("--ink"), line: { width: 1.5 } },
      hovertemplate: "<b>the paper's %{text}</b><br>%{x:,.4~g} hours of V100<br>top-1 %{y:.2f}<extra></extra>",
    }] : [];
    points("cost", (run) => run.hours || null, (run) => run.top1 ?? null, {
      title: heading(`Top-1 against cost${also.length ? "; ◇ the paper's, on V100" : ""}`),
      xaxis: { title: { text: data.hours }, type: "log", dtick: "D2", tickformat: "~r" }, yaxis: { title: { text: "top-1, %" } },
    }, also);
  }

  function speed() {
    points("speed", (run) => run.images_per_s, (run) => (run.waiting === null ? null : 100 * run.waiting), {
      title: heading("Waiting for data against speed, medians"),
      xaxis: { title: { text: "images/s" } }, yaxis: { title: { text: "time waiting, %" }, rangemode: "tozero" },
    });
  }

  function seeds() {
    const traces = [], shapes = [], names = [];
    for (const [group, members] of byGroup()) {
      const counted = members.filter((run) => run.counted);
      if (group === null || !counted.length) continue;
      const { paper, tolerance, mean } = groups[group];
      const base = paper ? paper.top1 : mean, row = names.length;
      names.push(groups[group].label + (paper ? "" : " (own mean)"));
      if (paper && tolerance) shapes.push({
        type: "rect", layer: "below", x0: -tolerance, x1: tolerance, y0: row - 0.38, y1: row + 0.38,
        fillcolor: css("--line"), line: { width: 0 }, opacity: 0.75,
      });
      traces.push({
        type: "scatter", mode: "markers", x: counted.map((run) => run.top1 - base),
        y: counted.map((_, i) => row + (counted.length > 1 ? (i / (counted.length - 1) - 0.5) * 0.5 : 0)),
        text: counted.map((run) => `<b>${run.id}</b><br>top-1 ${run.top1.toFixed(2)}`), hovertemplate: "%{text}<br>%{x:+.2f} points<extra></extra>",
        marker: { color: colour(group), size: 7, opacity: 0.75, symbol: sign(group) },
      });
      const here = counted.reduce((sum, run) => sum + run.top1, 0) / counted.length - base;
      shapes.push({ type: "line", x0: here, x1: here, y0: row - 0.38, y1: row + 0.38, line: { color: css("--ink"), width: 2 } });
    }
    const height = Math.max(150, 90 + names.length * rowHeight(30, names.length));
    draw("seeds", traces, {
      height, shapes, margin: { l: labelMargin(names), r: 14, t: 10, b: 46 },
      xaxis: { title: { text: "points of top-1" }, zeroline: true, zerolinecolor: css("--soft"), zerolinewidth: 1, tickformat: "+.1~f" },
      yaxis: { tickvals: names.map((_, i) => i), ticktext: names, range: [names.length - 0.4, -0.6], showgrid: false, fixedrange: true },
    });
  }

  function timeline() {
    const lanes = shown.filter((i) => runs[i].spans.length).sort((a, b) => runs[a].spans[0].queued - runs[b].spans[0].queued);
    const found = new Map();
    const bar = (kind, shade, lane, from, to, text) => {
      if (!found.has(kind)) found.set(kind, { type: "bar", orientation: "h", name: kind, base: [], x: [], y: [], text: [], textposition: "none", width: 0.7,
        marker: { color: shade, line: { width: 0 } }, hovertemplate: "%{text}<extra></extra>" });
      const trace = found.get(kind);
      trace.base.push(new Date(from * 1000).toISOString()); trace.x.push(Math.max(0, to - from) * 1000); trace.y.push(lane); trace.text.push(text);
    };
    lanes.forEach((index, lane) => {
      for (const span of runs[index].spans) {
        const what = `<b>${runs[index].id}</b><br>attempt ${span.number}, job ${span.job}`;
        if (span.started > span.queued) bar("queued", QUEUED, lane, span.queued, span.started, `${what}<br>queued ${duration(span.started - span.queued)}`);
            bar(span.cause, ENDS[span.cause] ?? OTHER, lane, span.started, span.ended,
          `${what}<br>${span.cause} after ${duration(span.ended - span.started)}<br>steps ${span.steps[0]}–${span.steps[1]} on ${span.hosts.length} node(s)`);
      }
    });
    const thick = Math.max(3, Math.floor(rowHeight(Math.min(22, Math.round(900 / Math.max(1, lanes.length))), lanes.length)));
    const named = thick >= 12;
    draw("timeline", [...found.values()], {
      height: Math.max(140, 90 + lanes.length * thick), barmode: "overlay", showlegend: true,
      legend: { orientation: "h", x: 0, xref: "container", xanchor: "left", yref: "container", y: 1, yanchor: "top" }, margin: { l: labelMargin(named ? lanes.map((i) => runs[i].id) : []), r: 14, t: 70, b: 16 },
      xaxis: { type: "date", side: "top" },
      yaxis: { range: [lanes.length - 0.4, -0.6], showgrid: false, tickvals: named ? lanes.map((_, i) => i) : [], ticktext: named ? lanes.map((i) => runs[i].id) : [] },
    });
  }

  const CHARTS = [
    seeds, () => curves("loss", "loss", "Training loss", "loss", true), () => curves("top1", "scores", "Top-1 on validation images", "top-1, %", false),
    cost, speed, timeline,
  ];
  function drawAll() {
    CHARTS.forEach((chart) => chart());
    document.documentElement.dataset.drawn = shown.length;  // the charts agree with the tables
  }

  // ---- filter ----------------------------------------------------------------------------------------------------

  const filter = byId("filter");
  const lines = [...document.querySelectorAll("#runs tbody tr")];
  const searchText = new Map(lines.map((line) => {
    const run = runs[Number(line.dataset.run)];
    return [Number(line.dataset.run), `${line.textContent} ${run.reason} ${run.modified} ${run.group === null ? "" : groups[run.group].verdict}`.toLowerCase()];
  }));

  function apply() {
    const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    const off = new Set([...document.querySelectorAll('.state[aria-pressed="false"]')].map((button) => button.dataset.state));
    shown = runs.map((_, i) => i).filter((i) => !off.has(runs[i].state) && words.every((word) => searchText.get(i).includes(word)));
    const visible = new Set(shown), kept = new Set(shown.map((i) => runs[i].group));
    for (const line of lines) line.hidden = !visible.has(Number(line.dataset.run));
    for (const line of document.querySelectorAll("#groups tbody tr, #evaluations tbody tr[data-group], .legend span")) line.hidden = !kept.has(Number(line.dataset.group));
    const all = runs.length === 1 ? "1 run" : `${runs.length} runs`;
    byId("shown").textContent = shown.length === runs.length ? all : `${shown.length} of ${all}`;
  }
  let pending = 0;
  const filtered = () => { apply(); clearTimeout(pending); pending = setTimeout(drawAll, 150); };
  filter.addEventListener("input", filtered);
  for (const button of document.querySelectorAll(".state")) button.addEventListener("click", () => {
    button.setAttribute("aria-pressed", String(button.getAttribute("aria-pressed") === "false"));
    filtered();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "/" && document.activeElement === document.body) { event.preventDefault(); filter.focus(); }
  });

  // ---- sorting ---------------------------------------------------------------------------------------------------

  // The data value of a cell if it has one, else the number at the start of its text, if there is one.
  function value(row, column) {
    const cell = row.cells[column], text = cell.dataset.value ?? cell.textContent.trim();
    if (text === "") return null;
    const number = text.replace(/,/g, "").match(/^[+-]?\d+(\.\d+)?/);
    return number && !cell.classList.contains("word") ? Number(number[0]) : text;
  }
  for (const head of document.querySelectorAll("thead th")) head.querySelector("button").addEventListener("click", () => {
    const up = head.getAttribute("aria-sort") !== "ascending", table = head.closest("table"), body = table.tBodies[0];
    for (const other of table.querySelectorAll("thead th")) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const rows = [...body.rows].map((row) => [value(row, head.cellIndex), row]);
    rows.sort(([a], [b]) => {
      if (a === null || b === null) return (a === null) - (b === null);  // what is empty comes last either way
      const order = typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), "en", { numeric: true });
      return up ? order : -order;
    });
    body.append(...rows.map(([, row]) => row));
  });

  // ---- details of a run ------------------------------------------------------------------------------------------

  function duration(seconds) {
    const s = Math.round(seconds), h = Math.floor(s / 3600), m = Math.floor((s % 3600) / 60);
    return h ? `${h} h ${m} min` : m ? `${m} min ${s % 60} s` : `${s} s`;
  }
  const when = (time) => new Date(time * 1000).toISOString().slice(0, 19).replace("T", " ");
  function element(tag, text, children = []) {
    const made = document.createElement(tag);
    if (text) made.textContent = text;
    made.append(...children);
    return made;
  }
  // A recipe's field may be a list or a table; seven digits are what a float of a file means.
  function plain(value) {
    if (Array.isArray(value)) return value.map(plain).join(", ");
    if (value !== null && typeof value === "object") return Object.entries(value).map(([key, v]) => `${key} = ${plain(v)}`).join(", ");
    return typeof value === "number" && !Number.isInteger(value) ? String(Number(value.toPrecision(7))) : String(value);
  }
  const fixed = (value) => (value === null || value === undefined ? null : value.toFixed(2));
  const list = (pairs) => element("dl", "", pairs.filter(([, v]) => v !== null && v !== undefined && v !== "")
    .flatMap(([key, v]) => [element("dt", key), v instanceof Node ? element("dd", "", [v]) : element("dd", plain(v))]));

  function details(run) {
    const body = byId("details-body");
    byId("details-title").textContent = run.id;
    const parts = [list([
      ["state", run.state], ["reason", run.reason], ["group", run.group === null ? null : groups[run.group].label], ["changed", run.modified],
      ["top-1", fixed(run.top1)], ["top-5", fixed(run.top5)], [data.hours, run.hours], ["environment changed", run.changes], ["folder", run.url], ["damaged", run.damage],
    ])];
    if (run.spans.length) {
      const head = element("tr", "", ["attempt", "queued", "started (UTC)", "ran", "steps", "exit reason", "ranks", "hosts"].map((t) => element("th", t)));
      const rows = run.spans.map((s) => element("tr", "", [
        s.number, duration(s.started - s.queued), when(s.started), duration(s.ended - s.started), s.steps.join("–"),
        s.message ? `${s.cause}: ${s.message}` : s.cause, s.ranks, s.hosts.join(" "),
      ].map((t) => element("td", String(t)))));
      const wide = element("div", "", [element("table", "", [head, ...rows])]);
      wide.className = "wide";
      parts.push(element("h3", "Attempts"), wide);
    }
    if (run.evaluations.length) parts.push(element("h3", "Evaluations"), list(run.evaluations));
    const measured = Object.entries(run.measured);
    if (measured.length) parts.push(element("h3", "Speed and hardware"), list(measured));
    parts.push(element("h3", "Logs"));
    const command = element("p", "", [element("code", `rsb-cluster logs ${run.id}`)]);
    const links = run.logs.map(([text, link]) => {
      const made = element(link ? "a" : "span", text);
      if (link) made.href = encodeURI(link).replace(/[?#]/g, encodeURIComponent);
      return element("li", "", [made]);
    });
    parts.push(command, element("ul", "", links));
    if (run.recipe !== undefined) parts.push(element("h3", "Recipe"), list(Object.entries(data.recipes[run.recipe])));
    if (run.environment !== undefined) parts.push(element("h3", "Environment"), list(Object.entries(data.environments[run.environment])));
    body.replaceChildren(...parts);
    byId("details").showModal();
    byId("details").scrollTop = 0;
  }
  byId("runs").addEventListener("click", (event) => {
    const button = event.target.closest(".open");
    if (button) details(runs[Number(button.closest("tr").dataset.run)]);
  });
  byId("details").addEventListener("click", (event) => { if (event.target === byId("details")) byId("details").close(); });

  // ---- start -----------------------------------------------------------------------------------------------------

  for (const swatch of document.querySelectorAll("[data-swatch]")) swatch.style.background = colour(Number(swatch.dataset.swatch));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
  paper.addEventListener("change", drawAll);
  drawAll();
})();
