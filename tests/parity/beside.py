"""What the programs of this folder that run without diffalign share."""

import importlib
import sys


def mend_torchvision():
    """Declares the schemas that torchvision's wheel lacks beside a torch without CUDA, so that it can be imported."""
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        from torch.library import Library

        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        sys.kept_library = Library("torchvision", "DEF")
        sys.kept_library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        sys.kept_library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
