import math

import pyro.distributions as dist
import pytest
import torch

from pvae import Given, Latent, LatentModel, Learned, Observed
from pvae.flows import IAF
from pvae.nets import MLP
from pvae.priors import PseudoInputs

K = Latent(dist.Categorical, 3)
X = Observed(dist.Bernoulli, 4, given="z", net=MLP(3))
AT_K = Latent(dist.Normal, 2, given="k", net=PseudoInputs())


def test_a_prior_at_pseudo_inputs_is_the_guide_as_it_is_with_flow_and_free_parameters():
    entry = Latent(dist.Normal, 2, given="x", net=MLP(3), scale=Learned(0.3), flow=IAF(4))
    model = LatentModel(k=K, z=AT_K, x=X, guide={"z": entry})
    z, u = torch.randn(5, 2), model.module_of("z").pseudo_inputs.values()["x"]
    for k in range(3):
        at_u = model.guide_module_of("z")({"x": u[k]}).log_prob(z)
        torch.testing.assert_close(model.module_of("z")({"k": torch.tensor(k)}).log_prob(z), at_u)


def test_a_prior_at_pseudo_inputs_takes_the_default_guide():
    model = LatentModel(k=K, z=AT_K, x=X)
    assert model.guide_sites == {"z": Latent(dist.Normal, 2, given="x", net=MLP(3))}
    assert model.module_of("z").pseudo_inputs.values()["x"].shape == (3, 4)


@pytest.mark.parametrize(
    ("site", "smallest", "largest"),
    [
        (Observed(dist.Bernoulli, 4, given="z", net=MLP(3)), 0, 1),
        (Observed(dist.Beta, 4, given="z", net=MLP(3)), 0, 1),
        (Observed(dist.Poisson, 4, given="z", net=MLP(3)), 0, math.inf),
        (Observed(dist.Normal, 4, given="z", net=MLP(3)), -math.inf, math.inf),
    ],
)
def test_pseudo_inputs_lie_between_the_values_that_data_take(site, smallest, largest):
    model = LatentModel(k=Latent(dist.Categorical, 30), z=AT_K, x=site)
    u = model.module_of("z").pseudo_inputs.values()["x"]
    assert u.shape == (30, 4)
    assert bool(((smallest < u) & (u < largest)).all())
    assert bool((u < 0).any()) == (smallest < 0)
    assert bool((u > 1).any()) == (largest > 1)


def test_pseudo_inputs_stand_for_every_parent_of_the_guide():
    model = LatentModel(y=Given(3), k=K, z=AT_K, x=X)
    assert model.guide_sites["z"].given == ("x", "y")
    values = model.module_of("z").pseudo_inputs.values()
    assert {name: tuple(u.shape) for name, u in values.items()} == {"x": (3, 4), "y": (3, 3)}
    assert model.module_of("z")({"k": torch.arange(3)}).batch_shape == (3,)


@pytest.mark.parametrize(
    ("sites", "message"),
    [
        (
            {"k": K, "z": AT_K, "x": X, "guide": {"z": Latent(dist.Laplace, 2, flow=IAF(3))}},
            r"PseudoInputs make p\(z \| k\) the guide's distribution as it is: write both as "
            r"Normal of shape \(2,\), .*; got the guide entry Latent\(distribution=.*Laplace",
        ),
        (
            {
                "k": K,
                "z": Latent(dist.Normal, 2, given="k", net=PseudoInputs(), scale=1.0),
                "x": X,
            },
            r"write both as Normal .*, in the model with neither parameters nor flow",
        ),
        (
            {
                "y": Latent(dist.Normal, 2),
                "z": Latent(dist.Normal, 2, given="y", net=PseudoInputs()),
                "x": X,
            },
            r"Site 'z': PseudoInputs needs one Categorical parent .* of event shapes \[\(2,\)\]",
        ),
        (
            {"y": Given(categories=3), "k": K, "z": AT_K, "x": X},
            r"The guide reads 'y', which is an index: pseudo-inputs are real numbers",
        ),
    ],
)
def test_pseudo_inputs_that_cannot_be_say_why(sites, message):
    with pytest.raises(ValueError, match=message):
        LatentModel(**sites)
