"""kill -9 of a publishing process, at every boundary of the protocol: readers keep the last whole version.

A real process publishes version 0 and then dies by SIGKILL while it publishes version 1, at a moment that the test
names. What it leaves must be invisible, the earlier version whole and latest, and the next life must go on.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
import synthetic

from publisher.convert import convert
from shared.catalog import Catalog
from shared.fetch import fetch
from shared.local_store import LocalStore
from shared.stores import open_store
from shared.versions import Version

MOMENTS = {  # what has become durable of version 1 when the process dies -> the version that is the latest then
    "half a shard": Version(1, 0),
    "the shard": Version(1, 0),
    "the record": Version(1, 0),
    "the manifest": Version(1, 1),
}


class Deadly(LocalStore):
    """Kills its own process at a moment of version 1."""

    def __init__(self, url: str, moment: str) -> None:
        super().__init__(url)
        self.moment = moment

    def _die_if(self, moment: str, key: str) -> None:
        if self.moment == moment and "-000000000001" in key:
            os.kill(os.getpid(), signal.SIGKILL)

    def put_stream(self, key: str, chunks: Iterable[bytes | memoryview], size: int) -> None:
        def halved() -> Iterable[bytes | memoryview]:
            for chunk in chunks:
                yield chunk[: len(chunk) // 2]
                self._die_if("half a shard", key)
                yield chunk[len(chunk) // 2 :]

        super().put_stream(key, halved(), size)
        self._die_if("the shard", key)

    def put(self, key: str, content: bytes) -> None:
        super().put(key, content)
        if "/rank-" in key:
            self._die_if("the record", key)

    def put_if_absent(self, key: str, content: bytes) -> bool:
        written = super().put_if_absent(key, content)
        self._die_if("the manifest", key)
        return written


def publish_until_killed(url: str, base: Path, moment: str) -> None:
    """What the child process runs."""
    publisher = synthetic.open_publisher(Deadly(url, moment), base)
    for number in range(2):
        publisher.submit(number, convert(synthetic.BASE, synthetic.factors(number)), training={"step": number})
    publisher.close()


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_kill_in_mid_publish_leaves_the_last_whole_version_the_latest(tmp_path: Path, moment: str):
    url, base = str(tmp_path / "store"), synthetic.write_base(tmp_path / "base")
    command = [sys.executable, __file__, url, str(base), moment]
    child = subprocess.run(command, timeout=60, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert child.returncode == -signal.SIGKILL, child.stderr

    store = open_store(url)
    catalog, latest = Catalog(store, synthetic.ADAPTER), MOMENTS[moment]
    assert catalog.newest() == latest
    hint = catalog.hint()
    assert hint is not None and hint[0] == Version(1, 0)  # it may lag, never lead
    for version in catalog.versions():
        manifest = catalog.manifest(version)
        fetch(store, manifest, synthetic.EXPECTED, tmp_path / str(version), base_name="base")

    manifest = synthetic.publish(store, base, parent=catalog.manifest(latest))[0]
    assert catalog.newest() == manifest.version == Version(2, 0)
    assert manifest.parent is not None and manifest.parent.version == latest


if __name__ == "__main__":
    publish_until_killed(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
