"""Files of sound, video and pictures: reading, writing, and pages that show them; no model in
here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rest_lightning.names import lazy

if TYPE_CHECKING:
    from rest_lightning.media.audio import SpeechSource as SpeechSource
    from rest_lightning.media.audio import open_speech as open_speech
    from rest_lightning.media.faces import FaceBoxes as FaceBoxes
    from rest_lightning.media.faces import FaceDetector as FaceDetector
    from rest_lightning.media.files import check_output as check_output
    from rest_lightning.media.files import whole_file as whole_file
    from rest_lightning.media.files import write_text_atomic as write_text_atomic
    from rest_lightning.media.portrait import load_portrait as load_portrait
    from rest_lightning.media.portrait import read_portrait as read_portrait
    from rest_lightning.media.provenance import load_signer as load_signer
    from rest_lightning.media.provenance import read_provenance as read_provenance
    from rest_lightning.media.sheet import draw_contact_sheet as draw_contact_sheet
    from rest_lightning.media.video import VideoFile as VideoFile
    from rest_lightning.media.video import read_clip_audio as read_clip_audio
    from rest_lightning.media.video import read_frames as read_frames
    from rest_lightning.media.writer import BackgroundWriter as BackgroundWriter
    from rest_lightning.media.writer import Mp4Writer as Mp4Writer
    from rest_lightning.media.writer import open_pipe as open_pipe

__all__, __getattr__ = lazy(
    __name__,
    {
        "audio": ["SpeechSource", "open_speech"],
        "faces": ["FaceBoxes", "FaceDetector"],
        "files": ["check_output", "whole_file", "write_text_atomic"],
        "portrait": ["load_portrait", "read_portrait"],
        "provenance": ["load_signer", "read_provenance"],
        "sheet": ["draw_contact_sheet"],
        "video": ["VideoFile", "read_clip_audio", "read_frames"],
        "writer": ["BackgroundWriter", "Mp4Writer", "open_pipe"],
    },
)
