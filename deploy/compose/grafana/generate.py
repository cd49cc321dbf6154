"""Writes the dashboards: `python -m deploy.compose.grafana.generate`, in the repository's root."""

from pathlib import Path

from deploy.compose.grafana.board import to_json
from deploy.compose.grafana.boards import BOARDS

FOLDER = Path(__file__).parent / "dashboards"


def main() -> None:
    for board in BOARDS:
        (FOLDER / f"{board.name}.json").write_text(to_json(board))


if __name__ == "__main__":
    main()
