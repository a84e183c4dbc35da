"""A process that follows, and then forks four children that follow too: `python -m tests.support.apps.forking`.

Each child prints a line of JSON for each value of `checkout/max_items` that it sees, and ends at "end".
"""

from __future__ import annotations

import json
import os
import threading

from veltrix_mw import ConfigClient

KEY = "checkout/max_items"


def child(client: ConfigClient) -> None:
    client.wait_ready(20)
    seen, never = object(), threading.Event()
    while seen != "end":
        snapshot = client.snapshot
        if snapshot[KEY] != seen:
            seen = snapshot[KEY]
            told = {"pid": os.getpid(), "value": seen, "revision": snapshot.revision}
            os.write(1, json.dumps(told).encode() + b"\n")
        never.wait(0.01)
    client.close()


if __name__ == "__main__":
    client = ConfigClient()
    client.start()
    client.wait_ready(20)
    children = []
    for _ in range(4):
        pid = os.fork()
        if not pid:
            child(client)
            os._exit(0)
        children.append(pid)
    for pid in children:
        os.waitpid(pid, 0)
    client.close()
