"""The parsers under a fuzzer that follows coverage; `make test-all` installs it and runs this."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

SECONDS = 20


@pytest.mark.slow
@pytest.mark.parametrize("parser", ["header", "index", "recipe", "journal"])
def test_only_documented_errors(parser: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("atheris", reason="atheris is not installed: `make test-all` does")
    script = Path(__file__).with_name("coverage_guided.py")
    limits = [f"-max_total_time={SECONDS}", "-timeout=20", "-rss_limit_mb=1024", "-max_len=4096"]
    command = [sys.executable, str(script), parser, *limits, f"-artifact_prefix={tmp_path}/"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    found = re.search(r"Done (\d+) runs in (\d+) second", done.stderr)
    assert found, done.stderr[-500:]
    assert int(found[1]) > 100, "the fuzzer did run"
    with capsys.disabled():
        print(f"\n{parser}: {int(found[1]):,} inputs in {found[2]} s, guided by coverage: only documented errors")
