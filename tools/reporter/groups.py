"""What a pass left alone, in few boxes: merge neighbors of one module, and find alike layers."""

from collections.abc import Hashable, Sequence

Edge = tuple[int, int]


def merged(labels: Sequence[str | None], edges: Sequence[Edge]) -> list[int]:
    """Of each node the first of its group; nodes are numbered so that each edge leads forward.

    The two ends of an edge are merged where both have the same label (None: never), unless another
    way leads from one to the other: then the groups would wait for each other.
    """
    groups = list(range(len(labels)))
    for a, b in sorted(edges, key=lambda edge: (edge[1], -edge[0])):
        x, y = groups[a], groups[b]
        if x != y and labels[a] is not None and labels[a] == labels[b]:
            ways = {(groups[c], groups[d]) for c, d in edges}
            if not _other_way(x, y, ways):
                groups = [min(x, y) if group in (x, y) else group for group in groups]
    return groups


def _other_way(start: int, end: int, edges: set[Edge]) -> bool:
    below: dict[int, list[int]] = {}
    for a, b in edges:
        if a != b and (a, b) != (start, end):
            below.setdefault(a, []).append(b)
    seen, waiting = {start}, [start]
    while waiting:
        for node in below.get(waiting.pop(), ()):
            if node == end:
                return True
            if node not in seen:
                seen.add(node)
                waiting.append(node)
    return False


def alike(shapes: Sequence[Hashable]) -> list[list[int]]:
    """The indices of equal shapes: the largest class first, then the one that starts first."""
    classes: dict[Hashable, list[int]] = {}
    for i, shape in enumerate(shapes):
        classes.setdefault(shape, []).append(i)
    return sorted(classes.values(), key=lambda found: (-len(found), found[0]))
