"""Environments that keep their state in their classes: methods, descriptors, nested classes, Enums, own metadata."""

import enum
import functools

from nasty_environments import Nasty


class Frozen(Nasty):
    seen = frozenset()

    def act(self, action):
        type(self).seen = type(self).seen | {(action, len(type(self).seen))}

    def look(self):
        return sum(action * number for action, number in self.seen)


class FrozenAttribute(Nasty):
    def __init__(self):
        self.seen = frozenset()

    def act(self, action):
        self.seen |= {action + len(self.seen)}

    def look(self):
        return sum(self.seen)


class OwnMetadata(Nasty):
    def __init__(self):
        self.metadata = {"render_modes": [], "sum": 0}

    def act(self, action):
        self.metadata["sum"] += action

    def look(self):
        return self.metadata["sum"]


class MetadataOfClass(Nasty):
    metadata = {"render_modes": [], "sum": 0}  # noqa: RUF012

    def act(self, action):
        self.metadata["sum"] += action

    def look(self):
        return self.metadata["sum"]


class OwnSpec(Nasty):
    def __init__(self):
        self.spec = {"difficulty": 0}

    def act(self, action):
        self.spec["difficulty"] += action

    def look(self):
        return self.spec["difficulty"]


class TwoUnderscores(Nasty):
    def __init__(self):
        setattr(self, "__sum", 0)

    def act(self, action):
        setattr(self, "__sum", getattr(self, "__sum") + action)

    def look(self):
        return getattr(self, "__sum")


class Namespace(Nasty):
    class Curriculum:
        total = 0

        class Inner:
            numbers = [0]  # noqa: RUF012

    def act(self, action):
        self.Curriculum.total += action
        self.Curriculum.Inner.numbers.append(action)

    def look(self):
        return self.Curriculum.total + 0.1 * sum(self.Curriculum.Inner.numbers[-2:])


class Config:
    total = 0
    lock = object()


class HeldClass(Nasty):
    def __init__(self):
        self.config = Config

    def act(self, action):
        self.config.total += action

    def look(self):
        return self.config.total


class Sum:
    def __init__(self):
        self.total = 0
        # No state holds it, and it never changes
        self.lock = object()

    def __call__(self, action):
        self.total += action


class CallableOfClass(Nasty):
    add = Sum()

    def act(self, action):
        type(self).add(action)

    def look(self):
        return type(self).add.total


def counted(method):
    n = 0

    @functools.wraps(method)
    def counting(self, action):
        nonlocal n
        n += action
        counting.n = n
        return method(self, action)

    counting.n = 0
    return counting


class DecoratedMethod(Nasty):
    @counted
    def act(self, action):
        pass

    def look(self):
        return type(self).act.n


class MutableDefault(Nasty):
    def act(self, action, numbers=[0]):  # noqa: B006
        numbers[0] += action

    def look(self):
        return self.act.__func__.__defaults__[0][0]


class StaticDefault(Nasty):
    @staticmethod
    def numbers(held=[]):  # noqa: B006
        return held

    def act(self, action):
        self.numbers().append(action)

    def look(self):
        return sum(self.numbers()[-3:])


class Mode(enum.Enum):
    EASY = 1
    HARD = 2


class EnumAttribute(Nasty):
    def __init__(self):
        self.mode = Mode.EASY
        self.modes = [Mode.EASY, 1 + 2j, range(3)]

    def act(self, action):
        self.mode = Mode.HARD if action else Mode.EASY
        self.modes.append(self.mode)

    def look(self):
        return self.mode.value + sum(mode.value for mode in self.modes[3:][-3:])


class Stored:
    """A descriptor that keeps the values itself."""

    def __init__(self):
        self.values = {}

    def __get__(self, owner, kind=None):
        return self if owner is None else self.values.get(id(owner), 0)

    def __set__(self, owner, value):
        self.values[id(owner)] = value


class Descriptor(Nasty):
    outcome = "disproved"
    total = Stored()

    def act(self, action):
        self.total += action + 1

    def look(self):
        return self.total


class StoredInOwner:
    """A descriptor that keeps the values in the object, as most do."""

    def __set_name__(self, owner, name):
        self.name = f"_{name}"

    def __get__(self, owner, kind=None):
        return self if owner is None else vars(owner).get(self.name, 0)

    def __set__(self, owner, value):
        vars(owner)[self.name] = value


class HonestDescriptor(Nasty):
    total = StoredInOwner()

    def act(self, action):
        self.total += action

    def look(self):
        return self.total
