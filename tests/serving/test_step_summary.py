"""GitHub's step summary: what is appended and what is left out."""

from pathlib import Path

import pytest

from numprune.serving.report.step_summary import LIMIT_BYTES, append, shortened

HEAD = "# run: fail\n\n1 of 2 gates pass.\n"
GATES = "\n| gate | value |\n| --- | --- |\n| a | 1 |\n\n"
SIZES = "## Sizes\n\n| | ratio |\n| --- | --- |\n| parameters | 0.7 |\n\n"
SPEED = "## Speed, onnxruntime\n\n" + "| ürgend |\n" * 1000 + "\n"
MACHINE = "## Machine\n\nA CPU.\n"
PAGE = HEAD + GATES + SIZES + SPEED + MACHINE


def test_a_page_that_fits_is_unchanged() -> None:
    assert shortened(PAGE, len(PAGE.encode())) == PAGE.encode()


def test_whole_sections_are_omitted_and_named() -> None:
    limit = len(PAGE.encode()) - 1
    text = shortened(PAGE, limit).decode()
    assert text == (
        HEAD + GATES + SIZES + MACHINE + "\n\nOmitted to stay within GitHub's 1 MiB limit: Speed, onnxruntime. "
        "The report is complete.\n"
    )


def test_an_oversized_gate_table_leaves_the_verdict() -> None:
    page = HEAD + GATES * 2000 + SIZES
    text = shortened(page, 10_000).decode()
    assert text.startswith(HEAD)
    assert SIZES in text
    assert "Omitted to stay within GitHub's 1 MiB limit: Gates." in text


@pytest.mark.parametrize("limit", [0, 100, 2_100, 5_000, 50_000])
def test_the_limit_holds_whatever_the_page(limit: int) -> None:
    page = HEAD + GATES + "".join(f"## {'Ünnamed' * 30} {number}\n\n{'ü' * 3000}\n\n" for number in range(300))
    made = shortened(page, limit)
    assert len(made) <= limit
    assert limit < 2_100 or made.decode().startswith(HEAD)
    assert limit < 2_100 or "and 2" in made.decode()  # of hundreds, the first are named


def test_pages_are_appended_until_the_summary_is_full(tmp_path: Path) -> None:
    summary = tmp_path / "summary"
    summary.write_text("Built.")
    append(summary, PAGE)
    append(summary, PAGE)
    assert summary.read_text() == f"Built.\n\n{PAGE}\n\n{PAGE}"
    while summary.stat().st_size < LIMIT_BYTES - 3000:
        append(summary, HEAD + "## Filling\n\n" + "a" * 1000)
    append(summary, PAGE)
    assert summary.stat().st_size <= LIMIT_BYTES
    assert "Omitted to stay" in summary.read_text()
    for _ in range(10):
        append(summary, PAGE)
    assert summary.stat().st_size <= LIMIT_BYTES
