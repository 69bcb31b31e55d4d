// The descriptor explorer: a word, its bits to click, and what it means in the chosen format.
const explorer = { word: 0x00e8000040000f03n, level: 3, format: data.format };
const OPTIONS = ["wide", "pie", "poe", "aie"];
const STAGES = [
  ["", "stage 1, EL1&0 or EL2&0"], ["alone", "stage 1, EL2 or EL3 alone"],
  ["stage2", "stage 2"], ["stage2-fwb", "stage 2, FWB=1"],
];
const byId = (id) => document.getElementById(id);

// The format's name from the controls; emu/map/layouts.py makes the same.
function chosenFormat() {
  const on = (name) => byId(`x-${name}`).checked;
  const stage = byId("x-stage").value;
  const options = stage.startsWith("stage2") ? ["wide"] : OPTIONS;
  const flags = options.filter(on);
  const order = ["wide", "stage2", "fwb", "alone", "pie", "poe", "aie"];
  const parts = [...flags, ...stage.split("-").filter(Boolean)].sort((a, b) => order.indexOf(a) - order.indexOf(b));
  return [byId("x-granule").value, ...parts].join("-");
}

// Shows a format in the controls.
function setControls(formatName) {
  const [granule, ...flags] = formatName.split("-");
  byId("x-granule").value = granule;
  byId("x-stage").value = ["stage2-fwb", "stage2", "alone", ""].find((s) => s.split("-").every((f) => !f || flags.includes(f)));
  for (const name of OPTIONS) byId(`x-${name}`).checked = flags.includes(name);
}

function explore(formatName, level, word) {
  Object.assign(explorer, { format: formatName, level, word });
  setControls(formatName);
  byId("x-word").value = hex(word);
  drawExplorer();
}

function drawExplorer() {
  const format = data.formats[explorer.format];
  explorer.level = Math.max(explorer.level, format.lowest);
  const levels = [-1, 0, 1, 2, 3].filter((level) => level >= format.lowest);
  byId("x-level").replaceChildren(...levels.map((level) => make("option", { value: level }, `${level}`)));
  byId("x-level").value = explorer.level;
  const stage1 = !explorer.format.includes("stage2");
  for (const name of OPTIONS.slice(1)) byId(`x-${name}`).disabled = !stage1;
  byId("x-wide-name").textContent = explorer.format.startsWith("64K") ? "LPA (52-bit PA)" : "DS (LPA2)";
  const decoded = decode(explorer.format, explorer.level, explorer.word);
  drawBits(decoded);
  byId("x-facts").replaceChildren(...facts(decoded).map(([name, text]) =>
    make("div", {}, make("dt", {}, name), make("dd", {}, text))));
  byId("x-fields").replaceChildren(fieldTable(decoded));
}

// Four rows of 16 bits; a cell is a button, a field's name stands at its highest bit of each row.
function drawBits(decoded) {
  const focused = document.activeElement?.dataset?.bit;
  const rows = [63, 47, 31, 15].map((top) => {
    const cells = [];
    for (let bit = top; bit > top - 16; bit--) cells.push(bitCell(bit));
    const names = spans(decoded, top).map(([hi, lo, field, index]) =>
      make("div", { class: `span ${index % 2 ? "odd" : "even"} ${field.reserved ? "reserved" : ""}`,
        style: `grid-column: span ${hi - lo + 1}`, title: `${fieldName(field)} [${field.bits}] ${field.doc}` }, fieldName(field)));
    return make("div", { class: "bits" }, ...cells, ...names);
  });
  byId("x-bits").replaceChildren(...rows);
  if (focused !== undefined) byId("x-bits").querySelector(`[data-bit="${focused}"]`)?.focus();
}

function bitCell(bit) {
  const on = explorer.word >> BigInt(bit) & 1n;
  return make("button", {
    class: `bit ${on ? "on" : ""} ${bit % 4 === 3 ? "nibble" : ""}`, "data-bit": bit, "aria-pressed": on ? "true" : "false",
    "aria-label": `bit ${bit}`, onclick: () => explore(explorer.format, explorer.level, explorer.word ^ 1n << BigInt(bit)),
  }, make("small", {}, `${bit}`), `${on}`);
}

// The parts of fields in the row of bits [top : top - 15]: [hi, lo, field, number].
function spans(decoded, top) {
  const parts = [];
  decoded.fields.forEach(({ field }, index) => {
    for (const [lo, width] of field.spans) {
      const [hi, low] = [Math.min(lo + width - 1, top), Math.max(lo, top - 15)];
      if (hi >= low) parts.push([hi, low, field, index]);
    }
  });
  return parts.sort((a, b) => b[0] - a[0]);
}

function facts(decoded) {
  const { kind, format, layout } = decoded;
  const word = explorer.word;
  const rows = [["what", `${kind}, level ${explorer.level}`]];
  const shift = BigInt(format.page_shift + (3 - explorer.level) * (format.page_shift - 3));
  const size = sizeText(1n << shift);
  if (kind === "invalid") {
    rows.push(["access", `none: translation fault, level ${explorer.level}`]);
  } else if (kind === "table") {
    rows.push(["next table", `PA ${hex(valueOf(fieldNamed(layout, "TA"), word))}, translates ${size}`]);
  } else {
    rows.push(["maps", `${size} at PA ${hex(valueOf(fieldNamed(layout, "OA"), word))}`]);
    rows.push(["access", rightsOf(format, layout, word)]);
    const memory = fieldNamed(layout, "AttrIndx") || fieldNamed(layout, "MemAttr");
    rows.push(["memory", meaningOf(memory, valueOf(memory, word), word, layout)]);
  }
  const wrong = decoded.fields.filter((row) => row.wrong);
  if (wrong.length) rows.push(["wrong", `reserved bits are set: ${wrong.map((row) => row.field.bits).join(", ")}`]);
  return rows;
}

function startExplorer() {
  byId("x-stage").replaceChildren(...STAGES.map(([value, name]) => make("option", { value }, name)));
  byId("x-word").addEventListener("input", () => {
    const word = parseWord(byId("x-word").value);
    byId("x-word").setAttribute("aria-invalid", word === null ? "true" : "false");
    if (word !== null) {
      explorer.word = word;
      drawExplorer();
    }
  });
  for (const id of ["x-granule", "x-stage", ...OPTIONS.map((name) => `x-${name}`)]) {
    byId(id).addEventListener("change", () => explore(chosenFormat(), explorer.level, explorer.word));
  }
  byId("x-level").addEventListener("change", () =>
    explore(explorer.format, Number(byId("x-level").value), explorer.word));
  explore(explorer.format, explorer.level, explorer.word);
}
