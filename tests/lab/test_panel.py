"""The plumbing that all panels share, on an object that counts."""

from __future__ import annotations

from dataclasses import dataclass

import anywidget
import pytest
import traitlets as T

from qlab.core.progress import Progress
from qlab.lab.panel import HasPanel
from qlab.lab.panel import PanelViews
from qlab.views.shared.panel import LivePanel


@dataclass(frozen=True)
class CounterState:
    count: int
    progress: Progress | None = None


class CounterView(anywidget.AnyWidget):
    _esm = "export default { render() {} };"
    state = T.Dict().tag(sync=True)
    table = T.Bytes(b"").tag(sync=True)
    controls = anywidget.WidgetTrait().tag(sync=True)


class CounterPanel(LivePanel[CounterState]):
    view = CounterView
    operations = {"hello": {}, "add": {"number": int}, "twice": {}}

    def payload(self, state):
        return {"state": self.small(state, 0), "table": b"0"}

    def large(self, before, state, ended):
        return {"table": str(state.count).encode()}

    def small(self, state, ack):
        return {"count": state.count, "error": "", "ack": ack}


class Counter(HasPanel):
    _views = PanelViews(panel=CounterPanel, text_line=str, html=repr, page=str)

    def __init__(self):
        super().__init__()
        self.count = 0
        self.shown = 0
        self.progress = None

    def state(self):
        self.shown += 1
        return CounterState(self.count, self.progress)

    def add(self, number):
        if number < 0:
            raise ValueError(f"number={number} is below 0.")
        self.count += number
        self._show()

    def _do_add(self, intent):
        self.add(intent["number"])

    def _do_twice(self, intent):
        self.add(1)
        self.add(1)


@pytest.fixture
def counter():
    made = Counter()
    yield made
    made.close()


def test_an_intent_is_done_shown_once_and_acknowledged(counter):
    widget = counter.widget
    counter.shown = 0
    widget.controls.intent = {"op": "twice", "seq": 1}
    assert widget.state == {"count": 2, "error": "", "ack": 1} and widget.table == b"2"
    assert counter.shown == 1


def test_a_refusal_is_shown_until_the_next_intent(counter):
    widget = counter.widget
    widget.controls.intent = {"op": "add", "number": -1, "seq": 1}
    assert widget.state["error"] == "number=-1 is below 0." and widget.state["ack"] == 1
    counter.add(1)  # a job or a cell shows a state meanwhile
    assert widget.state["error"] and widget.state["count"] == 1
    widget.controls.intent = {"op": "add", "number": 1, "seq": 2}
    assert widget.state == {"count": 2, "error": "", "ack": 2}


@pytest.mark.parametrize(
    "intent", [{"op": "explode", "seq": 1}, {"op": "add", "seq": 1}, {"op": "add", "number": "1"}]
)
def test_what_is_no_intent_of_the_panel_is_refused(counter, intent):
    widget = counter.widget
    widget.controls.intent = intent
    assert "The panel" in widget.state["error"] and counter.count == 0


def test_after_a_job_everything_is_sent_again(counter, monkeypatch):
    widget = counter.widget
    counter.progress = Progress("counting", 0, 1)
    counter._show()
    sent = []
    monkeypatch.setattr(widget, "send_state", lambda key=None: sent.append(key))
    counter.progress = None
    counter._show()
    assert ["table", "state"] in sent


def test_a_closed_panel_hears_nothing_and_a_new_one_opens(counter):
    first = counter.widget
    counter.close()
    counter.add(1)
    assert first.state["count"] == 0
    assert counter.widget is not first and counter.widget.state["count"] == 1
