"""The registry's source that is files and folders of manifests, watched for change.

Decides which files count and what to do when one is broken: its last good objects stay. What
a cluster would make of the documents is registry/manifests.py's.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import msgspec
import yaml

from kdns.errors import Unreachable
from kdns.metrics import Metrics
from kdns.registry.manifests import Compiled, Document, compile_manifests
from kdns.registry.objects import ENDPOINT_SLICE, NAMESPACE, NODE, POD, SERVICE, SERVICE_IMPORT
from kdns.registry.spec import ManifestSpec
from kdns.runtime import leave_alone, without_collections
from kdns.source.sink import Sink, Tally, log

SUFFIXES = (".yaml", ".yml", ".json")
MAX_FILE = 64 << 20  # octets; a dump of 10,000 Services is some 20 MiB
MAX_DEPTH = 100  # of nested YAML; libyaml's composer overruns the stack at some 10,000
MUCH = 1 << 20  # octets; what takes less time to read holds nothing up
# What is surely not nested too deep: marks and spaces before a line, brackets in a document.
MAX_FLAT_LINE, MAX_FLAT_FLOW = 24, 25
MAX_NODES = 20_000_000  # a file may expand to by its aliases ("billion laughs")
MAX_FILES = 10_000  # a folder given by mistake, such as /, is not read to its end

# Other line breaks than \n, and encodings other than UTF-8: what _is_flat() does not know.
_BREAKS_LINES = re.compile(rb"[\r\x00]|\xc2\x85|\xe2\x80[\xa8\xa9]|\A(?:\xff\xfe|\xfe\xff)")
_ALIAS = re.compile(rb"(?:\A|[\s\[{,:])\*")
_DEEP_LINE = re.compile(rb"^(?:[ \t]|[-?:][ \t]){%d}" % MAX_FLAT_LINE, re.MULTILINE)

_Base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

_STR, _SEQ, _MAP = (f"tag:yaml.org,2002:{kind}" for kind in ("str", "seq", "map"))


class _Loader(_Base):  # type: ignore[misc]
    """YAML as kubectl reads it: a date stays the text it is written as."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in _Base.yaml_implicit_resolvers.items()
}


@dataclass(slots=True)
class _File:
    """One file as it was last read. stamp -- what tells that it changed."""

    stamp: tuple[int, int, int] = (0, 0, 0)
    documents: list[Document] = field(default_factory=list)


@dataclass(slots=True)
class _Look:
    """What one look at the files found.

    unknown -- paths of which it is not known what they would hold, and why
    broken  -- files that have just been found broken, and why
    octets  -- of all files that were read
    """

    changed: bool = False
    octets: int = 0
    unknown: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)


class ManifestSource:
    """Follows files and folders for ever. run() ends only by cancellation."""

    def __init__(self, spec: ManifestSpec, sink: Sink, metrics: Metrics) -> None:
        self._spec = spec
        self._sink = sink
        self._tally = Tally(metrics)
        self._files: dict[str, _File] = {}
        self._told = False
        self._synced = False

    async def run(self) -> None:
        """Look at the files now and every `interval` seconds."""
        while True:
            # In a thread: reading must not hold up answers.
            look, compiled = await asyncio.to_thread(self._look_and_compile)
            self._tell(look, compiled)
            # What the registry has no use for goes object by object, as it is taken over.
            del look, compiled
            await asyncio.sleep(self._spec.interval)

    def _look_and_compile(self) -> tuple[_Look, Compiled | None]:
        with without_collections():
            look = self._look()
            if not look.changed and self._told:
                return look, None
            documents = [doc for path in sorted(self._files) for doc in self._files[path].documents]
            compiled = compile_manifests(documents, self._spec)
            if look.octets > MUCH:
                leave_alone()
            return look, compiled

    def _tell(self, look: _Look, compiled: Compiled | None) -> None:
        for text in look.broken:
            log.warning("%s; its last good objects stay", text)
            self._tally.failed("manifests", "broken")
        sink = self._sink
        if compiled is not None:
            for where, error in compiled.errors:
                self._tally.skipped(error, where)
            sink.replace(NAMESPACE, compiled.namespaces)
            sink.replace(POD, compiled.pods)
            sink.replace(ENDPOINT_SLICE, compiled.slices)
            sink.replace(NODE, compiled.nodes)
            sink.replace(SERVICE, compiled.services)
            sink.replace(SERVICE_IMPORT, compiled.imports)
            self._told = True
        if look.unknown:
            # Names there may be, as with an API server out of reach: not synced before.
            failure = Unreachable(f"manifests: {'; '.join(look.unknown)}")
            self._tally.failed("manifests", "unreachable")
            sink.failed("manifests", failure, self._spec.interval)
            return
        sink.heard("manifests")
        if not self._synced:
            self._synced = True
            for kind in self._spec.kinds:
                sink.mark_synced(kind)

    # --- files ------------------------------------------------------------------------

    def _look(self) -> _Look:
        """Read what is new or changed, forget what is gone."""
        look = _Look()
        seen: set[str] = set()
        for path in self._spec.paths:
            found = list(islice(files_below(path), MAX_FILES + 1))
            if len(found) > MAX_FILES:
                look.unknown.append(f"{path} holds over {MAX_FILES} manifests")
                found = []
            elif not found and not os.path.exists(path):
                look.unknown.append(f"{path} does not exist")
                # Its last good objects stay: a volume may come back.
                seen.update(p for p in self._files if p == path or p.startswith(path + os.sep))
            seen.update(found)
            for file in found:
                self._read(file, look)
        for gone in self._files.keys() - seen:
            del self._files[gone]
            look.changed = True
        return look

    def _read(self, path: str, look: _Look) -> None:
        known = self._files.get(path, _File())
        try:
            status = os.stat(path)
            stamp = (status.st_mtime_ns, status.st_size, status.st_ino)
            if stamp == known.stamp:
                return
            if status.st_size > MAX_FILE:
                raise ValueError(f"{path}: over {MAX_FILE >> 20} MiB; not read")
            with open(path, "rb") as file:
                content = file.read(MAX_FILE)
        except FileNotFoundError:
            return  # gone between listing and reading; the next look sees it
        except OSError as e:
            if known.stamp != (-1, 0, 0):  # say it once
                look.broken.append(f"{path}: {e.strerror or e}")
            self._files[path] = _File((-1, 0, 0), known.documents)
            return
        except ValueError as e:
            look.broken.append(str(e))
            self._files[path] = _File(stamp, known.documents)
            return
        try:
            documents = parse_documents(path, content)
        except ValueError as e:
            look.broken.append(str(e))
            documents = known.documents
        self._files[path] = _File(stamp, documents)
        look.changed = True
        look.octets += len(content)
        if documents is not known.documents:
            while known.documents:  # one by one: all at once would hold up answers
                known.documents.pop()


def files_below(path: str) -> Iterator[str]:
    """Yield a file itself, or the manifests of a folder and those below it."""
    if os.path.isfile(path):
        yield path
        return
    for folder, folders, names in os.walk(path, followlinks=False):
        # Hidden ones are editors', git's, and the copies a ConfigMap volume keeps (..data).
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        for name in sorted(names):
            if name.endswith(SUFFIXES) and not name.startswith("."):
                yield os.path.join(folder, name)


def parse_documents(path: str, content: bytes) -> list[Document]:
    """Return the documents of a file. Raises ValueError: "FILE:LINE: what is wrong"."""
    if path.endswith(".json"):
        try:
            items = _items(content) if len(content) > MUCH else None
            if items is not None:
                return [Document(f"{path}:1", item) for item in items]
            return [Document(f"{path}:1", json.loads(content))]
        except json.JSONDecodeError as e:
            raise ValueError(f"{path}:{e.lineno}: not JSON: {e.msg}") from None
        except (UnicodeDecodeError, RecursionError) as e:
            raise ValueError(f"{path}: not JSON: {e}") from None
    documents: list[Document] = []
    try:
        flat = _is_flat(content)
        if not flat:
            _check_shape(path, content)
        loader = _Loader(content)
        try:
            while loader.check_node():
                node = loader.get_node()
                value = _plain(loader, node) if flat else loader.construct_document(node)
                if value is not None:  # nothing between two `---`
                    documents.append(Document(f"{path}:{node.start_mark.line + 1}", value))
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as e:
        mark = e.problem_mark or e.context_mark
        line = f":{mark.line + 1}" if mark is not None else ""
        raise ValueError(f"{path}{line}: not YAML: {e.problem or e.context}") from None
    except _BadShape:
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as e:
        # A ValueError: an integer or a float in YAML's eyes that Python cannot read.
        raise ValueError(f"{path}: not YAML: {' '.join(str(e).split())}") from None
    return documents


class _List(msgspec.Struct):
    kind: str
    items: list[msgspec.Raw]


def _items(content: bytes) -> list[Any] | None:
    """Return the items of a long List, read one by one so that other threads get their turn;
    None where this finds none: it is to be read in another way."""
    try:
        found = msgspec.json.decode(content, type=_List)
        if found.kind != "List":
            return None
        return [msgspec.json.decode(one) for one in found.items]
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


class _BadShape(ValueError):
    """Nested too deep, or grown without bound by aliases."""


def _plain(loader: Any, node: yaml.Node) -> Any:
    """Return what a node stands for: as the loader's construct_document(), which takes twice as
    long, but that what an alias names is made anew each time."""
    if node.__class__ is yaml.ScalarNode and node.tag == _STR:
        return node.value
    if node.__class__ is yaml.SequenceNode and node.tag == _SEQ:
        return [_plain(loader, one) for one in node.value]
    if (
        node.__class__ is yaml.MappingNode
        and node.tag == _MAP
        and all(key.__class__ is yaml.ScalarNode and key.tag == _STR for key, _ in node.value)
    ):
        return {key.value: _plain(loader, value) for key, value in node.value}
    return loader.construct_object(node, deep=True)


def _is_flat(content: bytes) -> bool:
    """True if YAML is seen at a glance to be neither nested deeply nor grown by aliases, as
    nearly all is; False tells nothing.

    In block style a collection opens after spaces or one more mark (- ? :) at the beginning of a
    line, and there are at most two in one column: with fewer than 24 of these in every line some
    70 are open. The rest may be in flow style.
    """
    if any(mark.search(content) for mark in (_ALIAS, _BREAKS_LINES, _DEEP_LINE)):
        return False
    # A line that begins with --- ends a document, and all that is open in it.
    return all(
        document.count(b"{") + document.count(b"[") <= MAX_FLAT_FLOW
        for document in content.split(b"\n---")
    )


def _check_shape(path: str, content: bytes) -> None:
    """Raise _BadShape for YAML that would harm its reader; walks events, so that it takes
    neither stack nor memory itself."""
    sizes: dict[str, int] = {}  # anchor -> nodes below it
    open_nodes: list[tuple[str, int]] = []  # anchor, nodes so far
    for event in yaml.parse(content, Loader=_Loader):
        size = 1
        anchor = str(getattr(event, "anchor", None) or "")
        line = event.start_mark.line + 1 if event.start_mark is not None else 0
        if isinstance(event, yaml.CollectionStartEvent):
            open_nodes.append((anchor, 1))
            if len(open_nodes) > MAX_DEPTH:
                raise _BadShape(f"{path}:{line}: nested over {MAX_DEPTH} deep")
            continue
        if isinstance(event, yaml.CollectionEndEvent):
            anchor, size = open_nodes.pop()
        elif isinstance(event, yaml.AliasEvent):
            if anchor not in sizes:
                raise _BadShape(f"{path}:{line}: '*{anchor}' has no '&{anchor}' that ends before")
            anchor, size = "", sizes[anchor]
        elif isinstance(event, yaml.DocumentStartEvent):
            sizes.clear()
            continue
        elif not isinstance(event, yaml.ScalarEvent):
            continue
        if anchor:
            sizes[anchor] = size
        if size > MAX_NODES:
            raise _BadShape(f"{path}:{line}: its aliases expand to over {MAX_NODES} nodes")
        if open_nodes:
            outer, before = open_nodes[-1]
            open_nodes[-1] = (outer, before + size)
