"""Layers drawn from the top in the model, and from the data upwards in the guide."""

import json

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import Bernoulli, Normal

from pvae import Latent, LatentModel, Observed, models
from pvae.nets import MLP


def two_layers() -> LatentModel:
    """The default, written out: saved runs hold this declaration, and parameters by its names."""
    return LatentModel(
        z2=Latent(dist.Normal, 50),
        z1=Latent(dist.Normal, 100, given="z2", net=MLP(100, 100)),
        x=Observed(dist.Bernoulli, 784, given="z1", net=MLP(200, 200)),
        guide={
            "z1": Latent(dist.Normal, 100, given="x", net=MLP(200, 200)),
            "z2": Latent(dist.Normal, 50, given="z1", net=MLP(100, 100)),
        },
        name="hierarchical_vae",
    )


def test_two_layers_are_declared_as_they_always_were():
    made, written = models.hierarchical_vae(), two_layers()
    assert json.dumps(made.to_json()) == json.dumps(written.to_json())  # the order of sites, too
    assert list(made.state_dict()) == list(written.state_dict())


def normal(module, *parents: Tensor) -> Normal:
    """What a site's net says, its scale by exp."""
    out = module.nets["net"](*parents)
    return Normal(out["loc"], out["scale"].exp())


@pytest.mark.parametrize("sizes", [(4,), (4, 3), (4, 3, 2)])
def test_log_weights_are_the_formula_layer_by_layer(sizes):
    model = models.hierarchical_vae(6, sizes, hidden=(5,), hidden_top=(7,)).double()
    x = torch.rand(8, 6, dtype=torch.float64).round()
    drawn = model.draw(x, 3)
    names = [f"z{i}" for i in range(1, len(sizes) + 1)]
    z = [drawn.values[name] for name in names]
    assert [value.shape for value in z] == [(3, 8, size) for size in sizes]
    p, q = model.model_modules, model.guide_modules
    assert list(q) == names
    assert list(p) == [*reversed(names), "x"]
    expected = Bernoulli(logits=p["x"].nets["net"](z[0])["logits"]).log_prob(x).sum(-1)
    expected = expected + Normal(0.0, 1.0).log_prob(z[-1]).sum(-1)
    expected = expected - normal(q["z1"], x).log_prob(z[0]).sum(-1)
    for name, other, below, above in zip(names, names[1:], z, z[1:], strict=False):
        expected = expected + normal(p[name], above).log_prob(below).sum(-1)
        expected = expected - normal(q[other], below).log_prob(above).sum(-1)
    torch.testing.assert_close(drawn.log_weights, expected)


def test_nets_beside_the_data_have_sizes_of_their_own():
    model = models.hierarchical_vae(6, (4, 3, 2), hidden=(5,), hidden_top=(7,))
    found = {"model": model.sites, "guide": model.guide_sites}
    nets = {f"{of} {name}": site.net for of, all_ in found.items() for name, site in all_.items()}
    assert nets == {
        "model z3": None,
        "model z2": MLP(7),
        "model z1": MLP(7),
        "model x": MLP(5),
        "guide z1": MLP(5),
        "guide z2": MLP(7),
        "guide z3": MLP(7),
    }
    assert MLP(5) != MLP(7)


def test_there_is_a_layer():
    with pytest.raises(ValueError, match="`latent_sizes` needs a number for each layer, got none"):
        models.hierarchical_vae(6, ())
