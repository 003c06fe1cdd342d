"""Between kernel and browser: a panel's sources, its messages, and its form as a file.

What the kernel sends and what the browser sends go over separate comms: a comm on which a busy cell
publishes would hold back the browser's messages until the cell ends. Sees no state.
"""

from __future__ import annotations

import base64
import html
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anywidget
import traitlets as T

from qlab.core.progress import Progress

_VIEWS = Path(__file__).parents[1]
_EXPORT = "export default{render};"  # as source() writes it
# where a formatted statement ends with a semicolon, these need no break after, or before, them
_GOES_ON = (";", ",", "{", "(", "[", "}")
_CLOSING = (")", "]", "}")
_NEEDLESS = re.compile(r" ?(=>|===|!==|\?\?|&&|[=:,{?]) | (?=[{}])")


def source(*names: str) -> str:
    """Read sources, one after the other, without what only their readers need.

    Every panel carries its own copy, so indentation, comment lines and needless breaks are left
    out. The files of one panel share one module: what one file declares the next may use.

    Args:
        names: paths within ``qlab/views``, such as ``shared/panel.js``.
    """
    return "".join(_compact(name) for name in names)


def _compact(name: str) -> str:
    text = (_VIEWS / name).read_text(encoding="utf-8")
    lines = [line.strip() for line in text.splitlines()]
    code = [line for line in lines if line and not line.startswith(("//", "/**"))]
    code = [_without_spaces(line) for line in code]
    parts = []
    for line, following in zip(code, [*code[1:], ""], strict=True):
        if line.endswith(",") and following.startswith(_CLOSING):
            line = line[:-1]
        goes_on = line.endswith(_GOES_ON) or following.startswith(_CLOSING)
        parts.append(line if goes_on and " //" not in line else line + "\n")
    return "".join(parts)


def _without_spaces(line: str) -> str:
    """Drop spaces that a machine does not need; leave alone what holds texts or patterns."""
    if "`" in line or "/" in line:
        return line
    parts = line.split('"')  # every second one is a text
    parts[::2] = [_NEEDLESS.sub(r"\1", part) for part in parts[::2]]
    return '"'.join(parts)


CSS = source("shared/panel.css")


def progress_row(progress: Progress | None) -> list[Any] | None:
    """Return a running job as the browser gets it: what it does, steps done, steps in all."""
    if progress is None:
        return None
    return [progress.what, progress.done, progress.total]


class Controls(anywidget.AnyWidget):
    """Browser → kernel: what the user wants."""

    _esm = "export default { render() {} };"
    intent = T.Dict().tag(sync=True)

    def listen(
        self,
        ops: dict[str, dict[str, Any]],
        on_intent: Callable[[dict[str, Any]], None],
        on_refused: Callable[[int | None, str], None],
    ) -> None:
        """Pass every intent on that has the form of one.

        Args:
            ops: see ``checked``.
            on_intent: called on a widget thread.
            on_refused: called with the intent's number and what was raised, in words: in an
                observer it would vanish.
        """

        def receive(change: Any) -> None:
            intent = change["new"]
            try:
                on_intent(checked(intent, ops))
            except Exception as error:
                seq = intent.get("seq") if isinstance(intent, dict) else None
                number = seq if isinstance(seq, int) else None
                on_refused(number, str(error) or type(error).__name__)

        self.observe(receive, "intent")

    def close(self) -> None:
        """Stop listening."""
        self.unobserve_all()
        super().close()


def checked(intent: Any, ops: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return an intent if it has the form of one.

    Args:
        intent: what the browser sent.
        ops: by name of an operation, the types of its values.

    Raises:
        ValueError: it has not; says what is wrong.
    """
    is_intent = (
        isinstance(intent, dict) and intent.get("op") in ops and isinstance(intent.get("seq"), int)
    )
    if not is_intent:
        raise ValueError(f"The panel sent something that is no intent: {intent!r}.")
    op = intent["op"]
    for key, kind in ops[op].items():
        value = intent.get(key)
        if key not in intent or not isinstance(value, kind):
            raise ValueError(f"The panel's intent {op!r} has no usable {key!r}: {value!r}.")
    return intent


def bundle(widget: Any, text: str, static: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what a cell shows: the live panel where it can be, else tables, else a line.

    Args:
        widget: the panel's view.
        text: in a line.
        static: HTML that works without scripts.

    Returns:
        Data by MIME type, and their metadata.
    """
    shown = widget._repr_mimebundle_()
    data, metadata = shown if isinstance(shown, tuple) else (shown, {})
    return {**data, "text/plain": text, "text/html": static}, metadata


def document(title: str, traits: dict[str, Any], esm: str, static: str, css: str = CSS) -> str:
    """Return one self-contained file in which a panel still works, offline and without a kernel.

    Args:
        title: of the page.
        traits: of the panel's view.
        esm: the panel's script.
        static: what a reader without scripts sees.
        css: the panel's styles.
    """
    values = {name: _encoded(value) for name, value in traits.items()}
    # a closing tag or a comment inside a name must not end the script
    embedded = json.dumps(values).replace("<", "\\u003c")
    script = esm.replace(_EXPORT, "") + _SHIM
    style = f":root{{color-scheme:light dark}}body{{margin:16px;font-family:system-ui}}{css}"
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(title)}</title><style>{style}</style>"
    )
    body = (
        f'<div id="panel"></div><noscript>{static}</noscript>'
        f'<script type="application/json" id="traits">{embedded}</script>'
        f'<script type="module">{script}</script>'
    )
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{body}</body></html>'


def _encoded(value: Any) -> Any:
    if isinstance(value, bytes):
        return {"base64": base64.b64encode(value).decode()}
    return value


# stands in for anywidget's model: get() reads the embedded traits, the rest does nothing
_SHIM = """
const traits = JSON.parse(document.getElementById("traits").textContent);
const bytes = (text) => new DataView(Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer);
const get = (k) => (traits[k]?.base64 !== undefined ? bytes(traits[k].base64) : traits[k]);
const model = { get, set() {}, save_changes() {}, on() {}, off() {} };
render({ model, el: document.getElementById("panel") });
"""
