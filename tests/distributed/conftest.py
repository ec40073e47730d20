"""A Ray cluster and an object store on this machine, for tests of many processes.

`make distributed` runs them; `make test` skips them with the reason. Every server listens on 127.0.0.1 alone and is
stopped by the ids of its processes.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from servers import Cluster, free_port, serving

HERE = Path(__file__).parent
REASON = "takes minutes, and needs Ray and moto; `make distributed` runs it"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not os.environ.get("LORATOOL_TEST_DISTRIBUTED"):
        for item in items:
            if HERE in item.path.parents:
                item.add_marker(pytest.mark.skip(reason=REASON))


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A Ray cluster of two cores, which is this machine."""
    home = Path(tempfile.mkdtemp(prefix="r", dir="/tmp"))  # short: names of sockets are limited
    port, client = free_port(), free_port()
    words = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--node-ip-address", "127.0.0.1"]
    words += ["--port", str(port), "--ray-client-server-port", str(client), "--num-cpus", "2", "--temp-dir", str(home)]
    words += ["--include-dashboard", "false", "--disable-usage-stats"]
    address = f"127.0.0.1:{port}"
    # which has Ray keep to the loopback address that it is given, and ask for no token where one was made here before
    settings = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_AUTH_MODE": "disabled"}
    try:
        with serving(words, client, **settings) as server:
            yield Cluster(address, f"ray://127.0.0.1:{client}", {**settings, "RAY_ADDRESS": address}, server)
    finally:
        shutil.rmtree(home, ignore_errors=True)


@pytest.fixture(scope="session")
def object_store() -> Iterator[str]:
    """The address of an empty object store."""
    port = free_port()
    with serving([sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], port):
        yield f"http://127.0.0.1:{port}"
