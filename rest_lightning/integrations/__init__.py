"""Avatars for LiveKit and Pipecat. Each module needs the extra of its name."""
