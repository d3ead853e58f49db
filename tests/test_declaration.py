import builtins
import json
import shutil
from pathlib import Path

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pvae
from pvae import Given, Latent, LatentModel, Learned, Observed, Predicted
from pvae.flows import IAF, MAF, SplineCoupling
from pvae.nets import MLP, Conv, Deconv, Linear, Table
from pvae.priors import PseudoInputs


def vae() -> LatentModel:
    return pvae.models.vae(data_size=784, latent_size=50, hidden=(200, 200))


def everything() -> LatentModel:
    """Each kind of site, net and parameter that a declaration can hold."""
    return LatentModel(
        y=Given((), categories=3),
        u=Given(2),
        c=Latent(dist.Categorical, 4, logits=Learned([0.0, 1.0, 2.0, 3.0])),
        z=Latent(dist.Normal, 2, loc=[0.5, -0.5], scale=2),
        r=Latent(dist.Gamma, 1, given=("z", "u"), net=MLP(5, activation="relu"), rate=Learned(2.0)),
        x=Observed(dist.Bernoulli, (1, 5, 5), given=("z", "y"), net=Deconv(3), check_support=False),
        w=Observed(dist.Normal, 3, given="c", net=Table(), scale=Predicted(Table(), 1)),
        v=Observed(
            dist.MultivariateNormal, 2, given="z", net=Linear(), scale_tril=torch.eye(2) / 3
        ),
        guide={
            "z": Latent(dist.Normal, 2, given="x", net=Conv(3)),
            "r": Latent(dist.LogNormal, 1, given=("z", "w"), net=MLP(4), scale=Learned(0.1, 1)),
        },
        name="everything",
    )


def with_flows() -> LatentModel:
    """A prior that is the guide's at pseudo-inputs, a guide that passes through flows."""
    steps = [IAF(8), SplineCoupling(7, 6), MAF(8)]
    return LatentModel(
        k=Latent(dist.Categorical, 3),
        z=Latent(dist.Normal, 2, given="k", net=PseudoInputs()),
        y=Latent(dist.Normal, 2, given="z", net=Linear(), flow=MAF(5)),
        x=Observed(dist.Bernoulli, 4, given="y", net=MLP(5)),
        guide={
            "z": Latent(dist.Normal, 2, given="x", net=MLP(5), flow=steps),
            "y": Latent(dist.Normal, 2, given=("z", "x"), net=MLP(5)),
        },
    )


def through_text(model: LatentModel) -> LatentModel:
    return LatentModel.from_json(json.dumps(model.to_json()))


# ------------------------------------------------------------------------------ JSON


@pytest.mark.parametrize("declare", [vae, everything, with_flows])
def test_a_declaration_survives_json(declare):
    model = declare()
    read = through_text(model)
    assert type(read) is LatentModel
    assert json.dumps(read.to_json()) == json.dumps(model.to_json())
    assert repr(read) == repr(model)
    assert list(read.sites) == list(model.sites)  # the order is part of the declaration
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    assert {name: value.shape for name, value in read.state_dict().items()} == shapes


def test_constants_and_starting_values_survive_json():
    model, read = everything(), through_text(everything())
    for name in ("c", "z", "v"):
        now, then = read.module_of(name), model.module_of(name)
        for (key, a), (_, b) in zip(now.named_buffers(), then.named_buffers(), strict=True):
            assert torch.equal(a, b), key
        for key in then.learned:
            assert torch.equal(now.learned[key], then.learned[key])


def test_the_same_weights_give_the_same_log_weights_after_json():
    model = everything()
    data = {
        "x": torch.rand(6, 1, 5, 5),
        "w": torch.randn(6, 3),
        "v": torch.randn(6, 2),
        "y": torch.randint(3, (6,)),
        "u": torch.randn(6, 2),
    }
    read = through_text(model)
    read.load_state_dict(model.state_dict())
    expected = pvae.log_weights(model, data, num_particles=3)
    assert torch.equal(pvae.log_weights(read, data, num_particles=3), expected)


def test_flows_and_pseudo_inputs_weigh_the_same_after_json():
    model, data = with_flows(), torch.rand(6, 4).round()
    read = through_text(model)
    assert read.guide_sites["z"].flow == (IAF(8), SplineCoupling(7, 6), MAF(8))
    read.load_state_dict(model.state_dict())
    expected = pvae.log_weights(model, data, num_particles=3)
    assert torch.equal(pvae.log_weights(read, data, num_particles=3), expected)


def test_a_declaration_without_flows_says_nothing_of_them():
    assert "flow" not in json.dumps(vae().to_json())


def test_a_guide_left_out_is_left_out_after_json():
    model = LatentModel(
        z=Latent(dist.Normal, 2), x=Observed(dist.Bernoulli, 4, given="z", net=MLP(5))
    )
    assert model.to_json()["guide"] is None
    assert through_text(model).guide_sites == model.guide_sites


@pytest.mark.parametrize("scale", [np.full(2, 0.5), np.float32(0.5), torch.tensor(0.5), [0.5, 0.5]])
@pytest.mark.parametrize("wrap", [lambda value: value, Learned])
def test_numbers_of_any_sort_become_json(scale, wrap):
    model = LatentModel(x=Observed(dist.Normal, 2, scale=wrap(scale)))
    x = torch.randn(3, 2)
    torch.testing.assert_close(pvae.log_weights(through_text(model), x), pvae.log_weights(model, x))


def test_json_is_read_as_a_mapping_or_as_text():
    data = vae().to_json()
    assert repr(LatentModel.from_json(data)) == repr(LatentModel.from_json(json.dumps(data)))


def changed(path: tuple[str, ...], value: object) -> dict:
    data = json.loads(json.dumps(vae().to_json()))
    at = data
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return data


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            changed(("sites", "x", "net", "net"), "os.system"),
            r"names the net 'os\.system', which is not one of pvae's \(MLP, .*\)",
        ),
        (changed(("sites", "x", "net", "net"), "Net"), "names the net 'Net', which is not one of"),
        (
            changed(("guide", "z", "distribution"), "os.system"),
            r"pyro\.distributions has no distribution 'os\.system'",
        ),
        (changed(("sites", "x", "distribution"), "util"), "has no distribution 'util'"),
        (changed(("sites", "x", "distribution"), "__class__"), "has no distribution '__class__'"),
        (changed(("sites", "x", "distribution"), 3), "The declaration is damaged: TypeError"),
        (
            changed(("sites", "x", "kind"), "code"),
            r"The declaration is damaged: KeyError\('code'\)",
        ),
        (changed(("sites", "x", "net", "more"), 1), "damaged: TypeError.*'more'"),
        (changed(("sites", "x", "net", "activation"), "exec"), "no activation 'exec'"),
        (
            changed(("sites", "z", "flow"), [{"flow": "exec", "hidden": [3]}]),
            r"names the flow 'exec', which is not one of pvae's \(IAF, MAF, SplineCoupling\)",
        ),
        (changed(("sites", "z", "flow"), [{"flow": "IAF"}]), r"damaged: KeyError\('hidden'\)"),
        (changed(("sites",), 3), "damaged: AttributeError"),
        (changed(("sites", "x", "given"), ["q"]), "The site 'x' is given 'q', which is unknown"),
        (
            changed(("format",), 99),
            r"Not a declaration that this pvae reads: format 99, expected 1",
        ),
        ({"format": 1}, r"damaged: KeyError\('sites'\)"),
        ({}, "Not a declaration that this pvae reads: format None"),
        ("[]", r"Not a declaration that this pvae reads: format \[\]"),
        ("import os", "Expecting value"),
    ],
)
def test_what_to_json_did_not_write_is_refused(data, message):
    with pytest.raises(ValueError, match=message):
        LatentModel.from_json(data)


def test_reading_a_declaration_imports_nothing(monkeypatch):
    imported = builtins.__import__
    names = []

    def spy(name, *args, **kwargs):
        names.append(name)
        return imported(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", spy)
    with pytest.raises(ValueError, match="has no distribution 'antigravity'"):
        LatentModel.from_json(changed(("sites", "x", "distribution"), "antigravity"))
    assert "antigravity" not in names


def test_a_net_of_the_users_own_is_code_and_not_data():
    site = Observed(dist.Bernoulli, 3, given="z", net=nn.Linear(2, 3))
    model = LatentModel(z=Latent(dist.Normal, 2), x=site)
    with pytest.raises(TypeError, match=r"A net of your own \(Linear\) is code, and a declaration"):
        model.to_json()


# ------------------------------------------------------------------------------ tables


def test_a_model_prints_as_a_table_of_its_sites():
    assert str(vae()) == (
        "vae: 425,284 parameters\n"
        "site  kind      distribution  shape   given  parameters\n"
        "z     latent    Normal        (50,)          standard\n"
        "x     observed  Bernoulli     (784,)  z      "
        "logits by MLP(hidden=(200, 200), activation='tanh')\n"
        "z     guide     Normal        (50,)   x      "
        "loc, scale by MLP(hidden=(200, 200), activation='tanh')"
    )


def test_the_table_tells_where_each_parameter_comes_from():
    lines = {line.split()[0] + line.split()[1]: line for line in str(everything()).splitlines()[2:]}
    assert lines["ygiven"].split() == ["y", "given", "()"]
    assert "latent, summed out  Categorical" in lines["clatent,"]
    assert lines["clatent,"].endswith("logits learned")
    assert lines["zlatent"].endswith("loc = [0.5, -0.5]; scale = 2")
    assert lines["rlatent"].endswith(
        "rate learned; concentration by MLP(hidden=(5,), activation='relu')"
    )
    assert lines["wobserved"].endswith("scale by Table(); loc by Table()")
    assert lines["vobserved"].endswith("scale_tril = tensor(2, 2); loc by Linear()")
    assert " (1, 5, 5) " in lines["xobserved"]
    assert " z, y " in lines["xobserved"]
    lines = str(with_flows()).splitlines()
    assert lines[3].endswith("loc, scale by PseudoInputs()")
    assert lines[4].endswith("loc, scale by Linear(); flow by MAF(hidden=(5,))")
    assert lines[6].endswith(
        "flow by IAF(hidden=(8,)), SplineCoupling(hidden=(7, 6)), MAF(hidden=(8,))"
    )
    own = LatentModel(
        z=Latent(dist.Normal, 2),
        x=Observed(dist.Bernoulli, 3, given="z", net=nn.Sequential(nn.Linear(2, 3))),
    )
    assert "logits by Sequential" in str(own)


def test_the_table_of_a_notebook_has_the_same_cells():
    model = vae()
    html = model._repr_html_()
    assert html.startswith("<table><caption>vae: 425,284 parameters</caption><tr><th>site</th>")
    assert html.count("<tr>") == 4
    assert "<td>Bernoulli</td><td>(784,)</td><td>z</td>" in html
    assert "activation=&#x27;tanh&#x27;" in html
    model.name = "<script>"
    assert "<script>" not in model._repr_html_()


# ------------------------------------------------------------------------------ drawing


def test_a_model_is_drawn_as_a_plate_diagram():
    source = pvae.models.hierarchical_vae(data_size=4, latent_sizes=(3, 2)).render().source
    assert "cluster_data" in source
    assert "z2 -> z1" in source
    assert "z1 -> x" in source
    assert "x ~ Bernoulli" in source


@pytest.mark.parametrize(
    "declare", [everything, with_flows, lambda: pvae.models.mixture_of_gaussians(3, 2)]
)
def test_any_model_can_be_drawn(declare):
    model = declare()
    source = model.render().source
    assert all(f"{name} [label" in source for name in model.model_modules)


@pytest.mark.skipif(shutil.which("dot") is None, reason="the program `dot` is not installed")
def test_a_drawing_is_written_to_a_file(tmp_path):
    vae().render(str(tmp_path / "vae.svg"))
    assert "Bernoulli" in Path(tmp_path / "vae.svg").read_text()


@pytest.mark.parametrize("missing", ["graphviz", "dot"])
def test_drawing_without_graphviz_says_what_to_install(missing, monkeypatch, tmp_path):
    if missing == "graphviz":
        imported = builtins.__import__

        def without(name, *args, **kwargs):
            if name == "graphviz":
                raise ImportError("No module named 'graphviz'")
            return imported(name, *args, **kwargs)

        monkeypatch.setattr(builtins, "__import__", without)
    else:
        monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match=r"Drawing needs Graphviz: `pip install graphviz`, and"):
        vae().render(str(tmp_path / "vae.svg"))
