"""Commands whose system calls fail: started by a process with shim.c preloaded, which imports everything once."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

import launch


def build(folder: Path) -> Path:
    """Compile the shim; return the library."""
    library = folder / "shim.so"
    compiler = shutil.which("cc")
    assert compiler is not None
    words = [compiler, "-shared", "-fPIC", "-O1", "-w", "-o", str(library), str(Path(__file__).with_name("shim.c"))]
    subprocess.run([*words, "-ldl"], check=True)
    return library


class Server:
    """The process that starts the commands."""

    def __init__(self, folder: Path) -> None:
        environ = {**os.environ, "LD_PRELOAD": str(build(folder)), "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, __file__], env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, words: Sequence[str], folder: Path, shim: str = "") -> tuple[int, str]:
        """Run moa-train while the calls that ``shim`` means fail; return the exit code and the output."""
        assert self._process.stdin
        assert self._process.stdout
        log = folder / "failing.txt"
        print(json.dumps([list(words), str(folder), str(log), shim]), file=self._process.stdin, flush=True)
        return int(self._process.stdout.readline()), log.read_text()

    def close(self) -> None:
        """End the process."""
        self._process.communicate(timeout=30)


def serve() -> None:
    """Fork a process for each line of the input, and print its exit code."""
    for module in launch.PRELOADED:
        import_module(module)
    for line in sys.stdin:
        words, folder, log, shim = json.loads(line)
        child = os.fork()
        if child == 0:
            code = 1
            try:
                launch._run(launch.TRAIN, words, {"MOA_SHIM": shim}, folder, log, None, False, None)
            except SystemExit as error:
                code = int(error.code or 0)
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    serve()
