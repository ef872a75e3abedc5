"""Scores a folder whole, and again killed and resumed. A program of its own, for it forks.

    python killed_scores.py small OUT INPUT COUNT    killed COUNT times at chosen calls of a reward or the disk
    python killed_scores.py groups OUT INPUT COUNT   the same, with a reward of groups and one of references
    python killed_scores.py zoo OUT INPUT COUNT      one run killed COUNT times, at random times after random parts

Every run is a process of its own that SIGKILL ends without a chance to clean up; forking spares each the imports.
"""

import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch

from diffalign.rewards import ParetoRank
from diffalign.scoring import parts, run, score
from diffalign.scoring.cache import Cache
from tests.scoring.pictures import Red, Redder, Words

RUNS = {
    "small": lambda: [Red(), Words("words")],
    "groups": lambda: [ParetoRank([Red(), Redder()], name="rank"), Redder()],
    "zoo": lambda: ["shapes-clip", "shapes-preference", "shapes-oracle", Red()],
}


def ticking(function, tick):
    def call(*args, **kwargs):
        tick()
        result = function(*args, **kwargs)
        tick()
        return result

    return call


def arm(moment, count):
    """Makes this process die at the moment-th call, before it or after; counts them where there is no moment."""

    def tick():
        count[0] += 1
        if count[0] == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    Red.values = ticking(Red.values, tick)
    Cache.put = ticking(Cache.put, tick)
    parts.os.fsync = ticking(os.fsync, tick)
    Path.replace = ticking(Path.replace, tick)
    run.best = ticking(run.best, tick)


def parts_of(folder):
    return len(list(folder.glob("out.parquet.parts/part-*")))


def scored(kind, folder, inputs, moment=None, after=None):
    """Exit status of a run in a process of its own: -9 where it was killed.

    At the moment-th call, or `after` (a number of parts, seconds): so long after there were so many parts.
    """
    folder.mkdir(exist_ok=True)
    child = os.fork()
    if child == 0:
        count = [0]
        if kind != "zoo":
            arm(moment, count)
            parts.ROWS = 8
        os.chdir(folder)
        try:
            score(inputs, RUNS[kind](), "out.parquet", keep=0.25, per="prompt", progress=False)
        finally:
            (folder / "calls").write_text(str(count[0]))
            sys.stderr.flush()
        os._exit(0)
    if after is not None:
        while parts_of(folder) < after[0] and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            time.sleep(0.05)
        time.sleep(after[1])
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    torch.set_num_threads(1)
    kind, out, inputs, count = sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    started, draw = time.monotonic(), np.random.default_rng(0)
    assert scored(kind, out / "whole", inputs) == 0
    seconds, calls = time.monotonic() - started, int((out / "whole" / "calls").read_text())
    print(f"whole: {seconds:.1f} s, {calls} calls", flush=True)
    if kind != "zoo":
        for number, part in enumerate(np.array_split(np.arange(1, calls + 1), count)):
            here, moment = out / f"kill-{number:02d}", int(draw.choice(part))
            assert scored(kind, here, inputs, moment) == -signal.SIGKILL, moment
            assert scored(kind, here, inputs) == 0, moment
    else:
        total = parts_of(out / "whole")
        for number, some in enumerate(np.array_split(np.arange(1, total), count)):
            after = int(draw.choice(some)), draw.random() * seconds / total
            assert scored(kind, out / "kill-00", inputs, after=after) == -signal.SIGKILL
            print(f"kill {number}: {after[1]:.2f} s after part {after[0]} of {total}", flush=True)
        assert scored(kind, out / "kill-00", inputs) == 0
