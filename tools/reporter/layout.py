"""Place the boxes of an acyclic graph in rows, so that every edge points down.

After Sugiyama, Tagawa and Toda (1981): a box stands one row below the lowest of those that it
reads; an edge that crosses rows gets a cell of its own in each; the order within a row is improved
by barycenters as long as fewer edges cross; and places are those nearest to the neighbors', in
least squares, that keep order and distance (found by pooling adjacent violators).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, combinations, pairwise

GAP, ROW_GAP, LANE = 14, 28, 12  # pixels: between boxes, between rows, what an edge takes of a row
SWEEPS, SETTLING = 12, 60  # rounds that improve the order, and the places
STRAIGHT = 4.0  # how much more the cell of an edge insists on its place than a box does

Point = tuple[float, float]
Edge = tuple[int, int]


@dataclass
class Placed:
    """Where boxes lie, and the points that each edge goes through, in pixels from the top left."""

    corners: list[Point]
    routes: list[list[Point]]
    width: float
    height: float


@dataclass
class _Cells:
    """Boxes, and after them one cell for each row that an edge crosses."""

    widths: list[float]
    rows: list[list[int]]
    above: dict[int, list[int]] = field(default_factory=dict)
    below: dict[int, list[int]] = field(default_factory=dict)
    chains: list[list[int]] = field(default_factory=list)  # of each edge

    def near(self) -> dict[int, list[int]]:
        """What each cell would stand below: of a box its neighbors, of an edge all of the edge."""
        every = range(len(self.widths))
        found = {c: [*self.above.get(c, ()), *self.below.get(c, ())] for c in every}
        for chain in self.chains:
            found |= {cell: chain for cell in chain[1:-1]}
        return found


def place(sizes: Sequence[Point], edges: Sequence[Edge]) -> Placed:
    """Lay boxes of these widths and heights out; an edge leads from one's index to another's."""
    if not sizes:
        return Placed([], [], 0, 0)
    ranks = _ranks(len(sizes), edges)
    cells = _cells([width for width, _ in sizes], edges, ranks)
    _order(cells)
    centers = _centers(cells)
    heights = [max((sizes[c][1] for c in row if c < len(sizes)), default=0) for row in cells.rows]
    tops = list(accumulate((height + ROW_GAP for height in heights), initial=0.0))
    left = min(centers[c] - cells.widths[c] / 2 for row in cells.rows for c in row)
    right = max(centers[c] + cells.widths[c] / 2 for row in cells.rows for c in row)
    middles = {c: centers[c] - left for c in centers}
    corners = [(middles[i] - w / 2, tops[ranks[i]]) for i, (w, _) in enumerate(sizes)]
    bands = [(top, top + height) for top, height in zip(tops, heights, strict=False)]
    routes = [_route(chain, middles, ranks, sizes, bands) for chain in cells.chains]
    return Placed(corners, routes, right - left, tops[-1] - ROW_GAP)


def _ranks(count: int, edges: Sequence[Edge]) -> list[int]:
    """The row of each box; one that reads nothing stands right above the first that reads it."""
    above: dict[int, list[int]] = {i: [] for i in range(count)}
    below: dict[int, list[int]] = {i: [] for i in range(count)}
    for a, b in edges:
        above[b].append(a)
        below[a].append(b)
    ranks = [0] * count
    for i in sorted_by_edges(count, edges):
        ranks[i] = max((ranks[a] + 1 for a in above[i]), default=0)
    for i in range(count):
        if not above[i] and below[i]:
            ranks[i] = min(ranks[b] for b in below[i]) - 1
    return ranks


def sorted_by_edges(count: int, edges: Sequence[Edge]) -> list[int]:
    """Numbers up to `count` so that each edge leads forward; the lowest first where it is free."""
    waits = [0] * count
    below: dict[int, list[int]] = {}
    for a, b in edges:
        waits[b] += 1
        below.setdefault(a, []).append(b)
    ready, found = [i for i in range(count) if not waits[i]], list[int]()
    while ready:
        ready.sort(reverse=True)
        found.append(ready.pop())
        for b in below.get(found[-1], ()):
            waits[b] -= 1
            if not waits[b]:
                ready.append(b)
    return found


def _cells(widths: list[float], edges: Sequence[Edge], ranks: Sequence[int]) -> _Cells:
    rows: list[list[int]] = [[] for _ in range(max(ranks) + 1)]
    for i, rank in enumerate(ranks):
        rows[rank].append(i)
    made = _Cells(list(widths), rows)
    for a, b in edges:
        chain = [a]
        for rank in range(ranks[a] + 1, ranks[b]):
            chain.append(len(made.widths))
            made.widths.append(LANE)
            rows[rank].append(chain[-1])
        chain.append(b)
        made.chains.append(chain)
        for x, y in pairwise(chain):
            made.below.setdefault(x, []).append(y)
            made.above.setdefault(y, []).append(x)
    return made


def _order(cells: _Cells) -> None:
    """Sort each row by where its neighbors stand, down and up; keep what crosses least."""
    best, fewest = [list(row) for row in cells.rows], _crossings(cells)
    for sweep in range(SWEEPS):
        down = sweep % 2 == 0
        sides, rows = (cells.above, cells.rows) if down else (cells.below, cells.rows[::-1])
        for last, row in pairwise(rows):
            row[:] = _by_neighbors(row, last, sides)
        crossings = _crossings(cells)
        if crossings < fewest:
            best, fewest = [list(row) for row in cells.rows], crossings
    cells.rows = best


def _by_neighbors(
    row: Sequence[int], last: Sequence[int], sides: Mapping[int, list[int]]
) -> list[int]:
    """A row by the means of where its cells' neighbors stand in the row that was sorted last."""
    at, means = {cell: i for i, cell in enumerate(last)}, dict[int, float]()
    for i, cell in enumerate(row):
        near = [at[c] for c in sides.get(cell, ())]
        means[cell] = sum(near) / len(near) if near else i
    return sorted(row, key=means.__getitem__)


def _crossings(cells: _Cells) -> int:
    found = 0
    for upper, lower in pairwise(cells.rows):
        at = {cell: i for i, cell in enumerate(lower)}
        ends = [(i, at[b]) for i, a in enumerate(upper) for b in cells.below.get(a, ())]
        found += sum((a - c) * (b - d) < 0 for (a, b), (c, d) in combinations(ends, 2))
    return found


def _centers(cells: _Cells) -> dict[int, float]:
    """The middle of each cell from left to right."""
    centers: dict[int, float] = {}
    for row in cells.rows:
        ends = accumulate(cells.widths[c] + GAP for c in row)
        centers |= {c: end - cells.widths[c] / 2 for c, end in zip(row, ends, strict=True)}
    near = cells.near()
    for sweep in range(SETTLING):
        for row in cells.rows if sweep % 2 == 0 else cells.rows[::-1]:
            wanted = [_middle(near[c], centers, centers[c]) for c in row]
            gaps = [(cells.widths[a] + cells.widths[b]) / 2 + GAP for a, b in pairwise(row)]
            weights = [STRAIGHT if cells.widths[c] == LANE else 1.0 for c in row]
            centers |= zip(row, spread(wanted, gaps, weights), strict=True)
    return centers


def _middle(cells: Sequence[int], centers: Mapping[int, float], alone: float) -> float:
    return sum(centers[c] for c in cells) / len(cells) if cells else alone


def spread(wanted: Sequence[float], gaps: Sequence[float], weights: Sequence[float]) -> list[float]:
    """The places nearest to those wanted, in weighted least squares, that are `gaps` apart or more.

    With the gaps taken off it is an isotonic regression: neighbors out of order share their mean.
    """
    offsets = list(accumulate(gaps, initial=0.0))
    blocks: list[tuple[float, float, int]] = []  # mean, weight, how many
    for want, offset, weight in zip(wanted, offsets, weights, strict=True):
        mean, count = want - offset, 1
        while blocks and blocks[-1][0] > mean:
            other, heavy, more = blocks.pop()
            mean = (mean * weight + other * heavy) / (weight + heavy)
            weight, count = weight + heavy, count + more
        blocks.append((mean, weight, count))
    means = [mean for mean, _, count in blocks for _ in range(count)]
    return [mean + offset for mean, offset in zip(means, offsets, strict=True)]


def _route(
    chain: Sequence[int],
    middles: Mapping[int, float],
    ranks: Sequence[int],
    sizes: Sequence[Point],
    bands: Sequence[Point],
) -> list[Point]:
    """From the bottom of a box, straight through each row between, to the top of another."""
    first, *between, last = chain
    row = ranks[first]
    points = [(middles[first], bands[row][0] + sizes[first][1])]
    for cell in between:
        row += 1
        points += [(middles[cell], bands[row][0]), (middles[cell], bands[row][1])]
    return [*points, (middles[last], bands[ranks[last]][0])]
