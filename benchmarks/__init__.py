"""One file per question; every one writes JSON. See README.md."""
