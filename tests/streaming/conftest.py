"""The tiny talking head as fixtures."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from tiny_head import make_head

from rest_lightning.talking_head import TalkingHead


@pytest.fixture(scope="session")
def make() -> Callable[..., TalkingHead]:
    """The factory itself."""
    return make_head


@pytest.fixture(scope="session")
def head() -> TalkingHead:
    """One tiny head for tests that do not change it."""
    return make_head()
