"""What tests in other systems take over of pip's settings on this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PROGRAM = Path(__file__).with_name("pip_settings.py")


def test_settings_of_files_and_variables_are_taken_over_with_the_files_that_they_name(
    tmp_path: Path,
) -> None:
    for name in ("ours.txt", "theirs.txt", "ca.pem"):
        (tmp_path / name).touch()
    (tmp_path / "pip.conf").write_text(
        f"[global]\nconstraint = {tmp_path}/theirs.txt\n"
        f"[install]\ncert = {tmp_path}/ca.pem\n"
        "extra-index-url =\n    https://one.invalid\n    https://two.invalid\n"
    )
    # A file of the machine counts less, whatever its path: this one sorts before and after it.
    for beside in ("a", "z"):
        (tmp_path / beside / "pip").mkdir(parents=True)
        (tmp_path / beside / "pip" / "pip.conf").write_text("[install]\ncert = of_machine.pem\n")
    variables = {
        "PIP_CONFIG_FILE": str(tmp_path / "pip.conf"),
        "PIP_CONSTRAINT": "ours.txt https://three.invalid/c.txt",
        "PIP_TIMEOUT": "7",
        "XDG_CONFIG_DIRS": f"{tmp_path}/a:{tmp_path}/z",
    }
    kept = {k: v for k, v in os.environ.items() if not k.startswith("PIP_")}
    done = subprocess.run(
        [sys.executable, PROGRAM, "out.conf"],
        cwd=tmp_path,
        env={**kept, **variables},
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.splitlines() == [f"{tmp_path}/ours.txt", f"{tmp_path}/ca.pem"]
    text = (tmp_path / "out.conf").read_text()
    assert text.startswith("[global]\n")
    for line in (
        f"constraint = {tmp_path}/ours.txt https://three.invalid/c.txt",
        f"cert = {tmp_path}/ca.pem",
        "extra-index-url = https://one.invalid https://two.invalid",
        "timeout = 7",
    ):
        assert f"\n{line}\n" in text
