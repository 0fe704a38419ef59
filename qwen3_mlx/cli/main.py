"""Entry point of the `qwen3` command: its subcommands, and a prompt without one."""

import io
import os
import sys
from collections.abc import Sequence
from itertools import takewhile
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
from qwen3_mlx.cli.embed import embed, rerank
from qwen3_mlx.cli.error_wording import (
    UsageError,
    closest_command,
    of_the_system,
    usage,
    with_option_names,
)
from qwen3_mlx.cli.evaluate import app as evaluate
from qwen3_mlx.cli.follow import follow
from qwen3_mlx.cli.logs import app as logs
from qwen3_mlx.cli.models import list_models, pull, rm
from qwen3_mlx.cli.plan import plan
from qwen3_mlx.cli.ps import ps
from qwen3_mlx.cli.recording import ContinuingCommand
from qwen3_mlx.cli.serve import serve
from qwen3_mlx.cli.show import show
from qwen3_mlx.cli.show_config import config
from qwen3_mlx.cli.tune import tune
from qwen3_mlx.errors import Qwen3Error
from qwen3_mlx.version import __version__

_MOST_OF_A_COMMAND = 2  # words before the options, such as plan 8B; more are probably a prompt
_OWN_OPTIONS = ("--help", "-h", "--version", "--install-completion", "--show-completion")


class _Root(TyperGroup):
    """Command group in which a first argument that is no subcommand is a prompt."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        first = args[0] if args else ""
        if not args and ctx.resilient_parsing:  # a shell completes the first word
            pass
        elif not args and sys.stdin.isatty():
            args = ["--help"]
        elif first not in self.commands and first not in _OWN_OPTIONS:
            if not ctx.resilient_parsing:
                self._refuse_typo([*takewhile(lambda word: not word.startswith("-"), args)])
            args = ["ask", *args]
        return super().parse_args(ctx, args)

    def _refuse_typo(self, words: Sequence[str]) -> None:
        """Refuse words of which the first is probably a misspelt subcommand."""
        commands = [name for name in self.commands if name != "ask"]
        if not words or not (meant := closest_command(words[0], commands)):
            return
        prompt = f'qwen3 "{" ".join(words)}"' if len(words) > 1 else f"qwen3 -- {words[0]}"
        if len(words) > _MOST_OF_A_COMMAND:
            raise UsageError(f"put the prompt in quotes: {prompt}; or did you mean qwen3 {meant}?")
        raise UsageError(
            f"there is no command {words[0]!r}; did you mean qwen3 {meant}? "
            f"To send it as a prompt: {prompt}"
        )

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:  # typer would exit without a message
            raise typer.Exit(_print_error(interrupt.LINE, 130)) from None
        except typer.Abort:  # Ctrl-D at a question
            raise typer.Exit(1) from None

    def format_help(self, ctx: Any, formatter: Any) -> None:
        self._shows_all = True
        super().format_help(ctx, formatter)

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the group's options; for help and shells, those of the hidden `ask` as well."""
        own = super().get_params(ctx)
        return [*self.commands["ask"].params, *own] if self._shows_all else own

    def shell_complete(self, ctx: Any, incomplete: str) -> list[Any]:
        self._shows_all = True
        return super().shell_complete(ctx, incomplete)

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        return ["[OPTIONS] [PROMPT] | COMMAND ..."]

    _shows_all = False


app = typer.Typer(
    cls=_Root,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["--help", "-h"]},
)
app.command("ask", cls=ContinuingCommand, hidden=True, context_settings={"allow_extra_args": True})(
    ask
)
app.command("chat", cls=ContinuingCommand)(chat)
app.command("convert")(convert)
app.command("plan")(plan)
app.command("serve")(serve)
app.command("list")(list_models)
app.command("pull")(pull)
app.command("rm")(rm)
app.command("show")(show)
app.command("ps")(ps)
app.command("embed")(embed)
app.command("rerank")(rerank)
app.command("bench")(bench)
app.command("tune")(tune)
app.command("follow")(follow)
app.command("doctor")(doctor)
app.add_typer(evaluate, name="eval")
app.add_typer(logs, name="logs")
app.command("config")(config)


def _show_version(requested: bool) -> None:
    if requested:
        typer.echo(f"qwen3-mlx {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """Run Qwen3 language models on this machine.

    [bold]qwen3 "Why is the sky blue?"[/bold]   stream the answer; only it goes to stdout.
    [bold]cat notes.txt | qwen3 "Summarise this"[/bold]   append piped text to the prompt.
    [bold]qwen3 --model 8B --no-thinking "Hello"[/bold]   use another model, without thinking.

    Without --model or QWEN3_MODEL, a tiny embedded demo model answers:
    it adds, repeats, counts and reverses.
    """


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line; every failure is one line on stderr and a non-zero exit code."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        # A stream that the caller closed is None, and the next file opened would take its number.
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))
    # A character that the terminal's encoding lacks must not end the answer.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    # huggingface_hub logs its progress; our own errors report what matters of that.
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    try:
        code = app(args=args, prog_name="qwen3", standalone_mode=False)
    except TyperException as error:  # wrong usage
        code = _print_error(usage(error), error.exit_code)
    except (Qwen3Error, ValueError, TypeError) as error:
        message = with_option_names(str(error), _keywords())
        # A value that its option does not take is wrong usage, wherever that is found out.
        is_usage = not isinstance(error, Qwen3Error) and message.startswith("--")
        code = _print_error(message, 2 if is_usage else 1)
    except KeyboardInterrupt:
        code = 130
    except OSError as error:  # such as a full disk under stdout
        code = _print_error(of_the_system(error), 1)
        # The interpreter flushes stdout at exit, which would fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    except Exception as error:
        if os.environ.get("QWEN3_DEBUG"):
            raise
        message = f"{type(error).__name__}: {error} (a bug? QWEN3_DEBUG=1 shows where)"
        code = _print_error(message, 1)
    sys.exit(code)


def _keywords() -> set[str]:
    """Return the library's keywords that are options of a subcommand, under the same name."""
    group: Any = typer.main.get_command(app)
    return {
        param.name
        for command in group.commands.values()
        for param in command.params
        if param.param_type_name == "option"
    }


def _print_error(message: str, code: int) -> int:
    typer.echo(f"qwen3: {' '.join(message.split())}", err=True)
    return code
