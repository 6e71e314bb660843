"""The section of an image generator: samples and the loss by class."""

import base64

import pytest
from pydantic import ValidationError

from numprune.serving.report import Report, markdown, page
from numprune.serving.report.headline import next_commands
from tests.serving.conftest import Json
from tests.serving.pages import Parsed, full, judged

SHEET = base64.b64encode(b"\x89PNG\r\n\x1a\n stands for a picture").decode()


def images(**changed: object) -> Json:
    data = full()
    data["quality"]["generation"] = None
    data["quality"]["loss_delta"]["unit"] = "nats/code"
    data["quality"]["classes"] = [
        {"label": 3, "images": 40, "baseline": 1.25, "candidate": 1.5},
        {"label": 7, "images": 60, "baseline": 1.0, "candidate": 2.0},
    ]
    data["quality"]["images"] = {
        "samples": 20,
        "guidance": 2.0,
        "guided_kl_nats_per_code": 0.0625,
        "code_divergence_nats": 0.011,
        "code_divergence_of_dense_nats": 0.009,
        "sheet": SHEET,
        **changed,
    }
    return data


def test_samples_and_the_classes_that_lost_most_are_shown() -> None:
    report = judged(images(), [{"metric": "quality.images.guided_kl_nats_per_code", "bound": "point", "max": 0.1}])
    assert report.verdict is not None
    assert report.verdict.outcome == "pass"
    html = page.html(report)
    assert f'<img alt="Samples of both models" src="data:image/png;base64,{SHEET}">' in html
    text = Parsed(html).text
    assert "20 images from each model, with guidance 2.0" in text
    assert "0.0625" in text
    assert text.index("+1.00") < text.index("+0.250")  # class 7 lost more than class 3
    assert "KL of guided distributions, nats/code | 0.0625" in markdown(report)
    assert [command for command in next_commands(report) if "serve" in command] == []


def test_an_image_generator_is_measured_on_codes_of_images() -> None:
    report = judged(images(), [{"metric": "quality.loss_delta", "bound": "ci95_upper", "max": 0.25}])
    shown, text = Parsed(page.html(report)).text, markdown(report)
    assert "On 5,000 codes of 40 held-out images, candidate minus baseline, paired by code." in shown
    assert "5,000 codes of 40 held-out images; intervals are two-sided, 95 %, over 40 images." in text
    for told in ("Quality on held-out images", "NLL, nats/code", "Images that lost most", "NLL difference, nats/code:"):
        assert told in shown
    assert "nats/token" not in shown + text
    assert "document" not in text


def test_without_colours_the_page_says_why_there_is_no_picture() -> None:
    text = Parsed(page.html(Report.model_validate(images(sheet=None, guidance=1.0, guided_kl_nats_per_code=None)))).text
    assert "has no colours for its codes, and evaluate.decoder names no file" in text
    assert "with guidance" not in text


def estimate(value: float) -> Json:
    bounds = [value - 2, value - 1, value + 1, value + 2]
    return {
        "value": value,
        "ci95_lower": bounds[1],
        "ci95_upper": bounds[2],
        "interval95": [bounds[0], bounds[3]],
        "samples": 10_000,
        "sampling_unit": "image",
    }


def compared(**changed: object) -> Json:
    metric = {"baseline": estimate(12), "candidate": estimate(15), "delta": estimate(3)}
    published = {"baseline": 13.5, "candidate": 16.75}
    score = {**metric, "published": published, "deviation": {"baseline": 0.25, "candidate": 0.5}}
    facts = {"file": "inception.pt", "features": 2048, "samples": 10_000, "real_images": 50_000}
    return images(
        **{
            "fid": {**metric, "published": published},
            "kid": metric,
            "inception_score": score,
            "network": facts,
            **changed,
        }
    )


def test_samples_are_compared_with_real_images() -> None:
    gates = [{"metric": "quality.images.fid.delta", "bound": "ci95_upper", "max": 5.0}]
    report = judged(compared(), gates)
    assert report.verdict is not None
    assert report.verdict.outcome == "pass"
    assert report.verdict.gates[0].power is not None
    told = "10,000 images from each model and 50,000 real images, by the 2,048 features of inception.pt."
    for text in (Parsed(page.html(report)).text, markdown(report)):
        assert told in text
        assert "FID as published" in text
        assert "13.50 ± 0.25" in text
    assert "FID, difference" in Parsed(page.html(report)).text
    assert judged(compared(), [{**gates[0], "max": 1.0}]).verdict.outcome == "fail"


def test_without_a_network_nothing_is_compared() -> None:
    assert "as published" not in Parsed(page.html(Report.model_validate(images()))).text
    without = compared(inception_score=None)
    text = Parsed(page.html(Report.model_validate(without))).text
    assert "KID" in text
    assert "Inception Score as published" not in text


@pytest.mark.parametrize("sheet", ['"><script>', "AAAA\n", ""])
def test_a_sheet_that_is_no_base64_is_refused(sheet: str) -> None:
    with pytest.raises(ValidationError, match="sheet"):
        Report.model_validate(images(sheet=sheet))
