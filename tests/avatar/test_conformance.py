"""The seam keeps what every way to an avatar has to keep, with chunks of 0.96 and of 0.32 s."""

from __future__ import annotations

from functools import partial

import pytest

from rest_lightning.avatar import conformance
from rest_lightning.avatar.simulation import TracedModel

HOURS = [conformance.hours_of_idling, conformance.ten_minutes_faster_than_real_time]
QUICK = [case for case in conformance.CASES if case not in HOURS]


@pytest.mark.parametrize("chunk_length", [3, 1])
@pytest.mark.parametrize("case", QUICK, ids=lambda case: case.__name__)
def test_the_seam_conforms(case: conformance.Case, chunk_length: int) -> None:
    conformance.check(case, conformance.open_avatar, partial(TracedModel, chunk_length))


@pytest.mark.slow
@pytest.mark.parametrize("case", HOURS, ids=lambda case: case.__name__)
def test_the_seam_conforms_for_hours(case: conformance.Case) -> None:
    conformance.check(case, conformance.open_avatar)
