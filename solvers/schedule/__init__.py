"""What to give up, and where: token schedules, and one choice over all lossy rewrites under an accuracy limit.

Reads no model and imports no torch; usable on its own.
"""
