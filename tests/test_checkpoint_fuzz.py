"""A damaged directory opens and reads, or is refused in one sentence; nothing else happens.

Directories are damaged at random from fixed seeds: bytes of headers and of JSON, values in them,
lengths of files. tests/support/fuzz.py does it, in processes that are held to 5 seconds and 1 GB
each.
"""

import json
import multiprocessing
from pathlib import Path

import pytest
from support.fuzz import SENTENCE, main, outcome, write

EACH = 500


def test_the_directory_opens_when_it_is_whole(tmp_path: Path) -> None:
    write(tmp_path / "whole")
    assert outcome(tmp_path / "whole") == "opened"


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))  # 2,000 in all
def test_a_damaged_directory_opens_or_is_refused_in_one_sentence(seed: int, tmp_path: Path) -> None:
    """In a process that is forked from here, where torch is imported already."""

    def work() -> None:
        (tmp_path / "outcomes.json").write_text(json.dumps(main(seed, EACH, tmp_path)))

    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    child.join()
    assert child.exitcode == 0
    outcomes = json.loads((tmp_path / "outcomes.json").read_text())
    assert len(outcomes) == EACH
    refusals = [said for said in outcomes if said != "opened"]
    assert [said for said in refusals if not SENTENCE.fullmatch(said)] == []
    assert len(refusals) > EACH / 2  # most damage is noticed
    assert len(set(refusals)) > EACH / 4  # and told apart
