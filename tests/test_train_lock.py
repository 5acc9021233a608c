"""The lock on a folder: one holder, named; gone with it; and an error of its own where there are no locks."""

import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastlocal.train.errors import UsageError
from fastlocal.train.lock import hold

ROOT = Path(__file__).parent.parent
HOLDER = """
import sys
from pathlib import Path
from fastlocal.train.lock import hold
with hold(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "study")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_another_holder_is_named_and_its_lock_ends_when_it_is_killed(tmp_path, holder):
    with (
        pytest.raises(UsageError, match=f"study is in use by process {holder.pid} on .*: wait for it, or choose"),
        hold(tmp_path / "study"),
    ):
        pass
    holder.kill()
    with hold(tmp_path / "study", patience_seconds=10):
        assert (tmp_path / "study" / ".lock").read_text().startswith(f"{os.getpid()} on ")


def test_whoever_is_patient_gets_the_folder_once_its_holder_has_ended(tmp_path, holder):
    holder.stdin.close()  # it ends by itself
    with hold(tmp_path / "study", patience_seconds=60):
        pass
    with hold(tmp_path / "study"):  # let go at once
        pass


def test_a_process_started_inside_does_not_inherit_the_lock(tmp_path):
    with hold(tmp_path):
        child = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    try:
        with hold(tmp_path):
            assert child.poll() is None
    finally:
        child.communicate(timeout=30)


def test_a_filesystem_without_locks_and_a_place_that_is_no_folder_are_errors_of_their_own(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="--out .*/file cannot be made: File exists"), hold(tmp_path / "file"):
        pass

    (tmp_path / ".lock").mkdir()
    with (
        pytest.raises(UsageError, match=r"\.lock cannot be opened: Is a directory; choose another --out"),
        hold(tmp_path),
    ):
        pass
    (tmp_path / ".lock").rmdir()

    def refuse(descriptor, how):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    message = r"\.lock cannot be locked: No locks available; choose an --out on a filesystem that has locks"
    with pytest.raises(UsageError, match=message), hold(tmp_path):
        pass
