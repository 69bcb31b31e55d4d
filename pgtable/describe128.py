"""`explain` of one 128-bit descriptor (FEAT_D128), bit by bit. **Not judged**, and every explanation says so.

    from pgtable.describe128 import explain128
    print(explain128(0x0000_2000_0000_0000_0000_0040_0000_0701))

Rules of this file:
- Meanings come from the layouts of d128.py. Permissions are a number in PIR_ELx or S2PIR_EL2: no word has them.
- What is not known from one word is assumed, and every assumption is said.
"""

from __future__ import annotations

from collections.abc import Iterator

from pgtable.d128 import CONTIGUOUS_RUN_128, LOWEST_LEVEL_128, MOST_SKIPPED, NOT_JUDGED, Format128
from pgtable.describe import REGIMES, Explanation, FieldText, Place, _regime, meaning
from pgtable.descriptors import LAST_LEVEL, Granule, Kind
from pgtable.findings import Finding, size_text
from pgtable.params import Regime


def explain128(
    word: int,
    level: int | None = None,
    *,
    granule: Granule | str = Granule.K4,
    stage: int = 1,
    fwb: bool = False,
    regime: Regime | str = Regime.EL10,
) -> Explanation:
    """Explains a descriptor of 128 bits; not judged. `level`: Arm's, from -2 (4K); None takes it for a leaf: 3 - SKL.

    `fwb`: HCR_EL2.FWB, for stage 2. Raises ValueError for a word, level, stage, granule or regime that cannot be.
    """
    if not 0 <= word < 1 << 128:
        raise ValueError(f"word {word:#x}: must be 128 bits")
    if stage not in (1, 2):
        raise ValueError(f"stage {stage}: must be 1 or 2")
    granule = Granule.named(granule) if isinstance(granule, str) else granule
    regime = _regime(regime)
    if regime is Regime.EL2:
        raise ValueError("regime EL2: never has 128-bit descriptors (EL10, EL20, EL3 have)")
    fmt = Format128(granule, el0=regime.has_el0, pie=True, poe=True, aie=True, stage2=stage == 2, fwb=fwb)
    reason = "a leaf's SKL is 3 minus its level; a table may be above" if level is None else ""
    level = LAST_LEVEL - fmt.skipped(word) if level is None else level
    if not LOWEST_LEVEL_128[granule] <= level <= LAST_LEVEL:
        raise ValueError(f"level {level}: 128-bit {granule.label} has {LOWEST_LEVEL_128[granule]} to {LAST_LEVEL}")
    kind, layout = fmt.kind(word, level), fmt.layout(word, level)
    place = Place(
        kind, level, reason, granule, False, stage, regime, _address(word, level, fmt), fmt.level_size(level), {}
    )
    return Explanation(
        word,
        layout,
        _title(place),
        tuple(FieldText(f, f.get(word), meaning(f, f.get(word))) for f in layout),
        _facts(word, place, fmt),
        tuple(_findings(word, place, fmt)),
        ("overlays (POE) and AIE are on",) if stage == 1 else ("overlays (S2POE) are on",),
        place=place,
    )


def _address(word: int, level: int, fmt: Format128) -> int | None:
    """OA, or the next table's address; None where the word is invalid."""
    kind = fmt.kind(word, level)
    if kind is Kind.TABLE:
        return fmt.table_base(word)
    return None if kind is Kind.INVALID else fmt.leaf(level)["OA"].get(word)


def _title(place: Place) -> str:
    regime = "stage 2 of EL1&0" if place.stage == 2 else f"stage 1 of {REGIMES[place.regime]}"
    level = f"level {place.level}{' (guessed)' if place.reason else ''}"
    return f"{place.kind.name.lower()}, {level}, {place.granule.label} granule, 128-bit (not judged), {regime}"


def _facts(word: int, place: Place, fmt: Format128) -> dict[str, str]:
    facts = {"judged": f"{NOT_JUDGED}; from Arm's pseudocode"}
    if place.reason:
        facts["level"] = f"{place.level}, guessed: {place.reason}; --level decides"
    if place.address is None:
        return facts | {"access": f"none: translation fault, level {place.level}"}
    where = f"PA {place.address:#018x}"
    if place.kind is Kind.TABLE:
        entries, below = 1 << fmt.index_bits(word), fmt.next_level(word, place.level)
        covers = f"{entries} entries of {size_text(fmt.level_size(below))}"
        return facts | {"points to": f"the table at {where}, level {below}: {covers}, {size_text(16 * entries)} itself"}
    facts["maps"] = f"{size_text(place.size)} at {where}"
    run = CONTIGUOUS_RUN_128[fmt.granule].get(place.level)
    if fmt.leaf(place.level)["Contiguous"].get(word):
        facts["run"] = f"{run} entries, {size_text(run * place.size)}" if run else "none at this level: ignored"
    return facts


def _findings(word: int, place: Place, fmt: Format128) -> Iterator[Finding]:
    if not word & 1:
        yield Finding("fault", "VALID", "VALID is 0: hardware ignores the other bits")
        return
    skipped = fmt.skipped(word)
    if skipped > MOST_SKIPPED[fmt.granule]:
        yield Finding("wrong", "SKL", f"SKL = {skipped}: the {fmt.granule.label} granule skips two levels at most")
    elif place.kind is Kind.INVALID:
        yield Finding("wrong", "SKL", f"level {place.level} + SKL {skipped} is more than {LAST_LEVEL}")
    for field in fmt.layout(word, place.level).misuse(word):
        yield Finding("wrong", field.name, f"bits {field.bits} are reserved and must be {field.reserved[-1]}")
    if place.kind is Kind.TABLE and fmt.table(0)["TA"].get(word) != place.address:
        text = f"the table has {size_text(16 << fmt.index_bits(word))}: address bits below that are ignored"
        yield Finding("suspicious", "TA", text)
