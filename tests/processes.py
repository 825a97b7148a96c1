"""Scripts in processes of their own that start at once: forked from one that has imported everything."""

import multiprocessing
import multiprocessing.forkserver
import os
import runpy
import signal
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["processes_preloaded"])
TESTS = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))


def start(target, *arguments, **settings):
    """A process that calls a function."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = TESTS if before is None else TESTS + os.pathsep + before  # where the server looks
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)
    process = context.Process(target=target, args=arguments, kwargs=settings)
    process.start()
    return process


class Script:
    """`python SCRIPT ARGUMENTS` (or `-m MODULE ARGUMENTS`); what it prints is in `stdout` and `stderr` once it ended.

    Args:
        environment: Variables to set, or with None to unset.
        outputs: File descriptors for stdout and stderr instead.
    """

    def __init__(self, *command, cwd=ROOT, new_session=False, outputs=None, **environment):
        self._folder = tempfile.TemporaryDirectory()
        self.files = [Path(self._folder.name, name) for name in ("stdout", "stderr")]
        outputs = outputs or [str(file) for file in self.files]
        environment = {"OMP_NUM_THREADS": "1", **environment}
        self.process = start(_run, list(map(str, command)), str(cwd), environment, outputs, new_session)

    @property
    def pid(self) -> int:
        return self.process.pid

    def poll(self) -> int | None:
        """The exit code; None while it runs."""
        return self.process.exitcode

    def send_signal(self, signum: int) -> None:
        os.kill(self.pid, signum)

    def wait(self, timeout: float = 120) -> "Script":
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.send_signal(signal.SIGKILL)
            raise TimeoutError(f"{self.stdout[-3000:]}\n{self.stderr[-3000:]}")
        return self

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    @property
    def stdout(self) -> str:
        return self.files[0].read_text(errors="replace") if self.files[0].exists() else ""

    @property
    def stderr(self) -> str:
        return self.files[1].read_text(errors="replace") if self.files[1].exists() else ""

    def wait_until(self, happened, timeout: float = 120) -> None:
        """Wait for something that the script does; fails if it ends or takes too long."""
        end = time.monotonic() + timeout
        while not happened():
            assert self.poll() is None and time.monotonic() < end, self.stdout[-3000:] + self.stderr[-3000:]
            time.sleep(0.02)


def _run(command, cwd, environment, outputs, new_session) -> None:
    multiprocessing.set_start_method("fork", force=True)  # as in a script that was started by hand
    if new_session:
        os.setsid()
    os.chdir(cwd)
    for name, value in environment.items():
        os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)
    if "PYTHONPATH" in environment:  # its modules rather than those that are imported already
        sys.path.insert(0, environment["PYTHONPATH"])
        for name in [path.stem for path in Path(environment["PYTHONPATH"]).glob("*.py")]:
            for module in [module for module in sys.modules if module.split(".")[0] == name]:
                del sys.modules[module]
    sys.stdin = open(os.devnull)
    for descriptor, output in zip((1, 2), outputs):
        file = output if isinstance(output, int) else os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, descriptor)
    encoding = os.environ.get("PYTHONIOENCODING", "utf-8")
    sys.stdout, sys.stderr = (open(i, "w", encoding=encoding, errors=e, buffering=1, closefd=False) for i, e in
                              ((1, "strict"), (2, "backslashreplace")))  # fmt: skip
    if command[0] == "-m":
        sys.argv = command[1:]
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = command
        sys.path.insert(0, str(Path(command[0]).resolve().parent))
        runpy.run_path(command[0], run_name="__main__")


def train(config: Path, *options, **settings) -> Script:
    """`python train_flextok.py --config CONFIG --device cpu OPTIONS`."""
    return Script(ROOT / "train_flextok.py", "--config", config, "--device", "cpu", *options, **settings)


def step_is_logged(run_dir: Path, step: int) -> bool:
    file = run_dir / "metrics.jsonl"
    return file.exists() and f'"step": {step},' in file.read_text()
