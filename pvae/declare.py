"""Declare a latent-variable model: a graph of sites, read as the generative story, then the guide.

    LatentModel(
        z=Latent(Normal, 50),
        x=Observed(Bernoulli, 784, given="z", net=MLP(200, 200)),
        guide={"z": Latent(Normal, 50, given="x", net=MLP(200, 200))},
    )

    sites  --check-->  one SiteModule each  -->  model(batch), guide(batch): ordinary Pyro programs

The declaration is data: it prints as a table, draws as a plate diagram, and is saved as JSON.
Parameters live in the module, never in Pyro's global param store.
"""

import copy
import json
import math
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints

from pvae import declaration
from pvae.fence import module_device
from pvae.flows import is_real
from pvae.graph import (
    AnySite,
    check_kinds,
    check_order,
    check_support,
    hint,
    parents_of,
    warn_of_bits,
)
from pvae.missing import Seen, check_site, filled, refuse, sample_summed
from pvae.nets import MLP, Input, Net
from pvae.pair import Batch, Columns, Pair, announce
from pvae.plates import refuse_supports
from pvae.site_module import SiteModule
from pvae.sites import Given, Latent, Learned, Observed, Predicted, Site, as_shape

__all__ = ["Given", "Latent", "LatentModel", "Learned", "Observed", "Predicted"]


class LatentModel(Pair):
    """A declared model p(x, z) and its guide q(z | x), as one `nn.Module`.

    Args:
        guide: the variational posterior: for each continuous latent a `Latent`, whose parents are
            data, or latents guided before it. A discrete latent without an entry is summed out
            exactly. Left out altogether, each continuous latent gets an amortised diagonal Normal
            (its own distribution where its support is not the real line), from a net like the
            decoder's. "per-datum" gives each the same without a net: every datum has variational
            parameters of its own, found by gradient steps in training (`SemiAmortised`) as in
            evaluation (`Refine`).
        name: what tables and files call the model.
        **sites: `Latent`, `Observed` and `Given` sites, parents before children.

    Raises:
        TypeError: for a site that is none of these.
        ValueError: for an unknown parent, a cycle, shapes that cannot fit, a guide entry for an
            unknown or observed site, a latent neither guided nor summable, or a site of which
            entries may be missing that cannot be integrated out.
    """

    def __init__(
        self,
        guide: Mapping[str, Latent] | Literal["per-datum"] | None = None,
        name: str = "model",
        **sites: AnySite,
    ):
        super().__init__()
        self.name = name
        self.sites = dict(sites)
        check_kinds(sites)
        check_order("site", {key: parents_of(site) for key, site in sites.items()}, known=())
        inputs: dict[str, Input] = {}
        self.model_modules = nn.ModuleDict()
        for key, site in sites.items():
            if isinstance(site, Given):
                inputs[key] = Input(
                    as_shape(site.shape, key) if site.shape else (), site.categories
                )
                continue
            module = SiteModule(key, site, [inputs[parent] for parent in site.given])
            self.model_modules[key] = module
            inputs[key] = Input(module.event_shape, module.categories)
        self.inputs = inputs
        self._check_missing()
        self.per_datum = guide == "per-datum"
        self.guide_was_given = isinstance(guide, Mapping)
        self.guide_sites = dict(guide if isinstance(guide, Mapping) else self._made_guide(guide))
        self.guide_modules = nn.ModuleDict()
        self._build_guide()
        self.categories = self._count_categories()

    def with_missing(self, *names: str) -> "LatentModel":
        """The same model, parameters and all, for data of which entries may be missing (NaN).

        Args:
            names: of observed sites, which are then as if declared with `missing=True`; all of them
                where left out.

        Raises:
            ValueError: for a site that is not observed, or cannot be integrated out.
        """
        other = copy.copy(self)
        other.sites = dict(self.sites)
        for name in names or self.observed:
            site = self.sites.get(name)
            if not isinstance(site, Observed):
                known = ", ".join(self.observed)
                raise ValueError(f"{self.name!r} observes {known}, not {name!r}.")
            other.sites[name] = site.with_missing()
        other._check_missing()
        other.categories = other._count_categories()
        return other

    def _count_categories(self) -> int:
        supports = [self.module_of(name).prototype.enumerate_support() for name in self.summed]
        return math.prod(len(support) for support in supports)

    def _state_of_model(self) -> Mapping[str, Tensor]:
        modules = [self.module_of(name) for name in self.model_modules]
        shares_guide = any(module.pseudo_inputs is not None for module in modules)
        return self.state_dict() if shares_guide else self.model_modules.state_dict()

    @property
    def observed(self) -> list[str]:
        """Names of the observed sites."""
        return [name for name, site in self.sites.items() if isinstance(site, Observed)]

    @property
    def latents(self) -> list[str]:
        """Names of the latent sites."""
        return [name for name, site in self.sites.items() if isinstance(site, Latent)]

    @property
    def given(self) -> list[str]:
        """Names of the sites that are conditioned on."""
        return [name for name, site in self.sites.items() if isinstance(site, Given)]

    @property
    def summed(self) -> list[str]:
        """Names of the latents that are summed out, having no guide entry.

        And of what is summed out where it is missing: an observed site that others are given.
        """
        parents = {parent for site in self.sites.values() for parent in parents_of(site)}
        return [
            name
            for name, site in self.sites.items()
            if (isinstance(site, Latent) and name not in self.guide_sites)
            or (isinstance(site, Observed) and site.missing and name in parents)
        ]

    def module_of(self, name: str) -> SiteModule:
        """The module that holds a model site's nets and free parameters."""
        module = self.model_modules[name]
        assert isinstance(module, SiteModule)
        return module

    def guide_module_of(self, name: str) -> SiteModule:
        """The module that holds a guide entry's nets and free parameters."""
        module = self.guide_modules[name]
        assert isinstance(module, SiteModule)
        return module

    def _check_missing(self) -> None:
        for name in self.observed:
            site, module = self.sites[name], self.module_of(name)
            if not (isinstance(site, Observed) and site.missing):
                continue
            children = [child for child, other in self.sites.items() if name in parents_of(other)]
            check_site(name, site.title, module.prototype, [] if module.summable else children)

    # ---------------------------------------------------------------- the guide

    def _made_guide(self, guide: str | None) -> dict[str, Latent]:
        if guide not in (None, "per-datum"):
            raise ValueError(f"`guide` must be entries by latent, or 'per-datum', got {guide!r}.")
        data = tuple(self.observed + self.given)
        made = {}
        for name in self.latents:
            module = self.module_of(name)
            support = module.prototype.support
            if support.is_discrete:
                continue
            family = dist.Normal if is_real(support) else module.site.distribution
            if self.per_datum:
                made[name] = Latent(family, module.site.shape)
            else:
                made[name] = Latent(family, module.site.shape, given=data, net=self._encoder(name))
        return made

    def _encoder(self, name: str) -> Net:
        """A net like that of the first site that has `name` among its parents."""
        for site in self.sites.values():
            if isinstance(site, Site) and name in site.given and isinstance(site.net, Net):
                return site.net.mirrored()
        return MLP(200, 200)

    def _build_guide(self) -> None:
        for name, entry in self.guide_sites.items():
            if name not in self.sites:
                raise ValueError(
                    f"The guide has an entry for {name!r}, which is no site of the model "
                    f"({', '.join(self.sites)}).{hint(name, self.sites)}"
                )
            if not isinstance(self.sites[name], Latent):
                raise ValueError(
                    f"The guide has an entry for {name!r}, which is not latent but "
                    f"{type(self.sites[name]).__name__}: remove the entry."
                )
            if not isinstance(entry, Latent):
                raise TypeError(f"Guide entry {name!r} must be a Latent, got {entry!r}.")
        parents = {name: self._guide_parents(name) for name in self.guide_sites}
        check_order("guide entry", parents, known=self.observed + self.given)
        for name, entry in self.guide_sites.items():
            module = self._guide_module(name, entry)
            if module.event_shape != self.inputs[name].shape:
                raise ValueError(
                    f"Guide entry {name!r} draws values of shape {module.event_shape}, but the "
                    f"model's site has shape {self.inputs[name].shape}: make them the same."
                )
            supports = module.prototype.support, self.module_of(name).prototype.support
            if supports[0].is_discrete != supports[1].is_discrete:
                refuse_supports(name, *supports)
            if entry.times_prior:
                module.multiply(self.module_of(name))
            self.guide_modules[name] = module
        for name in self.summed:
            if not self.module_of(name).summable:
                raise ValueError(
                    f"Latent {name!r} ({self.module_of(name).site.title}, event shape "
                    f"{self.inputs[name].shape}) is neither guided nor summable (one discrete "
                    "variable of finite support): give it an entry in `guide`."
                )
        for name in self.latents:
            self._connect_pseudo_inputs(name)

    def _guide_parents(self, name: str) -> tuple[str, ...]:
        """What an entry's nets read, and the prior's too where the two are multiplied."""
        entry = self.guide_sites[name]
        above = parents_of(self.sites[name]) if entry.times_prior else ()
        for parent in above:
            if parent in self.latents and parent not in self.guide_sites:
                raise ValueError(
                    f"Guide entry {name!r} multiplies the prior, which is given {parent!r}: that "
                    "is summed out, and has no value in the guide. Give it an entry before."
                )
        return (*entry.given, *above)

    def _connect_pseudo_inputs(self, name: str) -> None:
        site, pseudo = self.module_of(name).site, self.module_of(name).pseudo_inputs
        if pseudo is None:
            return
        entry = self.guide_sites.get(name)
        alike = entry and (entry.distribution, entry.shape) == (site.distribution, site.shape)
        if not alike or site.parameters or self.module_of(name).flow:
            raise ValueError(
                f"PseudoInputs make p({name} | k) the guide's distribution as it is: write both as "
                f"{site.title} of shape {site.shape}, in the model with neither parameters nor "
                f"flow; got the guide entry {entry}."
            )
        assert entry is not None
        real = constraints.real
        supports = {
            parent: real if parent in self.given else self.module_of(parent).prototype.support
            for parent in entry.given
        }
        parents = {parent: (self.inputs[parent], supports[parent]) for parent in entry.given}
        pseudo.connect(self.guide_modules[name], parents)

    def _guide_module(self, name: str, entry: Latent) -> SiteModule:
        try:
            return SiteModule(name, entry, [self.inputs[parent] for parent in entry.given])
        except ValueError as error:
            if self.guide_was_given:
                raise
            raise ValueError(
                f"Latent {name!r} needs an entry in `guide`, as none can be made for it ({error})."
            ) from error

    # ---------------------------------------------------------------- Pyro programs

    def model(self, batch: Batch | None = None, num_data: int = 1) -> dict[str, Tensor]:
        """The generative story, a Pyro program under one plate "data" of dim -1.

        Args:
            batch: data (N, *event), or tensors by name; observed sites left out are sampled.
            num_data: N, where the batch is empty.

        Returns:
            The value of each site.
        """
        announce("model", self.model_modules)
        values = self._by_name(batch)
        num_data = len(next(iter(values.values()))) if values else num_data
        summed = self.summed
        with pyro.plate("data", num_data, dim=-1):
            for name, site in self.sites.items():
                if isinstance(site, Given):
                    continue
                distribution: Any = self.model_modules[name](values)
                if name in summed:
                    values[name] = sample_summed(name, distribution, values.get(name))
                    continue
                if isinstance(site, Observed) and site.missing:
                    distribution = Seen(distribution)
                values[name] = pyro.sample(name, distribution, obs=values.get(name))
        return values

    def guide(self, batch: Batch | None = None) -> dict[str, Tensor]:
        """The variational posterior, a Pyro program under the same plate.

        Args:
            batch: data (N, *event), or tensors by name.

        Returns:
            The value of each guided latent.
        """
        announce("guide", self.guide_modules)
        values = {key: self._read(key, value) for key, value in self._by_name(batch).items()}
        drawn = {}
        with pyro.plate("data", len(next(iter(values.values()))), dim=-1):
            for name, module in self.guide_modules.items():
                drawn[name] = values[name] = pyro.sample(name, module(values))
        return drawn

    def _by_name(self, batch: Batch | None) -> dict[str, Tensor]:
        """The batch as values by site, floating ones in the precision of the model."""
        values = {self.observed[0]: batch} if isinstance(batch, Tensor) else dict(batch or {})
        own = chain(self.parameters(), self.buffers())
        dtype = next((t.dtype for t in own if t.is_floating_point()), torch.get_default_dtype())
        return {k: v.to(dtype) if v.is_floating_point() else v for k, v in values.items()}

    def _read(self, name: str, value: Tensor) -> Tensor:
        """What the guide's nets read: zeros in place of what is missing, of indices no category."""
        site = self.sites.get(name)
        may = isinstance(site, Observed) and site.missing and self.inputs[name].categories is None
        return torch.where(value.isnan(), 0.0, value) if may else value

    def blank(self, num_data: int, given: Batch | None) -> dict[str, Tensor]:
        """Values of the `Given` sites alone, or as many rows of nothing."""
        if given is not None and not isinstance(given, Mapping):
            given = dict.fromkeys(self.given[:1], given)
        device = module_device(self)
        values = {
            name: torch.as_tensor(value, device=device) for name, value in (given or {}).items()
        }
        values = {k: v if v.dim() else v.expand(num_data) for k, v in values.items()}
        if set(values) != set(self.given):
            raise ValueError(
                f"{self.name!r} is conditioned on {', '.join(self.given) or 'nothing'}: pass these "
                f"values by `given=`, got {', '.join(values) or 'nothing'}."
            )
        for name, value in values.items():
            self._check_column(name, value)
            if len(value) != num_data:
                raise ValueError(
                    f"{num_data} draws need as many values of {name!r}, got {len(value)}."
                )
        return values

    def data_of(self, drawn: Mapping[str, Tensor], given: Batch | None = None) -> Batch:
        """What the model has drawn, as data for it, with values that are conditioned on."""
        return super().data_of(drawn, self.blank(len(next(iter(drawn.values()))), given))

    def _to_draw(self, num_data: int, given: Batch | None) -> tuple[Any, ...]:
        return self.blank(num_data, given), num_data

    # ---------------------------------------------------------------- data

    def columns(self, data: Any) -> Columns:
        """Check data against the sites that hold them.

        Raises:
            ValueError: for missing or unknown columns, a wrong shape, or values outside a support.
        """
        names = self.observed + self.given
        if isinstance(data, Mapping):
            if set(data) != set(names):
                raise ValueError(
                    f"{self.name!r} needs data for {', '.join(names)}, got "
                    f"{', '.join(data) or 'nothing'}."
                )
            names.sort(key=lambda name: name in self.summed)  # labels last: the first names all
            data = {name: data[name] for name in names}
        elif len(names) > 1:
            labelled = getattr(data, "labels", None) is not None and len(names) == 2
            hint = " Labels of data are `data.labels`." if labelled else ""
            raise ValueError(
                f"{self.name!r} needs several columns of data: pass a dictionary with "
                f"{', '.join(names)}.{hint}"
            )
        may = {name for name in self.observed if getattr(self.sites[name], "missing", False)}
        columns = Columns(data, {*may, ""} if may else ())
        for key, column in columns.columns.items():
            name = key or names[0]
            if column.spec.missing and name not in may:
                refuse(name, column.values, self.name, name in self.observed)
            self._check_column(name, column.realised().values)
            site = self.sites[name]
            if isinstance(site, Observed) and site.check_support:
                warn_of_bits(column.spec, site, self.module_of(name).prototype.support)
        return columns

    def _check_column(self, name: str, values: Tensor) -> None:
        shape = self.inputs[name].shape
        if tuple(values.shape[1:]) != shape:
            hint = ""
            if values[0].numel() == torch.Size(shape).numel():
                hint = f" Reshape each datum first: `data.reshape(len(data), *{shape})`."
            raise ValueError(
                f"Data for {name!r} of {self.name!r} must have shape (N, "
                f"{', '.join(map(str, shape))}), got {tuple(values.shape)}.{hint}"
            )
        site = self.sites[name]
        may_be_missing = isinstance(site, Observed) and site.missing
        if isinstance(site, Given):
            support: Any = constraints.independent(constraints.real, len(shape))
            if site.categories:
                support = constraints.independent(
                    constraints.integer_interval(0, site.categories - 1), len(shape)
                )
        elif isinstance(site, Observed) and not site.check_support:
            return
        else:
            support = self.module_of(name).prototype.support
        for start in range(0, len(values), 4096):
            some = values[start : start + 4096]
            some = filled(some, support) if may_be_missing else some
            check_support(name, site, support, some, start)

    # ---------------------------------------------------------------- the declaration as data

    def to_json(self) -> dict[str, Any]:
        """The declaration as plain data, without parameters' trained values.

        Raises:
            TypeError: for a net that is a module of the user's own.
        """
        guide: Any = self.guide_sites if self.guide_was_given else None
        return declaration.to_json(self.name, self.sites, "per-datum" if self.per_datum else guide)

    @classmethod
    def from_json(cls, data: Mapping[str, Any] | str) -> "LatentModel":
        """Build a model, freshly initialised, from `to_json`'s output or its text.

        Names are looked up among Pyro's distributions and pvae's nets only; no code is run.

        Raises:
            ValueError: for data that no `to_json` wrote.
        """
        parsed = json.loads(data) if isinstance(data, str) else data
        name, sites, guide = declaration.from_json(parsed)
        return cls(guide=guide, name=name, **sites)

    def __repr__(self) -> str:
        return declaration.text_table(self)

    def _repr_html_(self) -> str:
        return declaration.html_table(self)

    def render(self, filename: str | None = None) -> Any:
        """Draw the model as a plate diagram by `pyro.render_model`.

        Args:
            filename: where to write it (.pdf, .png, .svg); shown in a notebook if left out.

        Raises:
            RuntimeError: if Graphviz is not installed.
        """
        example = {
            name: torch.zeros(2, *self.inputs[name].shape, device=module_device(self))
            for name in self.observed + self.given
        }
        try:
            with pyro.validation_enabled(False):
                graph = pyro.render_model(
                    self.model, model_args=(example,), render_distributions=True
                )
            if filename is not None:  # Graphviz would leave a file without a suffix beside it
                path = Path(filename)
                path.write_bytes(graph.pipe(format=path.suffix[1:] or "pdf"))
        except Exception as error:
            if type(error).__name__ in ("ImportError", "ModuleNotFoundError", "ExecutableNotFound"):
                raise RuntimeError(
                    "Drawing needs Graphviz: `pip install graphviz`, and the system's `dot`."
                ) from error
            raise
        return graph
