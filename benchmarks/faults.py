"""What a run loses to each fault: real processes are killed, filled up, lied to, and go on.

    python -m benchmarks.faults [--only FAULT ...] [--write]

Trains the tests' small recipe of pictures and sounds on the CPU, with a checkpoint every 8 of 24 steps, once in peace
and once with each fault in it, and goes on with --resume. Each run is compared with the one in peace:

- steps lost: those that were made before the fault and had to be made again;
- samples lost or seen twice: the examples of the steps that the whole of the run's metrics.jsonl has more often, less
  often or otherwise, by the names of the examples (`samples`) and by all losses, bit for bit;
- the weights in the end, bit for bit.

The exit code is 1 if a fault was not noticed, if it cost any sample, or more steps than lie between two checkpoints.
One that spoils a checkpoint in the making also costs the steps that were made meanwhile.
`--write` puts the table into docs/results/faults.md.
"""

import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from benchmarks import hostile, results_page
from benchmarks.trainings import (
    BATCH,
    EVERY,
    STEPS,
    WHILE_SAVING,
    Bench,
    How,
    Outcome,
    Process,
    children,
    finished,
    most_memory,
    steps_of,
    told,
    watch,
)
from openimp.checkpoint.folder import checkpoints, load_model, read_state, step_of
from openimp.common.json_lines import read_lines

PATIENCE = 60
"""Seconds within which all processes must have ended once one of them died."""
GROWTH = 100 * 2**20
"""Bytes by which the most memory that a training holds may grow with files that claim to be large."""


def flip(file: Path) -> None:
    """One bit in the middle; size and time stay."""
    content, times = bytearray(file.read_bytes()), file.stat()
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def drafts(run: Path) -> list[Path]:
    """Checkpoints that are not whole."""
    return list((run / "checkpoints").glob(".step-*"))


def killed(bench: Bench) -> list[Outcome]:
    run = bench.folder / "killed"
    process = bench.start(run)
    watch(process, Process.kill, saved=run)
    noticed = f"exit code {process.returncode}" if process.returncode < 0 else ""
    return [bench.outcome_of_resuming("kill -9 in the middle of a step", run, noticed)]


def killed_while_saving(bench: Bench) -> list[Outcome]:
    run = bench.folder / "killed while saving"
    process = bench.start(run)

    def kill(process: Process) -> None:
        while process.poll() is None:  # Held while there is a draft, and let go on if that came a moment too late.
            if drafts(run):
                process.send_signal(signal.SIGSTOP)
                if drafts(run):
                    process.kill()
                    return
                process.send_signal(signal.SIGCONT)

    watch(process, kill, saved=run)
    noticed = f"exit code {process.returncode}; {drafts(run)[0].name} is no checkpoint" if drafts(run) else ""
    outcome = bench.outcome_of_resuming("kill -9 in the middle of a save", run, noticed)
    return [replace(outcome, noticed="" if drafts(run) else noticed)]


def stopped(bench: Bench) -> list[Outcome]:
    """As a terminal or a scheduler does, with a signal to the processes that read data, too."""
    outcomes = []
    for number in (signal.SIGTERM, signal.SIGINT):
        run = bench.folder / f"stopped by {number.name}"
        process = bench.start(run, changes=["train.num_workers=2"])
        lines = watch(process, lambda process, number=number: os.killpg(process.pid, number))
        outcomes.append(bench.outcome_of_resuming(number.name, run, told(process, lines, "stopped at step", code=0)))
    return outcomes


def full_disk(bench: Bench) -> list[Outcome]:
    """The system refuses the bytes of a file beyond a limit, as a full disk does, in the middle of it."""
    run = bench.folder / "full disk"
    limit = max(file.stat().st_size for file in checkpoints(bench.whole())[0].rglob("*")) // 2
    process = bench.start(run)
    lines = watch(process, lambda process: resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (limit, limit)))
    noticed = "" if drafts(run) else told(process, lines, "could not be saved: ")
    return [bench.outcome_of_resuming("a disk that is full while saving", run, noticed)]


def flipped_bit(bench: Bench) -> list[Outcome]:
    run = bench.copy("flipped bit")
    file = max(checkpoints(run)[-1].rglob("*"), key=lambda file: file.stat().st_size)
    flip(file)
    process = bench.start(run, "--resume")
    lines = watch(process)
    noticed = told(process, lines, f"{file}: damaged", code=0)
    lost = STEPS - steps_of(lines)[0] + 1
    return [bench.compared("a flipped bit in the newest checkpoint", run, noticed, lost)]


def rank_that_dies(bench: Bench) -> list[Outcome]:
    """The other rank says how to resume, and torchrun names the rank that died as the root cause."""
    run = bench.folder / "rank"
    process = bench.torchrun(run, forked=False)
    since = time.monotonic()

    def kill(process: Process) -> None:
        nonlocal since
        os.kill(children(process.pid)[-1], signal.SIGKILL)
        since = time.monotonic()

    lines = watch(process, kill, saved=run)
    seconds = time.monotonic() - since
    noticed = next((line for line in lines if "a rank died or does not answer" in line), "")
    report = "\n".join(lines).partition("Root Cause")
    ends = [re.findall(r"rank +: (\d).*\n +exitcode +: (-?\d+)", part) for part in (report[0], report[2])]
    good = noticed and ends == [[("0", "2")], [("1", "-9")]] and seconds < PATIENCE
    if not good:
        print(f"after {seconds:.1f} s, with {ends}:", *lines[-80:], sep="\n", file=sys.stderr)
    noticed = f"exit code 2: {noticed.removeprefix('openimp: ')} (after {seconds:.1f} s)" if good else ""
    return [bench.outcome_of_resuming("kill -9 of one of two ranks with a replica each", run, noticed, how="two")]


def rank_that_is_started_again(bench: Bench) -> list[Outcome]:
    run = bench.folder / "restart"
    process = bench.torchrun(run, "--resume", "auto", restarts=1)
    return [_started_again(bench, "the same, under torchrun --max-restarts 1", process, run, "two")]


def node_that_is_started_again(bench: Bench) -> list[Outcome]:
    run = bench.folder / "nodes"
    return [
        _started_again(bench, "the same, with sharding and a torchrun per rank", bench.two_nodes(run), run, "two nodes")
    ]


def _started_again(bench: Bench, fault: str, process: Process, run: Path, how: How) -> Outcome:
    """Kills the last rank. On two nodes, `process` has a torchrun per rank below it."""

    def kill(process: Process) -> None:
        pid = process.pid
        for _ in range(2 if how == "two nodes" else 1):
            pid = children(pid)[-1]
        os.kill(pid, signal.SIGKILL)

    lines = watch(process, kill, saved=run)
    # torchrun names the rank that it looks at first: the killed one, or the other, which may have ended by then.
    named = [line for line in lines if "failed (exitcode: " in line and "local_rank" in line]
    steps = steps_of(finished(process, lines))
    again = next(i for i in range(1, len(steps)) if steps[i] <= steps[i - 1])
    noticed = f"torchrun: {named[0].partition('] ')[2].partition(' of binary')[0]}; started again" if named else ""
    lost = steps[again - 1] - steps[again] + 1
    outcome = bench.compared(fault, run, noticed, lost, how)
    # As in `outcome_of_resuming`: if the next checkpoint was due, it was being written.
    return replace(outcome, limit=WHILE_SAVING if lost >= EVERY else EVERY)


def worker_that_dies(bench: Bench) -> list[Outcome]:
    run = bench.folder / "worker"
    process = bench.start(run, changes=["train.num_workers=2"])
    lines = watch(process, lambda process: os.kill(children(process.pid)[-1], signal.SIGKILL))
    return [bench.outcome_of_resuming("kill -9 of a loader's worker", run, told(process, lines, "a data worker died"))]


def faults_while_streaming(bench: Bench) -> list[Outcome]:
    """Each rank and each of the workers reads a lane of its own. One process goes on without workers."""
    streaming = bench.streaming()
    outcomes = [outcome for fault in (killed, worker_that_dies, rank_that_dies) for outcome in fault(streaming)]
    return [replace(outcome, fault=f"{outcome.fault}, with a stream") for outcome in outcomes]


def loss_that_is_not_finite(bench: Bench) -> list[Outcome]:
    """A learning rate of 1e30 makes it so at the second step. The step before is as in peace, and is kept."""
    run = bench.folder / "loss"
    process = bench.start(run, changes=["optimizer.lr=1e30"])
    noticed = told(process, watch(process), "is not finite; nothing was updated; the batch of 8 examples includes ")
    seen, peace = (read_lines(path / "metrics.jsonl") for path in (run, bench.whole()))
    differ = [line for line, other in zip(seen, peace) if line["samples"] != other["samples"]]
    saved = checkpoints(run)[-1]
    finite = all(tensor.isfinite().all() for tensor in load_model(saved)[0].state_dict().values())
    fault = "a loss that is not finite"
    return [Outcome(fault, noticed if finite else "", len(seen) - step_of(saved), BATCH * len(differ))]


def changed_source(bench: Bench) -> list[Outcome]:
    run, allowed = bench.copy("changed"), bench.folder / "changed and allowed"
    shutil.rmtree(checkpoints(run)[-1])
    shutil.copytree(run, allowed)
    reached = step_of(checkpoints(run)[-1])
    file, other = (bench.data / "pictures" / "red" / name for name in ("3.png", "4.png"))
    before = file.read_bytes()
    file.write_bytes(other.read_bytes())
    process = bench.start(run, "--resume")
    noticed = told(process, watch(process), "source pictures has changed since it was saved")
    process = bench.start(allowed, "--resume", "--allow-changed-data")
    lines = watch(process)
    file.write_bytes(before)
    if not told(process, lines, "resuming with the data as it is now", code=0):
        noticed = ""
    return [bench.outcome_of_resuming("a source that has changed since the checkpoint", run, noticed, reached)]


def hostile_media(bench: Bench) -> list[Outcome]:
    """One outcome for each file, one for the memory that all take, and one for more of them than the recipe allows."""
    peace = hostile.more_data(bench.data, bench.folder / "more data")
    data = hostile.more_data(bench.data, bench.folder / "hostile data")
    names = {fault: write(data) for fault, write in hostile.FILES.items()}
    memory, lines = [], []
    for folder in (peace, data):
        changes = [*hostile.tasks(folder), "train.max_bad_fraction=0.5"]
        process = Bench(bench.folder, folder).start(folder / "run", changes=changes)
        lines = finished(process, watch(process, lambda process: memory.append(most_memory(process)), STEPS - 1))
    skipped = read_lines(data / "run" / "skipped.jsonl")
    counted = read_state(checkpoints(data / "run")[-1])["bad"].values()
    wrong = [line for line in skipped if not line["where"].endswith(tuple(names.values()))]
    samples = len(wrong) + abs(sum(task["bad"] for task in counted) - len(skipped))
    found = []
    for fault, name in names.items():
        why = [line["why"] for line in skipped if line["where"].endswith(name)]
        noticed = f"{name} skipped {len(why)} times: {why[0]}" if why and steps_of(lines)[-1] == STEPS else ""
        found.append(Outcome(fault, noticed, samples=samples))
    grown = memory[1] - memory[0]
    fault = f"all of these at once: the most memory held, {memory[0] / 2**20:.0f} MiB without them"
    found.append(Outcome(fault, f"{grown / 2**20:+.0f} MiB" if grown < GROWTH else ""))
    run = data / "too many"
    process = Bench(bench.folder, data).start(run, changes=[*hostile.tasks(data), "train.max_bad_fraction=0.01"])
    noticed = told(process, watch(process), "could not be read, more than train.max_bad_fraction 0.01")
    steps = len(read_lines(run / "metrics.jsonl")) - step_of(checkpoints(run)[-1])
    return [*found, Outcome("more of them than train.max_bad_fraction", noticed, steps)]


FAULTS: dict[str, Callable[[Bench], list[Outcome]]] = {
    function.__name__: function
    for function in (
        killed,
        killed_while_saving,
        stopped,
        full_disk,
        flipped_bit,
        rank_that_dies,
        rank_that_is_started_again,
        node_that_is_started_again,
        worker_that_dies,
        faults_while_streaming,
        hostile_media,
        loss_that_is_not_finite,
        changed_source,
    )
}
NOTES = """
Weights are compared with those of the run in peace, bit for bit; after a loss that is not finite, and with files that
cannot be read, there is none to compare with. For such a file its neighbour in the batch stands in; what was skipped
besides these files would count as samples lost. At most the steps of one checkpoint's interval are lost, but where a
checkpoint is spoilt in the making: then those that were made while it was written are lost as well.
"""
COLUMNS = ["fault", "noticed", "steps lost", "samples lost or seen twice", "weights in the end"]


def main() -> int:
    parser = results_page.make_parser(__doc__)
    parser.add_argument(
        "--only", nargs="+", choices=FAULTS, default=list(FAULTS), metavar="FAULT", help=", ".join(FAULTS)
    )
    args = results_page.parse(parser)
    outcomes, begin = [], time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench.of_little_data(Path(folder))
        for name in args.only:
            found = FAULTS[name](bench)
            for outcome in found:
                outcome.noticed = outcome.noticed.replace(f"{folder}/", "")
            outcomes += found
            good = "as it should be" if all(outcome.ok for outcome in found) else "NOT AS IT SHOULD BE"
            print(f"{name}: {good}, {time.monotonic() - begin:.0f} s", flush=True)
    runs = f"- Runs: {STEPS} steps of {BATCH} examples, a checkpoint every {EVERY}\n\n"
    table = results_page.table(COLUMNS, *(outcome.row() for outcome in outcomes))
    head = results_page.head("Faults, and what they cost", "torch")
    results_page.publish(head + runs + table + NOTES, "faults", args.write)
    return 0 if all(outcome.ok for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
