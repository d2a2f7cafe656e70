"""Python imports this at its start where PYTHONPATH names this folder: files that another rank than 0 writes are told.

WATCHED is a part of their path.
"""

import os
import sys


def tell(event: str, arguments: tuple[object, ...]) -> None:
    """Print a line for every file below WATCHED that is opened for writing on a rank other than 0."""
    if event == "open" and isinstance(arguments[0], str) and os.environ.get("WATCHED", "?") in arguments[0]:
        writes = int(arguments[2]) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)  # pyright: ignore[reportArgumentType]
        if writes and os.environ.get("RANK", "0") != "0":
            os.write(2, f"WROTE {arguments[0]}\n".encode())


sys.addaudithook(tell)
