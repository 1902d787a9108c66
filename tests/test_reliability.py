"""A short campaign of damaged inputs; the long ones, of kills and full disks too, are slow."""

import subprocess
import sys

import campaign
import pytest


def test_damaged_inputs_end_in_a_result_or_one_line():
    done, failures = campaign.inputs(60, workers=1, quiet=True)
    assert not failures, "\n".join(failures)
    assert sum(done.values()) == 60
    assert {outcome for _, outcome in done} == {"accepted", "refused"}


@pytest.mark.slow
@pytest.mark.parametrize("what", [["kills", "--count", "40"], ["disk"]])
def test_kills_and_full_disks(what):
    # in a process of its own: children are forked, which threads of torch would not survive
    subprocess.run([sys.executable, campaign.__file__, *what], check=True)
