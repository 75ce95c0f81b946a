"""A real Ceph RGW on one machine: the strictest S3 server that can be had from Debian's packages.

    python -m tests.ceph_rgw --install             # the packages: as root, once
    python -m tests.ceph_rgw --dir /tmp/ceph       # a server, until Ctrl-C

One monitor, one OSD in a sparse file, one gateway; all of them listen on loopback, on free ports, keep what they write
below one directory, and are children of the process that started them: they end with it. Starting needs no root.
Without a manager (ceph-mgr) the cluster counts nothing and stores everything.

In tests, `running()` starts it and returns when its bucket is there.
"""

import argparse
import contextlib
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

PACKAGES = ("ceph-mon", "ceph-osd", "radosgw")
ACCESS_KEY, SECRET_KEY = "lorasync", "lorasync-secret-key"
START_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 20.0
POLL_S = 0.2
MAX_REVIVALS = 5
GIB = 1 << 30

CONFIG = """\
[global]
fsid = {fsid}
mon initial members = a
mon host = [v1:127.0.0.1:{mon_port}]
public addr = 127.0.0.1
auth cluster required = none
auth service required = none
auth client required = none
ms bind msgr2 = false
mon allow pool size one = true
paxos propose interval = 0.05
paxos min wait = 0.01
mon data avail crit = 1
mon data avail warn = 2
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 8
osd pool default pgp num = 8
osd crush chooseleaf type = 0
osd objectstore = bluestore
bluestore block create = true
bluestore block size = {osd_bytes}
osd memory target = 1073741824
run dir = {root}/run
log file = {root}/log/$name.log
admin socket = {root}/run/$name.asok
pid file = {root}/run/$name.pid
mon data = {root}/mon
osd data = {root}/osd
[client.rgw]
rgw frontends = beast endpoint=127.0.0.1:{rgw_port} tcp_nodelay=1
keyring = {root}/none
"""


class CephFailed(Exception):
    """Ceph could not be installed or started: the message says which step, and the daemon's last words."""


@dataclass(frozen=True)
class CephRgw:
    """A gateway: what `s3_server.S3Server` offers, and one real fault."""

    endpoint: str
    bucket: str
    _cluster: "_Cluster"

    @property
    def options(self) -> dict[str, Any]:
        """For `shared.stores.open_store`."""
        return {"endpoint_url": self.endpoint, "key": ACCESS_KEY, "secret": SECRET_KEY}

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to reach the server by the usual environment."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        }

    def url(self, prefix: str) -> str:
        return f"s3://{self.bucket}/{prefix}"

    @contextlib.contextmanager
    def gateway_killed(self) -> Iterator[None]:
        """SIGKILL the gateway, whatever it is doing; start it again at the end. The cluster behind it stays up."""
        self._cluster.kill_gateway()
        try:
            yield
        finally:
            self._cluster.start_gateway()


def missing_packages() -> list[str]:
    """Which of the packages are not installed here."""
    return [package for package in PACKAGES if shutil.which(package, path=_path()) is None]  # named as their programs


def install() -> None:
    """Install what is missing with apt-get, and say so.

    Raises:
        CephFailed: no root, no apt-get, or apt-get failed.
    """
    missing = missing_packages()
    if not missing:
        print(f"{', '.join(PACKAGES)}: installed", flush=True)
        return
    command = ["apt-get", "install", "-y", "--no-install-recommends", *missing]
    if shutil.which("apt-get") is None:
        raise CephFailed(
            f"{', '.join(missing)} not installed, and no apt-get here: install Ceph's mon, osd and radosgw"
        )
    if os.geteuid() != 0:
        raise CephFailed(f"{', '.join(missing)} not installed, and only root can. Run: sudo {' '.join(command)}")
    print(f"installing Debian's {', '.join(missing)} (300 MB on disk)", flush=True)
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for step in (["apt-get", "update", "-q"], command):
        done = subprocess.run(step, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode != 0:
            raise CephFailed(f"{' '.join(step)} failed:\n{done.stdout[-2000:]}")


@contextlib.contextmanager
def running(root: Path | None = None, *, bucket: str = "lorasync", osd_bytes: int = 4 * GIB) -> Iterator[CephRgw]:
    """Start a cluster with a gateway and a bucket; at the end stop it and remove what it wrote.

    Args:
        root: an empty or absent directory on a file system with O_DIRECT; by default a temporary one.
        osd_bytes: how much it can hold; the file is sparse.

    Raises:
        CephFailed: not installed, or it did not start.
    """
    if missing := missing_packages():
        raise CephFailed(f"not installed: {', '.join(missing)}. As root: python -m tests.ceph_rgw --install")
    with tempfile.TemporaryDirectory(prefix="ceph-", dir=root and _made(root), ignore_cleanup_errors=True) as folder:
        cluster = _Cluster(Path(folder), osd_bytes)
        try:
            yield cluster.start(bucket)
        finally:
            cluster.stop()


class _Cluster:
    """The daemons of one cluster."""

    def __init__(self, root: Path, osd_bytes: int) -> None:
        self._root, self._rgw_port = root, _free_port()
        self._daemons: list[subprocess.Popen[bytes]] = []
        self._revivals = 0
        for name in ("mon", "osd", "run", "log"):
            (root / name).mkdir()
        self._fsid = str(uuid.uuid4())
        self._mon_port = _free_port()
        self._config = root / "ceph.conf"
        self._config.write_text(
            CONFIG.format(
                root=root, fsid=self._fsid, mon_port=self._mon_port, rgw_port=self._rgw_port, osd_bytes=osd_bytes
            )
        )

    def start(self, bucket: str) -> CephRgw:
        monmap, osd = str(self._root / "monmap"), str(uuid.uuid4())
        address = f"[v1:127.0.0.1:{self._mon_port}]"
        self._run("monmaptool", "--create", "--addv", "a", address, "--fsid", self._fsid, monmap)
        self._run("ceph-mon", "--mkfs", "-i", "a", "--monmap", monmap)
        self._daemon("ceph-mon", "-i", "a")
        self._run("ceph", "osd", "new", osd)
        self._run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", osd)
        self._daemon("ceph-osd", "-i", "0")
        user = ("--uid", "lorasync", "--display-name", "lorasync")
        keys = ("--access-key", ACCESS_KEY, "--secret-key", SECRET_KEY)
        self._run("radosgw-admin", "user", "create", *user, *keys)
        self.start_gateway()
        place = CephRgw(f"http://127.0.0.1:{self._rgw_port}", bucket, self)
        _make_bucket(place)
        return place

    def start_gateway(self) -> None:
        self._daemon("radosgw", "-n", "client.rgw")
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            try:
                socket.create_connection(("127.0.0.1", self._rgw_port), timeout=1).close()
                return
            except OSError:
                ended = [daemon.args for daemon in self._daemons if daemon.poll() is not None]
                if ended or time.monotonic() > deadline:
                    raise CephFailed(f"the gateway does not answer; ended: {ended}; {self._last_words()}") from None
                time.sleep(POLL_S)

    def kill_gateway(self) -> None:
        gateway = self._daemons.pop()
        gateway.kill()
        gateway.wait()

    def stop(self) -> None:
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in self._daemons:
            try:
                daemon.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def _run(self, program: str, *words: str) -> None:
        """Run a program to its end, keeping the daemons that it needs alive."""
        command, deadline = self._command(program, words), time.monotonic() + START_TIMEOUT_S
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=_environment())
        while True:
            try:
                told = process.communicate(timeout=POLL_S)[0].decode()
                break
            except subprocess.TimeoutExpired:
                self._revive()
                if time.monotonic() > deadline:
                    process.kill()
                    process.communicate()
                    problem = f"{' '.join(command)}: no end after {START_TIMEOUT_S:.0f} s"
                    raise CephFailed(f"{problem}; {self._last_words()}") from None
        if process.returncode != 0:
            raise CephFailed(f"{' '.join(command)}: exit code {process.returncode}\n{told[-2000:]}")

    def _daemon(self, program: str, *words: str) -> None:
        self._daemons.append(self._spawn(self._command(program, ("-f", *words))))

    def _spawn(self, command: Sequence[str]) -> subprocess.Popen[bytes]:
        """Start a daemon in the foreground; the kernel ends it when the thread that started it ends."""
        with (self._root / "log" / f"{Path(command[0]).name}.out").open("ab") as log:
            return subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=_environment(),
                preexec_fn=_end_with_parent,
            )

    def _revive(self) -> None:
        """Start again what ended: an OSD that asks before it has the monitor's map is told "wrong fsid" and ends."""
        for place, daemon in enumerate(self._daemons):
            if daemon.poll() is not None and self._revivals < MAX_REVIVALS:
                self._revivals += 1
                self._daemons[place] = self._spawn(cast(Sequence[str], daemon.args))

    def _command(self, program: str, words: Sequence[str]) -> list[str]:
        found = shutil.which(program, path=_path())
        if found is None:
            raise CephFailed(f"{program} is not installed")
        config = [] if program == "monmaptool" else ["-c", str(self._config)]
        return [found, *config, *words]

    def _last_words(self) -> str:
        logs = sorted((self._root / "log").glob("*"), key=lambda path: path.stat().st_mtime)
        return "".join(f"\n{path.name}: {path.read_text(errors='replace')[-600:]}" for path in logs[-3:])


def _make_bucket(place: CephRgw) -> None:
    import boto3  # moto brings it

    client = boto3.client(
        "s3",
        endpoint_url=place.endpoint,
        aws_access_key_id=ACCESS_KEY,
        aws_secret_access_key=SECRET_KEY,
        region_name="us-east-1",
    )
    client.create_bucket(Bucket=place.bucket)


def _path() -> str:
    return f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


def _environment() -> dict[str, str]:
    """Without our Python's: the `ceph` command is a Python program of the system's."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "CEPH", "VIRTUAL_ENV"))}


def _made(root: Path) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    return root


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


_LIBC = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1


def _end_with_parent() -> None:
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def main() -> None:
    parser = argparse.ArgumentParser(description="A single-node Ceph RGW on loopback, forgotten when it stops.")
    parser.add_argument("--dir", type=Path, help="where it keeps its files while it runs (default: a temporary one)")
    parser.add_argument("--install", action="store_true", help="install what is missing (root, apt-get), and end")
    parser.add_argument("--bucket", default="lorasync")
    parser.add_argument("--gib", type=int, default=4, help="how much it can hold (default: %(default)s)")
    options = parser.parse_args()
    try:
        if options.install:
            install()
            return
        with running(options.dir, bucket=options.bucket, osd_bytes=options.gib * GIB) as place:
            exports = " ".join(f"{name}={value}" for name, value in place.environment.items())
            print(f"Ceph RGW on {place.endpoint}, bucket {place.bucket}. In the other terminal:", flush=True)
            print(f"export {exports}", flush=True)
            signal.signal(signal.SIGTERM, signal.default_int_handler)
            with contextlib.suppress(KeyboardInterrupt):
                signal.pause()
    except CephFailed as error:
        sys.exit(f"ceph_rgw: {error}")


if __name__ == "__main__":
    main()
