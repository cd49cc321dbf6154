"""Installs what pyproject.toml lists, at the versions of requirements.lock, without the project itself.

usage: install_dependencies.py [--find-links DIR] [EXTRA ...]

An image's dependency layer then depends on these two files alone.
"""

import argparse
import subprocess
import sys
import tomllib
from pathlib import Path

parser = argparse.ArgumentParser()
parser.add_argument("--find-links", type=Path)
parser.add_argument("extras", nargs="*")
arguments = parser.parse_args()

project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
wanted = list(project["dependencies"])
for extra in arguments.extras:
    wanted += project["optional-dependencies"][extra]
command = [sys.executable, "-m", "pip", "install", "--constraint", "requirements.lock"]
if arguments.find_links:
    command += ["--find-links", str(arguments.find_links)]
sys.exit(subprocess.run([*command, *wanted]).returncode)
