"""Cases for KFENCE, by kind: where a fault is and what the objects around it are doing; what is freed, and how."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from random import Random

from kernel_model.kfence import Fault, Metadata, ObjectState

U64 = (1 << 64) - 1
ALLOCATED = (ObjectState.ALLOCATED, ObjectState.RCU_FREEING)
NOT_ALLOCATED = (ObjectState.UNUSED, ObjectState.FREED)


@dataclass(frozen=True)
class Pool:
    """Where the pool is: its VA, PAGE_SIZE, and how many objects it has."""

    va: int
    page: int
    objects: int

    @property
    def size(self) -> int:
        """Bytes."""
        return (self.objects + 1) * 2 * self.page

    def object_page(self, index: int) -> int:
        """VA of the page of an object."""
        return self.va + 2 * (index + 1) * self.page

    def guard(self, index: int) -> int:
        """VA of the guard behind an object; -1 for page 1, -2 for what would be before it."""
        return self.object_page(index) + self.page


@dataclass(frozen=True)
class Case:
    """One fault. `objects`: what is not as it was after boot. `valid`: the page can be accessed already."""

    kind: str
    addr: int
    is_write: bool
    objects: dict[int, Metadata] = field(default_factory=dict)
    valid: bool = False
    enabled: bool = True
    placed: bool = True  # __kfence_pool is set
    metadata: bool = True  # kfence_metadata is set
    fault: Fault = Fault.REPORT


Maker = Callable[[Random, Pool], tuple[int, dict[int, Metadata]]]


def an_object(rng: Random, pool: Pool, index: int, states: tuple[ObjectState, ...]) -> Metadata:
    """An object at the left or the right end of its page, with what an earlier fault may have left."""
    size = rng.randint(1, pool.page)
    start = pool.object_page(index)
    addr = start if rng.random() < 0.5 else start + pool.page - size
    left = rng.choice((0, 0, pool.guard(index) + rng.randrange(pool.page)))
    return Metadata(rng.choice(states), addr, size, left)


def _middle(rng: Random, pool: Pool) -> int:
    """An object that has one on either side."""
    return rng.randrange(1, pool.objects - 1)


def _offset(rng: Random, pool: Pool) -> int:
    return rng.choice((0, 1, 7, pool.page // 2, pool.page - 1, rng.randrange(pool.page)))


def _guard(left: tuple[ObjectState, ...], right: tuple[ObjectState, ...]) -> Maker:
    """A fault between two objects in these states."""

    def make(rng: Random, pool: Pool) -> tuple[int, dict[int, Metadata]]:
        i = _middle(rng, pool)
        objects = {i: an_object(rng, pool, i, left), i + 1: an_object(rng, pool, i + 1, right)}
        return pool.guard(i) + _offset(rng, pool), objects

    return make


def _as_near(shift: int) -> Maker:
    """Both allocated, and as near as each other; `shift`: bytes nearer to the left one."""

    def make(rng: Random, pool: Pool) -> tuple[int, dict[int, Metadata]]:
        i, gap = _middle(rng, pool), rng.randrange(pool.page // 4)
        guard = pool.guard(i)
        left = Metadata(rng.choice(ALLOCATED), guard - gap - 8, 8)
        right = Metadata(rng.choice(ALLOCATED), guard + pool.page + gap, 8)
        return guard + pool.page // 2 - shift, {i: left, i + 1: right}

    return make


def _wild(rng: Random, pool: Pool) -> tuple[int, dict[int, Metadata]]:
    """Sizes and addresses that no object has: distances below 0, and beyond what an int holds."""
    i = _middle(rng, pool)
    addr = pool.guard(i) + _offset(rng, pool)
    sizes = (0, 2 * pool.page, 1 << 31, (1 << 31) + 5, 1 << 32, U64, rng.getrandbits(64))
    objects = {
        j: Metadata(rng.choice(ALLOCATED), rng.choice((pool.object_page(j), rng.getrandbits(64))), rng.choice(sizes))
        for j in (i, i + 1)
    }
    return addr, objects


def _page(states: tuple[ObjectState, ...]) -> Maker:
    """A fault on the page of an object."""

    def make(rng: Random, pool: Pool) -> tuple[int, dict[int, Metadata]]:
        i = rng.choice((0, pool.objects - 1, rng.randrange(pool.objects)))
        return pool.object_page(i) + _offset(rng, pool), {i: an_object(rng, pool, i, states)}

    return make


def _first_page(rng: Random, pool: Pool) -> tuple[int, dict[int, Metadata]]:
    return pool.va + _offset(rng, pool), {0: an_object(rng, pool, 0, ALLOCATED)}


def _first_guard(states: tuple[ObjectState, ...]) -> Maker:
    def make(rng: Random, pool: Pool) -> tuple[int, dict[int, Metadata]]:
        return pool.guard(-1) + _offset(rng, pool), {0: an_object(rng, pool, 0, states)}

    return make


def _last_guard(states: tuple[ObjectState, ...]) -> Maker:
    def make(rng: Random, pool: Pool) -> tuple[int, dict[int, Metadata]]:
        last = pool.objects - 1
        return pool.guard(last) + _offset(rng, pool), {last: an_object(rng, pool, last, states)}

    return make


def _at(where: Callable[[Random, Pool], int]) -> Maker:
    return lambda rng, pool: (where(rng, pool) & U64, {})


def _anywhere(rng: Random, pool: Pool) -> int:
    return pool.va + rng.randrange(pool.size)


MAKERS: dict[str, Maker] = {
    "guard, both allocated": _guard(ALLOCATED, ALLOCATED),
    "guard, left allocated": _guard(ALLOCATED, NOT_ALLOCATED),
    "guard, right allocated": _guard(NOT_ALLOCATED, ALLOCATED),
    "guard, neither allocated": _guard(NOT_ALLOCATED, NOT_ALLOCATED),
    "guard, both as near": _as_near(0),
    "guard, left nearer by a byte": _as_near(1),
    "guard, right nearer by a byte": _as_near(-1),
    "guard, impossible objects": _wild,
    "first guard, object allocated": _first_guard(ALLOCATED),
    "first guard, object free": _first_guard(NOT_ALLOCATED),
    "last guard, object allocated": _last_guard(ALLOCATED),
    "last guard, object free": _last_guard(NOT_ALLOCATED),
    "page of a freed object": _page((ObjectState.FREED,)),
    "page of an unused object": _page((ObjectState.UNUSED,)),
    "page of an allocated object": _page(ALLOCATED),
    "first page": _first_page,
    "below the pool": _at(lambda rng, pool: pool.va - rng.choice((1, 8, pool.page, rng.randrange(1, 1 << 30)))),
    "behind the pool": _at(lambda rng, pool: pool.va + pool.size + rng.choice((0, 1, rng.randrange(1 << 30)))),
    "any address": _at(lambda rng, _: rng.getrandbits(64)),
    "disabled": _at(_anywhere),
    "no pool": _at(lambda rng, pool: rng.choice((_anywhere(rng, pool), rng.randrange(pool.size)))),
    "no metadata, first guard": _first_guard(NOT_ALLOCATED),
    "no metadata, first object": _at(lambda rng, pool: pool.object_page(0) + _offset(rng, pool)),
}
# Kinds of 7.x: any of the above whose report ends the kernel.
ENDS = {"oops": Fault.OOPS, "panic": Fault.PANIC}


def kinds(*, fault: bool) -> tuple[str, ...]:
    """Every kind that there is; `fault`: on a kernel that has kfence.fault=."""
    return (*MAKERS, *(ENDS if fault else ()))


def make(kind: str, rng: Random, pool: Pool) -> Case:
    """A random case of a kind."""
    maker = (
        MAKERS[rng.choice(("guard, both allocated", "page of a freed object", "first page"))]
        if kind in ENDS
        else MAKERS[kind]
    )
    addr, objects = maker(rng, pool)
    metadata = not kind.startswith("no metadata")
    return Case(
        kind,
        addr,
        is_write=rng.random() < 0.5,
        objects=objects if metadata else {},
        valid=rng.random() < 0.2,
        enabled=kind != "disabled",
        placed=kind != "no pool",
        metadata=metadata,
        fault=ENDS.get(kind, rng.choice((Fault.NONE, Fault.REPORT))),
    )


def some(count: int, seed: int, pool: Pool, *, fault: bool) -> Iterator[Case]:
    """`count` cases: every kind in turn."""
    rng = Random(seed)
    names = kinds(fault=fault)
    for i in range(count):
        yield make(names[i % len(names)], rng, pool)


@dataclass(frozen=True)
class Free:
    """One call of kfence_guarded_free. `index`: the object, which is as `meta` says."""

    kind: str
    addr: int
    index: int
    meta: Metadata
    zombie: bool = False
    fault: Fault = Fault.REPORT


FREES = ("free", "free, guard opened", "free a zombie", "free twice", "free at a wrong address")


def make_free(kind: str, rng: Random, pool: Pool) -> Free:
    """A random case of a kind."""
    index = _middle(rng, pool)
    meta = an_object(rng, pool, index, NOT_ALLOCATED if kind == "free twice" else ALLOCATED)
    guard = pool.guard(index - rng.randint(0, 1)) + rng.randrange(pool.page)
    meta.unprotected_page = guard if kind == "free, guard opened" or rng.random() < 0.3 else 0
    wrong = rng.choice((1, 8, -8, pool.page)) if kind == "free at a wrong address" else 0
    zombie = kind == "free a zombie" or (meta.state not in ALLOCATED and rng.random() < 0.5)
    return Free(kind, meta.addr + wrong, index, meta, zombie, rng.choice(tuple(Fault)))


def some_frees(count: int, seed: int, pool: Pool) -> Iterator[Free]:
    """`count` cases: every kind in turn."""
    rng = Random(seed)
    for i in range(count):
        yield make_free(FREES[i % len(FREES)], rng, pool)
