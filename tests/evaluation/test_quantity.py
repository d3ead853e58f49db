"""What p is of: a label counts where it was seen, and what is given is not modelled."""

import math

import pyro
import pytest
import torch
from pyro.distributions import Normal
from torch import Tensor

import pvae
from pvae import models
from tests.evaluation.by_hand import exact
from tests.fitting import binary

SIZES = {"data_size": 6, "latent_size": 2, "hidden": (5,)}


def labels(known: int = 20) -> Tensor:
    """Of the first `known` data; NaN for the others."""
    return torch.where(torch.arange(20) < known, torch.arange(20.0) % 3, math.nan)


def semi_supervised(known: int) -> pvae.Evaluation:
    model = models.semi_supervised_vae(categories=3, **SIZES)
    return pvae.evaluate(model, {"x": binary(), "y": labels(known)}, 20)


def conditional() -> pvae.Evaluation:
    model = models.conditional_vae(categories=3, **SIZES)
    return pvae.evaluate(model, {"x": binary(), "y": labels().long()}, 20)


@pytest.mark.parametrize(
    ("evaluation", "of", "dimensions"),
    [
        (lambda: semi_supervised(20), "x, y", 7),
        (lambda: semi_supervised(5), "x, y", 6.25),
        (lambda: semi_supervised(0), "x", 6),
        (conditional, "x | y", 6),
        (lambda: pvae.evaluate(models.vae(**SIZES), binary(), 20), "x", 6),
    ],
)
def test_it_is_told_and_counted(evaluation, of, dimensions):
    result = evaluation()
    assert (result.of, result.dimensions) == (of, dimensions)
    assert result.verdict.startswith(f"log p({of}) >= ")
    assert pvae.compare({"model": result}).table.columns[0] == f"log p({of})"
    assert repr(pvae.compare({"model": result})).startswith(f"log p({of}), nats per datum, 20 data")
    nats, bits = (float(result.summary(bits=b).loc["L_20", "value"]) for b in (False, True))
    assert bits == pytest.approx(nats / dimensions / math.log(2))


def test_of_two_quantities_none_is_the_better():
    """One is lower by about log 3 than the other, which says nothing of the models."""
    message = r"'m2' and 'cvae' cannot be compared: log p\(x, y\) and log p\(x \| y\) are different"
    with pytest.raises(ValueError, match=message):
        pvae.compare({"m2": semi_supervised(20), "cvae": conditional()})


def test_with_every_label_summed_out_it_is_compared_with_any_model_of_x():
    vae = pvae.evaluate(models.vae(**SIZES), binary(), 20)
    compared = pvae.compare({"m2": semi_supervised(0), "vae": vae})
    assert set(compared.table.index) == {"m2", "vae"}
    message = r"log p\(x, y\) and log p\(x\) are different quantities\. .* NaN for all data"
    with pytest.raises(ValueError, match=message):
        pvae.compare({"m2": semi_supervised(1), "vae": vae})


def test_annealing_tells_it_too():
    model = models.conditional_vae(categories=3, **SIZES)
    data = {"x": binary(), "y": labels().long()}
    result = pvae.ais(model, data, num_chains=2, num_temperatures=3)
    assert (result.of, result.dimensions) == ("x | y", 6)


def test_data_simulated_for_one_label_are_bracketed():
    model = models.conditional_vae(categories=3, **SIZES)
    how = {"num_data": 6, "num_chains": 2, "num_temperatures": 5}
    one = pvae.sandwich(model, given={"y": 2}, **how)
    all_of_them = pvae.sandwich(model, given={"y": torch.full((6,), 2)}, **how)
    assert one.simulated.equals(all_of_them.simulated)


def test_columns_that_a_hand_written_model_conditions_on_are_none_of_its_x():
    def model(x, y):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", Normal(torch.zeros(len(x)), 1.0))
            pyro.sample("x", Normal(z[..., None] + y, 1.0).to_event(1), obs=x)

    def guide(x, y):
        with pyro.plate("data", len(x)):
            pyro.sample("z", Normal(torch.zeros(len(x)), 1.0))

    raw = 9 * torch.randn(60, 2)
    x, y = (
        pvae.load_data(rows.numpy(), standardisation="columns").train for rows in (raw, 3 * raw)
    )
    result = pvae.evaluate(pvae.PyroPair(model, guide), {"x": x, "y": y}, 20)
    assert (result.of, result.dimensions) == ("x | y", 2)
    assert float(result.per_datum["log_jacobian"][0]) == pytest.approx(x.spec.log_jacobian)


def test_names_and_order_of_columns_make_no_other_quantity():
    one, other = (exact(-1.0, -2.0, of=of) for of in ("x, w", "w, x"))
    pvae.compare({"one": one, "other": other})
    one, other = (exact(-1.0, -2.0, of=of) for of in ("x | y", "x | label"))
    pvae.compare({"one": one, "other": other})
