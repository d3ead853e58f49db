"""Data whose specification travels with it: sets of images, tables, toys, and one's own.

    load_data("digits")  ->  Splits(train, valid, test), each a Data: values (N, *event), spec

`spec.py` says what a data set is, `dataset.py` holds one split and its noise, and `load.py` puts
all together. Known sets of images (`DATASETS`) are read by `sources.py`, `colours.py` and
`local.py` from files that `archives.py` finds and downloads; tables (`TABLES`) are in `tables.py`,
and toys of known density (`TOYS`) in `toys.py`. One's own data enter through `rows.py` and
`files.py`. `standardise.py` rescales.
"""

from pvae.data.dataset import Data
from pvae.data.load import Splits, load_data
from pvae.data.record import DatasetInfo, TableInfo
from pvae.data.sources import DATASETS
from pvae.data.spec import DataSpec
from pvae.data.tables import TABLES
from pvae.data.toys import TOYS, Toy

__all__ = [
    "DATASETS",
    "TABLES",
    "TOYS",
    "Data",
    "DataSpec",
    "DatasetInfo",
    "Splits",
    "TableInfo",
    "Toy",
    "load_data",
]
