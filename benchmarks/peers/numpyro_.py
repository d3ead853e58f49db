"""NumPyro: `SVI.update` in a jitted `lax.scan`; importance sampling of log p(x) by its handlers.

NumPyro sums the loss over the batch where the others average, so Adam's epsilon is larger by the
batch size: then it makes the same steps.
"""

import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import lax, random
from numpyro.handlers import replay, seed, substitute, trace
from numpyro.infer import SVI, RenyiELBO, Trace_ELBO

from benchmarks import inputs
from benchmarks.peers.training import LR, FirstStep, Training

__all__ = ["JOBS"]

CHUNKS = (8, 16, 32)  # particles of all data in one pass, of which the fastest is taken


class VAE:
    """Model and guide over a batch (N, 784)."""

    def __init__(self, latent: int):
        self.latent = latent
        self.layers = inputs.layers(latent)

    def mlp(self, name: str, x: jax.Array) -> jax.Array:
        last = len(self.layers[name]) - 1
        for i, (weight, bias) in enumerate(self.layers[name]):
            x = x @ numpyro.param(f"{name}.{i}.weight", jnp.asarray(weight))
            x = x + numpyro.param(f"{name}.{i}.bias", jnp.asarray(bias))
            x = x if i == last else jnp.tanh(x)
        return x

    def model(self, x: jax.Array) -> None:
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(jnp.zeros(self.latent), 1.0).to_event(1))
            logits = self.mlp("decoder", z)
            numpyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    def guide(self, x: jax.Array) -> None:
        with numpyro.plate("data", len(x)):
            loc, log_scale = jnp.split(self.mlp("encoder", x), 2, axis=-1)
            numpyro.sample("z", dist.Normal(loc, jnp.exp(log_scale)).to_event(1))


class Steps(Training):
    """A block of steps in one call."""

    def prepare(self) -> None:
        self.x = jnp.asarray(self.data)
        vae = VAE(self.latent)
        many = self.particles > 1
        loss = RenyiELBO(alpha=0, num_particles=self.particles) if many else Trace_ELBO()
        adam = numpyro.optim.Adam(LR, eps=1e-8 * self.batch)
        svi = SVI(vae.model, vae.guide, adam, loss)

        @partial(jax.jit, donate_argnums=0)
        def block(state: Any, x: jax.Array, batches: jax.Array) -> Any:
            return lax.scan(lambda s, index: svi.update(s, x[index]), state, batches)

        self.block_of = block
        self.state = svi.init(random.PRNGKey(0), self.x[: self.batch])

    def run(self, batches: np.ndarray) -> np.ndarray:
        self.state, losses = self.block_of(self.state, self.x, jnp.asarray(batches))
        return np.asarray(losses) / self.batch


class Evaluate:
    """L_K by a scan over chunks of particles, with a running logarithm of the sum."""

    def __init__(self, sizes: dict[str, int], folder: Path, device: str):
        self.vae = VAE(latent=50)
        self.x = jnp.asarray(inputs.load(folder, "bits", sizes["num_data"]))
        self.particles = sizes["particles"]
        self.calls = 0
        svi = SVI(self.vae.model, self.vae.guide, numpyro.optim.Adam(LR), Trace_ELBO())
        self.parameters = svi.get_params(svi.init(random.PRNGKey(0), self.x))

    def check(self) -> dict[str, Any]:
        chunks = [c for c in CHUNKS if c <= self.particles]
        self.passes = {c: jax.jit(partial(self.bound, chunk=c)) for c in chunks}
        found = [self.log_p(chunk) for chunk in chunks]
        times = {c: min(self.seconds(c) for _ in range(3)) for c in chunks}
        self.chunk = min(times, key=times.__getitem__)
        return {"bounds": found[0].tolist()}

    def time(self) -> float:
        return self.seconds(self.chunk) / (self.particles * len(self.x))

    def seconds(self, chunk: int) -> float:
        start = time.perf_counter()
        self.log_p(chunk)
        return time.perf_counter() - start

    def log_p(self, chunk: int) -> np.ndarray:
        self.calls += 1
        key = random.PRNGKey(self.calls)
        return np.asarray(self.passes[chunk](key, self.parameters, self.x))

    def bound(self, key: jax.Array, parameters: Any, x: jax.Array, chunk: int) -> jax.Array:
        """L_K of each datum, exactly K draws: whole chunks and a rest."""
        draw = jax.vmap(self.log_weights, in_axes=(0, None, None))
        whole, rest = divmod(self.particles, chunk)
        keys = random.split(key, self.particles)
        total = jax.nn.logsumexp(draw(keys[:rest], parameters, x), axis=0) if rest else -jnp.inf

        def add(total: jax.Array, keys: jax.Array) -> tuple[jax.Array, None]:
            log_w = draw(keys, parameters, x)
            return jnp.logaddexp(total, jax.nn.logsumexp(log_w, axis=0)), None

        parts = keys[rest:].reshape(whole, chunk, *keys.shape[1:])
        total, _ = lax.scan(add, jnp.broadcast_to(total, len(x)), parts)
        return total - jnp.log(self.particles)

    def log_weights(self, key: jax.Array, parameters: Any, x: jax.Array) -> jax.Array:
        """log p(x, z) - log q(z | x) of one particle of each datum, (N,)."""
        guide = trace(seed(substitute(self.vae.guide, parameters), key)).get_trace(x)
        model = trace(replay(substitute(self.vae.model, parameters), guide)).get_trace(x)
        log_q = guide["z"]["fn"].log_prob(guide["z"]["value"])
        log_p = [model[name]["fn"].log_prob(model[name]["value"]) for name in ("z", "x")]
        return log_p[0] + log_p[1] - log_q


JOBS = {
    ("NumPyro", "step"): Steps,
    ("NumPyro", "epoch"): Steps,
    ("NumPyro", "first step"): lambda *given: FirstStep(Steps(*given)),
    ("NumPyro", "evaluate"): Evaluate,
}
