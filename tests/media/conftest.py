"""Tiny videos as a fixture."""

from __future__ import annotations

import pytest
from prepared_clips import Make


@pytest.fixture(scope="session")
def make() -> type[Make]:
    return Make
