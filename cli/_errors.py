"""Errors → one clear line on stderr and an exit code."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from bshub.errors import BshubError, printable

INTERRUPTED = 130


@contextmanager
def reported(debug: bool) -> Iterator[None]:
    """Turn what a command raises into a message and an exit code; ``debug`` shows the traceback instead."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo("bshub: interrupted; nothing was left behind", err=True)
        raise typer.Exit(INTERRUPTED) from None
    except BshubError as error:
        if debug:
            raise
        typer.echo(f"bshub: {error.message}", err=True)
        if error.hint:
            typer.echo(f"       {error.hint}", err=True)
        raise typer.Exit(error.exit_code) from None
    except (typer.Exit, typer.Abort):
        raise
    except BrokenPipeError:
        sys.stderr.close()
        raise typer.Exit(2) from None
    except Exception as error:
        if debug:
            raise
        typer.echo(f"bshub: unexpected {type(error).__name__}: {printable(error)}", err=True)
        typer.echo("       run again with --debug for the traceback", err=True)
        raise typer.Exit(2) from None
