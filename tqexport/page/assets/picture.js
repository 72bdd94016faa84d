// From a picture to what the network takes: the same numbers as verify --data makes of a folder of pictures
// (tqexport/verification/samples.py), where Pillow scales with its bilinear filter. The tests compare both.

const PRECISION = 22; // bits behind the point of Pillow's weights for bytes

/** Bytes (height, width, channels) of a picture's RGBA bytes: grey as Pillow's "L", or RGB. */
export function channelsOf(rgba, channels) {
  const pixels = rgba.length / 4;
  const bytes = new Uint8Array(pixels * channels);
  for (let i = 0; i < pixels; i++) {
    const [red, green, blue] = [rgba[4 * i], rgba[4 * i + 1], rgba[4 * i + 2]];
    if (channels === 1) bytes[i] = (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16;
    else bytes.set([red, green, blue], 3 * i);
  }
  return bytes;
}

/** What each of `to` pixels is made of when `from` pixels become `to`: the first, and a weight for each. */
function filter(from, to) {
  const scale = from / to;
  const support = Math.max(scale, 1); // a triangle, wider where pixels become fewer, so that none is left out
  return Array.from({ length: to }, (_, i) => {
    const centre = (i + 0.5) * scale;
    const first = Math.max(Math.trunc(centre - support + 0.5), 0);
    const last = Math.min(Math.trunc(centre + support + 0.5), from);
    const raw = [];
    for (let x = first; x < last; x++) raw.push(Math.max(1 - Math.abs((x - centre + 0.5) / support), 0));
    const sum = raw.reduce((a, b) => a + b, 0);
    return { first, weights: raw.map((w) => Math.trunc(0.5 + (w / sum) * 2 ** PRECISION)) };
  });
}

/** Bytes scaled along one axis: (before, from, after) to (before, to, after). */
function scaleAxis(bytes, before, from, to, after) {
  if (from === to) return bytes;
  const scaled = new Uint8Array(before * to * after);
  filter(from, to).forEach(({ first, weights }, i) => {
    for (let row = 0; row < before; row++) {
      for (let k = 0; k < after; k++) {
        let sum = 2 ** (PRECISION - 1);
        weights.forEach((w, j) => { sum += w * bytes[(row * from + first + j) * after + k]; });
        scaled[(row * to + i) * after + k] = Math.min(255, Math.max(0, Math.floor(sum / 2 ** PRECISION)));
      }
    }
  });
  return scaled;
}

/** Bytes (height, width, channels) scaled to [height, width] with antialiasing. */
export function resize(bytes, [height, width], [toHeight, toWidth], channels) {
  const narrow = scaleAxis(bytes, height, width, toWidth, channels);
  return scaleAxis(narrow, 1, height, toHeight, toWidth * channels);
}

/** Raw network input (channels, height, width), float32 in [0, 1], of a picture's RGBA bytes of [height, width]. */
export function fromPicture(rgba, size, [channels, height, width], { invert = false } = {}) {
  let bytes = channelsOf(rgba, channels);
  if (invert) bytes = bytes.map((value) => 255 - value);
  bytes = resize(bytes, size, [height, width], channels);
  const raw = new Float32Array(bytes.length);
  for (let c = 0; c < channels; c++) {
    for (let i = 0; i < height * width; i++) raw[c * height * width + i] = bytes[i * channels + c] / 255;
  }
  return raw;
}

/** `(x - mean) / std` per channel, each step rounded to float32 as numpy does; raw where there is none. */
export function normalise(raw, channels, normalization) {
  if (!normalization) return raw;
  const each = raw.length / channels;
  const [mean, std] = [normalization.mean, normalization.std].map((values) => Float32Array.from(values));
  return raw.map((value, i) => {
    const channel = mean.length === 1 ? 0 : Math.floor(i / each);
    return Math.fround(value - mean[channel]) / std[channel];
  });
}
