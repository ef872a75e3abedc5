"""What policies with exact answers share: no pipeline, no prompts, and an adapter that is switched off by name."""

from contextlib import contextmanager

import torch

from diffalign.policies import Condition, Policy


class ExactPolicy(Policy):
    """`predict`, `decode`, `schedule`, `trainable` and shapes are a subclass's; it sets `adapter` to True."""

    pipeline_class, patch_size = "none", 1

    def check(self):
        pass

    def prediction_kind(self):
        return "sample"

    def encode(self, prompts):
        return Condition({"none": torch.zeros(len(prompts), 1)})

    def encode_one(self, prompt):
        return self.encode([prompt])

    def evaluate(self, x, timestep, condition):
        raise NotImplementedError

    def set_gradient_checkpointing(self, enabled):
        pass

    @contextmanager
    def reference(self):
        self.adapter = False
        try:
            yield
        finally:
            self.adapter = True
