"""Failing cases as files: cases of every harness come back as they were, and files that hold none are refused."""

from __future__ import annotations

import json
from functools import cache
from itertools import islice
from random import Random
from typing import Any

import pytest

from emu.checks import registry, stored
from emu.checks.campaign import Worlds, cases_of
from emu.checks.harness import differences
from emu.checks.walks import WalkCase
from kernel_model.vmalloc import VmFlags
from tests.kernels import KERNELS, MORE, kernel_image

WALK = "walk_kernel_page_table_range"
SEED, PAGE = 3, 4096

pytestmark = pytest.mark.kernels


@cache
def worlds(name: str) -> Worlds:
    return Worlds(kernel_image(name))


def cases(function: str, image: str) -> list[Any]:
    """Some of the prepared cases, the first ones among them, and random ones."""
    harness = registry.harness(function)
    world, rng = worlds(image).of(harness, "plain"), Random(SEED)
    prepared = list(cases_of(world, harness, "plain", 0, SEED))
    return [*prepared[:8], *prepared[8::41], *(harness.random(world, rng) for _ in range(12))]


@pytest.mark.parametrize("function", registry.HARNESSES)
def test_cases_of_every_harness_come_back_as_they_were(function: str) -> None:
    image = next(name for name in (*KERNELS, *MORE) if function in kernel_image(name).symbols)
    harness = registry.harness(function)
    for case in cases(function, image):
        flavour, back = stored.load(stored.dump(function, "plain", PAGE, case), function, PAGE, harness.case)
        assert (flavour, back) == ("plain", case), (SEED, str(case))
        assert type(back) is type(case)


def test_an_area_with_two_flags_comes_back_and_runs() -> None:
    """What made files that could not be read: a combination of flags has no name."""
    both = VmFlags.VM_ALLOC | VmFlags.VM_FLUSH_RESET_PERMS
    found = [c for c in cases("set_memory_ro", "debian:7.3") if c.around.area and c.around.area.flags == both]
    assert found
    harness = registry.harness("set_memory_ro")
    world = worlds("debian:7.3").of(harness, "plain")
    text = stored.dump("set_memory_ro", "plain", PAGE, found[0])
    _, case = stored.load(text, "set_memory_ro", PAGE, harness.case)
    first, again = harness.run(world, found[0]), harness.run(world, case)
    assert first == again
    assert differences(again) == []


def test_a_file_names_no_class() -> None:
    for case in islice(cases("set_memory_ro", "debian:7.3"), 3):
        text = stored.dump("set_memory_ro", "plain", PAGE, case)
        assert "kernel_model" not in text
        assert "emu" not in text


def changed(**fields: Any) -> str:
    """The text of a walk's case with other values in its fields."""
    data = json.loads(stored.dump(WALK, "plain", PAGE, cases(WALK, "debian:7.3")[0]))
    data["case"].update(fields)
    return json.dumps(data)


def file(case: Any, function: str = WALK, page_size: int = PAGE) -> str:
    return json.dumps({"function": function, "world": "plain", "page_size": page_size, "case": case})


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "not a stored case: Expecting value"),
        ("[]", "not a stored case: list indices"),
        ("{}", "not a stored case: 'function'"),
        (file(None, "strlen"), f"is of strlen in world plain, not of {WALK}"),
        (file(None, page_size=16384), "is of a kernel with pages of 16384 bytes, not 4096"),
        (file(None), "case: null where an object is due"),
        (file({"type": "os:system"}), "case: type where a WalkCase has tree, start"),
    ],
)
def test_a_file_that_holds_no_case_is_refused(text: str, sentence: str) -> None:
    with pytest.raises(stored.StoredError, match=sentence):
        stored.load(text, WALK, PAGE, WalkCase)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"start": "0"}, r'case\.start: "0" where a number is due'),
        ({"private": 1}, r"case\.private: 1 where true or false is due"),
        ({"counts": [1]}, r"case\.counts: 1 items where 2 are due"),
        ({"callbacks": "pte_entry"}, r'case\.callbacks: "pte_entry" where a list is due'),
        ({"script": [[0, [0, None]]]}, r"case\.script\[1\]: 2 items where 3 are due"),
        ({"tree": None}, r"case\.tree: null where an object is due"),
        ({"more": 1}, r"case: .*, more where a WalkCase has tree, "),
    ],
)
def test_a_field_of_another_type_is_named(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(stored.StoredError, match=sentence):
        stored.load(changed(**fields), WALK, PAGE, WalkCase)


def test_an_enum_without_the_name_is_refused() -> None:
    harness = registry.harness("set_memory_ro")
    data = json.loads(stored.dump("set_memory_ro", "plain", PAGE, cases("set_memory_ro", "debian:7.3")[0]))
    data["case"]["around"]["context"] = "NMI"
    with pytest.raises(stored.StoredError, match=r"case\.around\.context: NMI is no Context"):
        stored.load(json.dumps(data), "set_memory_ro", PAGE, harness.case)
