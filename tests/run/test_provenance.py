"""What a run notes about its code."""

import subprocess

from sdpo.run import provenance

UNKNOWN = {"commit": None, "dirty": None, "diff": None}


def test_a_checkout_that_git_cannot_read_has_no_commit(tmp_path, monkeypatch):
    """A run that has trained for days must not fail for it; git refuses a folder of another user, too."""
    monkeypatch.setattr(provenance, "CHECKOUT", tmp_path)
    assert provenance._git() == UNKNOWN
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)
    assert provenance._git() == UNKNOWN
    author = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    subprocess.run(["git", "-C", tmp_path, *author, "commit", "--quiet", "--allow-empty", "-m", "first"], check=True)
    found = provenance._git()
    assert found["dirty"] is False and len(found["commit"]) == 40
