"""Which passes there are: their settings by name, without torch, and the passes themselves."""

from __future__ import annotations

import importlib
from typing import Any

from compressor.core.passes import Pass
from compressor.passes.settings.affine import AffineSettings
from compressor.passes.settings.gblm import GblmSettings
from compressor.passes.settings.hesso import HessoSettings
from compressor.passes.settings.jlcm import JlcmSettings
from compressor.passes.settings.lrp import LrpSettings
from compressor.passes.settings.n2n import N2nSettings
from compressor.passes.settings.oto import OtoSettings
from compressor.passes.settings.reste import ResteSettings
from compressor.passes.settings.rounding import RoundingSettings

SETTINGS: dict[str, type[Pass]] = {
    kind.name: kind
    for kind in (
        AffineSettings,
        GblmSettings,
        HessoSettings,
        JlcmSettings,
        LrpSettings,
        N2nSettings,
        OtoSettings,
        ResteSettings,
        RoundingSettings,
    )
}


def load_pass(settings: Pass) -> Pass:
    """The pass itself, with these settings. Imports its file, and with it torch."""
    module = importlib.import_module(f"compressor.passes.{settings.name}")
    return pass_class(module, settings.name)(**settings.model_dump())


def pass_class(module: Any, name: str) -> type[Pass]:
    """The pass that a module of `compressor.passes` defines: the last class in it of that name."""
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Pass) and getattr(value, "name", None) == name
    ]
    return max(found, key=lambda kind: len(kind.__mro__))
