"""Result rows, protocols, scoring of clips, the leaderboard: free of Lightning, and rows and leaderboard of torch."""
