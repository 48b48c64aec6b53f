"""docs/handoff.md says what the code does: states, messages and their fields, and tests that exist."""

import ast
import re
from pathlib import Path

from disagg.cluster import messages
from disagg.cluster.conserve import Conserved
from disagg.cluster.handoff_prefill import SendState
from disagg.cluster.receiving import ReceiveState
from disagg.transfer.layout import Layout

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "handoff.md").read_text()
HAND_OFF = ("Offer", "ChunkReady", "Cancel", "Renewed", "Renew", "PullDone", "Dropped")
SCENARIOS = ("tests/unit/test_handoff_scenarios.py", "tests/unit/test_handoff_transfers.py")


def section(title: str) -> str:
    return TEXT.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def rows(text: str) -> list[list[str]]:
    """The cells of every table row but the headings."""
    lines = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith("| ---")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def functions(path: str) -> set[str]:
    tree = ast.parse((ROOT / path).read_text())
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_states_are_those_of_the_code():
    """Each side's table has its states, in order, and its drawing has them all."""
    for title, states in (("The prefill worker's side", SendState), ("The decode worker's side", ReceiveState)):
        text = section(title)
        listed = [row[0].strip("`") for row in rows(text) if row[0].startswith("`")]
        assert listed == [state.value for state in states]
        assert all(state.name in text.partition("```\n")[2].partition("```")[0] for state in states)


def test_messages_and_fields_are_those_of_the_code():
    """Every hand-off message has a row with its fields, in order, and there is no other row."""
    listed = {row[0].strip("`"): re.findall(r"`(\w+)`", row[2]) for row in rows(section("Messages"))[1:]}
    assert tuple(listed) == HAND_OFF
    for name, fields in listed.items():
        assert fields == list(getattr(messages, name).__struct_fields__)


def test_every_message_of_the_protocol_is_described():
    """A message added between workers must be added to the document: those that name a hand-off, or several."""
    found = set()
    for name, kind in vars(messages).items():
        types = getattr(kind, "__annotations__", {})
        if "handoff" in types or types.get("handoffs") == list[str]:
            found.add(name)
    assert found == set(HAND_OFF)


def test_the_conservation_rule_and_the_handshake_are_those_of_the_code():
    """The terms of the rule and the fields of the layout are named."""
    assert f"`{' + '.join(Conserved._fields)} == total`" in TEXT
    assert all(f"`{name}`" in section("The handshake") for name in Layout.__struct_fields__)


def test_every_scenario_has_a_row_and_every_named_test_exists():
    """35 rows; a test named in a row is there, and a test of these files is named in its own row."""
    table = {int(row[0]): row[2] for row in rows(section("The scenarios"))[1:]}
    assert sorted(table) == list(range(1, 36))
    written = {name for path in SCENARIOS for name in functions(path) if name.startswith("test_scenario_")}
    for number, cell in table.items():
        named = set(re.findall(r"`(test_\w+)`", cell))
        assert named == {name for name in written if name.startswith(f"test_scenario_{number:02}_")}
        for path, name in re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", cell):
            assert (ROOT / path).exists(), path
            assert not name or name in functions(path), name
        assert named or "`tests/" in cell or "not shown" in cell
