"""The other side of `diffmas.evaluation.sandbox`: its text runs as `python -I -c`, without diffmas, inside the sandbox.

stdin: a line of JSON with the limits and a word, then the program. stdout: the word, and on the next line what went wrong.
"""

import json
import os
import resource
import sys
import types


def main() -> None:
    with os.fdopen(os.dup(0), "rb") as source:
        order, program = json.loads(source.readline()), source.read().decode("utf-8")
        os.ftruncate(source.fileno(), 0)  # bubblewrap's own process still has it open
    report = os.dup(1)
    os.set_inheritable(report, False)
    nothing = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(nothing, standard)
    try:
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")  # if memory runs out all the same, this goes first
    except OSError:
        pass
    for limit, most in (
        (resource.RLIMIT_CPU, int(order["seconds"]) + 1),
        (resource.RLIMIT_AS, order["memory"] // order["processes"]),
        (resource.RLIMIT_FSIZE, order["file"]),
        (resource.RLIMIT_NPROC, order["processes"]),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(limit)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(limit, (most, most))
    if order["uid"] is not None:
        os.setgroups([])
        os.setresgid(order["uid"], order["uid"], order["uid"])
        os.setresuid(order["uid"], order["uid"], order["uid"])
    # Meanwhile the word has no name: it is an operand that waits, which no frame shows to the program.
    os.write(report, order.pop("word").encode() + b"\n" + what_went_wrong(program).encode("utf-8", "replace"))
    os._exit(0)  # no thread and no exit handler of the program holds it up


def what_went_wrong(program: str) -> str:
    module = types.ModuleType("program")  # not __main__: its last lines are the tests, not a demonstration
    sys.modules["program"] = module
    try:
        exec(compile(program, "program", "exec"), module.__dict__)
    except BaseException as error:
        return (type(error).__name__ + (f": {error}" if str(error) else "")).replace("\n", " ")[:300]
    return ""


if __name__ == "__main__":
    main()
