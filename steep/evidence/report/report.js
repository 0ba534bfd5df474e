"use strict";
// Opens folded sections before the page is printed, and folds them again afterwards.
addEventListener("beforeprint", () => {
  for (const fold of document.querySelectorAll("details:not([open]):not(.screen)")) {
    fold.open = true;
    addEventListener("afterprint", () => { fold.open = false; }, { once: true });
  }
});

// Draws the learning curves that the form selects, with Plotly (embedded, compressed).
if (document.getElementById("curves")) (async () => {
  const study = JSON.parse(document.getElementById("curves").textContent);
  const form = document.getElementById("view");
  const plot = document.getElementById("plot");
  const done = (state) => { document.documentElement.dataset.charts = state; };

  async function loadPlotly() {
    const packed = Uint8Array.from(atob(document.getElementById("plotly").textContent), (c) => c.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
    const script = document.createElement("script");
    script.textContent = await new Response(stream).text();
    document.head.append(script);
  }

  const ROUND = Array.from({ length: 60 }, (_, i) => Number(`${[1, 2, 5][i % 3]}e${Math.floor(i / 3) - 12}`));
  const extent = (values) => [Math.min(...values), Math.max(...values)];
  const short = (value) => String(Number(value.toPrecision(4)));

  function line(arm, s, unit, what) {
    return {
      x: s.x, y: s.mid, name: arm.name.replace(/</g, "&lt;"), mode: "lines", line: { color: arm.colour, width: 2, dash: arm.dash || "solid" },
      text: s.x.map((x, i) => {
        const band = i < s.low.length ? ` (${short(s.low[i])} to ${short(s.high[i])})` : "";
        return `${short(x)} ${unit}<br>${what} ${short(s.mid[i])}${band}`;
      }),
      hovertemplate: "<b>%{fullData.name}</b><br>%{text}<extra></extra>",
    };
  }

  function band(arm, s) {
    const back = s.x.slice(0, s.low.length).reverse();
    return {
      x: s.x.slice(0, s.low.length).concat(back), y: s.high.concat(s.low.slice().reverse()), mode: "lines",
      fill: "toself", fillcolor: arm.colour + "1f", line: { width: 0 }, hoverinfo: "skip",
    };
  }

  function reference(level, drawn, dash) {
    const ends = extent(drawn.flatMap(([, s]) => s.x));
    return { x: ends, y: [level, level], mode: "lines", hoverinfo: "skip", line: { color: "#808080", width: 1.5, dash } };
  }

  function draw() {
    const view = new FormData(form);
    const [x, y] = [view.get("x"), view.get("y")];
    const scalable = study.log && (y === "loss" || y === "ratio");
    document.getElementById("scales").disabled = !scalable;
    const type = scalable && form.elements.scale.value === "log" ? "log" : "linear";
    const what = y === "ratio" ? "loss ÷ baseline’s" : y;
    const drawn = view.getAll("arm").map((i) => [study.arms[i], study.arms[i].series[y][x]]).filter(([, s]) => s);
    const traces = view.get("bands") === "shown" ? drawn.map(([arm, s]) => band(arm, s)) : [];
    if (y === "ratio" && drawn.length) traces.push(reference(1, drawn, "solid"));
    if (y === "loss" && drawn.length && study.target !== null) traces.push(reference(study.target, drawn, "dot"));
    traces.push(...drawn.map(([arm, s]) => line(arm, s, x === "step" ? "steps" : x, what)));
    const [low, high] = extent(traces.flatMap((t) => t.y));
    const ticks = type === "log" && high > 3 * low
      ? { tickvals: ROUND, ticktext: ROUND.map((v) => (v < 1e-3 || v > 9999 ? v.toExponential(0) : String(v))) } : {};
    const axis = { gridcolor: "#80808033", linecolor: "#808080", zeroline: false, automargin: true, showline: true };
    Plotly.react(plot, traces, {
      showlegend: false, hovermode: "closest", uirevision: [x, y, type].join(), margin: { l: 10, r: 10, t: 10, b: 10 },
      paper_bgcolor: "#0000", plot_bgcolor: "#0000", font: { family: getComputedStyle(plot).fontFamily, size: 13 },
      modebar: { bgcolor: "#0000", color: "#808080", activecolor: "#808080" },
      dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom",
      xaxis: { ...axis, title: { text: study.x[x] }, rangemode: "tozero", showgrid: false, ticks: "outside" },
      yaxis: { ...axis, title: { text: study.y[y] }, type, ...ticks },
    }, { responsive: true, displaylogo: false, modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]] });
  }

  try {
    await loadPlotly();
    plot.textContent = "";
    draw();
  } catch (error) {
    plot.textContent = `The curves could not be drawn (${error}). This needs a browser from 2023 or later. The numbers are in report.csv.`;
    return done("failed");
  }
  form.addEventListener("change", draw);
  form.addEventListener("click", ({ target }) => {
    if (target.type !== "button") return;
    for (const box of form.querySelectorAll("[name=arm]")) box.checked = Boolean(target.value);
    draw();
  });
  addEventListener("beforeprint", () => Plotly.relayout(plot, { width: 680, height: 330, "font.size": 10 }));
  addEventListener("afterprint", () => Plotly.relayout(plot, { width: null, height: null, "font.size": 13, autosize: true }));
  done("ready");
})();
