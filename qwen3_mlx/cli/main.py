"""The `qwen3` command: verbs, and the obvious thing without one."""

import io
import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup
from typer.exceptions import TyperException

from qwen3_mlx import interrupt
from qwen3_mlx.cli.ask import ask
from qwen3_mlx.cli.bench import bench
from qwen3_mlx.cli.chat import chat
from qwen3_mlx.cli.convert import convert
from qwen3_mlx.cli.doctor import doctor
from qwen3_mlx.cli.error_wording import WrongUsage, in_options, usage, verb_meant
from qwen3_mlx.cli.evaluate import app as evaluate
from qwen3_mlx.cli.plan import plan
from qwen3_mlx.cli.serve import serve
from qwen3_mlx.errors import Qwen3Error
from qwen3_mlx.version import __version__


class _Root(TyperGroup):
    """A group whose first word need not be a verb: anything else is a prompt."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        first = args[0] if args else ""
        if not args and sys.stdin.isatty():
            args = ["--help"]
        elif first not in self.commands and first not in ("--help", "-h", "--version"):
            self._refuse_typo(first)
            args = ["ask", *args]
        return super().parse_args(ctx, args)

    def _refuse_typo(self, first: str) -> None:
        """Refuse a first word by which a verb was probably meant."""
        if meant := verb_meant(first, [name for name in self.commands if name != "ask"]):
            raise WrongUsage(
                f"there is no verb {first!r}; did you mean qwen3 {meant}? As a prompt: "
                f"qwen3 -- {first}, and several words in quotes"
            )

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:  # of which typer would make an exit without a word
            raise typer.Exit(_complain(interrupt.LINE, 130)) from None

    def format_help(self, ctx: Any, formatter: Any) -> None:
        self._teaching = True
        super().format_help(ctx, formatter)

    def get_params(self, ctx: Any) -> list[Any]:
        """Show the prompt's options in the help of the whole, where people look for them."""
        own = super().get_params(ctx)
        return [*self.commands["ask"].params, *own] if self._teaching else own

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        return ["[OPTIONS] [PROMPT] | COMMAND ..."]

    _teaching = False


app = typer.Typer(
    cls=_Root,
    add_completion=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["--help", "-h"]},
)
app.command("ask", hidden=True, context_settings={"allow_extra_args": True})(ask)
app.command("chat")(chat)
app.command("convert")(convert)
app.command("plan")(plan)
app.command("serve")(serve)
app.command("bench")(bench)
app.command("doctor")(doctor)
app.add_typer(evaluate, name="eval")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"qwen3-mlx {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Talk to Qwen3 on this machine.

    [bold]qwen3 "Why is the sky blue?"[/bold]   asks; the answer is all that goes to stdout.
    [bold]cat notes.txt | qwen3 "Summarise this"[/bold]   piped text joins the prompt.
    [bold]qwen3 --model 8B --no-thinking "Hello"[/bold]   another model, without thinking.

    Without --model (or QWEN3_MODEL) a tiny embedded demo model answers: it adds, repeats, counts
    and reverses.
    """


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line; every failure is one line on stderr and a non-zero exit."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by the caller: else the next file takes its place
            setattr(sys, name, open(os.devnull, mode))
    if isinstance(sys.stdout, io.TextIOWrapper):  # an answer outlives a narrow terminal encoding
        sys.stdout.reconfigure(errors="replace")
    # The hub's library speaks of what it does; what matters of that is said by our own errors.
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    try:
        code = app(args=args, prog_name="qwen3", standalone_mode=False)
    except TyperException as error:  # wrong usage
        code = _complain(usage(error), error.exit_code)
    except (Qwen3Error, ValueError, TypeError) as error:
        code = _complain(in_options(str(error), _keywords()), 1)
    except KeyboardInterrupt:
        code = 130
    except OSError as error:  # a full disk under our stdout, say
        code = _complain(str(error), 1)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is buffered cannot be written either
    except Exception as error:
        if os.environ.get("QWEN3_DEBUG"):
            raise
        code = _complain(f"{type(error).__name__}: {error} (a bug? QWEN3_DEBUG=1 shows where)", 1)
    sys.exit(code)


def _keywords() -> set[str]:
    """Return the keywords of the library that are options of a verb, by the same name."""
    group: Any = typer.main.get_command(app)
    return {option.name for verb in group.commands.values() for option in verb.params}


def _complain(message: str, code: int) -> int:
    typer.echo(f"qwen3: {' '.join(message.split())}", err=True)
    return code
