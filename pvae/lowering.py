"""A step of training, read out of Pyro once: what then runs is a tensor graph.

    pair, function, batch  --make_fx-->  graph(tensors, batch)  --inductor-->  machine code

Guide, replayed model, discrete sums, objective and gradients run once under
`torch.fx.experimental.proxy_tensor.make_fx`, with `torch.func.functional_call` putting the module's
tensors in. The graph draws the same random numbers as the program it was read from, and before it
is trusted its results are compared with the program's: they must be equal bit for bit. Compiled, it
adds in another order, so the last bits differ.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten, tree_unflatten

from pvae.pair import Batch, Pair

__all__ = ["CannotLower", "Lowered"]


class CannotLower(RuntimeError):
    """The program cannot be run as a graph; run it as it is."""


class _Holder(nn.Module):
    """A function of a pair as a module's forward, for `functional_call`."""

    def __init__(self, pair: Pair, function: Callable[[Pair, Batch], dict[str, Tensor]]):
        super().__init__()
        self.pair, self.function = pair, function

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        return self.function(self.pair, batch)


class Lowered:
    """`function(pair, batch)` and its gradients as a graph, for batches of one shape.

    Args:
        pair: whose parameters and buffers are inputs of the graph, so that it follows training.
        function: from the pair and a batch to scalars by name; the first is differentiated.
        batch: an example, whose values do not matter.

    Raises:
        CannotLower: if the program depends on values, or its graph gives other results.
    """

    def __init__(
        self, pair: Pair, function: Callable[[Pair, Batch], dict[str, Tensor]], batch: Batch
    ):
        self.holder = _Holder(pair, function)
        named = dict(self.holder.named_parameters())
        self.parameters = {name: p for name, p in named.items() if p.requires_grad}
        frozen = {name: p for name, p in named.items() if not p.requires_grad}
        self.buffers = frozen | dict(self.holder.named_buffers())
        leaves, self.layout = tree_flatten(batch)
        try:
            self.graph: Callable[..., Any] = self._apart(
                lambda p, b: make_fx(lambda *inputs: self._run(*inputs))(p, b, leaves)
            )
            expected = self._apart(lambda p, b: self._run(p, b, leaves))
            found = self._apart(lambda p, b: self.graph(p, b, leaves))
        except Exception as error:
            first_line = str(error).strip().partition("\n")[0]
            raise CannotLower(f"{type(error).__name__}: {first_line}") from error
        if not _equal(expected, found) or not _equal(self._in_place(leaves), found):
            raise CannotLower(
                "its results depend on more than parameters, batch and random numbers"
            )

    def compile(self, batch: Batch) -> None:
        """Compile the graph by inductor, with torch's own random numbers.

        Raises:
            CannotLower: without a working C++ compiler.
        """
        leaves = tree_flatten(batch)[0]
        compiled = torch.compile(
            self.graph, dynamic=False, fullgraph=True, options={"fallback_random": True}
        )
        try:
            with torch.no_grad():  # as it will be called: the graph holds its own gradients
                self._apart(lambda p, b: compiled([t.detach() for t in p], b, leaves))
        except Exception as error:
            first_line = str(error).strip().partition("\n")[0]
            raise CannotLower(f"{type(error).__name__}: {first_line}") from error
        self.graph = compiled

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        """The function's values, after setting the gradients of the pair's parameters."""
        parameters = [parameter.detach() for parameter in self.parameters.values()]
        with torch.no_grad():
            values, gradients = self.graph(
                parameters, list(self.buffers.values()), tree_flatten(batch)[0]
            )
        for parameter, gradient in zip(self.parameters.values(), gradients, strict=True):
            parameter.grad = gradient
        return dict(zip(self.names, values, strict=True))

    def _run(self, parameters: list[Tensor], buffers: list[Tensor], leaves: list[Tensor]) -> Any:
        tensors = dict(zip(self.parameters, parameters, strict=True))
        tensors |= dict(zip(self.buffers, buffers, strict=True))
        result = functional_call(self.holder, tensors, (tree_unflatten(leaves, self.layout),))
        self.names = list(result)
        first = next(iter(result.values()))
        gradients = torch.autograd.grad(first, parameters, allow_unused=True)
        return [value.detach() for value in result.values()], list(gradients)

    def _apart(self, run: Callable[[list[Tensor], list[Tensor]], Any]) -> Any:
        """Run on copies of parameters and buffers, from one random state that is put back."""
        parameters = [p.detach().clone().requires_grad_() for p in self.parameters.values()]
        buffers = [buffer.detach().clone() for buffer in self.buffers.values()]
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return run(parameters, buffers)

    def _in_place(self, leaves: list[Tensor]) -> Any:
        """The program itself, for networks that hide from `functional_call`."""
        kept = {name: buffer.clone() for name, buffer in self.buffers.items()}
        with torch.random.fork_rng():
            torch.manual_seed(0)
            result = self.holder(tree_unflatten(leaves, self.layout))
            parameters = list(self.parameters.values())
            first = next(iter(result.values()))
            gradients = torch.autograd.grad(first, parameters, allow_unused=True)
        with torch.no_grad():
            for name, buffer in self.buffers.items():
                buffer.copy_(kept[name])
        return [value.detach() for value in result.values()], list(gradients)


def _equal(left: Any, right: Any) -> bool:
    pairs = zip(tree_flatten(left)[0], tree_flatten(right)[0], strict=True)
    return all(
        (a is None and b is None) or (a is not None and b is not None and torch.equal(a, b))
        for a, b in pairs
    )
