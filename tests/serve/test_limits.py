"""Tokens, places and allowances, on a clock of the test."""

from __future__ import annotations

import pytest

from rest_lightning.serve.limits import Admission, Bucket, Limits, Refused


class Clock:
    """Seconds that a test sets."""

    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_a_token_is_good_once_for_its_address_and_for_a_while() -> None:
    clock = Clock()
    admission = Admission(Limits(max_sessions=9, max_per_address=9, token_s=30), clock)
    first, second, third = (admission.grant("a") for _ in range(3))
    assert len({first, second, third}) == 3
    admission.enter(first, "a")
    for token, address in ((first, "a"), (second, "b"), ("", "a"), ("guess", "a")):
        with pytest.raises(Refused, match="token is unknown, used or too old"):
            admission.enter(token, address)
    clock.now_s = 30.1
    with pytest.raises(Refused, match="reload the page"):
        admission.enter(third, "a")
    assert admission.num_active == 1


def test_places_are_counted_with_those_that_are_kept() -> None:
    clock = Clock()
    admission = Admission(Limits(max_sessions=3, max_per_address=2, token_s=30), clock)
    admission.enter(admission.grant("a"), "a")
    admission.grant("a")
    with pytest.raises(Refused, match="this address has 2 of 2 sessions") as caught:
        admission.grant("a")
    assert caught.value.code == "address"
    token = admission.grant("b")
    admission.grant("c")  # takes the place that "a" keeps beside its session and does not use
    with pytest.raises(Refused, match=r"the server is full \(3 of 3 sessions\)") as caught:
        admission.grant("d")
    assert caught.value.code == "full"
    clock.now_s = 31  # the other tokens were never used
    admission.enter(admission.grant("c"), "c")
    assert admission.num_active == 2
    admission.leave("a")
    admission.leave("c")
    assert admission.num_active == 0 and not admission._active
    with pytest.raises(Refused):
        admission.enter(token, "b")


def test_nobody_comes_in_at_the_end() -> None:
    admission = Admission(Limits())
    admission.closing = True
    with pytest.raises(Refused, match="the server is stopping"):
        admission.grant("a")


def test_a_bucket_allows_its_rate_and_a_burst() -> None:
    bucket = Bucket(rate=1.2, burst=2.0, now_s=0.0)
    taken, now_s = 0.0, 0.0
    while bucket.take(0.1, now_s):
        taken, now_s = taken + 0.1, now_s + 0.05  # twice the pace of the clock
    # 2 + 1.2 t = 2 t
    assert now_s == pytest.approx(2.0 / 0.8, abs=0.2) and taken == pytest.approx(
        2 + 1.2 * now_s, abs=0.2
    )
    assert bucket.take(2.0, now_s + 100.0) and not bucket.take(0.5, now_s + 100.0)
