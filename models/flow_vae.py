"""The VAE whose prior and guide pass through flows.

prior:  z = f(e), e ~ N(0, I), by masked autoregressive steps (Papamakarios et al. 2017)
guide:  z = g_x(e), e ~ N(mu(x), diag sigma(x)^2), by inverse ones (Kingma et al. 2016)
x | z ~ Bernoulli(f(z)),    log p(z) = log N(e; 0, I) - log |det df/de|, and so for q(z | x)

An autoregressive map goes one way in one pass of its network, the other dimension by dimension.
A guide must draw fast and knows where its own draws came from: IAF. A prior meets draws of others,
and must know their density fast: MAF, the same map turned round. A flow in the guide closes the gap
between q and the posterior; one in the prior lets p(z) go to where the codes are (Chen et al.
2017). With flow="spline" both are neural splines (Durkan et al. 2019), one pass both ways. So
gradients that cut draws from their past (stl, dreg), for which a guide must know the density of
what it no longer knows as its own, take one pass too, and not one for each dimension.
"""

from typing import Literal

from pyro.distributions import Bernoulli, Normal

from pvae import Latent, LatentModel, Observed
from pvae.flows import IAF, MAF, Flow, SplineCoupling
from pvae.nets import MLP


def flow_vae(
    data_size: int = 784,
    latent_size: int = 50,
    hidden: tuple[int, ...] = (200, 200),
    hidden_flow: tuple[int, ...] = (100,),
    flow: Literal["autoregressive", "spline"] = "autoregressive",
) -> LatentModel:
    """p(z) = two steps of MAF, p(x | z) = Bernoulli; q(z | x) = two steps of IAF; or of splines."""
    kinds: dict[str, tuple[type[Flow], type[Flow]]] = {
        "autoregressive": (MAF, IAF),
        "spline": (SplineCoupling, SplineCoupling),
    }
    if flow not in kinds:
        raise ValueError(f"`flow` must be one of {', '.join(kinds)}; got {flow!r}.")
    prior, guide = ([kind(*hidden_flow)] * 2 for kind in kinds[flow])
    return LatentModel(
        z=Latent(Normal, latent_size, flow=prior),
        x=Observed(Bernoulli, data_size, given="z", net=MLP(*hidden)),
        guide={"z": Latent(Normal, latent_size, given="x", net=MLP(*hidden), flow=guide)},
        name="flow_vae",
    )
