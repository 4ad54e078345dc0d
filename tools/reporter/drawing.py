"""A scene as SVG, in text that an HTML page holds as it is."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape
from torch.fx import Node

from kvc8.tools.reporter.layout import Point, place
from kvc8.tools.reporter.scenes import ROOM, SIGNS, Box, Scene

LETTER, LINE, EDGE = 6.7, 14, 8  # pixels: a letter, a line of text, and what surrounds it
LEAST = 0.75  # how far a drawing may shrink to fit before it scrolls
WORDS = {"new": "new", "gone": "gone after this pass", "changed": "changed", "": "left alone"}


@dataclass(frozen=True)
class Drawing:
    """A picture, and how wide it is where nothing shrinks it, in pixels."""

    svg: Markup
    width: int


def draw(scene: Scene, label: str, line: Callable[[Node], int]) -> Drawing:
    """Lay a scene out and draw it; `line` gives the number of a node's text on the page."""
    sizes = [_size(box) for box in scene.boxes]
    placed = place(sizes, scene.edges)
    width, height = round(placed.width) + 2, round(placed.height) + 2
    head = Markup(
        '<svg viewBox="-1 -1 {} {}" width="{}" height="{}" style="min-width:{}px" role="group" '
        'aria-label="{}">'
    )
    parts = [head.format(width, height, width, height, round(LEAST * width), label)]
    parts += [Markup('<path d="{}"/>').format(_path(route)) for route in placed.routes]
    for box, corner, size in zip(scene.boxes, placed.corners, sizes, strict=True):
        parts.append(_box(box, corner, size, [line(node) for node in box.nodes]))
    return Drawing(Markup("").join([*parts, Markup("</svg>")]), width)


def _size(box: Box) -> Point:
    longest = max(len(_cut(text)) for text in (_title(box), *box.lines))
    return round(longest * LETTER + 2 * EDGE), LINE * (1 + len(box.lines)) + EDGE


def _title(box: Box) -> str:
    sign = SIGNS[box.mark]
    return f"{sign} {box.title}" if sign else box.title


def _cut(text: str) -> str:
    return text if len(text) <= ROOM else f"{text[: ROOM - 1]}…"


def _box(box: Box, corner: Point, size: Point, lines: Sequence[int]) -> Markup:
    x, y = (round(at) for at in corner)
    name = f"{box.title}: {', '.join(box.lines)}; {WORDS[box.mark]}"
    start = Markup(
        '<g class="box {}" data-l="{}" tabindex="0" role="button" aria-label="{}" '
        'transform="translate({} {})"><rect width="{}" height="{}" rx="{}"/>'
    )
    numbers = " ".join(map(str, lines))
    kind = f"{box.kind} {box.mark}".strip()
    round_ = 9 if box.kind == "cache" else 3
    head = start.format(kind, numbers, name, x, y, *map(round, size), round_)
    return Markup("").join([head, *_texts(box), Markup("</g>")])


def _texts(box: Box) -> Iterator[Markup]:
    for i, text in enumerate((_title(box), *box.lines)):
        bold = Markup(' class="t"') if i == 0 else ""
        cell = Markup('<text x="{}" y="{}"{}>{}</text>')
        yield cell.format(EDGE, LINE * (i + 1), bold, escape(_cut(text)))


def _path(points: Sequence[Point]) -> str:
    """Straight through rows, and between them curves that leave and arrive upright."""
    flat = [(round(x), round(y)) for x, y in points]
    (x, y), *rest = flat
    found = [f"M{x} {y}"]
    for i, (to_x, to_y) in enumerate(rest):
        middle = (y + to_y) // 2
        straight = i % 2 == 1 or x == to_x
        curve = f"C{x} {middle} {to_x} {middle} {to_x} {to_y}"
        found.append(f"V{to_y}" if straight else curve)
        x, y = to_x, to_y
    return "".join(found)
