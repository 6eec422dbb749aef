"""Raw videos to prepared clips: probe, scenes, faces, tracks, box, filters, crop; every decision in
the manifest.
"""
