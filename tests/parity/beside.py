"""What the programs of this folder that run without diffalign share."""

import importlib
import importlib.abc
import importlib.machinery
import sys
import types


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


class EmptyModule(types.ModuleType):
    """Any name that is asked of it is a class."""

    __path__ = ()

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class EmptyFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds what is not installed and not needed: modules of these names, and what is inside them."""

    def __init__(self, names):
        self.names = names

    def find_spec(self, name, path=None, target=None):
        known = any(name == empty or name.startswith(f"{empty}.") for empty in self.names)
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if known else None

    def create_module(self, spec):
        return EmptyModule(spec.name)

    def exec_module(self, module):
        pass
