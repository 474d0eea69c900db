"""Find the settings and commands that a message prints, so that a test can do what it says, as a shell would."""

import re
import shlex
import subprocess


def settings_in(message: str) -> list[str]:
    """The settings of a message, such as data.rows=examples, without the shell's quotes."""
    found = re.findall(r"'data\.\w+=(?:[^']|'\"'\"')*'|data\.\w+=[^\s;'\"(){}<>]+", message)
    return [word for setting in found for word in shlex.split(setting.rstrip(".,"))]


def run_command_in(message: str) -> None:
    """Run the first command of a message in a shell."""
    found = re.search(r"(?:mv|cp|unzip|mkdir|iconv|python3 -c) .*", message)
    assert found, message
    subprocess.run(found.group(), shell=True, check=True, capture_output=True)
