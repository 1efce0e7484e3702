"""The app. Nothing heavy is imported before a command runs: ``bshub --help`` stays fast."""

from __future__ import annotations

import typer

from bshub import __version__
from bshub_cli.attack import attack
from bshub_cli.bench import bench
from bshub_cli.doctor import doctor
from bshub_cli.evaluate import evaluate
from bshub_cli.export import export
from bshub_cli.fleet import fleet
from bshub_cli.gate import gate
from bshub_cli.publish import publish
from bshub_cli.sanitize import sanitize
from bshub_cli.scan import scan
from bshub_cli.verify import verify

app = typer.Typer(
    name="bshub",
    help="Find the filters of a CNN that could carry a backdoor, remove them, repair the network, prove the result.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"bshub {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: bool = typer.Option(False, "--version", help="Show the version.", callback=_version, is_eager=True),
) -> None:
    """Exit codes: 0 pass, 1 a check failed, 2 usage or runtime error, 3 inconclusive."""


app.command()(sanitize)
app.command()(scan)
app.command()(evaluate)
app.command()(export)
app.command()(publish)
app.command()(attack)
app.command()(bench)
app.command()(fleet)
app.command()(gate)
app.command()(verify)
app.command()(doctor)
