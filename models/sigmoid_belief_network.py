"""The sigmoid belief network (Neal 1992): layers of binary latents, each a logistic regression.

h_L ~ Bernoulli(sigmoid(b)),    h_l | h_l+1 ~ Bernoulli(sigmoid(W h_l+1 + b)),    x | h_1 likewise
q(h_1 | x) and q(h_l+1 | h_l), Bernoullis by logistic regression the other way.

A binary draw has no derivative, so the guide learns by the score function, whose noise a baseline
must tame: under `pvae.IWAE(K, baseline="vimco")` each draw is judged by the others (Mnih & Rezende
2016, whose nets have this shape). With few latents log p(x) is a sum over their 2^n values.
"""

from pyro.distributions import Bernoulli

from pvae import Latent, LatentModel, Learned, Observed
from pvae.nets import Linear


def sigmoid_belief_network(
    data_size: int = 784, latent_sizes: tuple[int, ...] = (200, 200)
) -> LatentModel:
    """p(h_L) = Bernoulli, p(h_l | h_l+1) and p(x | h_1) = Bernoulli(sigmoid(W h + b)); q alike."""
    if not latent_sizes:
        raise ValueError("`latent_sizes` needs a number for each layer, got none.")
    layers = [(f"h{i}", size) for i, size in enumerate(latent_sizes, start=1)]
    above, top_size = layers[-1]
    sites = {above: Latent(Bernoulli, top_size, logits=Learned(0.0, top_size))}
    for name, size in reversed(layers[:-1]):
        sites[name] = Latent(Bernoulli, size, given=above, net=Linear())
        above = name
    guide, below = {}, "x"
    for name, size in layers:
        guide[name] = Latent(Bernoulli, size, given=below, net=Linear())
        below = name
    x = Observed(Bernoulli, data_size, given=above, net=Linear())
    return LatentModel(**sites, x=x, guide=guide, name="sigmoid_belief_network")
