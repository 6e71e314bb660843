"""Part of the quality section: an image generator's samples beside the dense model's, and its loss by class."""

from collections.abc import Iterator, Sequence

from markupsafe import Markup

from numprune.counted import counted
from numprune.serving.report import image_metrics, words
from numprune.serving.report.models import ClassLoss, Images
from numprune.serving.report.page.blocks import Block, Cell, Chart, Facts, Folded, Heading, Table, Text

_MAXIMUM = 100  # classes


def blocks(found: Images) -> Iterator[Block]:
    yield Heading("Samples")
    guided = f", with guidance {words.number(found.guidance, 2)}" if found.guidance != 1 else ""
    yield Text(
        f"{counted(found.samples, 'image')} from each model{guided}, drawn for the same classes and with the same "
        "noise: where the distributions agree, so do the images."
    )
    if found.sheet is not None:
        picture = Markup('<img alt="Samples of both models" src="data:image/png;base64,{}">').format(found.sheet)
        yield Chart(picture, "Above: baseline. Below: candidate.")
    else:
        yield Text(
            "The model folder has no colours for its codes, and evaluate.decoder names no file, so there is no contact "
            "sheet.",
            "absent",
        )
    yield Facts(
        [
            ("KL of guided distributions, nats/code", words.number(found.guided_kl_nats_per_code, 3)),
            ("Divergence of code frequencies, nats", words.number(found.code_divergence_nats, 3)),
            ("The same between two sets of the baseline", words.number(found.code_divergence_of_dense_nats, 3)),
        ]
    )
    if found.network is not None:
        yield Text(image_metrics.measured_by(found.network))
        header = ("", "Baseline", "Candidate", "Difference")
        rows = [[Cell(text, note) for text, note in row] for row in image_metrics.rows(found)]
        yield Table("Samples compared with real images", header, rows)


def classes(found: Sequence[ClassLoss]) -> Iterator[Block]:
    """The loss by class; the classes that lost most first."""
    if not found:
        return
    ranked = sorted(found, key=lambda one: one.baseline - one.candidate)
    rows: list[list[Cell | str]] = [
        [
            str(one.label),
            f"{one.images:,}",
            words.number(one.baseline),
            words.number(one.candidate),
            words.signed(one.candidate - one.baseline),
        ]
        for one in ranked[:_MAXIMUM]
    ]
    header = ("Class", "Images", "Baseline", "Candidate", "Difference")
    yield Folded("Loss by class", [Table("NLL by class, nats/code", header, rows)])
