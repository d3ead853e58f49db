"""Networks whose input and output sizes are inferred from the sites they connect.

A net is written without sizes, `MLP(200, 200)`, as a frozen value that can be printed, compared and
saved. When a model is declared, `build(inputs, outputs)` makes the module:

    values of the parents  --module-->  {parameter: unconstrained tensor, shape (*batch, *shape)}

All leading dimensions are batch (particles, data, enumerated categories), in every net here, and
the parents' batches broadcast against each other. Weights start by Glorot & Bengio 2010, biases at
zero, as in Burda, Grosse & Salakhutdinov 2016; those of convolutions by He et al. 2015, whose
variance makes up for what a ReLU cuts off.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["MLP", "Conv", "Deconv", "Input", "Linear", "Log1p", "Lookup", "Net", "Ring", "Table"]

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Input:
    """What a net needs to know of one parent.

    Args:
        shape: event shape of a value.
        categories: number of categories if the value holds indices, which nets read one-hot.
    """

    shape: Shape
    categories: int | None = None

    @property
    def size(self) -> int:
        """Numbers per value once it is encoded."""
        return math.prod(self.shape) * (self.categories or 1)

    def batch_shape(self, value: Tensor) -> torch.Size:
        """The leading dimensions of a value."""
        return value.shape[: value.dim() - len(self.shape)]

    def flat(self, value: Tensor, dtype: torch.dtype) -> Tensor:
        """Encode (*batch, *shape) as (*batch, size)."""
        batch = self.batch_shape(value)
        if self.categories is not None:
            # A comparison rather than `one_hot`, which reads the values and so cannot be traced.
            categories = torch.arange(self.categories, device=value.device)
            value = (value.unsqueeze(-1) == categories).to(dtype)
        return value.reshape(*batch, self.size)


class Net:
    """A network yet without sizes. Subclasses are frozen dataclasses with a `build`."""

    def build(self, inputs: Sequence[Input], outputs: Mapping[str, Shape]) -> nn.Module:
        """Make the module from the parents' values to one tensor for each output.

        Args:
            inputs: the parents, in the order in which `forward` will get their values.
            outputs: name and shape of each output, without batch dimensions.
        """
        raise NotImplementedError

    def mirrored(self) -> "Net":
        """The net for the opposite direction, for a guide that was left out."""
        return self

    def to_json(self) -> dict[str, Any]:
        """The net as plain data."""
        return {"net": type(self).__name__, **asdict(self)}  # type: ignore[call-overload]

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> "Net":
        """Read back what `to_json` wrote, looking only among the nets of this module."""
        fields = {key: value for key, value in data.items() if key != "net"}
        kinds = {kind.__name__: kind for kind in (MLP, Linear, Table, Conv, Deconv, Log1p, Ring)}
        if data["net"] not in kinds:
            raise ValueError(
                f"The declaration names the net {data['net']!r}, which is not one of pvae's "
                f"({', '.join(kinds)}). Declare the model in Python and pass it with `model=`."
            )
        if "body" in fields:
            fields["body"] = Net.from_json(fields["body"])
        if "hidden" in fields:
            return kinds[data["net"]](*fields.pop("hidden"), **fields)
        return kinds[data["net"]](**fields)


ACTIVATIONS = {
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "leaky_relu": nn.LeakyReLU,
    "relu": nn.ReLU,
    "sigmoid": nn.Sigmoid,
    "silu": nn.SiLU,
    "softplus": nn.Softplus,
    "tanh": nn.Tanh,
}


@dataclass(frozen=True, init=False)
class _Layered(Net):
    """Layers of given sizes with one activation between them."""

    hidden: Shape
    activation: str

    def __init__(self, *hidden: int, activation: str):
        kind = type(self).__name__
        if bad := [size for size in hidden if not isinstance(size, int) or size < 1]:
            raise ValueError(f"{kind} takes positive whole layer sizes, got {bad[0]!r}.")
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"{kind} has no activation {activation!r}. Known: {', '.join(ACTIVATIONS)}."
            )
        object.__setattr__(self, "hidden", tuple(hidden))
        object.__setattr__(self, "activation", activation)


def _started(module: nn.Module) -> nn.Module:
    """The module with its weights drawn; see above."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            taps = math.prod(layer.kernel_size)
            if isinstance(layer, nn.ConvTranspose2d):
                taps //= math.prod(layer.stride)  # as many as meet in each pixel
            bound = math.sqrt(6 / (layer.in_channels * taps))
            nn.init.uniform_(layer.weight, -bound, bound)
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    return module


class _Flat(nn.Module):
    """Parents flattened, broadcast and joined -> `body` -> outputs cut apart."""

    def __init__(self, body: nn.Module, inputs: Sequence[Input], outputs: Mapping[str, Shape]):
        super().__init__()
        self.body = body
        self.inputs = tuple(inputs)
        self.outputs = dict(outputs)

    def forward(self, *values: Tensor) -> dict[str, Tensor]:
        dtype = next(self.body.parameters()).dtype
        parts = [i.flat(value, dtype) for i, value in zip(self.inputs, values, strict=True)]
        if len(parts) > 1:
            batch = torch.broadcast_shapes(*(part.shape[:-1] for part in parts))
            parts = [torch.cat([part.expand(*batch, -1) for part in parts], dim=-1)]
        flat = self.body(parts[0])
        pieces = flat.split([math.prod(shape) for shape in self.outputs.values()], dim=-1)
        return {
            name: piece.reshape((*piece.shape[:-1], *shape))
            for (name, shape), piece in zip(self.outputs.items(), pieces, strict=True)
        }


def _size(outputs: Mapping[str, Shape]) -> int:
    return sum(math.prod(shape) for shape in outputs.values())


@dataclass(frozen=True, init=False)
class MLP(_Layered):
    """Fully connected layers: `MLP(200, 200)` has two hidden ones, and a linear one after them.

    Args:
        hidden: sizes of the hidden layers.
        activation: name of the function between them: "tanh", "relu", "softplus", ...

    Raises:
        ValueError: for a size below one or an unknown activation.
    """

    def __init__(self, *hidden: int, activation: str = "tanh"):
        super().__init__(*hidden, activation=activation)

    def build(self, inputs: Sequence[Input], outputs: Mapping[str, Shape]) -> nn.Module:
        """Make the module; see `Net.build`."""
        sizes = [sum(i.size for i in inputs), *self.hidden]
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(sizes):
            layers += [nn.Linear(before, after), ACTIVATIONS[self.activation]()]
        layers.append(nn.Linear(sizes[-1], _size(outputs)))
        return _Flat(_started(nn.Sequential(*layers)), inputs, outputs)

    def mirrored(self) -> "MLP":
        """The same layers in the opposite order."""
        return MLP(*reversed(self.hidden), activation=self.activation)


@dataclass(frozen=True)
class Linear(Net):
    """One affine map, W z + b. With Normal sites it keeps log p(x) in closed form (`exact`)."""

    def build(self, inputs: Sequence[Input], outputs: Mapping[str, Shape]) -> nn.Module:
        """Make the module; see `Net.build`."""
        body = nn.Linear(sum(i.size for i in inputs), _size(outputs))
        return _Flat(_started(body), inputs, outputs)


class Lookup(nn.Module):
    """What `Table` builds: for each output a parameter whose rows the parents' indices select."""

    def __init__(self, inputs: Sequence[Input], outputs: Mapping[str, Shape]):
        super().__init__()
        self.categories = [i.categories or 0 for i in inputs]
        rows = math.prod(self.categories)
        self.rows = nn.ParameterDict(
            {name: nn.Parameter(0.1 * torch.randn(rows, *shape)) for name, shape in outputs.items()}
        )

    def forward(self, *values: Tensor) -> dict[str, Tensor]:
        """Rows at the parents' indices, (*batch, *shape) by output."""
        index = values[0].long()
        for value, categories in zip(values[1:], self.categories[1:], strict=True):
            index = index * categories + value.long()
        return {name: rows[index] for name, rows in self.rows.items()}


@dataclass(frozen=True)
class Table(Net):
    """One row of free parameters for each value of a discrete parent (or of several together).

    Rows start as small Normal draws (standard deviation 0.1), so that components differ.
    """

    def build(self, inputs: Sequence[Input], outputs: Mapping[str, Shape]) -> nn.Module:
        """Make the module; see `Net.build`.

        Raises:
            ValueError: if a parent is not a single index.
        """
        for i in inputs:
            if i.categories is None or i.shape:
                raise ValueError(
                    "Table looks up rows by a single Categorical parent (event shape ()), got a "
                    f"parent of event shape {i.shape}. Use MLP or Linear for continuous parents."
                )
        return Lookup(inputs, outputs)


class _Rows(nn.Module):
    """A module for (rows, size), given any leading dimensions."""

    def __init__(self, body: nn.Module):
        super().__init__()
        self.body = body

    def forward(self, flat: Tensor) -> Tensor:
        out = self.body(flat.reshape(-1, flat.shape[-1])).flatten(1)
        return out.reshape(*flat.shape[:-1], -1)


class _Beside(nn.Module):
    """Flat values in, of which some are an image: what is seen in it, beside the others.

    Args:
        see: convolutions.
        head: what reads both.
        sizes: of the values before the image, the image, and those after it.
    """

    def __init__(self, see: nn.Module, head: nn.Module, sizes: tuple[int, int, int]):
        super().__init__()
        self.see, self.head, self.sizes = see, head, sizes

    def forward(self, flat: Tensor) -> Tensor:
        before, image, after = flat.split(self.sizes, -1)
        return self.head(torch.cat([before, self.see(image), after], -1))


@dataclass(frozen=True, init=False)
class Conv(_Layered):
    """An image in: 3 x 3 convolutions, each halving height and width, then a linear layer.

    Other parents, such as a label, are read by the linear layer, beside what was seen.

    Args:
        hidden: channels after each convolution.
        activation: name of the function after each.
    """

    def __init__(self, *hidden: int, activation: str = "relu"):
        super().__init__(*hidden, activation=activation)

    def build(self, inputs: Sequence[Input], outputs: Mapping[str, Shape]) -> nn.Module:
        """Make the module; see `Net.build`.

        Raises:
            ValueError: unless one parent is an image (channels, height, width).
        """
        images = [n for n, i in enumerate(inputs) if len(i.shape) == 3 and i.categories is None]
        if len(images) != 1:
            raise ValueError(
                "Conv needs one parent of shape (channels, height, width), got parents of shapes "
                f"{[i.shape for i in inputs]}."
            )
        place = images[0]
        channels, height, width = inputs[place].shape
        layers: list[nn.Module] = [nn.Unflatten(-1, (channels, height, width))]
        for after in self.hidden:
            layers += [nn.Conv2d(channels, after, 3, stride=2, padding=1)]
            layers += [ACTIVATIONS[self.activation]()]
            channels, height, width = after, (height + 1) // 2, (width + 1) // 2
        layers.append(nn.Flatten())
        before, after = (
            sum(i.size for i in some) for some in (inputs[:place], inputs[place + 1 :])
        )
        head = nn.Linear(before + channels * height * width + after, _size(outputs))
        body: nn.Module = nn.Sequential(*layers, head)
        if len(inputs) > 1:
            sizes = before, inputs[place].size, after
            body = _Beside(nn.Sequential(*layers), head, sizes)
        return _Flat(_Rows(_started(body)), inputs, outputs)

    def mirrored(self) -> "Deconv":
        """The decoder that undoes these steps."""
        return Deconv(*reversed(self.hidden), activation=self.activation)


class _Crop(nn.Module):
    def __init__(self, channels: int, height: int, width: int):
        super().__init__()
        self.shape = (channels, height, width)

    def forward(self, image: Tensor) -> Tensor:
        return image[..., : self.shape[1], : self.shape[2]]


@dataclass(frozen=True, init=False)
class Deconv(_Layered):
    """An image out: a linear layer, then transposed convolutions, each doubling height and width.

    Args:
        hidden: channels before each transposed convolution.
        activation: name of the function before each.
    """

    def __init__(self, *hidden: int, activation: str = "relu"):
        super().__init__(*hidden, activation=activation)

    def build(self, inputs: Sequence[Input], outputs: Mapping[str, Shape]) -> nn.Module:
        """Make the module; see `Net.build`.

        Raises:
            ValueError: unless every output is an image of one shape (channels, height, width).
        """
        for name, shape in outputs.items():
            if len(shape) != 3:
                raise ValueError(
                    f"Deconv needs the parameter {name!r} of shape (channels, height, width), got "
                    f"{shape}."
                )
        shapes = set(outputs.values())
        if len(shapes) != 1 or not self.hidden:
            raise ValueError(f"Deconv needs layers and outputs of one image shape, got {shapes}.")
        channels, height, width = shapes.pop()
        factor = 2 ** len(self.hidden)
        low, wide = -(-height // factor), -(-width // factor)
        sizes = [*self.hidden, channels * len(outputs)]
        size = sum(i.size for i in inputs)
        layers: list[nn.Module] = [nn.Linear(size, sizes[0] * low * wide)]
        layers.append(nn.Unflatten(-1, (sizes[0], low, wide)))
        for before, after in itertools.pairwise(sizes):
            layers.append(ACTIVATIONS[self.activation]())
            layers.append(nn.ConvTranspose2d(before, after, 4, stride=2, padding=1))
        layers.append(_Crop(channels * len(outputs), height, width))
        return _Flat(_Rows(_started(nn.Sequential(*layers))), inputs, outputs)

    def mirrored(self) -> "Conv":
        """The encoder that undoes these steps."""
        return Conv(*reversed(self.hidden), activation=self.activation)


class _OfLog1p(nn.Module):
    """`body`, with each real parent's value x read as log(1 + x)."""

    def __init__(self, body: nn.Module, inputs: Sequence[Input]):
        super().__init__()
        self.body = body
        self.inputs = tuple(inputs)

    def forward(self, *values: Tensor) -> dict[str, Tensor]:
        pairs = zip(self.inputs, values, strict=True)
        return self.body(*(v.log1p() if i.categories is None else v for i, v in pairs))


@dataclass(frozen=True)
class Log1p(Net):
    """A net that reads counts by their size, as log(1 + x): `Log1p(MLP(200, 200))`.

    A count of thousands would saturate every unit of a net that reads it as it is.

    Args:
        body: the net that reads the logarithms.

    Raises:
        TypeError: if `body` is not a net.
    """

    body: Net

    def __post_init__(self) -> None:
        if not isinstance(self.body, Net):
            raise TypeError(f"Log1p takes a net such as MLP(200, 200), got {self.body!r}.")

    def build(self, inputs: Sequence[Input], outputs: Mapping[str, Shape]) -> nn.Module:
        """Make the module; see `Net.build`."""
        return _OfLog1p(self.body.build(inputs, outputs), inputs)

    def mirrored(self) -> Net:
        """The body's: what is put out need not be a count."""
        return self.body.mirrored()

    def to_json(self) -> dict[str, Any]:
        """The net as plain data."""
        return {"net": type(self).__name__, "body": self.body.to_json()}


class _OntoRing(nn.Module):
    """g(z) for one output, and g(0) = 0."""

    def __init__(self, output: str):
        super().__init__()
        self.output = output

    def forward(self, z: Tensor) -> dict[str, Tensor]:
        return {self.output: z / 10 + nn.functional.normalize(z, dim=-1)}


@dataclass(frozen=True)
class Ring(Net):
    """The fixed map g(z) = z / 10 + z / ||z||, without parameters (Doersch 2016, figure 2)."""

    def build(self, inputs: Sequence[Input], outputs: Mapping[str, Shape]) -> nn.Module:
        """Make the module; see `Net.build`.

        Raises:
            ValueError: unless there is one real vector in, and one output of its shape.
        """
        shapes = [i.shape for i in inputs if i.categories is None and len(i.shape) == 1]
        if len(inputs) != 1 or shapes != list(outputs.values()):
            raise ValueError(
                "Ring maps one real vector to one parameter of the same shape, got parents of "
                f"shapes {[i.shape for i in inputs]} for {dict(outputs)}."
            )
        return _OntoRing(next(iter(outputs)))
