"""A source: the images of one split, with labels and names.

Both kinds have ``classes``, ``labels`` (int64, N), ``files``, ``place``, ``image_size``, ``in_memory``,
``fingerprint``, a length, and the methods ``name``, ``subset`` and ``describe``. Loaders gather full batches from an
``ArraySource``; for a ``FileSource``, worker processes read the files.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import TypeAlias

import numpy as np

from moa_train.data.array_source import ArraySource
from moa_train.data.file_source import FileSource
from moa_train.data.tree import compare_classes

Source: TypeAlias = ArraySource | FileSource

_log = logging.getLogger(__name__)


def align(source: Source, classes: Sequence[str]) -> Source:
    """Return the source with the labels of a model that has these classes. The source may lack some of them.

    Raises:
        UserError: the source has classes that the model does not have.
    """
    if source.classes == list(classes):
        return source
    if set(source.classes) - set(classes):
        compare_classes("the model", classes, source.place, source.classes)
    if missing := [name for name in classes if name not in set(source.classes)]:
        _log.warning(
            "%s has no images of %d of the %d classes: %s%s. It is evaluated on the others.",
            *(source.title, len(missing), len(classes), ", ".join(missing[:5]), " ..." if len(missing) > 5 else ""),
        )
    places = {name: place for place, name in enumerate(classes)}
    table = np.array([places[name] for name in source.classes])
    if isinstance(source, FileSource):
        tree = replace(source.tree, classes=list(classes), labels=table[source.tree.labels])
        return FileSource(source.title, tree, source.image_size, source.rows, source.decoding)
    return source.relabeled(table, classes)
