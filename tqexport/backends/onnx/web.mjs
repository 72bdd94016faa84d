// Runs ONNX files in onnxruntime-web for verification: node web.mjs MODULE
//
// Messages come on standard input and go to standard output: the length of a header (uint32, little-endian), the header
// (JSON), and the bytes of its tensors one after the other. Numbers are never text. It ends when the input ends.

import { readSync, writeSync } from "node:fs";
import { pathToFileURL } from "node:url";

const ARRAYS = {
  float32: Float32Array, float64: Float64Array, int8: Int8Array, uint8: Uint8Array, int16: Int16Array,
  uint16: Uint16Array, int32: Int32Array, uint32: Uint32Array, int64: BigInt64Array, uint64: BigUint64Array,
  bool: Uint8Array,
};
const [INPUT, OUTPUT] = [0, 1];
const RUNS = 30; // that are timed at most,
const SECONDS = 1; // and for how long

/** So many bytes of standard input; null where it ends. */
function take(length) {
  const bytes = new Uint8Array(length);
  for (let taken = 0; taken < length;) {
    const now = readSync(INPUT, bytes, taken, length - taken, null);
    if (now === 0) return null;
    taken += now;
  }
  return bytes;
}

/** The next message: its header, and its tensors' bytes. */
function receive() {
  const length = take(4);
  if (length === null) return null;
  const header = JSON.parse(new TextDecoder().decode(take(new DataView(length.buffer).getUint32(0, true))));
  return [header, (header.sizes ?? []).map(take)];
}

function give(bytes) {
  for (let given = 0; given < bytes.length;) given += writeSync(OUTPUT, bytes, given);
}

function send(header, parts = []) {
  const text = new TextEncoder().encode(JSON.stringify(header));
  const length = new Uint8Array(4);
  new DataView(length.buffer).setUint32(0, text.length, true);
  for (const bytes of [length, text, ...parts]) give(bytes);
}

for (const kind of ["log", "info", "debug", "warn", "error"]) console[kind] = () => {}; // answers alone are written
const ort = await import(pathToFileURL(process.argv[2]));
ort.env.wasm.numThreads = 1;
ort.env.logLevel = "fatal"; // what goes wrong is answered
const sessions = new Map();

const feeds = ({ tensors }, parts) => Object.fromEntries(tensors.map(({ name, type, shape }, i) => [
  name, new ort.Tensor(type, new ARRAYS[type](parts[i].buffer), shape),
]));

const asks = {
  async open({ session, optimized }, [model]) {
    const opened = await ort.InferenceSession.create(model, {
      executionProviders: ["wasm"],
      graphOptimizationLevel: optimized ? "all" : "disabled",
      logSeverityLevel: 4,
      extra: { session: { qdqisint8allowed: "1" } }, // as in backends/onnx/session.py
    });
    sessions.set(session, opened);
    send({ inputs: opened.inputNames, outputs: opened.outputNames });
  },
  async run(header, parts) {
    const session = sessions.get(header.session);
    const results = await session.run(feeds(header, parts));
    const tensors = session.outputNames.map((name) => results[name]);
    const bytes = tensors.map(({ data }) => new Uint8Array(data.buffer, data.byteOffset, data.byteLength));
    send({ tensors: tensors.map(({ type, dims }) => ({ type, shape: dims })), sizes: bytes.map(({ length }) => length) }, bytes);
  },
  async time(header, parts) {
    const [session, fed, taken] = [sessions.get(header.session), feeds(header, parts), []];
    await session.run(fed);
    for (let sum = 0; taken.length < RUNS && sum < SECONDS;) {
      const start = performance.now();
      await session.run(fed);
      taken.push((performance.now() - start) / 1000);
      sum += taken.at(-1);
    }
    taken.sort((a, b) => a - b);
    send({ seconds: taken[taken.length >> 1] });
  },
};

for (let message = receive(); message !== null; message = receive()) {
  const [header, parts] = message;
  try {
    for (const session of header.closed) {
      await sessions.get(session)?.release();
      sessions.delete(session);
    }
    await asks[header.ask](header, parts);
  } catch (error) {
    send({ error: String(error?.message ?? error).split("\n")[0].slice(0, 300) });
  }
}
