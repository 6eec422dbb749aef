"""Evaluation: result rows, protocols, scoring of clips, the leaderboard. Free of Lightning; rows and leaderboard also of torch."""
