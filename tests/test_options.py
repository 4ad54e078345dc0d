"""What may be chosen of a compile's passes, and what is refused."""

import pytest

from kvc8.ir.errors import TargetError
from kvc8.passes.options import NAMES, Options, choices


def test_the_first_choice_is_the_default():
    assert Options(**{name: choices(name)[0] for name in NAMES}) == Options()


@pytest.mark.parametrize(
    ("option", "given", "sentence"),
    [
        ("kv_scales", "asis", "kv_scales: is 'asis' and should be 'repair' or 'as-is'; correct it"),
        ("prefill_kv", "f16", "prefill_kv: is 'f16' and should be 'float' or 'int8'; correct it"),
        ("fold", "kvv", "fold: is 'kvv' and should be 'offsets' or 'kv'; correct it"),
        ("fuse", "yes", "fuse: is 'yes' and should be 'on' or 'off'; correct it"),
        ("kv_format", "NZ", "kv_format: is 'NZ' and should be 'nd' or 'nz'; correct it"),
    ],
)
def test_what_is_mistyped_is_refused(option, given, sentence):
    with pytest.raises(TargetError) as refused:
        Options(**{option: given})
    assert str(refused.value) == sentence
