"""The one exception that a user's input can cause."""


class AdapterTwinError(ValueError):
    """Bad input: a one-line message that names the field and the remedy.

    The command line prints the message and exits with status 2.
    """
