// The curves of the run, above its episodes. A point is an iteration of a split: choosing it lists its episodes.

const SVG = "http://www.w3.org/2000/svg";
const SIZE = { width: 380, height: 168, left: 44, right: 14, top: 8, bottom: 22 };
const MOST_DOTS = 40;
const curves = document.getElementById("curves");
const plots = [];

function draw(tag, attributes = {}, ...children) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

// ---- Axes ----

// Round numbers within a range, about as many as wanted.
function ticks(low, high, wanted, whole = false) {
  const rough = (high - low) / wanted;
  const power = 10 ** Math.floor(Math.log10(rough));
  let step = [1, 2, 2.5, 5, 10].map((factor) => factor * power).find((size) => size >= rough * 0.8);
  if (whole) step = Math.max(1, Math.round(step));
  const values = [];
  for (let at = Math.ceil(low / step - 1e-9); at * step <= high + step * 1e-9; at++) {
    values.push(Number((at * step).toPrecision(12)));
  }
  return values;
}

function powers(low, high) {
  const values = [];
  const first = Math.ceil(Math.log10(low) - 1e-9);
  const last = Math.floor(Math.log10(high) + 1e-9);
  const step = Math.max(1, Math.ceil((last - first) / 4));
  for (let at = first; at <= last; at += step) values.push(10 ** at);
  return values.length > 1 ? values : [low, high];
}

function label(value, percent) {
  if (percent) return `${Number((value * 100).toPrecision(3))}%`;
  const size = Math.abs(value);
  if (size !== 0 && (size >= 1e5 || size < 1e-3)) return value.toExponential(1).replace("e+", "e").replace(".0", "");
  return String(Number(value.toPrecision(4)));
}

// Where values lie from bottom (0) to top (1). Values that span powers of ten get a logarithmic axis.
function valueAxis(chart, layers) {
  const values = layers.flatMap((layer) => [...layer.top, ...layer.bottom]);
  if (chart.reference !== null) values.push(chart.reference);
  let low = values.reduce((a, b) => Math.min(a, b));
  let high = values.reduce((a, b) => Math.max(a, b));
  if (chart.stacked && chart.percent) return { marks: ticks(0, 1, 4), at: (value) => value };
  if (chart.ordered && low > 0 && high / low > 50) {
    const span = Math.log(high / low);
    return { marks: powers(low, high), at: (value) => Math.log(value / low) / span };
  }
  if (chart.zero) low = Math.min(low, 0);
  const room = 0.05 * (high - low) || Math.max(0.05 * Math.abs(high), 1e-3);
  if (!(chart.zero && low === 0)) low -= room;
  if (!(chart.percent && high === 1)) high += room;
  return { marks: ticks(low, high, 4), at: (value) => (value - low) / (high - low) };
}

// ---- One chart ----

// Bottom and top of each series at its iterations: the band around a curve, or its part of the stack.
function layersOf(chart) {
  const total = new Map();
  return chart.series.map((series) => {
    if (!chart.stacked) return { series, bottom: series.low || series.y, top: series.high || series.y };
    const bottom = series.x.map((at) => total.get(at) || 0);
    const top = series.y.map((value, index) => value + bottom[index]);
    series.x.forEach((at, index) => total.set(at, top[index]));
    return { series, bottom, top };
  });
}

// A curve breaks where its split has an iteration in which the series does not occur.
function piecesOf(chart, series) {
  const iterations = iterationsOf(chart.series.filter((other) => other.split === series.split));
  const place = new Map(iterations.map((at, index) => [at, index]));
  const starts = series.x.flatMap((at, index) =>
    (index > 0 && place.get(at) > place.get(series.x[index - 1]) + 1 ? [index] : []));
  return [0, ...starts].map((start, index) => [start, starts[index] ?? series.x.length]);
}

function iterationsOf(series) {
  return [...new Set(series.flatMap((one) => one.x))].sort((a, b) => a - b);
}

function colour(chart, index) {
  if (!chart.ordered) return `var(--curve-${index % 7})`;
  const share = chart.series.length < 2 ? 1 : index / (chart.series.length - 1);
  return `color-mix(in oklch, var(--last) ${Math.round(share * 100)}%, var(--first))`;
}

function bandAt(chart, series, index) {
  if (!series.low) return "";
  const [low, high] = [series.low[index], series.high[index]].map((value) => Number(value.toPrecision(3)));
  return ` (${label(low, chart.percent)} to ${label(high, chart.percent)})`;
}

function reading(chart, series, index) {
  return label(series.y[index], chart.percent) + bandAt(chart, series, index);
}

function summaryOf(chart) {
  const parts = chart.series.map((series) => {
    const last = series.x.length - 1;
    const from = last > 0 ? `${label(series.y[0], chart.percent)} at iteration ${series.x[0]}, ` : "";
    return `${words(series.name)} ${from}${label(series.y[last], chart.percent)} at iteration ${series.x[last]}`;
  });
  return `${visible(chart.title)} by iteration. ${parts.join("; ")}.`;
}

function plot(chart, range) {
  const { width, height, left, right, top, bottom } = SIZE;
  const layers = layersOf(chart);
  const axis = valueAxis(chart, layers);
  const x = (at) => left + ((at - range.low) / (range.high - range.low)) * (width - left - right);
  const y = (value) => height - bottom - axis.at(value) * (height - top - bottom);
  const fixed = (number) => number.toFixed(1);
  const line = (xs, ys) => xs.map((at, index) => `${fixed(x(at))} ${fixed(y(ys[index]))}`).join("L");

  const svg = draw("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": summaryOf(chart) });
  for (const value of axis.marks) {
    svg.append(draw("path", { class: "grid", d: `M${left} ${fixed(y(value))}H${width - right}` }),
      draw("text", { x: left - 6, y: fixed(y(value) + 3.5), "text-anchor": "end" }, label(value, chart.percent)));
  }
  for (const at of ticks(range.low, range.high, 6, true)) {
    svg.append(draw("text", { x: fixed(x(at)), y: height - 6, "text-anchor": "middle" }, String(at)));
  }
  if (chart.reference !== null) {
    svg.append(draw("path", { class: "reference", d: `M${left} ${fixed(y(chart.reference))}H${width - right}` }));
  }
  layers.forEach((layer, index) => {
    const { series } = layer;
    const shade = colour(chart, index);
    if (chart.stacked || series.low) {
      let outline = `M${line(series.x, layer.top)}L${line([...series.x].reverse(), [...layer.bottom].reverse())}Z`;
      if (series.x.length === 1) {  // an area needs a width
        outline = `M${fixed(x(series.x[0]) - 4)} ${fixed(y(layer.top[0]))}h8V${fixed(y(layer.bottom[0]))}h-8Z`;
      }
      svg.append(draw("path", { class: chart.stacked ? "part-of" : "band", fill: shade, d: outline }));
    }
    if (chart.stacked) return;
    const pieces = piecesOf(chart, series).map(([start, end]) =>
      `M${line(series.x.slice(start, end), series.y.slice(start, end))}${end - start === 1 ? "h0" : ""}`);
    svg.append(draw("path", { class: series.x.length > MOST_DOTS ? "curve thin" : "curve", stroke: shade, d: pieces.join("") }));
    if (series.x.length <= MOST_DOTS) {
      series.x.forEach((at, place) => svg.append(draw("circle",
        { class: "dot", fill: shade, r: 2, cx: fixed(x(at)), cy: fixed(y(series.y[place])) })));
    }
  });
  const chosen = draw("path", { class: "chosen", visibility: "hidden" });
  const guide = draw("path", { class: "guide", visibility: "hidden" });
  const dot = draw("circle", { class: "dot", r: 4, visibility: "hidden" });
  svg.append(chosen, guide, dot);

  const upright = (path, at) => {
    path.setAttribute("visibility", at === null || at < range.low || at > range.high ? "hidden" : "visible");
    if (at !== null) path.setAttribute("d", `M${fixed(x(at))} ${top}V${height - bottom}`);
  };
  const middle = (index, place) => chart.stacked
    ? (layers[index].top[place] + layers[index].bottom[place]) / 2 : layers[index].series.y[place];
  return {
    chart, svg, layers,
    at: x,
    height: (index, place) => y(middle(index, place)),
    choose: (at) => upright(chosen, at),
    guide: (at) => upright(guide, at),
    point(index, place) {
      dot.setAttribute("visibility", index === null || chart.stacked ? "hidden" : "visible");
      if (index === null) return;
      dot.setAttribute("fill", colour(chart, index));
      dot.setAttribute("cx", fixed(x(layers[index].series.x[place])));
      dot.setAttribute("cy", fixed(y(middle(index, place))));
    },
  };
}

// ---- Choosing an iteration ----

// The pointer, or the arrow keys, choose an iteration and a series; a click, or Enter, goes to its episodes.
function figure(chart, range) {
  const plotted = plot(chart, range);
  plots.push(plotted);
  const iterations = iterationsOf(chart.series);
  const tip = make("div", { class: "tip" });
  const cover = make("div", { class: "cover" });
  cover.tabIndex = 0;
  cover.setAttribute("role", "slider");
  cover.setAttribute("aria-label", `${visible(chart.title)}: iteration. Enter goes to its episodes`);
  cover.setAttribute("aria-valuemin", iterations[0]);
  cover.setAttribute("aria-valuemax", iterations.at(-1));
  let place = iterations.length - 1;  // in iterations
  let chosen = 0;  // in chart.series

  const present = () => chart.series.flatMap((series, index) => {
    const at = series.x.indexOf(iterations[place]);
    return at < 0 ? [] : [{ series, index, at }];
  });

  function describe() {
    const here = present();
    if (!here.some(({ index }) => index === chosen)) chosen = here[0].index;
    const lines = here.map(({ series, index, at }) => `${words(series.name)} ${reading(chart, series, at)}`);
    cover.setAttribute("aria-valuenow", iterations[place]);
    cover.setAttribute("aria-valuetext", `iteration ${iterations[place]}: ${lines.join(", ")}`);
    return here;
  }

  function point() {
    const here = describe();
    for (const other of plots) other.guide(iterations[place]);
    plotted.point(chosen, here.find(({ index }) => index === chosen).at);
    const { split } = chart.series[chosen];
    const listed = isListed(split, iterations[place]);
    tip.replaceChildren(make("b", {}, `Iteration ${iterations[place]}`),
      ...here.map(({ series, index, at }) => make("div", { class: index === chosen ? "now" : "" },
        swatch(colour(chart, index)), make("span", {}, words(series.name)), label(series.y[at], chart.percent),
        make("small", {}, bandAt(chart, series, at)))),
      ...(listed ? [] : [make("i", {}, "Episodes not on this page")]));
    const share = plotted.at(iterations[place]) / SIZE.width;
    tip.style[share < 0.5 ? "left" : "right"] = `${100 * (share < 0.5 ? share : 1 - share) + 2}%`;
    tip.style[share < 0.5 ? "right" : "left"] = "auto";
    tip.hidden = false;
  }

  function leave() {
    for (const other of plots) other.guide(null);
    plotted.point(null);
    tip.hidden = true;
  }

  function follow(event) {
    const box = cover.getBoundingClientRect();
    const across = ((event.clientX - box.left) / box.width) * SIZE.width;
    const down = ((event.clientY - box.top) / box.height) * SIZE.height;
    const nearest = (count, distance) => [...Array(count).keys()].reduce((a, b) => (distance(b) < distance(a) ? b : a));
    place = nearest(iterations.length, (index) => Math.abs(plotted.at(iterations[index]) - across));
    const here = present();
    chosen = here[nearest(here.length, (n) => Math.abs(plotted.height(here[n].index, here[n].at) - down))].index;
    point();
  }

  const step = (by) => { place = Math.min(Math.max(place + by, 0), iterations.length - 1); };
  const turn = (by) => {
    const here = present().map(({ index }) => index);
    chosen = here[(here.indexOf(chosen) + by + here.length) % here.length];
  };
  const keys = {
    ArrowLeft: () => step(-1), ArrowRight: () => step(1), ArrowUp: () => turn(-1), ArrowDown: () => turn(1),
    PageDown: () => step(-10), PageUp: () => step(10), Home: () => step(-Infinity), End: () => step(Infinity),
  };
  cover.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "Enter") goTo(chart.series[chosen].split, iterations[place]);
    else if (event.key === "Escape") leave();
    else if (Object.hasOwn(keys, event.key)) {
      keys[event.key]();
      point();
    } else return;
    event.preventDefault();
    event.stopPropagation();
  });
  cover.addEventListener("focus", () => { if (cover.matches(":focus-visible")) point(); });
  cover.addEventListener("blur", leave);
  cover.addEventListener("pointermove", follow);
  cover.addEventListener("pointerleave", leave);
  cover.addEventListener("click", (event) => {
    follow(event);
    goTo(chart.series[chosen].split, iterations[place]);
  });
  leave();
  describe();
  const names = chart.series.map((series, index) => make("span", { title: words(series.name) },
    swatch(colour(chart, index)), words(series.name)));
  return make("figure", {},
    make("figcaption", {}, make("b", {}, visible(chart.title)), ` ${visible(chart.note)}`),
    make("div", { class: "names" }, ...names),
    make("div", { class: "plot" }, plotted.svg, cover, tip));
}

function swatch(shade) {
  const mark = make("i", { class: "swatch" });
  mark.style.background = shade;
  return mark;
}

function isListed(split, iteration) {
  return trajectories.some((one) => one.split === split && one.iteration === iteration);
}

function goTo(split, iteration) {
  if (!isListed(split, iteration)) {
    tellMissing(split, iteration);
    return;
  }
  tellListed();
  const set = () => {
    input.split.value = split;
    input.iteration.value = String(iteration);
    form.dispatchEvent(new Event("input"));
  };
  set();
  if (!shown.length) {  // the other filters hide them all
    form.reset();
    set();
  }
  select(shown[0]);
  explorer.scrollIntoView();
  list.focus({ preventScroll: true });
}

// Under the curves: which episodes are here, and the way to others. The server of a run that is followed has them all.
function tellListed() {
  const asked = new URLSearchParams(location.search).getAll("iteration");
  if (data.watch && asked.length) answer(`Listed: iteration ${asked.join(", ")}. `, link("/", "List the latest"));
  else answer();
}

function tellMissing(split, iteration) {
  answer(`The ${visible(split)} episodes of iteration ${iteration} are not on this page. `, data.watch
    ? link(`/?iteration=${iteration}#explorer`, "Show them")
    : `--iteration ${iteration} shows them, and so may a larger --max-trajectories.`);
  document.getElementById("answer").scrollIntoView({ block: "nearest" });
}

function answer(...parts) {
  document.getElementById("answer").replaceChildren(...parts);
}

function link(address, name) {
  const element = make("a", {}, name);
  element.href = address;
  return element;
}

// ---- Tables ----

function tableOf(chart) {
  const iterations = iterationsOf(chart.series);
  const cells = chart.series.map((series) =>
    new Map(series.x.map((at, index) => [at, reading(chart, series, index)])));
  const head = ["Iteration", ...chart.series.map((series) => words(series.name))];
  return make("table", {}, make("caption", {}, `${visible(chart.title)}: ${visible(chart.note)}`),
    make("thead", {}, make("tr", {}, ...head.map((name) => make("th", {}, name)))),
    make("tbody", {}, ...iterations.map((at) => make("tr", {}, make("td", {}, String(at)),
      ...cells.map((column) => make("td", {}, column.get(at) ?? "-"))))));
}

function numbers(charts) {
  const details = make("details", { class: "numbers" }, make("summary", {}, "The numbers as tables"));
  details.addEventListener("toggle", () => {
    if (details.children.length < 2) details.append(make("div", {}, ...charts.map(tableOf)));
  });
  return details;
}

// ---- All of them ----

function drawCurves(charts) {
  const iterations = iterationsOf(charts.flatMap((chart) => chart.series));
  if (iterations.length) {
    const range = { low: iterations[0], high: iterations.at(-1) };
    if (range.low === range.high) {
      range.low -= 1;
      range.high += 1;
    }
    curves.append(make("div", { class: "figures" }, ...charts.map((chart) => figure(chart, range))));
  }
  const status = make("p", { class: "answer" });
  status.id = "answer";
  status.setAttribute("role", "status");
  curves.append(status, ...data.notices.map((notice) => make("p", { class: "notice" }, visible(notice))));
  if (iterations.length) curves.append(numbers(charts));
}

function markChosen() {
  const at = input.iteration.value === "" ? null : Number(input.iteration.value);
  for (const one of plots) one.choose(at);
}

drawCurves(data.charts);
tellListed();
form.addEventListener("input", markChosen);
form.addEventListener("reset", () => setTimeout(markChosen));
