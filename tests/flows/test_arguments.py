"""Options before, between and after arguments, also options with several values."""

import argparse
from collections.abc import Sequence

import pytest

from numprune.errors import InputError
from numprune.flows.cli import COMMANDS
from numprune.flows.cli.arguments import ordered
from numprune.flows.cli.parser import Parser, build, parse


def read(command: str) -> argparse.Namespace:
    return parse(build(COMMANDS), command.split())


PRUNE = [
    "MODEL OUT --ratio 0.3 --text a b",
    "--text a b MODEL OUT --ratio 0.3",
    "--text a --text b MODEL OUT --ratio 0.3",
    "--ratio 0.3 MODEL --text a b OUT",
    "MODEL --text a --ratio=0.3 OUT --text b",
    "--text a b --ratio 0.3 -- MODEL OUT",
]


@pytest.mark.parametrize("words", PRUNE)
def test_the_position_of_options_does_not_matter(words: str) -> None:
    found = read(f"prune {words}")
    assert (found.model, str(found.out), found.ratio, [str(path) for path in found.text]) == (
        *("MODEL", "OUT", 0.3),
        ["a", "b"],
    )


def test_plan_only_needs_no_output_folder() -> None:
    found = read("prune MODEL --ratio 0.3 --plan-only --text a b")
    assert (found.model, found.out, [str(path) for path in found.text]) == ("MODEL", None, ["a", "b"])
    assert str(read("prune MODEL plan.json --ratio 0.3 --plan-only --text a").out) == "plan.json"


def test_an_assignment_does_not_swallow_the_recipe() -> None:
    found = read("optimize --set prune.ratio=0.2 data.samples=8 my.toml --workspace w")
    assert (found.recipe, found.overrides) == ("my.toml", ["prune.ratio=0.2", "data.samples=8"])
    assert read("optimize --set a.b=1 --set c.d=2").recipe is None
    with pytest.raises(InputError, match=r"--set: 'my.toml' must be section.key=value"):
        read("optimize --set my.toml")


def test_a_number_does_not_swallow_the_candidate() -> None:
    found = read("benchmark --baseline b --runtime vllm --concurrency 1 4 candidate")
    assert (found.candidate, found.concurrency) == ("candidate", [1, 4])


def test_one_model_is_required_and_more_are_accepted() -> None:
    found = read("evaluate --text a b")
    assert (found.models, [str(path) for path in found.text]) == (["b"], ["a"])
    assert read("evaluate m n --text a b").models == ["m", "n"]
    assert read("evaluate --text a --baseline d m n").models == ["m", "n"]
    with pytest.raises(InputError, match="--text: it is unclear where its values end; put the arguments first"):
        read("evaluate --text a b c")


def test_options_may_be_abbreviated_if_unambiguous() -> None:
    assert read("prune m o --text t --rat 0.3 --seq 64").sequence_length == 64
    with pytest.raises(InputError, match=r"option --s could be .*--split or"):
        read("prune m o --text t --ratio 0.3 --s 64")


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("inspect a b", "unexpected argument 'b' (see numprune inspect --help)"),
        ("runs list a", "unexpected argument 'a'"),
        ("prune --ratoi 0.3", "unknown option --ratoi; did you mean '--ratio'? (see numprune prune --help)"),
        ("serve m --prot 80", "unknown option --prot; did you mean '--port'?"),
        ("prun m", "unknown command 'prun'; did you mean 'prune'? (see numprune --help)"),
        ("registry promot m", "unknown command 'promot'; did you mean 'promote'? (see numprune registry --help)"),
        ("help prun", "unknown command 'prun'"),
        ("--json inspect m", "--json: options follow the command: numprune COMMAND --json"),
        ("inspect", "the following arguments are required: MODEL"),
        ("prune m o --text --ratio 0.3", "argument --text: expected at least one argument"),
        ("prune m o --text t --ratio", "argument --ratio: expected one argument"),
    ],
)
def test_errors_name_the_word_and_the_remedy(command: str, said: str) -> None:
    with pytest.raises(InputError) as caught:
        read(command)
    assert said in str(caught.value)


def test_negative_numbers_and_a_dash_are_values() -> None:
    parser = Parser(prog="it")
    parser.add_argument("input")
    parser.add_argument("--offset", type=float)
    assert vars(parser.parse_args(["--offset", "-1.5", "-"])) == {"input": "-", "offset": -1.5}


def test_options_for_vllm_are_passed_on_unchanged() -> None:
    found = read("serve --port 80 m -- --max-num-seqs 4 --port 5")
    assert (found.reference, found.port, found.vllm_options) == ("m", 80, ["--max-num-seqs", "4", "--port", "5"])
    assert read("rollback m").vllm_options is None
    assert read("rollout m --").vllm_options == []


def test_earlier_option_names_still_work(capsys: pytest.CaptureFixture[str]) -> None:
    words = "kubernetes m --format kserve --image i:1 --out f --registry-uri"
    assert read(f"{words} https://mlflow.example").uri == read(f"{words}=https://mlflow.example").uri
    with pytest.raises(SystemExit):
        read("kubernetes --help")
    assert "--registry-uri" not in capsys.readouterr().out


def test_the_order_of_values_is_kept() -> None:
    parser = Parser()
    parser.add_argument("--text", nargs="+", action="extend")
    parser.add_argument("first")
    parser.add_argument("second")

    def found(words: Sequence[str]) -> list[str]:
        return ordered(parser, words, {})

    assert found(["--text", "a", "b", "c"]) == ["--text", "a", "--", "b", "c"]
    assert found(["a", "--text", "b", "c"]) == ["--text", "b", "--", "a", "c"]
    assert found(["--text", "a", "b", "--text", "c", "d"]) == ["--text", "a", "--text", "c", "--", "b", "d"]
