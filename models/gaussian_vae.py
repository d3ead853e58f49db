"""The variational autoencoder of continuous data.

z ~ N(0, I),    x | z ~ N(f(z), sigma^2),    q(z | x) = N(mu(x), diag sigma(x)^2)

With sigma fixed, -log p(x | z) is the squared error over 2 sigma^2: sigma is the weight of
reconstruction. Learned or predicted, it is chosen by the data, and log p(x) may be positive.
"""

from typing import Literal

from pyro.distributions import Normal

from pvae import Latent, LatentModel, Learned, Observed
from pvae.nets import MLP


def gaussian_vae(
    data_size: int = 784,
    latent_size: int = 50,
    hidden: tuple[int, ...] = (200, 200),
    sigma: float | Literal["learned", "per pixel", "predicted"] = "learned",
) -> LatentModel:
    """p(z) = N(0, I), p(x | z) = N(mu(z), sigma^2); sigma fixed, learned or predicted from z."""
    scale = {
        "learned": {"scale": Learned(0.1)},
        "per pixel": {"scale": Learned(0.1, data_size)},
        "predicted": {},
    }
    if isinstance(sigma, str) and sigma not in scale:
        raise ValueError(f"`sigma` must be a number or one of {', '.join(scale)}; got {sigma!r}.")
    parameters = scale[sigma] if isinstance(sigma, str) else {"scale": sigma}
    return LatentModel(
        z=Latent(Normal, latent_size),
        x=Observed(Normal, data_size, given="z", net=MLP(*hidden), **parameters),
        guide={"z": Latent(Normal, latent_size, given="x", net=MLP(*hidden))},
        name="gaussian_vae",
    )
