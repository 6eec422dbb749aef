"""Who may come in, how long, and how much may be sent."""

from __future__ import annotations

import secrets
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Limits of a server.

    Attributes:
        max_sessions: sessions at once; ``max_per_address``: of one address.
        session_s: length of a session; idle_s: time without a message of the client; hello_s: time
            for the first one.
        token_s: how long a token waits for its session.
        message_bytes: largest message.
        input_rate: speech per second of clock, in the long run; input_burst_s: beyond it, at any
            time.
        messages_per_s: messages, in the long run; message_burst: beyond it.
        unread_s: how long a client may leave what it is sent unread.
        send_buffer_bytes: what the system keeps of it; then it counts as unread.
        upload_bytes, sound_s, image_side_px: of uploads; num_uploads: decoded at once, of at most
            max_uploads that come in; receive_s, upload_s: time for sending and for decoding one.
        uploads_per_address: of those that come in, of one address.
        max_connections: in all; connections_per_address: of one; header_s: time for the head of a
            request.
        max_portraits: uploaded portraits that are kept, a quarter of them of one address;
            portrait_s: how long an unused one is.
        record_s: longest recording of a session; a client has one at a time.
        grace_s: how long sessions may go on when the server is told to stop.
    """

    max_sessions: int = 3
    max_per_address: int = 3
    session_s: float = 7200.0
    idle_s: float = 300.0
    hello_s: float = 10.0
    token_s: float = 30.0
    message_bytes: int = 65_536
    input_rate: float = 1.2
    input_burst_s: float = 10.0
    messages_per_s: float = 250.0
    message_burst: float = 2500.0
    unread_s: float = 10.0
    send_buffer_bytes: int = 262_144
    upload_bytes: int = 20_000_000
    sound_s: float = 300.0
    image_side_px: int = 8192
    num_uploads: int = 2
    max_uploads: int = 8
    uploads_per_address: int = 3
    max_connections: int = 400
    connections_per_address: int = 64
    header_s: float = 15.0
    receive_s: float = 120.0
    upload_s: float = 20.0
    max_portraits: int = 64
    portrait_s: float = 3600.0
    record_s: float = 600.0
    grace_s: float = 30.0


class Refused(Exception):
    """No session for this client now; ``code`` is for metrics, the message is one line for
    people.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class Admission:
    """Counts sessions, and the tokens that let them begin: each is good once, for a short time, for
    one address.
    """

    def __init__(self, limits: Limits, clock: Callable[[], float] = time.monotonic) -> None:
        self.limits, self._clock = limits, clock
        self.closing = False
        self._tokens: dict[str, tuple[str, float]] = {}
        self._active: Counter[str] = Counter()

    @property
    def num_active(self) -> int:
        """Sessions now."""
        return self._active.total()

    def grant(self, address: str) -> str:
        """A token for a session; a place is kept for it.

        Raises:
            Refused: the server is full or stopping, or the address has its share.
        """
        self._expire()
        if self.closing:
            raise Refused("closing", "the server is stopping: try again in a minute")
        kept = Counter(owner for owner, _ in self._tokens.values())
        if self._active[address] + kept[address] >= self.limits.max_per_address:
            share = self.limits.max_per_address
            raise Refused(
                "address",
                (f"this address has {share} of {share} sessions: end one, then try again"),
            )
        full = self.num_active + kept.total() >= self.limits.max_sessions
        if full and not self._take_back(address, kept):
            most = self.limits.max_sessions
            raise Refused(
                "full", (f"the server is full ({most} of {most} sessions): try again later")
            )
        token = secrets.token_urlsafe(24)
        self._tokens[token] = (address, self._clock() + self.limits.token_s)
        return token

    def _take_back(self, address: str, kept: Counter[str]) -> bool:
        """Free a place that another address keeps without using it, where that one has more places
        than this one would have; whether there was one.
        """
        owner = max(kept, key=lambda other: self._active[other] + kept[other], default=address)
        has = self._active[address] + kept[address]
        if self._active[owner] + kept[owner] < has + 2:
            return False
        self.revoke(next(token for token, (other, _) in self._tokens.items() if other == owner))
        return True

    def enter(self, token: str, address: str) -> None:
        """Turn a token into a session; :meth:`leave` must follow.

        Raises:
            Refused: unknown, used, too old, or another address's.
        """
        self._expire()
        owner, _ = self._tokens.pop(token, (None, 0.0))
        if owner != address:
            raise Refused(
                "token", ("this session's token is unknown, used or too old: reload the page")
            )
        self._active[address] += 1

    def revoke(self, token: str) -> None:
        """A token that was granted will not be used."""
        self._tokens.pop(token, None)

    def leave(self, address: str) -> None:
        """A session has ended."""
        self._active[address] -= 1
        self._active += Counter()  # forgets addresses without sessions

    def _expire(self) -> None:
        now_s = self._clock()
        self._tokens = {token: kept for token, kept in self._tokens.items() if kept[1] > now_s}


class Bucket:
    """An allowance that refills: ``rate`` a second, up to ``burst``; full at the start."""

    def __init__(self, rate: float, burst: float, now_s: float) -> None:
        self.rate, self.burst = rate, burst
        self._left, self._at_s = burst, now_s

    def take(self, amount: float, now_s: float) -> bool:
        """Whether ``amount`` is allowed now."""
        self._left = min(self.burst, self._left + self.rate * (now_s - self._at_s)) - amount
        self._at_s = now_s
        return self._left >= 0.0

    def give(self, amount: float) -> None:
        """Take an amount back that was not used."""
        self._left = min(self.burst, self._left + amount)
