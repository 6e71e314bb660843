"""Part of the section on quality: images whose class changed."""

from collections.abc import Iterator

from numprune.counted import counted
from numprune.serving.report.models import ChangedImage, Quality
from numprune.serving.report.page.blocks import Block, Heading, Picture, Pictures, Text


def blocks(found: Quality) -> Iterator[Block]:
    if not found.changed:
        return
    yield Heading("Images whose class changed")
    first = "those that became wrong first; " if found.changed[0].label is not None else ""
    yield Text(f"{counted(len(found.changed), 'image')}, {first}the classes are the baseline's and the candidate's.")
    yield Pictures([Picture(image.png, _lines(image)) for image in found.changed])


def _lines(image: ChangedImage) -> list[str]:
    label = [] if image.label is None else [f"label {image.label}"]
    return [f"{image.baseline} \N{RIGHTWARDS ARROW} {image.candidate}", *label, image.name]
