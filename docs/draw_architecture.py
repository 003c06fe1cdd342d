"""Draw the house from the code: floors and rooms from the import contracts, words from the rooms' docstrings.

python docs/draw_architecture.py            # writes docs/architecture.svg
python docs/draw_architecture.py --check    # says whether the picture is that of the code
"""

from __future__ import annotations

import ast
import html
import re
import sys
from dataclasses import dataclass
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "docs" / "architecture.svg"
WIDTH = 1180  # pixels, as everything below
GAP = 8
HEAD = 26
ROOM_HEIGHT = 46
FILL = {"container": "#f4f6f8", "room": "#ffffff"}
STROKE = "#8a97a5"


@dataclass(frozen=True, kw_only=True)
class Room:
    """A folder or module of the package.

    Attributes:
        name: as imported below its parent.
        says: first sentence of its docstring.
        floors: of a folder with a contract of its own: its rooms, from top to bottom, side by side.
        files: names of its modules.
    """

    name: str
    says: str
    floors: list[list[Room]]
    files: list[str]


def layers() -> dict[str, list[list[str]]]:
    """Floors of every container that has a contract, from top to bottom."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    contracts = settings["tool"]["importlinter"]["contracts"]
    return {
        contract["containers"][0]: [re.split(r"\s*\|\s*", floor) for floor in contract["layers"]]
        for contract in contracts
        if contract["type"] == "layers"
    }


def read_room(dotted: str, contracts: dict[str, list[list[str]]]) -> Room:
    """Read a room and, where a contract orders them, the rooms in it."""
    path = ROOT / dotted.replace(".", "/")
    source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    docstring = ast.get_docstring(ast.parse(source.read_text())) or ""
    first = docstring.split("\n\n")[0].replace("\n", " ").replace("`", "")
    files = sorted(file.stem for file in path.glob("*.py") if file.stem != "__init__")
    inner = [
        [read_room(f"{dotted}.{name}", contracts) for name in floor]
        for floor in contracts.get(dotted, [])
    ]
    return Room(name=dotted.rpartition(".")[2], says=first, floors=inner, files=files)


def text(x: float, y: float, words: str, style: str) -> str:
    """A line of text."""
    return f'<text x="{x:.0f}" y="{y:.0f}" class="{style}">{html.escape(words)}</text>'


def box(x: float, y: float, width: float, height: float, kind: str) -> str:
    """A rectangle."""
    return (
        f'<rect x="{x:.0f}" y="{y:.0f}" width="{width:.0f}" height="{height:.0f}" rx="5" '
        f'fill="{FILL[kind]}" stroke="{STROKE}"/>'
    )


def wrap(words: str, width: float, lines: int) -> list[str]:
    """Break a text at words into few lines that a width in pixels holds; the last may end in dots."""
    most = max(8, int(width / 5.7))
    broken = [""]
    for word in words.split():
        longer = f"{broken[-1]} {word}".strip()
        if len(longer) <= most:
            broken[-1] = longer
        else:
            broken.append(word)
    if len(broken) > lines:
        broken = broken[:lines]
        broken[-1] = broken[-1][: most - 1] + "…"
    return broken


def height_of(room: Room) -> float:
    """Height of a room in pixels, its inner floors included."""
    if not room.floors:
        return ROOM_HEIGHT
    floors = sum(max(height_of(inner) for inner in floor) + GAP for floor in room.floors)
    return HEAD + floors


def draw_room(room: Room, x: float, y: float, width: float, height: float) -> list[str]:
    """Draw a room and what is in it."""
    if not room.floors:
        described = room.says if not room.files else f"{room.says} ({', '.join(room.files)})"
        lines = wrap(described, width - 16, lines=2)
        parts = [box(x, y, width, height, "room"), text(x + 8, y + 15, room.name, "name")]
        parts += [text(x + 8, y + 28 + 12 * n, line, "says") for n, line in enumerate(lines)]
        return parts
    parts = [box(x, y, width, height, "container"), text(x + 8, y + 17, room.name, "name")]
    says = wrap(room.says, width - 100, lines=1)[0]
    parts.append(text(x + 90, y + 17, says, "says"))
    spare = (height - height_of(room)) / len(room.floors)
    return parts + draw_floors(room.floors, x + GAP, y + HEAD, width - 2 * GAP, spare)


def weight(room: Room) -> float:
    """How wide a room wants to be beside others."""
    if not room.floors:
        return 1.0
    return sum(max(1, len(floor)) for floor in room.floors) / len(room.floors) + 1.5


def draw_floors(
    floors: list[list[Room]], x: float, y: float, width: float, spare: float
) -> list[str]:
    """Draw floors below each other, each taller by what is spare, its rooms side by side."""
    parts: list[str] = []
    for floor in floors:
        height = max(height_of(room) for room in floor) + spare
        shares = [weight(room) for room in floor]
        free = width - GAP * (len(floor) - 1)
        left = x
        for room, share in zip(floor, shares, strict=True):
            room_width = free * share / sum(shares)
            parts += draw_room(room, left, y, room_width, height)
            left += room_width + GAP
        y += height + GAP
    return parts


def picture() -> str:
    """The house as SVG."""
    house = read_room("qlab", layers())
    height = height_of(house) + 2 * GAP + HEAD
    style = (
        "text{font-family:system-ui,sans-serif;fill:#1f2933}"
        ".name{font-size:13px;font-weight:600}.says{font-size:10.5px;fill:#52606d}"
    )
    caption = "Imports go down only: a room may use what stands below it, never what stands beside or above."
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" role="img">',
        f"<title>The rooms of qlab</title><style>{style}</style>",
        f'<rect width="{WIDTH}" height="{height:.0f}" fill="#ffffff"/>',
        text(GAP, 18, caption, "says"),
        *draw_room(house, GAP, HEAD, WIDTH - 2 * GAP, height_of(house)),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def main() -> int:
    """Write the picture, or say whether it is that of the code."""
    drawn = picture()
    if "--check" in sys.argv:
        return int(PICTURE.read_text() != drawn)
    PICTURE.write_text(drawn)
    return 0


if __name__ == "__main__":
    sys.exit(main())
