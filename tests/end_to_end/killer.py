"""A plug-in for `diffalign train --plugin`: kills its own process, without warning, at a chosen moment of the run.

DIFFALIGN_TEST_KILL=rollout:N | backward:N | save:N | rename:N, at the N-th denoiser call, backward pass, file flushed or
folder renamed of the process.
"""

import os
import signal


from diffalign.policies import Policy

moment, _, count = os.environ["DIFFALIGN_TEST_KILL"].partition(":")
left = int(count)


def die_in_time() -> None:
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)


def counted(function):
    def call(*args, **kwargs):
        die_in_time()
        return function(*args, **kwargs)

    return call


if moment == "rollout":
    Policy.predict = counted(Policy.predict)
elif moment == "backward":
    decode = Policy.decode

    def decode_and_wait(self, *args, **kwargs):
        pixels = decode(self, *args, **kwargs)
        if pixels.requires_grad:
            # The hook runs when the gradient comes back through the pixels: in the middle of the backward pass.
            pixels.register_hook(lambda gradient: die_in_time())
        return pixels

    Policy.decode = decode_and_wait
elif moment == "save":
    os.fsync = counted(os.fsync)
elif moment == "rename":
    os.rename = counted(os.rename)
    os.replace = counted(os.replace)
else:
    raise ValueError(moment)

