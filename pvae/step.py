"""A step of training, at three speeds with the same random numbers.

    tensors --fetch--> batch --draw--> particles --objective--> bound --autograd--> gradients
    gradients --optimizer--> parameters

- "eager": the pair's programs run in Pyro.
- "traced": the graph that `lowering` reads out of Pyro once; equal bit for bit.
- "compiled": that graph, compiled; sums are taken in another order.

On CUDA a lowered step, optimiser included, is captured once and replayed as one CUDA graph. Nothing
in a lowered step waits for its result: sums stay in `totals` until somebody reads them.
"""

import copy
import inspect
from collections.abc import Callable, Sequence
from typing import Any, Literal

import pyro.infer
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.optim import Optimizer

from pvae.batches import Source
from pvae.fence import evaluating
from pvae.lowering import CannotLower, Lowered
from pvae.objectives import Objective
from pvae.pair import Pair

__all__ = ["PyroStep", "Speed", "Step", "make_optimizer"]

Speed = Literal["eager", "traced", "compiled"]

FUSED = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)
MOST_LOWERINGS = 4  # of one fit, each because a plain number in the pair has changed
WARM_UP = 3  # steps before a CUDA graph is captured, in which libraries make their workspaces


def make_optimizer(
    optimizer: Callable[..., Optimizer], parameters: list[Tensor], lr: float, device: torch.device
) -> Optimizer:
    """An optimiser of the parameters; torch's own in their fused form, one pass over memory.

    The fused ones take the learning rate as a tensor, so that a schedule changes a number in a
    graph and not the graph.
    """
    if optimizer not in FUSED:
        return optimizer(parameters, lr=lr)
    settings: dict[str, Any] = {"fused": True}
    rate = torch.tensor(lr, dtype=torch.float64)
    if device.type == "cuda":
        rate = rate.to(device, torch.float32)  # what its kernels read
        settings |= {} if optimizer is torch.optim.SGD else {"capturable": True}
    return optimizer(parameters, lr=rate, **settings)


class Step:
    """One step of the optimiser on one batch.

    Args:
        pair: trained in place.
        objective: its bound, averaged over the batch, is maximised.
        source: whose `fetch` makes a batch, from tensors that stay and those of a step.
        optimizer: made by `make_optimizer`.
        clip_norm: largest norm of the gradient.

    Attributes:
        names: of what `totals` sums after the objective: the bound, its parts by site.
        totals: sums over data since `restart`, in nats, on the device.
    """

    def __init__(
        self,
        pair: Pair,
        objective: Objective,
        source: Source,
        optimizer: Optimizer,
        clip_norm: float | None,
    ):
        self.pair, self.objective, self.source = pair, objective, source
        self.optimizer, self.clip_norm = optimizer, clip_norm
        self.parameters = self._trained(pair)
        self.names: list[str] = []
        self.totals = torch.zeros(0, dtype=torch.float64, device=source.device)
        self.lowered: Lowered | None = None
        self._shapes: list[torch.Size] = []
        self._update: _Update | None = None
        self._replay: _Replay | None = None
        self._times_lowered = 0
        self._warm = 0
        self._held: list[Any] = []  # what the CUDA graph has of the optimiser

    def lower(self, compile: bool) -> None:
        """Have steps on whole batches run as a graph.

        Raises:
            CannotLower: if that cannot be, or there is nothing to compile it with; then the graph
                is used as it is.
        """
        self.lowered = self._replay = None
        self._times_lowered += 1
        if self._times_lowered > MOST_LOWERINGS:
            raise CannotLower(
                "a number that is no tensor keeps changing; keep it in a buffer, and fill that"
            )
        own = self.source.example()
        with torch.random.fork_rng():
            fixed = self.source.fixed
            self.lowered = Lowered(
                self.pair, self.bound_and_gradients, own, fixed, beside=self.objective
            )
        self._shapes = [tensor.shape for tensor in own]
        if compile:
            self.lowered.compile(*self.source.fixed, *own)

    def forget(self) -> None:
        """Drop graphs that hold the optimiser's state, which has been replaced."""
        self._update = self._replay = None

    def restart(self) -> None:
        """Begin new sums, with the optimiser as it is now."""
        self.totals.zero_()
        if self._update is not None and not self._update.is_current():
            self._update = None

    def follows(self) -> bool:
        """Whether the graph, if there is one, is still that of the pair as it is now."""
        if self.lowered is None:
            return True
        before = list(self.lowered.state.values())
        now = self.lowered.follows() and list(self.lowered.state.values())
        if now and [t.data_ptr() for t in before] != [t.data_ptr() for t in now]:
            self._replay = None
        return bool(now)

    def means(self, num_data: int) -> list[float]:
        """The sums over this many data; waits for the device."""
        return (self.totals[1:] / num_data).tolist()

    def __call__(self, num_data: int, *tensors: Tensor) -> None:
        """Take a step on a batch of `num_data`; its results are in the parameters and `totals`."""
        if self.lowered is None or [tensor.shape for tensor in tensors] != self._shapes:
            self.finish(num_data, self.eager(*tensors))
        elif tensors[0].device.type != "cuda" or not _is_capturable(self.optimizer):
            self._run_lowered(num_data, *tensors)
        else:
            self._run_captured(num_data, *tensors)

    def _run_lowered(self, num_data: int, *tensors: Tensor) -> None:
        assert self.lowered is not None
        self.finish(num_data, self.lowered(*self.source.fixed, *tensors))

    def _run_captured(self, num_data: int, *tensors: Tensor) -> None:
        """After some steps that are not, for libraries to make their workspaces."""
        if self._warm < WARM_UP:
            self._warm += 1
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self._run_lowered(num_data, *tensors)
            torch.cuda.current_stream().wait_stream(stream)
            return
        groups = self.optimizer.param_groups
        held = [_settings(self.optimizer), *(id(group["lr"]) for group in groups)]
        if self._replay is None or self._held != held:
            self._held = held
            self._replay = _Replay(lambda *own: self._run_lowered(num_data, *own), tensors)
        self._replay(*tensors)

    def eager(self, *tensors: Tensor) -> list[Tensor | None]:
        """The bound, its parts and the gradients of a step in Pyro, which is not taken."""
        return self.bound_and_gradients(self.pair, *self.source.fixed, *tensors)

    def bound_and_gradients(self, pair: Pair, *tensors: Tensor) -> list[Tensor | None]:
        """The objective, the bound and its parts, means over the batch in one vector; gradients.

        Each is of minus the objective, None for a parameter that it does not depend on.
        """
        programs = pair.programs(self.source.fetch(*tensors))
        particles, total = self.objective.estimate(programs)
        objective = total / particles.shape[1]
        parameters = self._trained(pair)
        gradients: Sequence[Tensor | None] = [None] * len(parameters)
        if objective.requires_grad:
            gradients = torch.autograd.grad(-objective, parameters, allow_unused=True)
        with torch.no_grad():
            extras = {f"train {k}": v.mean() for k, v in self.objective.extras(particles).items()}
            terms = {f"train {k}": v.mean() for k, v in particles.terms().items()}
            means = {"train": self.objective.bound(particles).mean()} | extras | terms
            self.names = list(means)
        return [torch.stack([objective.detach(), *means.values()]), *self._clipped(gradients)]

    def _trained(self, pair: Pair) -> list[Tensor]:
        both = (*pair.parameters(), *self.objective.parameters())
        return [parameter for parameter in both if parameter.requires_grad]

    def _clipped(self, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        if self.clip_norm is None:
            return list(gradients)
        norm = torch.nn.utils.get_total_norm([g for g in gradients if g is not None])
        factor = (self.clip_norm / (norm + 1e-6)).clamp(max=1.0)  # as torch's own clipping
        return [None if g is None else g * factor for g in gradients]

    def finish(self, num_data: int, found: Sequence[Any]) -> None:
        """Add to the sums, and update the parameters."""
        values, *gradients = found
        if not len(self.totals):
            self.totals = torch.zeros_like(values, dtype=torch.float64)
        self.totals.add_(values, alpha=num_data)
        if self._update is not None and self._update(gradients):
            return
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.lowered is not None and values.device.type == "cpu":
            self._update = _Update.of(self.optimizer, self.parameters, gradients)


class PyroStep(Step):
    """A step of one of Pyro's own objectives, which return numbers and keep their parts."""

    def __init__(
        self,
        pair: Pair,
        objective: Objective,
        source: Source,
        optimizer: Optimizer,
        clip_norm: float | None,
        pyros: pyro.infer.ELBO,
    ):
        super().__init__(pair, objective, source, optimizer, clip_norm)
        self.pyros: Any = pyros

    def lower(self, compile: bool) -> None:
        """Raises CannotLower: a number has no graph."""
        raise CannotLower(f"{type(self.pyros).__name__} is Pyro's own and returns numbers")

    def eager(self, *tensors: Tensor) -> list[Tensor | None]:
        """The objective as Pyro has it, with the parts of an ELBO from other draws."""
        batch = self.source.fetch(*self.source.fixed, *tensors)
        num_data = len(batch if isinstance(batch, Tensor) else next(iter(batch.values())))
        self.optimizer.zero_grad()
        loss = self.pyros.loss_and_grads(self.pair.model, self.pair.guide, batch)
        gradients = [None if p.grad is None else p.grad / num_data for p in self.parameters]
        with torch.random.fork_rng(), evaluating(self.pair):
            particles = self.pair.draw(batch, self.objective.num_particles)
            means = {f"train {k}": v.mean() for k, v in particles.terms().items()}
        bound = torch.as_tensor(-loss / num_data, dtype=torch.float64)
        self.names = ["train", *means]
        return [torch.stack([bound, bound, *means.values()]), *self._clipped(gradients)]


def _is_capturable(optimizer: Optimizer) -> bool:
    """Whether a CUDA graph may hold its step: counts and learning rates are on the device."""
    return all(
        group.get("capturable", group.get("fused")) and isinstance(group["lr"], Tensor)
        for group in optimizer.param_groups
    )


class _Update:
    """`optimizer.step()` as a graph: the same fused kernels without the bookkeeping around them."""

    def __init__(self, optimizer: Optimizer, parameters: list[Tensor], gradients: list[Tensor]):
        self.optimizer = optimizer
        self.settings = _settings(optimizer)
        self.rates = [group["lr"] for group in optimizer.param_groups]
        self.state = [optimizer.state.get(parameter, {}) for parameter in parameters]
        self.tensors = [
            *(parameter.detach() for parameter in parameters),
            *(value for state in self.state for value in state.values() if _is_tensor(value)),
            *(group["lr"] for group in optimizer.param_groups if _is_tensor(group["lr"])),
        ]
        self.num_parameters = len(parameters)
        self.order = {parameter: i for i, parameter in enumerate(parameters)}
        copies = [tensor.clone() for tensor in self.tensors]
        with torch.no_grad():
            self.graph = make_fx(lambda *tensors: self._run(*tensors))(*copies, *gradients)
        self._count_by_tensor()

    def _count_by_tensor(self) -> None:
        """Add a tensor to the step counts: of a number, torch makes one for each of them anew."""
        foreach = torch.ops.aten._foreach_add_
        for node in self.graph.graph.nodes:
            if node.target is foreach.Scalar:
                self.graph.register_buffer("one", torch.tensor(float(node.args[1])))
                with self.graph.graph.inserting_before(node):
                    one = self.graph.graph.get_attr("one")
                node.target, node.args = foreach.Tensor, (node.args[0], one)
        self.graph.recompile()

    @classmethod
    def of(
        cls, optimizer: Optimizer, parameters: Sequence[Tensor], gradients: Sequence[Tensor | None]
    ) -> "_Update | None":
        """One for the parameters that have gradients, if the optimiser is one of torch's fused."""
        fused = all(group.get("fused") for group in optimizer.param_groups)
        hooks = optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks
        if not fused or type(optimizer) not in FUSED or hooks:
            return None
        both = [(p, g) for p, g in zip(parameters, gradients, strict=True) if g is not None]
        return cls(optimizer, [p for p, _ in both], [g for _, g in both])

    def is_current(self) -> bool:
        """Whether the optimiser has the settings, and the tensors of rates, that it had."""
        groups = self.optimizer.param_groups
        same_rates = all(
            rate is group["lr"] for rate, group in zip(self.rates, groups, strict=True)
        )
        in_place = all(
            p.data_ptr() == t.data_ptr() for p, t in zip(self.order, self.tensors, strict=False)
        )
        return same_rates and in_place and self.settings == _settings(self.optimizer)

    def __call__(self, gradients: Sequence[Tensor | None]) -> bool:
        """Update the parameters, unless others have gradients than those it was made for."""
        given = [gradient for gradient in gradients if gradient is not None]
        if len(given) != self.num_parameters:
            return False
        with torch.no_grad():
            self.graph(*self.tensors, *given)
        return True

    def _run(self, *tensors: Tensor) -> None:
        """A step of a copy of the optimiser that holds these tensors for its own."""
        left = iter(tensors)
        parameters = [next(left) for _ in range(self.num_parameters)]
        gradients = tensors[len(self.tensors) :]
        shadow = copy.copy(self.optimizer)
        shadow.state = copy.copy(self.optimizer.state)
        shadow.state.clear()
        for parameter, gradient, state in zip(parameters, gradients, self.state, strict=True):
            parameter.grad = gradient
            own = {k: next(left) if _is_tensor(v) else v for k, v in state.items()}
            if own:
                shadow.state[parameter] = own
        shadow.param_groups = [
            group
            | {"params": [parameters[self.order[p]] for p in group["params"] if p in self.order]}
            | {"lr": next(left) if _is_tensor(group["lr"]) else group["lr"]}
            for group in self.optimizer.param_groups
        ]
        inspect.unwrap(type(shadow).step)(shadow)  # without torch's hooks and profiler


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _settings(optimizer: Optimizer) -> list[dict[str, Any]]:
    """What a graph of the optimiser takes as given: all but tensors."""
    return [
        {k: v for k, v in group.items() if k != "params" and not _is_tensor(v)}
        for group in optimizer.param_groups
    ]


class _Replay:
    """A function captured as a CUDA graph: one launch, and no word from Python within it."""

    def __init__(self, function: Callable[..., None], tensors: Sequence[Tensor]):
        self.own = [tensor.clone() for tensor in tensors]
        self.graph = torch.cuda.CUDAGraph()
        # A loader's threads may allocate meanwhile, which is no concern of this graph.
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            function(*self.own)

    def __call__(self, *tensors: Tensor) -> None:
        for own, tensor in zip(self.own, tensors, strict=True):
            own.copy_(tensor, non_blocking=True)
        self.graph.replay()
