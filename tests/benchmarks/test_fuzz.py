"""Fuzzed media files are decoded or refused, and benchmarks/fuzz.py notices failures."""

import os
import signal
from contextlib import suppress

import pytest

from benchmarks.fuzz import FORMATS, MEMORY, MEND, VIEWS, Worker, fuzz, mutated
from openimp.common.modality import BadMedia

pytestmark = pytest.mark.slow

FILES = 25
"""Files per format."""


@pytest.fixture(scope="module")
def worker():
    worker = Worker()
    yield worker
    worker.stop()


@pytest.mark.parametrize("name", FORMATS)
def test_mutated_files_are_decoded_or_refused(name, worker, tmp_path):
    row = fuzz(name, FILES, 1, worker, tmp_path)
    assert row.decoded + row.refused == FILES, list(tmp_path.iterdir())
    assert row.memory < MEMORY
    assert row.slowest < 10


@pytest.mark.parametrize("name", MEND)
def test_a_file_with_its_own_checksums_stays_as_it_is(name):
    for content in FORMATS[name][1]():
        mended = bytearray(content)
        MEND[name](mended)
        assert mended == content


def test_a_process_that_dies_is_seen(worker):
    picture = FORMATS["BMP"][1]()[0]
    assert worker.decode("image", picture, 0)[0] == "decoded"
    os.kill(worker.process.pid, signal.SIGSEGV)
    assert worker.decode("image", picture, 0)[0] == "died: exit code -11"
    assert worker.decode("image", picture, 0)[0] == "decoded"


def test_a_seek_before_the_start_of_a_sound_prints_no_traceback(capfd):
    """soundfile prints what the file's `seek` raises."""
    modality, view = VIEWS["audio"]
    with suppress(BadMedia):
        modality.decode(mutated("AIFF", FORMATS["AIFF"][1](), 1, 377), [view])
    assert "Traceback" not in capfd.readouterr().err
