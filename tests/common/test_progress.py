"""Progress without a terminal, for example in the log of a job."""

import time

from openimp.common import progress


def test_without_a_terminal_long_work_prints_lines_before_its_end(monkeypatch, capsys):
    monkeypatch.setattr(progress, "PLAIN_SECONDS", 0.05)
    for _ in progress.track(range(3), "embed image"):
        time.sleep(0.06)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" in ")[0] for line in lines] == [f"embed image: {count}" for count in ("1/3", "2/3", "3")]
