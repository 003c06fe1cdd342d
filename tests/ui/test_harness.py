"""The harness itself: if this fails, no panel is to blame."""

from __future__ import annotations

from pathlib import Path

from tests.ui.conftest import run_cell

TRIVIAL = """
import anywidget, sys

class Hello(anywidget.AnyWidget):
    _esm = "export default { render({ el }) { el.innerHTML = '<b class=hello>hello</b>'; } }"

print(sys.prefix)
Hello()
"""
CALL_OUT = "from IPython.display import HTML\nHTML('<img src=\"http://example.invalid/x.png\">')"


def test_a_trivial_widget_is_drawn_by_a_kernel_of_this_environment(notebook):
    import sys

    page = notebook("hello", [TRIVIAL])
    run_cell(page, 0)
    page.wait_for_selector(".hello", timeout=30_000)
    assert page.locator(".jp-OutputArea-output pre").first.inner_text().strip() == sys.prefix
    assert page.foreign == [] and page.errors == []


def test_a_request_to_the_network_is_blocked_and_listed(notebook):
    page = notebook("callout", [CALL_OUT])
    run_cell(page, 0)
    page.wait_for_selector(".jp-OutputArea-output img", state="attached", timeout=30_000)
    page.wait_for_timeout(500)
    assert set(page.foreign) == {"http://example.invalid/x.png"}


def test_no_file_sets_the_timeout_of_all_others():
    files = Path(__file__).parent.glob("test_*.py")
    assert not [f.name for f in files if "\nexpect.set_options" in f.read_text(encoding="utf-8")]
