"""Libraries with known vulnerabilities are named by the commands that open files of others or a port."""

import sys
from importlib.metadata import distributions

import pytest

from openimp import cli
from openimp.common.versions import VULNERABLE_BEFORE

NEWEST = {name: fixed for name, (fixed, _) in VULNERABLE_BEFORE.items()}


@pytest.fixture
def install(monkeypatch, tmp_path):
    """Makes the environment say that it has these versions, as pip would write it down."""
    monkeypatch.syspath_prepend(tmp_path)

    def run(versions: dict[str, str]) -> None:
        for name, version in versions.items():
            folder = tmp_path / f"{name}-{version}.dist-info"
            folder.mkdir()
            (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        found = {name: next(iter(distributions(name=name))).version for name in versions}
        assert found == versions

    return run


def output_of(monkeypatch, capsys, *arguments: str) -> str:
    monkeypatch.setattr(sys, "argv", ["openimp", *arguments])
    with pytest.raises(SystemExit):
        cli.main()
    return capsys.readouterr().out


COMMANDS = [("serve", "nowhere"), ("index", "nowhere"), ("push", "nowhere", "me/model")]


@pytest.mark.parametrize("command", COMMANDS)
def test_old_libraries_are_named_once_and_the_command_goes_on(install, monkeypatch, capsys, command):
    install(NEWEST | {"pillow": "12.3.0", "jinja2": "3.1.5"})
    assert output_of(monkeypatch, capsys, *command) == (
        "Warning: the environment has versions with known vulnerabilities: "
        f"jinja2 3.1.5 (fixed in 3.1.6: {VULNERABLE_BEFORE['jinja2'][1]}); "
        f"pillow 12.3.0 (fixed in 13: {VULNERABLE_BEFORE['pillow'][1]}).\n"
    )


@pytest.mark.parametrize(
    "versions", [NEWEST, NEWEST | {"pillow": "13.0.0", "filelock": "3.100", "aiohttp": "3.14.3.post1"}]
)
def test_libraries_with_the_fixes_are_not_named(install, monkeypatch, capsys, versions):
    install(versions)
    assert output_of(monkeypatch, capsys, *COMMANDS[1]) == ""


def test_other_commands_name_nothing(install, monkeypatch, capsys):
    install(NEWEST | {"pillow": "12.3.0"})
    assert output_of(monkeypatch, capsys, "info", "nowhere") == ""
