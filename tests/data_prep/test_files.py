"""Errors, as one line of a message."""

from __future__ import annotations

import pytest

from data_prep.files import DataError, first_line


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (DataError("one line"), "one line"),
        (RuntimeError("\n  the reason \nits C++ frames\n"), "the reason"),
        (KeyboardInterrupt(), "KeyboardInterrupt"),
        (ValueError(" \n"), "ValueError"),
    ],
)
def test_first_line_of_an_error(error: BaseException, expected: str) -> None:
    assert first_line(error) == expected
