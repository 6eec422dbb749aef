"""The non-streaming teacher: the whole clip at once, full attention (REST sec. 3.3)."""

from __future__ import annotations

from typing import Any

from rest_lightning.errors import UserError
from rest_lightning.tasks.a2v import A2VModule


class TeacherModule(A2VModule):
    """Trains an A2V-DiT with full attention on the flow-matching loss.

    Arguments are those of :class:`A2VModule`.

    Raises:
        UserError: a transformer with chunked attention.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.transformer.config["attention"] != "full":
            raise UserError(
                "expected a teacher with attention 'full', got 'chunked': that is the student's"
            )
