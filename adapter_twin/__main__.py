"""Run the command line as ``python -m adapter_twin``."""

from adapter_twin.cli import app

if __name__ == "__main__":
    app(prog_name="adapter-twin")
