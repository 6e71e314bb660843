"""The layout of a table with made-up figures."""

import csv
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

from numprune.flows.studies.compare.plot import as_svg
from numprune.flows.studies.compare.table import Conditions, Row, Table, as_csv, as_markdown

CONDITIONS = Conditions(
    model="llama",
    model_digest="a" * 64,
    sequence_length=256,
    align=8,
    axes=("kv-groups", "channels", "experts", "expert-channels"),
    seed=0,
    device="cpu",
    calibration={128: "b" * 64},
    heldout_digest="c" * 64,
    heldout_tokens=94_000,
    heldout_documents=69,
    dense_nll=3.5,
    dense_perplexity=33.1,
    dense_accuracy=None,
    unit="nats/token",
    dense_parameters=5_475_584,
    version="1.0",
)
ROW = Row(
    ratio=0.3,
    samples=128,
    method="obs/uniform/oneshot",
    prunable_ratio_removed=0.2996,
    nll_increase=0.0675,
    ci95_lower=0.0581,
    ci95_upper=0.0789,
    sampling_unit="document",
    nll=3.5675,
    perplexity=35.43,
    accuracy=None,
    kl=0.133,
    top1_agreement=0.778,
    parameters=4_148_480,
    seconds=12.34,
    forward_passes=5.08,
    peak_bytes=300 << 20,
)


def test_markdown_starts_with_the_dense_model_and_groups_by_ratio():
    low = replace(ROW, ratio=0.1, method="shortgpt", ci95_lower=None, ci95_upper=None)
    lines = as_markdown(Table(CONDITIONS, [ROW, low])).splitlines()
    assert len({line.count("|") for line in lines[:5]}) == 1
    assert lines[2].startswith("| 0 | dense | 0 | 3.5000 | 33.10 |")
    assert lines[3].startswith("| 30.0 % | shortgpt | 0.0675 (no bounds) |")
    assert lines[4] == (
        "| 30.0 % | obs / uniform / oneshot | 0.0675 (0.0581 to 0.0789) | 3.5675 | 35.43 | 0.1330 | 77.8 % "
        "| 4,148,480 | 12.3 | 5.1 | 300 |"
    )
    assert "94,000 tokens of 69 held-out documents" in lines[6]


def test_several_calibration_sizes_get_a_column():
    conditions = replace(CONDITIONS, calibration={32: "d" * 64, 128: "b" * 64})
    table = Table(conditions, [ROW, replace(ROW, samples=32)])
    lines = as_markdown(table).splitlines()
    assert [line.split(" | ")[2] for line in lines[3:5]] == ["32", "128"]
    assert [row["calibration_digest"][0] for row in csv.DictReader(as_csv(table).splitlines())] == ["d", "b"]


def test_csv_keeps_every_digit_and_identifies_each_row():
    (row,) = csv.DictReader(as_csv(Table(CONDITIONS, [ROW])).splitlines())
    assert float(row["prunable_ratio_removed"]) == ROW.prunable_ratio_removed
    assert (row["model_digest"], row["heldout_digest"], row["seed"]) == ("a" * 64, "c" * 64, "0")


def test_the_plot_is_well_formed_complete_and_reproducible():
    rows = [replace(ROW, method=f"method-{number}") for number in range(25)]
    for table in (Table(CONDITIONS, rows), Table(CONDITIONS, [replace(ROW, nll_increase=-0.01)])):
        picture = as_svg(table)
        assert ElementTree.fromstring(picture).tag.endswith("svg")
        assert picture == as_svg(table)
        assert all(f"<!-- {row.method} -->" in picture for row in table.rows)


def test_image_classifiers_have_accuracies_in_place_of_perplexities():
    conditions = replace(
        CONDITIONS, dense_nll=0.1, dense_perplexity=None, dense_accuracy=0.964, unit="nats/image", heldout_documents=500
    )
    table = Table(conditions, [replace(ROW, nll=0.15, perplexity=None, accuracy=0.95)])
    lines = as_markdown(table).splitlines()
    assert "| NLL increase, nats/image (one-sided 95 % bounds) | NLL | accuracy |" in lines[0]
    assert lines[2].startswith("| 0 | dense | 0 | 0.1000 | 96.4 % |")
    assert "| 0.1500 | 95.0 % | 0.1330 |" in lines[3]
    assert "128 images (seed 0), evaluated on 500 held-out images. Bounds by bootstrap over images." in lines[5]
    masked = as_markdown(replace(table, rows=[replace(ROW, method="dimap-weights", accuracy=0.95)]))
    assert "`dimap-weights` sets single weights to zero, which count as removed; nothing becomes smaller." in masked
    (row,) = csv.DictReader(as_csv(table).splitlines())
    assert (row["nll_nats_per_image"], row["accuracy"], row["dense_nll_nats_per_image"]) == ("0.15", "0.95", "0.1")
    assert "perplexity" not in row
