"""Tiny prepared clips as fixtures."""

from __future__ import annotations

from pathlib import Path

import pytest
from prepared_clips import Make, make_dataset


@pytest.fixture(scope="session")
def make() -> type[Make]:
    return Make


@pytest.fixture(scope="session")
def dataset_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six clips of 41 frames, 32x32: four train, one val, one test. Read only."""
    return make_dataset(tmp_path_factory.mktemp("talkers"))
