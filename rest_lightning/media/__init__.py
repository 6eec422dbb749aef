"""Files of sound, video and pictures: reading, writing, and pages that show them; no model in here."""
