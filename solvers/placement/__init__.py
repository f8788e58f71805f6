"""Where the experts of a mixture-of-experts model lie: from a routing trace and a cluster to a plan.

Reads no weights and imports no torch; usable on its own.
"""
