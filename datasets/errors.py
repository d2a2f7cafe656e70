"""The error for data that cannot be used, and the part of its cause that fits into its one line."""


class DataError(Exception):
    """Data that is missing, damaged or does not fit. One line for the user; `exit_code` is what the process returns."""

    kind, exit_code = "data", 3


def first_line(error: Exception) -> str:
    """The first line of an error's message, or the name of its type."""
    return str(error).strip().split("\n")[0] or type(error).__name__
