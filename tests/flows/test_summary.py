"""The summary of a run: its first sentence, the release, and the next commands."""

from pathlib import Path

from numprune.flows import summary
from numprune.serving import report as reports
from tests.serving.pages import POLICY, full, judged


def summarized(tmp_path: Path, limit: float, noise: float = 0.03) -> summary.Summary:
    """The summary of a run; `noise`: of the decode speed in vLLM, relative."""
    data = full()
    data["speed"]["vllm"]["noise_floor"]["decode_tokens_per_s"]["relative"] = noise
    data["identity"] = {**data["identity"], "name": "my-model"}
    data["price_per_hour"] = 3.6
    lost = {"value": None, "ci95_lower": None, "ci95_upper": None, "interval95": [None, None]}
    data["speed"]["onnxruntime"]["decode_tokens_per_s"]["ratio"] |= lost
    data["speed"]["onnxruntime"]["noise_floor"]["ttft"] = {"relative": 1.5, "neighbours": 5}
    reports.write(judged(data, [{**POLICY[0], "max": limit}]), tmp_path / "report.json")
    release = tmp_path / "release" if limit > 0.1 else None
    if release:
        (release / "checkpoint").mkdir(parents=True)
    return summary.summarize("r1", tmp_path, [], release, "my-model/1" if release else None, ["--workspace", "a b"])


def test_a_summary_starts_with_the_headline_and_ends_with_the_next_commands(tmp_path: Path) -> None:
    found = summarized(tmp_path, 0.25)
    text, page = summary.text(found), summary.markdown(found)
    sentence = "25 % smaller, decode 1.20x faster (vLLM), perplexity +5.1 %: within your limits."
    for opening in (text.splitlines()[0], page.splitlines()[2]):
        assert opening.replace("\N{MULTIPLICATION SIGN}", "x") == sentence
    promote, serve = (
        f"numprune {command} --workspace 'a b'"
        for command in ("registry promote my-model@candidate", "serve my-model@production")
    )
    assert text.endswith(
        f"  checkpoint {tmp_path / 'release' / 'checkpoint'}\n  next      {promote}\n            {serve}"
    )
    assert f"next: `{promote}`, then `{serve}`" in page
    assert "ITL x1.001 [0.977, 1.025] (no clear difference)" in text
    assert "onnxruntime: decode tokens/s not measured, " in text
    assert "TTFT x0.800 [0.788, 0.812] (too noisy to measure)" in text
    assert "  cost      vllm: 10.0000 → 8.3333 per million output tokens" in text


def test_a_summary_without_a_release_gives_the_reason_and_no_next_command(tmp_path: Path) -> None:
    found = summarized(tmp_path, 0.01)
    assert (found["next"], found["artifacts"]) == ([], {})
    assert ": outside your limit on NLL difference, nats/token (upper bound 0.0600" in summary.text(found)
    assert "numprune registry promote" not in summary.text(found) + summary.markdown(found)
