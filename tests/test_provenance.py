"""What figures carry."""

import subprocess
import sys
from pathlib import Path

import torch

from layerdrop_fast import _provenance


def test_it_says_where_and_how():
    found = _provenance.provenance(["python", "-m", "x"])
    assert found["command"] == "python -m x"
    assert found["torch"] == torch.__version__
    assert found["threads"] == str(torch.get_num_threads())
    assert "cores" in found["machine"]
    assert str(Path.cwd()) not in "".join(found.values())


def test_the_commit_is_that_of_the_checkout_and_says_when_files_differ(tmp_path):
    package = tmp_path / "layerdrop_fast"
    package.mkdir()
    code = Path(_provenance.__file__).read_text()
    (package / "_provenance.py").write_text(code)
    (package / "__init__.py").write_text("__version__ = '1'\n")
    (package / "_extension.py").write_text("missing = None\n")

    def told():
        command = [sys.executable, "-c", "from layerdrop_fast._provenance import commit; print(commit())"]
        return subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout.strip()

    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=b"]
        done = subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    assert told() == "unknown: no repository"
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "one")
    head = git("rev-parse", "HEAD")
    assert told() == head
    (package / "_provenance.py").write_text(code + "# changed\n")
    assert told() == f"{head} and changes"
