"""`rest prepare` on a cluster of two machines of one core each, in an own process; and a detector
that crashes.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import numpy as np

from rest_lightning.media.faces import Face


class Crashing:
    """Finds one face in the middle of every picture, and ends processes over certain videos.

    ``crash*`` ends the process that decodes it, each time. ``lost*`` ends Ray's worker above it,
    once: as if its machine had gone. ``MARKER`` in the environment is where it remembers that;
    without it, nothing is lost.
    """

    def __init__(self, source: Path, min_confidence: float) -> None:
        self.name = source.name

    def detect(self, picture: np.ndarray, time_s: float) -> list[Face]:
        if self.name.startswith("crash"):
            os.kill(os.getpid(), signal.SIGKILL)
        marker = os.environ.get("MARKER")
        if self.name.startswith("lost") and marker and not Path(marker).exists():
            Path(marker).touch()
            os.kill(os.getppid(), signal.SIGKILL)
            time.sleep(60)
        height, width = picture.shape[:2]
        x, y, side = 0.3 * width, 0.3 * height, 0.4 * height
        corners = np.array([[x, y], [x + side, y], [x, y + side], [x + side, y + side]])
        eyes, below = corners[:2] + side * np.array([[0.1, 0.3], [-0.1, 0.3]]), corners[2:].mean(0)
        middle = corners.mean(0)
        return [
            Face((x, y, side, side), corners, eyes[0], eyes[1], below - [0, 0.2 * side], middle)
        ]

    def close(self) -> None:
        """Nothing to release."""


def main() -> int:
    """Run the command line's words on the cluster."""
    os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0")
    from ray.cluster_utils import Cluster

    machine = {"num_cpus": 1, "node_ip_address": "127.0.0.1", "object_store_memory": 80_000_000}
    for trial in range(3):
        try:
            cluster = Cluster(
                initialize_head=True, head_node_args={**machine, "include_dashboard": False}
            )
            cluster.add_node(**machine)
            break
        except Exception:  # on a busy machine, Ray's own 30 s for a start may not be enough
            if trial == 2:
                raise
    os.environ["RAY_ADDRESS"] = cluster.address
    from rest_lightning.cli import main as rest

    try:
        return rest(sys.argv[1:])
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    sys.exit(main())
