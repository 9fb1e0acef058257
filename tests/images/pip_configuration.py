"""Hand pip's configuration of this machine to a build: write it to a file, print the folders that it names.

    python tests/images/pip_configuration.py MARK FILE     prints --volume flags, one a line

MARK is put into the file as a comment, so that a test can look for it where it must not be.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

SETTING = re.compile(r"^(?P<where>:env:|[\w-]+)\.(?P<name>[\w-]+)=(?P<value>.*)$")


def settings() -> dict[str, str]:
    """What pip is told by its files and, over them, by the environment: name -> value."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = [match.groupdict() for match in map(SETTING.match, listed.splitlines()) if match]
    wanted = [setting for setting in found if setting["where"] in (":env:", "global", "install")]
    wanted.sort(key=lambda setting: [":env:", "install", "global"].index(setting["where"]), reverse=True)
    return {setting["name"]: ast.literal_eval(setting["value"]) for setting in wanted}


def folders_and_files(values: list[str]) -> Iterator[Path]:
    """What the values name on this machine: absolute paths, and what file: addresses point to."""
    for word in " ".join(values).split():
        path = Path(word.removeprefix("file://"))
        if path.is_absolute() and path.exists():
            # The index files of a folder of packages point to files beside it.
            yield path.parent if word.startswith("file:") and path.name == "simple" else path


def main() -> None:
    """See the module."""
    mark, file = sys.argv[1:]
    found = settings()
    lines = [f"# {mark}", "[global]", *(f"{name} = {' '.join(value.split())}" for name, value in found.items())]
    Path(file).write_text("\n".join(lines) + "\n", encoding="utf-8")
    for path in dict.fromkeys(folders_and_files(list(found.values()))):
        print(f"--volume {path}:{path}:ro")


if __name__ == "__main__":
    main()
