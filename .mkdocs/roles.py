"""Turns the roles of docstrings, such as :class:`PPOPlus`, into links where the site documents what they name."""

import re
from typing import Any

import griffe

ROLE = re.compile(r":(class|meth|func|attr|data|mod):`([^`]+)`")


class Roles(griffe.Extension):
    """Edits each docstring once it is read."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Replace the roles in the docstring of an object."""
        if obj.docstring is not None:
            obj.docstring.value = ROLE.sub(lambda role: link(role[1], role[2], obj), obj.docstring.value)


def link(kind: str, name: str, obj: griffe.Object) -> str:
    """Return a link that becomes plain text where nothing of that name is documented."""
    target = name if name.startswith("sb3_ppo_plus.") else f"sb3_ppo_plus.{name}"
    if kind == "meth" and "." not in name:
        owner = obj if obj.is_class or obj.parent is None else obj.parent
        target = f"{owner.path}.{name}"
    return f'<autoref optional identifier="{target}"><code>{name.rpartition(".")[2]}</code></autoref>'
