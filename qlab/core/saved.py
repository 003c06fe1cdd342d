"""``Saved``: what every ``save`` returns; prints as a sentence, and holds facts for a script."""

from __future__ import annotations

from pathlib import Path
from typing import Any


class Saved(str):
    """What was written where, and what opens it: a string that prints as a sentence.

    Args:
        note: the sentence that says who can open it.
        path: of the folder or file that was written.
        opens_in: names of the programs that open it as it is, such as ``("mlx-lm", "qlab")``.

    Attributes:
        note: the sentence, as a plain string.
        path: absolute path of the folder or file.
        opens_in: names of the programs that open it as it is.

    Example:
        >>> saved = model.save("my-model")
        >>> saved
        Saved as an mlx-lm folder; mlx_lm.load and qlab.load open it.
        >>> if "mlx-lm" in saved.opens_in:
        ...     serve(saved.path)
    """

    note: str
    path: Path
    opens_in: tuple[str, ...]

    def __new__(cls, note: str, *, path: str | Path, opens_in: tuple[str, ...]) -> Saved:
        """Make the string; a ``str`` takes its text here and not in ``__init__``."""
        saved = super().__new__(cls, note)
        saved.note = str(note)
        saved.path = Path(path)
        saved.opens_in = tuple(opens_in)
        return saved

    def __getnewargs_ex__(self) -> tuple[tuple[str], dict[str, Any]]:
        """Give copy and pickle what ``__new__`` takes."""
        return (self.note,), {"path": self.path, "opens_in": self.opens_in}

    def __repr__(self) -> str:
        return self.note
