"""YAML that says what JSON can say: what is read is what stands there, and no file takes all memory.

Parsers take the last of two equal keys, follow a page of aliases to a billion values, make what tags name, and raise
RecursionError at deep nesting. Here these are errors of the document.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

MOST = 1_000_000
"""Values of a document, those that aliases repeat counted each time."""
PLAIN = {f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map", "merge")}
"""Tags of what JSON has, too."""


def parse_yaml(text: str) -> Any:
    """Parse YAML as JSON would be: null, true and false, numbers, texts, lists, and keys with values.

    Numbers such as 1e-5 are numbers, as in YAML 1.2, and dates are texts.

    Raises:
        yaml.YAMLError: it is no YAML, has a key twice or a tag, or stands for more than a million values. It is a
            ValueError where it is nested too deeply.

    Example:
        >>> parse_yaml("{lr: 1e-5, day: 2024-05-01}")
        {'lr': 1e-05, 'day': '2024-05-01'}
    """
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _count(node, {})
        return loader.construct_document(node)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    finally:
        loader.dispose()


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {  # noqa: RUF012 - as its base class has it
        first: [(tag, pattern) for tag, pattern in known if tag in PLAIN]
        for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), [*"-+.0123456789"]
)


def _count(node: yaml.Node, known: dict[int, int]) -> int:
    """Count the values that a node stands for; `known` holds those of nodes before it, 0 of those around it."""
    if id(node) in known:
        if not known[id(node)]:
            raise _wrong(node, "an alias stands inside of what it names")
        return known[id(node)]
    known[id(node)], count = 0, 1
    if node.tag not in PLAIN:
        raise _wrong(node, f"the tag {node.tag!r} is not read; expected texts, numbers, lists, and keys with values")
    if isinstance(node, yaml.MappingNode):
        keys = set[tuple[str, str]]()
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _wrong(key, "a key is a list or has keys of its own; expected a text")
            if (key.tag, key.value) in keys:
                raise _wrong(key, f"the key {key.value!r} is there twice")
            keys.add((key.tag, key.value))
            count += _count(value, known)
    elif isinstance(node, yaml.SequenceNode):
        count += sum(_count(value, known) for value in node.value)
    if count > MOST:
        raise _wrong(node, f"with its aliases it stands for more than {MOST} values")
    known[id(node)] = count
    return count


def _wrong(node: yaml.Node, problem: str) -> yaml.YAMLError:
    return yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
