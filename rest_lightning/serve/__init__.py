"""The live page: speech in over a WebSocket, pictures and sound out; protocol in docs/protocol.md."""
