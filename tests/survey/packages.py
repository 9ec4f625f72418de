"""Networks of packages on PyPI, unmodified, made small by their own arguments; each is left out where its package is missing."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from survey import disturbed

__all__ = ["PACKAGES", "Package"]


@dataclass(frozen=True)
class Package:
    """A factory of a package, what it is called with, and the shape of a clip for it.

    ``arguments`` are its keywords, or, as a tuple, its positional arguments. ``refused`` maps a preset to what its refusal
    must name.
    """

    distribution: str
    factory: str
    arguments: Any = field(default_factory=dict)
    clip: tuple[int, ...] = (1, 1, 16, 32, 32)
    options: Mapping[str, Any] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    configured: bool = False

    def build(self) -> tuple[nn.Module, tuple[Any, ...]]:
        """The network in float64 and eval mode, and an example; ImportError where the package is not there."""
        from public_networks import _declare_torchvision_operators

        self_declared = _declare_torchvision_operators()  # some of them import torchvision
        module, _, name = self.factory.partition(":")
        factory: Callable[..., Any] = getattr(importlib.import_module(module), name)
        torch.manual_seed(0)
        arguments = self.arguments
        if self.configured:
            config = importlib.import_module("transformers")
            model = factory(getattr(config, arguments.pop("config"))(**arguments))
        else:
            model = factory(*arguments) if isinstance(arguments, tuple) else factory(**arguments)
        del self_declared
        assert isinstance(model, nn.Module), inspect.getfile(factory)
        return disturbed(model).double(), (torch.rand(self.clip, dtype=torch.float64),)
