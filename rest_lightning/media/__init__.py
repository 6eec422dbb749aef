"""Pictures, sound and video: reading, writing, and the faces in them."""
