"""The one exception that a user's input can cause, and reasons in one line."""

LONGEST_REASON = 300


def one_line(reason: object, longest: int = LONGEST_REASON) -> str:
    r"""Return an error or a text as one line that fits into a table, and harms no terminal.

    >>> one_line("a\x1b[2J\nb")
    'a\\x1b[2J b'
    """
    line = " ".join(str(reason).split()) or type(reason).__name__
    line = line if len(line) <= longest else f"{line[: longest - 3]}..."
    return "".join(one if one.isprintable() else ascii(one)[1:-1] for one in line)


class AdapterTwinError(ValueError):
    """Bad input: a one-line message that names the field and the remedy.

    The command line prints the message and exits with status 2.
    """


def require(holds: bool, message: str) -> None:
    """Raise `AdapterTwinError` with `message` unless the condition holds."""
    if not holds:
        raise AdapterTwinError(message)
