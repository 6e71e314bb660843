import tomllib
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from numprune.errors import InputError
from numprune.flows import names, sections
from numprune.flows.recipe import EMBEDDED_RECIPE, Recipe, load

MINIMAL = """
[model]
path = "model"
[data]
calibration = "a.txt"
heldout = ["b.txt", "/abs/c.txt"]
[[gates]]
metric = "sizes.parameters.ratio"
bound = "point"
max = 0.9
[registry]
name = "tiny"
"""


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(MINIMAL)
    return path


def test_the_embedded_recipe_shows_every_key_with_its_default() -> None:
    shown = tomllib.loads(EMBEDDED_RECIPE.read_text(encoding="utf-8"))
    assert list(shown) == [
        *(name for name in Recipe.model_fields if name not in ("gates", "registry")),
        "gates",
        "registry",
    ]
    required, differing = set(), set()
    for name, field in Recipe.model_fields.items():
        section = field.annotation
        if not (isinstance(section, type) and issubclass(section, BaseModel)):
            continue
        assert set(shown[name]) == set(section.model_fields), name
        for key, inner in section.model_fields.items():
            if inner.default is PydanticUndefined:
                required.add(f"{name}.{key}")
            elif shown[name][key] != inner.default:
                differing.add(f"{name}.{key}")
    assert required == {"model.path", "data.calibration", "data.heldout", "registry.name"}
    assert differing == {"data.samples"}
    assert f"yours; default {sections.Data.model_fields['samples'].default}" in EMBEDDED_RECIPE.read_text()
    for line in EMBEDDED_RECIPE.read_text(encoding="utf-8").splitlines():
        if any(line.startswith(f"{key.partition('.')[2]} = ") and "embedded" in line for key in required):
            assert "yours" in line


def test_omitted_sections_take_their_defaults(minimal: Path) -> None:
    loaded = load(minimal)
    for section in (sections.Prune, sections.Export, sections.Benchmark):
        assert getattr(loaded, section.__name__.lower()) == section()


def test_names_match_the_implementation() -> None:
    from numprune.allocation import ALLOCATIONS
    from numprune.axes import AXES, DEFAULT_AXES, HIDDEN_SIZE
    from numprune.criteria import CRITERIA
    from numprune.export import precision
    from numprune.export.runtimes import DEVICES, NAMES
    from numprune.hidden import BASES
    from numprune.options import COMPENSATIONS
    from numprune.refinement import REFINEMENTS
    from numprune.serving.benchmark.run import TorchMode

    assert set(get_args(names.Criterion)) == set(CRITERIA)
    assert set(get_args(names.Allocation)) == set(ALLOCATIONS)
    assert set(get_args(names.Axis)) == {*AXES, HIDDEN_SIZE}
    assert names.DEFAULT_AXES == DEFAULT_AXES
    assert set(get_args(names.Compensation)) == set(COMPENSATIONS)
    assert get_args(names.Refine) == REFINEMENTS
    assert get_args(names.Basis) == BASES
    assert set(get_args(names.Runtime)) == {*NAMES, "vllm"}
    assert set(get_args(names.Device)) == set(DEVICES)
    assert get_args(names.Dtype) == (precision.AUTO, *precision.DTYPES)
    assert get_args(names.TorchMode) == get_args(TorchMode)


def test_defaults_match_the_implementation() -> None:
    from numprune.axes import DEFAULT_AXES
    from numprune.flows.steps.prune import options_of
    from numprune.options import PruneOptions
    from numprune.serving.benchmark import Load
    from numprune.serving.benchmark.vllm import ServedLoad

    assert options_of(sections.Prune(), sections.Target().sizes(), Path(), "none") == PruneOptions(
        ratio=0.3, axes=list(DEFAULT_AXES), keep=[]
    )
    assert Load(**sections.Benchmark().load("torch")) == Load()
    served = sections.Benchmark().load("vllm")
    assert ServedLoad(**{**served, "concurrency": tuple(served["concurrency"])}) == ServedLoad()


def test_paths_are_relative_to_the_recipe_and_overrides_to_the_current_folder(
    minimal: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    loaded = load(minimal, ["data.calibration=['x.txt']"])
    assert loaded.model.path == str(tmp_path / "model")
    assert loaded.data.heldout == [str(tmp_path / "b.txt"), "/abs/c.txt"]
    assert loaded.data.calibration == [str(tmp_path / "here" / "x.txt")]


def test_hub_ids_and_embedded_are_not_paths(minimal: Path) -> None:
    loaded = load(minimal, ["model.path=someone/some-model", "data.calibration=embedded"])
    assert loaded.model.path == "someone/some-model"
    assert loaded.data.calibration == "embedded"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("prune.ratio=0.2", ("prune", "ratio", 0.2)),
        ("prune.criterion=wanda", ("prune", "criterion", "wanda")),
        ('prune.criterion="wanda"', ("prune", "criterion", "wanda")),
        ("benchmark.runtimes=['torch']", ("benchmark", "runtimes", ["torch"])),
        ("export.opset = 20", ("export", "opset", 20)),
    ],
)
def test_override(minimal: Path, override: str, expected: tuple[str, str, Any]) -> None:
    section, key, value = expected
    assert getattr(getattr(load(minimal, [override]), section), key) == value


def test_gates_are_overridden_as_a_whole(minimal: Path) -> None:
    loaded = load(minimal, ["gates=[{metric='quality.kl_nats_per_token', bound='point', max=0.5}]"])
    assert [gate.metric for gate in loaded.gates] == ["quality.kl_nats_per_token"]


def test_problems_of_several_fields_name_them_and_print_no_section(minimal: Path) -> None:
    with pytest.raises(InputError) as caught:
        load(minimal, ["timings.device=l4"])
    assert str(caught.value).splitlines()[1:] == [
        '  timings: device: it has an effect only with runtime = "roofline"; leave it out'
    ]
    with pytest.raises(InputError) as caught:
        load(minimal, ["timings.sizes=4"])
    assert str(caught.value).splitlines()[1:] == [
        "  timings: it has an effect only with a time as prune.budget; leave it out"
    ]


def test_every_problem_is_reported_with_field_value_and_allowed_values(minimal: Path) -> None:
    with pytest.raises(InputError) as caught:
        load(
            minimal,
            [
                "prune.ratio=1.4",
                "prune.criterion=numercal",
                "prune.rato=2",
                "data.calibration=[]",
                "data.split='('",
                "data.pack='maybe'",
                "data.samples=0",
                "data.sequence_length=1",
                "foo.bar=1",
                "gates=[{metric='a.b', bund='point', max=1}]",
                "benchmark.runtimes=['torch','torch']",
                "benchmark.repeats=5",
                "export.targets=[]",
                "registry.name='a b'",
                "evaluate.prompts=['Hello', ' ']",
                "nonsense",
            ],
        )
    message = str(caught.value)
    expected = [
        "prune.ratio = 1.4: must be less than 1",
        "prune.criterion = 'numercal': must be 'numerical', 'numerical-newton', 'obs', 'taylor', 'flap', 'dimap', "
        "'wanda', 'magnitude', 'random' or 'frequency'; did you mean 'numerical'?",
        "prune.rato: unknown; the valid ones are ratio, criterion, allocation, compensation, axes, keep, floors, "
        "skips, budget, drop_layers, drop_blocks, window, window_layers, hidden_size, basis, refine, refine_minutes, "
        "damping, seed, batch_size, stream; did you mean 'ratio'?",
        'data.calibration = []: must be "embedded" or a list of text files',
        'data.split = \'(\': must be "file", "blank-line" or a regular expression (missing ), unterminated subpattern',
        "data.pack = 'maybe': must be \"auto\", true or false",
        "data.samples = 0: must be greater than or equal to 1",
        "data.sequence_length = 1: must be greater than or equal to 2",
        "foo: unknown",
        "gates.0.bound: missing",
        "gates.0.bund: unknown; the valid ones are metric, bound, min, max; did you mean 'bound'?",
        "benchmark.runtimes = ['torch', 'torch']: must not contain duplicates",
        "benchmark.repeats = 5: must be an even number, at least 4",
        "registry.name = 'a b'",
        "evaluate.prompts = ['Hello', ' ']: must be \"built-in\" or a list of texts that are not empty",
        "--set nonsense: must be section.key=value",
    ]
    for line in expected:
        assert line in message
    assert message.startswith(f"recipe {minimal}: {len(expected)} problems\n")


@pytest.mark.parametrize("text", ["[model", "\xff".encode("latin-1"), "a = 1\na = 2"])
def test_invalid_toml_is_reported_as_such(tmp_path: Path, text: str | bytes) -> None:
    path = tmp_path / "recipe.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match="not TOML"):
        load(path)


def test_missing_recipe(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        load(tmp_path / "none.toml")


def test_gates_have_no_default(minimal: Path) -> None:
    without = MINIMAL.split("[[gates]]")[0] + '[registry]\nname = "tiny"\n'
    minimal.write_text(without)
    with pytest.raises(InputError, match="gates: missing"):
        load(minimal)


def test_held_out_text_may_be_several_corpora_by_name(minimal: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    data = load(minimal, ['data.heldout={prose=["a.txt"], code="embedded"}']).data
    assert [*data.corpora.items()] == [("prose", [str(tmp_path / "a.txt")]), ("code", "embedded")]
    assert load(minimal).data.corpora == {"": load(minimal).data.heldout}
    for given, said in (
        ("{}", "at least one corpus"),
        ("{A=['x']}", "'A' cannot name"),
        ("{a=[]}", "a list of text files"),
    ):
        with pytest.raises(InputError, match=rf"data\.heldout = .*: .*{said}"):
            load(minimal, [f"data.heldout={given}"])


def test_the_resolved_recipe_is_the_same_recipe(minimal: Path) -> None:
    odd = 'data.calibration=["a \\" b.txt", "ü\\u007f\\n.txt"]'
    tables = ["prune.floors={attention=0.5, mlp=0.25}", 'data.heldout={a=["\u007f.txt"], b="embedded"}']
    loaded = load(minimal, [odd, *tables, "prune.damping=1e-7", "data.pack=true", r"data.split='\n(?=\w+)'"])
    again = Recipe.model_validate(tomllib.loads(loaded.to_toml()))
    assert again == loaded
    assert again.digest == loaded.digest
    assert load(minimal).digest != loaded.digest


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ("rank = 32", 'rank = 32: it has an effect only with recover.train = "lora"'),
        ('train = "lora"\nblocks = 2', "blocks = 2: it"),
        ("generated_share = 0.9", "generated_share = 0.9: it has an effect only with recover.prompts"),
    ],
)
def test_options_of_other_trained_weights_are_refused(minimal: Path, options: str, named: str) -> None:
    minimal.write_text(f'{MINIMAL}[recover]\nmethod = "distill"\n{options}\n')
    with pytest.raises(InputError, match=rf"recover\.{named}"):
        load(minimal)


def test_a_learning_rate_of_weights_that_are_not_trained_is_refused(minimal: Path) -> None:
    asked = ["learn.method=vib", "learn.learning_rate=1e-3"]
    assert load(minimal, [*asked, "learn.variant=fast"]).learn.learning_rate == 1e-3
    with pytest.raises(InputError, match=r"learn\.learning_rate = 0\.001: it is that of the weights, which"):
        load(minimal, asked)


def test_bits_of_an_output_matrix_beside_unquantized_weights_are_refused(minimal: Path) -> None:
    with pytest.raises(InputError, match=r"quantize\.lm_head_bits = 4: it has an effect only with a quantize\.scheme"):
        load(minimal, ["quantize.lm_head_bits=4"])


def test_a_recipe_with_every_default_written_out_is_accepted(minimal: Path) -> None:
    found = load(minimal)
    assert Recipe.model_validate(found.model_dump()) == found
