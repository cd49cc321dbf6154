"""The dashboards that are committed are those that the code builds, by Grafana's own schema."""

import json
from pathlib import Path

import pytest
from grafana_foundation_sdk.models.dashboard import Dashboard

from deploy.compose.grafana.board import Board, to_json
from deploy.compose.grafana.boards import BOARDS
from deploy.compose.grafana.generate import FOLDER
from deploy.compose.grafana.reading import queries


@pytest.mark.parametrize("board", BOARDS, ids=lambda board: board.name)
def test_the_committed_file_is_what_the_code_builds(board: Board) -> None:
    text = (FOLDER / f"{board.name}.json").read_text()
    assert text == to_json(board), "run: python -m deploy.compose.grafana.generate"
    read = Dashboard.from_json(json.loads(text))
    assert read.uid == f"headrace-{board.name}" and read.panels is not None


def test_no_other_files_lie_there() -> None:
    assert {path.stem for path in FOLDER.glob("*.json")} == {board.name for board in BOARDS}


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.json")), ids=lambda path: path.stem)
def test_a_file_is_read_as_it_was_written(path: Path) -> None:
    (board,) = [board for board in BOARDS if board.name == path.stem]
    written = [
        (panel.title, panel.unit, panel.kind == "stack", *query) for panel in board.panels for query in panel.queries
    ]
    read = [(one.panel, one.unit, one.stacked, one.legend, one.expression) for one in queries(path)]
    assert read == written
