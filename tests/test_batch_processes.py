"""Reader processes from scripts."""

import subprocess
import sys
from pathlib import Path

import pytest
from batch_jobs import read_lines, write_lines

SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
import batch_worker
{guard}
    summary = batch_worker.run({manifest!r}, {out!r}, readers="processes")
    print(summary.transcribed, "transcribed")
"""


WORKS = [pytest.param(form, marks=pytest.mark.slow) for form in ("command line", "file with a guard")]


@pytest.mark.parametrize("form", ["file without a guard", "standard input", *WORKS])
def test_scripts_without_a_main_guard_are_told(corpus: Path, tmp_path: Path, form: str) -> None:
    # Given a script that reads in processes
    manifest = write_lines(corpus / "m.jsonl", {"audio": "a/1.wav"})
    guard = 'if __name__ == "__main__":' if form == "file with a guard" else "if True:"
    names = {"tests": str(Path(__file__).parent), "manifest": str(manifest), "out": str(tmp_path / "out")}
    text = SCRIPT.format(guard=guard, **names)
    (tmp_path / "script.py").write_text(text)
    arguments = {"standard input": ["-"], "command line": ["-c", text]}.get(form, [str(tmp_path / "script.py")])
    # When it runs, then it works or says what is missing, and no failure is committed
    done = subprocess.run(
        [sys.executable, *arguments], input=text, capture_output=True, text=True, timeout=120, check=False
    )
    if form in ("file with a guard", "command line"):  # a command line is not run again
        assert done.stdout == "1 transcribed\n", done.stderr
        assert len(read_lines(next((tmp_path / "out").glob("part-*")))) == 1
    else:
        assert done.returncode == 1 and not (tmp_path / "out").exists()
        assert "GraniteError: reader processes cannot start" in done.stderr.splitlines()[-1]
