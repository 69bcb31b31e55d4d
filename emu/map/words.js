// Words decoded by the embedded layouts: the rows of pgtable/descriptors.py. A word is a BigInt.
const data = JSON.parse(document.getElementById("data").textContent);
const MASK64 = (1n << 64n) - 1n;

const big = (text) => BigInt("0x" + text);
const hex = (number) => "0x" + number.toString(16).padStart(16, "0");

// Fields of a layout by its number, highest bits first.
const fieldsOf = (layout) => data.layouts[layout].map((number) => data.fields[number]);
const fieldNamed = (layout, name) => fieldsOf(layout).find((field) => field.name === name);

function valueOf(field, word) {
  return field.spans.reduce(
    (value, [lo, width, at]) => value | ((word >> BigInt(lo)) & ((1n << BigInt(width)) - 1n)) << BigInt(at), 0n);
}

// "invalid", "table", "block" or "page".
function kindOf(format, level, word) {
  const bit = (name) => valueOf(fieldNamed(format.leaf[3], name), word) === 1n;
  if (!bit("VALID")) return "invalid";
  if (level === 3) return bit("TYPE") ? "page" : "invalid";
  if (bit("TYPE")) return "table";
  return format.blocks.includes(level) ? "block" : "invalid";
}

// A word that is not valid is shown as what it would be if it were.
function layoutOf(format, level, word) {
  const type = valueOf(fieldNamed(format.leaf[3], "TYPE"), word) === 1n;
  return type && level < 3 ? format.table : format.leaf[level];
}

// What a value means here: as the field's table says, with what the registers add.
function meaningOf(field, value, word, layout) {
  const stage1 = fieldNamed(layout, "AttrIndx") || fieldNamed(layout, "NSTable");
  if (field.name === "AttrIndx") {
    const high = fieldNamed(layout, "AttrIndx3");
    const index = Number(value) + (high ? Number(valueOf(high, word)) * 8 : 0);
    return `Attr${index} of ${data.mair_of}: ${data.mair[index] ?? "not known here"}`;
  }
  if (field.name === "NS" && stage1 && !data.secure) return "no effect outside Secure state";
  const text = field.values[value.toString(16)] || field.doc;
  return stage1 && data.el2 ? text.replaceAll("EL1", "EL2") : text;
}

// Everything that a word says: its kind, layout and fields {field, value, meaning, wrong}.
function decode(formatName, level, word) {
  const format = data.formats[formatName];
  const layout = layoutOf(format, level, word);
  const valid = valueOf(fieldNamed(layout, "VALID"), word) === 1n;
  const fields = fieldsOf(layout).map((field) => {
    const value = valueOf(field, word);
    const wrong = valid && field.reserved === "RES0" && value !== 0n;
    return { field, value, meaning: meaningOf(field, value, word, layout), wrong };
  });
  return { kind: kindOf(format, level, word), format, layout, fields };
}

// A field's name as people say it: reserved rows by what they are.
const fieldName = (field) => ({ "": field.name, IGNORED: "ignored" })[field.reserved] ?? field.reserved;

// Rights of a leaf with no limits above it.
function rightsOf(format, layout, word) {
  if (format.rights === null) return "what PIIndex selects in PIR_ELx";
  const table = data.rights[format.rights];
  const values = table.fields.map((name) => valueOf(fieldNamed(layout, name), word).toString(16));
  return table.text[values.join(",")] + (fieldNamed(layout, "POIndex") ? ", less what the overlay POIndex takes" : "");
}

function sizeText(bytes) {
  const units = ["bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
  let unit = 0;
  let size = Number(bytes);
  while (size >= 1024 && unit < 6) [size, unit] = [size / 1024, unit + 1];
  return `${size >= 100 ? Math.round(size) : size.toFixed(1).replace(/\.0$/, "")} ${units[unit]}`;
}

// An element; attributes that begin with "on" are listeners, children are nodes or text.
function make(tag, attributes, ...children) {
  const svg = ["svg", "g", "rect", "text", "path", "title", "defs", "pattern", "line"].includes(tag);
  const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

// 0x..., or bare hexadecimal digits; null for anything else or more than 64 bits.
function parseWord(text) {
  const digits = text.trim().replace(/^0x/i, "").replace(/_/g, "");
  return /^[0-9a-f]{1,16}$/i.test(digits) ? big(digits) : null;
}

// A table of fields, without empty reserved ones.
function fieldTable(decoded) {
  const shown = decoded.fields.filter(({ field, value, wrong }) => value || wrong || !field.reserved);
  return make("table", { class: "fields" },
    make("thead", {}, make("tr", {}, ...["bits", "field", "value", "meaning"].map((name) => make("th", {}, name)))),
    make("tbody", {}, ...shown.map(({ field, value, meaning, wrong }) =>
      make("tr", { class: wrong ? "wrong" : null },
        make("td", {}, field.bits), make("td", {}, fieldName(field)),
        make("td", {}, field.spans[0][1] === 1 && field.spans.length === 1 ? `${value}` : `0x${value.toString(16)}`),
        make("td", {}, wrong ? "must be 0 here" : meaning)))));
}
