"""The accuracy budget: lossy rewrites as candidates, what each loses and wins, and which of them go together."""
