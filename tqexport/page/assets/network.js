// The network: its files open in onnxruntime-web, one run after the other on one thread.

import { normalise } from "./picture.js";

const ARRAYS = { float32: Float32Array, int32: Int32Array, int64: BigInt64Array, uint8: Uint8Array, bool: Uint8Array };

export const size = (shape) => shape.reduce((a, b) => a * b, 1);

/** Shares of one of a network's outputs: the exponentials, which sum up to 1. */
export function shares(outputs) {
  const most = Math.max(...outputs);
  const powers = Array.from(outputs, (value) => Math.exp(value - most));
  const sum = powers.reduce((a, b) => a + b, 0);
  return powers.map((power) => power / sum);
}

/** The place of the largest output, the first of several, as in numpy. */
export const largest = (outputs) => outputs.reduce((best, value, i) => (value > outputs[best] ? i : best), 0);

export class Network {
  #ort;
  #facts;
  #sessions = new Map();
  #last = Promise.resolve();

  constructor(ort, facts) {
    [this.#ort, this.#facts] = [ort, facts];
  }

  /** Open onnxruntime-web from the folder beside the page. */
  static async open(facts) {
    const place = new URL(`${facts.runtime.folder}/`, document.baseURI);
    const ort = await import(new URL("ort.wasm.min.js", place));
    ort.env.wasm.numThreads = 1; // more take headers that ordinary servers do not send
    ort.env.wasm.wasmPaths = {
      mjs: new URL("ort-wasm-simd-threaded.js", place).href,
      wasm: new URL("ort-wasm-simd-threaded.wasm", place).href,
    };
    return new Network(ort, facts);
  }

  #session(bits) {
    const model = this.#facts.models.find((each) => each.widths.includes(bits));
    if (!this.#sessions.has(model.file)) {
      this.#sessions.set(model.file, (async () => {
        const answer = await fetch(encodeURIComponent(model.file));
        if (!answer.ok) throw new Error(`${model.file} is not there (${answer.status})`);
        return this.#ort.InferenceSession.create(await answer.arrayBuffer(), { executionProviders: ["wasm"] });
      })());
    }
    return this.#sessions.get(model.file).then((session) => [session, model]);
  }

  /** Tensors of one sample, which stands before normalisation in an array for each input. */
  #feeds(raw) {
    return Object.fromEntries(this.#facts.inputs.map((input, i) => {
      const values = i === 0 && this.#facts.normalization
        ? normalise(raw[0], input.shape[0] ?? 1, this.#facts.normalization)
        : raw[i];
      return [input.name, new this.#ort.Tensor(input.dtype, values, [1, ...input.shape])];
    }));
  }

  /** What `use` makes of a session at a width, when all that was asked before is done. */
  #run(bits, raw, use) {
    const next = this.#last.then(async () => {
      const [session, model] = await this.#session(bits);
      const feeds = this.#feeds(raw);
      if (model.switched) feeds.bits = new this.#ort.Tensor("uint8", Uint8Array.of(bits), []);
      return use(async () => (await session.run(feeds))[this.#facts.output.name].data);
    });
    this.#last = next.catch(() => {});
    return next;
  }

  /** The outputs of one sample at a width. */
  outputs(bits, raw) {
    return this.#run(bits, raw, (run) => run());
  }

  /** Milliseconds of one run at a width: the median of blocks that clocks of browsers can measure. */
  milliseconds(bits, raw) {
    return this.#run(bits, raw, async (run) => {
      await run();
      const blocks = [];
      for (let block = 0; block < 5; block++) {
        let [runs, start, taken] = [0, performance.now(), 0];
        do {
          await run();
          runs++;
          taken = performance.now() - start;
        } while (taken < 10);
        blocks.push(taken / runs);
      }
      return blocks.sort((a, b) => a - b)[2];
    });
  }
}

/** The bundled samples: for each an array for every input, before normalisation. */
export async function readSamples(facts) {
  if (!facts.samples) return [];
  const arrays = await Promise.all(facts.samples.files.map(async (file, i) => {
    const answer = await fetch(encodeURIComponent(file));
    if (!answer.ok) throw new Error(`${file} is not there (${answer.status})`);
    return new ARRAYS[facts.inputs[i].dtype](await answer.arrayBuffer());
  }));
  return Array.from({ length: facts.samples.count }, (_, row) => arrays.map((values, i) => {
    const each = size(facts.inputs[i].shape);
    return values.slice(row * each, (row + 1) * each);
  }));
}
