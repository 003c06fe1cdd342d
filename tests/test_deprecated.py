"""Old spellings work and warn."""

from __future__ import annotations

import pytest

from qlab.deprecated import deprecated_name
from qlab.deprecated import positional_arguments


@positional_arguments
def resize(image, *, width=1, height=2):
    return image, width, height


def test_keyword_only_arguments_are_still_taken_by_position_with_a_warning():
    assert resize("a", width=3) == ("a", 3, 2)
    with pytest.warns(DeprecationWarning, match=r"use width=…, height=…") as seen:
        assert resize("a", 3, 4) == ("a", 3, 4)
    assert seen[0].filename == __file__
    with pytest.warns(DeprecationWarning):
        assert resize("a", 3, height=5) == ("a", 3, 5)


def test_what_python_would_refuse_is_refused():
    with pytest.raises(TypeError, match="positional"):
        resize("a", 3, 4, 5)
    with pytest.raises(TypeError, match="two values for 'width'"):
        resize("a", 3, width=4)


def test_a_name_that_is_old_is_told_where_it_is_written():
    def old():
        deprecated_name("old()", "new()")

    with pytest.warns(DeprecationWarning, match="use new") as seen:
        old()
    assert seen[0].filename == __file__
