"""Avatars for voice-agent frameworks: LiveKit and Pipecat. Each module needs the extra of its name."""
