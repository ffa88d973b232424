"""One rank of one writer: `torch.distributed.run … -m tests.formats.run NAME DIRECTORY`."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.formats import writer_of


def main() -> None:
    """Train and save."""
    name, directory = sys.argv[1], Path(sys.argv[2])
    directory.mkdir(parents=True, exist_ok=True)
    writer_of(name).write(name, directory)


if __name__ == "__main__":
    main()
