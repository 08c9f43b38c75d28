"""The iptables programs of a node: which are there, which to use, and running them.

Decides between the nft and the legacy variant as the wrapper in kube-proxy's image does, and
names a mix of the two. What is written with them is iptables.py's.

A program's input and output are files in memory: 10 MB of rules then pass through the kernel
and not, piece by piece, through an event loop that has names to answer.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import re
import shutil
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import BinaryIO, Literal, TypeAlias

from kdns.errors import ApplyError
from kdns.proxy.options import Family

Variant: TypeAlias = Literal["nft", "legacy"]

VARIANTS: tuple[Variant, ...] = ("nft", "legacy")
BASE: Mapping[Family, str] = {4: "iptables", 6: "ip6tables"}
# Where the programs are on every distribution, though not in every container's PATH.
SBIN = ("/usr/sbin", "/sbin")

LOCK_WAIT = "5"  # seconds that a program itself waits for the xtables lock (reference 1.4)
RESTORE_WAITS = (1, 6, 2)  # the first versions that take -w, and --random-fully
RANDOM_FULLY = (1, 6, 2)
RESOURCE_PROBLEM = 4  # exit status: a lock not got, memory, or no permission
LASTING = (  # reasons for it that do not pass: no right, or a match that this kernel lacks
    "ermission denied",
    "Operation not permitted",
    "No such file or directory",
    "not supported",
    "Invalid argument",
)

# Seconds until a program is given up. A restore of 80,000 rules in one piece took 93 s.
RESTORE_TIMEOUT = 180.0
SAVE_TIMEOUT = 60.0
VERSION_TIMEOUT = 10.0
MAX_OUTPUT = 256 << 20  # octets; 80,000 rules are 12 MiB
MAX_STDERR = 64 << 10
PIECE = 256 << 10  # characters of a text that are encoded at a time; they take 0.1 ms

# kubelet's chains in mangle say which variant it found (reference 1.2).
HINTS = (b":KUBE-IPTABLES-HINT ", b":KUBE-KUBELET-CANARY ")
OURS = b"-A KUBE-"

_VERSION = re.compile(r"v(\d+)\.(\d+)(?:\.(\d+))?")
_LINE = re.compile(r"line:? (\d+)")
_CHAIN = re.compile(r"[Cc]hain '([^']+)' does not exist")
# Advice about the program's own options, and an empty hint: nothing for our reader.
_NOISE = re.compile(r"^(Try `.*|Error occurred at line: \d+|)$")


@dataclass(frozen=True, slots=True)
class Programs:
    """One variant of one family's programs.

    name   -- of the command ("iptables", "ip6tables-legacy"); the others' begin with it
    prefix -- what every command line begins with: ("ip", "netns", "exec", NAME) for tests
    """

    family: Family
    variant: Variant
    version: tuple[int, int, int]
    name: str
    prefix: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.name} {'.'.join(map(str, self.version))} ({self.variant})"

    @property
    def random_fully(self) -> bool:
        """`MASQUERADE --random-fully` is there."""
        return self.version >= RANDOM_FULLY

    async def restore(self, text: str) -> None:
        """Write `text`, each table of it in one transaction; chains not named in it stay.

        Raises ApplyError with the line that was not taken; that table is then as it was.
        """
        program = f"{self.name}-restore"
        wait = ("-w", LOCK_WAIT) if self.version >= RESTORE_WAITS else ()
        argv = (*self.prefix, path_of(program), *wait, "--noflush", "--counters")
        status, output, stderr = await run_program(program, argv, RESTORE_TIMEOUT, text)
        output.close()
        if status != 0:
            line = refused_line(stderr, text)
            raise ApplyError(program, blame(stderr, text), is_busy(status, stderr), line)

    async def look(self) -> None:
        """Raise ApplyError unless the kernel has the nat table."""
        # Without -w iptables-legacy 1.8.9 waits for ever.
        ask = ("-w", "1", "-t", "nat", "-S", "POSTROUTING", "1")
        argv = (*self.prefix, path_of(self.name), *ask)
        status, output, stderr = await run_program(self.name, argv, SAVE_TIMEOUT)
        output.close()
        if status != 0:
            raise ApplyError(self.name, blame(stderr, ""), is_busy(status, stderr))

    async def save(self, table: str = "") -> BinaryIO:
        """Return what iptables-save prints of `table` ("": of all there are), as an open file.

        Without a table no kernel module is loaded and no table made by asking.
        """
        program = f"{self.name}-save"
        argv = (*self.prefix, path_of(program), *(("-t", table) if table else ()))
        status, output, stderr = await run_program(program, argv, SAVE_TIMEOUT)
        if status != 0:
            output.close()
            raise ApplyError(program, blame(stderr, ""), is_busy(status, stderr))
        return output


@dataclass(frozen=True, slots=True)
class Found:
    """The programs to use, and what an operator should know about them."""

    programs: Mapping[Family, Programs]
    warnings: tuple[str, ...] = ()


async def find_programs(families: Collection[Family] = (4, 6), prefix: Sequence[str] = ()) -> Found:
    """Return the programs of each family to use on this node.

    Where both variants are installed: the one with kubelet's chains in it, else the one that
    holds more rules, else what plain `iptables` is. It is one variant for all families.
    Raises ApplyError where a program is missing, saying what to install.
    """
    installed = {family: await find_variants(family, prefix) for family in sorted(families)}
    for family, variants in installed.items():
        if not variants:
            raise ApplyError(
                BASE[family],
                f"not found in PATH: kdns proxy writes its rules with {BASE[family]} and"
                f" {BASE[family]}-restore; install the package iptables (and ip6tables, where"
                " that is a package of its own)",
            )
    surveys = {variant: await _survey(variant, installed) for variant in VARIANTS}
    default = next(iter(next(iter(installed.values())))) if installed else "nft"
    chosen = choose_variant(surveys, default)
    return Found(
        {
            family: variants.get(chosen) or next(iter(variants.values()))
            for family, variants in installed.items()
        },
        tuple(_mix(chosen, surveys)),
    )


async def leave_out_families(found: Found) -> Found:
    """Return `found` without a family that this kernel cannot translate, as long as there is one
    that it can: a node whose kernel has no IPv6 nat has IPv4 all the same (as kube-proxy)."""
    failures: dict[Family, ApplyError] = {}
    for family, programs in found.programs.items():
        try:
            await programs.look()
        except ApplyError as e:
            if not e.busy and "ermi" not in e.stderr:  # a lock, a right: said by the first sync
                failures[family] = e
    if len(failures) == len(found.programs):
        return found
    return Found(
        {family: one for family, one in found.programs.items() if family not in failures},
        (*found.warnings, *(
            f"no Service is forwarded to over IPv{family}, this kernel cannot: {failure}"
            for family, failure in failures.items()
        )),
    )  # fmt: skip


async def find_variants(family: Family, prefix: Sequence[str] = ()) -> dict[Variant, Programs]:
    """Return the variants installed for `family`, that of the plain name first."""
    base = BASE[family]
    found: dict[Variant, Programs] = {}
    for name in (base, *(f"{base}-{variant}" for variant in VARIANTS)):
        if any(which(f"{name}{end}") is None for end in ("", "-restore", "-save")):
            continue
        argv = (*prefix, path_of(name), "--version")
        status, output, stderr = await run_program(name, argv, VERSION_TIMEOUT)
        with output:
            text = output.read().decode("utf-8", "replace")
        if status != 0:
            raise ApplyError(name, blame(stderr, ""))
        variant, version = parse_version(name, text)
        found.setdefault(variant, Programs(family, variant, version, name, tuple(prefix)))
    return found


async def read_saved(families: Iterable[Family]) -> dict[Variant, dict[Family, str]]:
    """Return what each variant installed holds, as iptables-save prints it, whoever wrote it; a
    variant that this kernel lacks holds nothing. Raises ApplyError where it may not be read."""
    saved: dict[Variant, dict[Family, str]] = {}
    for family in families:
        for variant, programs in (await find_variants(family)).items():
            try:
                output = await programs.save()
            except ApplyError as e:
                if "ermi" in e.stderr:  # not permitted, permission denied
                    raise
                continue
            with output:
                text = output.read().decode("utf-8", "replace")
            saved.setdefault(variant, {})[family] = text
    return saved


def parse_version(name: str, text: str) -> tuple[Variant, tuple[int, int, int]]:
    """Read `iptables --version`: "iptables v1.8.9 (nf_tables)". Before 1.8 all is legacy."""
    match = _VERSION.search(text)
    if match is None:
        raise ApplyError(name, f"--version says {text.strip()[:80]!r}, which names no version")
    major, minor, patch = (int(part or 0) for part in match.groups())
    return ("nft" if "nf_tables" in text else "legacy"), (major, minor, patch)


# --- which variant -------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Survey:
    """What the kernel holds in one variant, both families together.

    hinted -- kubelet made its chains there
    rules  -- of anybody; ours: those in KUBE- chains
    hidden -- why what is there cannot be seen; "": it can, or there is no such variant
    """

    hinted: bool = False
    rules: int = 0
    ours: int = 0
    hidden: str = ""


def choose_variant(surveys: Mapping[Variant, Survey], default: Variant) -> Variant:
    """Return the variant in use on this node."""
    nft, legacy = surveys.get("nft", Survey()), surveys.get("legacy", Survey())
    if nft.hinted or legacy.hinted:
        return "nft" if nft.hinted else "legacy"
    if nft.rules == legacy.rules:
        return default
    return "legacy" if legacy.rules > nft.rules else "nft"


async def _survey(
    variant: Variant, installed: Mapping[Family, Mapping[Variant, Programs]]
) -> Survey:
    hinted, rules, ours, hidden = False, 0, 0, ""
    for variants in installed.values():
        programs = variants.get(variant)
        if programs is None:
            continue
        try:
            output = await programs.save()
        except ApplyError as e:
            if "ermi" in e.stderr:  # not permitted, permission denied
                hidden = str(e)
            continue  # else a kernel without this variant: it holds nothing there
        with output:
            part = await asyncio.to_thread(_count, output)
        hinted, rules, ours = hinted or part.hinted, rules + part.rules, ours + part.ours
    return Survey(hinted, rules, ours, hidden)


def _count(lines: BinaryIO) -> Survey:
    table, hinted, rules, ours = b"", False, 0, 0
    for line in lines:
        if line.startswith(b"-"):
            rules += 1
            ours += line.startswith(OURS)
        elif line.startswith(b"*"):
            table = line.strip()
        elif table == b"*mangle" and line.startswith(HINTS):
            hinted = True
    return Survey(hinted, rules, ours)


def _mix(chosen: Variant, surveys: Mapping[Variant, Survey]) -> list[str]:
    """Two rule sets both see every packet, and neither program shows the other's."""
    warnings = []
    for variant, survey in surveys.items():
        if variant == chosen:
            continue
        if survey.hidden:
            remedy = ": it takes the capability NET_RAW" if variant == "legacy" else ""
            warnings.append(
                f"iptables rules of variant {variant} cannot be seen{remedy} ({survey.hidden});"
                f" {chosen} is used, which is wrong if this node's programs use {variant}"
            )
        if not survey.rules:
            continue
        whose = f", {survey.ours} of them in KUBE- chains" if survey.ours else ""
        warnings.append(
            f"iptables rules in both variants: {chosen} is used here, but {variant} holds"
            f" {survey.rules} rules{whose}; see iptables-{variant}-save, and let all programs"
            " of this node use one variant"
        )
    return warnings


# --- running -------------------------------------------------------------------------


def is_busy(status: int, stderr: str) -> bool:
    """Say whether a program failed for a lock or another resource that may soon be free.

    iptables-nft leaves with the same status for whatever the kernel refuses.
    """
    return status == RESOURCE_PROBLEM and not any(reason in stderr for reason in LASTING)


def blame(stderr: str, text: str) -> str:
    """Return what a program said in one line, with the line of `text` that it said it about."""
    said = "; ".join(line for line in stderr.splitlines() if not _NOISE.match(line.strip()))
    said = said or "failed and said nothing"
    at, line = _refused(stderr, text)
    return f"{said}; line {at} of its input: {line}" if at else said


def refused_line(stderr: str, text: str) -> str:
    """Return the line of `text` that a program did not take; "" if it does not say which."""
    return _refused(stderr, text)[1]


def _refused(stderr: str, text: str) -> tuple[int, str]:
    """Return (number, line); (0, "") if it is not known.

    The nft variant notices a missing chain only at COMMIT: then the chain's name says which.
    """
    number = _LINE.search(stderr)
    if number is None or not text:
        return 0, ""
    lines = text.splitlines()
    at = int(number[1])
    missing = _CHAIN.search(stderr)
    if missing is not None:
        jumps = (f"-j {missing[1]}", f"-g {missing[1]}", f"-A {missing[1]} ")
        at = next((i for i, line in enumerate(lines, 1) if any(j in line for j in jumps)), at)
    return (at, lines[at - 1]) if 0 < at <= len(lines) else (0, "")


def which(program: str) -> str | None:
    path = os.pathsep.join((os.environ.get("PATH", os.defpath), *SBIN))
    return shutil.which(program, path=path)


def path_of(program: str) -> str:
    found = which(program)
    if found is None:
        raise ApplyError(program, "not found in PATH any more; install the package iptables")
    return found


def _memory(name: str, size: int) -> BinaryIO:
    """Return a file in memory that cannot grow beyond `size` octets (sparse until written)."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW)
    return os.fdopen(fd, "w+b", buffering=1 << 16)


def _written(file: BinaryIO) -> int:
    """Cut `file` where the program stopped writing, ready to be read; return its size."""
    fd = file.fileno()
    size = os.lseek(fd, 0, os.SEEK_CUR)  # the program's offset: it wrote through our file
    os.ftruncate(fd, size)
    file.seek(0)
    return size


def _input(text: str) -> BinaryIO:
    file = os.fdopen(os.memfd_create("input", os.MFD_CLOEXEC), "w+b")
    for start in range(0, len(text), PIECE):  # a copy of all of it might be 10 MB
        file.write(text[start : start + PIECE].encode())
    file.seek(0)
    return file


async def run_program(
    program: str, argv: Sequence[str], timeout: float, text: str | None = None
) -> tuple[int, BinaryIO, str]:
    """Run a program to its end; return (exit status, output, stderr).

    Killed after `timeout` seconds, or when its caller is cancelled: what it had not committed
    by then never happens.
    """
    output = _memory("output", MAX_OUTPUT)
    try:
        with _memory("stderr", MAX_STDERR) as errors:
            status = await _wait(program, argv, timeout, text, output, errors)
            _written(errors)
            stderr = errors.read().decode("utf-8", "replace")
        if _written(output) >= MAX_OUTPUT:
            raise ApplyError(program, f"printed more than {MAX_OUTPUT >> 20} MiB")
    except BaseException:
        output.close()
        raise
    return status, output, stderr


async def _wait(
    program: str,
    argv: Sequence[str],
    timeout: float,
    text: str | None,
    output: BinaryIO,
    errors: BinaryIO,
) -> int:
    source = None
    if text is not None:
        source = _input(text) if len(text) <= PIECE else await asyncio.to_thread(_input, text)
    try:
        process = await asyncio.create_subprocess_exec(
            *argv,
            stdin=asyncio.subprocess.DEVNULL if source is None else source,
            stdout=output,
            stderr=errors,
            env={**os.environ, "LC_ALL": "C"},
            # A terminal's Ctrl-C is for us: a write under way is finished first.
            start_new_session=True,
        )
    except OSError as e:
        raise ApplyError(program, f"cannot be run: {e.strerror or e}") from None
    finally:
        if source is not None:
            source.close()
    try:
        return await asyncio.wait_for(process.wait(), timeout)
    except TimeoutError:
        raise ApplyError(program, f"took longer than {timeout:g} s and was stopped") from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
