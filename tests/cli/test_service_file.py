"""`qwen3 serve --install`: a service for launchd and for systemd."""

import plistlib
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.harness import call

Captured = pytest.CaptureFixture[str]
ARGUMENTS = ["serve", "--install", "--open", "--port", "9", "--name", 'my "50 %" $model']


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home."""
    for name in ("HOME", "XDG_CONFIG_HOME", "QWEN3_HOME"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("QWEN3_API_KEY", "secret")
    monkeypatch.setattr(sys, "argv", ["qwen3", *ARGUMENTS])
    return tmp_path


def test_a_unit_of_systemd(home: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    code, out, err = call(ARGUMENTS, capsys)
    file = home / "XDG_CONFIG_HOME" / "systemd" / "user" / "qwen3-mlx.service"
    assert (code, out) == (0, "")
    assert err.startswith(f"{file} was written: a service that serves from login on.\n")
    assert "systemctl --user enable --now qwen3-mlx" in err and "secret" not in err
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    text = file.read_text()
    words = '"-P" "-m" "qwen3_mlx" "serve" "--port" "9" "--name" "my \\"50 %%\\" $$model"'
    assert f'ExecStart="{sys.executable}" {words}\n' in text
    assert 'Environment="QWEN3_API_KEY=secret"\n' in text
    assert f"{file} was replaced" in call(ARGUMENTS, capsys)[2]
    if verify := shutil.which("systemd-analyze"):
        done = subprocess.run(
            [verify, "--user", "verify", file], capture_output=True, text=True, check=False
        )
        assert str(file) not in done.stderr


def test_a_launch_agent(home: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    code, _, err = call(ARGUMENTS, capsys)
    file = home / "HOME" / "Library" / "LaunchAgents" / "org.qwen3-mlx.serve.plist"
    assert code == 0 and "launchctl bootstrap gui/" in err and str(file) in err
    agent = plistlib.loads(file.read_bytes())
    assert agent["ProgramArguments"][1:5] == ["-P", "-m", "qwen3_mlx", "serve"]
    assert agent["ProgramArguments"][-1] == 'my "50 %" $model' and agent["RunAtLoad"]
    assert agent["EnvironmentVariables"]["QWEN3_API_KEY"] == "secret"
    assert agent["WorkingDirectory"] == str(Path.cwd())


def test_what_could_not_start_is_not_installed(home: Path, capsys: Captured) -> None:
    sys.argv.insert(2, "--max-requests=0")
    code, _, err = call(sys.argv[1:], capsys)
    assert code == 2 and "--max-requests must be at least 1, not 0" in err
    for words, said in (
        (["-m", "./nowhere"], "'./nowhere' is no folder here"),
        (["-m", str(home)], "has no config.json"),
        (["--mcp", "none.json"], "none.json cannot be read"),
    ):
        code, _, err = call([*ARGUMENTS, *words], capsys)
        assert code == 1 and said in err and not (home / "XDG_CONFIG_HOME").exists()
    (home / "XDG_CONFIG_HOME").write_text("")
    monkey = [*ARGUMENTS]
    code, _, err = call(monkey, capsys)
    assert code == 1 and "cannot be written: " in err
