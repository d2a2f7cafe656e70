"""The error for data that cannot be used."""


class DataError(Exception):
    """Data that is missing, damaged or does not fit. One line for the user; `exit_code` is what the process returns."""

    kind, exit_code = "data", 3
