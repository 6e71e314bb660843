"""numprune registry: manages versions of released models."""

import argparse
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numprune.flows.amounts import size
from numprune.flows.cli.parser import MODEL_REFERENCE, Answer, Parser, Subcommands, add_registry, command, group

if TYPE_CHECKING:
    from numprune.serving.registry import Registry, Version

logger = logging.getLogger(__name__)


def add(commands: Subcommands) -> None:
    verbs = group(
        commands,
        "registry",
        "publish, list, show, promote, roll back, verify and fetch versions of a model",
        "numprune registry promote my-model@candidate",
    )

    def add_one(
        verb: str, run: Callable[[argparse.Namespace], Answer], text: str, example: str, **arguments: str
    ) -> Parser:
        parser = command(verbs, verb, run, text, f"numprune registry {example}")
        for argument, help_text in arguments.items():
            parser.add_argument(argument, metavar=argument.upper(), help=help_text)
        add_registry(parser)
        return parser

    add_one(
        "publish",
        publish,
        "publish a release that passed its gates, as the candidate",
        "publish numprune-workspace/releases/my-model-0123456789abcdef my-model",
        release="a release folder, as written by optimize",
        name="the model's name in the registry",
    )
    listing = add_one("list", list_all, "list models, or one model's versions", "list my-model")
    listing.add_argument("name", metavar="NAME", nargs="?", help="a model (default: all models)")
    add_one(
        "show", show, "show a version, its verdict and its files", "show my-model@candidate", reference=MODEL_REFERENCE
    )
    add_one(
        "promote",
        promote,
        "verify a version, then make it the production version",
        "promote my-model@candidate",
        reference="NAME@ALIAS or NAME/VERSION",
    )
    add_one(
        "rollback",
        rollback,
        "make the previous version production again, in the registry only; `numprune rollback` also switches the "
        "server",
        "rollback my-model",
        name="the model's name in the registry",
    )
    add_one("verify", verify, "compare every file with the published one", "verify my-model", reference=MODEL_REFERENCE)
    add_one(
        "fetch",
        fetch,
        "copy a version, verified and audited, to a new folder",
        "fetch my-model@production ./release",
        reference=MODEL_REFERENCE,
        out="the folder to write; must not exist, unless it holds the release of --digest",
    ).add_argument(
        "--digest", metavar="SHA256", help="expected digest of the release, which OUT may already hold (default: any)"
    )


def publish(args: argparse.Namespace) -> Answer:
    from numprune.flows import children
    from numprune.flows.steps.publish import audit
    from numprune.serving import registry

    release = Path(args.release)
    children.call(audit, release)
    version = registry.publish(_open(args), release, args.name)
    return _version_answer(version, f"published {version.reference} as {registry.CANDIDATE}")


def list_all(args: argparse.Namespace) -> Answer:
    from numprune.serving import registry

    opened = _open(args)
    if args.name:
        versions = registry.list_versions(opened, args.name)
        data = {"name": args.name, "versions": [_version(version) for version in versions]}
        return Answer(data, "\n".join(map(_line, versions)) or f"{args.name}: no versions")
    models = registry.list_models(opened)
    lines = [
        f"{model.name}  {', '.join(f'{alias} -> {number}' for alias, number in sorted(model.aliases.items()))}".rstrip()
        for model in models
    ]
    data = {"models": [{"name": model.name, "aliases": dict(model.aliases)} for model in models]}
    return Answer(data, "\n".join(lines) or f"{opened.uri}: no models")


def show(args: argparse.Namespace) -> Answer:
    from numprune.flows import summary
    from numprune.serving import registry

    shown = registry.show(_open(args), args.reference)
    data = {**_version(shown.version), "files": dict(shown.files), "report": shown.report.to_json()}
    lines = [_line(shown.version), f"  digest    {shown.version.digest}", *summary.of_report(shown.report)]
    if shown.report.verdict is not None:
        lines += summary.gate_lines(data["report"]["verdict"]["gates"])
    lines += [f"  {size(count):>10}  {name}" for name, count in sorted(shown.files.items())]
    return Answer(data, "\n".join(lines))


def promote(args: argparse.Namespace) -> Answer:
    from numprune.serving import registry

    reference = args.reference
    if "@" not in reference and "/" not in reference:  # accepted for compatibility
        reference = f"{reference}@{registry.CANDIDATE}"
        logger.warning(
            "promoting %s; write it out, because NAME alone means the production version elsewhere", reference
        )
    version = registry.promote(_open(args), reference)
    return _version_answer(version, f"{version.reference} is in production")


def rollback(args: argparse.Namespace) -> Answer:
    from numprune.flows.stages import workspace_folder
    from numprune.serving import registry, rollout

    version = registry.rollback(_open(args), args.name)
    serving = rollout.serving(version.name, workspace_folder(args.workspace))
    text = f"{version.reference} is in production again"
    if serving not in (None, version.reference):
        text += f"; {serving} still serves: `numprune rollout {args.name}` changes that"
    return _version_answer(version, text, serving=serving)


def verify(args: argparse.Namespace) -> Answer:
    from numprune.serving import registry

    version = registry.verify(_open(args), args.reference)
    return _version_answer(version, f"{version.reference}: every file matches what was published")


def fetch(args: argparse.Namespace) -> Answer:
    from numprune.flows import children
    from numprune.flows.steps.publish import audit
    from numprune.serving import registry

    version = registry.fetch(_open(args), args.reference, Path(args.out), digest=args.digest)
    children.call(audit, Path(args.out))  # in a pod this runs before vLLM
    return _version_answer(version, f"{args.out}: {version.reference}, verified", out=args.out)


def _open(args: argparse.Namespace) -> "Registry":
    from numprune.flows.stages import workspace_folder
    from numprune.serving.registry import open_registry

    return open_registry(args.uri, workspace_folder(args.workspace))


def _version_answer(version: "Version", text: str, **more: Any) -> Answer:
    return Answer({**_version(version), **more}, text)


def _version(version: "Version") -> dict[str, Any]:
    return {
        "name": version.name,
        "version": version.version,
        "reference": version.reference,
        "created": version.created.isoformat(),
        "digest": version.digest,
        "verdict": version.verdict,
        "aliases": list(version.aliases),
        "tags": dict(version.tags),
    }


def _line(version: "Version") -> str:
    aliases = f"  {', '.join(version.aliases)}" if version.aliases else ""
    return (
        f"{version.reference}  {version.created:%Y-%m-%d %H:%M} UTC  {version.verdict}  {version.digest[:12]}{aliases}"
    )
