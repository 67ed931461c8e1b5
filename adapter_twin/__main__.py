"""The command ``adapter-twin``, also ``python -m adapter_twin``."""

import sys


def main() -> None:
    """Run the command line; Ctrl-C is one line even while it loads."""
    try:
        from adapter_twin.cli import main as run

        run()
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
