"""Make a virtual environment with pip in it, also where Debian left ensurepip out.

    python3 .ci/make_venv.py .venv

A fresh Debian has `python3 -m venv` but, without the package python3-venv, no pip to put
into the environment. Then one wheel of pip is fetched from PyPI (or PIP_INDEX_URL),
checked against the digest below and made to install itself. Standard library only.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import urllib.request
import venv
from pathlib import Path
from urllib.parse import urldefrag, urljoin

OLDEST_PYTHON = (3, 11)
PIP_WHEEL = "pip-26.3-py3-none-any.whl"
PIP_SHA256 = "f3b60b20ffaadd4415ed7957212a38ac63fa4c5fa375bd0f4a797777940fad13"
INDEX = "https://pypi.org/simple"


def main(folder: str) -> str | None:
    """Return None, or what to tell the user."""
    if sys.version_info < OLDEST_PYTHON:
        return f"kdns needs Python 3.11 or newer; this is {sys.version.split()[0]} (set PYTHON=...)"
    with_pip = importlib.util.find_spec("ensurepip") is not None
    venv.create(folder, with_pip=with_pip, clear=True, symlinks=True)
    if with_pip:
        return None
    try:
        install_pip(Path(folder) / "bin" / "python")
    except (OSError, subprocess.CalledProcessError, LookupError) as e:
        return (
            "this Python has no ensurepip, and pip could not be fetched from PyPI either"
            f" ({e}); as root: apt-get install python3-venv"
        )
    return None


def install_pip(python: Path) -> None:
    """Let a downloaded wheel of pip install itself for `python`."""
    index = os.environ.get("PIP_INDEX_URL", INDEX).rstrip("/") + "/pip/"
    with urllib.request.urlopen(index, timeout=60) as page:
        links = re.findall(r'href="([^"]+)"', page.read().decode())
    found = [link for link in links if urldefrag(link).url.endswith("/" + PIP_WHEEL)]
    if not found:
        raise LookupError(f"{index} does not list {PIP_WHEEL}")
    with urllib.request.urlopen(urldefrag(urljoin(index, found[0])).url, timeout=60) as answer:
        wheel = answer.read()
    if hashlib.sha256(wheel).hexdigest() != PIP_SHA256:
        raise LookupError(f"{PIP_WHEEL} from {index} does not have the digest expected")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / PIP_WHEEL
        path.write_bytes(wheel)
        subprocess.run(
            [python, path / "pip", "install", "--quiet", "--no-index", "--no-deps", path],
            check=True,
        )


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: make_venv.py FOLDER")
    problem = main(sys.argv[1])
    if problem is not None:
        sys.exit(f"make_venv: {problem}")
