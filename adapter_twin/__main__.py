"""Run the command line as ``python -m adapter_twin``."""

from adapter_twin.cli import main

if __name__ == "__main__":
    main()
