"""The images that pruning moved into another class, for the report."""

import base64
import io
from typing import Any

import numpy as np

from numprune.corpus import TokenRows
from numprune.serving.report import MAXIMUM_CHANGED
from numprune.tasks import Comparison
from numprune.tasks.image_classification import ImageClassification

_PIXELS = 64  # of the longer side of a picture; larger images are scaled down


def changed_images(found: Comparison, rows: TokenRows, task: ImageClassification) -> list[dict[str, Any]]:
    """Return the part `changed` of the section `quality`: first the images that became wrong, the rest in order."""
    assert found.classes is not None  # of every comparison of classifiers
    ours, theirs = found.classes
    labels = np.array(rows.labels) if rows.labels is not None else None
    changed = np.flatnonzero(ours != theirs)
    if labels is not None:
        changed = changed[np.argsort(theirs[changed] != labels[changed], kind="stable")]
    known = {index: name for name, index in task.classes.items()}
    names = {index: known.get(index, str(index)) for index in {*ours.tolist(), *theirs.tolist(), *(rows.labels or ())}}
    return [
        {
            "name": rows.names[row],
            "label": None if labels is None else names[int(labels[row])],
            "baseline": names[int(theirs[row])],
            "candidate": names[int(ours[row])],
            "png": _png(task, rows, row),
        }
        for row in changed[:MAXIMUM_CHANGED].tolist()
    ]


def _png(task: ImageClassification, rows: TokenRows, row: int) -> str:
    picture = task.processor.picture(rows.rows[row])
    picture.thumbnail((_PIXELS, _PIXELS))
    content = io.BytesIO()
    picture.save(content, "PNG", optimize=True)
    return base64.b64encode(content.getvalue()).decode()
