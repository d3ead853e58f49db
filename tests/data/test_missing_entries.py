"""Entries of the data that were not seen: NaN, by a mask or from a table with blanks."""

import math

import pytest
import torch
from torch.testing import assert_close

from pvae.data import Data, load_data
from tests.exact.parameters import generator, normal

NAN = math.nan


def test_a_mask_tells_what_was_seen():
    values = normal(5, 3, seed=0)
    data = Data.of(values)
    seen = torch.tensor([True, False, True])
    masked = data.masked(seen)
    assert torch.equal(masked.values.isnan(), (~seen).expand(5, 3))
    assert masked.spec.missing
    assert torch.equal(Data.of(values, mask=seen).values.isnan(), masked.values.isnan())
    assert "some missing" in masked.spec.space()
    assert not data.spec.missing
    assert data.masked(torch.ones(5, 3, dtype=torch.bool).numpy()).spec == data.spec
    with pytest.raises(ValueError, match=r"`mask` must have shape \(5, 3\) .* got \(5,\)"):
        data.masked(torch.ones(5, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"`mask` must be of bool"):
        data.masked(torch.ones(5, 3))


def test_a_fingerprint_is_of_what_is_missing_and_not_of_its_bits():
    x = normal(9, 3, seed=1).log()
    one, other = (Data.of(v, missing=True) for v in (x, torch.where(x.isnan(), -x, x)))
    assert one.fingerprint() == other.fingerprint()
    assert one.fingerprint() != Data.of(x.nan_to_num(0.0)).fingerprint()


def test_noise_drawn_anew_leaves_missing_what_is_missing():
    train = load_data("digits", binarisation="dynamic").train
    seen = torch.rand(train.values.shape, generator=generator(0)) < 0.5
    masked = train.masked(seen)
    for values in (masked.batch(torch.arange(len(train))), masked.realised().values):
        assert torch.equal(values.isnan(), ~seen)
        assert set(values[seen].unique().tolist()) == {0.0, 1.0}


def test_a_table_with_blanks_is_standardised_by_what_was_seen(tmp_path):
    rows = [f"{i},{'' if i % 3 else 2 * i}" for i in range(30)]
    path = tmp_path / "table.csv"
    path.write_text("\n".join(["a,b", *rows]))
    with pytest.raises(ValueError, match="column 'b'"):
        load_data(path)
    train, valid, _ = load_data(path, missing=True, standardisation="columns")
    seen = train.values[:, 1][~train.values[:, 1].isnan()]
    assert_close(seen.mean().item(), 0.0, rtol=0, atol=1e-6)
    assert_close(seen.std(correction=0).item(), 1.0, rtol=0, atol=1e-6)
    back = torch.cat([part.spec.unstandardise(part.values) for part in (train, valid)])
    for a, b in back.tolist():
        assert math.isnan(b) if round(a) % 3 else b == pytest.approx(2 * a, abs=1e-4)
    nothing = torch.tensor([[1.0, NAN]] * 5)
    with pytest.raises(ValueError, match=r"Dimension 1 of 'tensor' .* missing in every datum"):
        load_data(nothing, missing=True, standardisation="columns")
