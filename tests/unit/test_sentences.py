"""The sentences of the product stand in one file, so that a change of one is read as text in a review."""
from tests.kits.sentences import GOLDEN, everything


def test_the_golden_file_is_current_and_every_refusal_has_a_code():
    found = everything()
    assert GOLDEN.read_text(encoding="utf-8") == found, "run: python -m tests.kits.sentences, and read the diff"
    assert "  usage: " not in found
