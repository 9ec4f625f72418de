"""Turns a TorchScript module into an ordinary one, along an example: :func:`module_of`.

Law: the module gives what the TorchScript gives on the example, or a :class:`~dissect.errors.LoadError` is raised.

The one file that uses ``torch._export.converter``: torch (seen in 2.13) has no public converter from TorchScript. Its
first half writes the TorchScript graph as a ``torch.fx`` one, which is what we take. Its second half exports that with
every size dynamic but a batch of one, which freezes the batch and fails on networks that check their sizes (S3D):
capture does it better. The first half needs example inputs, turns parameters into buffers, and leaves
``aten.convolution`` where TorchScript was traced.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import fx, nn
from torch._export.converter import TS2EPConverter
from torch.utils import _pytree as pytree

from dissect.errors import LoadError

__all__ = ["module_of"]

aten = torch.ops.aten
_CONVOLUTIONS = {3: aten.conv1d.default, 4: aten.conv2d.default, 5: aten.conv3d.default}  # by the weight's rank
_TRAINING = {aten.batch_norm.default: 5, aten.dropout.default: 2}  # the place of their training flag


def module_of(script: torch.jit.ScriptModule, inputs: tuple[Any, ...], name: str) -> nn.Module:
    """An ordinary module, in eval mode, with the operators, the parameters and the parameters' names of ``script``.

    ``inputs`` are example inputs, batch first; ``name`` stands in messages. Raises :class:`LoadError` where torch
    cannot convert it, where its result differs, or where it was saved in training mode.
    """
    script = script.eval()
    converter = _Converter(script, inputs)
    try:
        converter.convert()
    except Exception as error:
        lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise LoadError(
            f"{name} is TorchScript that torch {torch.__version__} cannot convert ({lines[0].rstrip('.')}). "
            "Is --input the size that the network takes? If it is, give its state_dict and --arch instead."
        ) from error
    module = converter.found
    for node in module.graph.nodes:
        place = _TRAINING.get(node.target)
        if place is not None and node.args[place]:
            raise LoadError(
                f"{name} was traced in training mode ({node.target}): its batch norms or dropouts follow the batch. "
                "Trace it again after model.eval()."
            )
    _own(module, {key for key, _ in script.named_parameters()})
    _plain_convolutions(module)
    _compare(script, module, inputs, name)
    return module.eval()


class _Converter(TS2EPConverter):
    """Torch's converter, stopped at the ``torch.fx`` graph, :attr:`found`."""

    found: fx.GraphModule

    def retrace_as_exported_program(self, gm: fx.GraphModule, name_to_constant: dict[str, Any]) -> Any:
        """Keep the graph, and give the caller the one attribute that it still reads."""
        self.found = gm
        return SimpleNamespace(state_dict=dict.fromkeys(self.ts_model.state_dict()))  # type: ignore[union-attr]


def _own(module: nn.Module, trained: set[str]) -> None:
    """Give the module tensors of its own, and make parameters of those that were parameters."""
    for key, tensor in [*module.named_parameters(), *module.named_buffers()]:
        path, _, leaf = key.rpartition(".")
        holder = module.get_submodule(path)
        copy = tensor.detach().clone()
        delattr(holder, leaf)
        if key in trained:
            holder.register_parameter(leaf, nn.Parameter(copy, requires_grad=copy.is_floating_point()))
        else:
            holder.register_buffer(leaf, copy)


def _plain_convolutions(module: fx.GraphModule) -> None:
    """Write ``aten.convolution`` as the 1D, 2D or 3D convolution that it is."""
    module.graph.eliminate_dead_code()
    for node in module.graph.find_nodes(op="call_function", target=aten.convolution.default):
        clip, weight, bias, stride, padding, dilation, transposed, _, groups = node.args
        plain = _CONVOLUTIONS.get(_attribute(module, weight.target).dim()) if weight.op == "get_attr" else None
        if plain is not None and not transposed:
            node.target = plain
            node.args = (clip, weight, bias, stride, padding, dilation, groups)
    module.recompile()


def _attribute(module: nn.Module, key: str) -> torch.Tensor:
    """The tensor at a dotted path."""
    path, _, leaf = key.rpartition(".")
    tensor: torch.Tensor = getattr(module.get_submodule(path), leaf)
    return tensor


def _compare(script: nn.Module, module: nn.Module, inputs: tuple[Any, ...], name: str) -> None:
    """Raise :class:`LoadError` where the two differ on the inputs."""
    try:
        with torch.no_grad():
            # A forward may change what it is given.
            wanted, got = (
                pytree.tree_leaves(network(*pytree.tree_map_only(torch.Tensor, torch.clone, inputs)))
                for network in (script, module)
            )
    except Exception as error:
        reason = str(error).strip().splitlines()[-1:] or [type(error).__name__]
        raise LoadError(
            f"{name} is TorchScript that fails on the example ({reason[0].rstrip('.')}). Is --input the size that the "
            "network takes?"
        ) from error
    if len(wanted) != len(got) or not all(
        a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-5, equal_nan=True)
        for a, b in zip(wanted, got, strict=True)
    ):
        raise LoadError(
            f"{name} is TorchScript whose conversion by torch {torch.__version__} gives other results than itself; "
            "give its state_dict and --arch instead."
        )
