"""Autoregressive image generators: the NLL of each code given the preceding ones and the image's class."""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from numprune.codes import CodeVocabulary
from numprune.corpus import Pack, TokenRows
from numprune.counted import counted
from numprune.documents import Document
from numprune.errors import InputError
from numprune.tasks.causal import Causal
from numprune.units import OF_CODES

logger = logging.getLogger(__name__)

# One calibration row in ten has no class: the share with which models for classifier-free guidance are trained (Ho and
# Salimans, "Classifier-Free Diffusion Guidance", 2022; LlamaGen's class_dropout_prob).
_WITHOUT_CLASS = 10
# Of the draw of those rows. Not a usual seed: `sample_rows`, with the same one, would then draw those rows first.
_SEED = 0xC0DE5


@dataclass(frozen=True)
class ImageCodes(Causal):
    """A generator of images (numprune.tasks.Task): a causal language model of codes. A document is an image.

    Attributes:
        vocabulary: of the model.
        image: codes of its images, see `codes_per_image`.
        context: positions of the model.
    """

    vocabulary: CodeVocabulary
    image: int
    context: int

    unit = OF_CODES
    prompted = False

    def calibration_rows(
        self, documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, length: int, pack: Pack = "auto"
    ) -> TokenRows:
        """Return a row for each image; one in ten has no class, because guidance uses both kinds of rows."""
        starts = [self._start(document) for document in documents]
        # Drawn: files often have their classes in turn, so every tenth image could be of the same class.
        order = torch.randperm(len(starts), generator=torch.Generator().manual_seed(_SEED)).tolist()
        for index in order[: -(-len(starts) // _WITHOUT_CLASS)]:
            starts[index] = self.vocabulary.start
        return self._rows(documents, starts, length, pack)

    def heldout_rows(
        self, documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, length: int, pack: Pack = "auto"
    ) -> TokenRows:
        """Return a row for each image, with its class."""
        return self._rows(documents, [self._start(document) for document in documents], length, pack)

    def _start(self, document: Document) -> int:
        label = document.label
        if label is None or not self.vocabulary.classes:
            return self.vocabulary.start
        if not isinstance(label, int) or isinstance(label, bool):
            raise InputError(f"{document.name}: label {str(label)[:80]!r} must be the number of a class")
        try:
            return self.vocabulary.start_of(label)
        except InputError as error:
            raise InputError(f"{document.name}: {error}") from None

    def _rows(self, documents: Sequence[Document], starts: Sequence[int], length: int, pack: Pack) -> TokenRows:
        if length < 2:
            raise InputError(f"sequence length is {length}; at least 2 tokens are needed to score one")
        if pack is True:
            raise InputError("pack: images are not joined to longer rows; omit it")
        if not documents:
            raise InputError("no images: give at least one file of codes")
        images = [self._codes(document) for document in documents]
        # Learned and two-dimensional positions are those of a whole image, so a row always begins with one.
        rows = [
            torch.cat([codes.new_tensor([start]), codes])[:length] for start, codes in zip(starts, images, strict=True)
        ]
        # ImageGPT has no position for the last code.
        if length < min(self.context, self.image + 1):
            logger.warning(
                "only the first %d of %d codes of each image are used: the sequence length is %d",
                length - 1,
                self.image,
                length,
            )
        digest = hashlib.sha256(b"images")
        for row in rows:
            digest.update(len(row).to_bytes(8, "little"))
            digest.update(row.numpy().tobytes())
        names = [document.name for document in documents]
        return TokenRows(rows, list(range(len(rows))), names, digest.hexdigest(), labels=self._labels(starts))

    def _labels(self, starts: Sequence[int]) -> list[int] | None:
        """Return the class of each image, or None if some have none."""
        labels = [start - self.vocabulary.codes for start in starts]
        return None if self.vocabulary.start in starts else labels

    def _codes(self, document: Document) -> Tensor:
        """Return an image's codes, (L,) int64. Raises InputError."""
        if not document.codes:
            raise InputError(
                f'{document.name}: is text, but the model generates images; give records with "codes", a list of '
                "integers, or .npy or .safetensors files"
            )
        # Positions are those of an image of this size: others would be scored in the wrong rows and columns.
        if len(document.codes) != self.image:
            raise InputError(
                f"{document.name}: has {counted(len(document.codes), 'code')}, but the model's images have {self.image}"
            )
        known = range(self.vocabulary.codes)
        for code in document.codes:
            if code not in known:
                raise InputError(
                    f"{document.name}: code {str(code)[:20]} is not one of the model's, which are 0 to {known[-1]}"
                )
        return torch.tensor(document.codes)
