"""The error for data that cannot be used."""

import struct
import zlib

# What the readers of foreign formats raise for files that are damaged, cut off or of no such format at all
DAMAGED = (OSError, ValueError, SyntaxError, EOFError, LookupError, TypeError, AttributeError, ArithmeticError,
           MemoryError, struct.error, zlib.error)


class DataError(Exception):
    """Data that is missing, damaged or does not fit. One line for the user; `exit_code` is what the process returns."""
    kind, exit_code = "data", 3
