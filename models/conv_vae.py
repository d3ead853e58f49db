"""The convolutional variational autoencoder of images, grey or in colour.

z ~ N(0, I),    x | z ~ Bernoulli(f(z)) or N(f(z), sigma^2),    q(z | x) = N(mu(x), diag sigma(x)^2)

x has shape (channels, height, width). Convolutions look at a patch of x wherever it lies, and so do
with far fewer weights than full layers (LeCun et al. 1998); the decoder runs them in reverse, as in
Radford, Metz & Chintala 2016. The model's formula is that of `vae`: only the two nets are others.
"""

from typing import Any, Literal

from pyro.distributions import Bernoulli, Normal

from pvae import Latent, LatentModel, Learned, Observed
from pvae.nets import Conv


def conv_vae(
    image_shape: tuple[int, int, int] = (1, 28, 28),
    latent_size: int = 50,
    channels: tuple[int, ...] = (32, 64),
    pixels: Literal["bernoulli", "normal"] = "bernoulli",
) -> LatentModel:
    """p(z) = N(0, I), p(x | z) = Bernoulli or N(f(z), sigma^2) of an image; q(z | x) = N."""
    kinds: dict[str, dict[str, Any]] = {
        "bernoulli": {"distribution": Bernoulli},
        "normal": {"distribution": Normal, "scale": Learned(0.1)},
    }
    if pixels not in kinds:
        raise ValueError(f"`pixels` must be one of {', '.join(kinds)}; got {pixels!r}.")
    encoder = Conv(*channels)
    return LatentModel(
        z=Latent(Normal, latent_size),
        x=Observed(shape=image_shape, given="z", net=encoder.mirrored(), **kinds[pixels]),
        guide={"z": Latent(Normal, latent_size, given="x", net=encoder)},
        name="conv_vae",
    )
