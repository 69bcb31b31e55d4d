// The map: what is drawn where, the table of ranges, the walk of one, search. State is in `view`; everything is drawn
// anew from it. Text from the data goes into text nodes only.
const areas = (data.areas || []).map(([start, end, name]) => ({ start: big(start), end: big(end), name }));
const rows = (data.rows || []).map((row, number) => {
  const [va, size, pa] = row.slice(0, 3).map(big);
  const [level, leaves, kind] = row.slice(3, 6);
  const [rights, memory, pattern, name, fault, status] = row.slice(6, 12).map((text) => data.texts[text]);
  return { number, va, size, end: va + size, pa, level, leaves, kind, rights, memory, pattern, name, fault, status,
    fields: row[12], walks: row[13], area: areaOf(va) };
});
const WHOLE = { start: 0n, end: 1n << 64n, name: "all" };
const view = { trail: [WHOLE], selected: null, hits: null, pressed: new Set(), filter: "", sort: ["va", 1], limit: 300,
  colour: data.old ? "status" : "kind", placed: [] };
const COLUMNS = [
  ["va", "VA", (r) => hex(r.va)], ["size", "size", (r) => sizeText(r.size)], ["pa", "PA", (r) => hex(r.pa)],
  ["rights", "permissions", (r) => r.rights], ["area", "area", (r) => areas[r.area].name],
  ["level", "level", (r) => `${r.level}`], ["memory", "memory", (r) => r.memory], ["name", "symbol", (r) => r.name],
];
if (data.old) COLUMNS.splice(2, 0, ["status", "difference", (r) => [r.status, ...r.fields.map((f) => f[0])].join(" ")]);
const STATUSES = ["added", "removed", "changed", "same"];

const mapped = (some) => sizeText(some.reduce((sum, row) => sum + row.size, 0n));
const shown = () => view.trail[view.trail.length - 1];
const colourOf = (row) => view.colour === "status" ? `var(--${row.status})` : `var(--kind-${data.kinds[row.kind].key})`;
const classOf = (row) => view.colour === "status" ? row.status : data.kinds[row.kind].key;
const isOn = (row) => !view.pressed.size || view.pressed.has(classOf(row)) || view.pressed.has(row.pattern || "cached");
const shortened = (text, width) => text.length * 6.3 > width ? `${text.slice(0, Math.max(width / 6.3 - 1, 1))}…` : text;

// Zoom

function zoomTo(start, end, name, wheel = false) {
  const window = { start, end, name: name || `${hex(start)} + ${sizeText(end - start)}`, wheel };
  if (wheel && shown().wheel) view.trail.pop();
  if (start === WHOLE.start && end === WHOLE.end) view.trail = [WHOLE]; else view.trail.push(window);
  drawMap();
}

function back() {
  if (view.trail.length > 1) view.trail.pop();
  drawMap();
}

// The middle part of the drawing around `y` (pixels); the drawing knows which addresses that is.
function zoomIn(y) {
  const last = view.placed[view.placed.length - 1];
  const bottom = last.top + last.height;
  const [start, end] = [y * 0.35, y + (bottom - y) * 0.65].map(addressAt);
  const [low, high] = [start & ~4095n, end + 4095n & ~4095n];
  if (high - low >= 8192n && high - low < shown().end - shown().start) zoomTo(low, high, "", true);
}

// Grows the window until more ranges are in it.
function zoomOut() {
  const inside = ({ start, end }) => rows.reduce((n, row) => n + (row.va < end && start < row.end ? 1 : 0), 0);
  const before = inside(shown());
  let { start, end } = shown();
  do {
    const more = (end - start) / 2n & ~4095n || 4096n;
    start = start > more ? start - more : 0n;
    end = end + more < WHOLE.end ? end + more : WHOLE.end;
  } while (inside({ start, end }) === before && !(start === 0n && end === WHOLE.end));
  zoomTo(start, end, "", true);
}

function addressAt(y) {
  const piece = view.placed.find((p) => y <= p.top + p.height) || view.placed[view.placed.length - 1];
  const part = Math.min(Math.max((y - piece.top) / piece.height, 0), 1);
  return piece.start + BigInt(Math.round(part * 1e6)) * (piece.end - piece.start) / 1000000n;
}

function yOf(va) {
  const piece = view.placed.find((p) => va < p.end) || view.placed[view.placed.length - 1];
  const part = va <= piece.start ? 0 : va >= piece.end ? 1 : Number(va - piece.start) / Number(piece.end - piece.start);
  return piece.top + part * piece.height;
}

// Drawing

function drawMap() {
  const canvas = byId("canvas");
  const width = Math.max(canvas.clientWidth - 2, 500), room = Math.max(canvas.clientHeight - 6, 300);
  const { start, end } = shown();
  view.placed = piecesOf(start, end, rows, room);
  const scale = place(view.placed, room);
  const tall = view.placed.reduce((sum, piece) => sum + piece.height, 0);
  const svg = make("svg", { width, height: tall + 4, role: "group", "aria-label": "ranges by address" }, patterns());
  svg.append(...bands(), ...view.placed.map((piece) => piece.count ? item(piece, width) : gap(piece, width)));
  canvas.replaceChildren(svg);
  byId("crumbs").replaceChildren(...view.trail.flatMap((window, i) => [i ? " › " : "", make("button", {
    disabled: i === view.trail.length - 1 ? "" : null,
    onclick: () => { view.trail.length = i + 1; drawMap(); } }, window.name)]));
  byId("back").disabled = view.trail.length < 2;
  byId("out").disabled = shown() === WHOLE;
  byId("scale").textContent = `1 pixel is ${sizeText(Math.max(Math.round(1 / scale), 1))}; a smaller range is one line `
    + "high, a zigzag is a gap cut short";
}

const HALF = 20, AREA = 108, BOX = 262, BOX_WIDTH = 96, LABEL = BOX + BOX_WIDTH + 10; // x and widths of columns

function patterns() {
  return make("defs", {},
    make("pattern", { id: "device", width: 6, height: 6, patternUnits: "userSpaceOnUse", patternTransform: "rotate(45)" },
      make("rect", { width: 2.4, height: 6, fill: "var(--hatch)" })),
    make("pattern", { id: "uncached", width: 5, height: 5, patternUnits: "userSpaceOnUse" },
      make("rect", { width: 2, height: 2, fill: "var(--hatch)" })));
}

// The halves and areas beside the ranges.
function bands() {
  const { start, end } = shown();
  const found = [];
  for (const [from, to, name, off] of data.halves) {
    const [a, b] = [big(from), big(to)];
    if (a >= end || b <= start) continue;
    const y = yOf(a), height = yOf(b) - y;
    const text = off ? `${name}: ${off}` : name;
    const turned = text.length * 6.3 <= height ? text : name.split(" ")[0];
    found.push(make("g", {}, make("rect", { class: "area", x: 0, y, width: HALF - 2, height }), make("title", {}, text),
      height < 36 ? null : make("text", { "text-anchor": "middle",
        transform: `translate(13 ${y + height / 2}) rotate(-90)` }, turned)));
  }
  for (const area of areas) {
    if (!area.name || area.start >= end || area.end <= start) continue;
    const y = yOf(area.start), height = Math.max(yOf(area.end) - y, 1);
    found.push(make("g", { class: "item", onclick: () => zoomTo(area.start, area.end, area.name) },
      make("rect", { class: "area", x: HALF, y, width: AREA - 2, height }), make("title", {}, `${area.name} ${hex(area.start)}`),
      height > 12 ? make("text", { x: HALF + 6, y: y + Math.min(height / 2 + 4, 14) }, shortened(area.name, AREA - 8)) : null));
  }
  return found;
}

function gap(piece, width) {
  const { top, height, cut } = piece, middle = top + height / 2;
  const size = sizeText(piece.end - piece.start);
  const zigzag = `M${BOX} ${middle} ${"l6 -4 l6 8 l6 -4 ".repeat(Math.floor(BOX_WIDTH / 18))}`;
  const text = piece.empty ? `${size}, nothing mapped` : `${size} not mapped`;
  return make("g", { class: "gap" },
    cut || piece.empty ? make("path", { class: "break", d: zigzag }) : null,
    piece.empty ? make("text", { class: "address", x: HALF + AREA + 4, y: top + 13 }, hex(piece.start)) : null,
    height < 13 ? null : make("text", { class: "gap", x: LABEL, y: middle + 4 }, shortened(text, width - LABEL)));
}

// A range or a cluster: a box with its address before and a line of text behind.
function item(piece, width) {
  const inside = rows.slice(piece.first, piece.first + piece.count);
  const one = piece.count === 1 ? inside[0] : null;
  const state = [inside.includes(view.selected) && "selected", view.hits && inside.some((r) => view.hits.has(r.number)) && "hit",
    inside.some(isOn) || "dim"].filter(Boolean).join(" ");
  const text = one ? rangeText(one) : `${inside.length} ranges, ${mapped(inside)} of ${sizeText(piece.end - piece.start)}`;
  const { top, height } = piece;
  return make("g", { class: `item range ${state}`, tabindex: 0, role: "button", "aria-label": `${hex(piece.start)} ${text}`,
    "data-first": piece.first, "data-count": piece.count,
    onclick: () => activate(piece), onkeydown: (event) => onKey(event, piece) },
    make("title", {}, `${hex(piece.start)} to ${hex(piece.end - 1n)}\n${one ? `${one.rights}\n${one.memory}` : text}`),
    make("text", { class: "address", x: HALF + AREA + 4, y: top + 13 }, hex(piece.start)),
    ...boxes(inside, one, top, height),
    make("rect", { class: "frame", x: BOX + 0.5, y: top + 1, width: BOX_WIDTH - 1, height: Math.max(height - 2, 1), rx: 2 }),
    make("text", { class: "label", x: LABEL, y: top + 13 }, shortened(text, width - LABEL)));
}

const rangeText = (row) => [sizeText(row.size), row.rights, row.fault ? "faults" : "", row.name || row.pattern,
  data.old ? row.status : ""].filter(Boolean).join("  ");

// A range is one box; of a cluster, each class of ranges has its share of the width.
function boxes(inside, one, top, height) {
  const shares = new Map();
  for (const row of inside) {
    const key = `${colourOf(row)}|${row.pattern}`;
    shares.set(key, (shares.get(key) || 0) + Number(row.size));
  }
  const total = [...shares.values()].reduce((sum, size) => sum + size, 0);
  const room = BOX_WIDTH - 3 * shares.size;
  let x = BOX;
  return [...shares].flatMap(([key, size]) => {
    const [fill, pattern] = key.split("|");
    const at = { x, y: top + 1, width: 3 + size / total * room, height: Math.max(height - 2, 1) };
    x += at.width;
    return [make("rect", { ...at, style: `fill: ${fill}` }), pattern ? make("rect", { ...at, fill: `url(#${pattern})` }) : null];
  });
}

function activate(piece) {
  if (piece.count === 1) {
    select(rows[piece.first]);
  } else {
    zoomTo(piece.start, piece.end);
    byId("canvas").querySelector(".range")?.focus();
  }
}

function onKey(event, piece) {
  const all = [...byId("canvas").querySelectorAll(".range")];
  const next = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  if (next) all[all.indexOf(event.currentTarget) + next]?.focus();
  else if (event.key === "Enter" || event.key === " ") activate(piece);
  else return;
  event.preventDefault();
}

// Selects a range, and zooms until it is drawn by itself.
function select(row, reveal = false) {
  view.selected = row;
  const pieceOf = () => view.placed.find((p) => p.count && p.first <= row.number && row.number < p.first + p.count);
  if (reveal && !pieceOf()) view.trail = [WHOLE];
  drawMap();
  for (let i = 0; reveal && i < 40 && pieceOf() && pieceOf().count > 1; i++) zoomTo(pieceOf().start, pieceOf().end, "", i > 0);
  drawTable();
  drawWalk(row);
  if (!reveal) byId("canvas").querySelector(`[data-first="${row.number}"][data-count="1"]`)?.focus();
}

// Table and legend

function drawTable() {
  const text = view.filter.toLowerCase();
  const wanted = rows.filter((row) => isOn(row) && (!view.hits || view.hits.has(row.number)) &&
    (!text || COLUMNS.some(([, , textOf]) => textOf(row).toLowerCase().includes(text))));
  const [column, direction] = view.sort;
  wanted.sort((a, b) => (a[column] < b[column] ? -1 : a[column] > b[column] ? 1 : a.number - b.number) * direction);
  byId("count").textContent = `${wanted.length} of ${rows.length}`;
  const head = COLUMNS.map(([key, name]) => make("th",
    { "aria-sort": key !== column ? null : direction > 0 ? "ascending" : "descending" },
    make("button", { onclick: () => { view.sort = [key, key === column ? -direction : 1]; drawTable(); } }, name)));
  byId("table").replaceChildren(make("table", {}, make("thead", {}, make("tr", {}, ...head)),
    make("tbody", {}, ...wanted.slice(0, view.limit).map(tableRow))));
  if (wanted.length > view.limit) {
    byId("table").append(make("button", { onclick: () => { view.limit *= 4; drawTable(); } }, "show more"));
  }
  byId("table").querySelector("tr.selected")?.scrollIntoView({ block: "nearest" });
}

function tableRow(row) {
  return make("tr", { tabindex: 0, "data-row": row.number, class: row === view.selected ? "selected" : null,
    onclick: () => select(row, true), onkeydown: (event) => { if (event.key === "Enter") select(row, true); } },
    ...COLUMNS.map(([key, , text]) => make("td", { class: key === "status" ? row.status : null },
      key === "va" ? make("span", { class: "swatch", style: `background: ${colourOf(row)}` }) : null, text(row))));
}

function drawLegend() {
  const chips = view.colour === "status"
    ? STATUSES.map((status) => [status, status, `var(--${status})`, rows.filter((row) => row.status === status)])
    : data.kinds.map((kind, i) => [kind.key, kind.name, `var(--kind-${kind.key})`, rows.filter((row) => row.kind === i)]);
  for (const [pattern, name] of [["device", "Device memory"], ["uncached", "Normal non-cacheable"]]) {
    chips.push([pattern, name, "var(--same)", rows.filter((row) => row.pattern === pattern), pattern]);
  }
  byId("legend").replaceChildren(...chips.filter((chip) => chip[3].length).map(([key, name, fill, inside, pattern]) =>
    make("button", { class: "chip", "aria-pressed": view.pressed.has(key) ? "true" : "false", title: `show only: ${name}`,
      onclick: () => { if (!view.pressed.delete(key)) view.pressed.add(key); drawAll(); } },
      make("svg", { width: 16, height: 12 }, make("rect", { width: 16, height: 12, rx: 2, style: `fill: ${fill}` }),
        pattern ? make("rect", { width: 16, height: 12, fill: `url(#${pattern})` }) : null),
      `${name} `, make("span", { class: "quiet" }, mapped(inside)))));
}

// The walk of a range

function drawWalk(row) {
  const panel = byId("walk");
  if (!row) {
    panel.replaceChildren(make("h2", {}, "Areas"), make("p", { class: "quiet" },
      "Choose a range in the drawing or the table to see the descriptors that translate it. A box with several ranges opens."),
      ...data.halves.filter(([, , , off]) => off).map(([, , name, off]) => make("p", {}, `${name}: ${off}`)),
      areaTable(), ...data.findings.map((text) => make("p", { class: "changed" }, text)));
    return;
  }
  const [now, old] = row.walks;
  const pages = row.leaves > 1 ? `${row.leaves} descriptors of level ${row.level}` : `one descriptor of level ${row.level}`;
  panel.replaceChildren(
    make("h2", {}, `${hex(row.va)} to ${hex(row.end - 1n)}`, row.name ? ` (${row.name})` : ""),
    make("div", {}, `${sizeText(row.size)}, ${pages}, ${areas[row.area].name || "no area"}`),
    ...(data.old ? [make("div", { class: row.status }, [row.status,
      ...row.fields.map(([name, a, b]) => `${name} 0x${a} → 0x${b}`)].join("  "))] : []),
    ...steps(now, row, data.old && old ? "now" : ""), ...(old ? steps(old, row, "before") : []));
}

// What begins in each area; an area opens in the drawing.
function areaTable() {
  const found = areas.map((area, i) => [area, rows.filter((row) => row.area === i)]).filter(([, inside]) => inside.length);
  return make("table", { class: "fields" }, make("tbody", {}, ...found.map(([area, inside]) => make("tr", {},
    make("td", {}, make("button", { class: "link", onclick: () => zoomTo(area.start, area.end, area.name) }, area.name)),
    make("td", {}, hex(area.start)), make("td", {}, `${inside.length} range${inside.length > 1 ? "s" : ""}`),
    make("td", {}, mapped(inside)), make("td", {}, [...new Set(inside.map((row) => row.rights))].join(", "))))));
}

function steps(walk, row, when) {
  if (!walk) return [make("p", { class: "result" }, "now: not mapped")];
  const [format, numbers] = walk;
  const found = numbers.map((number, i) => step(format, ...data.steps[number], i === numbers.length - 1));
  const result = row.fault || `PA ${hex(row.pa)}, ${row.rights}, ${row.memory}`;
  const current = when !== "before" || !row.walks[0];
  return [make("p", { class: "result" }, `${when ? `${when}: ` : ""}walk of ${hex(row.va)}`), ...found,
    current ? make("p", { class: `result ${row.fault ? "removed" : ""}` }, `= ${result}`) : ""];
}

function step(format, level, table, entry, text, open) {
  const word = big(text), decoded = decode(format, level, word);
  const next = decoded.kind === "table" ? ` → ${hex(valueOf(fieldNamed(decoded.layout, "TA"), word))}` : "";
  return make("details", { open: open ? "" : null, "data-word": hex(word) },
    make("summary", {}, make("code", {}, `L${level}  table ${hex(big(table))} [${entry}]  ${hex(word)}`),
      `  ${decoded.kind}${next}`),
    make("button", { class: "link", onclick: () => { show("explorer"); explore(format, level, word); } }, "open in the explorer"),
    fieldTable(decoded));
}

// Search

function search(text) {
  const address = parseWord(text);
  byId("address").setAttribute("aria-invalid", address === null ? "true" : "false");
  if (address === null) return;
  const byVa = rows.filter((row) => row.va <= address && address < row.end);
  const byPa = rows.filter((row) => row.pa <= address && address < row.pa + row.size);
  view.hits = new Set([...byVa, ...byPa].map((row) => row.number));
  byId("clear").hidden = false;
  view.selected = null;
  drawAll();
  const link = (row, va) => make("button", { class: "mono", "data-va": hex(va), onclick: () => select(row, true) }, hex(va));
  const asVa = byVa.map((row) => make("p", { class: "found" },
    "VA ", link(row, address), ` reaches PA ${hex(row.pa + address - row.va)}`));
  const asPa = byPa.length ? make("p", { class: "found" }, `PA ${hex(address)} is reached by `,
    `${byPa.length} VA${byPa.length > 1 ? "s" : ""}: `, ...byPa.map((row) => link(row, row.va + address - row.pa))) : null;
  byId("walk").replaceChildren(make("h2", {}, `Search for ${hex(address)}`), ...asVa, asPa || "",
    view.hits.size ? "" : make("p", {}, "No range maps this VA, and none reaches this PA."));
}

// The page

function drawAll() {
  drawMap();
  drawTable();
  drawLegend();
  drawWalk(view.selected);
}

function show(name) {
  for (const each of ["map", "explorer"]) {
    byId(each).hidden = each !== name;
    byId(`tab-${each}`).setAttribute("aria-selected", each === name ? "true" : "false");
  }
  byId("search").hidden = name !== "map";
}

function startMap() {
  byId("about").textContent = data.about.join("; ");
  byId("colours").hidden = !data.old;
  byId("colours").querySelector("select").addEventListener("change", (event) => {
    view.colour = event.target.value;
    view.pressed.clear();
    drawAll();
  });
  byId("back").addEventListener("click", back);
  byId("in").addEventListener("click", () => zoomIn(byId("canvas").clientHeight / 2));
  byId("out").addEventListener("click", zoomOut);
  byId("canvas").addEventListener("wheel", (event) => {
    event.preventDefault();
    if (event.deltaY < 0) zoomIn(event.clientY - byId("canvas").getBoundingClientRect().top + byId("canvas").scrollTop);
    else if (shown() !== WHOLE) zoomOut();
  }, { passive: false });
  byId("drawing").addEventListener("keydown", (event) => { if (event.key === "Escape") back(); });
  byId("search").addEventListener("submit", (event) => { event.preventDefault(); search(byId("address").value); });
  byId("clear").addEventListener("click", () => {
    Object.assign(view, { hits: null });
    byId("address").value = "";
    byId("clear").hidden = true;
    drawAll();
  });
  byId("filter").addEventListener("input", (event) => { view.filter = event.target.value; drawTable(); });
  for (const name of ["map", "explorer"]) byId(`tab-${name}`).addEventListener("click", () => show(name));
  new ResizeObserver(drawMap).observe(byId("canvas"));
  drawAll();
}

function start() {
  document.querySelector("h1").textContent = data.title;
  startExplorer();
  if (!data.rows) {
    document.querySelector("[role=tablist]").hidden = true;
    show("explorer");
    return;
  }
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const colours = () => data.kinds.forEach((kind) =>
    document.documentElement.style.setProperty(`--kind-${kind.key}`, dark.matches ? kind.dark : kind.light));
  dark.addEventListener("change", colours);
  colours();
  show("map");
  startMap();
}

start();
