"""Weight passes read out of Pyro: the same weights, what draws do not change computed once."""

import math
import warnings
import weakref

import pytest
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import pvae
from pvae import PyroPair, passes
from pvae.fence import evaluating, fenced
from pvae.lowering import CannotLower, hoist
from pvae.passes import How, blocks, weigh
from tests.evaluation.test_evaluate import Memory, normalised
from tests.fitting import annealed_by_hand, binary, declare
from tests.test_lowering import HandWritten, needs_compiler

CPU = torch.device("cpu")
DRAWING = ["gaussian_vae", "hierarchical_vae", "ppca", "vae"]  # the others sum their latents out


def make(name: str):
    return annealed_by_hand()[0] if name == "by hand" else declare(name)


def weights(pair, data, num_particles, speed, proposal="guide", max_rows=24) -> Tensor:
    """(K, N), of blocks whose last is smaller than the others."""
    columns = pair.columns(data)
    pair.prepare(data)
    with evaluating(pair), fenced(0, CPU):
        passed = weigh(pair, columns, num_particles, How(proposal), speed, max_rows)
        return torch.cat([torch.cat([w for w, _ in block]) for _, block in passed], 1)


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """Particles of each pass that has run as a graph."""
    found, call = [], passes._Pass.__call__

    def counted(self):
        log_weights = call(self)
        found.append(len(log_weights))
        return log_weights

    monkeypatch.setattr(passes._Pass, "__call__", counted)
    return found


# ------------------------------------------------------------------------------ the same weights


@pytest.mark.parametrize(("K", "graphs"), [(70, [35] * 4), (67, [64] * 2)])
@pytest.mark.parametrize("proposal", ["guide", "prior"])
@pytest.mark.parametrize("name", [*DRAWING, "by hand"])
def test_traced_weights_are_those_of_pyro_bit_for_bit(calls, name, proposal, K, graphs):
    """Blocks of 4, 4 and 2 data: the last, and what is left of K in each, runs in Pyro."""
    pair, x, rows = make(name), binary(10), 4 * graphs[0]
    eager = weights(pair, x, K, "eager", proposal, rows)
    assert calls == []
    assert torch.equal(weights(pair, x, K, "traced", proposal, rows), eager)
    assert eager.shape == (K, 10)
    assert calls == graphs


@needs_compiler
@pytest.mark.parametrize(
    ("name", "dtype", "nats"),
    [("vae", torch.float32, 1e-3), ("hierarchical_vae", torch.float64, 1e-9)],
)
def test_compiled_weights_are_those_of_pyro_but_for_rounding(calls, name, dtype, nats):
    pair, x = declare(name).to(dtype), binary(10).to(dtype)
    found = weights(pair, x, 70, "compiled", max_rows=140)
    assert calls == [35] * 4
    torch.testing.assert_close(
        found, weights(pair, x, 70, "eager", max_rows=140), rtol=0, atol=nats
    )


def test_a_pass_follows_parameters_trained_since():
    pair, x = declare("vae"), binary(10)
    first = weights(pair, x, 8, "traced")
    with torch.no_grad():
        for parameter in pair.parameters():
            parameter += 0.1
    again = weights(pair, x, 8, "traced")
    assert not torch.equal(again, first)
    assert torch.equal(again, weights(pair, x, 8, "eager"))


# ------------------------------------------------------------------------------ blocks


@pytest.mark.parametrize("num_data", [1, 7, 100])
@pytest.mark.parametrize("K", [1, 50, 64, 67, 500, 997])
@pytest.mark.parametrize(("max_rows", "max_weights"), [(1, 1), (40, 900), (2048, 2**22)])
def test_blocks_cover_all_data_and_particles_within_their_limits(
    num_data, K, max_rows, max_weights
):
    seen: list[int] = []
    cut = list(blocks(num_data, K, max_rows, max_weights))
    for rows, sizes in cut:
        size = rows.stop - rows.start
        seen += range(num_data)[rows]
        assert sum(sizes) == K
        assert min(sizes) >= 1
        assert max(sizes) * size <= max_rows
        assert size == 1 or K * size <= max_weights
    assert seen == list(range(num_data))
    whole = cut[0][0].stop
    assert len({n for rows, sizes in cut if rows.stop - rows.start == whole for n in sizes}) <= 2


# ------------------------------------------------------------------------------ hoisting


class Products(TorchDispatchMode):
    """Counts matrix products by the rows of their results, and notes what draws."""

    def __init__(self):
        super().__init__()
        self.rows: list[int] = []
        self.draws = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function.overloadpacket.__name__ in ("mm", "addmm", "bmm", "baddbmm"):
            self.rows.append(math.prod(out.shape[:-1]))
        self.draws += torch.Tag.nondeterministic_seeded in function.tags
        return out


def one_pass(name: str, proposal: str = "guide"):
    pair, block = make(name), [binary(6)]
    pair.prepare(block[0])
    with evaluating(pair), fenced(0, CPU):
        drawing = passes.Drawing(pair, pair.columns(block[0]), block, 5, How(proposal), "eager")
        return passes._Pass(pair, drawing, block, 5, False), block


@pytest.mark.parametrize(("name", "encoder", "decoder"), [("vae", 2, 2), ("by hand", 1, 1)])
def test_the_encoder_runs_once_a_block_and_the_decoder_in_each_pass(name, encoder, decoder):
    """6 data, 5 particles: products of the encoder have 6 rows, those of the decoder 30."""
    lowered, block = one_pass(name)
    with Products() as first:
        lowered.begin(block)
    with Products() as second:
        lowered()
    assert len(first.rows) >= encoder
    assert set(first.rows) == {6}
    assert first.draws == 0
    assert len(second.rows) == decoder
    assert set(second.rows) == {30}
    assert second.draws == 1


@pytest.mark.parametrize("proposal", ["guide", "prior"])
@pytest.mark.parametrize("name", [*DRAWING, "by hand"])
def test_nothing_is_drawn_before_the_passes(name, proposal):
    lowered, block = one_pass(name, proposal)
    state = torch.get_rng_state()
    lowered.begin(block)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(lowered(), lowered())


def graph(function) -> fx.GraphModule:
    return make_fx(function)(torch.ones(3))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: [x.exp() * torch.empty(3).normal_() + x.sin()],
        lambda x: [x.exp() * torch.empty_like(x).normal_()],
        lambda x: [x.exp().add_(torch.randn_like(x))],
    ],
)
def test_the_two_parts_of_a_graph_make_the_whole(function):
    """More than once, since what a draw is written into must be made anew for each pass."""
    whole, x = graph(function), torch.arange(3.0)
    first, second, _ = hoist(graph(function))
    shared = first(x)
    for seed in range(3):
        torch.manual_seed(seed)
        (expected,) = whole(x)
        torch.manual_seed(seed)
        found = second(*shared)
        assert torch.equal(found if isinstance(found, Tensor) else found[0], expected)


def test_late_inputs_enter_the_second_part():
    def function(x, y):
        return [x.exp() * y + x.sin()]

    x, y = torch.arange(3.0), torch.tensor([2.0, 3.0, 4.0])
    first, second, (place,) = hoist(make_fx(function)(x, y), late=1)
    inputs = list(first(x, torch.empty(0)))
    assert len(inputs) == 3  # exp, sin, and y
    inputs[place] = y
    assert torch.equal(second(*inputs), function(x, y)[0])


@pytest.mark.parametrize(
    ("function", "match"),
    [
        (lambda x: [x.add_(torch.randn_like(x))], "a draw is written into x"),
        (lambda x: [x.exp().view(-1).normal_()], "a draw is written into view"),
        (lambda x: [x.exp().sum()], "depend on no draw"),
    ],
)
def test_graphs_that_cannot_be_cut_are_refused(function, match):
    with pytest.raises(CannotLower, match=match):
        hoist(graph(function))


# ------------------------------------------------------------------------------ evaluate


@pytest.fixture
def short(monkeypatch) -> None:
    """`compile="auto"` draws weights by a graph that is not compiled, in blocks of 8, 8 and 4."""
    monkeypatch.setattr(passes, "SHORT", 1)
    monkeypatch.setattr(passes, "MAX_ROWS", 400)


def assert_same_evaluation(one, other):
    assert one.per_datum.equals(other.per_datum)
    assert one.per_unit.equals(other.per_unit)


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("proposal", ["guide", "prior"])
@pytest.mark.parametrize("name", [*DRAWING, "by hand"])
def test_evaluations_are_the_same_bit_for_bit(calls, name, proposal):
    """The guide's first 50 of 100 particles are wanted whole, which a graph does not give."""
    pair, x = make(name), binary(20)
    eager = pvae.evaluate(pair, x, 100, proposal=proposal, compile=False)
    assert_same_evaluation(pvae.evaluate(pair, x, 100, proposal=proposal), eager)
    assert calls == [50, 50] * (2 if proposal == "prior" else 1)


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize(
    "compile", [False, "auto", pytest.param(True, marks=needs_compiler)], ids=str
)
def test_evaluation_leaves_everything_as_it_was_at_every_speed(calls, compile):
    model, x = normalised(), torch.randn(20, 5)
    model.prepare(x)
    model.train()
    list(model.children())[-1].eval()
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    pvae.evaluate(model, x, 100, compile=compile)
    assert bool(calls) == (compile is not False)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, tensors[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_memory_does_not_grow_with_k_in_graphs_either(monkeypatch, calls):
    monkeypatch.setattr(passes, "SHORT", 1)
    monkeypatch.setattr(passes, "MAX_WEIGHTS", 2**15)
    pair, x, peaks = declare("hierarchical_vae"), binary(20), {}  # too many latents to integrate
    for K in (2000, 20_000):
        with Memory() as memory:
            pvae.evaluate(pair, x, K)
        peaks[K] = memory.peak
    assert calls == [125] * 15 + [2000] * 9 * 20  # but for the first pass of each block
    assert peaks[20_000] <= 1.1 * peaks[2000]


# ------------------------------------------------------------------------------ falling back


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("compile", ["auto", True], ids=str)
def test_control_flow_on_values_is_said_once_and_runs_in_pyro(calls, compile):
    torch.manual_seed(0)
    programs = HandWritten(branches=True)
    pair, x = PyroPair(programs.model, programs.guide), binary(20)
    eager = pvae.evaluate(pair, x, 100, compile=False)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = pvae.evaluate(pair, x, 100, compile=compile)
    assert [str(w.message).partition(":")[0] for w in said] == [
        "Weights are drawn without being compiled"
    ]
    assert_same_evaluation(found, eager)
    assert calls == []


@pytest.mark.usefixtures("short")
def test_the_warning_points_to_where_evaluate_was_called():
    programs = HandWritten(branches=True)
    with pytest.warns(UserWarning, match="without being compiled") as said:
        pvae.evaluate(PyroPair(programs.model, programs.guide), binary(20), 100)
    assert said[0].filename == __file__


@pytest.mark.usefixtures("short")
def test_without_a_compiler_weights_are_drawn_by_the_graph_as_it_is(monkeypatch, calls):
    def fail(graph, tensors):
        raise CannotLower("InvalidCxxCompiler: no C++ compiler")

    monkeypatch.setattr(passes, "compiled", fail)
    pair, x = declare("vae"), binary(20)
    with pytest.warns(UserWarning, match="without being compiled: InvalidCxxCompiler") as said:
        found = pvae.evaluate(pair, x, 100, compile=True)
    assert len(said) == 1
    assert calls == [50, 50]
    assert_same_evaluation(found, pvae.evaluate(pair, x, 100, compile=False))


def test_the_weights_of_a_pass_are_let_go_once_they_are_copied(monkeypatch):
    """Kept, they lie in the gaps of a pass's large tensors, and memory grows with each pass."""
    kept, most = [], 0

    def watched(*args, **kwargs):
        for rows, some in weigh(*args, **kwargs):
            yield rows, each(some)

    def each(some):
        nonlocal most
        for weights, particles in some:
            own = weights.clone()
            del weights
            kept.append(weakref.ref(own))
            most = max(most, sum(tensor() is not None for tensor in kept))
            yield own, particles

    monkeypatch.setattr(passes, "weigh", watched)
    monkeypatch.setattr("pvae.evaluation.kept.weigh", watched)
    monkeypatch.setattr(passes, "MAX_ROWS", 20)
    model = declare("vae")
    pvae.log_weights(model, binary(), 40)
    pvae.evaluate(model, binary(), 40)
    assert 1 <= most <= 2
