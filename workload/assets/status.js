// The shop's state, asked for again and again while somebody looks.

import { get } from "./api.js";
import { pause } from "./dom.js";

/** Often enough for live figures; each answer costs one request to each service. */
const INTERVAL_MS = 1000;

/** Two minutes of samples. */
const SAMPLES = 120;

/** A gateway that is silent for so long is shown as such. */
const PATIENCE_MS = 4000;

const listeners = new Set();

/** The last answer of `/api/status` and how it was got; `failure` when there was none. */
export const state = { status: null, failure: null, samples: [] };

const sum = (values) => values.reduce((total, value) => total + value, 0);

/** Figures over all services, from their own health; null where none is known. */
export function figures(status) {
  const healths = (status?.services ?? []).map((service) => service.health).filter((health) => health?.pool);
  if (healths.length === 0) return null;
  const latencies = healths.map((health) => health.latency).filter((latency) => latency?.count > 0);
  const max = sum(healths.map((health) => health.pool.max));
  const active = sum(healths.map((health) => health.pool.active));
  return {
    p95_ms: latencies.length > 0 ? Math.max(...latencies.map((latency) => latency.p95_ms)) : null,
    active: sum(healths.map((health) => health.queries?.active ?? 0)),
    pool_active: active,
    pool_max: max,
    pool_utilization_percent: max > 0 ? (100 * active) / max : null,
    search_index: status.database?.search_index ?? null,
    failed: sum(healths.flatMap((health) => Object.values(health.queries?.failed ?? {}))),
  };
}

/** What is simulated now: one sentence for each simulation, with the services that it is in. */
export function simulations(status) {
  const found = new Map();
  const add = (what, name) => found.set(what, [...(found.get(what) ?? []), name]);
  for (const { name, health } of status?.services ?? []) {
    const simulation = health?.simulation ?? {};
    if (simulation.slow_queries_ms) add(`every reading statement sleeps ${simulation.slow_queries_ms} ms first`, name);
    if (simulation.pool_exhaustion) add("connections are held", name);
  }
  return [...found].map(([what, names]) => `${what} (${names.join(", ")})`);
}

/** Calls `listener` after each answer until `signal` aborts, and at once if one is there. */
export function watch(listener, signal) {
  listeners.add(listener);
  signal?.addEventListener("abort", () => listeners.delete(listener), { once: true });
  if (state.status || state.failure) listener(state);
}

/** Asks now, and tells all listeners. */
export async function refresh() {
  try {
    state.status = await get("/api/status", { patience: PATIENCE_MS });
    state.failure = null;
    const now = figures(state.status);
    if (now) state.samples = [...state.samples.slice(1 - SAMPLES), { t_s: performance.now() / 1000, ...now }];
  } catch (error) {
    state.failure = error;
  }
  for (const listener of [...listeners]) listener(state);
}

/** Asks for ever, but not while the page is hidden. */
export async function keepWatching() {
  for (;;) {
    if (document.hidden) {
      await new Promise((resolve) => document.addEventListener("visibilitychange", resolve, { once: true }));
      continue;
    }
    await refresh();
    await pause(INTERVAL_MS);
  }
}
