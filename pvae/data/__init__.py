"""Data whose specification travels with it: embedded digits, image sets on disk, plain arrays.

    load_data("digits")  ->  Splits(train, valid, test), each a Data: values (N, *event), a DataSpec

`spec.py` says what a data set is, `dataset.py` holds one split and its noise, `archives.py` finds
and downloads files, `sources.py` reads the known sets (`DATASETS`), `load.py` puts all together.
"""

from pvae.data.dataset import Data
from pvae.data.load import Splits, load_data
from pvae.data.sources import DATASETS
from pvae.data.spec import DataSpec

__all__ = ["DATASETS", "Data", "DataSpec", "Splits", "load_data"]
