"""The sentences of the product stand in one file, so that a change of one is read as text in a review."""
from tests.kits.sentences import GOLDEN, everything, sentences


def test_the_golden_file_is_current():
    wanted = "run: python -m tests.kits.sentences, and read the diff"
    assert GOLDEN.read_text(encoding="utf-8") == everything(), wanted


def test_every_refusal_has_a_code_of_its_kind():
    assert "  usage: " not in everything()


def test_sentences_are_found_with_their_placeholders():
    source = ('raise UserError(f"--lr {options.lr:g} is {plain(x)}" " low.", code="lr")\n'
              'logger.info("%s of %d", a.b, len(c))\nlogger.warning(f"{found[0]}" + sentence)\nprint("no")')
    assert sentences(source) == ["info: {b} of {len}", "lr: --lr {lr} is {plain} low.", "warning: {found}{sentence}"]
