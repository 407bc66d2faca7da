// The two drawings of the page, as SVG that stretches to its place. Whatever is text stands beside it, in HTML.

const WIDTH = 240;
const HEIGHT = 60;
const SVG = "http://www.w3.org/2000/svg";

function put(svg, name, kind, attributes) {
  const element = document.createElementNS(SVG, name);
  element.setAttribute("class", kind);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  svg.append(element);
}

/** Draw values over the last `span` seconds; points are {at, value, gap}, and a gap begins a new line. */
export function line(svg, points, span, top) {
  svg.replaceChildren();
  if (!points.length) return;
  const end = points[points.length - 1].at;
  const x = (at) => (WIDTH * (1 - (end - at) / span)).toFixed(2);
  const y = (value) => (HEIGHT * (1 - (top ? value / top : 0))).toFixed(2);
  const runs = [];
  for (const point of points) {
    if (point.gap || !runs.length) runs.push([]);
    runs[runs.length - 1].push(point);
  }
  for (const run of runs) {
    const path = run.map(({ at, value }) => `${x(at)} ${y(value)}`).join(" L");
    put(svg, "path", "area", { d: `M${x(run[0].at)} ${HEIGHT} L${path} L${x(run[run.length - 1].at)} ${HEIGHT} Z` });
    put(svg, "path", "line", { d: `M${path}` });
  }
}

/** The decades that hold all buckets, as [from, to] in nanoseconds. */
export function decades(buckets) {
  const used = buckets.filter((bucket) => bucket.count > 0);
  if (!used.length) return [1e5, 1e8];
  const from = Math.floor(Math.log10(Math.max(1, used[0].lower_ns)));
  const to = Math.max(from + 2, Math.ceil(Math.log10(used[used.length - 1].upper_ns)));
  return [10 ** from, 10 ** to];
}

/** Where a time lies on the axis between two others, 0 to 1. */
export const place = (ns, [from, to]) => Math.log(ns / from) / Math.log(to / from);

/** Draw how often response times were what they were, on a logarithmic axis, with lines at `marks`. */
export function distribution(svg, buckets, axis, marks) {
  svg.replaceChildren();
  const bars = 60;
  const heights = new Array(bars).fill(0);
  for (const { lower_ns: lower, upper_ns: upper, count } of buckets) {
    spread(heights, place(Math.max(lower, axis[0]), axis) * bars, place(upper, axis) * bars, count);
  }
  const top = Math.max(...heights);
  heights.forEach((height, index) => {
    if (!height) return;
    const tall = Math.max(1, (HEIGHT * height) / top);
    const x = (index * WIDTH) / bars + 0.3;
    put(svg, "rect", "bar", { x, y: HEIGHT - tall, width: WIDTH / bars - 0.6, height: tall });
  });
  for (const mark of marks) {
    const x = WIDTH * place(mark, axis);
    put(svg, "line", "mark", { x1: x, x2: x, y1: 0, y2: HEIGHT });
  }
}

/** Share a bucket's count out to the bars that it covers. */
function spread(heights, from, to, count) {
  for (let bar = Math.floor(from); bar < Math.min(to, heights.length); bar += 1) {
    heights[bar] += (count * (Math.min(to, bar + 1) - Math.max(from, bar))) / (to - from);
  }
}
