"""The vocabulary of autoregressive image generators: codes, and the tokens that start an image.

Codes are the entries of an image tokenizer's codebook, or clusters of colours, in raster order. An image is a row of
tokens: one that starts it, for its class or without a class, and then its codes.
"""

from dataclasses import dataclass

from numprune.errors import InputError


@dataclass(frozen=True)
class CodeVocabulary:
    """The tokens of an image generator: codes first, then class tokens, then the token of an image without a class.

    Attributes:
        codes: number of codes; only these are predicted.
        classes: number of class tokens.
    """

    codes: int
    classes: int

    @property
    def start(self) -> int:
        """The token that starts an image without a class."""
        return self.codes + self.classes

    def start_of(self, label: int) -> int:
        """Return the token that starts an image of a class. Raises InputError."""
        if not 0 <= label < self.classes:
            known = f"0 to {self.classes - 1}" if self.classes else "none: it generates images without a class"
            raise InputError(f"class {label} is not one of the model's classes ({known})")
        return self.codes + label
