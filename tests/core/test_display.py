"""How core values find their views."""

from __future__ import annotations

import subprocess
import sys

from qlab.core.display import Displayed, size_text, view_of


class Value(Displayed):
    pass


class Special(Value):
    pass


def test_a_value_without_a_view_shows_no_html():
    class Plain(Displayed):
        pass

    assert Plain()._repr_html_() is None


def test_a_value_is_shown_by_the_view_of_its_kind_or_of_its_nearest_base():
    @view_of(Value)
    def html(value: Value) -> str:
        return f"<i>{type(value).__name__}</i>"

    assert Value()._repr_html_() == "<i>Value</i>"
    assert Special()._repr_html_() == "<i>Special</i>"


def test_sizes_have_their_unit():
    assert [size_text(n) for n in (12_345_678, 1e9, -2e9)] == ["12.3 MB", "1.00 GB", "-2.00 GB"]


def test_views_come_with_the_lab_and_without_widgets():
    code = (
        "import sys, qlab; from qlab.core.memory.advice import Advice; "
        "advice = Advice('QLoRA', 'it fits', None); assert advice._repr_html_() is None; "
        "import qlab.lab; assert 'QLoRA' in advice._repr_html_(); "
        "assert not {'anywidget', 'plotly', 'mlx.core'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
