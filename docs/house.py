"""Draws the rooms of the package and what imports what, from the imports themselves: python docs/house.py

The drawing is docs/images/house.svg. An arrow is left out where a chain of others says the same. A test holds the order
of the rooms, and fails while the drawing differs from the imports.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path
from xml.sax.saxutils import escape

PACKAGE = Path(__file__).parents[1] / "distrain"
DRAWING = Path(__file__).parent / "images" / "house.svg"

FLOORS = [
    ["system", "config", "run"],
    ["checkpoints", "checkpoint", "datasets", "data", "fingerprints", "networks", "models", "optim", "metrics"],
    ["parallel", "diagnose", "training", "loop", "inference"],
    ["plan", "autobatch", "launchers", "doctor", "report", "sweep", "prove", "project", "api"],
    ["cli", "__main__"],
]
"""The rooms of each floor, the lowest first: a room imports from lower floors, and from those before it on its own."""

TITLES = [
    "the machine, the recipe, the run folder",
    "the parts of a training",
    "training",
    "around a training",
    "commands",
]
_FRONT_DOORS = {"checkpoint", "data", "models", "loop"}

_WIDTH, _BOX, _HEIGHT, _GAP, _FLOOR = 1180, 112, 34, 14, 118


def sources() -> list[Path]:
    """Return the files of the package."""
    return sorted(f for f in PACKAGE.rglob("*.py") if "share" not in f.parts and f.parent.name != "sites")


def room_of(file: Path) -> str:
    """Return the room that a file of the package is in."""
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Yield (module, line) of every absolute import, also those within functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports within distrain are absolute"
            assert node.module is not None
            # `from distrain import config` names a room as well
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


@functools.cache
def imported() -> dict[str, set[str]]:
    """Return the rooms that each room imports."""
    rooms = [room for floor in FLOORS for room in floor]
    found: dict[str, set[str]] = {room: set() for room in rooms}
    for file in sources():
        room = room_of(file)
        for module, _ in imports(ast.parse(file.read_text())):
            parts = module.split(".")
            if room in found and parts[0] == "distrain" and len(parts) > 1 and parts[1] in found and parts[1] != room:
                found[room].add(parts[1])
    return found


def arrows() -> list[tuple[str, str]]:
    """Return (room, room that it imports), without those that follow from a chain of others."""
    direct = imported()

    @functools.cache
    def reached(room: str) -> frozenset[str]:
        return frozenset(direct[room]).union(*(reached(other) for other in direct[room]))

    return sorted(
        (room, other)
        for room, others in direct.items()
        for other in others
        if not any(other in reached(between) for between in others - {other})
    )


def drawing() -> str:
    """Return the drawing, as SVG."""
    place: dict[str, tuple[float, float]] = {}
    height = _FLOOR * len(FLOORS) + 10
    parts = []
    for number, (floor, title) in enumerate(zip(FLOORS, TITLES, strict=True)):
        shown = [room for room in floor if room != "__main__"]
        top = height - _FLOOR * (number + 1)
        parts.append(f'<rect class="floor" x="6" y="{top}" width="{_WIDTH - 12}" height="{_FLOOR - 14}" rx="8"/>')
        parts.append(f'<text class="title" x="18" y="{top + 18}">{escape(title)}</text>')
        left = (_WIDTH - len(shown) * (_BOX + _GAP) + _GAP) / 2
        for index, room in enumerate(shown):
            place[room] = (left + index * (_BOX + _GAP), top + 44)
    for room, other in arrows():
        if room not in place or other not in place:
            continue
        (x1, y1), (x2, y2) = place[room], place[other]
        if y1 == y2:  # on one floor: an arc below the boxes
            a, b, y = x1 + _BOX / 2 - 8, x2 + _BOX / 2 + 8, y1 + _HEIGHT
            parts.append(f'<path d="M{a:.0f},{y:.0f} C{a:.0f},{y + 18:.0f} {b:.0f},{y + 18:.0f} {b:.0f},{y + 3:.0f}"/>')
        else:
            a, b, from_y, to_y = x1 + _BOX / 2, x2 + _BOX / 2, y1 + _HEIGHT, y2 - 3
            middle = (from_y + to_y) / 2
            parts.append(
                f'<path d="M{a:.0f},{from_y:.0f} C{a:.0f},{middle:.0f} {b:.0f},{middle:.0f} {b:.0f},{to_y:.0f}"/>'
            )
    for room, (x, y) in place.items():
        kind = "door" if room in _FRONT_DOORS else "room"
        name = f"{room}.py" if (PACKAGE / f"{room}.py").is_file() else f"{room}/"
        parts.append(f'<rect class="{kind}" x="{x:.0f}" y="{y:.0f}" width="{_BOX}" height="{_HEIGHT}" rx="5"/>')
        parts.append(f'<text class="name" x="{x + _BOX / 2:.0f}" y="{y + 22:.0f}">{escape(name)}</text>')
    body = "\n".join(parts)
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" font-family="sans-serif">
<style>
.floor {{ fill: #f4f6f8; stroke: #d5dbe1 }} .room {{ fill: #ffffff; stroke: #57606a }}
.door {{ fill: #ddf4e4; stroke: #2da44e }}
path {{ fill: none; stroke: #8b949e; stroke-width: 1.2; marker-end: url(#tip) }}
.title {{ font-size: 13px; fill: #57606a }} .name {{ font-size: 14px; fill: #1f2328; text-anchor: middle }}
</style>
<defs><marker id="tip" markerWidth="7" markerHeight="7" refX="5" refY="3" orient="auto">
<polygon points="0,0 6,3 0,6" fill="#8b949e"/></marker></defs>
<rect width="{_WIDTH}" height="{height}" fill="#ffffff"/>
{body}
</svg>
"""


if __name__ == "__main__":
    DRAWING.write_text(drawing())
