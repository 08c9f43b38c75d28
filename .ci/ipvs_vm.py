#!/usr/bin/env python3
"""Boots a small virtual machine whose kernel has IPVS, and runs a command in it.

Few machines that run tests have ip_vs, dummy and ip_set in their kernel. Debian's kernel has
them: it boots in qemu without KVM in some seconds, from an initramfs of busybox and what it
takes to see this machine's files, read-only over 9p, under an overlay that is forgotten. So the
command runs with the programs and the checkout that are here, on another kernel.

Nothing is installed into /boot or /lib/modules; kernel and initramfs lie in a cache folder
(KDNS_VM_CACHE, by default /var/cache/kdns-vm). The exit status is the command's; 77 where there
can be no such machine: what is missing is said.

    python3 .ci/ipvs_vm.py [COMMAND...]     default: ALL
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent
CACHE = Path(os.environ.get("KDNS_VM_CACHE", "/var/cache/kdns-vm"))
# program -> Debian's package of it.
PROGRAMS = {
    "qemu-system-x86_64": "qemu-system-x86",
    "busybox": "busybox-static",
    "depmod": "kmod",
    "ipset": "ipset",
    "iptables": "iptables",
    "ip": "iproute2",
}
KERNEL = "linux-image-amd64"  # a package that depends on the newest
# What it takes to see this machine's files; all other modules are then read from the cache.
BOOT_MODULES = ("virtio_pci", "9pnet_virtio", "9p", "overlay")
# The parts of the kernel's package that are unpacked.
PARTS = ("arch/x86/crypto", "crypto", "lib", "drivers/net", "drivers/virtio", "fs/9p",
         "fs/fscache", "fs/netfs", "fs/overlayfs", "fs/nls", "net")  # fmt: skip
MEMORY = "2048"  # MiB
TIMEOUT = float(os.environ.get("KDNS_VM_TIMEOUT", "900"))
SKIPPED = 77
SAYS = re.compile(r"^KDNS-VM (ready|exit (\d+))$")

# Without the plugins that these tests have no use for: each import costs a second in there. What
# a proxy that runs makes of its flags it makes in every mode: once is enough. At the end, what
# the mode costs beside ipvsadm (bench/ipvs.py).
TESTS = (
    ".venv/bin/python", "-m", "pytest", "-o", "addopts=", "-v", "--color=no",
    *(word for one in ("cacheprovider", "xdist", "anyio", "kdns", "hypothesispytest")
      for word in ("-p", f"no:{one}")),
    "--timeout", "300", "-m", "not bench", "--durations", "10",
    "-k", "not kernel_without_ipvs and not no-detector and not masquerade-all",
    "tests/test_kernel_traffic.py", "tests/test_kernel_ipvs.py", "tests/test_proxy_traffic.py",
)  # fmt: skip
AFTER = (".venv/bin/python", "bench/ipvs.py", "--services", "500")
ALL = ("sh", "-c", f"{shlex.join(TESTS)}; status=$?; {shlex.join(AFTER)} || exit; exit $status")

# What is opened again and again in there. Each time is a question to this machine, which takes
# longer than the work: ipset reads /etc/protocols once for each member of a set, so that 10,000
# members were 15 s instead of 2. A file that is "changed" is copied to where the changes are.
HOT_PROGRAMS = ("ipset", "ipvsadm", "iptables", "iptables-legacy", "ip", "nft", "nsenter",
                "unshare", "setpriv", "modprobe", "cat", "sh", "mount", "ls")  # fmt: skip
HOT_FILES = ("/etc/protocols", "/etc/nsswitch.conf", "/etc/ld.so.cache")
HOT_MATCHES = ("standard", "set", "comment", "mark", "MARK", "conntrack", "addrtype", "tcp", "udp",
               "MASQUERADE", "REJECT", "DNAT")  # fmt: skip
HOT_SIZE = 1 << 20  # octets: to copy a larger one takes longer than to ask for it each time
HOT_MODULES = """\
import sys, kdns.cli, kdns.agent, kdns.kernel.ipvs
for one in list(sys.modules.values()):
    file = getattr(one, "__cached__", None) or getattr(one, "__file__", None)
    print(file or "")
"""

INIT = """#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
for module in {modules}; do modprobe $module || echo "KDNS-VM: no module $module"; done
mount -t 9p -o trans=virtio,version=9p2000.L,msize=524288,cache=loose,ro host /host
mount -t tmpfs -o size=75% tmpfs /over
mkdir /over/upper /over/work
mount -t overlay -o lowerdir=/host,upperdir=/over/upper,workdir=/over/work overlay /new
mkdir -p /new/lib/modules
mount --bind /host{cache}/lib/modules /new/lib/modules
umount /proc /sys
mount --move /dev /new/dev
exec switch_root /new /bin/sh {cache}/inside.sh
"""

# Runs as process 1 over this machine's files.
INSIDE = """#!/bin/sh
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
export HOME=/root LC_ALL=C.UTF-8 KDNS_VM=1 {environment}
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t tmpfs tmpfs /run
# A checkout below /tmp is not to vanish with what else is there.
mkdir /run/checkout
mount --bind {checkout} /run/checkout
mount -t tmpfs tmpfs /tmp
mkdir -p {checkout}
mount --move /run/checkout {checkout}
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs tmpfs /dev/shm
ip link set lo up
xargs chmod u+r < {cache}/hot
cd {checkout}
echo "KDNS-VM ready"
{command}
echo "KDNS-VM exit $?"
echo o > /proc/sysrq-trigger
while :; do :; done
"""


class Missing(Exception):
    """There can be no such machine here: what it lacks."""


def main(argv: list[str]) -> int:
    began = time.monotonic()
    try:
        check_programs()
        kernel = find_kernel()
        initramfs = make_initramfs()
        at_hand = time.monotonic() - began
        print(f"ipvs vm: {kernel.name} is at hand after {at_hand:.1f} s", flush=True)
        return run(kernel, initramfs, argv or list(ALL))
    except Missing as reason:
        print(f"ipvs vm: {reason}", file=sys.stderr)
        (CHECKOUT / ".ipvs-skipped").write_text(f"{reason}\n")  # for .ci/run: make says 2 only
        return SKIPPED


def check_programs() -> None:
    absent = [one for one in PROGRAMS if find_program(one) is None]
    if absent:
        packages = " ".join(PROGRAMS[one] for one in absent)
        raise Missing(
            f"no {', '.join(absent)} here: apt-get install --no-install-recommends {packages}"
        )


def find_program(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin")


def find_kernel() -> Path:
    """Return the kernel in the cache, fetched from Debian's packages where it is not there."""
    found = sorted(CACHE.glob("boot/vmlinuz-*"))
    if found and (CACHE / "lib/modules").is_dir():
        return found[-1]
    package = kernel_package()
    try:
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            unpack(package, Path(folder))
    except OSError as error:
        raise Missing(f"{CACHE} cannot be written: {error}") from None
    found = sorted(CACHE.glob("boot/vmlinuz-*"))
    if not found:
        raise Missing(f"package {package} holds no kernel")
    return found[-1]


def kernel_package() -> str:
    """Return the name of the package that holds the newest kernel."""
    wanted = re.compile(r"Depends: (linux-image-[0-9]\S*)")
    match = None
    with contextlib.suppress(Missing):  # it is not known
        match = wanted.search(output("apt-cache", "depends", KERNEL))
    if match is None and os.geteuid() == 0:
        output("apt-get", "-qq", "update")
        match = wanted.search(output("apt-cache", "depends", KERNEL))
    if match is None:
        raise Missing(f"apt knows no package {KERNEL}: run apt-get update")
    return match[1]


def unpack(package: str, folder: Path) -> None:
    """Put the kernel of `package` and its modules into the cache, all or nothing."""
    output("apt-get", "-qq", "-o", "APT::Sandbox::User=root", "download", package, cwd=folder)
    (deb,) = folder.glob("*.deb")
    parts = " ".join(shlex.quote(f"./lib/modules/*/kernel/{part}/*") for part in PARTS)
    output(
        "sh", "-c", f"dpkg-deb --fsys-tarfile {deb.name} | tar -x --wildcards './boot/vmlinuz-*'"
        f" './lib/modules/*/modules.*' {parts}", cwd=folder,
    )  # fmt: skip
    (version,) = (one.name for one in (folder / "lib/modules").iterdir())
    output(find_program("depmod") or "depmod", "-b", str(folder), version)
    for part in ("lib", "boot"):  # the kernel last: by it we know that all is there
        shutil.rmtree(CACHE / part, ignore_errors=True)
        (folder / part).rename(CACHE / part)


def make_initramfs() -> Path:
    """Write the archive that the kernel unpacks and starts from."""
    (version,) = (one.name for one in (CACHE / "lib/modules").iterdir())
    modules = Path("lib/modules", version)
    wanted = module_files(CACHE / modules, BOOT_MODULES)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for one in ("bin", "proc", "sys", "dev", "host", "over", "new", modules):
            (folder / one).mkdir(parents=True, exist_ok=True)
        shutil.copy(find_program("busybox") or "busybox", folder / "bin/busybox")
        for file in wanted:
            (folder / modules / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(CACHE / modules / file, folder / modules / file)
        output(find_program("depmod") or "depmod", "-b", str(folder), version)
        init = folder / "init"
        init.write_text(INIT.format(modules=" ".join(BOOT_MODULES), cache=CACHE))
        init.chmod(0o755)
        archive = CACHE / "initramfs.cpio"
        listing = "\n".join(str(p.relative_to(folder)) for p in sorted(folder.rglob("*")))
        made = subprocess.run(
            [find_program("busybox") or "busybox", "cpio", "-o", "-H", "newc"],
            cwd=folder, input=listing.encode(), capture_output=True, check=False,
        )  # fmt: skip
        if made.returncode != 0:
            raise Missing(f"busybox cpio: {made.stderr.decode().strip()}")
        archive.write_bytes(made.stdout)
    return archive


def module_files(folder: Path, names: tuple[str, ...]) -> list[str]:
    """Return the files of modules and of those they need; what is built in has none."""
    needs: dict[str, list[str]] = {}
    for line in (folder / "modules.dep").read_text().splitlines():
        file, _, rest = line.partition(":")
        needs[Path(file).stem.replace("-", "_")] = [file, *rest.split()]
    return sorted({file for name in names for file in needs.get(name, ())})


def hot_files() -> list[str]:
    """Return HOT_..., with the libraries of the programs, as far as they are here."""
    paths = [one for name in HOT_PROGRAMS if (one := find_program(name)) is not None]
    ldd = subprocess.run(["ldd", *paths], capture_output=True, text=True, check=False)
    found = {Path(one) for one in (*paths, *HOT_FILES, *re.findall(r"(/\S+) \(", ldd.stdout))}
    for name in HOT_MATCHES:
        found |= set(Path("/usr/lib").glob(f"*/xtables/lib*t_{name}.so"))
    python = CHECKOUT / ".venv/bin/python"
    with contextlib.suppress(OSError):
        found.add(python.resolve())
        done = subprocess.run(
            [python, "-c", HOT_MODULES], cwd=CHECKOUT, capture_output=True, text=True, check=False
        )
        found |= {Path(line) for line in done.stdout.splitlines() if line.startswith("/")}
    found = {one.resolve() for one in found if one.is_file()}
    return sorted(str(one) for one in found if one.stat().st_size <= HOT_SIZE)


def run(kernel: Path, initramfs: Path, command: list[str]) -> int:
    """Boot, pass on what the command prints, and return its exit status."""
    kept = {name: os.environ[name] for name in ("CI",) if name in os.environ}
    environment = " ".join(f"{name}={shlex.quote(value)}" for name, value in kept.items())
    (CACHE / "inside.sh").write_text(
        INSIDE.format(
            cache=CACHE,
            environment=environment,
            checkout=shlex.quote(str(CHECKOUT)),
            command=shlex.join(command),
        )
    )
    (CACHE / "hot").write_text("".join(f"{one}\n" for one in hot_files()))
    accelerator = os.environ.get("KDNS_VM_ACCEL", "tcg,thread=multi")
    began = time.monotonic()
    machine = subprocess.Popen(
        ["timeout", str(TIMEOUT), find_program("qemu-system-x86_64") or "qemu-system-x86_64",
         "-accel", accelerator, "-cpu", "max", "-smp", "2", "-m", MEMORY, "-display", "none",
         "-nodefaults", "-no-reboot", "-serial", "stdio", "-nic", "none",
         "-virtfs", "local,path=/,mount_tag=host,security_model=none,readonly=on,multidevs=remap",
         "-kernel", str(kernel), "-initrd", str(initramfs),
         "-append", "console=ttyS0 loglevel=2 panic=-1 mitigations=off random.trust_cpu=on"
         # A client with a socket of it learns of a refusal only when it asks again, in 3 s.
         " module_blacklist=sctp"],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert machine.stdout is not None
    status: int | None = None
    said: list[str] = []
    ready = False
    for octets in machine.stdout:
        line = octets.decode("utf-8", "replace").rstrip("\r\n")
        found = SAYS.match(line)
        if found is None:
            said.append(line)
            if ready:
                print(line, flush=True)
        elif found[2] is None:
            ready = True
            print(f"ipvs vm: up after {time.monotonic() - began:.1f} s", flush=True)
        else:
            status = int(found[2])
    machine.wait()
    print(f"ipvs vm: off after {time.monotonic() - began:.1f} s", flush=True)
    if status is None:
        if not ready:
            print("\n".join(said[-40:]), file=sys.stderr)
            raise Missing(f"the machine did not come up ({machine.returncode})")
        why = "took too long" if machine.returncode == 124 else "ended without a result"
        print(f"ipvs vm: the machine {why} ({machine.returncode})", file=sys.stderr)
        return 1
    return status


def output(*argv: str, cwd: Path | None = None) -> str:
    """Run a program to its end and return what it printed."""
    try:
        done = subprocess.run(
            argv, cwd=cwd, capture_output=True, text=True, timeout=300, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Missing(f"{argv[0]}: {error}") from None
    if done.returncode != 0:
        raise Missing(f"{shlex.join(argv)}: {done.stderr.strip()}")
    return done.stdout


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
