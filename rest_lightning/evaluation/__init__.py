"""Result rows, protocols, scoring of clips, the leaderboard: free of Lightning, and rows and
leaderboard of torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rest_lightning.names import lazy

if TYPE_CHECKING:
    from rest_lightning.evaluation.leaderboard import make_board as make_board
    from rest_lightning.evaluation.protocol import Protocol as Protocol
    from rest_lightning.evaluation.protocol import read_protocol as read_protocol
    from rest_lightning.evaluation.row import ResultRow as ResultRow
    from rest_lightning.evaluation.row import read_rows as read_rows
    from rest_lightning.evaluation.row import write_row as write_row
    from rest_lightning.evaluation.scorer import Scorer as Scorer

__all__, __getattr__ = lazy(
    __name__,
    {
        "leaderboard": ["make_board"],
        "protocol": ["Protocol", "read_protocol"],
        "row": ["ResultRow", "read_rows", "write_row"],
        "scorer": ["Scorer"],
    },
)
