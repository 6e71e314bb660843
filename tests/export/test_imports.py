"""scikit-learn is left out of transformers but available to the harness."""

import subprocess
import sys

import pytest

_PROGRAM = """\
import sys
from numprune.export.imports import bring_back_sklearn, leave_out_sklearn
leave_out_sklearn()
import transformers.generation.candidate_generator
assert "pandas" not in sys.modules
bring_back_sklearn()
import sklearn.metrics
"""


@pytest.mark.slow
def test_transformers_does_without_scikit_learn_and_others_have_it():
    subprocess.run([sys.executable, "-c", _PROGRAM], check=True)
