"""Training with the frozen weights of a transformer's blocks in main memory.

Each block has its weights on the device only while it computes. Offloading by diffusers (`enable_group_offload`,
`enable_model_cpu_offload`) is made for inference: it takes the adapter along, so that gradient and parameter end on
different devices, and moves the first parameters, by which a policy tells where its states are.
"""

from torch import nn


class Offload:
    """Takes the weights of all blocks (members of the module lists) of a model off its device.

    A block gets copies of its weights on the device before it is called, and loses them after. Its backward pass needs
    them again, so the block must be checkpointed: it is then called again, and what autograd keeps of that call holds
    the copies until they have been used. Weights that are added later, such as an adapter's, stay where they are.

    Args:
        model: a model of diffusers, on the meta device.
        fill: makes weights on the device for a module on the meta device; it gets one block after another.
    """

    def __init__(self, model, fill):
        self.parked = {}
        for child in model.children():
            if not isinstance(child, nn.ModuleList):
                fill(child)
                continue
            for block in child:
                fill(block)
                self.parked[block] = [
                    (module, name, in_main_memory(parameter), frozen(parameter.new_empty(0)))
                    for module in block.modules()
                    for name, parameter in module.named_parameters(recurse=False)
                ]
                self._drop(block)
                block.register_forward_pre_hook(self._load)
                # A checkpointed block is left by an exception as soon as all that it must compute again is there.
                block.register_forward_hook(self._drop, always_call=True)

    def _load(self, block, inputs):
        for module, name, weights, empty in self.parked[block]:
            # A new parameter, not new data in the old one, which autograd may have kept as it was.
            setattr(module, name, frozen(weights.to(empty.device, non_blocking=True, copy=True)))

    def _drop(self, block, inputs=None, output=None):
        for module, name, _, empty in self.parked[block]:
            setattr(module, name, empty)


def frozen(tensor):
    return nn.Parameter(tensor.detach(), requires_grad=False)


def in_main_memory(parameter):
    """A copy, pinned where it came from a GPU."""
    return parameter.detach().cpu().pin_memory() if parameter.is_cuda else parameter.detach().clone()
