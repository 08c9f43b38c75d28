"""Every error kdns raises on purpose, by whose fault it is (docs/DESIGN.md 1.4).

Anything else that is raised is a bug of ours: the query gets SERVFAIL, the
trace is logged, the server lives.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass


class KdnsError(Exception):
    """Base of all errors that are not bugs."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong in an operator's file.

    file, line -- where (line counts from 1; 0 where the whole file is meant).
    text       -- what is wrong and what would be right, in one line.
    warning    -- True when kdns goes on all the same.
    """

    file: str
    line: int
    text: str
    warning: bool = False

    def __str__(self) -> str:
        where = f"{self.file}:{self.line}" if self.line else self.file
        return f"{where}: {'warning: ' if self.warning else ''}{self.text}"


class ConfigError(KdnsError):
    """The operator's fault: all problems of one configuration at once.

    At start kdns prints them and leaves with 2; a reload is refused and the old
    configuration stays.
    """

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(sorted(problems, key=lambda p: (p.file, p.line)))
        super().__init__("\n".join(str(p) for p in self.problems))


class WireError(KdnsError):
    """A peer's malformed message.

    rcode    -- what to answer; None: nothing
    question -- the question section to send back, where it could be read
    """

    def __init__(self, rcode: int | None, text: str, question: bytes = b"") -> None:
        self.rcode = rcode
        self.question = question
        super().__init__(text)


class ObjectError(KdnsError):
    """One Kubernetes object that cannot be used; the rest is kept."""

    def __init__(self, kind: str, key: str, field: str, text: str) -> None:
        self.kind, self.key, self.field, self.text = kind, key, field, text
        super().__init__(f"{kind} {key}: {field}: {text}" if field else f"{kind} {key}: {text}")


class SourceError(KdnsError):
    """The API server's fault; the source retries and kdns keeps serving."""


class Expired(SourceError):
    """410: the resourceVersion is no longer held; list again."""


class Denied(SourceError):
    """401 or 403: credentials or RBAC. Retried with back-off."""


class Unreachable(SourceError):
    """Anything that may pass: refused, timed out, 429, 5xx, a cut stream.

    retry_after -- seconds the server asked for, or None.
    """

    def __init__(self, text: str, retry_after: float | None = None) -> None:
        self.retry_after = retry_after
        super().__init__(text)


class ApplyError(KdnsError):
    """The kernel did not take what a program was to write: the old rules stay, retried in full.

    program -- which one, as it was called
    stderr  -- what it said, and the line of ours it said it about
    busy    -- a lock or another resource was taken: it may pass in a moment
    line    -- the line of ours; "": it named none
    """

    def __init__(self, program: str, stderr: str, busy: bool = False, line: str = "") -> None:
        self.program, self.stderr, self.busy, self.line = program, stderr, busy, line
        super().__init__(f"{program}: {stderr}")


class ApiError(KdnsError):
    """A request to the embedded API that is refused: becomes a Kubernetes Status.

    code    -- HTTP status
    reason  -- Kubernetes' word: NotFound, AlreadyExists, Conflict, Invalid, ...
    details -- of the Status: kind, name, group, causes, retryAfterSeconds
    """

    def __init__(
        self, code: int, reason: str, text: str, details: dict[str, object] | None = None
    ) -> None:
        self.code, self.reason = code, reason
        self.details: dict[str, object] = details or {}
        super().__init__(text)


def reason_of(error: OSError) -> str:
    """Return the system's words for what went wrong; asyncio puts a sentence of its own into
    strerror, which repeats the address."""
    return os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)
