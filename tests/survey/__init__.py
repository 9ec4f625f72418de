"""A survey: networks typed in the manner of well-known public video code, at reduced width.

None of them knows of dissect. Each is converted as it is in every preset, and held to what the preset promises.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm

__all__ = ["FAMILIES", "NETWORKS", "Network", "families", "network"]

FAMILIES = (
    "residual",
    "inception",
    "mobile",
    "motion",
    "attention",
    "dense",
    "vital",
    "recurrent",
    "skeleton",
    "streams",
)
NETWORKS: dict[str, Network] = {}


@dataclass(frozen=True)
class Network:
    """A network's class, the shapes of its inputs, how ``dissect.convert`` is told about it, and what it must refuse.

    ``refused`` maps a preset to what its refusal must name.
    """

    kind: Callable[[], nn.Module]
    shapes: tuple[tuple[int, ...], ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    listed: bool = False
    squeezed: bool = False

    def build(self) -> tuple[nn.Module, tuple[Any, ...]]:
        """The network in eval mode and float64 with parameters in which no error can hide, and an example of its inputs."""
        torch.manual_seed(0)
        model = disturbed(self.kind())
        inputs = tuple(torch.rand(shape, dtype=torch.float64) for shape in self.shapes)
        return model.double(), (list(inputs),) if self.listed else inputs


def families() -> dict[str, dict[str, Network]]:
    """All networks by family, in the order of the files."""
    found: dict[str, dict[str, Network]] = {}
    for name in FAMILIES:
        module = importlib.import_module(f"survey.{name}")
        found[name] = {key: net for key, net in NETWORKS.items() if net.kind.__module__ == module.__name__}  # type: ignore[attr-defined]
    return found


def disturbed(model: nn.Module) -> nn.Module:
    """No statistic at rest, no parameter constant; in eval mode, whatever the network's own ``eval`` returns."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() and parameter.min() == parameter.max():
                parameter.add_(0.3 * torch.randn_like(parameter))
        for module in model.modules():
            if isinstance(module, BatchNorm) and module.running_mean is not None:
                assert module.running_var is not None
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.5, 2)
    model.eval()
    return model


def network(
    *shapes: tuple[int, ...],
    refused: str | Mapping[str, str] | None = None,
    listed: bool = False,
    squeezed: bool = False,
    **options: Any,
) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Register a network for the survey; ``listed``: it takes one list of its inputs; ``squeezed``: it drops a batch of one."""

    def register(kind: type[nn.Module]) -> type[nn.Module]:
        assert kind.__name__ not in NETWORKS, kind.__name__
        why = dict.fromkeys(("exact", "causal", "d3d"), refused) if isinstance(refused, str) else dict(refused or {})
        NETWORKS[kind.__name__] = Network(kind, shapes or ((1, 3, 16, 16, 16),), options, why, listed, squeezed)
        return kind

    return register
