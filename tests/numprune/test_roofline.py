"""Estimated latencies against sums by hand and by counting."""

import pytest

from numprune.anatomy import read_anatomy
from numprune.errors import InputError
from numprune.quantization import Scheme
from numprune.roofline import DEVICES, Peaks, estimated, peaks_of
from numprune.scenario import parse_scenario
from numprune.served import AS_STORED, Served
from numprune.slices import Size
from numprune.target import Target
from numprune.timings import sizes_to_time
from tests.conftest import tiny_config

SLOW_MEMORY = Peaks("all bytes", {4: 1e12, 1: 1e12}, 1.25)  # 1e9 bytes take a second
SLOW_COMPUTER = Peaks("all FLOPs", {4: 1 / 600}, 1e12)  # 1e9 FLOPs take a second
LLAMA = {"hidden_size": 256, "head_dim": 64, "intermediate_size": 512, "num_hidden_layers": 2}


def times_of(config, scenario, peaks, served=AS_STORED):
    anatomy = read_anatomy(config)
    sizes = sizes_to_time(anatomy, Target(align=16), 2)
    return estimated(anatomy, sizes, parse_scenario(scenario), peaks, "float32", served)


def at_own_size(times, kind):
    return max(times.blocks[kind], key=lambda time: time.ms).ms


def test_bytes_are_weights_keys_values_and_activations():
    times = times_of(tiny_config("llama", **LLAMA), "decode,b=8,ctx=99", SLOW_MEMORY)
    stream = 2 * 8 * 256
    mlp = 3 * 256 * 512 + stream + 2 * 8 * 512
    attention = 256 * (4 + 2 + 2 + 4) * 64 + stream + 2 * 8 * 4 * 64 + 2 * 8 * 100 * 2 * 64
    assert at_own_size(times, "mlp") == pytest.approx(4 * mlp * 1e-6)
    assert at_own_size(times, "attention") == pytest.approx(4 * attention * 1e-6)
    assert times.around.ms == pytest.approx(4 * (256 * 259 + 8 * 256 + 8 * 259) * 1e-6)
    assert times.estimated_for == "all bytes"
    assert all(time.interval95 == (time.ms, time.ms) for blocks in times.blocks.values() for time in blocks)


def test_flops_are_of_whole_tiles_and_of_the_keys_that_tokens_see():
    length = 20
    times = times_of(tiny_config("llama", **LLAMA), f"prefill,b=3,len={length}", SLOW_COMPUTER)
    assert at_own_size(times, "mlp") == pytest.approx(2 * 3 * length * 3 * 256 * 512 * 1e-6)
    seen = sum(range(1, length + 1))  # of a row
    attention = 2 * 3 * length * 256 * (4 + 2 + 2 + 4) * 64 + 4 * 3 * seen * 4 * 64
    assert at_own_size(times, "attention") == pytest.approx(attention * 1e-6)
    narrow = tiny_config("llama", **{**LLAMA, "intermediate_size": 400})
    tiled = times_of(narrow, f"prefill,b=3,len={length}", SLOW_COMPUTER)
    assert at_own_size(tiled, "mlp") == at_own_size(times, "mlp")  # 400 channels take as long as 512


@pytest.mark.parametrize("length", [5, 8, 30])
def test_a_window_limits_the_keys(length):
    windows = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2, "num_hidden_layers": 4}
    scenario = f"prefill,b=1,len={length}"
    times = times_of(tiny_config("gemma3_text", **windows), scenario, SLOW_COMPUTER)
    heads = 4 * 16
    saved = 4 * heads * sum(max(0, position - 8) for position in range(1, length + 1))
    assert at_own_size(times, "attention") - at_own_size(times, "sliding-attention") == pytest.approx(saved * 1e-6)


def test_a_request_is_a_prefill_and_decoding_at_the_mean_length():
    request, prefill, decode = (
        times_of(tiny_config("llama", **LLAMA), scenario, SLOW_MEMORY)
        for scenario in ("request,b=2,len=16,out=9", "prefill,b=2,len=16", "decode,b=2,ctx=19")
    )
    assert request.around.ms == pytest.approx(prefill.around.ms + 8 * decode.around.ms)
    for kind, found in request.blocks.items():
        parts = [[time.ms for time in times.blocks[kind]] for times in (prefill, decode)]
        assert [time.ms for time in found] == pytest.approx([a + 8 * b for a, b in zip(*parts, strict=True)])


def test_encoders_see_every_token():
    times = times_of(tiny_config("bert", architectures=["BertForMaskedLM"]), "forward,b=1,len=10", SLOW_COMPUTER)
    projections = 4 * 64 * 128  # each tiled to 128 outputs
    assert at_own_size(times, "attention") == pytest.approx((2 * 10 * projections + 4 * 10 * 10 * 64) * 1e-6)


def test_experts_compute_for_their_tokens_and_are_read_if_any_token_uses_them():
    config = tiny_config("mixtral", num_local_experts=8, num_experts_per_tok=2)
    of_expert = 3 * config.hidden_size * config.intermediate_size
    router = 8 * config.hidden_size
    one, many = (times_of(config, f"decode,b={batch},ctx=4", SLOW_MEMORY) for batch in (1, 200))
    activations = 2 * config.hidden_size + 2 * 2 * config.intermediate_size
    read = 2 / 8 * (8 * of_expert + router) + activations
    assert at_own_size(one, "experts") == pytest.approx(4 * read * 1e-6)
    assert at_own_size(many, "experts") == pytest.approx(4 * (8 * of_expert + router + 200 * activations) * 1e-6)


@pytest.mark.parametrize(
    ("scheme", "written"),
    [(None, 4 * 256), (Scheme("w8a8"), 256 + 4), (Scheme("w4a16", 64), 256 / 2 + 256 / 64 * 4)],
)
def test_quantized_weights_are_read_in_their_bytes(scheme, written):
    """`written`: the bytes of a row of 256 weights with its scales."""
    config = tiny_config("llama", **{**LLAMA, "intermediate_size": 256})
    times = times_of(config, "decode,b=8,ctx=99", SLOW_MEMORY, Served(scheme))
    shapes = 3 * 2 * 8 if scheme and scheme.name == "w4a16" else 0  # that are stored beside packed weights
    activations = 2 * 8 * 256 + 2 * 8 * 256
    assert at_own_size(times, "mlp") == pytest.approx((3 * 256 * written + shapes + 4 * activations) * 1e-6)
    assert times.around == times_of(config, "decode,b=8,ctx=99", SLOW_MEMORY).around


def test_products_of_8_bits_have_their_own_peak():
    fast = Peaks("8 bits in half the time", {4: 1 / 600, 1: 1 / 300}, 1e12, fp8=False)
    length, config = 20, tiny_config("llama", **LLAMA)
    whole, w8a8, w4a16 = (
        times_of(config, f"prefill,b=3,len={length}", fast, Served(scheme))
        for scheme in (None, Scheme("w8a8"), Scheme("w4a16"))
    )
    assert w4a16 == whole
    assert at_own_size(w8a8, "mlp") == pytest.approx(at_own_size(whole, "mlp") / 2)
    scores = 4 * 3 * sum(range(1, length + 1)) * 4 * 64 * 1e-6  # are not of weights
    attention = at_own_size(whole, "attention")
    assert at_own_size(w8a8, "attention") == pytest.approx((attention - scores) / 2 + scores)
    with pytest.raises(InputError, match="does not multiply FP8 numbers; choose w8a8"):
        times_of(config, f"prefill,b=3,len={length}", fast, Served(Scheme("fp8")))


def test_devices_that_share_a_layer_have_a_part_of_its_units_each():
    config = tiny_config("llama", **LLAMA, num_attention_heads=4, num_key_value_heads=2)
    stream = 4 * 2 * 8 * 256
    whole, two, four = (
        times_of(config, "decode,b=8,ctx=99", SLOW_MEMORY, Served(tensor_parallel=devices)) for devices in (1, 2, 4)
    )
    for devices, shared in ((2, two), (4, four)):
        part = (at_own_size(whole, "mlp") - stream * 1e-6) / devices
        assert at_own_size(shared, "mlp") == pytest.approx(part + stream * 1e-6)
        assert {(time.units, time.members) for time in shared.blocks["mlp"]} >= {(512, 1)}
    assert two.around.ms == pytest.approx(4 * (256 * 259 / 2 + 8 * 256 + 8 * 259) * 1e-6)
    own = max(range(len(two.blocks["attention"])), key=lambda index: two.blocks["attention"][index].units)
    part = (whole.blocks["attention"][own].ms - stream * 1e-6) / 2
    assert two.blocks["attention"][own].ms == pytest.approx(part + stream * 1e-6)
    copied = 256 * (1 + 1 + 1 + 1) * 64 + 2 * 8 * 64 + 2 * 8 * 100 * 64  # a head of each kind
    assert four.blocks["attention"][own].ms == pytest.approx((4 * copied + stream) * 1e-6)


def test_a_device_is_known_or_described():
    assert peaks_of("h200", 0, 0) is DEVICES["h200"]
    assert peaks_of("", 100, 2000).tflops[2] == 100
    for arguments, says in (
        (("h300", 0, 0), r"device 'h300' is not known; known are h200"),
        (("h200", 100, 2000), "leave out either it or the rates"),
        (("", 100, 0), "needs a device, or both its peak"),
    ):
        with pytest.raises(InputError, match=says):
            peaks_of(*arguments)
    with pytest.raises(InputError, match="has no peak for values of 8 bytes"):
        estimated(
            read_anatomy(tiny_config("llama")),
            {"mlp": [Size(8)]},
            parse_scenario("decode,b=1,ctx=1"),
            DEVICES["l4"],
            "float64",
        )
