"""The Corefile's words: which exist, in which order they run, and who builds them.

The order of execution is CoreDNS HEAD's (reference 2.2), whatever the order in the Corefile.
A module is imported when its word is first used.
"""

from __future__ import annotations

# word -> module under kdns.plugins whose setup() builds it, in order of execution.
# None: a word that shapes the server block itself and is read by app.py.
ORDER: dict[str, str | None] = {
    "bind": "bind",
    "bufsize": "bufsize",
    "debug": "debug",
    "tls": "tls",
    "reload": "reload",
    "workers": "workers",
    "health": "health",
    "ready": "ready",
    "prometheus": "prometheus",
    "errors": "errors",
    "log": "log",
    "kdns_log": "kdns_log",
    "explain": "explain",
    "local": "local",
    "rewrite": "rewrite",
    "autopath": "autopath",
    "acl": "acl",
    "any": "any",
    "chaos": "chaos",
    "loadbalance": "loadbalance",
    "cache": "cache",
    "header": "header",
    "minimal": "minimal",
    "template": "template",
    "transfer": "transfer",
    "hosts": "hosts",
    "kubernetes": "kubernetes",
    "file": "file",
    "auto": "auto",
    "loop": "loop",
    "forward": "forward",
    "whoami": "whoami",
}

# Words CoreDNS has and kdns has not: an error that says so (issue 2 part 2).
NOT_HERE = frozenset(
    "root metadata geoip cancel quic timeouts multisocket nsid trace pprof dnstap dns64 tsig"
    " dnssec route53 azure clouddns k8s_external secondary etcd grpc erratic on sign view nomad"
    " proxyproto grpc_server https https3 shed autocert alternate fanout".split()
)
