"""The optional language filter."""

from __future__ import annotations

from collections.abc import Callable

from data_prep.filters import Language


def speaks(source: str, target: str, settings: Language) -> Callable[[str, str], bool]:
    raise NotImplementedError
