"""Does the suite notice? Each slip of mutations.yaml in a copy of the repository, with the tests that ought to fail.

    python tests/mutate.py [--only NAME 'val-*'] [--jobs 2] [--all-tests]

`--check` alone says whether every slip still fits the code.
"""

import argparse
import fnmatch
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
FIELDS = {"name", "slip", "file", "before", "after", "tests"}  # and perhaps `survives`, the reason why none can notice
PASSED, TIMED_OUT = "passed", "timed out"  # of tests; else the name of the one that failed


def read_slips(patterns: list[str]) -> list[dict]:
    """The slips of these names; ends with what is wrong where one does not fit the code."""
    slips = yaml.safe_load((ROOT / "tests" / "mutations.yaml").read_text())
    names = [slip["name"] for slip in slips]
    problems = [f"{name}: there are two of this name" for name in sorted(set(names)) if names.count(name) > 1]
    problems += [f"--only {p}: there is no such slip" for p in patterns if not fnmatch.filter(names, p)]
    for slip in slips:
        if slip.keys() - {"survives"} != FIELDS:
            problems.append(f"{slip['name']}: it has {', '.join(slip)}, expected {', '.join(sorted(FIELDS))}")
            continue
        path = ROOT / slip["file"]
        found = path.read_text().count(slip["before"]) if path.is_file() else 0
        if found != 1 or slip["before"] == slip["after"]:
            problems.append(f"{slip['name']}: `before` is {found} times in {slip['file']}, expected once, not as after")
        slip["tests"] = [f"tests/test_{name}.py" for name in slip["tests"]]
        problems += [f"{slip['name']}: there is no {file}" for file in slip["tests"] if not (ROOT / file).is_file()]
    if problems:
        sys.exit("\n".join(problems))
    return [slip for slip in slips if not patterns or any(fnmatch.fnmatch(slip["name"], p) for p in patterns)]


def failed(tests: list[str], timeout: float, slip: dict | None = None, stop: bool = True) -> list[str]:
    """The tests that fail in a copy of the repository, with a slip in it; the first alone if `stop`."""
    with tempfile.TemporaryDirectory(prefix="mutate-", ignore_cleanup_errors=True) as folder:
        listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
        copy = Path(folder, "repository")
        for name in subprocess.run(listed, cwd=ROOT, capture_output=True, check=True, text=True).stdout.split("\0"):
            if name and (ROOT / name).is_file():
                (copy / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, copy / name)
        if slip is not None:
            file = copy / slip["file"]
            file.write_text(file.read_text().replace(slip["before"], slip["after"]))
        command = [sys.executable, "-m", "pytest", "-n", "0", "-q", "-rfE", "--tb=no", "--basetemp", f"{folder}/tmp"]
        process = subprocess.Popen(
            [*command, *["-x"] * stop, *tests], cwd=copy, env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            output, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            return [TIMED_OUT]
    names = re.findall(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", output, re.MULTILINE)
    return names if names or process.returncode == 0 else [f"pytest, which ends with {process.returncode}"]


def main() -> None:
    parser = argparse.ArgumentParser(description="Which of the slips in mutations.yaml fail no test?")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="these slips; patterns too")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="slips at a time (default: 1)")
    parser.add_argument("--timeout", type=float, default=900, metavar="S", help="seconds for a slip (default: 900)")
    parser.add_argument("--all-tests", action="store_true", help="survivors again with the whole suite")
    parser.add_argument("--check", action="store_true", help="only see whether each slip fits the code")
    arguments = parser.parse_args()
    slips = read_slips(arguments.only)
    if arguments.check:
        return print(f"{len(slips)} slips fit the code")

    def noticed(slip: dict, tests: list[str]) -> tuple[dict, str]:
        name = (failed(tests, arguments.timeout, slip) or [PASSED])[0]
        print(f"{slip['name']}: {name}", flush=True)
        return slip, name

    counted = [slip for slip in slips if "survives" not in slip]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        found = list(pool.map(lambda slip: noticed(slip, slip["tests"]), counted))
        if arguments.all_tests:
            again = [slip for slip, name in found if name in (PASSED, TIMED_OUT)]
            arguments.timeout *= 4
            print(f"\n{len(again)} slips with the whole suite", flush=True)
            others = {slip["name"]: name for slip, name in pool.map(lambda slip: noticed(slip, ["tests"]), again)}
            found = [(slip, others.get(slip["name"], name)) for slip, name in found]

    # A test that fails without any slip, too, has caught nothing
    functions = sorted({name.split("[")[0] for _, name in found if name.startswith("tests/")})
    broken = {name.split("[")[0] for name in failed(functions, 4 * arguments.timeout, stop=False)} if functions else ()
    broken = {PASSED, TIMED_OUT, *broken}
    survivors = [(slip, name) for slip, name in found if name.split("[")[0] in broken]
    print(f"\n{len(survivors)} survivors:")
    for slip, name in survivors:
        line = (ROOT / slip["file"]).read_text().partition(slip["before"])[0].count("\n") + 1
        why = {PASSED: "", TIMED_OUT: " (timed out)"}.get(name, f" ({name} fails without it, too)")
        print(f"  {slip['name']}  {slip['file']}:{line}  {slip['slip']}{why}")
    for slip in (slip for slip in slips if "survives" in slip):
        print(f"  not counted: {slip['name']}: {slip['survives']}")
    caught = len(counted) - len(survivors)
    print(f"\nscore {caught / max(1, len(counted)):.2f}: {caught} of {len(counted)} slips are caught")


if __name__ == "__main__":
    main()
