"""One of two processes that train; in step 3 the gradient of the second is NaN: `nan_on_one_rank.py RECIPE OUT`."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from diffalign.cli import main
from diffalign.rewards import REWARDS, Reward


@REWARDS.register("sick")
class Sick(Reward):
    """Redness, whose gradient is NaN on rank 1 from step 3 on; its values stay fine."""

    name = "sick"
    differentiable = True
    gradients = 0

    def values(self, images, prompts, metadata):
        if images.requires_grad:
            self.gradients += 1
            # The first is the proof of the gradient, before training.
            if os.environ["RANK"] == "1" and self.gradients == 1 + 3:
                images.register_hook(lambda gradient: gradient * float("nan"))
        return images[:, 0].mean((1, 2))


recipe, out = sys.argv[1:]
sys.argv = ["diffalign", "train", recipe, f"output_dir={out}"]
main()
