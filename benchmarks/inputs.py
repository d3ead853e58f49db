"""What every peer is given: the same data, first weights, order of batches and start of EM.

    make(folder)  -->  bits, grey, pixels, components (N, size) as .npy  -->  read by each worker

Images are MNIST's 60,000 training images where the environment's PVAE_DATA says where they are, and
otherwise generated ones of the same shape. Weights are by Glorot & Bengio 2010, biases zero.
"""

import itertools
import os
from pathlib import Path

import numpy as np

__all__ = ["HIDDEN", "SIZE", "batches", "em_start", "layers", "load", "make"]

SIZE = 784
HIDDEN = (200, 200)
NUM_IMAGES = 60_000
NUM_COMPONENTS = 64  # principal components, for mixtures with full covariances
LEVELS = 256

Layers = list[tuple[np.ndarray, np.ndarray]]


def make(folder: Path, num: int = NUM_IMAGES) -> str:
    """Write the data that workers read, and tell what they are."""
    rng = np.random.default_rng(0)
    if root := os.environ.get("PVAE_DATA"):
        grey, what = _mnist(root)[:num], f"MNIST, {num:,} training images"
    else:
        grey, what = _generated(rng)[:num], f"{num:,} generated images of 784 pixels"
    np.save(folder / "grey.npy", grey)
    np.save(folder / "bits.npy", rng.random(grey.shape, dtype=np.float32) < grey)
    noise = rng.random(grey.shape, dtype=np.float32)
    pixels = (grey * (LEVELS - 1) + noise) / LEVELS
    np.save(folder / "pixels.npy", pixels)
    np.save(folder / "components.npy", _principal_components(pixels))
    return what


def _mnist(root: str) -> np.ndarray:
    import pvae

    train, valid, _ = pvae.load_data("mnist", root=root, binarisation="none")
    return np.concatenate([train.values.numpy(), valid.values.numpy()])


def _generated(rng: np.random.Generator) -> np.ndarray:
    """Ten smooth prototypes, each pixel of an image being a little off its prototype's."""
    prototypes = np.repeat(np.repeat(rng.random((10, 7, 7)), 4, axis=1), 4, axis=2)
    chosen = prototypes.reshape(10, SIZE)[rng.integers(10, size=NUM_IMAGES)] ** 3
    grey = np.clip(chosen + 0.1 * rng.standard_normal(chosen.shape), 0, 1)
    return (np.round(grey * (LEVELS - 1)) / (LEVELS - 1)).astype(np.float32)


def _principal_components(x: np.ndarray) -> np.ndarray:
    centred = x - x.mean(axis=0)
    _, vectors = np.linalg.eigh(centred.T @ centred)
    return centred @ vectors[:, : -NUM_COMPONENTS - 1 : -1]


def load(folder: Path, name: str, num: int | None = None, dtype: type = np.float32) -> np.ndarray:
    """The first `num` rows of what `make` wrote."""
    return np.load(folder / f"{name}.npy", mmap_mode="r")[:num].astype(dtype)


def layers(latent_size: int) -> dict[str, Layers]:
    """First weights (in, out) and biases of the encoder (loc and log scale) and the decoder."""
    rng = np.random.default_rng(1)
    sizes = {
        "encoder": (SIZE, *HIDDEN, 2 * latent_size),
        "decoder": (latent_size, *HIDDEN, SIZE),
    }
    return {
        name: [_glorot(rng, *pair) for pair in itertools.pairwise(s)] for name, s in sizes.items()
    }


def _glorot(rng: np.random.Generator, before: int, after: int) -> tuple[np.ndarray, np.ndarray]:
    most = np.sqrt(6 / (before + after))
    weight = rng.uniform(-most, most, (before, after)).astype(np.float32)
    return weight, np.zeros(after, np.float32)


def batches(num_data: int, batch: int, steps: int, seed: int) -> np.ndarray:
    """Indices (steps, batch): epochs of whole batches, each in an order of its own."""
    rng = np.random.default_rng([2, seed])
    an_epoch = num_data // batch
    orders = [rng.permutation(num_data)[: an_epoch * batch] for _ in range(-(-steps // an_epoch))]
    return np.concatenate(orders).reshape(-1, batch)[:steps]


def em_start(x: np.ndarray, num_components: int) -> tuple[np.ndarray, float]:
    """Means (C, D) drawn from the data, and the variance of every component about its mean."""
    chosen = np.random.default_rng(3).choice(len(x), num_components, replace=False)
    return x[chosen], float(x.var(axis=0).mean())
