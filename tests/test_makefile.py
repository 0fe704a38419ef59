"""`scripts/venv.sh` on machines that we do not have: every command it asks is a fake on PATH."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

_ROOT = Path(__file__).parent.parent
_TOOLS = (
    "cat",
    "cksum",
    "cp",
    "cut",
    "dirname",
    "mkdir",
    "rm",
    "sleep",
    "sort",
)  # beside the shell's own
_APPLE = {"uname": "Darwin arm64", "sw_vers": "15.5"}
_INSTALLING = "Installing qwen3-mlx into .venv (a minute or two) ...\n"
_INSTALLING_DEV = _INSTALLING.replace("(", "with the development tools (")
# A Python that answers the probe, makes a venv of itself, and installs by writing what was asked.
_PYTHON = """\
case $1$2 in
-c*) echo "{verdict} {version} $0" ;;
-mvenv) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
-mpip) echo "pip $*" >>"$LOG"; [ "$3" != install ] || {pip} ;;
esac
"""
_UV = """\
echo "uv $*" >>"$LOG"
if [ "$1" = venv ]; then
    for folder; do :; done
    mkdir -p "$folder/bin" && cp "$FAKES/{python}" "$folder/bin/python"
fi
"""


class Machine:
    """A folder with the script and a pyproject.toml, and a PATH that holds only fakes."""

    def __init__(self, folder: Path) -> None:
        self.project = folder / "the project"  # a path with a space
        (self.project / "scripts").mkdir(parents=True)
        shutil.copy(_ROOT / "scripts" / "venv.sh", self.project / "scripts")
        (self.project / "pyproject.toml").write_text("[project]\n")
        self.bin = folder / "bin"
        self.bin.mkdir()
        self.log = folder / "log"
        for tool in _TOOLS:
            (self.bin / tool).symlink_to(shutil.which(tool) or tool)
        self.answers(uname="Linux x86_64")

    def command(self, name: str, body: str) -> None:
        """Put a command on PATH that runs `body`."""
        file = self.bin / name
        file.write_text(f"#!/bin/sh\n{body}\n")
        file.chmod(0o755)

    def answers(self, **commands: str) -> None:
        """Put commands on PATH that answer so; `uname` answers its last word to -m."""
        for name, answer in commands.items():
            system, _, machine = answer.partition(" ")
            body = f'case $1 in -m) echo "{machine}" ;; *) echo "{system}" ;; esac'
            self.command(name, body if name == "uname" else f'echo "{answer}"')

    def python(self, name: str, version: str, verdict: str = "fit", pip: str = ":") -> None:
        """Put an interpreter on PATH, whose pip does `pip` beside keeping a log."""
        self.command(name, _PYTHON.format(version=version, verdict=verdict, pip=pip))

    def run(self, kind: str = "runtime", **environ: str) -> subprocess.CompletedProcess[str]:
        """Run the script, away from the project's folder."""
        own = {"PATH": str(self.bin), "LOG": str(self.log), "FAKES": str(self.bin)}
        return subprocess.run(
            ["/bin/sh", str(self.project / "scripts" / "venv.sh"), kind],
            env=own | environ,
            cwd=self.bin,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )

    def refusal(self, **environ: str) -> str:
        """Run the script, which must refuse in one line and leave no .venv; give the line."""
        result = self.run(**environ)
        assert result.returncode == 1
        assert result.stdout == ""
        assert not (self.project / ".venv").exists()
        (line,) = result.stderr.splitlines()
        return line

    def installed(self) -> list[str]:
        """Give what uv and pip were asked to do, and forget it."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return lines


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_an_intel_mac_is_refused(machine: Machine) -> None:
    machine.answers(uname="Darwin x86_64", sysctl="0", sw_vers="14.5")
    machine.python("python3.12", "3.12.4")
    assert "Intel processor; MLX needs Apple silicon" in machine.refusal()


def test_macos_before_14_is_refused(machine: Machine) -> None:
    machine.answers(uname="Darwin arm64", sw_vers="13.7.1")
    machine.python("python3.12", "3.12.4")
    assert machine.refusal() == "This Mac runs macOS 13.7.1; MLX needs macOS 14 or later."


def test_another_system_is_refused(machine: Machine) -> None:
    machine.answers(uname="FreeBSD amd64")
    assert machine.refusal() == "MLX runs on macOS and Linux, not on FreeBSD."


@pytest.mark.parametrize("terminal", ["arm64", "x86_64"])
def test_an_intel_python_on_apple_silicon_is_refused(machine: Machine, terminal: str) -> None:
    machine.answers(uname=f"Darwin {terminal}", sysctl="1", sw_vers="15.5")
    machine.python("python3.12", "3.12.4", "rosetta")
    machine.python("python3", "3.9.6", "old")
    line = machine.refusal()
    assert f"{machine.bin}/python3.12 (3.12.4) is an Intel Python" in line
    assert "brew install python@3.12" in line


def test_a_native_python_is_taken_before_a_newer_intel_one(machine: Machine) -> None:
    machine.answers(**_APPLE)
    machine.python("python3.13", "3.13.1", "rosetta")
    machine.python("python3.11", "3.11.9")
    result = machine.run()
    assert result.returncode == 0
    assert f"Creating .venv with {machine.bin}/python3.11 (3.11.9) ..." in result.stdout


@pytest.mark.parametrize(
    ("system", "way"),
    [
        (_APPLE, "brew install python@3.12"),
        ({"uname": "Linux aarch64"}, "sudo apt install python3"),
    ],
)
def test_without_a_python_the_line_tells_how_to_get_one(
    machine: Machine, system: dict[str, str], way: str
) -> None:
    machine.answers(**system)
    line = machine.refusal()
    assert line.startswith("Python 3.11 or later was not found: ")
    assert way in line


def test_an_old_python_is_named(machine: Machine) -> None:
    machine.answers(**_APPLE)
    machine.python("python3", "3.9.6", "old")
    assert (
        f"Python 3.11 or later is needed, and {machine.bin}/python3 is 3.9.6" in machine.refusal()
    )


def test_debian_without_its_venv_package(machine: Machine) -> None:
    machine.python("python3", "3.12.3", "bare")
    assert machine.refusal() == (
        f"{machine.bin}/python3 (3.12.3) lacks its venv module: sudo apt install python3.12-venv"
    )


def test_the_newest_python_is_taken_and_what_does_not_run_is_passed_over(machine: Machine) -> None:
    machine.command("python3.14", "echo 'pyenv: python3.14: command not found' >&2; exit 127")
    machine.python("python3.13", "3.13.0")
    machine.python("python3.11", "3.11.7")
    result = machine.run()
    assert result.returncode == 0, result.stderr
    making = f"Creating .venv with {machine.bin}/python3.13 (3.13.0) ...\n"
    assert result.stdout == making + _INSTALLING
    assert result.stderr == ""


def test_a_python_of_pyenv_is_found(machine: Machine, tmp_path: Path) -> None:
    home = tmp_path / "home"
    pyenv = home / ".pyenv" / "versions" / "3.12.1" / "bin"
    pyenv.mkdir(parents=True)
    machine.python("python3", "3.12.1")
    (machine.bin / "python3").rename(pyenv / "python")
    assert f"Creating .venv with {pyenv}/python (3.12.1)" in machine.run(HOME=str(home)).stdout


def test_the_wished_python_is_taken(machine: Machine) -> None:
    machine.python("python3.13", "3.13.0")
    machine.python("python3.11", "3.11.7")
    assert "python3.13 (3.13.0)" in machine.run().stdout
    assert machine.run(PYTHON="python3.13").stdout == ""
    assert "python3.11 (3.11.7)" in machine.run(PYTHON="python3.11").stdout
    assert machine.run(PYTHON="python3.11").stdout == ""
    assert machine.run().stdout == ""


def test_a_wished_python_that_does_not_fit_is_refused(machine: Machine) -> None:
    machine.python("python3.13", "3.13.0")
    machine.python("python3.9", "3.9.18", "old")
    machine.command("uv", _UV.format(python="python3.13"))
    assert "python3.9 is 3.9.18" in machine.refusal(PYTHON="python3.9")
    assert machine.refusal(PYTHON="python3.10").startswith("python3.10 was not found")


def test_it_is_done_once_and_again_only_for_a_reason(machine: Machine) -> None:
    machine.python("python3.12", "3.12.4")
    pip = "pip -m pip install --quiet --disable-pip-version-check --editable"
    assert machine.run().returncode == 0
    assert machine.installed() == [f"{pip} .[cpu]"]

    again = machine.run()
    assert (again.returncode, again.stdout, machine.installed()) == (0, "", [])

    assert "with the server" in machine.run("server").stdout
    assert machine.installed()[-1] == f"{pip} .[server,cpu]"
    assert machine.run("server").stdout == machine.run().stdout == ""

    assert machine.run("dev").stdout == _INSTALLING_DEV
    assert machine.installed()[-1] == f"{pip} .[dev,cpu]"
    # What serves development serves the demo and the server.
    assert machine.run().stdout == machine.run("server").stdout == ""

    (machine.project / "pyproject.toml").write_text("[project]\nname = 'x'\n")
    assert machine.run("dev").stdout == _INSTALLING_DEV
    assert machine.run("dev").stdout == ""

    moved = machine.project.with_name("moved")
    machine.project.rename(moved)
    machine.project = moved
    assert (
        machine.run("dev").stdout == _INSTALLING_DEV
    )  # scripts and paths would lead to the old place


def test_an_interrupted_venv_does_not_count(machine: Machine) -> None:
    machine.python("python3.12", "3.12.4", pip="kill -TERM $PPID")
    assert machine.run().returncode == 130
    assert (machine.project / ".venv" / "bin" / "python").exists()

    machine.python("python3.12", "3.12.4", pip='[ ! -e "$FAKES/interrupt" ] || kill -TERM $PPID')
    assert machine.run().stdout.startswith("Creating .venv with")
    (machine.bin / "interrupt").touch()
    assert machine.run("dev").returncode == 130  # on the way from the one kind to the other
    (machine.bin / "interrupt").unlink()
    assert machine.run().stdout.startswith("Creating .venv with")


def test_a_failed_installation_is_tried_again(machine: Machine) -> None:
    machine.python("python3.12", "3.12.4", pip='[ -e "$FAKES/network" ]')
    result = machine.run()
    assert result.returncode == 1
    assert "The installation failed" in result.stderr
    (machine.bin / "network").touch()
    assert machine.run().stdout == _INSTALLING
    assert machine.run().stdout == ""


def test_a_long_installation_shows_that_it_goes_on(machine: Machine) -> None:
    (machine.bin / "sleep").unlink()
    once, twice = "$FAKES/once", "$FAKES/twice"
    machine.command("sleep", f'if [ -e "{once}" ]; then : >"{twice}"; exit 1; fi; : >"{once}"')
    machine.python("python3.12", "3.12.4", pip=f'while [ ! -e "{twice}" ]; do :; done')
    result = machine.run()
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"Creating .venv with {machine.bin}/python3.12 (3.12.4) ...\n")
    assert "  still installing, 10 s ...\n" in result.stdout


def test_a_venv_of_somebody_else_is_used_unless_it_is_too_old(machine: Machine) -> None:
    machine.python("python3.12", "3.12.4")
    own = machine.project / ".venv" / "bin"
    own.mkdir(parents=True)
    shutil.copy(machine.bin / "python3.12", own / "python")
    assert machine.run().stdout == _INSTALLING

    shutil.rmtree(machine.project / ".venv")
    own.mkdir(parents=True)
    machine.python("python3.9", "3.9.18", "old")
    shutil.copy(machine.bin / "python3.9", own / "python")
    assert machine.run().stdout.startswith("Creating .venv with")


def test_a_venv_that_nothing_can_install_into_is_made_anew(machine: Machine) -> None:
    """As uv makes them, once uv is gone."""
    machine.python("python3.12", "3.12.4")
    own = machine.project / ".venv" / "bin"
    own.mkdir(parents=True)
    machine.command("python", 'case $1 in -c) echo "fit 3.12.4 $0" ;; *) exit 1 ;; esac')
    (machine.bin / "python").rename(own / "python")
    assert machine.run().stdout.startswith("Creating .venv with")


def test_a_venv_whose_python_is_gone_is_made_anew(machine: Machine) -> None:
    machine.python("python3.12", "3.12.4")
    machine.run()
    (machine.project / ".venv" / "bin" / "python").unlink()
    assert machine.run().stdout.startswith("Creating .venv with")


def test_uv_does_the_work_where_it_is(machine: Machine) -> None:
    machine.python("python3", "3.12.3", "bare")  # uv needs no venv module
    machine.command("uv", _UV.format(python="python3"))
    result = machine.run("dev")
    assert result.returncode == 0, result.stderr
    assert f"Creating .venv with uv and {machine.bin}/python3 (3.12.3) ..." in result.stdout
    commands = machine.installed()
    assert f"uv venv --quiet --allow-existing --python {machine.bin}/python3 .venv" in commands
    assert "uv pip install --quiet --python .venv/bin/python --editable .[dev,cpu]" in commands


@pytest.mark.parametrize(("kind", "target"), [("runtime", "."), ("dev", ".[dev]")])
def test_a_mac_needs_no_backend_of_linux(machine: Machine, kind: str, target: str) -> None:
    machine.answers(**_APPLE)
    machine.python("python3.13", "3.13.1")
    assert machine.run(kind).returncode == 0
    assert machine.installed()[-1].endswith(f"--editable {target}")


def test_the_fitting_pythons_are_listed_the_lowest_first(machine: Machine) -> None:
    for name, version, verdict in (
        ("python3.13", "3.13.0", "fit"),
        ("python3.12", "3.12.4", "bare"),
        ("python3.11", "3.11.7", "fit"),
        ("python3", "3.11.2", "fit"),
        ("python", "2.7.18", "old"),
    ):
        machine.python(name, version, verdict)
    lines = [f"3.11.7 {machine.bin}/python3.11", f"3.13.0 {machine.bin}/python3.13"]
    assert machine.run("pythons").stdout.splitlines() == lines
    assert machine.run("pythons", PYTHON="python3").stdout == f"3.11.2 {machine.bin}/python3\n"
    machine.command("uv", ":")  # which needs no venv module
    assert f"3.12.4 {machine.bin}/python3.12\n" in machine.run("pythons").stdout


def test_uv_brings_a_python_where_there_is_none(machine: Machine) -> None:
    machine.python("own", "3.13.9")
    machine.python("python3", "3.9.6", "old")
    machine.command("uv", _UV.format(python="own"))
    result = machine.run()
    assert result.returncode == 0, result.stderr
    assert "Creating .venv with uv and a Python of its own ..." in result.stdout
    assert any("--python >=3.11,<3.15 .venv" in command for command in machine.installed())


def test_an_intel_python_of_uv_is_refused(machine: Machine) -> None:
    machine.answers(**_APPLE)
    machine.python("own", "3.13.9", "rosetta")
    machine.command("uv", _UV.format(python="own"))
    result = machine.run()
    assert result.returncode == 1
    assert "uv's Python does not fit (rosetta 3.13.9" in result.stderr
    assert machine.run().returncode == 1  # nor is it taken for finished the next time


@pytest.mark.parametrize(
    ("pretence", "line"),
    [
        ("sys.version_info = (3, 9, 6)", "Python 3.11 or later is needed"),
        ("sys.platform, platform.machine = 'darwin', lambda: 'x86_64'", "is an Intel Python"),
        ("sys.modules['ensurepip'] = None", "lacks its venv module"),
    ],
)
def test_the_probe_itself(machine: Machine, pretence: str, line: str) -> None:
    """The other tests fake the probe's answer; here it runs, in an interpreter that pretends."""
    program = f"import platform, sys; {pretence}; exec(sys.argv[1])"
    machine.command("python3", f'exec "{sys.executable}" -c "{program}" "$2"')
    assert line in machine.refusal()


def test_the_probe_finds_this_python_fit(machine: Machine) -> None:
    own = machine.project / ".venv" / "bin"
    own.mkdir(parents=True)
    machine.command("python", f'case $1 in -c) exec "{sys.executable}" "$@" ;; esac')
    (machine.bin / "python").rename(own / "python")
    assert machine.run().stdout == _INSTALLING
