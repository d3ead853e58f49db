"""A function of a pair, read out of Pyro once: what then runs is a tensor graph.

    pair, function, tensors  --make_fx-->  graph  --inductor-->  machine code

A step of training (guide, replayed model, discrete sums, objective, gradients) or a pass of weights
runs once under `torch.fx.experimental.proxy_tensor.make_fx`, with `torch.func.functional_call`
putting the module's tensors in. The graph draws the same random numbers as the program it was read
from, and before it is trusted its results are compared with the program's: they must be equal bit
for bit. Compiled, it adds in another order, so the last bits differ.
"""

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.passes.split_module import split_module

from pvae.held import held_by
from pvae.pair import Pair

__all__ = ["CannotLower", "Function", "Lowered", "compiled", "hoist"]

Function = Callable[..., list[Tensor | None]]  # of a pair and tensors


PACKAGE = (str(Path(__file__).parent),)  # whose frames a warning is not about
ops = torch.ops.aten

# What inductor is slow at on a CPU, and how else it can be said: its tanh takes six times its exp;
# a bias that `addmm` adds is a pass over memory of its own (`mm + b` would be made an `addmm`).
FASTER: list[tuple[Callable[..., Any], Callable[..., Any]]] = [
    (lambda x: ops.tanh.default(x), lambda x: 1 - 2 / (torch.exp(2 * x) + 1)),
    (lambda b, x, w: ops.addmm.default(b, x, w), lambda b, x, w: ops.mm.default(x, w) - (-b)),
]


@torch.library.custom_op(
    "pvae::bernoulli", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,)
)
def _bernoulli(probs: Tensor) -> Tensor:
    """torch's own draws, which inductor would replace by others of the same law."""
    return torch.bernoulli(probs)


@_bernoulli.register_fake
def _(probs: Tensor) -> Tensor:
    return torch.empty_like(probs)


class CannotLower(RuntimeError):
    """The program cannot be run as a graph; run it as it is."""

    @classmethod
    def because(cls, error: Exception) -> "CannotLower":
        """The first line of what went wrong."""
        first_line = str(error).strip().partition("\n")[0].rstrip(".")
        return cls(f"{type(error).__name__}: {first_line}")


class _Holder(nn.Module):
    """A function of a pair as a module's forward, for `functional_call`."""

    def __init__(self, pair: Pair, function: Function, beside: nn.Module | None):
        super().__init__()
        self.pair, self.function, self.beside = pair, function, beside

    def forward(self, *tensors: Tensor) -> list[Tensor | None]:
        return self.function(self.pair, *tensors)


class Lowered:
    """`function(pair, *tensors)` as a graph, for tensors of these shapes.

    Args:
        pair: whose parameters and buffers are inputs of the graph, so that it follows training.
        function: of the pair and tensors; it may differentiate in the pair's parameters.
        own: an example of what changes from call to call, rows along the first dimension.
        fixed: what stays, before the tensors of `own` in the function's arguments.
        beside: another module whose parameters and buffers the function uses.

    Raises:
        CannotLower: if the program depends on values, or its graph gives other results.
    """

    def __init__(
        self,
        pair: Pair,
        function: Function,
        own: Sequence[Tensor],
        fixed: Sequence[Tensor] = (),
        beside: nn.Module | None = None,
    ):
        self.holder = _Holder(pair, function, beside)
        named = self._named()
        self.trained = [tensor.requires_grad for tensor in named.values()]
        self.state = {name: tensor.detach() for name, tensor in named.items()}
        # Compared on other values than it was read with: the first row for every row.
        others = (*fixed, *(tensor[:1].expand_as(tensor).contiguous() for tensor in own))
        try:
            self.graph: Callable[..., Any] = self._apart(make_fx(self._run), (*fixed, *own))
            expected = self._apart(self._run, others)
            found = self._apart(self.graph, others)
            in_place = self._in_place(others)
        except Exception as error:
            raise CannotLower.because(error) from error
        if not _equal(expected, found) or not _equal(in_place, found):
            raise CannotLower("its results depend on more than parameters, data and random numbers")
        self.held = self._held()

    def compile(self, *tensors: Tensor) -> None:
        """Have inductor compile the graph, with torch's own random numbers.

        Raises:
            CannotLower: without a working C++ compiler.
        """
        self.graph = compiled(self.graph, [*self.state.values(), *tensors])

    def follows(self) -> bool:
        """Take up tensors that the pair has been given since; False if its graph is out of date."""
        named = self._named()
        shapes = {name: tensor.shape for name, tensor in self.state.items()}
        if shapes != {name: tensor.shape for name, tensor in named.items()}:
            return False
        self.state = {name: tensor.detach() for name, tensor in named.items()}
        return self.held == self._held()

    def _held(self) -> list[Any]:
        pair = self.holder.pair
        return held_by([pair, type(pair).model, type(pair).guide])

    def _named(self) -> dict[str, Tensor]:
        return dict(self.holder.named_parameters()) | dict(self.holder.named_buffers())

    def __call__(self, *tensors: Tensor) -> list[Any]:
        """What the function returns, without Pyro."""
        with torch.no_grad():
            return self.graph(*self.state.values(), *tensors)

    def _run(self, *tensors: Tensor) -> list[Tensor | None]:
        state = dict(zip(self.state, tensors, strict=False))
        found = functional_call(self.holder, state, tensors[len(state) :])
        return [None if value is None else value.detach() for value in found]

    def _apart(self, run: Callable[..., Any], tensors: tuple[Tensor, ...]) -> Any:
        """Run on copies of parameters and buffers, from one random state that is put back."""
        state = [
            tensor.clone().requires_grad_(trained)
            for tensor, trained in zip(self.state.values(), self.trained, strict=True)
        ]
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return run(*state, *tensors)

    def _in_place(self, tensors: tuple[Tensor, ...]) -> list[Tensor | None]:
        """The program itself, for networks that hide from `functional_call`."""
        kept = [tensor.clone() for tensor in self.state.values()]
        with torch.random.fork_rng():
            torch.manual_seed(0)
            found = self.holder(*tensors)
        for tensor, before in zip(self.state.values(), kept, strict=True):
            tensor.copy_(before)
        return found


def compiled(graph: Callable[..., Any], tensors: list[Any]) -> Callable[..., Any]:
    """A graph of tensors compiled by inductor for the shapes of these.

    Raises:
        CannotLower: without a working C++ compiler, or where its results are not the graph's.
    """
    import torch._inductor

    assert isinstance(graph, fx.GraphModule)
    expected = _on_copies(graph, tensors)
    graph = copy.deepcopy(graph)  # which is run as it is if this one cannot be trusted
    for node in graph.graph.find_nodes(op="call_function", target=ops.bernoulli.default):
        node.target = torch.ops.pvae.bernoulli.default
    graph.recompile()
    if tensors[0].device.type == "cpu":
        for slow, fast in FASTER:
            fx.replace_pattern(graph, slow, fast)
        _draw_at_once(graph)
    try:
        with torch.no_grad():
            run = torch._inductor.compile(graph, tensors, options={"fallback_random": True})
        found = _on_copies(run, tensors)
    except Exception as error:
        raise CannotLower.because(error) from error
    if not all(map(_close, expected, found)):  # seen of gradients through `index_select`
        raise CannotLower("what inductor makes of it gives other numbers")
    return run


def _on_copies(run: Callable[..., Any], tensors: list[Any]) -> list[Tensor | None]:
    """Results from one random state, which is put back, on tensors that it may write into."""
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        copies = (t.clone() if t.is_contiguous() else t for t in tensors)  # others are no buffers
        found = run(*copies)
    return [found] if isinstance(found, Tensor) else list(found)


def _close(expected: Tensor | None, found: Tensor | None) -> bool:
    """But for rounding, which sums of many terms magnify."""
    if expected is None or found is None or not expected.is_floating_point():
        return True
    size = expected.nan_to_num(0.0, 0.0, 0.0).abs().max() if expected.numel() else 0.0
    return torch.allclose(expected, found, rtol=1e-2, atol=1e-2 * float(size), equal_nan=True)


def _draw_at_once(graph: fx.GraphModule) -> None:
    """`randn`, for noise written into an empty tensor: the same numbers, and one copy fewer."""
    for node in graph.graph.find_nodes(op="call_function", target=ops.normal_.default):
        (empty, *moments) = node.args
        if empty.target is ops.empty.memory_format and len(empty.users) == 1 and not moments:
            kwargs = {name: empty.kwargs[name] for name in ("dtype", "device")}
            node.target, node.args, node.kwargs = ops.randn.default, empty.args, kwargs
            graph.graph.erase_node(empty)
    graph.recompile()


def hoist(
    graph: fx.GraphModule, late: int = 0
) -> tuple[Callable[..., Any], Callable[..., Any], list[int]]:
    """Cut a graph of one result into what no draw changes, and the rest.

    Args:
        graph: to cut.
        late: how many of its last inputs change from draw to draw, as random numbers do.

    Returns:
        A function from the graph's inputs to those of the second; the second, from these to the
        result; and where among its inputs the late ones are.

    Raises:
        CannotLower: if the result depends on no draw, or a draw is written into something else.
    """
    inputs = graph.graph.find_nodes(op="placeholder")
    drawn = _drawn(graph, set(inputs[len(inputs) - late :]))
    parts = split_module(graph, None, lambda node: int(node in drawn))  # type: ignore[arg-type]
    *_, last, output = parts.graph.nodes
    if last.target != "submod_1" or output.args[0] != [last]:
        raise CannotLower("its weights depend on no draw")
    names = [node.target for node in inputs[len(inputs) - late :]]
    found = [getattr(node, "target", None) for node in last.args]
    parts.graph.erase_node(output)
    parts.graph.output(list(last.args))
    parts.graph.erase_node(last)
    parts.recompile()
    return parts, parts.get_submodule("submod_1"), [found.index(name) for name in names]


def _drawn(graph: fx.GraphModule, late: set[fx.Node]) -> set[fx.Node]:
    """Nodes that depend on random numbers or these inputs, or are written to by one that does."""
    drawn = set(late)
    size = -1
    while size != len(drawn):
        size = len(drawn)
        for node in graph.graph.nodes:
            tags = getattr(node.target, "tags", ())
            if torch.Tag.nondeterministic_seeded in tags or drawn & set(node.all_input_nodes):
                drawn.add(node)
            schema = getattr(node.target, "_schema", None)
            if node in drawn and schema is not None and schema.is_mutable:
                written = node.args[0]
                made = getattr(written.target, "_schema", None)
                if made is None or any(value.alias_info for value in made.returns):
                    raise CannotLower(f"a draw is written into {written}, which is not one")
                drawn.add(written)
    return {node for node in drawn if node.op not in ("output", "placeholder")}


def _equal(left: list[Tensor | None], right: list[Tensor | None]) -> bool:
    """Bit for bit; on CUDA, where kernels may add in any order, but for rounding."""
    for a, b in zip(left, right, strict=True):
        if a is None or b is None:
            if a is not b:
                return False
        else:
            rtol, atol = (1e-3, 1e-4) if a.is_cuda else (0.0, 0.0)
            if not torch.allclose(a, b, rtol, atol, equal_nan=True):
                return False
    return True
