"""`tls`: certificate and key of a server block's tls:// and https:// keys.

Decides which files and which check of clients; reading the files is app.py's business.
"""

from __future__ import annotations

from kdns.corefile import Directive, Option, nearest
from kdns.plugins.plugin import Plugin
from kdns.plugins.setup import Setup

CLIENT_AUTH = ("nocert", "request", "require", "verify_if_given", "require_and_verify")
# Go can ask for a certificate and look at none of it; OpenSSL under Python checks what it asks
# for. The stricter of the two is served.
STRICTER = {"request": "verify_if_given", "require": "require_and_verify"}
OPTIONS = ("client_auth", "keylog")
ACME = ("acme", "email", "ca", "storage", "ca_root", "resolver")


class Tls(Plugin):
    """cert, key, ca, keylog -- paths; ca (of clients) and keylog may be empty
    client_auth -- nocert, verify_if_given or require_and_verify"""

    word = "tls"

    def __init__(
        self, cert: str, key: str, ca: str = "", client_auth: str = "nocert", keylog: str = ""
    ) -> None:
        self.cert = cert
        self.key = key
        self.ca = ca
        self.client_auth = client_auth
        self.keylog = keylog


def setup(directives: list[Directive], cx: Setup) -> list[Plugin]:
    """`tls CERT KEY [CA] { client_auth KIND; keylog FILE }`"""
    directive = cx.once(directives)
    options = directive.options or ()
    if not directive.args and any(option.name in ACME for option in options):
        cx.problems.error(
            directive.word,
            "kdns obtains no certificates by ACME; write 'tls CERT KEY' with files that another"
            " program keeps up to date",
        )
        return []
    good = cx.arg_count(directive, 2, 3)
    client_auth, keylog = "nocert", ""
    for option in options:
        match option.name:
            case "client_auth":
                client_auth = _client_auth(option, cx)
            case "keylog":
                if cx.arg_count(option, 1, 1):
                    keylog = cx.path(option.args[0].text)
                    cx.problems.warn(
                        option.word, f"the secrets of all TLS sessions are written to {keylog}"
                    )
            case _:
                cx.unknown_option(option, OPTIONS)
    if not good:
        return []
    cert, key, *ca = (cx.path(token.text) for token in directive.args)
    return [Tls(cert, key, ca[0] if ca else "", client_auth, keylog)]


def _client_auth(option: Option, cx: Setup) -> str:
    if not cx.arg_count(option, 1, 1):
        return "nocert"
    token = option.args[0]
    if token.text not in CLIENT_AUTH:
        hint = nearest(token.text, CLIENT_AUTH) or f"; there are {', '.join(CLIENT_AUTH)}"
        cx.problems.error(token, f"unknown authentication type '{token}'{hint}")
        return "nocert"
    stricter = STRICTER.get(token.text)
    if stricter is not None:
        cx.problems.warn(
            token, f"client_auth {token} is served as {stricter}: a certificate that is given"
            " must verify"
        )  # fmt: skip
    return stricter or token.text
