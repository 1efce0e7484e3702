"""Errors → one clear line on stderr and an exit code."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from bshub.errors import BshubError, printable, redacted

INTERRUPTED = 130


@contextmanager
def reported(debug: bool) -> Iterator[None]:
    """Turn what a command raises into a message and an exit code; ``debug`` shows the traceback instead.

    Neither shows a token, whatever a server or a library put into its error.
    """
    try:
        yield
    except KeyboardInterrupt:
        typer.echo("bshub: interrupted; nothing was left behind", err=True)
        raise typer.Exit(INTERRUPTED) from None
    except BshubError as error:
        if debug:
            _show_traceback(error)
        else:
            typer.echo(f"bshub: {redacted(error.message)}", err=True)
            if error.hint:
                typer.echo(f"       {redacted(error.hint)}", err=True)
        raise typer.Exit(error.exit_code) from None
    except (typer.Exit, typer.Abort):
        raise
    except BrokenPipeError:
        sys.stderr.close()
        raise typer.Exit(2) from None
    except Exception as error:
        if debug:
            _show_traceback(error)
        else:
            typer.echo(f"bshub: unexpected {type(error).__name__}: {redacted(printable(error))}", err=True)
            typer.echo("       run again with --debug for the traceback", err=True)
        raise typer.Exit(2) from None


def _show_traceback(error: Exception) -> None:
    lines = redacted("".join(traceback.format_exception(error))).splitlines()
    typer.echo("\n".join(printable(line, 2000) for line in lines), err=True)
