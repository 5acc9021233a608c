"""LAMB and LARS of other packages, where they are installed (the extra `bench` brings them)."""

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

Classes = tuple[Any, Any]


def installed_optimizers() -> tuple[dict[str, Classes], list[str]]:
    """(Lamb, Lars) by package, and the packages that are not here."""
    found: dict[str, Classes] = {}
    if importlib.util.find_spec("timm") is not None:
        found["timm"] = _timm()
    if importlib.util.find_spec("pytorch_optimizer") is not None:
        package = importlib.import_module("pytorch_optimizer")
        found["pytorch_optimizer"] = (package.Lamb, package.LARS)
    return found, [name for name in ("timm", "pytorch_optimizer") if name not in found]


def _timm() -> Classes:
    """Its two modules without those of the package around them, which import torchvision and all models."""
    loaded = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "timm"}
    if "timm.optim" not in loaded:
        spec = importlib.util.find_spec("timm")
        assert spec is not None
        assert spec.submodule_search_locations
        root = Path(spec.submodule_search_locations[0])
        for name, path in (("timm", root), ("timm.optim", root / "optim")):
            sys.modules[name] = ModuleType(name)
            sys.modules[name].__path__ = [str(path)]
    try:
        return importlib.import_module("timm.optim.lamb").Lamb, importlib.import_module("timm.optim.lars").Lars
    finally:
        for name in [n for n in sys.modules if n.split(".")[0] == "timm"]:
            del sys.modules[name]
        sys.modules.update(loaded)
