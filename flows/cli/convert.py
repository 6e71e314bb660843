"""numprune convert: published files of other layouts as checkpoints."""

import argparse
from pathlib import Path

from numprune.counted import counted
from numprune.flows.cli.parser import Answer, Subcommands, at_least, check_out, command


def add(commands: Subcommands) -> None:
    parser = command(
        commands,
        "convert",
        convert,
        "write a published LlamaGen model as a checkpoint",
        "numprune convert c2i_L_256.pt ./llamagen-l --codes-per-image 256",
    )
    parser.add_argument("source", metavar="FILE", type=Path, help="class-conditional state dict, .pt or .safetensors")
    parser.add_argument("out", metavar="OUT", type=Path, help="the new folder to write")
    parser.add_argument(
        "--codes-per-image",
        type=at_least(1),
        metavar="N",
        required=True,
        help="256 for images of 256 pixels a side, 576 for 384",
    )
    parser.add_argument(
        "--heads",
        type=at_least(1),
        metavar="N",
        help="query heads of a model that is not published: as it was trained, which FILE does not say; another number "
        "gives a model that computes something else (default: as published for its size)",
    )


def convert(args: argparse.Namespace) -> Answer:
    from numprune.anatomy import read_anatomy
    from numprune.budget import budget_of
    from numprune.export import llamagen, manifest

    check_out(args.out)
    manifest.sweep(args.out.parent)
    config = llamagen.convert(args.source, args.out, codes_per_image=args.codes_per_image, heads=args.heads)
    anatomy = read_anatomy(config)
    data = {
        "out": str(args.out),
        "family": anatomy.family,
        "layers": anatomy.layers,
        "heads": config.num_attention_heads,
        "codes": anatomy.predicted,
        "classes": config.num_classes,
        "parameters": budget_of(anatomy).parameters,
    }
    text = (
        f"{args.out}: llamagen, {counted(data['layers'], 'layer')}, {counted(data['heads'], 'head')}, "
        f"{counted(data['codes'], 'code')}, classes: {data['classes']:,}, "
        f"{data['parameters']:,} parameters"
    )
    return Answer(data, text)
