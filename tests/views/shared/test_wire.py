"""What a panel's sources lose on their way to the browser, and what they keep."""

from __future__ import annotations

from qlab.views.shared import wire


def test_sources_lose_what_only_readers_need(tmp_path, monkeypatch):
    monkeypatch.setattr(wire, "_VIEWS", tmp_path)
    (tmp_path / "a.js").write_text(
        """// a comment
const text = { a: "b = c, { d }" };
function f(x, y) {
  return (
    x === y ? `${x} = ${y}` : text.a.replace(/ = /, " "),
  );
}
f(1, 2); // why, (
f(3, 4);
"""
    )
    (tmp_path / "b.js").write_text("export default { render };\n")
    assert wire.source("a.js", "b.js") == (
        'const text={a:"b = c, { d }"};'
        'function f(x,y){return (x === y ? `${x} = ${y}` : text.a.replace(/ = /, " "));}'
        "f(1, 2); // why, (\n"
        "f(3,4);export default{render};"
    )


def test_a_page_runs_the_panel_once(tmp_path, monkeypatch):
    monkeypatch.setattr(wire, "_VIEWS", tmp_path)
    (tmp_path / "a.js").write_text("export default { render };\n")
    page = wire.document("a <title>", {"x": b"1"}, wire.source("a.js"), "<p></p>")
    assert "export default" not in page and "a &lt;title&gt;" in page and "MQ==" in page
