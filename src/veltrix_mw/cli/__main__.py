"""`python -m veltrix_mw.cli`: the command `veltrix`, where its script is not on the path."""

from __future__ import annotations

from veltrix_mw.cli import main

if __name__ == "__main__":
    main(prog_name="veltrix")
