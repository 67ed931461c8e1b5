"""The one exception that a user's input can cause, and reasons in one line."""

LONGEST_REASON = 300


def one_line(reason: object) -> str:
    """Return an error or a text as one line that fits into a table."""
    line = " ".join(str(reason).split()) or type(reason).__name__
    return line if len(line) <= LONGEST_REASON else f"{line[: LONGEST_REASON - 3]}..."


class AdapterTwinError(ValueError):
    """Bad input: a one-line message that names the field and the remedy.

    The command line prints the message and exits with status 2.
    """


def require(holds: bool, message: str) -> None:
    """Raise `AdapterTwinError` with `message` unless the condition holds."""
    if not holds:
        raise AdapterTwinError(message)
