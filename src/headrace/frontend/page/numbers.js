// Pure arithmetic of the page: differences of cumulative counts, quantiles of them, and numbers as people read them.

export const RATE_S = 2; // what "now" is a mean over
export const WINDOW_S = 10;
export const HISTORY_S = 120;

/** The newest sample that is at least `seconds` older than the last, or else the oldest. */
export function before(samples, seconds) {
  const limit = samples[samples.length - 1].at - seconds;
  let found = samples[0];
  for (const sample of samples) {
    if (sample.at > limit) break;
    found = sample;
  }
  return found;
}

/** What the list `now` has more than `then`: both are entries with a `key` and counts. Entries only come and grow. */
export function grown(now, then, key, ...counts) {
  const old = new Map(then.map((entry) => [entry[key], entry]));
  return now.map((entry) => {
    const was = old.get(entry[key]);
    const change = { ...entry };
    for (const count of counts) change[count] = entry[count] - (was ? was[count] : 0);
    return change;
  });
}

/** The value in nanoseconds that `share` of the buckets' counts do not exceed; null without any. */
export function quantile(buckets, share) {
  const total = buckets.reduce((sum, bucket) => sum + bucket.count, 0);
  let wanted = share * total;
  for (const { lower_ns: lower, upper_ns: upper, count } of buckets) {
    if (count > 0 && wanted <= count) return lower + ((upper - lower) * wanted) / count;
    wanted -= count;
  }
  return null;
}

/** Counts by batch size: every size where there are few, else a row for each power of two and what is below. */
export function sized(batches, most) {
  const last = Math.max(most || 1, ...batches.map((batch) => batch.rows));
  const uppers = [];
  if (last <= 12) for (let rows = 1; rows <= last; rows += 1) uppers.push(rows);
  else for (let rows = 1; rows < 2 * last; rows *= 2) uppers.push(Math.min(rows, last));
  return uppers.map((upper, place) => {
    const lower = place ? uppers[place - 1] + 1 : 1;
    const count = batches.reduce((sum, { rows, count: n }) => sum + (rows >= lower && rows <= upper ? n : 0), 0);
    return { name: lower === upper ? `${upper}` : `${lower}–${upper}`, count };
  });
}

const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const tenths = new Intl.NumberFormat("en", { minimumFractionDigits: 1, maximumFractionDigits: 1 });

export const count = (value) => whole.format(value);
export const rate = (value) => (value < 100 ? tenths : whole).format(value);
export const percent = (share) => `${tenths.format(100 * share)} %`;

const significant = (value) => (value >= 99.95 ? whole.format(value) : value.toFixed(value >= 9.995 ? 1 : 2));

/** Nanoseconds with three digits, as [number, unit]. */
export function duration(ns) {
  if (ns >= 0.9995e9) return [significant(ns / 1e9), "s"];
  if (ns >= 0.9995e6) return [significant(ns / 1e6), "ms"];
  return [significant(ns / 1e3), "µs"];
}

export const gigabytes = (bytes) => tenths.format(bytes / 1e9);

/** Seconds as "3 d 04 h", "2 h 05 min", "4 min 09 s" or "7 s". */
export function age(seconds) {
  const parts = [["d", 86400], ["h", 3600], ["min", 60], ["s", 1]];
  const first = Math.max(0, parts.findIndex(([, size]) => seconds >= size));
  const [unit, size] = parts[seconds < 1 ? 3 : first];
  const next = parts[parts.findIndex(([name]) => name === unit) + 1];
  const text = `${Math.floor(seconds / size)} ${unit}`;
  return next ? `${text} ${String(Math.floor((seconds % size) / next[1])).padStart(2, "0")} ${next[0]}` : text;
}
