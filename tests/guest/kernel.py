"""Builds what the guest boots from, out of Debian's kernel package: nothing of it is installed here.

The kernel goes in as an ELF (unpacking it under emulation would cost seconds), with the modules for RDMA in software, for the
shared file systems and for virtual NICs in a small initial file system. Kept in the user's cache folder; made again when the
package or this folder changes.
"""

from __future__ import annotations

import hashlib
import lzma
import os
import shutil
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
META = "linux-image-amd64"  # the cloud flavour has no rdma_rxe and no 9p
BOOT = ("virtio_pci", "virtio_console", "9pnet_virtio", "9p", "overlay")
MODULES = (
    *BOOT, "virtio_net", "virtio_rng", "dummy", "veth", "ib_core", "ib_uverbs", "rdma_cm", "rdma_ucm", "rdma_rxe", "sch_netem",
    "sch_tbf", "crc32c_generic", "crc32_generic",
)  # fmt: skip
TOOLS = ("apt-get", "apt-cache", "dpkg-deb", "busybox", "cpio", "modprobe", "depmod", "qemu-system-x86_64", "ip", "rdma")
PACKAGES = ("qemu-system-x86", "busybox-static", "cpio", "kmod", "iproute2", "ibverbs-providers", "libibverbs-dev")


def output(*command: str) -> str:
    """What a command says."""
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def folder() -> Path:
    """Where it is kept."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("AIOTRANSFER_GUEST_CACHE") or Path(base, "aiotransfer-guest"))


def install_tools() -> None:
    """By apt, when something is missing."""
    if all(shutil.which(tool) for tool in TOOLS) and Path("/usr/include/infiniband/verbs.h").exists():
        return
    print("installing QEMU and the user's side of RDMA by apt (about 25 MB)", flush=True)
    install = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *PACKAGES]
    if subprocess.run(install, stdout=subprocess.DEVNULL).returncode != 0:
        subprocess.run(["apt-get", "update", "-qq"], check=True)
        subprocess.run(install, check=True, stdout=subprocess.DEVNULL)


def unpacked(image: bytes) -> bytes:
    """The ELF within a bzImage."""
    setup, offset, length = image[0x1F1] or 4, *struct.unpack_from("<II", image, 0x248)
    start = (setup + 1) * 512 + offset
    elf = lzma.LZMADecompressor(lzma.FORMAT_XZ).decompress(image[start : start + length])  # what follows is its length
    if elf[:4] != b"\x7fELF":
        raise SystemExit("the kernel is packed in an unknown way")
    return elf


def initial_files(root: Path, version: str, files: Path) -> None:
    """Busybox, the first script, and the modules with all that they depend on."""
    for name in ("bin", "dev", "proc", "sys", "lib/modules"):
        (files / name).mkdir(parents=True)
    shutil.copy2(shutil.which("busybox") or "", files / "bin" / "busybox")
    (files / "bin" / "sh").symlink_to("busybox")
    shutil.copy(HERE / "init.sh", files / "init")
    (files / "init").chmod(0o755)
    subprocess.run(["depmod", "-b", root, version], check=True, stderr=subprocess.DEVNULL)
    first: dict[str, None] = {}  # in the order in which they are to be loaded
    for module in MODULES:
        for line in output("modprobe", "-d", str(root), "-S", version, "--show-depends", module).splitlines():
            if not line.startswith("insmod "):
                continue
            path = Path(line.split()[1]).relative_to(root)
            (files / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(root / path, files / path)
            if module in BOOT:
                first["/" + str(path)] = None
    for name in ("modules.order", "modules.builtin", "modules.builtin.modinfo"):
        shutil.copy(root / "lib/modules" / version / name, files / "lib/modules" / version / name)
    subprocess.run(["depmod", "-b", files, version], check=True)
    (files / "modules.boot").write_text("\n".join(first) + "\n")


def build() -> Path:
    """The folder that holds `vmlinux` and `initramfs.cpio`."""
    install_tools()
    cache = folder()
    names = [word for word in output("apt-cache", "depends", META).split() if word.startswith("linux-image-")]
    names = [name for name in names if name != META]
    if not names:
        raise SystemExit(f"apt knows no package behind {META}: apt-get update")
    package = names[0]
    sources = b"".join((HERE / name).read_bytes() for name in ("kernel.py", "init.sh"))
    stamp = output("apt-cache", "policy", package).partition("Version table")[0].partition("Candidate:")[2].split()[0]
    stamp = f"{package} {stamp} {hashlib.sha256(sources).hexdigest()}"
    if (cache / "stamp").exists() and (cache / "stamp").read_text() == stamp:
        return cache
    cache.mkdir(parents=True, exist_ok=True)
    (cache / "stamp").unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as temporary:
        root, files = Path(temporary, "root"), Path(temporary, "files")
        root.mkdir()
        files.mkdir()
        print(f"fetching {package} (about 70 MB) for the guest", flush=True)
        subprocess.run(["apt-get", "download", "-qq", "-o", "APT::Sandbox::User=root", package], cwd=temporary, check=True)
        (deb,) = Path(temporary).glob("*.deb")
        subprocess.run(["dpkg-deb", "-x", deb, root], check=True)
        version = package.removeprefix("linux-image-")
        (cache / "vmlinux").write_bytes(unpacked((root / "boot" / f"vmlinuz-{version}").read_bytes()))
        initial_files(root, version, files)
        with open(cache / "initramfs.cpio", "wb") as archive:
            names = subprocess.run(["find", "."], cwd=files, check=True, capture_output=True).stdout
            pack = ["cpio", "--quiet", "-o", "-H", "newc", "-R", "0:0"]
            subprocess.run(pack, cwd=files, input=names, stdout=archive, check=True)
    (cache / "stamp").write_text(stamp)
    return cache


if __name__ == "__main__":
    sys.stdout.write(f"{build()}\n")
