"""A source: the images of one split, with labels and names.

Both kinds have ``classes``, ``labels`` (int64, N), ``image_size``, ``in_memory``, ``fingerprint``, a length, and the
methods ``name``, ``subset`` and ``describe``. Loaders gather whole batches from an ``ArraySource``, and have workers
read the files of a ``FileSource``.
"""

from typing import TypeAlias

from moa_train.data.arrays import ArraySource
from moa_train.data.files import FileSource

Source: TypeAlias = ArraySource | FileSource
