"""Runs one recipe whole, and again killed at chosen moments and resumed. A program of its own, for it forks.

    python killed_runs.py --at MOMENT,... OUT RECIPE [OVERRIDE ...]
    python killed_runs.py --random COUNT OUT RECIPE [OVERRIDE ...]

At some of MOMENTS, or at COUNT moments that a clock draws evenly over the run.

Every run is a process of its own that SIGKILL ends without a chance to clean up; forking spares each the imports.
"""

import os
import signal
import sys
import time

import numpy as np
import torch

from diffalign.__main__ import main
from diffalign.policies import Policy

MOMENTS = {
    # name: at which count the process dies; the counts are those of the recipes in test_resume.py
    "rollout": 22,
    "backward": 3,
    "update": 11,
    "save": 5,
    "rename": 2,
}


def count_down(count):
    """A function that kills this process when it is called for the count-th time."""
    left = [count]

    def tick():
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    return tick


def ticking(function, tick):
    def call(*args, **kwargs):
        tick()
        return function(*args, **kwargs)

    return call


def arm(moment):
    """Makes this process die at the moment."""
    tick = count_down(MOMENTS[moment])
    if moment == "rollout":
        Policy.predict = ticking(Policy.predict, tick)
    elif moment == "backward":
        decode = Policy.decode

        def decode_and_wait(self, *args, **kwargs):
            pixels = decode(self, *args, **kwargs)
            if pixels.requires_grad:
                # Called when the gradient comes back through the pixels: in the middle of the backward pass.
                pixels.register_hook(lambda gradient: tick())
            return pixels

        Policy.decode = decode_and_wait
    elif moment == "update":
        torch.optim.AdamW.step = ticking(torch.optim.AdamW.step, tick)
    elif moment == "save":
        os.fsync = ticking(os.fsync, tick)
    else:
        os.rename = ticking(os.rename, tick)


def run(arguments, moment=None, after=None):
    """Exit status of a train command in a process of its own; -9 where it was killed, `after` seconds for one."""
    child = os.fork()
    if child == 0:
        if moment:
            arm(moment)
        sys.argv = ["diffalign", "train", *arguments]
        try:
            main()
        except SystemExit as done:
            os._exit(done.code or 0)
        os._exit(0)
    if after is not None:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)  # of one that has ended and was not waited for this does nothing
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def at_chosen_moments(out, recipe, names):
    for name in names:
        here = [*recipe, f"output_dir={out}/{name}"]
        assert run(here, name) == -signal.SIGKILL, name
        assert run([*here, "resume_from_checkpoint=latest"]) == 0, name


def at_random_moments(out, recipe, count, duration):
    """One moment drawn in each of `count` equal parts of the run, so that none of it is left out."""
    rng = np.random.default_rng(0)
    for number in range(count):
        here = [*recipe, f"output_dir={out}/kill-{number:02d}"]
        after = (number + rng.random()) / count * duration
        status = run(here, after=after)
        print(f"kill {number} after {after:.2f} of {duration:.2f} s: exit status {status}", flush=True)
        assert status in (0, -signal.SIGKILL)  # 0: a run that was faster than the one whose time was taken
        assert run([*here, "resume_from_checkpoint=latest"]) == 0, number


if __name__ == "__main__":
    torch.set_num_threads(1)
    how, which, out, *recipe = sys.argv[1:]
    started = time.monotonic()
    assert run([*recipe, f"output_dir={out}/whole"]) == 0
    if how == "--random":
        at_random_moments(out, recipe, int(which), time.monotonic() - started)
    else:
        at_chosen_moments(out, recipe, which.split(","))
