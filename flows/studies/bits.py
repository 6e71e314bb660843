"""Compare choosing units and bits under a budget of bytes with pruning and uniform quantization of equal size.

    python -m numprune.flows.studies.bits
    python -m numprune.flows.studies.bits MODEL --text train.txt --heldout heldout.txt

Each rival prunes by a ratio with the allocation `error` and stores all blocks in one scheme. Its size in bytes is the
budget of the rows below it: `units` only removes units, `bits` chooses a scheme for each block of the dense model, and
`units and bits` chooses both (numprune/quantization/allocation.py). All use the same prices. Weights are compensated
and then quantized by GPTQ, as in numprune prune and quantize.
"""

import argparse
import json
import logging
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from numprune import pruning, quality, sensitivity
from numprune.allocation import by_error
from numprune.blocks import Anatomy
from numprune.budgeted import by_budgets
from numprune.byte_budget import MIXED, ByteBudget, SchemeName
from numprune.calibration import Walker
from numprune.choosing import Known, dense_inputs, error_curves, least_units
from numprune.corpus import TokenRows
from numprune.counted import counted
from numprune.curves import Errors
from numprune.documents import Reading
from numprune.errors import InputError
from numprune.export import checkpoint
from numprune.flows.cli.parser import at_least
from numprune.flows.names import EMBEDDED
from numprune.flows.steps import text as texts
from numprune.flows.steps.models import model_folder, model_name
from numprune.flows.steps.prune import byte_budget
from numprune.flows.studies.arguments import each_once, parser_of, run
from numprune.layers import ModelLayers
from numprune.option_checks import check_options
from numprune.options import PruneOptions, sizes_allowed
from numprune.quantization import Scheme, check_quantizable
from numprune.quantization.allocation import Form, Rounding, levels_of, model_bytes, price_of
from numprune.quantization.pricing import rounding_prices
from numprune.quantization.walk import Fit, quantize_layers
from numprune.target import Sizes, Target

logger = logging.getLogger(__name__)

_RIVALS = "w8a8,w8a8@0.2,w8a8@0.3,w4a16,w4a16@0.2,w4a16@0.3"

Row = dict[str, Any]
Forms = Mapping[str, Form]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0 done, 1 error."""
    return run("bits", _body, _parser().parse_args(argv))


def _body(args: argparse.Namespace) -> str:
    rivals = _rivals(args.rivals)
    study = _Study.of(args)
    rows = list(study.rows(rivals))
    conditions = study.conditions()
    found = (
        json.dumps({"conditions": conditions, "rows": rows}, indent=1) if args.json else as_markdown(rows, conditions)
    )
    return found + "\n"


def as_markdown(rows: Sequence[Row], conditions: str) -> str:
    """Return the table."""
    lines = [
        "| budget: bytes of | what | weights | parameters of the blocks | blocks as stored, at 8, at 4 bits | "
        "price, nats/token | increase of NLL, nats/token |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        result = "out of reach | | | | |"
        if not row["problem"]:
            result = (
                f"{row['bytes'] / 1e6:.2f} MB | {row['parameters']:.0%} | "
                f"{', '.join(str(row['blocks'][bits]) for bits in ('16', '8', '4'))} | {row['price']:.4f} | "
                f"{row['nll_delta']:+.4f} [{row['interval95'][0]:+.4f}, {row['interval95'][1]:+.4f}] |"
            )
        lines.append(f"| {row['budget_of']} | {row['what']} | {result}")
    return "\n".join([*lines, "", conditions])


@dataclass(frozen=True)
class _Study:
    """A model, the possible forms of its blocks, and their prices."""

    name: str
    model: PreTrainedModel
    anatomy: Anatomy
    rows_: Tensor
    heldout: TokenRows
    options: PruneOptions
    budget: ByteBudget
    allowed: Sizes
    errors: Errors
    rounding: Rounding
    known: Known

    @classmethod
    def of(cls, args: argparse.Namespace) -> "_Study":
        torch.manual_seed(0)
        folder = model_folder(args.model)
        target = Target(align=args.align, quantization_group=args.group_size)
        budget = byte_budget(folder, 0, MIXED)
        options = PruneOptions(0.0, allocation="error", compensation=args.compensation, target=target)
        model, tokenizer = checkpoint.load(folder)
        layers = ModelLayers(model)
        check_options(layers.anatomy, options)
        levels = [level for level in levels_of(budget, target) if level is not None]
        for level in levels:
            check_quantizable(layers.anatomy, level)
        rows, heldout = _texts(args, tokenizer)
        gradients = sensitivity.measure(layers, rows, options.batch_size)
        walker = Walker(layers, rows.shape[1:], options.batch_size)
        allowed = sizes_allowed(layers.anatomy, options)
        errors = error_curves(layers, dense_inputs(walker, rows, None), options, gradients, least_units(allowed))
        rounding = rounding_prices(walker, rows, gradients.output, levels)
        known = Known(None, gradients)
        return cls(
            model_name(args.model),
            model,
            layers.anatomy,
            rows,
            heldout,
            options,
            budget,
            allowed,
            errors,
            rounding,
            known,
        )

    def rows(self, rivals: Sequence[tuple[SchemeName, float]]) -> Iterator[Row]:
        """Measure every rival, and the alternatives with the same number of bytes."""
        for scheme, ratio in rivals:
            name = f"{scheme} of the dense model" if ratio == 0 else f"{ratio:.0%} pruned, then {scheme}"
            sizes = by_error(self.anatomy, ratio, self.allowed, self.errors)
            level = self._level(scheme)
            forms = {block: Form(size, level if size.units else None) for block, size in sizes.items()}
            limit = model_bytes(self.anatomy, forms, self.budget)
            yield self._measured(name, name, forms)
            whole = {block.name: [block.size] for block in self.anatomy.blocks}
            for what, levels, allowed in (
                ("units", (None,), self.allowed),
                ("bits", self.budget.levels, whole),
                ("units and bits", self.budget.levels, self.allowed),
            ):
                budget = replace(self.budget, limit=limit, levels=levels)
                target = self.options.target
                try:
                    chosen = by_budgets(self.anatomy, [budget], target, allowed, self.errors, self.rounding)
                except InputError as error:
                    yield {"budget_of": name, "what": what, "problem": str(error)}
                    continue
                yield self._measured(name, what, chosen.forms)

    def conditions(self) -> str:
        """Return what all rows have in common, and the dense model's figures."""
        whole = model_bytes(
            self.anatomy, {block.name: Form(block.size, None) for block in self.anatomy.blocks}, self.budget
        )
        dense = quality.evaluate(self.model, self.heldout)
        assert dense is not None
        count, length = self.rows_.shape
        target, documents = self.options.target, counted(self.heldout.documents, "document")
        return (
            f"{self.name}, dense: {whole / 1e6:.2f} MB, NLL {dense.mean_nll:.4f} on {dense.count:,} tokens of "
            f"{documents} held out. {self.options.compensation}, then gptq, on {count} rows of {length} tokens; "
            f"intermediate sizes in steps of {target.align}, w4a16 in groups of {target.quantization_group}. In "
            "brackets: 95 % intervals, paired."
        )

    def _level(self, scheme: SchemeName) -> Scheme:
        (level,) = levels_of(replace(self.budget, levels=(scheme,)), self.options.target)
        assert level is not None
        return level

    def _measured(self, budget_of: str, what: str, forms: Forms) -> Row:
        started = time.perf_counter()
        known = replace(self.known, forms=forms)
        result = pruning.prune(self.model, self.rows_, self.options, known).model
        schemes = {name: form.level for name, form in forms.items() if form.level is not None}
        if schemes:
            fit = Fit(self.rows_, ModelLayers(self.model))
            quantize_layers(ModelLayers(result), schemes, lambda _quantized, _rest: None, fit, torch.bfloat16)
        found = quality.compare(result, self.model, self.heldout).loss_delta
        bits = Counter(form.level.bits if form.level else 16 for form in forms.values() if form.size.units)
        kept = sum(block.parameters(forms[block.name].size) for block in self.anatomy.blocks)
        logger.info("bits: %s, %s: %.0f s", budget_of, what, time.perf_counter() - started)
        return {
            "budget_of": budget_of,
            "what": what,
            "problem": None,
            "bytes": model_bytes(self.anatomy, forms, self.budget),
            "parameters": kept / sum(block.parameters(block.size) for block in self.anatomy.blocks),
            "blocks": {str(level): bits[level] for level in (16, 8, 4)},
            "price": price_of(self.anatomy, forms, self.errors, self.rounding),
            "nll_delta": found.value,
            "interval95": found.interval95,
            "forms": {
                name: {"units": form.size.units, "members": form.size.members, "level": str(form.level or "stored")}
                for name, form in forms.items()
            },
        }


def _texts(args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> tuple[Tensor, TokenRows]:
    rows, _ = texts.calibration_rows(args.text or EMBEDDED, tokenizer, args.samples, args.sequence_length, 0, Reading())
    tokens = args.windows * args.sequence_length
    heldout = texts.text_rows(args.heldout or EMBEDDED, "heldout", tokenizer, args.sequence_length, Reading(), tokens)
    return rows, heldout.part(slice(args.windows))


def _rivals(text: str) -> list[tuple[SchemeName, float]]:
    """Return scheme and ratio of each rival, written w4a16 or w4a16@0.2. Raises InputError."""
    found: list[tuple[SchemeName, float]] = []
    for part in text.split(","):
        scheme, _, ratio = part.strip().partition("@")
        try:
            share = float(ratio or 0)
        except ValueError:
            share = 1.0
        if scheme == "w8a8" and 0 <= share < 1:
            found.append(("w8a8", share))
        elif scheme == "w4a16" and 0 <= share < 1:
            found.append(("w4a16", share))
        else:
            raise InputError(
                f"--rivals: {part[:80]!r} must be w8a8 or w4a16, optionally followed by @ and a ratio of at "
                "least 0 and below 1"
            )
    each_once("--rivals", [f"{scheme}@{share:g}" for scheme, share in found])
    return found


def _parser() -> argparse.ArgumentParser:
    parser = parser_of("bits", (__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "model", metavar="MODEL", nargs="?", default=EMBEDDED, help="a checkpoint (default: the embedded)"
    )
    for option, what in (("--text", "calibrate"), ("--heldout", "measure")):
        parser.add_argument(option, type=Path, nargs="+", metavar="FILE", help=f"to {what} on (default: the embedded)")
    parser.add_argument("--rivals", default=_RIVALS, help="whose bytes are the budgets (default: %(default)s)")
    parser.add_argument("--samples", type=at_least(1), default=64, help="rows to calibrate on (default %(default)s)")
    parser.add_argument(
        "--sequence-length", type=at_least(1), default=256, help="tokens of a row (default %(default)s)"
    )
    parser.add_argument("--windows", type=at_least(1), default=160, help="held-out rows at most (default %(default)s)")
    parser.add_argument("--group-size", type=int, default=32, help="of w4a16 (default %(default)s)")
    parser.add_argument("--align", type=int, default=32, help="of intermediate sizes (default %(default)s)")
    parser.add_argument("--compensation", default="residual", help="of pruning (default %(default)s)")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    return parser


if __name__ == "__main__":
    sys.exit(main())
