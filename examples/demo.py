"""The demo, as `make demo` runs it; `veltrix demo` is the same.

What it plays is `veltrix_mw.cli.demo`, so that an installed package has it too.
"""

from __future__ import annotations

import sys

from veltrix_mw.cli import main

if __name__ == "__main__":
    main(["demo", *sys.argv[1:]], prog_name="veltrix")
