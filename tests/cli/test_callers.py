"""`pgtable callers`: what it prints, its exit codes, and what it costs."""

from __future__ import annotations

import json
import time
from pathlib import Path

import jsonschema  # type: ignore[import-untyped]  # its types are a package of their own
import pytest
from click.testing import CliRunner, Result

from emu.callers import find
from emu.cli import cli
from emu.image import KernelImage
from tests.kernels import kernel_image, kernel_path

SCHEMA = Path(__file__).resolve().parents[2] / "docs" / "schema" / "callers.json"

pytestmark = pytest.mark.kernels


def run(*args: str) -> Result:
    return CliRunner().invoke(cli, ["callers", *args])


@pytest.mark.parametrize("name", ["debian:6.1", "debian:6.12", "debian:7.3"])
def test_the_object_is_what_was_found(name: str) -> None:
    image = kernel_image(name)
    result = run("set_memory_valid", "--kernel", name, "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    found = json.loads(result.stdout)
    jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text())).validate(found)
    assert next(iter(found.items())) == ("schema", "pgtable.callers/1")
    assert (found["kernel"], found["release"], found["function"]) == (name, image.release, "set_memory_valid")
    assert [int(c["address"], 16) for c in found["calls"]] == [c.address for c in find(image, "set_memory_valid").calls]


def test_the_table_has_a_line_for_each_site() -> None:
    image = kernel_image("debian:6.1")
    lines = [line.rstrip() for line in run("set_memory_valid", "--kernel", "debian:6.1").stdout.splitlines()]
    found = find(image, "set_memory_valid")
    head = f"set_memory_valid at {found.address:#018x}, {image.release}: "
    assert lines[0] == head + "2 calls in 2 functions, address taken 0 times"
    assert lines[1].split() == ["ADDRESS", "KIND", "WHERE"]
    assert [line.split() for line in lines[2:]] == [[f"{s.address:#018x}", s.kind, s.place] for s in found.calls]


def test_an_address_taken_says_where() -> None:
    kernel_image("debian:7.3")
    result = run("pageattr_pte_entry", "--kernel", "debian:7.3")
    assert "0 calls in 0 functions, address taken 1 time\n" in result.stdout
    assert "pointer  address taken at pageattr_ops+0x20" in result.stdout


def test_an_address_is_taken_in_place_of_a_name() -> None:
    address = kernel_image("debian:6.12").symbols["set_memory_valid"]
    by_address = json.loads(run(f"{address:#x}", "--kernel", "debian:6.12", "--json").stdout)
    by_name = json.loads(run("set_memory_valid", "--kernel", "debian:6.12", "--json").stdout)
    assert by_address["calls"] == by_name["calls"]


def test_bad_input_is_one_sentence_and_exit_code_2() -> None:
    path = str(kernel_path("debian:7.3"))
    for function, sentence in {
        "set_memory_validd": "this kernel has no symbol set_memory_validd",
        "kfence_init_pool": "this kernel has no symbol kfence_init_pool; it has kfence_init_pool.part.0",
        "0x10": f"0x10: outside {path}",
    }.items():
        result = run(function, "--kernel", path)
        assert (result.exit_code, result.stdout) == (2, "")
        assert result.stderr.startswith(f"pgtable: error: {sentence}")
        assert result.stderr.count("\n") == 1


def test_loading_and_finding_take_less_than_half_a_second() -> None:
    path = kernel_path("debian:7.3")
    kernel_image("debian:7.3")  # now it is in the cache

    def once() -> float:
        start = time.process_time()
        find(KernelImage.load(path), "set_memory_valid")
        return time.process_time() - start  # of this process: others may be busy

    assert min(once() for _ in range(3)) < 0.5
