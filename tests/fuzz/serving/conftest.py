from tests.serving.conftest import report_json

__all__ = ["report_json"]
