"""A process that does nothing but stand for election as the relay: `python -m tests.support.apps.relaying NAME`."""

from __future__ import annotations

import logging
import signal
import sys
import threading

from veltrix_mw import ConfigClient

if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s.%(msecs)03d %(message)s", datefmt="%T")
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    with ConfigClient(relay="auto", instance=sys.argv[1]):
        ended.wait()
