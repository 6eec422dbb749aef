"""The seam for voice agents: a face that idles, speaks what it is given, and can be interrupted."""

from rest_lightning.avatar.avatar import FRAME_S, Avatar, AvatarFrame, AvatarSettings, AvatarStats
from rest_lightning.avatar.pool import AvatarPool, ModelError
from rest_lightning.avatar.source import speak

__all__ = [
    "FRAME_S",
    "Avatar",
    "AvatarFrame",
    "AvatarPool",
    "AvatarSettings",
    "AvatarStats",
    "ModelError",
    "speak",
]
