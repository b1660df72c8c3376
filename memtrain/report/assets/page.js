// Draws the figures of #data with uPlot. Texts reach the page through uPlot alone, which sets textContent.
"use strict";
(() => {
  const root = document.documentElement;
  const colour = (name) => getComputedStyle(root).getPropertyValue("--" + name).trim() || `hsl(${ramp(name)} 70% 55%)`;
  const ramp = (name) => 220 - 24 * Number(name.replace("bin", "")); // timestep bins: blue for low noise, red for high
  const seeThrough = (name) => `color-mix(in srgb, ${colour(name)} 38%, transparent)`;
  const short = (value) => (value == null ? "–" : String(+value.toPrecision(4)));

  // One x axis for all series. A scatter keeps each of its points; curves share the x they have in common.
  const aligned = (figure) => {
    if (!figure.series.some((series) => series.points)) return uPlot.join(figure.series.map((s) => [s.x, s.y]));
    const rows = figure.series.flatMap((series, number) => series.x.map((x, at) => [x, number, series.y[at]]));
    rows.sort((a, b) => a[0] - b[0]);
    return [rows.map((row) => row[0]), ...figure.series.map((_, n) => rows.map((row) => (row[1] === n ? row[2] : null)))];
  };

  const marker = (figure) => (u, number) => (number ? colour(figure.series[number - 1].colour) : null);

  const options = (figure, width) => ({
    width,
    height: figure.labels || figure.scatter ? 380 : 240,
    scales: {
      x: { time: false, range: (u, lo, hi) => xRange(figure, lo, hi) },
      y: figure.scatter ? { distr: 3 } : { range: (u, lo, hi) => yRange(figure, lo, hi) },
    },
    cursor: { drag: { x: true, y: figure.scatter || figure.labels, uni: 20 }, focus: { prox: 24 } },
    focus: { alpha: 0.35 },
    legend: { live: true, markers: { width: 2, stroke: marker(figure), fill: marker(figure) } },
    axes: [axis(figure.x_label, 44), axis(figure.y_label, 16)],
    series: [
      { label: figure.x_label.split(" (")[0], value: (u, value) => short(value) },
      ...figure.series.map((series) => ({
        label: series.name,
        value: (u, value) => short(value),
        stroke: () => (series.faint ? seeThrough(series.colour) : colour(series.colour)),
        width: series.points ? 0 : 1.8,
        dash: series.dashed ? [6, 4] : undefined,
        spanGaps: true,
        paths: series.points ? () => null : undefined,
        points: series.points
          ? { show: true, size: series.faint ? 3.5 : 10, width: 0, fill: () => (series.faint ? seeThrough(series.colour) : colour(series.colour)) }
          : { show: series.x.length < 40, size: series.x.length > 1 ? 4 : 10, fill: () => colour(series.colour) },
      })),
    ],
    hooks: figure.labels ? { draw: [(u) => nameThePoints(u, figure)] } : {},
  });

  // Room around what is shown; a difference of less than a percent shall not look large in the plane.
  const padded = (lo, hi, share, least) => {
    const room = Math.max((hi - lo) * share, Math.abs(hi) * least) || 0.5;
    return [lo - room, hi + room];
  };

  const xRange = (figure, lo, hi) => {
    const all = figure.series.flatMap((series) => series.x);
    const single = all.every((x) => x === all[0]);
    if (figure.labels) return padded(single ? all[0] : lo, single ? all[0] : hi, 0.2, 0.01);
    return single ? [0, 1.2 * all[0] || 1] : [lo, hi]; // an axis needs a width
  };

  const yRange = (figure, lo, hi) => {
    if (lo == null) return [0, 1];
    const [low, high] = padded(lo, hi, figure.labels ? 0.2 : 0.06, 0.01);
    if (figure.y_min == null) return [low, high];
    return [figure.y_min, figure.y_max ?? Math.max(high, figure.y_min + 0.05)]; // shares: hardly any shall look so
  };

  const axis = (label, gap) => ({
    label: label || undefined,
    labelSize: label ? 22 : 0,
    labelFont: "12px system-ui, sans-serif",
    font: "11px system-ui, sans-serif",
    size: gap === 44 ? 30 : 54,
    stroke: () => colour("muted"),
    grid: { stroke: () => colour("line"), width: 1 },
    ticks: { stroke: () => colour("line"), width: 1 },
    values: (u, ticks) => ticks.map((tick) => (tick == null ? "" : short(tick))),
  });

  const nameThePoints = (u, figure) => {
    const { ctx } = u;
    ctx.save();
    ctx.font = `${12 * devicePixelRatio}px system-ui, sans-serif`;
    ctx.textBaseline = "bottom";
    figure.series.forEach((series, number) => {
      if (!u.series[number + 1].show) return;
      const x = u.valToPos(series.x[0], "x", true);
      const y = u.valToPos(series.y[0], "y", true);
      const inside = x >= u.bbox.left && x <= u.bbox.left + u.bbox.width && y >= u.bbox.top && y <= u.bbox.top + u.bbox.height;
      if (!inside) return;
      const right = x > u.bbox.left + u.bbox.width / 2;
      ctx.textAlign = right ? "right" : "left";
      ctx.fillStyle = colour(series.colour);
      ctx.fillText(series.name, x + (right ? -8 : 8) * devicePixelRatio, y - 4 * devicePixelRatio);
    });
    ctx.restore();
  };

  for (const figure of JSON.parse(document.getElementById("data").textContent)) {
    const chart = document.querySelector(`[data-figure="${CSS.escape(figure.id)}"] .chart`);
    const width = () => Math.max(220, Math.floor(chart.clientWidth));
    let plot;
    const draw = () => {
      plot?.destroy();
      plot = new uPlot(options(figure, width()), aligned(figure), chart);
    };
    draw();
    new ResizeObserver(() => {
      if (width() !== plot.width) plot.setSize({ width: width(), height: plot.height });
    }).observe(chart);
    // canvas and legend hold colours of their own
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  }
})();
