"""What the other tests stand on: the servers answer on this machine alone, and are gone afterwards."""

from __future__ import annotations

import urllib.request
from pathlib import Path

from servers import Cluster, descendants


def test_the_store_answers(object_store: str) -> None:
    with urllib.request.urlopen(object_store, timeout=10) as answer:
        assert answer.status == 200


def test_the_cluster_listens_on_this_machine_alone(cluster: Cluster) -> None:
    """Every listening socket of Ray's processes is bound to the loopback address."""
    ours = {cluster.server.pid, *descendants(cluster.server.pid)}
    listening = {}
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[3] == "0A":
            listening[fields[9]] = fields[1].partition(":")[0]
    found = set()
    for pid in ours:
        try:
            links = [link.readlink().name for link in Path(f"/proc/{pid}/fd").iterdir()]
        except OSError:
            continue
        found |= {listening[link[8:-1]] for link in links if link.startswith("socket:[") and link[8:-1] in listening}
    assert found == {"0100007F"}
