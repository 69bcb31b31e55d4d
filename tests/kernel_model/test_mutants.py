"""Every broken rule of the kernel model is told by the check of a compiled kernel."""

from __future__ import annotations

import inspect

import pytest

from tests.kernel_model.mutants import MUTANTS, PACKAGES, Mutant, verdict
from tests.kernels import kernel_image
from tests.mutation import broken

IDS = [mutant.name for mutant in MUTANTS]
FAST = MUTANTS[:: len(MUTANTS) // 6]


@pytest.mark.parametrize("mutant", MUTANTS, ids=IDS)
def test_every_mutant_still_fits_the_code(mutant: Mutant) -> None:
    with broken([mutant.change], PACKAGES):
        pass


def test_there_are_enough_of_them_and_each_has_a_name_of_its_own() -> None:
    assert len(set(IDS)) == len(MUTANTS) >= 40
    assert inspect.getdoc(verdict)


@pytest.mark.kernels
@pytest.mark.parametrize("mutant", FAST, ids=[mutant.name for mutant in FAST])
def test_some_broken_rules_are_told(mutant: Mutant) -> None:
    assert verdict(mutant, kernel_image(mutant.kernel)).function


@pytest.mark.kernels
@pytest.mark.full
@pytest.mark.parametrize("mutant", MUTANTS, ids=IDS)
def test_every_broken_rule_is_told(mutant: Mutant) -> None:
    assert verdict(mutant, kernel_image(mutant.kernel)).function
