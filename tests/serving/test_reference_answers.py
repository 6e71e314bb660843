"""The reference answers of a release; test_vllm_server.py compares a live server with them."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from numprune.errors import InputError, IntegrityError, ParityError
from numprune.export.checkpoint import load
from numprune.flows.cli.serve import DTYPES
from numprune.flows.steps import reference_answers as making
from numprune.flows.steps.quantize import quantize_checkpoint
from numprune.quantization import Scheme
from numprune.serving import reference_answers
from numprune.serving.reference_answers import MINIMUM_STEPS, TOLERANCES, CompletionAnswers, Rounding, Tolerance
from numprune.serving.reference_answers.asking import require_near
from tests.conftest import byte_tokenizer, recast


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.conftest import build_tiny

    folder = tmp_path_factory.mktemp("answers") / "model"
    build_tiny().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def reference(folder: Path) -> CompletionAnswers:
    return making.answers_of(folder)


@torch.inference_mode()
def test_reference_answers_match_the_model_with_its_cache(folder: Path, reference: CompletionAnswers) -> None:
    model, _ = load(folder)
    assert len({len(prompt.tokens) for prompt in reference.prompts}) == len(reference.prompts)  # a ragged batch
    for prompt in reference.prompts:
        sequence = torch.tensor([prompt.tokens])
        logprobs = model(sequence).logits[0].log_softmax(-1)
        given = [float(logprobs[i, token]) for i, token in enumerate(prompt.tokens[1:])]
        assert prompt.logprobs == pytest.approx(given, abs=1e-4)
        made = model.generate(sequence, max_new_tokens=MINIMUM_STEPS, min_new_tokens=MINIMUM_STEPS, do_sample=False)
        assert prompt.greedy == made[0, len(prompt.tokens) :].tolist()
        whole = model(made).logits[0].log_softmax(-1)[len(prompt.tokens) - 1 : -1]
        best = whole.topk(2, -1).values
        assert prompt.greedy_logprobs == pytest.approx(best[:, 0].tolist(), abs=1e-4)
        assert prompt.margins == pytest.approx((best[:, 0] - best[:, 1]).tolist(), abs=1e-4)


def test_the_rounding_of_each_precision_is_recorded(folder: Path, reference: CompletionAnswers) -> None:
    assert list(reference.rounding) == list(TOLERANCES)
    rounding = {name: found.worst for name, found in reference.rounding.items()}
    assert 0 < rounding["float32"] < 1e-4 < rounding["float16"] < rounding["bfloat16"]
    for name, found in reference.rounding.items():
        assert found.mean < found.worst
        assert reference.tolerance(name).worst >= TOLERANCES[name].worst
    model, _ = load(folder, torch.bfloat16)
    errors = []
    for prompt in reference.prompts:
        tokens = torch.tensor([*prompt.tokens, *prompt.greedy])
        with torch.no_grad():
            logprobs = model(tokens[None]).logits[0].double().log_softmax(-1)
        expected = [*prompt.logprobs, *prompt.greedy_logprobs]
        errors += [abs(float(logprobs[i, tokens[i + 1]]) - value) for i, value in enumerate(expected)]
    assert rounding["bfloat16"] == pytest.approx(max(errors))


def test_a_model_with_large_rounding_errors_gets_a_wider_tolerance(reference: CompletionAnswers) -> None:
    assert reference.tolerance("float32") == TOLERANCES["float32"]
    rough = reference.model_copy(update={"rounding": {"bfloat16": Rounding(worst=6.0, mean=0.2)}})
    assert rough.tolerance("bfloat16") == Tolerance(24.0, 0.8)
    assert rough.tolerance("float16") == TOLERANCES["float16"]  # in which it overflows


def test_a_quantized_release_records_the_noise_floor_of_the_unquantized_model(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    base = recast(tiny_checkpoint(), torch.bfloat16)
    quantize_checkpoint(base, Scheme("w8a8"), tmp_path / "quantized", torch.device("cpu"))
    made = making.answers_of(tmp_path / "quantized", unquantized=base)
    assert isinstance(made, CompletionAnswers)
    errors = []
    models = [load(base, dtype)[0] for dtype in (torch.float32, torch.bfloat16)]
    for prompt in made.prompts:
        tokens = torch.tensor([*prompt.tokens, *prompt.greedy])
        with torch.no_grad():
            exact, half = (model(tokens[None]).logits[0].double().log_softmax(-1)[:-1] for model in models)
        errors.append((half - exact).gather(1, tokens[1:, None]).abs())
    floor = made.noise_floor["bfloat16"]
    assert floor.mean == pytest.approx(float(torch.cat(errors).mean()))
    assert floor.p99 == pytest.approx(float(torch.cat(errors).quantile(0.99)))
    assert made.noise_floor.keys() == {"bfloat16", "float16"}
    own = made.rounding["bfloat16"]
    assert own.p99 is not None
    assert own.mean < own.p99 < own.worst
    made.write(tmp_path)
    assert reference_answers.read(tmp_path) == made


def test_the_tolerance_of_a_quantized_release_is_a_multiple_of_noise_floor_or_rounding(
    reference: CompletionAnswers,
) -> None:
    rounding, least = {"bfloat16": Rounding(worst=6.0, mean=0.2)}, TOLERANCES["bfloat16"]
    rough = reference.model_copy(
        update={"rounding": rounding, "noise_floor": {"bfloat16": reference_answers.Noise(mean=0.1, p99=0.5)}}
    )
    assert rough.tolerance("bfloat16") == Tolerance(24.0, 0.4, 2.0)  # recorded by earlier versions, without p99
    assert rough.tolerance("float32").p99 is None
    rounded = {"bfloat16": Rounding(worst=6.0, mean=0.25, p99=1.25)}
    inputs = rough.model_copy(update={"rounding": rounded})
    assert inputs.tolerance("bfloat16") == Tolerance(24.0, 0.5, 2.5)
    calm = {"bfloat16": reference_answers.Noise(mean=1e-6, p99=1e-6)}
    exact = {"bfloat16": Rounding(worst=6.0, mean=1e-6, p99=1e-6)}
    quiet = rough.model_copy(update={"noise_floor": calm, "rounding": exact})
    assert quiet.tolerance("bfloat16") == Tolerance(24.0, least.mean, least.worst / 2)


@dataclass(frozen=True)
class Place:
    error: float


def test_a_server_is_held_to_mean_and_99th_percentile() -> None:
    tolerance = Tolerance(1.0, 0.1, 0.5)
    good = [Place(0.0)] * 97 + [Place(0.5)] * 2 + [Place(0.9)]
    found = require_near("url", good, tolerance, "bfloat16", " nats")
    assert (found["p99_error"], found["p99_tolerance"], found["mean_tolerance"]) == (0.5, 0.5, 0.1)
    with pytest.raises(ParityError, match=r"by 0\.9 nats, by 0\.0\d+ on average, by 0\.9 at the 99th percentile"):
        require_near("url", good[:-2] + [Place(0.9)] * 2, tolerance, "bfloat16", " nats")
    with pytest.raises(ParityError, match=r"allowed in bfloat16: 1, 0\.1, 0\.5$"):
        require_near("url", [Place(0.2)] * 100, tolerance, "bfloat16")
    assert require_near("url", [Place(0.9), *[Place(0.0)] * 9], Tolerance(1.0, 0.1), "float32")["p99_tolerance"] is None
    with pytest.raises(ParityError):
        require_near("url", [*good, Place(math.inf)], tolerance, "bfloat16")


def test_reference_answers_of_earlier_releases_are_read(tmp_path: Path, reference: CompletionAnswers) -> None:
    data = {**json.loads(reference.model_dump_json(by_alias=True)), "schema": "numprune/canary/1"}
    del data["rounding"], data["noise_floor"]
    (tmp_path / "canary.json").write_text(json.dumps(data))
    assert reference_answers.read(tmp_path).tolerance("bfloat16") == TOLERANCES["bfloat16"]


def test_a_precision_that_overflows_has_no_recorded_rounding() -> None:
    overflowing = {"float16": torch.tensor([torch.inf, 0.0]), "bfloat16": torch.tensor([-1.0, 3.0])}
    found = making._rounding(overflowing, torch.zeros(2), percentile=False)
    assert found == {"bfloat16": Rounding(worst=3.0, mean=2.0)}


def test_recorded_token_ids_detect_another_tokenizer(reference: CompletionAnswers) -> None:
    tokenizer = byte_tokenizer()
    for text in reference.texts:
        assert tokenizer.decode(text.tokens) == text.text
    characters = set("".join(text.text for text in reference.texts))
    assert any(ord(character) > 0xFFFF for character in characters)
    assert {"\n", "5", "ż"} <= characters


def test_a_short_context_gives_short_prompts_and_one_without_room_is_refused(
    tiny_checkpoint: Callable[..., Path],
) -> None:
    made = making.answers_of(tiny_checkpoint(name="short", max_position_embeddings=48))
    assert made.length == 47  # vLLM takes one token more than it is given
    with pytest.raises(InputError, match="its context of 33 tokens has no room for the 32 greedy tokens"):
        making.answers_of(tiny_checkpoint(name="none", max_position_embeddings=33))


def test_reference_answers_round_trip(tmp_path: Path, reference: CompletionAnswers) -> None:
    reference.write(tmp_path)
    assert reference_answers.read(tmp_path) == reference
    written = json.loads((tmp_path / "reference-answers.json").read_text())
    assert "noise_floor" not in written  # earlier versions refuse it
    assert all(set(one) == {"worst", "mean"} for one in written["rounding"].values())


Change = Callable[[dict[str, Any]], object]
DAMAGES: dict[str, tuple[Change, str]] = {
    "no prompts": (lambda data: data.update(prompts=[]), "prompts"),
    "fewer greedy tokens": (lambda data: data["prompts"][0]["greedy"].pop(), r"prompts\.0"),
    "no logprobs": (lambda data: data["prompts"][0].update(logprobs=[]), "logprobs must have a value"),
    "not a number": (lambda data: data["prompts"][0]["logprobs"].__setitem__(0, float("nan")), "logprobs"),
    "a probability over one": (lambda data: data["prompts"][1]["logprobs"].__setitem__(0, 0.5), "logprobs"),
    "unknown field": (lambda data: data.update(tolerance=9), "tolerance"),
    "another schema": (lambda data: data.update(schema="numprune/reference-answers/2"), "schema"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_reference_is_refused(tmp_path: Path, reference: CompletionAnswers, damage: str) -> None:
    data = json.loads(reference.model_dump_json(by_alias=True))
    change, message = DAMAGES[damage]
    change(data)
    (tmp_path / "reference-answers.json").write_text(json.dumps(data))
    with pytest.raises(IntegrityError, match=message):
        reference_answers.read(tmp_path)


def test_a_release_without_reference_answers_is_distinguished(tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match=r"reference-answers\.json: missing; .*run `numprune optimize` again"):
        reference_answers.read(tmp_path)


def test_the_command_line_offers_the_checkable_precisions() -> None:
    assert list(DTYPES) == ["auto", *TOLERANCES]


def test_a_precision_without_a_tolerance_is_refused(reference: CompletionAnswers) -> None:
    with pytest.raises(InputError, match="dtype is 'float8'"):
        reference_answers.check("http://127.0.0.1:1", reference, "float8")
