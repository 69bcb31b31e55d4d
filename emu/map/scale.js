// Where ranges go on the drawing: the rule of emu/map/scale.py, in the same words.
const ITEM = 19, GAP = 19, SLIVER = 2;

// The number of the area that an address is in.
const areaOf = (va) => areas.findLastIndex((area) => area.start <= va);

// The pieces of the window [start, end): {start, end, first, count, empty}; count is 0 for a gap.
function piecesOf(start, end, ranges, room) {
  let shown = [];
  ranges.forEach((range, i) => {
    if (range.va >= end || range.end <= start) return;
    const [low, high] = [range.va > start ? range.va : start, range.end < end ? range.end : end];
    shown.push({ start: low, end: high, area: areaOf(low), first: i, count: 1 });
  });
  const least = (pieces) => pieces.reduce((sum, p) => sum + (p.count || p.empty ? ITEM : GAP), 0);
  const crowded = () => shown.length * ITEM > room;
  let found = crowded() ? [] : withGaps(start, end, shown);
  for (let size = 4096n; size <= end - start && (crowded() || least(found) > room); size += size / 4n) {
    shown = clustered(shown, size);
    found = crowded() ? [] : withGaps(start, end, shown);
  }
  return found.length ? found : withGaps(start, end, shown);
}

// Neighbours of one area that together are no larger than `size` made one.
function clustered(shown, size) {
  const found = shown.slice(0, 1);
  for (const piece of shown.slice(1)) {
    const last = found[found.length - 1];
    if (last.area === piece.area && piece.end - last.start <= size) {
      found[found.length - 1] = { ...last, end: piece.end, count: last.count + piece.count };
    } else {
      found.push(piece);
    }
  }
  return found;
}

function withGaps(start, end, shown) {
  const found = [];
  let at = start;
  for (const piece of [...shown, { start: end, end, count: 0 }]) {
    found.push(...gaps(at, piece.start));
    if (piece.count) found.push(piece);
    if (piece.end > at) at = piece.end;
  }
  return found;
}

// A gap; areas with a name that are wholly inside are pieces of their own.
function gaps(start, end) {
  const found = [];
  let at = start;
  for (const area of areas) {
    if (area.name && start <= area.start && area.end <= end) {
      if (at < area.start) found.push({ start: at, end: area.start, count: 0 });
      found.push({ start: area.start, end: area.end, count: 0, empty: true });
      at = area.end;
    }
  }
  if (at < end) found.push({ start: at, end, count: 0 });
  return found;
}

function heightOf(piece, scale) {
  const size = Number(piece.end - piece.start) * scale;
  if (piece.count) return Math.max(ITEM, size);
  return piece.empty ? ITEM : Math.min(Math.max(SLIVER, size), GAP);
}

// Gives each piece its top and height in pixels, and says whether a gap is cut. Returns the pixels per byte.
function place(pieces, room) {
  let low = 0, high = room / Math.min(...pieces.map((piece) => Number(piece.end - piece.start)));
  for (let i = 0; i < 80; i++) {
    const middle = (low + high) / 2;
    if (pieces.reduce((sum, piece) => sum + heightOf(piece, middle), 0) > room) high = middle; else low = middle;
  }
  let top = 0;
  for (const piece of pieces) {
    piece.top = top;
    piece.height = heightOf(piece, low);
    piece.cut = !piece.count && Number(piece.end - piece.start) * low > piece.height + 0.5;
    top += piece.height;
  }
  return low;
}
