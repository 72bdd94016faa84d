// The page: what is drawn, dropped or chosen goes to the network at the width of the slider.

import { Network, largest, readSamples, shares, size } from "./network.js";
import { fromPicture } from "./picture.js";

const LONG_SIDE = 320; // pixels of the canvas
const FEW = 10; // classes that are all shown, in their order; of more, the largest
const SLICE = 40; // milliseconds of work before the page may answer
const $ = (id) => document.getElementById(id);
const percent = (share, digits = 1) => `${(100 * share).toFixed(digits)} %`;
const grouped = (number) => number.toLocaleString("en-US");
const bitsOf = (bits) => `${bits} bit${bits === 1 ? "" : "s"}`;
const ranged = (widths) => (widths.at(-1) - widths[0] === widths.length - 1 ? `${widths[0]} to ${widths.at(-1)}` : widths.join(", "));
const pause = () => new Promise((done) => setTimeout(done, 0));

/** An element with text, which is never read as HTML. */
function element(tag, { text, ...properties } = {}, children = []) {
  const made = Object.assign(document.createElement(tag), properties);
  if (text !== undefined) made.textContent = text;
  made.append(...children);
  return made;
}

function say(id, text) {
  $(id).textContent = text;
}

/** The page of one network. */
class Page {
  raw = null; // the input: an array for each input of the network, before normalisation
  truth = null; // its label, if it is a sample
  asked = 0; // counts inputs, so that what is late is not shown

  constructor(facts, network, samples) {
    Object.assign(this, { facts, network, samples });
    this.widths = facts.widths;
    this.reference = this.widths.at(-1);
    this.results = new Map(this.widths.map((bits) => [bits, {}]));
    this.rows = new Map();
  }

  get bits() {
    return this.widths[Number($("width").value)];
  }

  name(label) {
    return this.facts.class_names[label] ?? `class ${label}`;
  }

  start() {
    this.describe();
    this.makeSlider();
    this.makeTable();
    if (this.facts.picture) this.makeBoard();
    if (this.samples.length) this.makeSamples();
    $("waiting").hidden = true;
    $("content").hidden = false;
    if (this.samples.length) this.choose(0);
    else this.fromCanvas({ blank: true });
    new IntersectionObserver((entries, observer) => {
      if (entries.some((entry) => entry.isIntersecting)) {
        observer.disconnect();
        this.survey().catch(fail);
      }
    }).observe($("facts")); // which shows what is found, above the table
  }

  describe() {
    const { facts } = this;
    document.title = `${facts.name} at ${this.widths.length > 1 ? "every width" : bitsOf(this.reference)}`;
    say("name", facts.name);
    const kind = facts.kernel === "integer" ? "computes with integers from end to end" : "computes with floats over the trained weights";
    const shared = facts.models.find((model) => model.switched);
    const held = shared
      ? ` One file of ${grouped(shared.bytes)} bytes holds ${shared.widths.length} widths (${ranged(shared.widths)} bits): each weight is one stored byte, of which fewer bits are read.`
      : "";
    say("about", `${facts.architecture}, which ${kind}, in this browser: nothing that you draw leaves it.${held}`);
    const checkpoint = facts.checkpoint_sha256 ? `, checkpoint sha256 ${facts.checkpoint_sha256}` : "";
    say("origin", `Written by tqexport ${facts.versions.tqexport ?? ""}, run by ${facts.runtime.name} ${facts.runtime.version}${checkpoint}.`);
  }

  // The width

  makeSlider() {
    const slider = $("width");
    Object.assign(slider, { min: 0, max: this.widths.length - 1, value: this.widths.length - 1 });
    $("ticks").append(...this.widths.map((bits) => element("span", { text: bits })));
    $("bits").append(...Array.from({ length: 8 }, () => element("span")));
    slider.addEventListener("input", () => this.moved());
    this.showWidth();
  }

  moved() {
    this.showWidth();
    this.showRow();
    this.predict().catch(fail);
  }

  showWidth() {
    const { bits } = this;
    const says = bits === 8 ? "all 8 bits of every stored code are read" : `the highest ${bitsOf(bits)} of every stored 8-bit code ${bits === 1 ? "is" : "are"} read, the rest shifted out`;
    say("width-text", bitsOf(bits));
    say("bits-note", this.facts.quantizer === "dorefa" ? "each width has codes of its own" : says);
    $("width").setAttribute("aria-valuetext", bitsOf(bits));
    [...$("bits").children].forEach((cell, i) => cell.classList.toggle("kept", i < bits));
  }

  // The input

  makeBoard() {
    const [channels, height, width] = this.facts.inputs[0].shape;
    const scale = LONG_SIDE / Math.max(height, width);
    const [canvas, seen] = [$("canvas"), $("seen")];
    Object.assign(canvas, { width: Math.round(width * scale), height: Math.round(height * scale) });
    Object.assign(seen, { width, height });
    canvas.setAttribute("aria-label", "Drawing. By keyboard, choose a sample or open a picture.");
    seen.setAttribute("aria-label", "What the network sees");
    say("seen-caption", `what the network sees: ${width} × ${height}`);
    const samples = this.samples.length ? ", or choose a sample" : "";
    say("input-note", `Draw, large and in the middle; drop or open a picture${samples}.`);
    $("board").hidden = $("tools").hidden = false;
    $("colour-tool").hidden = channels === 1;
    this.pen = canvas.getContext("2d", { willReadFrequently: true });
    this.clear();
    this.listenToPen(canvas);
    $("clear").addEventListener("click", () => { this.clear(); this.fromCanvas({ blank: true }); });
    $("picture").addEventListener("change", ({ target }) => { if (target.files[0]) this.open(target.files[0]); target.value = ""; });
    $("invert").addEventListener("change", () => this.fromPicture());
    for (const kind of ["dragover", "dragleave", "drop"]) {
      document.addEventListener(kind, (event) => {
        event.preventDefault();
        $("canvas-frame").classList.toggle("over", kind === "dragover");
        if (kind === "drop" && event.dataTransfer.files[0]) this.open(event.dataTransfer.files[0]);
      });
    }
  }

  listenToPen(canvas) {
    let last = null;
    const place = (event) => {
      const box = canvas.getBoundingClientRect();
      return [((event.clientX - box.left) * canvas.width) / box.width, ((event.clientY - box.top) * canvas.height) / box.height];
    };
    canvas.addEventListener("pointerdown", (event) => {
      $("invert-tool").hidden = true; // it is of a picture alone
      canvas.setPointerCapture(event.pointerId);
      last = place(event);
      this.stroke(last, last);
    });
    canvas.addEventListener("pointermove", (event) => {
      if (!last) return;
      const now = place(event);
      this.stroke(last, now);
      last = now;
    });
    for (const kind of ["pointerup", "pointercancel"]) {
      canvas.addEventListener(kind, () => {
        if (last) this.fromCanvas();
        last = null;
      });
    }
  }

  stroke(from, to) {
    const { pen } = this;
    const [, height, width] = this.facts.inputs[0].shape;
    pen.lineCap = pen.lineJoin = "round";
    // Ink about one of the network's pixels wide, at least a twelfth of the picture.
    pen.lineWidth = LONG_SIDE * Math.max(1 / Math.max(height, width), 1 / 12);
    pen.strokeStyle = $("colour").value;
    pen.beginPath();
    pen.moveTo(...from);
    pen.lineTo(...to);
    pen.stroke();
    this.fromCanvas({ drawing: true });
  }

  clear() {
    this.pen.fillStyle = "#000";
    this.pen.fillRect(0, 0, this.pen.canvas.width, this.pen.canvas.height);
    this.picture = null;
    $("invert-tool").hidden = true;
  }

  fromCanvas(settings) {
    const { width, height } = this.pen.canvas;
    const { data } = this.pen.getImageData(0, 0, width, height);
    this.take([fromPicture(data, [height, width], this.facts.inputs[0].shape)], null, settings);
  }

  /** Take a picture from a file in its own size, not as the canvas shows it. */
  async open(file) {
    try {
      const bitmap = await createImageBitmap(file, { colorSpaceConversion: "none", premultiplyAlpha: "none" });
      const pen = new OffscreenCanvas(bitmap.width, bitmap.height).getContext("2d", { willReadFrequently: true });
      pen.drawImage(bitmap, 0, 0);
      this.clear();
      this.picture = pen.getImageData(0, 0, bitmap.width, bitmap.height);
      $("invert-tool").hidden = this.facts.inputs[0].shape[0] !== 1;
      $("invert").checked = false;
      $("problem").hidden = true;
      this.fromPicture();
    } catch (error) {
      fail(new Error(`${file.name} is no picture that this browser reads (${error.message})`));
    }
  }

  fromPicture() {
    const { data, width, height } = this.picture;
    const invert = $("invert").checked;
    this.showOnCanvas([fromPicture(data, [height, width], this.facts.inputs[0].shape, { invert })]);
    this.take(this.shown, null);
  }

  /** Put a network input on the canvas, its pixels as squares. */
  showOnCanvas(raw) {
    this.shown = raw;
    const { canvas } = this.pen;
    this.pen.imageSmoothingEnabled = false;
    this.pen.drawImage(drawn(raw[0], this.facts.inputs[0].shape), 0, 0, canvas.width, canvas.height);
  }

  makeSamples() {
    const { labels } = this.facts.samples;
    const radios = this.samples.map((raw, i) => {
      const label = labels ? `, labelled ${this.name(labels[i])}` : "";
      const radio = element("input", { type: "radio", name: "sample", value: i });
      radio.setAttribute("aria-label", `Sample ${i + 1}${label}`);
      radio.addEventListener("change", () => this.choose(i));
      const face = this.facts.picture ? drawn(raw[0], this.facts.inputs[0].shape) : element("span", { className: "number", text: i + 1 });
      face.ariaHidden = "true";
      return element("label", {}, [radio, face]);
    });
    $("strip").append(...radios);
    $("samples").hidden = false;
    say("samples-legend", `${this.samples.length} samples ${this.facts.samples.description.replace(/^on the \d+ (samples|pictures) of/, "of")}`);
    if (!this.facts.picture) {
      const takes = this.facts.inputs.map((input) => `${input.name} ${input.shape.join(" × ") || "one number"}`).join(", ");
      say("input-note", `The network takes no pictures (${takes}), so there is nothing to draw: choose a sample.`);
    }
  }

  choose(i) {
    $("strip").querySelectorAll("input")[i].checked = true;
    if (this.facts.picture) {
      this.clear();
      this.showOnCanvas(this.samples[i]);
    }
    this.take(this.samples[i], this.facts.samples.labels?.[i] ?? null, { sample: true });
  }

  /** Take an input, and show what the network makes of it. */
  take(raw, truth, { drawing = false, sample = false, blank = false } = {}) {
    Object.assign(this, { raw, truth, blank });
    if (!sample) for (const radio of $("strip").querySelectorAll(":checked")) radio.checked = false;
    if (this.facts.picture) {
      const pen = $("seen").getContext("2d");
      pen.drawImage(drawn(raw[0], this.facts.inputs[0].shape), 0, 0);
    }
    this.asked++;
    for (const result of this.results.values()) result.own = null;
    if (blank) this.showBlank();
    else this.predict({ alone: drawing }).catch(fail);
  }

  /** Nothing is drawn: the network would say something of that, too, but nobody asked. */
  showBlank() {
    say("class", "–");
    say("share", "");
    say("truth", "Nothing is drawn yet.");
    $("truth").className = "";
    $("classes").replaceChildren();
    for (const bits of this.widths) this.showRow(bits);
    this.showFacts();
  }

  // What the network says

  async predict({ alone = false } = {}) {
    if (this.blank) return this.showFacts();
    const { asked, bits } = this;
    const show = async (width) => {
      const result = this.results.get(width);
      if (!result.own) {
        const outputs = await this.network.outputs(width, this.raw);
        if (asked !== this.asked) return false;
        result.own = { outputs, label: largest(outputs), shares: shares(outputs) };
      }
      return true;
    };
    if (!(await show(bits))) return;
    if (bits === this.bits) this.showPrediction();
    if (alone) return;
    for (const width of this.widths) if (!(await show(width))) return;
    for (const width of this.widths) this.showRow(width);
    this.showFacts();
    clearTimeout(this.announcing);
    this.announcing = setTimeout(() => this.announce(), 300);
  }

  announce() {
    const { own } = this.results.get(this.bits);
    if (own) say("announcement", `At ${bitsOf(this.bits)}: ${this.name(own.label)}, ${percent(own.shares[own.label])}`);
  }

  showPrediction() {
    const { own } = this.results.get(this.bits);
    const name = this.name(own.label);
    say("class", name);
    $("class").classList.toggle("long", name.length > 6);
    // For programs that look at the page, such as the tests: which width this is of, and every output.
    $("class").dataset.bits = this.bits;
    $("class").dataset.outputs = JSON.stringify(Array.from(own.outputs));
    say("share", percent(own.shares[own.label]));
    const right = own.label === this.truth;
    say("truth", this.truth === null ? "" : right ? "right: that is its label" : `wrong: it is labelled ${this.name(this.truth)}`);
    $("truth").className = this.truth === null ? "" : right ? "right" : "wrong";
    const order = [...own.shares.keys()];
    if (order.length > FEW) order.sort((a, b) => own.shares[b] - own.shares[a]).splice(5);
    $("classes").replaceChildren(...order.map((label) => {
      const share = own.shares[label];
      const row = element("li", { className: label === own.label ? "first" : "" }, [
        element("span", { className: "name", text: this.name(label) }), bar(share), element("span", { className: "of", text: percent(share) }),
      ]);
      return row;
    }));
    this.showFacts();
  }

  showFacts() {
    const result = this.results.get(this.bits);
    const { fixed, packed } = this.facts.bytes[this.bits];
    const model = this.facts.models.find((each) => each.widths.includes(this.bits));
    say("time", result.ms === undefined ? "–" : `${result.ms.toPrecision(3)} ms`);
    say("time-note", `one input, one thread, ${model.switched ? "the file of all widths; a fixed file is faster" : "a fixed file"}`);
    say("size", `${grouped(packed ?? fixed)} B`);
    say("size-note", packed ? `packed; ${grouped(fixed)} with a byte for each weight` : "a byte for each weight");
    say("agreement-title", `Agreement with ${bitsOf(this.reference)}`);
    const same = this.widths.filter((bits) => this.results.get(bits).own?.label === this.results.get(this.reference).own?.label);
    const here = this.blank ? "–" : `${same.length} of ${this.widths.length}`;
    if (this.samples.length) {
      say("agreement", result.agreement === undefined ? "–" : percent(result.agreement));
      say("agreement-note", `of ${this.samples.length} samples${this.blank ? "" : `; of this input, ${here} widths`}`);
    } else {
      say("agreement", here);
      say("agreement-note", "widths, of this input");
    }
    if (this.facts.samples?.labels) {
      $("accuracy-fact").hidden = false;
      say("accuracy", result.accuracy === undefined ? "–" : percent(result.accuracy));
      say("accuracy-note", `of ${this.samples.length} samples`);
    }
  }

  // Every width

  makeTable() {
    const labelled = this.facts.samples?.labels;
    const heads = ["bits", "this input", "bytes", "ms", ...(this.samples.length ? [`agrees with ${this.reference}`] : []), ...(labelled ? ["accuracy"] : [])];
    $("columns").append(element("tr", {}, heads.map((text) => element("th", { text, scope: "col" }))));
    for (const bits of this.widths) {
      const row = element("tr", {}, [element("th", { text: bits, scope: "row" }), ...heads.slice(1).map(() => element("td", { text: "–" }))]);
      row.dataset.bits = bits;
      this.rows.set(bits, row);
      $("rows").append(row);
      this.showRow(bits);
    }
  }

  showRow(bits = this.bits) {
    for (const [width, row] of this.rows) row.classList.toggle("current", width === this.bits);
    const [, own, bytes, ms, agreement, accuracy] = this.rows.get(bits).children;
    const result = this.results.get(bits);
    const { fixed, packed } = this.facts.bytes[bits];
    if (!result.own) own.textContent = "–";
    else {
      own.replaceChildren(element("span", { text: `${this.name(result.own.label)} ` }), element("small", { text: percent(result.own.shares[result.own.label], 0) }));
      own.className = result.own.label === this.results.get(this.reference).own?.label ? "" : "apart";
    }
    bytes.replaceChildren(element("span", { text: grouped(packed ?? fixed) }), ...(packed ? [element("small", { text: " packed" })] : []));
    if (result.ms !== undefined) ms.textContent = result.ms.toPrecision(3);
    for (const [cell, share] of [[agreement, result.agreement], [accuracy, result.accuracy]]) {
      if (cell && share !== undefined) cell.replaceChildren(element("span", { text: percent(share) }), bar(share));
    }
  }

  /** Time of every width; and over the samples, how often it agrees with the widest, and how often it is right. */
  async survey() {
    const expected = await this.surveyed(this.reference, null);
    for (const bits of this.widths.slice(0, -1)) await this.surveyed(bits, expected);
    const what = this.samples.length ? `${this.samples.length} samples ran at each of ${this.widths.length} widths` : `${this.widths.length} widths were timed`;
    say("progress", `${what} in this browser. ${this.facts.models.some((model) => model.switched) ? "Times are of the file that holds all of its widths; a fixed file of one is faster." : ""}`);
    $("table-panel").dataset.done = "true";
  }

  /** The class of every sample at a width. */
  async surveyed(bits, expected) {
    const result = this.results.get(bits);
    const { labels } = this.facts.samples ?? {};
    const classes = [];
    let since = performance.now();
    for (const raw of this.samples) {
      classes.push(largest(await this.network.outputs(bits, raw)));
      if (performance.now() - since > SLICE) {
        say("progress", `Running the samples at ${bitsOf(bits)}: ${classes.length} of ${this.samples.length}`);
        await pause();
        since = performance.now();
      }
    }
    result.ms = await this.network.milliseconds(bits, this.raw);
    const share = (others) => classes.filter((label, i) => label === others[i]).length / classes.length;
    if (classes.length) result.agreement = share(expected ?? classes);
    if (labels) result.accuracy = share(labels);
    this.showRow(bits);
    if (bits === this.bits) this.showFacts();
    return classes;
  }
}

/** A canvas with a network's input, (channels, height, width) of which what is in [0, 1] is seen. */
function drawn(raw, [channels, height, width]) {
  const canvas = element("canvas", { width, height });
  const pen = canvas.getContext("2d");
  const picture = pen.createImageData(width, height);
  const each = size([height, width]);
  for (let i = 0; i < each; i++) {
    for (let c = 0; c < 3; c++) picture.data[4 * i + c] = 255 * raw[(c % channels) * each + i];
    picture.data[4 * i + 3] = 255;
  }
  pen.putImageData(picture, 0, 0);
  return canvas;
}

/** A bar as long as a share. */
function bar(share) {
  const filled = element("i");
  filled.style.width = `${100 * share}%`;
  const made = element("div", { className: "bar" }, [filled]);
  made.ariaHidden = "true";
  return made;
}

function fail(error) {
  say("problem", error.message);
  $("problem").hidden = false;
  $("waiting").hidden = true;
  console.error(error);
}

try {
  const answer = await fetch("facts.json");
  if (!answer.ok) throw new Error(`facts.json is not there (${answer.status})`);
  const facts = await answer.json();
  const [network, samples] = await Promise.all([Network.open(facts), readSamples(facts)]);
  new Page(facts, network, samples).start();
} catch (error) {
  fail(error);
}
