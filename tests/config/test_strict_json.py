import json
import math

import pytest

from megatron_tst.config import write_json
from tests.strict_json import read_strictly

CONTENT = {"a": [1.5, math.nan, (math.inf,)], "caf\udce9": "\ud83d", "é☃": "\U0001f600", "n": None, "t": True}


def test_non_finite_numbers_are_null_and_lone_surrogates_are_escaped():
    wanted = {"a": [1.5, None, [None]], r"caf\udce9": r"\ud83d", "é☃": "\U0001f600", "n": None, "t": True}
    assert read_strictly(write_json(CONTENT)) == read_strictly(write_json(CONTENT, indent=2)) == wanted


@pytest.mark.parametrize("name", ["a", "caf\udce9"])
def test_strict_reader_refuses_the_output_of_pythons_own_writer(name):
    with pytest.raises(ValueError, match=r"is not JSON|surrogates not allowed"):
        read_strictly(json.dumps({name: CONTENT[name]}))


def test_other_content_is_written_like_pythons_own_writer():
    plain = {"x": [1, 2.5e-300, "text"], "y": {"z": False}}
    assert write_json(plain, indent=2) == json.dumps(plain, indent=2)
