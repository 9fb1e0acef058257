"""What a chat template reads of a record, found in its syntax tree: a key that it does not read would be dropped.

Which names are messages is followed through loops, assignments, namespaces, filters and macros, from the variable
`messages` on, so that the `name` of a function is not taken for the `name` of a message. Where a template uses a
message as a whole (`message | tojson`) or by a computed key, it counts as reading everything.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, TypeGuard

from jinja2 import Environment, TemplateSyntaxError, meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser

from osft.data.records import DataError, Record

FALLBACK_ROLES = {
    "developer": "system",
    **dict.fromkeys(("function", "ipython", "observation", "tool_response"), "tool"),
}
"""Roles of the OpenAI form and of some templates, and what takes their place where a template does not name them."""
STANDARD_ROLES = ("system", "user", "assistant", "tool")
"""Handed to any template, which refuses what it does not want."""
_LINKS = {role: ("tool_call_id", "name") for role in ("tool", *FALLBACK_ROLES) if role != "developer"}
"""Keys that say which call a message answers. Its place in the chat says so too, so a template need not read them."""
_REASONING = frozenset({"reasoning_content", "thinking", "reasoning"})
"""transformers hands a message's reasoning to the template under each of these names, whichever the record has."""

_LISTS = frozenset({"list", "reverse", "sort", "selectattr", "rejectattr", "select", "reject", "unique", "batch"})
_ITEMS = frozenset({"first", "last", "random", "min", "max"})
_WHOLE = frozenset({"tojson", "string", "items", "dictsort", "pprint", "xmlattr", "join", "list", "e", "escape"})
_BY_ATTRIBUTE = frozenset({"selectattr", "rejectattr", "attr", "groupby"})


@dataclass(frozen=True, slots=True)
class TemplateReads:
    """What a template reads."""

    variables: frozenset[str]
    """Names that the caller of the template has to give."""
    message_keys: frozenset[str]
    """Keys of messages."""
    whole_messages: bool
    """Whether it also uses messages with all of their keys."""
    roles: frozenset[str]
    """Roles that it tells apart."""


@lru_cache(maxsize=64)
def template_reads(template: str) -> TemplateReads:
    """What `template`, a chat template in Jinja, reads. Raises DataError if it is not one."""
    try:
        tree = Environment(extensions=[_Generation, loopcontrols]).parse(template)
    except TemplateSyntaxError as error:
        raise DataError(
            f"the model's chat template is no valid Jinja: {error.message} (line {error.lineno}). Repair it: it is "
            "chat_template.jinja, or `chat_template` in tokenizer_config.json, in the model's folder"
        ) from None
    walk = _Walk(tree)
    return TemplateReads(
        variables=frozenset(meta.find_undeclared_variables(tree)),
        message_keys=frozenset(walk.keys),
        whole_messages=walk.whole,
        roles=frozenset(walk.roles),
    )


def unread_keys(template: str, record: Record) -> list[str]:
    """Keys of a chat that `template` does not read, `messages[1].thinking` or `documents` for example."""
    reads = template_reads(template)
    unread = [name for name in record.extra if name not in reads.variables]
    if record.tools and "tools" not in reads.variables:
        unread.append("tools")
    if reads.whole_messages:
        return unread
    keys = reads.message_keys | {"role", "content"}
    if keys & _REASONING:
        keys |= _REASONING
    for position, message in enumerate(record.messages):
        allowed = keys.union(_LINKS.get(message["role"], ()))
        unread += [f"messages[{position}].{name}" for name in message if name not in allowed]
    return unread


def check_read(template: str, record: Record) -> None:
    """Raise DataError if a key or a role of the record would be dropped by `template`, or is unknown to it."""
    if unread := unread_keys(template, record):
        raise DataError(
            f"{record.source}: the model's chat template does not read {', '.join(unread)}, so it would be dropped. "
            "Remove it, move what only describes the record below 'metadata', or use a template that reads it"
        )
    for position, message in enumerate(record.messages):
        if message["role"] not in STANDARD_ROLES and not knows_role(template, message["role"]):
            raise DataError(
                f"{record.source}: messages[{position}] has the role {message['role']!r}, which the model's chat "
                f"template does not name. Use one of {', '.join(STANDARD_ROLES)}"
            )


def knows_role(template: str, role: str) -> bool:
    """Whether `template` names the role. One that writes any role it is given knows none by that."""
    return role in template_reads(template).roles


def replaced_roles(template: str, record: Record) -> list[str]:
    """What `with_known_roles` does to a record, for people: `role 'developer' taken as 'system'`, once a role."""
    roles = {message["role"] for message in record.messages} & FALLBACK_ROLES.keys()
    unknown = sorted(role for role in roles if not knows_role(template, role))
    return [f"role {role!r} taken as {FALLBACK_ROLES[role]!r}" for role in unknown]


def with_known_roles(template: str, record: Record) -> Record:
    """The record with the roles of `FALLBACK_ROLES` replaced, where `template` does not name them."""
    if not replaced_roles(template, record):
        return record
    roles = {role: other for role, other in FALLBACK_ROLES.items() if not knows_role(template, role)}
    messages = tuple(message | {"role": roles.get(message["role"], message["role"])} for message in record.messages)
    return replace(record, messages=messages)


class _Generation(Extension):
    """`{% generation %}` … `{% endgeneration %}`, which transformers adds to Jinja."""

    tags = {"generation"}  # noqa: RUF012 (declared by Jinja)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The body, which stands for itself."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Walk:
    """Finds what is a message (`"one"`), a list of them (`"many"`) or a message's role, and what is read of them."""

    def __init__(self, tree: nodes.Template) -> None:
        self._kinds: dict[str, str] = {"messages": "many"}
        self._macros = {macro.name: macro for macro in tree.find_all(nodes.Macro)}
        self.keys: set[str] = set()
        self.roles: set[str] = set()
        self.whole = False
        self._tables = {
            node.target.name: node.node
            for node in tree.find_all(nodes.Assign)
            if isinstance(node.target, nodes.Name) and isinstance(node.node, nodes.Dict)
        }
        known = 0
        while known != len(self._kinds):  # an assignment may stand after its use, in a loop
            known = len(self._kinds)
            for node in _descendants(tree):
                self._bind(node)
        for node in _descendants(tree):
            self._read(node)
            self._compare(node)

    def _bind(self, node: nodes.Node) -> None:
        """Take down which names a statement makes messages."""
        if isinstance(node, nodes.For) and self._kind(node.iter) == "many":
            self._name(node.target, "one")
        elif isinstance(node, nodes.Assign):
            self._name(node.target, self._kind(node.node))
        elif isinstance(node, nodes.Call) and isinstance(node.node, nodes.Name) and node.node.name in self._macros:
            parameters = self._macros[node.node.name].args
            for parameter, value in zip(parameters, node.args, strict=False):
                self._name(parameter, self._kind(value))
            for keyword in node.kwargs:
                self._kinds.update({keyword.key: kind} if (kind := self._kind(keyword.value)) else {})
        elif isinstance(node, nodes.Call) and isinstance(node.node, nodes.Name) and node.node.name == "namespace":
            for keyword in node.kwargs:
                self._kinds.update({f".{keyword.key}": kind} if (kind := self._kind(keyword.value)) else {})

    def _name(self, target: nodes.Node, kind: str) -> None:
        if kind and isinstance(target, nodes.Name):
            self._kinds.setdefault(target.name, kind)
        elif kind and isinstance(target, nodes.NSRef):
            self._kinds.setdefault(f".{target.attr}", kind)

    def _kind(self, node: nodes.Node | None) -> str:
        """`"one"`, `"many"`, `"role"`, or empty for anything else."""
        if isinstance(node, nodes.Name):
            return self._kinds.get(node.name, "")
        if isinstance(node, nodes.Getattr):
            if node.attr in ("previtem", "nextitem"):
                return "one"
            of = self._kind(node.node)
            return (
                ("role" if node.attr == "role" and of == "one" else "") if of else self._kinds.get(f".{node.attr}", "")
            )
        if isinstance(node, nodes.Getitem):
            of = self._kind(node.node)
            if of == "many":
                return "many" if isinstance(node.arg, nodes.Slice) else "one"
            return "role" if of == "one" and _is_text(node.arg) and node.arg.value == "role" else ""
        if isinstance(node, nodes.Filter) and self._kind(node.node) == "many":
            return "many" if node.name in _LISTS else "one" if node.name in _ITEMS else ""
        if isinstance(node, nodes.Filter) and self._kind(node.node) == "one" and node.name in ("default", "d"):
            return "one"
        if isinstance(node, nodes.CondExpr):
            return self._kind(node.expr1) or self._kind(node.expr2)
        if isinstance(node, nodes.Add | nodes.Or | nodes.And):
            return self._kind(node.left) or self._kind(node.right)
        if isinstance(node, nodes.List | nodes.Tuple):
            return "many" if any(self._kind(item) == "one" for item in node.items) else ""
        if isinstance(node, nodes.Call):
            if isinstance(node.node, nodes.Name) and node.node.name == "dict":
                return next((kind for value in node.args if (kind := self._kind(value)) == "one"), "")
            if isinstance(node.node, nodes.Getattr) and node.node.attr in ("copy", "lower", "strip"):
                return self._kind(node.node.node)
        return ""

    def _read(self, node: nodes.Node) -> None:
        """Take down which keys of messages a node reads."""
        if isinstance(node, nodes.Getattr) and self._kind(node.node) == "one":
            if node.attr in ("items", "values"):
                self.whole = True
            self.keys.add(node.attr)
        elif isinstance(node, nodes.Getitem) and self._kind(node.node) == "one":
            self._add(node.arg)
        elif isinstance(node, nodes.Call) and isinstance(node.node, nodes.Getattr):
            if node.node.attr in ("get", "pop") and self._kind(node.node.node) == "one" and node.args:
                self._add(node.args[0])
        elif isinstance(node, nodes.Filter) and (kind := self._kind(node.node)) in ("one", "many"):
            if node.name in _BY_ATTRIBUTE and node.args:
                self._add(node.args[0])
            for keyword in node.kwargs:
                if keyword.key == "attribute":
                    self._add(keyword.value)
            self.whole |= node.name in (_WHOLE if kind == "one" else _WHOLE - {"list"}) and not node.kwargs
        elif isinstance(node, nodes.Output | nodes.Concat):
            self.whole |= any(self._kind(part) in ("one", "many") for part in node.nodes)

    def _compare(self, node: nodes.Node) -> None:
        """Take down which roles a node tells apart: it compares one with them, or looks one up."""
        parts: list[Any] = []
        if isinstance(node, nodes.Compare):
            parts = list(_descendants(node))
        elif isinstance(node, nodes.Getitem) and self._kind(node.arg) == "role":
            table = self._tables.get(node.node.name) if isinstance(node.node, nodes.Name) else node.node
            parts = [node.arg, *(pair.key for pair in table.items)] if isinstance(table, nodes.Dict) else []
        elif isinstance(node, nodes.Filter) and self._kind(node.node) == "many" and node.name in _BY_ATTRIBUTE:
            texts = [part.value for part in _descendants(node) if _is_text(part)]
            self.roles.update(texts if texts[:1] == ["role"] else ())
        if any(self._kind(part) == "role" for part in parts):
            self.roles.update(part.value for part in parts if _is_text(part))

    def _add(self, key: nodes.Node) -> None:
        if isinstance(key, nodes.Const):
            self.keys.add(str(key.value))
        else:
            self.whole = True


def _is_text(node: Any) -> TypeGuard[nodes.Const]:
    return isinstance(node, nodes.Const) and isinstance(node.value, str)


def _descendants(node: nodes.Node) -> Iterator[Any]:
    for child in node.iter_child_nodes():
        yield child
        yield from _descendants(child)
