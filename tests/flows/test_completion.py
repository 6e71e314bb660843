"""Shell completion: bash runs one of the scripts."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.flows.conftest import Answered

LINES = {
    "numprune pru": ["prune"],
    "numprune registry pro": ["promote"],
    "numprune prune --rat": ["--ratio"],
    "numprune prune --allocation ": ["uniform", "global", "error"],
    "numprune evaluate ./heldo": ["./heldout.txt"],
    "numprune evaluate --text ./heldo": ["./heldout.txt"],
    "numprune completion ": ["bash", "zsh"],
}

TRY = """
source "$1"
function=$(complete -p numprune | sed 's/.* -F \\([^ ]*\\).*/\\1/')
while IFS= read -r line; do
    COMP_WORDS=($line)
    [[ "$line" == *" " ]] && COMP_WORDS+=("")
    COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
    COMPREPLY=()
    "$function"
    echo "${COMPREPLY[*]}"
done
"""


def test_bash_completes_commands_options_choices_and_files(numprune: Callable[..., Answered], tmp_path: Path) -> None:
    script = tmp_path / "numprune.bash"
    script.write_text(numprune("completion", "bash").out)
    (tmp_path / "heldout.txt").touch()
    command = ["bash", "-c", TRY, "try", str(script)]
    done = subprocess.run(command, input="\n".join([*LINES, ""]), cwd=tmp_path, capture_output=True, text=True)
    assert done.stderr == ""
    assert dict(zip(LINES, map(str.split, done.stdout.splitlines()), strict=True)) == LINES


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_the_completion_script_knows_every_command(numprune: Callable[..., Answered], shell: str) -> None:
    answered = numprune("completion", shell, "--json").json
    assert answered["shell"] == shell
    known = ["optimize", "kubernetes", "promote", "clean", "--sequence-length"]
    assert [word for word in known if word not in answered["script"]] == []
