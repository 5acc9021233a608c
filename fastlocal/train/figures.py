"""Figures that look the same whatever a person's own Matplotlib settings are."""

from collections.abc import Iterator
from contextlib import contextmanager

import matplotlib.style


@contextmanager
def plain_style() -> Iterator[None]:
    """Around what draws: Matplotlib's defaults. Other settings, such as text.usetex, may need programs."""
    with matplotlib.style.context([], after_reset=True):
        yield
