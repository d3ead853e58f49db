import itertools
import json

import pytest
import torch
from torch import nn

from pvae.nets import MLP, Conv, Deconv, Input, Linear, Log1p, Net, Ring, Table

VECTOR, INDEX, IMAGE = Input((3,)), Input((), categories=4), Input((2, 5, 7))
COUNTS = Input((6,))

# a net, its parents, its outputs
NETS = {
    "MLP": (MLP(6, 5), [VECTOR], {"loc": (2,), "scale": (2,)}),
    "MLP of several": (MLP(6), [VECTOR, INDEX, IMAGE], {"logits": (2, 3)}),
    "MLP without layers": (MLP(), [VECTOR], {"logits": ()}),
    "Linear": (Linear(), [INDEX, VECTOR], {"loc": (4,)}),
    "Table": (Table(), [INDEX], {"loc": (2,), "scale": ()}),
    "Table of several": (Table(), [INDEX, Input((), categories=3)], {"logits": (2, 2)}),
    "Log1p": (Log1p(MLP(4)), [COUNTS, INDEX], {"loc": (2,), "scale": ()}),
    "Ring": (Ring(), [VECTOR], {"loc": (3,)}),
    "Conv": (Conv(3, 4), [IMAGE], {"loc": (2,), "scale": (2,)}),
    "Conv and others": (Conv(3, 4), [VECTOR, IMAGE, INDEX], {"loc": (2,), "scale": (2,)}),
    "Deconv": (Deconv(4, 3), [VECTOR, INDEX], {"loc": (2, 5, 7), "scale": (2, 5, 7)}),
}


def value_of(parent: Input, *batch: int) -> torch.Tensor:
    if parent is COUNTS:
        return torch.randint(2000, (*batch, *parent.shape)).float()
    if parent.categories is None:
        return torch.randn(*batch, *parent.shape)
    return torch.randint(parent.categories, (*batch, *parent.shape))


@pytest.fixture(params=NETS, ids=lambda name: name)
def case(request):
    return NETS[request.param]


# ------------------------------------------------------------------------------ every net


@pytest.mark.parametrize("batch", [(), (4,), (3, 4), (2, 3, 4)], ids=str)
def test_every_net_makes_each_output_in_its_shape_after_the_batch(case, batch):
    net, parents, outputs = case
    made = net.build(parents, outputs)(*(value_of(parent, *batch) for parent in parents))
    assert {name: tuple(out.shape) for name, out in made.items()} == {
        name: (*batch, *shape) for name, shape in outputs.items()
    }


def test_all_leading_dimensions_are_batch(case):
    net, parents, outputs = case
    module = net.build(parents, outputs)
    values = [value_of(parent, 2, 3, 4) for parent in parents]
    together = module(*values)
    for i in range(2):
        for j in range(3):
            for k in range(4):
                alone = module(*(value[i, j, k] for value in values))
                for name in outputs:
                    torch.testing.assert_close(together[name][i, j, k], alone[name])


def test_batches_of_several_parents_broadcast(case):
    net, parents, outputs = case
    module = net.build(parents, outputs)
    values = [value_of(parent, *((2, 1, 3), (5, 1))[i % 2]) for i, parent in enumerate(parents)]
    batch = (2, 5, 3) if len(parents) > 1 else (2, 1, 3)
    expanded = [
        value.expand(*batch, *parent.shape) for value, parent in zip(values, parents, strict=True)
    ]
    for name, out in module(*values).items():
        torch.testing.assert_close(out, module(*expanded)[name])


def test_gradients_reach_every_parameter_and_every_real_parent(case):
    net, parents, outputs = case
    module = net.build(parents, outputs)
    values = [value_of(parent, 50) for parent in parents]
    real = [value.requires_grad_() for value in values if value.is_floating_point()]
    sum(piece.square().sum() for piece in module(*values).values()).backward()
    assert all(tensor.grad is not None for tensor in [*module.parameters(), *real])


def test_a_net_works_in_double_precision(case):
    net, parents, outputs = case
    module = net.build(parents, outputs).double()
    values = [value_of(parent, 2) for parent in parents]
    values = [value.double() if value.is_floating_point() else value for value in values]
    assert {out.dtype for out in module(*values).values()} == {torch.float64}


def test_a_net_is_a_value_that_survives_json(case):
    net = case[0]
    read = Net.from_json(json.loads(json.dumps(net.to_json())))
    assert read == net
    assert hash(read) == hash(net)
    assert read is not net


@pytest.mark.parametrize("net", [MLP(3, activation="relu"), Conv(2, activation="silu"), Deconv(5)])
def test_json_keeps_the_activation(net):
    assert Net.from_json(json.loads(json.dumps(net.to_json()))).activation == net.activation
    assert Net.from_json(net.to_json()) != MLP(3)


@pytest.mark.parametrize(
    ("net", "mirror"),
    [
        (MLP(20, 10, activation="relu"), MLP(10, 20, activation="relu")),
        (Linear(), Linear()),
        (Conv(8, 16, activation="elu"), Deconv(16, 8, activation="elu")),
        (Deconv(16, 8), Conv(8, 16)),
        (Ring(), Ring()),
    ],
    ids=str,
)
def test_a_mirrored_net_goes_the_opposite_way(net, mirror):
    assert net.mirrored() == mirror
    assert net.mirrored().mirrored() == net


# ------------------------------------------------------------------------------ each net


def test_an_mlp_has_the_layers_that_its_sizes_say():
    module = MLP(200, 100).build([Input((28, 28)), INDEX], {"loc": (50,), "scale": (50,)})
    linear = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
    assert [(a.in_features, a.out_features) for a in linear] == [(788, 200), (200, 100), (100, 100)]
    assert sum(isinstance(layer, nn.Tanh) for layer in module.modules()) == 2


def test_an_mlp_computes_what_is_written_by_hand():
    module = MLP(4, activation="relu").build([VECTOR, INDEX], {"a": (2,), "b": ()})
    z, c = torch.randn(5, 3), torch.tensor([0, 3, 1, 1, 2])
    first, last = (layer for layer in module.modules() if isinstance(layer, nn.Linear))
    joined = torch.cat([z, nn.functional.one_hot(c, 4)], dim=-1)
    out = (joined @ first.weight.T + first.bias).relu() @ last.weight.T + last.bias
    made = module(z, c)
    torch.testing.assert_close(made["a"], out[:, :2])
    torch.testing.assert_close(made["b"], out[:, 2])


def test_weights_start_by_glorot_and_biases_at_zero():
    module = MLP(300).build([Input((100,))], {"loc": (50,)})
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            bound = (6 / (layer.in_features + layer.out_features)) ** 0.5
            assert 0.95 * bound < layer.weight.abs().max() <= bound
            assert torch.equal(layer.bias, torch.zeros_like(layer.bias))


@pytest.mark.parametrize(
    ("net", "parent", "outputs"),
    [
        (Conv(40, 50, 60), Input((30, 64, 64)), {"loc": (2,)}),
        (Deconv(60, 50, 40), Input((500,)), {"loc": (30, 64, 64)}),
    ],
    ids=["Conv", "Deconv"],
)
def test_a_signal_keeps_its_size_through_convolutions(net, parent, outputs):
    """By Glorot's weights each ReLU would halve it, and idle taps would cut it to a quarter."""
    sizes = []

    def keep(layer, arguments, out):
        sizes.append(float(out.detach().square().mean()))

    module = net.build([parent], outputs)
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            layer.register_forward_hook(keep)
    with torch.no_grad():
        module(torch.randn(4, *parent.shape))
    assert len(sizes) == 3
    assert all(0.5 < after / before < 2 for before, after in itertools.pairwise(sizes))


def test_categories_are_read_one_hot():
    indices = torch.tensor([[2.0, 0.0], [3.0, 1.0]])  # data hold them as floating-point numbers
    flat = Input((2,), categories=4).flat(indices, torch.float64)
    expected = nn.functional.one_hot(indices.long(), 4).flatten(1).double()
    assert torch.equal(flat, expected)
    assert Input((2,), categories=4).size == 8


def test_linear_is_one_affine_map():
    module = Linear().build([VECTOR], {"loc": (2,)})
    z = torch.randn(6, 3)
    torch.testing.assert_close(
        module(z)["loc"] - module(torch.zeros(3))["loc"], z @ module.body.weight.T
    )


def test_a_table_looks_up_one_row_for_each_category():
    module = Table().build([INDEX], {"loc": (2,)})
    index = torch.tensor([[3, 0], [1, 3]])
    assert torch.equal(module(index)["loc"], module.rows["loc"][index])
    assert module.rows["loc"].shape == (4, 2)
    assert len(module.rows["loc"].unique(dim=0)) == 4  # components differ


def test_a_table_of_two_parents_has_a_row_for_each_pair():
    module = Table().build([INDEX, Input((), categories=3)], {"loc": (2,)})
    first = torch.arange(4).unsqueeze(-1)
    second = torch.arange(3.0)
    found = module(first, second)["loc"]
    assert found.shape == (4, 3, 2)
    assert torch.equal(found, module.rows["loc"].reshape(4, 3, 2))


@pytest.mark.parametrize("size", [(8, 8), (7, 7), (5, 9), (28, 28), (1, 1)], ids=str)
@pytest.mark.parametrize("layers", [(3,), (3, 4), (2, 3, 4)], ids=str)
def test_convolutions_take_and_make_images_of_any_size(size, layers):
    image = (2, *size)
    down = Conv(*layers).build([Input(image)], {"loc": (6,)})
    code = down(torch.randn(4, *image))["loc"]
    assert code.shape == (4, 6)
    up = Conv(*layers).mirrored().build([Input((6,))], {"logits": image})
    assert up(code)["logits"].shape == (4, *image)


def test_a_convolution_halves_and_a_transposed_one_doubles_its_image():
    down = Conv(3, 4).build([Input((1, 7, 7))], {"loc": (2,)})
    last = next(layer for layer in down.modules() if isinstance(layer, nn.Linear))
    assert last.in_features == 4 * 2 * 2  # 7 -> 4 -> 2
    up = Deconv(4, 3).build([Input((2,))], {"logits": (1, 7, 7)})
    first = next(layer for layer in up.modules() if isinstance(layer, nn.Linear))
    assert first.out_features == 4 * 2 * 2  # 2 -> 4 -> 8, cropped to 7


def test_other_parents_are_read_beside_what_convolutions_see():
    module = Conv(3).build([VECTOR, IMAGE, INDEX], {"loc": (2,)})
    head = module.body.body.head
    code, images = torch.randn(2, 1, 3), torch.randn(5, 2, 5, 7)
    one, other = (module(v, images, torch.tensor(1))["loc"] for v in code)
    difference = (head.weight[:, :3] @ (code[0] - code[1])[0]).expand(5, 2)
    torch.testing.assert_close(one - other, difference)
    first, last = (module(code[0], images, torch.tensor(k))["loc"] for k in (0, 3))
    torch.testing.assert_close(last - first, (head.weight[:, -1] - head.weight[:, -4]).expand(5, 2))
    assert one.std(0).min() > 0  # and of the image as well


def test_images_of_several_parameters_are_separate_channels():
    module = Deconv(4).build([VECTOR], {"loc": (1, 4, 4), "scale": (1, 4, 4)})
    out = module(torch.randn(5, 3))
    assert not torch.equal(out["loc"], out["scale"])


def test_the_mirror_of_a_net_that_reads_counts_reads_codes():
    assert Log1p(MLP(20, 10)).mirrored() == MLP(10, 20)


def test_counts_are_read_by_their_logarithm_and_categories_as_they_are():
    torch.manual_seed(0)
    read_plainly = MLP(4).build([COUNTS, INDEX], {"loc": (2,)})
    torch.manual_seed(0)
    module = Log1p(MLP(4)).build([COUNTS, INDEX], {"loc": (2,)})
    counts, index = value_of(COUNTS, 5), value_of(INDEX, 5)
    expected = read_plainly((1 + counts).log(), index)["loc"]
    torch.testing.assert_close(module(counts, index)["loc"], expected)


def test_the_ring_is_the_tutorials_map_and_stays_finite_at_the_origin():
    module = Ring().build([Input((2,))], {"loc": (2,)})
    assert list(module.parameters()) == []
    z = torch.tensor([[3.0, 4.0], [0.0, -2.0], [0.0, 0.0]])
    expected = torch.tensor([[0.3 + 0.6, 0.4 + 0.8], [0.0, -0.2 - 1.0], [0.0, 0.0]])
    torch.testing.assert_close(module(z)["loc"], expected)


# ------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MLP(0), r"MLP takes positive whole layer sizes, got 0\."),
        (lambda: MLP(20, 2.5), r"MLP takes positive whole layer sizes, got 2\.5\."),
        (lambda: Conv("8"), r"Conv takes positive whole layer sizes, got '8'\."),
        (
            lambda: MLP(3, activation="tahn"),
            r"MLP has no activation 'tahn'\. Known: elu, gelu, leaky_relu, relu, .*, tanh\.",
        ),
        (lambda: Deconv(3, activation="x"), r"Deconv has no activation 'x'\."),
        (
            lambda: Table().build([VECTOR], {"loc": (2,)}),
            r"single Categorical parent \(event shape \(\)\), got a parent of event shape \(3,\)",
        ),
        (
            lambda: Table().build([Input((2,), categories=3)], {"loc": (2,)}),
            r"got a parent of event shape \(2,\)\. Use MLP or Linear",
        ),
        (
            lambda: Conv(3).build([IMAGE, VECTOR, IMAGE], {"loc": (2,)}),
            r"Conv needs one parent of shape \(channels, height, width\), got parents of shapes "
            r"\[\(2, 5, 7\), \(3,\), \(2, 5, 7\)\]\.",
        ),
        (
            lambda: Conv(3).build([VECTOR], {"loc": (2,)}),
            r"Conv needs one parent of shape \(channels, height, width\), got parents of shapes "
            r"\[\(3,\)\]\.",
        ),
        (
            lambda: Deconv(3).build([VECTOR], {"logits": (64,)}),
            r"Deconv needs the parameter 'logits' of shape \(channels, height, width\), got \(64,",
        ),
        (
            lambda: Deconv(3).build([VECTOR], {"loc": (1, 4, 4), "scale": (1, 1, 1)}),
            r"Deconv needs layers and outputs of one image shape",
        ),
        (lambda: Deconv().build([VECTOR], {"loc": (1, 4, 4)}), r"Deconv needs layers"),
        (
            lambda: Ring().build([VECTOR], {"loc": (3,), "scale": (3,)}),
            r"Ring maps one real vector to one parameter of the same shape, got parents of shapes "
            r"\[\(3,\)\] for \{'loc': \(3,\), 'scale': \(3,\)\}\.",
        ),
        (lambda: Ring().build([VECTOR], {"loc": (2,)}), r"Ring maps one real vector"),
        (lambda: Ring().build([INDEX], {"loc": ()}), r"Ring maps one real vector"),
        (lambda: Ring().build([VECTOR, VECTOR], {"loc": (3,)}), r"Ring maps one real vector"),
        (
            lambda: Net.from_json({"net": "os.system", "command": "true"}),
            r"names the net 'os\.system', which is not one of pvae's \(MLP, Linear, Table, Conv, "
            r"Deconv, Log1p, Ring\)",
        ),
    ],
)
def test_what_cannot_be_built_says_why(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("body", [MLP, nn.Linear(3, 2), None])
def test_log1p_takes_a_net(body):
    with pytest.raises(TypeError, match=r"Log1p takes a net such as MLP\(200, 200\), got "):
        Log1p(body)
