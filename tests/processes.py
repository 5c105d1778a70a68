"""Starts Python in processes that have imported torch and openimp already.

A new interpreter spends 4 s of CPU time on these imports. Here a server imports once, and each process is forked from
it. It has its own memory, output, signals and exit code, as any other. But all of them share one hash seed, which hides
an order of a set that differs between ranks, so at least one test of each kind starts Python as users do.
"""

import multiprocessing
import os
import runpy
import signal
import sys
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from subprocess import CompletedProcess

import openimp

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["__main__", "openimp.cli", "openimp.commands", "openimp.checkpoint.dcp", "pandas", "pytest", "tensorboard.summary",
     "torch._dynamo", "torch.distributed.fsdp", "torch.distributed.launcher.api", "torch.utils.tensorboard",
     *(f"openimp.modalities.{name}" for name in ("image", "video", "audio", "text"))]
)  # fmt: skip


class Process:
    """A process that runs `python *command`, with what tests use of `subprocess.Popen`.

    Args:
        command: what follows `python`: `-m` and a module, `-c` and code, or a file; and their arguments.
        merge: reads errors from `stdout`, as 2>&1 does, and not from `stderr`.
        folder: the working directory.
        environment: variables to set besides those of this process.
    """

    def __init__(self, *command: object, merge: bool = False, folder: Path | None = None, **environment: str) -> None:
        self.args = [str(part) for part in command]
        out, output = _CONTEXT.Pipe(duplex=False)
        err, errors = (out, output) if merge else _CONTEXT.Pipe(duplex=False)
        ends = (self.args, output, errors, folder or Path.cwd(), {**os.environ, **environment})
        self._process = _CONTEXT.Process(target=_run, args=ends)
        self._process.start()
        self.stdout, self.stderr = (os.fdopen(os.dup(end.fileno())) for end in (out, err))
        for end in {out, err, output, errors}:
            end.close()
        self.pid: int = self._process.ident or 0

    @property
    def returncode(self) -> int | None:
        """The exit code, negative if a signal ended it; None while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        assert self.returncode is not None, f"{self.args} still runs after {timeout} s"
        return self.returncode

    def send_signal(self, number: int) -> None:
        with suppress(ProcessLookupError):  # It has ended, as `Popen` allows.
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def run(*command: object, check: bool = False, **options: object) -> CompletedProcess[str]:
    """Runs `python *command` to its end, as `subprocess.run` does. For the other arguments see `Process`."""
    process = Process(*command, **options)
    with process.stdout as out, process.stderr as err:
        output, errors = out.read(), err.read()
    assert not check or process.wait() == 0, output + errors
    return CompletedProcess(process.args, process.wait(), output, errors)


def torchrun(ranks: int, *command: object, restarts: int = 0, nodes: str = "", forked: bool = True) -> list[object]:
    """The command that runs `openimp *command`, or a file with its arguments, on several ranks.

    Args:
        ranks: per node.
        restarts: how often torchrun may start all ranks again.
        nodes: if there are two of them, the address at which their two torchruns meet, as host:port.
        forked: whether torchrun forks the ranks, too. It then reports less of what ends them.
    """
    script = () if str(command[0]).endswith(".py") else (Path(openimp.__file__).with_name("__main__.py"),)
    meeting = ["--nnodes", 2, "--rdzv-backend", "c10d", "--rdzv-endpoint", nodes] if nodes else ["--standalone"]
    how = ["--nproc-per-node", ranks, "--max-restarts", restarts]
    fork = ["--start-method", "fork", "--run-path"] if forked else []
    return ["-m", "torch.distributed.run", *meeting, *how, *fork, *script, *command]


def _run(command: list[str], output: Connection, errors: Connection, folder: Path, environment: dict[str, str]) -> None:
    """Becomes `python *command`, in the process that the server forked."""
    multiprocessing.set_start_method(None, force=True)  # The default, and not that of this process.
    os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:0] = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
    for end, number in ((output, 1), (errors, 2)):
        os.dup2(end.fileno(), number)
    output.close()
    errors.close()
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    if command[0] == "-m":
        sys.argv = command[1:]
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    elif command[0] == "-c":
        sys.argv = ["-c", *command[2:]]
        exec(command[1], {"__name__": "__main__"})
    else:
        sys.argv = command
        runpy.run_path(command[0], run_name="__main__")
