"""What a query log costs: `log`, `kdns_log json`, and none, beside each other.

    .venv/bin/python bench/querylog.py

Measures processor time of a chain that answers from memory, and of a repeat from the packet
cache, for each line written to /dev/null. The least of several rounds in turn counts.
"""

from __future__ import annotations

import logging
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from support import a, build, make_setup, question

from kdns.dns.message import FOREVER, Query, Reply
from kdns.dns.name import ROOT
from kdns.logs import setup_logging
from kdns.plugins.chain import Chain, Router
from kdns.plugins.plugin import Outcome, Plugin

NAME = "web.default.svc.cluster.local."
ANSWER = a(NAME, "10.96.0.5")
DEPS = ((b"default", b"web"), (b"default",))
LOGS = {
    "none": "",
    "log": "log",
    "kdns_log json": "kdns_log json",
    "kdns_log, 5 fields": "kdns_log json {\n fields time client name rcode duration_ms\n}",
}
ROUNDS, QUERIES = 15, 2000


class Serve(Plugin):
    """Answers as `kubernetes` does."""

    word = "serve"

    def on_query(self, query: Query) -> Outcome:
        return Reply(answer=[ANSWER], served_by="kubernetes", deps=DEPS, keep=FOREVER)


def router_with(text: str) -> Router:
    cx = make_setup(clock=time.monotonic)
    cx.wall, cx.log = time.time, logging.getLogger("kdns")
    return Router({ROOT: Chain([*(build(text, cx) if text else ()), Serve()])})


def main() -> None:
    with open("/dev/null", "w") as sink:
        setup_logging(sink)
        query = question(NAME)
        routers = {name: router_with(text) for name, text in LOGS.items()}
        best = {name: (float("inf"), float("inf")) for name in LOGS}
        for _ in range(ROUNDS):
            for name, router in routers.items():
                best[name] = min_each(best[name], once(router, query))
    for name, (chain, repeat) in best.items():
        print(f"{name:20} chain {chain:5.1f} us   repeat {repeat:5.1f} us")


def min_each(a: tuple[float, float], b: tuple[float, float]) -> tuple[float, float]:
    return min(a[0], b[0]), min(a[1], b[1])


def once(router: Router, query: Query) -> tuple[float, float]:
    """Return microseconds of a chain run and of a repeat."""
    began = time.process_time()
    for _ in range(QUERIES):
        reply = router.resolve(query)
    chain = time.process_time() - began
    assert isinstance(reply, Reply)
    calls = reply.on_repeat or []
    began = time.process_time()
    for _ in range(QUERIES):
        for call in calls:
            call(("10.244.1.5", 40000), 7, 0.0003)
    repeat = time.process_time() - began
    return chain / QUERIES * 1e6, repeat / QUERIES * 1e6


if __name__ == "__main__":
    main()
