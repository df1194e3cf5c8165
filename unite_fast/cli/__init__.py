"""The command `unite-fast`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from typer.core import TyperCommand

from unite_fast.cli.analyze import analyze
from unite_fast.cli.compare import compare, reference
from unite_fast.cli.console import error, out, plain
from unite_fast.cli.data import app as data
from unite_fast.cli.evaluate import evaluate
from unite_fast.cli.images import reconstruct, tokenize
from unite_fast.cli.models import export, import_
from unite_fast.cli.plan import plan
from unite_fast.cli.profile import profile
from unite_fast.cli.report import report
from unite_fast.cli.sample import sample
from unite_fast.cli.watch import watch
from unite_fast.errors import UserError

# The base of what typer raises for a wrong command line: click's class, which newer releases of typer carry inside.
UsageError = typer.BadParameter.__base__

app = typer.Typer(
    name="unite-fast",
    help="Train UNITE, one network that tokenizes and generates images, and use what was trained.\n\n"
    "Begin with `unite-fast doctor`, which shows what this machine offers, then train a configuration from "
    "the folder configs/. Each command explains itself: `unite-fast sample --help`.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)


class TrainCommand(TyperCommand):
    """Lets one --set take several values, as `unite_fast/train.py` does."""

    def parse_args(self, context, arguments: list[str]) -> list[str]:
        expanded: list[str] = []
        inside = False
        for argument in arguments:
            if argument == "--set":
                inside = True
            elif argument.startswith("-"):
                inside = False
            elif inside and expanded[-1] != "--set":
                expanded.append("--set")
            expanded.append(argument)
        return super().parse_args(context, expanded)


@app.command(cls=TrainCommand)
def train(
    config: Annotated[Path, typer.Option(help="JSON configuration, see the folder configs/.", metavar="FILE")],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", help="Override one or more keys of the configuration.", metavar="KEY=VALUE …"),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the run's newest checkpoint, if any.")
    ] = False,
) -> None:
    """Train a model on class folders of images, or on molecules.

    Everything is written to RUNS/NAME of the configuration: checkpoints, records, pictures, the exported model.
    Ctrl-C saves and ends; `--resume` continues. On several GPUs start `unite_fast/train.py` with
    deepspeed or torchrun instead; it takes the same options.

    Example: `unite-fast train --config configs/quickstart.json --set name=short train.steps=200`
    """
    from unite_fast.config import Config
    from unite_fast.train import prepare_process

    parsed = Config.load(config, overrides or ())
    prepare_process()
    from unite_fast.engine.loop import train as run  # imports torch: a bad configuration fails before that

    run(parsed, resume=resume)


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Show which accelerations are active here, what each missing one costs, and how to get it.

    Nothing is built or installed.
    """
    from rich.table import Table

    from unite_fast.doctor import PACKAGES, examine
    from unite_fast.versions import versions

    findings = examine()
    if as_json:
        typer.echo(json.dumps({"parts": [vars(f) for f in findings], "versions": versions(*PACKAGES)}, indent=2))
        return
    table = Table(title="accelerations", title_justify="left")
    table.add_column("", no_wrap=True)
    table.add_column("state", no_wrap=True)
    table.add_column("what is here", ratio=2, overflow="fold")
    for finding in findings:
        table.add_row(
            finding.name, "[green]active[/]" if finding.active else "[yellow]missing[/]", plain(finding.detail)
        )
    out().print(table)
    missing = [finding for finding in findings if not finding.active]
    if missing:
        table = Table(title="what is missing", title_justify="left", show_lines=True)
        table.add_column("", no_wrap=True)
        table.add_column("without it", ratio=1, overflow="fold")
        table.add_column("how to get it", ratio=1, overflow="fold")
        for finding in missing:
            table.add_row(finding.name, plain(finding.cost), plain(finding.remedy))
        out().print(table)
    out().print("versions: " + ", ".join(f"{name} {version}" for name, version in versions(*PACKAGES).items()))


app.command()(sample)
app.command()(reconstruct)
app.command()(tokenize)
app.command()(report)
app.command()(watch)
app.command("import", cls=TrainCommand)(import_)
app.command()(export)
app.command()(evaluate)
app.command()(reference)
app.command()(compare)
app.command()(analyze)
app.command(cls=TrainCommand)(plan)
app.command(cls=TrainCommand)(profile)
app.add_typer(data, name="data")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: without the program's name; None takes the process's own.

    Returns:
        Exit code: 0, 2 for a mistake of the user's, told in one line on stderr, 130 after Ctrl-C.
    """
    try:
        return app(arguments, prog_name="unite-fast", standalone_mode=False) or 0
    except UserError as mistake:
        error(str(mistake))
    except UsageError as mistake:
        # Empty where no command was given: typer has printed the help.
        message = _unless_run(mistake) or mistake.format_message().replace("Value error, ", "")
        if message:
            error(f"{message} (see {_help_of(mistake)})")
    except KeyboardInterrupt:
        return 130
    except OSError as problem:
        error(f"{problem.filename}: {problem.strerror}" if problem.filename else str(problem))
    return 2


def _unless_run(mistake) -> str | None:
    """What to say of --run to a command that takes RUN alone, as those about a run do; None of other mistakes."""
    if getattr(mistake, "option_name", None) != "--run" or mistake.ctx is None:
        return None
    command = mistake.ctx.command
    takes = any(parameter.metavar in ("RUN", "RUN…") for parameter in command.params)
    return f"{command.name} takes the run without --run: unite-fast {command.name} RUN" if takes else None


def _help_of(mistake) -> str:
    context = getattr(mistake, "ctx", None)
    return f"{context.command_path if context else 'unite-fast'} --help"
