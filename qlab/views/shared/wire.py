"""What every live panel is made of.

Its sources, and the widget that carries what the browser wants to the kernel.

What the kernel sends and what the browser sends go over separate comms: a comm on which a busy cell
publishes would hold back the browser's messages until the cell ends. Sees no state.
"""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anywidget
import traitlets as T

_VIEWS = Path(__file__).parents[1]


def source(*names: str) -> str:
    """Read sources, one after the other, without indentation and comment lines.

    Every panel carries its own copy.
    """
    lines = (
        line.strip()
        for name in names
        for line in (_VIEWS / name).read_text(encoding="utf-8").splitlines()
    )
    return "\n".join(line for line in lines if line and not line.startswith(("//", "/**")))


CSS = source("shared/panel.css")


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
            try:
                on_intent(checked(change["new"], ops))
            except Exception as error:
                seq = change["new"].get("seq") if isinstance(change["new"], dict) else None
                on_refused(
                    seq if isinstance(seq, int) else None, str(error) or type(error).__name__
                )

        self.observe(receive, "intent")

    def close(self) -> None:
        """Hear nothing any more."""
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
    if (
        not isinstance(intent, dict)
        or intent.get("op") not in ops
        or not isinstance(intent.get("seq"), int)
    ):
        raise ValueError(f"The panel sent something that is no intent: {intent!r}.")
    for key, kind in ops[intent["op"]].items():
        if key not in intent or not isinstance(intent[key], kind):
            raise ValueError(
                f"The panel's intent {intent['op']!r} has no usable {key!r}: {intent.get(key)!r}."
            )
    return intent


def bundle(widget: Any, text: str, static: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what a cell shows: the live panel where it can be, else a table, else a line.

    Args:
        widget: the panel's view.
        text: in a line.
        static: as html that survives without scripts.
    """
    found = widget._repr_mimebundle_()
    data, metadata = found if isinstance(found, tuple) else (found, {})
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
    # a closing tag or a comment inside a name must not end the script
    embedded = json.dumps({key: _encoded(value) for key, value in traits.items()}).replace(
        "<", "\\u003c"
    )
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(title)}</title>"
        f"<style>:root{{color-scheme:light dark}}body{{margin:16px;font-family:system-ui}}{css}</style>"
        f'</head><body><div id="panel"></div><noscript>{static}</noscript>'
        f'<script type="application/json" id="traits">{embedded}</script>'
        f'<script type="module">{esm.replace("export default { render };", "")}{_SHIM}</script></body></html>'
    )


def _encoded(value: Any) -> Any:
    return {"base64": base64.b64encode(value).decode()} if isinstance(value, bytes) else value


_SHIM = """
const traits = JSON.parse(document.getElementById("traits").textContent);
const bytes = (text) => new DataView(Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer);
const get = (k) => (traits[k]?.base64 !== undefined ? bytes(traits[k].base64) : traits[k]);
const model = { get, set() {}, save_changes() {}, on() {}, off() {} };
render({ model, el: document.getElementById("panel") });
"""
