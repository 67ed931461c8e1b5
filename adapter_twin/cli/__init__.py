"""The command line. Each verb imports what it needs, so that ``--help`` stays quick."""

import _thread
import atexit
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Sequence
from io import StringIO
from typing import Annotated, Any, NoReturn

import typer
from typer import Option, Typer

from adapter_twin import __version__
from adapter_twin.cli import measure_verbs, plan_verbs, predict_verbs, report
from adapter_twin.errors import AdapterTwinError, one_line

DEBUG = "ADAPTER_TWIN_DEBUG"
"""With this variable set, what no one foresaw is shown with its traceback."""

LONGEST_LINE = 600
"""A line about an error is cut to this many characters."""

app = Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="A digital twin of a GPU that serves many LoRA adapters with vLLM.",
)
for group in (predict_verbs, plan_verbs, measure_verbs):
    app.add_typer(group.verbs)


_shown: set[str] = set()
_show_unraisable = sys.unraisablehook


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit; bad input is one line on stderr and status 2.

    With ``--json`` stdout holds JSON whatever happens: the same line as ``error.message``. A fault
    of our own is one line, too, and status 1; `DEBUG` shows where it is.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    sys.stdout, sys.stderr = (one or StringIO() for one in (sys.stdout, sys.stderr))  # closed: None
    warnings.showwarning = _show_warning
    sys.unraisablehook = _interrupt_again
    _shown.clear()
    logging.basicConfig(format="%(message)s", force=True)
    logging.getLogger("adapter_twin").setLevel(logging.INFO)
    # Asked to end, a command ends as by Ctrl-C: worker processes and servers are taken along.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)  # what is done is not interrupted
    command: Any = typer.main.get_command(app)
    try:
        status = command(args=arguments, prog_name="adapter-twin", standalone_mode=False)
        if status == 130:  # typer's answer to Ctrl-C, without a word
            raise KeyboardInterrupt
    except AdapterTwinError as error:
        status = _fail(str(error), 2, arguments)
    except typer.TyperException as error:
        # Without arguments the message is the help text, which typer has printed.
        status = _fail(error.format_message(), 2, arguments) if error.format_message() else 2
    except (KeyboardInterrupt, typer.Abort):
        status = _fail("interrupted", 130, arguments)
    except OSError as error:
        file = "output" if error.filename is None else error.filename
        status = _fail(f"{file}: {error.strerror or error}; give another", 2, arguments)
    except Exception as error:
        if _is_interrupt(error):
            status = _fail("interrupted", 130, arguments)
        elif os.environ.get(DEBUG):
            raise
        else:
            status = _fail(f"{_unforeseen(error)}; {DEBUG}=1 shows where", 1, arguments)
    sys.exit(status if isinstance(status, int) else 0)


def _is_interrupt(error: BaseException | None) -> bool:
    """Return whether Ctrl-C is behind an error, as where compiled code was stopped."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def _interrupt_again(lost: Any) -> None:
    """Interrupt once more where Ctrl-C came in a finalizer, out of which nothing is raised."""
    if isinstance(lost.exc_value, KeyboardInterrupt):
        threading.Timer(0.01, _thread.interrupt_main).start()  # when this has returned
    else:
        _show_unraisable(lost)


def _unforeseen(error: Exception) -> str:
    """Return what to do about an error that no check has caught."""
    if isinstance(error, MemoryError) or type(error).__name__ == "TerminatedWorkerError":
        return "the memory of this machine does not suffice; ask for less, or give fewer --jobs"
    return f"a fault of adapter-twin, please report it ({type(error).__name__}: {one_line(error)})"


def _fail(message: str, status: int, arguments: Sequence[str]) -> int:
    message = one_line(message, LONGEST_LINE)
    print("error:", message, file=sys.stderr)
    if "--json" in arguments:
        report.print_json({"error": {"message": message}})
    return status


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    line = one_line(message, LONGEST_LINE)
    if line not in _shown:
        _shown.add(line)
        print("warning:", line, file=sys.stderr)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def leading_options(
    version: Annotated[
        bool,
        Option("--version", callback=_print_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Take the options that stand before a verb."""
