import json
import math

import pytest

from flplatform.client.frames import LENGTH, encode


def test_encode():
    data = encode("phase", {"phase": "träin \ud800"})
    (length,) = LENGTH.unpack(data[:4])
    assert length == len(data) - 4
    assert json.loads(data[4:]) == {"type": "phase", "phase": "träin ?"}


def test_numbers_must_be_finite():
    with pytest.raises(ValueError, match="not JSON compliant"):
        encode("metric", {"value": math.nan})
