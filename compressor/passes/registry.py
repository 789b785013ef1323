"""Which passes there are: their settings by name, without torch, and the passes themselves."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING, overload

from compressor.core.errors import PassError
from compressor.core.passes import Pass, PruningSettings, StructureSettings, WeightSettings
from compressor.passes.settings.affine import AffineSettings
from compressor.passes.settings.gblm import GblmSettings
from compressor.passes.settings.hesso import HessoSettings
from compressor.passes.settings.jlcm import JlcmSettings
from compressor.passes.settings.lrp import LrpSettings
from compressor.passes.settings.metaprune import MetapruneSettings
from compressor.passes.settings.n2n import N2nSettings
from compressor.passes.settings.oto import OtoSettings
from compressor.passes.settings.reste import ResteSettings
from compressor.passes.settings.rounding import RoundingSettings
from compressor.passes.settings.sortednet import SortednetSettings
from compressor.passes.settings.trellis import TrellisSettings

if TYPE_CHECKING:
    from compressor.core.contract import PruningPass, StructurePass, WeightPass

PASSES: tuple[type[Pass], ...] = (
    AffineSettings,
    GblmSettings,
    HessoSettings,
    JlcmSettings,
    LrpSettings,
    MetapruneSettings,
    N2nSettings,
    OtoSettings,
    ResteSettings,
    RoundingSettings,
    SortednetSettings,
    TrellisSettings,
)
SETTINGS: dict[str, type[Pass]] = {settings.name: settings for settings in PASSES}


@overload
def load_pass(settings: WeightSettings) -> WeightPass: ...
@overload
def load_pass(settings: PruningSettings) -> PruningPass: ...
@overload
def load_pass(settings: StructureSettings) -> StructurePass: ...
def load_pass(settings: Pass) -> Pass:
    """The pass itself, with these settings. Imports its file, and with it torch.

    Raises:
        PassError: The file has no such pass.
    """
    module = importlib.import_module(f"compressor.passes.{settings.name}")
    return pass_class(module, settings.name)(**settings.model_dump())


def pass_class(module: ModuleType, name: str) -> type[Pass]:
    """The pass of that name that a module defines.

    Raises:
        PassError: There is none, or it lacks what `compressor.core.contract` asks of it.
    """
    from compressor.core.contract import PruningPass, StructurePass, WeightPass

    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, (WeightPass, PruningPass, StructurePass))
        and getattr(value, "name", None) == name
    ]
    if not found:
        raise PassError(
            f"{module.__name__}: has no pass named '{name}'; write a class of its settings and of WeightPass, "
            "PruningPass or StructurePass"
        )
    lacking = sorted(found[-1].__abstractmethods__)
    if lacking:
        raise PassError(f"{module.__name__}: {found[-1].__name__} has no {', '.join(lacking)}; write it")
    return found[-1]
