// The map of layers by experts: a cell is an expert, which lights up and fades.

const RESIDENT = 1, ARRIVED = 2, LEFT = 4, USES = 3; // a cell's bits, as the server packs them
const COLOURS = ["--used", "--read", "--left"], USED = 0, READ = 1, GONE = 2;
const FADE = 0.55; // of a light, from one frame to the next
const LABELS_PIXELS = 26, MOST_CELL_PIXELS = 18;

export class ExpertMap {
  constructor(canvas, told) {
    this.canvas = canvas;
    this.told = told;
    this.cells = document.createElement("canvas");
    this.layers = [];
    canvas.addEventListener("pointermove", (event) => this.point(event));
    canvas.addEventListener("pointerdown", (event) => this.point(event));
    canvas.addEventListener("pointerleave", () => { this.pointed = null; this.tell(); });
    new ResizeObserver(() => this.draw()).observe(canvas.parentElement);
  }

  begin(layers) {
    this.layers = layers;
    this.firsts = [0];
    for (const n of layers) this.firsts.push(this.firsts.at(-1) + n);
    const total = this.firsts.at(-1);
    this.state = new Uint8Array(total);
    this.total = new Float64Array(total);
    this.light = new Float32Array(total); // of what happened last, 0 to 1
    this.last = new Uint8Array(total); // what that was
    this.cells.width = Math.max(...layers);
    this.cells.height = layers.length;
    this.pointed = null;
    this.tell();
    this.draw();
  }

  take(packed) {
    const bytes = atob(packed);
    for (let i = 0; i < this.state.length; i++) {
      const cell = bytes.charCodeAt(i);
      this.state[i] = cell & RESIDENT;
      this.total[i] += cell >> USES;
      this.light[i] = cell >> USES || cell & (ARRIVED | LEFT) ? 1 : this.light[i] * FADE;
      if (this.light[i] === 1) this.last[i] = cell & LEFT ? GONE : cell & ARRIVED ? READ : USED;
    }
    this.draw();
    this.tell();
  }

  draw() {
    if (!this.layers.length) return;
    const { canvas } = this, ratio = window.devicePixelRatio || 1;
    const rows = this.layers.length, columns = this.cells.width;
    const width = canvas.clientWidth - LABELS_PIXELS;
    const high = Math.max(3, Math.min(MOST_CELL_PIXELS, width / columns, 480 / rows));
    const height = Math.round(Math.max(high * rows, Math.min(160, 14 * rows)));
    canvas.style.height = `${height}px`;
    canvas.width = Math.round(canvas.clientWidth * ratio);
    canvas.height = Math.round(height * ratio);
    this.paintCells();
    const context = canvas.getContext("2d");
    context.scale(ratio, ratio);
    context.imageSmoothingEnabled = false;
    context.drawImage(this.cells, LABELS_PIXELS, 0, width, height);
    const style = getComputedStyle(document.documentElement);
    const wide = width / columns, tall = height / rows;
    context.fillStyle = style.getPropertyValue("--card");
    if (wide > 3.5) for (let x = 1; x < columns; x++) context.fillRect(LABELS_PIXELS + x * wide - 0.5, 0, 1, height);
    if (tall > 3.5) for (let y = 1; y < rows; y++) context.fillRect(0, y * tall - 0.5, canvas.width, 1);
    context.fillStyle = style.getPropertyValue("--faint");
    context.font = "11px system-ui, sans-serif";
    context.textAlign = "right";
    context.textBaseline = "middle";
    const every = Math.ceil(14 / tall);
    for (let y = 0; y < rows; y += every) context.fillText(y, LABELS_PIXELS - 7, (y + 0.5) * tall);
  }

  paintCells() {
    const style = getComputedStyle(document.documentElement);
    const colour = (name) => rgb(style.getPropertyValue(name).trim());
    const absent = colour("--absent"), resident = colour("--resident"), card = colour("--card");
    const over = COLOURS.map(colour);
    const context = this.cells.getContext("2d");
    const image = context.createImageData(this.cells.width, this.cells.height);
    for (let y = 0; y < this.layers.length; y++) {
      for (let x = 0; x < this.cells.width; x++) {
        const i = this.firsts[y] + x;
        const isExpert = x < this.layers[y], still = this.state[i] ? resident : absent;
        const painted = isExpert ? mix(still, over[this.last[i]], this.light[i]) : card;
        image.data.set([...painted, 255], 4 * (y * this.cells.width + x));
      }
    }
    context.putImageData(image, 0, 0);
  }

  point(event) {
    if (!this.layers.length) return;
    const box = this.canvas.getBoundingClientRect();
    const x = (event.clientX - box.left - LABELS_PIXELS) / (box.width - LABELS_PIXELS) * this.cells.width;
    const layer = Math.floor((event.clientY - box.top) / box.height * this.layers.length);
    const inside = x >= 0 && x < this.layers[layer];
    this.pointed = inside ? { layer, expert: Math.floor(x) } : null;
    this.tell();
  }

  tell() {
    if (!this.pointed) return this.told(null);
    const i = this.firsts[this.pointed.layer] + this.pointed.expert;
    this.told({ ...this.pointed, resident: this.state[i] > 0, uses: this.total[i] });
  }
}

function rgb(hex) {
  const long = hex.length === 4 ? hex.replace(/[^#]/g, "$&$&") : hex;
  return [1, 3, 5].map((at) => parseInt(long.slice(at, at + 2), 16));
}

function mix(from, to, share) {
  return share < 0.02 ? from : from.map((value, i) => value + (to[i] - value) * share);
}
