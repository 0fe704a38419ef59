"""`qwen3 serve --install`: a service of launchd or systemd that starts a server at login."""

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from platformdirs import user_config_path

from qwen3_mlx.cli.console import note
from qwen3_mlx.cli.user_files import data_file
from qwen3_mlx.errors import Qwen3Error
from qwen3_mlx.processes import module_command

_NAME = "qwen3-mlx"
_LABEL = "org.qwen3-mlx.serve"
_VARIABLES = ("PATH", "HF_", "QWEN3_")  # or what begins with them
_ONCE = ("--install", "--open")  # options that are for this run


def install_service(arguments: Sequence[str]) -> None:
    """Write a service that runs `qwen3` with the arguments, without --install, in this folder.

    It has the variables of the environment that qwen3 reads, so only the user may read the file.

    Raises:
        Qwen3Error: the file cannot be written.
    """
    command = module_command("qwen3_mlx", *(word for word in arguments if word not in _ONCE))
    on_macos = sys.platform == "darwin"
    file = _launchd_file() if on_macos else _systemd_file()
    text = _plist(command) if on_macos else _unit(command).encode()
    existed = file.exists()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.unlink(missing_ok=True)
        with open(os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as stream:
            stream.write(text)
    except OSError as error:
        raise Qwen3Error(f"{file} cannot be written: {error.strerror}") from error
    note(f"{file} was {'replaced' if existed else 'written'}: a service that serves from login on.")
    for purpose, line in _commands(file, on_macos=on_macos):
        note(f"{purpose}: {line}")


def _commands(file: Path, *, on_macos: bool) -> list[tuple[str, str]]:
    """Return what there is to do with the service, each with its command."""
    if on_macos:
        domain, quoted = f"gui/{os.getuid()}", shlex.quote(str(file))
        return [
            ("switch it on, and start it now", f"launchctl bootstrap {domain} {quoted}"),
            ("stop it", f"launchctl bootout {domain}/{_LABEL}"),
            ("its log", f"tail -f {shlex.quote(str(data_file('serve.log')))}"),
            ("remove it", f"launchctl bootout {domain}/{_LABEL}; rm {quoted}"),
        ]
    return [
        (
            "switch it on, and start it now",
            f"systemctl --user daemon-reload; systemctl --user enable --now {_NAME}",
        ),
        ("stop it", f"systemctl --user stop {_NAME}"),
        ("its log", f"journalctl --user -f -u {_NAME}"),
        ("remove it", f"systemctl --user disable --now {_NAME}; rm {shlex.quote(str(file))}"),
    ]


def _launchd_file() -> Path:
    return Path.home() / "Library" / "LaunchAgents" / f"{_LABEL}.plist"


def _systemd_file() -> Path:
    return user_config_path("systemd") / "user" / f"{_NAME}.service"


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith(_VARIABLES)}


def _plist(command: Sequence[str]) -> bytes:
    """Return a launch agent, as launchd.plist(5) describes it."""
    import plistlib  # takes some milliseconds, which --help need not wait for

    return plistlib.dumps(
        {
            "Label": _LABEL,
            "ProgramArguments": list(command),
            "WorkingDirectory": str(Path.cwd()),
            "EnvironmentVariables": _environment(),
            "RunAtLoad": True,
            "KeepAlive": {"SuccessfulExit": False},
            "StandardErrorPath": str(data_file("serve.log")),
            "ProcessType": "Interactive",  # not slowed down as background work is
        }
    )


def _unit(command: Sequence[str]) -> str:
    """Return a user unit, as systemd.service(5) describes it."""
    lines = [
        "[Unit]",
        "Description=Qwen3 over HTTP (qwen3 serve)",
        "",
        "[Service]",
        f"ExecStart={' '.join(map(_quoted, command)).replace('$', '$$')}",
        f"WorkingDirectory={str(Path.cwd()).replace('%', '%%')}",
        *(f"Environment={_quoted(f'{name}={value}')}" for name, value in _environment().items()),
        "Restart=on-failure",
        "RestartSec=5",
        "",
        "[Install]",
        "WantedBy=default.target",
    ]
    return "\n".join(lines) + "\n"


def _quoted(word: str) -> str:
    """Return a word as a unit has it: quoted, with specifiers taken literally."""
    escaped = word.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'.replace("%", "%%")
